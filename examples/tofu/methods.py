"""Unlearning by training: a trainer for methods that take a batch to forget and one to keep. Part of the studies of TOFU.

    gradient ascent       L = -nll(forget)                                                  Jang et al., arXiv 2210.01504
    gradient difference   L = -nll(forget) + nll(retain)                                    Liu et al., arXiv 2203.12817
    NPO                   L = -2/b E log sigmoid(-b (log p - log p_0)) + nll(retain)        Zhang et al., arXiv 2404.05868

nll: mean over an answer's tokens for the first two; log p, of a whole answer, p_0 before unlearning, b = 0.1. A step takes a
batch of the forget set, and as many retain rows drawn at random.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cu_fast.rows import Collator, encode_row
from cu_fast.train import weighted_loss

BATCH = 8
BETA = 0.1

Batch = dict[str, Tensor]


class Cost(NamedTuple):
    """Of one unlearning: seconds, and rows that went forward and backward through the model."""

    seconds: float
    forward: int
    backward: int


class GradientAscent:
    """What a method does in a step; the others are made of it.

    Attributes:
        per_row: rows that go forward and backward in a step for each row that is forgotten.
    """

    per_row = 1

    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        """Called once, before the first step."""
        self.collate = Collator(tokenizer.pad_token_id)
        self.gone, self.kept = ([encode_row(tokenizer, row, 0.0, 512) for row in rows] for rows in (forget, retain))

    def batches(self, forget: Sequence[int], retain: Sequence[int]) -> dict[str, Batch]:
        """What a step needs, of rows by their numbers."""
        which = torch.tensor(forget)
        return {
            "forget": self.collate([self.gone[i] for i in forget]) | {"row": which},
            "retain": self.collate([self.kept[i] for i in retain]),
        }

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        return -nll(model, forget)

    def after_epoch(self, model) -> bool:
        """Called after each epoch; True ends the training."""
        return False


class GradientDifference(GradientAscent):
    per_row = 2

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        return -nll(model, forget) + nll(model, retain)


class NPO(GradientAscent):
    per_row = 2

    @torch.inference_mode()
    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        super().start(model, tokenizer, forget, retain)
        parts = [self.gone[i : i + 32] for i in range(0, len(self.gone), 32)]
        self.reference = torch.cat([answer_log_prob(model, self.collate(part)) for part in parts])

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        ratio = answer_log_prob(model, forget) - self.reference[forget["row"]]
        return -2 / BETA * F.logsigmoid(-BETA * ratio).mean() + nll(model, retain)


METHODS = {"gradient_ascent": GradientAscent, "gradient_difference": GradientDifference, "npo": NPO}


class UnlearningTrainer(transformers.Trainer):
    """Trainer on a method's batches."""

    def __init__(self, method: GradientAscent, **options) -> None:
        super().__init__(**options)
        self.method, self.model_accepts_loss_kwargs = method, False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.method.loss(model, **inputs)


def nll(model, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return weighted_loss(logits, batch["labels"], batch["loss_weights"], shift=True)


def answer_log_prob(model, batch: Batch) -> Tensor:
    """log p of each whole answer: [B]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100)
    return -(losses * batch["loss_weights"][:, 1:]).sum(1)


class Measure(transformers.TrainerCallback):
    """Calls ``measure(epoch, cost)`` after some of the epochs; what that takes is not counted as seconds."""

    def __init__(
        self, method: GradientAscent, epochs: Sequence[int], rows: int, measure: Callable[[int, Cost], None]
    ) -> None:
        self.method, self.epochs, self.rows, self.measure = method, epochs, rows, measure
        self.started = time.perf_counter()

    def on_epoch_end(self, args, state, control, model=None, **_) -> None:
        epoch = round(state.epoch)
        model.eval()
        done = self.method.after_epoch(model)
        if done or epoch in self.epochs:
            paused, seen = time.perf_counter(), epoch * self.rows * self.method.per_row
            self.measure(epoch, Cost(paused - self.started, seen, seen))
            self.started += time.perf_counter() - paused
        model.train()
        control.should_training_stop |= done


def unlearn(
    model,
    tokenizer,
    method: GradientAscent,
    forget: list[dict],
    retain: list[dict],
    *,
    learning_rate: float,
    epochs: Sequence[int],
    seed: int,
    measure: Callable[[int, Cost], Any],
) -> None:
    """Unlearn in place, at a constant rate; the model is measured after each of the numbers of epochs, and at the end."""
    method.start(model, tokenizer, forget, retain)
    draw = random.Random(seed)

    def batches(rows: list[dict]) -> dict[str, Batch]:
        return method.batches([row["row"] for row in rows], draw.sample(range(len(retain)), len(rows)))

    folder = tempfile.TemporaryDirectory()  # Trainer wants one; it stays empty
    arguments = transformers.TrainingArguments(
        output_dir=folder.name, num_train_epochs=max(epochs), per_device_train_batch_size=BATCH, learning_rate=learning_rate,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, seed=seed, bf16=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = UnlearningTrainer(
        method, model=model, args=arguments, data_collator=batches, train_dataset=[{"row": i} for i in range(len(forget))],
        callbacks=[Measure(method, epochs, len(forget), measure)],
    )  # fmt: skip
    with folder:
        trainer.train()
    model.eval()
