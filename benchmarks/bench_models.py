"""Measures whole models: without a bottleneck, with this package's, and with eager PyTorch code that does the same.

python benchmarks/bench_models.py --data gpt2 --output rows.csv

Models are built from their configs, with random weights, the same for each provider. Rows and protocol are those of
`cu-fast bench`, whose `--show` prints them too.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

from cu_fast import bench
from cu_fast.bench.cells import Cell
from cu_fast.bench.eager import bottleneck_weights, through_bottleneck
from cu_fast.bench.job import Builder, Job
from cu_fast.hf import attach
from cu_fast.nn import BottleneckConfig

C, K = 25_000, 8  # the codebook, where no shape is given; code_dim is the model's width
WIDTH = {"gpt2": 768, "t5": 512}
TOKENS = {"gpt2": 1, "t5": 64}  # of one call of the model
LAYER = {"gpt2": "transformer.h.5", "t5": "encoder.block.2"}  # in the middle
PROMPT = 32  # tokens in the KV cache before the first step that is timed
STEPS = 8  # greedy steps of one timed call


def model_cell(name: str, shape: tuple[int, int, int] | None = None) -> Cell:
    """The cell of a model: GPT-2 small or the encoder of T5 small, or one of another width with shape (E, C, k)."""
    E, codes, k = shape or (WIDTH[name], C, K)
    return Cell("models", TOKENS[name], E, codes, k, data=name)


class ModelInputs:
    """A model's cell: builds the model and its input, equal ones for equal seeds."""

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell, self.seed = cell, seed

    def model(self) -> nn.Module:
        heads = max(1, self.cell.E // 64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.cell.data == "gpt2":
                config = transformers.GPT2Config(n_embd=self.cell.E, n_head=heads)
                return transformers.GPT2LMHeadModel(config).eval()
            config = transformers.T5Config(d_model=self.cell.E, num_layers=6, num_heads=heads, d_ff=4 * self.cell.E)
            return transformers.T5EncoderModel(config).eval()

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        count = PROMPT if self.cell.data == "gpt2" else self.cell.T
        return torch.randint(1000, (1, count), generator=generator)


def _without(inputs: ModelInputs) -> Job:
    return _job(inputs, inputs.model())


def _with_bottleneck(inputs: ModelInputs) -> Job:
    return _job(inputs, _attached(inputs))


def _with_eager_bottleneck(inputs: ModelInputs) -> Job:
    model = _attached(inputs)
    (bottleneck,) = (module for name, module in model.named_modules() if name.endswith("codebook_bottleneck"))
    W_enc, b_enc, codes, table, b_dec = bottleneck_weights(bottleneck, torch.float32)
    bottleneck.forward = functools.partial(
        through_bottleneck,
        W_enc=W_enc, b_enc=b_enc, codes=codes, table=table, b_dec=b_dec, deleted=None, k=inputs.cell.k,
    )  # fmt: skip
    return _job(inputs, model)


def _attached(inputs: ModelInputs) -> nn.Module:
    cell, model = inputs.cell, inputs.model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.seed + 1)
        attach(model, {LAYER[cell.data]: BottleneckConfig(cell.E, cell.E, cell.C, cell.k)}, impl="cpu")
    return model


def _job(inputs: ModelInputs, model: nn.Module) -> Job:
    ids = inputs.tokens()
    if inputs.cell.data == "t5":
        return Job(lambda: model(input_ids=ids), note="encoder, 1 x 64 tokens")
    prefill, step = _greedy(model, ids)
    return Job(step, before=prefill, divide=STEPS, note=f"a token, after {PROMPT} in the KV cache; mean of {STEPS}")


def _greedy(model: nn.Module, ids: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions: one fills a new KV cache with the prompt, one decodes STEPS tokens greedily after it."""
    state: dict = {}

    def prefill() -> None:
        output = model(input_ids=ids, use_cache=True)
        state.update(cache=output.past_key_values, token=output.logits[:, -1:].argmax(-1))

    def steps() -> None:
        for _ in range(STEPS):
            output = model(input_ids=state["token"], past_key_values=state["cache"], use_cache=True)
            state["token"] = output.logits[:, -1:].argmax(-1)

    return prefill, steps


MODEL_PROVIDERS: dict[str, Builder] = {
    "none": _without,
    "cu_fast": _with_bottleneck,
    "torch_fp32": _with_eager_bottleneck,
}


def run(
    models: tuple[str, ...] = tuple(WIDTH),
    shapes: tuple[tuple[int, int, int] | None, ...] = (None,),
    output: Path | None = None,
    progress: bool = False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Measure models; ``how``: seconds, rounds, cache, threads and seed of a ``bench.Plan``. Returns the new rows."""
    cells = [model_cell(name, shape) for name in models for shape in shapes]
    work = [
        bench.Work(cell, MODEL_PROVIDERS, lambda cell, plan, _: (ModelInputs(cell, plan.seed), None)) for cell in cells
    ]
    return bench.run(bench.Plan(**how), output, progress, work)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(WIDTH), help="models: gpt2,t5")
    parser.add_argument("--shape", action="append", help="E,C,k: 768,25000,8; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.0, help="per provider")
    parser.add_argument("--rounds", type=int, default=5, help="at least, however long they take")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="a CSV file to which rows are added, cell by cell")
    options = vars(parser.parse_args(arguments))
    models = tuple(options.pop("data").split(","))
    if unknown := [name for name in models if name not in WIDTH]:
        parser.error(f"--data is {unknown[0]!r}; it should be of {', '.join(WIDTH)}")
    shapes = tuple(tuple(map(int, shape.split(","))) for shape in options.pop("shape") or ()) or (None,)
    Console().print(*bench.tables(run(models, shapes, progress=True, **options)))


if __name__ == "__main__":
    main()
