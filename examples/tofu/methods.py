"""The other methods: gradient ascent, gradient difference, negative preference optimisation. Part of the study here.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cu_fast.rows import Collator, encode_row
from cu_fast.train import weighted_loss

METHODS = ("gradient_ascent", "gradient_difference", "npo")
BATCH = 8
BETA = 0.1


class Cost(NamedTuple):
    """Of one unlearning: seconds, and rows that went forward and backward through the model."""

    seconds: float
    forward: int
    backward: int


class UnlearningTrainer(transformers.Trainer):
    """Trainer on pairs of batches, {"forget": ..., "retain": ...}."""

    def __init__(self, method: str, reference: Tensor, **options) -> None:
        super().__init__(**options)
        self.method, self.reference, self.model_accepts_loss_kwargs = method, reference, False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget, retain = dict(inputs["forget"]), inputs["retain"]
        which = forget.pop("row")
        if self.method == "npo":
            log_p = answer_log_prob(model, forget)
            loss = -2 / BETA * F.logsigmoid(-BETA * (log_p - self.reference[which])).mean()
        else:
            loss = -nll(model, forget)
        return loss if self.method == "gradient_ascent" else loss + nll(model, retain)


def nll(model, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return weighted_loss(logits, batch["labels"], batch["loss_weights"], shift=True)


def answer_log_prob(model, batch: dict[str, Tensor]) -> Tensor:
    """log p of each whole answer: [B]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100)
    return -(losses * batch["loss_weights"][:, 1:]).sum(1)


class Measure(transformers.TrainerCallback):
    """Calls ``measure(epoch, cost)`` after some of the epochs; what that takes is not counted as seconds."""

    def __init__(self, epochs: Sequence[int], rows: int, per_row: int, measure: Callable[[int, Cost], None]) -> None:
        self.epochs, self.rows, self.per_row, self.measure = epochs, rows, per_row, measure
        self.started = time.perf_counter()

    def on_epoch_end(self, args, state, control, model=None, **_) -> None:
        epoch = round(state.epoch)
        if epoch not in self.epochs:
            return
        paused, seen = time.perf_counter(), epoch * self.rows * self.per_row
        model.eval()
        self.measure(epoch, Cost(paused - self.started, seen, seen))
        model.train()
        self.started += time.perf_counter() - paused


def unlearn(
    model,
    tokenizer,
    method: str,
    forget: list[dict],
    retain: list[dict],
    *,
    learning_rate: float,
    epochs: Sequence[int],
    seed: int,
    measure: Callable[[int, Cost], None],
) -> None:
    """Unlearn in place, at a constant rate; the model is measured after each of the numbers of epochs."""
    collate = Collator(tokenizer.pad_token_id)
    gone, kept = ([encode_row(tokenizer, row, 0.0, 512) for row in rows] for rows in (forget, retain))
    with torch.inference_mode():
        reference = torch.cat([answer_log_prob(model, collate(gone[i : i + 32])) for i in range(0, len(gone), 32)])
    draw = random.Random(seed)

    def pair(batch: list[dict]) -> dict[str, dict[str, Tensor]]:
        which = torch.tensor([row["row"] for row in batch])
        return {"forget": collate(batch) | {"row": which}, "retain": collate(draw.sample(kept, len(batch)))}

    folder = tempfile.TemporaryDirectory()  # Trainer wants one; it stays empty
    arguments = transformers.TrainingArguments(
        output_dir=folder.name, num_train_epochs=max(epochs), per_device_train_batch_size=BATCH, learning_rate=learning_rate,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, seed=seed, bf16=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = UnlearningTrainer(
        method, reference, model=model, args=arguments, data_collator=pair,
        train_dataset=[row | {"row": i} for i, row in enumerate(gone)],
        callbacks=[Measure(epochs, len(gone), 1 if method == "gradient_ascent" else 2, measure)],
    )  # fmt: skip
    with folder:
        trainer.train()
    model.eval()
