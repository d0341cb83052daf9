"""Measures generation in vLLM: alone, with the plug-in and nothing deleted, one mask for all requests, a mask for each.

python benchmarks/bench_vllm.py --output rows.csv       # with the Python of .venv-vllm (make test-vllm makes it)

A model of GPT-2 small's size with random weights, on the CPU in fp32; 32 requests of 8 tokens, 64 more for each. Three engines in
one process take turns, in an order drawn anew for each round: vLLM alone (the plug-in's wraps are taken out while it runs), one
with a splice "replace", one with a splice "delta". What each says is compared with transformers, all of it. Rows are those of
`cu-fast bench`, whose `--show` prints them too; a time is of one token that is said, prefill included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1",
)  # fmt: skip

import numpy as np
import torch
import transformers
from rich.console import Console

import cu_fast
from cu_fast import bench
from cu_fast.bench import machine

LAYER = "transformer.h.5"
C, K, CODE_DIM = 25_000, 8, 512  # of splice "replace"
LATENTS, FIRE = 16_384, 0.02  # of splice "delta", an autoencoder with thresholds: share of latents that fire at a token
DELETED = {"replace": 2_500, "delta": 100}  # codes of a mask
PROMPT, VOCABULARY = 8, 50_257


class Kind(NamedTuple):
    """What is measured.

    Attributes:
        name: of the row.
        engine: "none", "replace" or "delta".
        masks: how many different ones the requests hold; 0 = none.
    """

    name: str
    engine: str
    masks: int


def kinds(requests: int) -> list[Kind]:
    return [Kind("none", "none", 0)] + [
        Kind(f"{splice}{what}", splice, masks)
        for splice in ("replace", "delta")
        for what, masks in ((", nothing deleted", 0), (", one mask", 1), (", a mask per request", requests))
    ]


class Bench:
    """The model's folder, its attachments, and an engine with each.

    Args:
        folder: for what is written.
        requests: of a batch.
        tokens: that each says.
        layers: of the model.
        seed: of everything.
    """

    def __init__(self, folder: Path, requests: int, tokens: int, layers: int = 12, seed: int = 0) -> None:
        self.folder, self.requests, self.tokens, self.layers, self.seed = folder, requests, tokens, layers, seed
        generator = torch.Generator().manual_seed(seed)
        self.prompts = torch.randint(VOCABULARY, (requests, PROMPT), generator=generator)
        self._model().save_pretrained(folder / "model")
        self.attachments = {"replace": self._replace(), "delta": self._delta()}
        for name, attachment in self.attachments.items():
            for i in range(requests):
                attachment.add_mask(self._mask(attachment, DELETED[name], i))
            attachment.save(folder / name)
        self.engines = {name: self._engine(name) for name in ("none", *self.attachments)}

    def _model(self) -> Any:
        torch.manual_seed(self.seed)
        config = transformers.GPT2Config(n_layer=self.layers, bos_token_id=None, eos_token_id=None)
        return transformers.GPT2LMHeadModel(config).eval()

    def _replace(self) -> Any:
        model = self._model()
        config = cu_fast.BottleneckConfig(d_model=768, code_dim=CODE_DIM, num_codes=C, k=K)
        return cu_fast.attach(model, {LAYER: config}, splice="replace")

    def _delta(self) -> Any:
        model, generator = self._model(), torch.Generator().manual_seed(self.seed + 1)
        enc = torch.randn(LATENTS, 768, generator=generator) / 768**0.5
        with torch.inference_mode():
            x = model(input_ids=self.prompts, output_hidden_states=True).hidden_states[6].reshape(-1, 768)
        theta = torch.full((LATENTS,), float((x @ enc.T).flatten()[:1_000_000].quantile(1 - FIRE)))
        sae = cu_fast.SAE(enc, torch.zeros(LATENTS), theta, enc / (LATENTS * FIRE) ** 0.5, kind="threshold", k=None)
        return cu_fast.attach(model, {LAYER: sae})

    def _mask(self, attachment: Any, deleted: int, number: int) -> Any:
        (splice,) = attachment.bottlenecks.values()
        generator = torch.Generator().manual_seed(1000 + number)
        ids = torch.randperm(splice.num_codes, generator=generator)[:deleted]
        whose = (
            {"sae": splice.sae} if splice.has_latents
            else {"num_codes": splice.num_codes, "codebook_sha256": splice.codebook_sha256()}
        )  # fmt: skip
        return cu_fast.Mask.from_ids(ids, topic=str(number), **whose)

    def _engine(self, name: str) -> Any:
        from vllm import LLM

        import cu_fast.vllm

        cu_fast.vllm.register()
        own = {} if name == "none" else dict(
            load_format="cu_fast", model_loader_extra_config={"attachment": str(self.folder / name)}
        )  # fmt: skip
        return LLM(
            model=str(self.folder / "model"), skip_tokenizer_init=True, dtype="float32", max_model_len=256,
            max_num_seqs=self.requests, kv_cache_memory_bytes=512 * 2**20, enforce_eager=True, seed=0, **own,
        )  # fmt: skip

    def names(self, kind: Kind) -> list[list[str]]:
        """What each request unlearns."""
        return [[str(i % kind.masks)] if kind.masks else [] for i in range(self.requests)]

    def say(self, kind: Kind) -> tuple[list[list[int]], float, float]:
        """A batch: ids, seconds, and seconds of all cores."""
        from vllm import SamplingParams

        alone = kind.engine == "none"
        wanted = [
            SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True, detokenize=False,
                           extra_args=None if alone else {"unlearn": names})
            for names in self.names(kind)
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in self.prompts.tolist()]
        with without_wraps() if alone else contextlib.nullcontext():
            start, cpu = time.perf_counter(), time.process_time()
            found = self.engines[kind.engine].generate(prompts, wanted, use_tqdm=False)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return [list(one.outputs[0].token_ids) for one in found], seconds, cpu

    @torch.inference_mode()
    def right(self, kind: Kind) -> list[list[int]]:
        """What transformers says."""
        options = dict(attention_mask=torch.ones_like(self.prompts), max_new_tokens=self.tokens, do_sample=False,
                       pad_token_id=0)  # fmt: skip
        if kind.engine == "none":
            return self._model().generate(self.prompts, **options)[:, PROMPT:].tolist()
        attachment = self.attachments[kind.engine]
        with attachment.unlearn([set(names) or None for names in self.names(kind)]):
            return attachment.model.generate(self.prompts, **options)[:, PROMPT:].tolist()


@contextlib.contextmanager
def without_wraps() -> Iterator[None]:
    """vLLM's own functions, inside."""
    from cu_fast.vllm import admission, runner_v1, seams

    found = seams.found([*admission.WRAPS, *runner_v1.WRAPS])
    ours: list[tuple[type, str, Callable]] = [(owner, one.name, getattr(owner, one.name)) for owner, one in found]
    try:
        for owner, name, made in ours:
            setattr(owner, name, getattr(made, seams.ORIGINAL))
        yield
    finally:
        for owner, name, made in ours:
            setattr(owner, name, made)


def run(rounds: int = 5, requests: int = 32, tokens: int = 64, layers: int = 12, seed: int = 0,
        output: Path | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Measure all kinds; rounds of them, after one that is not timed. Returns the new rows."""
    known = bench.read_rows(output) if output is not None and output.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        made, some = Bench(Path(folder), requests, tokens, layers, seed), kinds(requests)
        said = {kind: made.say(kind)[0] for kind in some}
        times: dict[Kind, list[tuple[float, float]]] = {kind: [] for kind in some}
        order = np.random.default_rng(seed)
        for _ in range(rounds):
            for i in order.permutation(len(some)):
                ids, *taken = made.say(some[i])
                assert ids == said[some[i]], "a batch says the same each time"
                times[some[i]].append(tuple(taken))
        rows = rows_of(made, said, times)
    if output is not None:
        bench.write_rows(output, known + rows)
    return rows


def rows_of(made: Bench, said: dict[Kind, list], times: dict[Kind, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    import vllm

    total, alone, facts = made.requests * made.tokens, next(iter(said)), machine.facts()
    seconds = {kind: [wall for wall, _ in taken] for kind, taken in times.items()}
    rows = []
    for kind, ids in said.items():
        right = made.right(kind)
        note = (
            f"vLLM {vllm.__version__}; {1e3 * statistics.median(cpu for _, cpu in times[kind]) / total:.4g} ms of cores"
        )
        base = said[Kind(f"{kind.engine}, nothing deleted", kind.engine, 0)] if kind.masks else said[alone]
        if kind is not alone:
            by_round = statistics.median(mine / bare for mine, bare in zip(seconds[kind], seconds[alone]))
            note += f"; {100 * (by_round - 1):+.1f} % by rounds"
            whose = "with nothing deleted" if kind.masks else "without the plug-in"
            note += f"; {sum(a == b for a, b in zip(ids, base))} of {len(ids)} answers are those {whose}"
        shape = {"E": 768, "C": C, "k": K} if kind.engine == "replace" else {"E": 768, "C": LATENTS, "k": 0}
        config = (shape if kind.engine != "none" else {"E": 768, "C": 0, "k": 0}) | {
            "dtype": "fp32", "mask": str(kind.masks), "data": f"gpt2 in vLLM, {made.tokens} tokens each",
            "cache": "warm", "seed": made.seed, "device": "cpu",
        }  # fmt: skip
        p20, median, p80 = (1e3 * float(np.quantile(seconds[kind], q)) / total for q in (0.2, 0.5, 0.8))
        rows.append(dict.fromkeys(bench.COLUMNS, "") | {
            "kernel_name": "models", "kernel_provider": kind.name, "kernel_operation_mode": "forward",
            "metric_name": "speed", "metric_unit": "ms", "x_name": "T", "x_label": "tokens", "x_value": made.requests,
            "y_value_50": round(median, 5), "y_value_20": round(p20, 5), "y_value_80": round(p80, 5),
            "extra_benchmark_config_str": json.dumps(config), "status": "ok", "note": note,
            "match": sum(a == b for a, b in zip(ids, right)) / len(ids),
            "added_percent": round(100 * (statistics.median(seconds[kind]) / statistics.median(seconds[alone]) - 1), 2),
            "tokens_per_second": round(1e3 / median, 1), "rounds": len(times[kind]),
            "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"), **facts,
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="that each request says")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a CSV file to which rows are added")
    rows = run(**vars(parser.parse_args(arguments)))
    Console().print(*bench.tables(rows))
    for row in rows:
        print(f"{row['kernel_provider']:28} match {row['match']:.3f}  {row['note']}")


if __name__ == "__main__":
    main()
