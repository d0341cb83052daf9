"""Codes fitted to one layer of a model that stays as it is.

    fit_codes(model, tokenizer, "texts.txt", "codes", kind="topk")

Two kinds: ``topk``, a TopK sparse autoencoder, as a folder that :func:`cu_fast.sae.load_sae` reads; ``codebook``, a
codebook bottleneck, as a folder that :func:`cu_fast.attach` reads, with ``splice="delta"``: a model that it is put into
computes what it did before, until codes are deleted. The model is run without a gradient, once per token, up to the layer.

While it runs, ``OUTPUT.run`` holds the rows and the checkpoints; it is removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cu_fast.files import target_of
from cu_fast.hf import Tokenizer, attach
from cu_fast.nn import BottleneckConfig, CodebookBottleneck
from cu_fast.ops.checks import check_choice
from cu_fast.train import CodebookTrainer, UsageCallback
from cu_fast.train.book import Book
from cu_fast.train.module import Fit
from cu_fast.train.resume import checkpoint_to_resume, settings_of
from cu_fast.train.states import Plan, Reader, Source, States, barrier, default_layer
from cu_fast.train.texts import Texts
from cu_fast.train.topk import TopK

Kind = Literal["topk", "codebook"]

# kind -> num_codes, k, learning rate; of a codebook the codes' own rate is CODES_RATE times that of the rest.
DEFAULTS = {"topk": (8192, 32, 2e-3), "codebook": (16_384, 16, 1e-3)}
CODES_RATE = 3.0
DEAD_ROWS = 81_920  # rows after which a code that none of them kept is dead, where the run is long enough
SAMPLE = 20_000  # rows that a run starts from, at least
WARM_UP, DECAY = 20, 0.35  # steps, and the share of the steps at the end, in which the rate rises and falls
RESEED_EVERY, RESEED_UNTIL = 40, 0.7  # of a codebook: steps, and the share of the training
CHECKPOINT = "checkpoint-*"


def fit_codes(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: str | Path | Iterable[str],
    output: str | Path,
    *,
    kind: Kind = "topk",
    layer: str | None = None,
    num_codes: int | None = None,
    k: int | None = None,
    code_dim: int = 256,
    tokens: int | None = None,
    max_length: int = 256,
    model_batch_size: int = 8,
    epochs: float = 4.0,
    batch_size: int = 2048,
    learning_rate: float | None = None,
    bf16: bool = True,
    seed: int = 0,
    buffer_bytes: int = 2**30,
    resume: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Fit codes to one layer's output on texts, the model frozen, and write them to a folder.

    Under torchrun the processes share the work, on one machine: each runs its own part of the texts through the model, and
    trains on its own part of every step's rows.

    Args:
        model: a transformers model, where it is and in its own dtype; it is not changed.
        tokenizer: the model's.
        data: path of a text file (one running text), a .jsonl file (one text per line), a parquet file or a folder of the
            ``datasets`` library; or a list of texts. It streams, and is read more than once.
        output: the folder to write, whole or not at all; there must be none.
        kind: "topk" or "codebook"; see the module's docstring.
        layer: its name, as in ``model.named_modules()``; None = at a quarter of the depth: of L layers the one with index
            ceil(L / 4), ``model.layers.8`` of 30.
        num_codes: C, latents or codes; None = 8,192 for "topk", 16,384 for "codebook".
        k: kept per token; None = 32 for "topk", 16 for "codebook".
        code_dim: E, of a codebook.
        tokens: that the model reads, at most; None = all of the data.
        max_length: tokens that the model reads at once; a longer text is cut into several windows.
        model_batch_size: windows per forward pass.
        epochs: how often every row is trained on; may be a fraction.
        batch_size: rows of a step, over all processes.
        learning_rate: None = 2e-3 for "topk"; 1e-3 for "codebook", whose codes have three times the rate.
        bf16: products of the training in bf16, the weights in fp32.
        seed: of the rows' order and of all draws.
        buffer_bytes: of the file of rows, at most. Data with more rows are trained on in rounds of what it holds.
        resume: go on with the run that was stopped in ``OUTPUT.run``, to the same weights.
        arguments: further fields of transformers' TrainingArguments, by name: ``logging_steps``, ``save_steps``,
            ``report_to``.

    Returns:
        The figures: explained_variance and l0 on held-out rows, dead_share, tokens, rows, steps, and the seconds of
        counting the texts, of the model, of the training and in all.

    Raises:
        ValueError: an unknown kind or layer (near names are listed); a number out of range; data without a text, or with
            fewer rows than codes; a buffer that is too small; an unfinished run without ``resume``, or none, or one of
            other settings, with it.
        FileExistsError: the output is there.
        FileNotFoundError: there are no data.
        RuntimeError: data that need the ``datasets`` library, which is not installed.
        OSError: the disk has no place for the buffer.
        An error before the first checkpoint leaves no file.
    """
    began = time.perf_counter()
    check_choice("kind", kind, get_args(Kind))
    C, K, rate = (
        usual if given is None else given for given, usual in zip((num_codes, k, learning_rate), DEFAULTS[kind])
    )
    _check_ints(
        num_codes=C, k=K, code_dim=code_dim, max_length=max_length, model_batch_size=model_batch_size,
        batch_size=batch_size, buffer_bytes=buffer_bytes, **({} if tokens is None else {"tokens": tokens}),
    )  # fmt: skip
    _check_range("k", K, C, "num_codes")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    _check_range("max_length", max_length, limit, "the model's longest text")
    for name, value in (("epochs", epochs), ("learning_rate", rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it should be finite and above 0")
    output = target_of(output)
    work = output.with_name(f"{output.name}.run")
    _check_folders(output, work, resume)
    texts = Texts(data)
    layer = default_layer(model) if layer is None else layer
    reader = Reader(model, layer, tokenizer.pad_token_id or 0)
    width = reader.width
    config = None
    if kind == "codebook":
        config = BottleneckConfig(width, code_dim, C, K, activation="none", weight="one")
        attach(model, {layer: config}).detach()  # whatever would refuse the result refuses it now
    else:
        from cu_fast.sae import save_sae
    source = Source(texts, tokenizer, max_length, model_batch_size, tokens)
    row_bytes = 2 * width + 4  # in bf16, and its length
    plan = source.plan(buffer_bytes // row_bytes)
    _check_plan(plan, texts, C, buffer_bytes, row_bytes)
    counted = time.perf_counter()

    training = _training_arguments(
        work, dict(arguments or {}), learning_rate=rate, bf16=bf16, seed=seed, batch_size=batch_size,
        use_cpu=model.device.type == "cpu",
    )  # fmt: skip
    rank, ranks = training.process_index, training.world_size
    settings = settings_of(
        model, [], {}, training, dataset=f"{plan.tokens} tokens {plan.sha256[:12]}", kind=kind, layer=layer,
        num_codes=C, k=K, code_dim=code_dim, epochs=epochs, buffer_bytes=buffer_bytes, max_length=max_length,
        model_batch_size=model_batch_size,
    )  # fmt: skip
    checkpoint = None
    if resume and get_last_checkpoint(work):
        checkpoint = checkpoint_to_resume(training, settings)
    barrier()  # every process has looked before the folder is there
    with _removed_after_an_error(work, rank):
        if rank == 0:
            work.mkdir(parents=True, exist_ok=True)
        barrier()
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        states = States(plan, source, reader, work, mark, batch_size, epochs, seed, rank, ranks)
        dead_after = min(DEAD_ROWS, max(batch_size, states.steps * batch_size // 4))
        module = Book(config, dead_after) if kind == "codebook" else TopK(width, C, K, dead_after)
        if checkpoint is None:
            _start(module, states, C, seed)
        _set_schedule(training, states.steps)
        trainer = FitTrainer(
            module, states, {layer: module.bottleneck} if kind == "codebook" else {}, training, rate * CODES_RATE
        )
        trainer.settings = settings
        trainer.add_callback(StepCallback(module))
        if kind == "codebook":
            trainer.add_callback(UsageCallback(trainer, RESEED_EVERY, RESEED_UNTIL, seed))
        trainer.restore_usage(checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        module.eval()
        figures = module.figures(states.held_out())
    if rank == 0:
        if kind == "codebook":
            _save_attachment(model, layer, module.bottleneck, output)
        else:
            save_sae(module.to_sae(layer, getattr(model.config, "name_or_path", None) or None), output)
        shutil.rmtree(work)
    barrier()
    ended = time.perf_counter()
    return {
        **figures, "tokens": plan.tokens, "rows": plan.rows, "steps": states.steps,
        "seconds_counting": counted - began, "seconds_model": states.seconds,
        "seconds_training": ended - counted - states.seconds, "seconds": ended - began,
    }  # fmt: skip


class FitTrainer(CodebookTrainer):
    """transformers' Trainer of a :class:`Fit` on :class:`States`, whose log has the figures on held-out rows.

    Args:
        module: what is trained.
        states: what it is trained on, in their own order.
        bottlenecks: name -> the bottleneck in it; empty = there is none.
        arguments: transformers' own.
        codes_rate: learning rate of a bottleneck's codes.
    """

    def __init__(
        self, module: Fit, states: States, bottlenecks: Mapping[str, CodebookBottleneck], arguments: TrainingArguments,
        codes_rate: float,
    ) -> None:  # fmt: skip
        self._bottlenecks = bottlenecks
        self.held_out = states.held_out()
        super().__init__(
            None, codes_rate, model=module, args=arguments, train_dataset=states, data_collator=_as_argument
        )

    @property
    def bottlenecks(self) -> Mapping[str, CodebookBottleneck]:
        """Name -> the bottleneck that is trained."""
        return self._bottlenecks

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch of rows, a scalar; with ``return_outputs`` what the module returned too."""
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Logs the figures too."""
        if "loss" in logs:
            logs |= self.model.figures(self.held_out)
        super().log(logs, *arguments, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset)  # the states have an order of their own


class StepCallback(TrainerCallback):
    """Tells a :class:`Fit` that a step comes, and that it is made."""

    def __init__(self, module: Fit) -> None:
        self.module = module

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called by the trainer before each optimizer step."""
        self.module.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called by the trainer after each optimizer step."""
        self.module.after_step()


def _as_argument(rows: Tensor) -> dict[str, Tensor]:
    return {"rows": rows}


def _training_arguments(work: Path, more: dict[str, Any], *, batch_size: int, **chosen: Any) -> TrainingArguments:
    fields = dict(
        output_dir=str(work), **chosen, weight_decay=0.0, adam_beta2=0.99,
        max_grad_norm=0.0, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 0},
        logging_steps=50, save_steps=100, save_total_limit=2, report_to=[], dataloader_pin_memory=False,
        remove_unused_columns=False, ddp_broadcast_buffers=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    made = TrainingArguments(**(fields | more))
    if batch_size % made.world_size:
        raise ValueError(f"batch_size is {batch_size}; it should be a multiple of the {made.world_size} processes")
    made.per_device_train_batch_size = batch_size // made.world_size // max(1, made.n_gpu)
    return made


def _set_schedule(training: TrainingArguments, steps: int) -> None:
    training.max_steps = steps
    training.warmup_steps = min(WARM_UP, steps // 10)
    training.lr_scheduler_kwargs = {"num_decay_steps": round(DECAY * steps), "decay_type": "linear"}


def _start(module: Fit, states: States, C: int, seed: int) -> None:
    states.fill(0)
    generator = torch.Generator().manual_seed(seed)
    rows = states.sample(max(SAMPLE, C), generator)
    if len(rows) < C:
        raise ValueError(
            f"num_codes is {C}, and {len(rows)} rows of the first round are no outliers; give more data, a larger "
            f"buffer_bytes or at most {len(rows)} codes"
        )
    module.start(rows, generator)


def _save_attachment(model: nn.Module, layer: str, bottleneck: CodebookBottleneck, output: Path) -> None:
    attachment = attach(model, {layer: dataclasses.replace(bottleneck.config, splice="delta")})
    try:
        attachment.bottlenecks[layer].load_state_dict(bottleneck.state_dict())
        attachment.save(output)
    finally:
        attachment.detach()


@contextlib.contextmanager
def _removed_after_an_error(work: Path, rank: int) -> Iterator[None]:
    """Removes the folder of a run that ends before its first checkpoint: there would be nothing to go on from."""
    try:
        yield
    except BaseException:
        if rank == 0 and not any(work.glob(CHECKPOINT)):
            shutil.rmtree(work, ignore_errors=True)
        raise


# -- checks -------------------------------------------------------------------------------------------------------


def _check_ints(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 2 if name in ("max_length", "tokens") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it should be an int, at least {least}")


def _check_range(name: str, value: int, most: float, of: str) -> None:
    if value > most:
        raise ValueError(f"{name} is {value}; it should be at most {of}, {most}")


def _check_folders(output: Path, work: Path, resume: bool) -> None:
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output is {output}, which is there already; give the name of a new folder")
    if work.exists() and not resume:
        raise ValueError(f"{work} holds a run that was stopped; go on with it with resume, or delete it")
    if resume and not work.is_dir():
        raise ValueError(f"resume is set, and there is no stopped run at {work}; fit without it")


def _check_plan(plan: Plan, texts: Texts, C: int, buffer_bytes: int, row_bytes: int) -> None:
    if plan.tokens == 0:
        raise ValueError(f"data is {texts.name}, which holds no text; give at least one of several tokens")
    if plan.rows < C:
        raise ValueError(
            f"num_codes is {C}, and data, {texts.name}, gives {plan.rows} rows to train on; every code starts at one of its "
            f"own: give more texts or tokens, or at most {plan.rows} codes"
        )
    needed = plan.held + min(plan.rows, C + plan.largest)
    if buffer_bytes // row_bytes < needed:
        raise ValueError(
            f"buffer_bytes is {buffer_bytes}; it should be at least {needed * row_bytes}: {plan.held} rows that are held "
            f"out, and {needed - plan.held} for {C} codes to start at, of {row_bytes} bytes each"
        )
