"""Training a model with codebook bottlenecks, on ``transformers.Trainer``.

Two recipes:

``joint``         model and bottleneck together (CodeUnlearn, arXiv 2410.10866): the model comes to rely on codes.
``frozen_below``  the layers that run before the bottleneck are frozen; the bottleneck and the layers after it learn.
                  For a model that already knows its task; it was found to work on small models.

Data sets are sequences of dicts with one of three key sets: {"text"}; {"prompt", "completion"} (causal: the
prompt's tokens have the weight ``prompt_weight``); {"source", "target"} (sequence to sequence).

In a batch: B sequences of S tokens, V words in the vocabulary.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cu_fast.hf import Attachment, Tokenizer, attach
from cu_fast.nn import BottleneckConfig, CodebookBottleneck
from cu_fast.ops.checks import check_choice
from cu_fast.rows import Collator, encode_row
from cu_fast.train.resume import SETTINGS, USAGE, checkpoint_to_resume, no_checkpoint, settings_of

Recipe = Literal["joint", "frozen_below"]


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    dataset: Sequence[Mapping[str, str]],
    bottlenecks: Mapping[str, BottleneckConfig] | None,
    arguments: TrainingArguments,
    *,
    recipe: Recipe = "joint",
    codebook_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
    prompt_weight: float = 1.0,
    max_length: int = 512,
    reseed_every: int = 60,
    reseed_until: float = 0.7,
    resume: bool = False,
) -> tuple[Attachment | None, dict[str, float]]:
    """Put bottlenecks into a model and train it.

    Args:
        model: changed in place; in evaluation mode afterwards.
        tokenizer: the model's; it needs a pad token.
        dataset: rows; see the module's docstring for their keys.
        bottlenecks: layer name -> config, put in fresh with codes from data; None = train the model as it is.
        arguments: transformers' own, not changed. ``output_dir`` takes the checkpoints; ``seed`` also seeds codes.
        recipe: "joint" or "frozen_below".
        codebook_learning_rate: of the codes; None = the same as the rest. Codes have no weight decay.
        embedding_learning_rate: of the input embedding, and of an output that is tied to it; None = the same as the
            rest. For models whose embedding starts with entries of size 1, as T5's does: at a rate that suits the other
            weights it hardly moves.
        prompt_weight: weight of a prompt's tokens in the loss, at least 0; 0 = only completions count.
        max_length: tokens that a row is cut to.
        reseed_every: steps after which codes that were not kept move to a token of the last batch; 0 = never.
        reseed_until: share of the training after which no code is moved any more.
        resume: go on from the newest checkpoint in ``output_dir``, to the same weights as a run that was not stopped.
            Epochs, logging and saving may differ from those of before; all other settings, and the data, may not.

    Returns:
        (attachment, figures): the attachment, None without bottlenecks, and the last training figures.

    Raises:
        ValueError: an empty data set, rows with other keys, a number out of range, an unknown recipe or layer; with
            ``resume``, no checkpoint, a damaged one, or one of other settings; without, a folder that holds checkpoints
            already.
    """
    check_choice("recipe", recipe, get_args(Recipe))
    if len(dataset) == 0:
        raise ValueError("dataset is empty; it should hold at least one row")
    _check_numbers(
        learning_rate=arguments.learning_rate, codebook_learning_rate=codebook_learning_rate,
        embedding_learning_rate=embedding_learning_rate, prompt_weight=prompt_weight,
        batch_size=arguments.per_device_train_batch_size, epochs=max(arguments.num_train_epochs, arguments.max_steps),
    )  # fmt: skip
    rows = [encode_row(tokenizer, row, prompt_weight, max_length) for row in dataset]
    collate = Collator(tokenizer.pad_token_id)
    arguments = copy.copy(arguments)
    arguments.remove_unused_columns = False  # loss_weights is no argument of the model, and must reach compute_loss
    settings = settings_of(
        model, rows, bottlenecks or {}, arguments, recipe=recipe, codebook_learning_rate=codebook_learning_rate,
        embedding_learning_rate=embedding_learning_rate, reseed_every=reseed_every, reseed_until=reseed_until,
    )  # fmt: skip
    checkpoint = checkpoint_to_resume(arguments, settings) if resume else no_checkpoint(arguments)
    attachment = None
    if bottlenecks:
        attachment = attach(model, bottlenecks)
        generator = torch.Generator().manual_seed(arguments.seed)
        sample = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:512].tolist()]
        seed_codes(attachment, sample, collate, arguments.per_device_train_batch_size, generator)
        if recipe == "frozen_below":
            freeze_below(attachment, collate(rows[:1]))
    trainer = CodebookTrainer(
        attachment,
        codebook_learning_rate,
        embedding_learning_rate,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.settings = settings
    if attachment is not None:
        trainer.add_callback(UsageCallback(trainer, reseed_every, reseed_until, arguments.seed))
    trainer.restore_usage(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    figures = {
        k: v for entry in trainer.state.log_history[-2:] for k, v in entry.items() if isinstance(v, (int, float))
    }
    return attachment, figures


class CodebookTrainer(Trainer):
    """Trainer whose loss is the task's, with a weight per token, plus the bottlenecks' auxiliary loss.

    No mask holds in its forward passes.

    Args:
        attachment: of the model; None = no bottlenecks.
        codebook_learning_rate: of the codes; None = the same as the rest.
        embedding_learning_rate: of the input embedding; None = the same as the rest.
        arguments: of ``transformers.Trainer``, by name.

    Attributes:
        settings: written into every checkpoint; None = nothing is.
        terms: name -> values since the last log, which reports their means.
    """

    settings: dict[str, Any] | None = None

    def __init__(
        self,
        attachment: Attachment | None,
        codebook_learning_rate: float | None,
        embedding_learning_rate: float | None = None,
        **arguments: Any,
    ) -> None:
        self.attachment = attachment
        self.codebook_learning_rate = codebook_learning_rate
        self.embedding_learning_rate = embedding_learning_rate
        self.terms: dict[str, list[float]] = collections.defaultdict(list)
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean already

    @property
    def bottlenecks(self) -> Mapping[str, CodebookBottleneck]:
        """Name -> a bottleneck that is trained."""
        return self.attachment.bottlenecks if self.attachment is not None else {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch that a ``Collator`` made, a scalar; with ``return_outputs`` the model's output too."""
        inputs = dict(inputs)
        weights = inputs.pop("loss_weights")
        labels = inputs["labels"] if self.model.config.is_encoder_decoder else inputs.pop("labels")
        if self.attachment is not None:
            for name, bottleneck in self.attachment.bottlenecks.items():
                # In an encoder-decoder the attention mask is the encoder's; a decoder has other positions.
                of_mask = "decoder" not in name or not self.model.config.is_encoder_decoder
                bottleneck.token_mask = inputs["attention_mask"].bool() if of_mask else None
        with self.attachment.unlearn(None) if self.attachment is not None else contextlib.nullcontext():
            outputs = model(**inputs)
        loss = weighted_loss(outputs.logits, labels, weights, shift=not self.model.config.is_encoder_decoder)
        if self.attachment is not None:
            self.terms["task_loss"].append(loss.detach().item())
            for bottleneck in self.attachment.bottlenecks.values():
                for name, value in bottleneck.losses.items():
                    self.terms[name].append(value.detach().item())
            loss = loss + self.attachment.auxiliary_loss()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Logs the means of ``terms`` too, and starts them anew."""
        logs |= {name: sum(values) / len(values) for name, values in self.terms.items()}
        self.terms.clear()
        super().log(logs, *arguments, **options)

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """An optimizer with parameter groups of their own for the codes and the embedding."""
        if self.optimizer is None and (self.bottlenecks or self.embedding_learning_rate):
            codes = [bottleneck.codebook.codes for bottleneck in self.bottlenecks.values()]
            embedding = [self.model.get_input_embeddings().weight] if self.embedding_learning_rate else []
            apart = {id(parameter) for parameter in codes + embedding}
            rest = [p for p in self.model.parameters() if id(p) not in apart]
            groups = [
                {"params": rest, "weight_decay": self.args.weight_decay},
                {"params": codes, "weight_decay": 0.0, "lr": self.codebook_learning_rate or self.args.learning_rate},
                {"params": embedding, "weight_decay": self.args.weight_decay, "lr": self.embedding_learning_rate},
            ]
            for group in groups:
                group["params"] = [p for p in group["params"] if p.requires_grad]
            factory, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = factory([group for group in groups if group["params"]], **settings)
        return super().create_optimizer(*arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Into a checkpoint it also writes the settings and the codes' use."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or self.settings is None:
            return  # not a checkpoint, or a trainer that :func:`train` did not make and cannot resume
        usage = {name: bottleneck.codebook.counts.clone() for name, bottleneck in self.bottlenecks.items()}
        for counts in usage.values():
            _sum_over_ranks(counts)
        if self.args.should_save:
            safetensors.torch.save_file(usage, Path(output_dir) / USAGE)
            (Path(output_dir) / SETTINGS).write_text(json.dumps(self.settings, indent=2))

    def restore_usage(self, checkpoint: Path | None) -> None:
        """The codes' use as :meth:`save_model` wrote it; None = a fresh run, nothing happens."""
        if checkpoint is not None and self.args.process_index == 0:  # the file has the sum over all processes
            usage = safetensors.torch.load_file(checkpoint / USAGE)
            for name, bottleneck in self.bottlenecks.items():
                bottleneck.codebook.counts.copy_(usage[name])


class UsageCallback(TrainerCallback):
    """Reports how many codes are used, and moves codes that were not kept onto tokens of the last batch.

    Args:
        trainer: with an attachment.
        every: steps between reports; 0 = never.
        until: share of the training after which no code is moved any more.
        seed: of the draws, with the step added.
    """

    def __init__(self, trainer: CodebookTrainer, every: int, until: float, seed: int) -> None:
        self.trainer, self.every, self.until, self.seed = trainer, every, until, seed

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called by the trainer after each optimizer step."""
        step = state.global_step + 1
        if not self.every or step % self.every:
            return
        for bottleneck in self.trainer.bottlenecks.values():
            _sum_over_ranks(bottleneck.codebook.counts)
            usage = bottleneck.usage()
            self.trainer.terms["codes_used"].append(usage["used"])
            self.trainer.terms["code_perplexity"].append(usage["perplexity"])
            if step < self.until * state.max_steps:
                dead = bottleneck.codebook.counts == 0
                # Seeded by the step alone, so that a resumed run draws the same as a run that was not stopped.
                bottleneck.reseed_dead(torch.Generator().manual_seed(self.seed + step))
                self._settle(bottleneck.codebook.codes, dead)
            else:
                bottleneck.codebook.reset_usage()

    def _settle(self, codes: nn.Parameter, moved: Tensor) -> None:
        # A moved code must not keep the old code's momentum, and every process must hold the same codes.
        for value in self.trainer.optimizer.state.get(codes, {}).values():
            if torch.is_tensor(value) and value.shape == codes.shape:
                value[moved] = 0
        if _distributed():
            torch.distributed.broadcast(codes.data, 0)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, shift: bool) -> Tensor:
    """Cross-entropy, averaged over tokens with their weights.

    Args:
        logits: [B, S, V].
        labels: int64 [B, S], -100 = not counted.
        weights: [B, S], of each label.
        shift: logits at a position predict the next label, as in a causal model; else the label at the position.

    Returns:
        A scalar.
    """
    if shift:
        logits, labels, weights = logits[:, :-1], labels[:, 1:], weights[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100)
    weights = weights.flatten()
    return (loss * weights).sum() / weights.sum().clamp(min=1e-8)


@torch.no_grad()
def seed_codes(
    attachment: Attachment,
    rows: Sequence[Mapping[str, list]],
    collate: Callable[[Sequence[Mapping[str, list]]], dict[str, Tensor]],
    batch_size: int,
    generator: torch.Generator | None,
) -> None:
    """Start codes, and scales, from the layers' outputs on a sample of rows.

    Args:
        attachment: whose bottlenecks are changed in place.
        rows: encoded, as :func:`cu_fast.rows.encode_row` gives them.
        collate: makes a batch of rows.
        batch_size: rows per forward pass.
        generator: on the CPU, for the draws; None = torch's global one.
    """
    model = attachment.model
    samples: dict[int, list[Tensor]] = collections.defaultdict(list)

    def observe(x: Tensor, bottleneck: CodebookBottleneck) -> None:
        samples[id(bottleneck)].append(x[attention.bool()] if x.shape[:2] == attention.shape else x.flatten(0, 1))

    was_training = model.training
    model.eval()
    with attachment.unlearn(None), attachment.observe(observe):
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            batch.pop("loss_weights")
            attention = batch["attention_mask"].to(model.device)
            model(**{name: value.to(model.device) for name, value in batch.items()})
    for bottleneck in attachment.bottlenecks.values():
        bottleneck.seed_codes(torch.cat(samples[id(bottleneck)]), generator)
    model.train(was_training)


def freeze_below(attachment: Attachment, batch: Mapping[str, Tensor]) -> list[str]:
    """Freeze every parameter that is read before the first bottleneck runs.

    A batch is run to see which modules are called before it, so no model's layout needs to be known. A parameter that
    is used above as well, as a tied output embedding is, is frozen too: training it would change the layers below.

    Args:
        attachment: of the model, whose parameters are frozen in place.
        batch: as a ``Collator`` makes it.

    Returns:
        The names of the frozen parameters.
    """
    model, below, reached = attachment.model, set(), False
    inside = {id(m) for b in attachment.bottlenecks.values() for m in b.modules()}

    def before(module: nn.Module, _: Any) -> None:
        nonlocal reached
        if id(module) in inside:
            reached = True
        elif not reached:
            below.update(id(p) for p in module.parameters(recurse=False))

    handles = [module.register_forward_pre_hook(before) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attachment.unlearn(None):
            model(**{name: value.to(model.device) for name, value in batch.items() if name != "loss_weights"})
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    frozen = []
    for name, parameter in model.named_parameters():
        if id(parameter) in below:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        least = "at least 0" if name == "prompt_weight" else "above 0"
        if value is not None and not (0 < value < math.inf or (value == 0 and least == "at least 0")):
            raise ValueError(f"{name} is {value}; it should be finite and {least}")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_ranks(counts: Tensor) -> None:
    if _distributed():
        torch.distributed.all_reduce(counts)
