"""EUL: layers that unlearn, behind every feed-forward block of a model that stays as it is. Part of the study in this folder.

    L = 0.8 KL(p_0 || p)(retain) - KL(p_0 || p)(forget) + nll(retain) - 0.2 lm(forget)      Chen & Yang, arXiv 2310.20150

p_0: with the layers off. lm: nll over all of a row's tokens, the question's too; all else is over answers' tokens. An
unlearning layer is x + W_up relu(W_down x), a sixteenth as wide as the model, and starts as nothing. It is no linear map of
what a block computes, so it cannot be folded into the weights: :func:`save` keeps the layers alone, :func:`load` puts them
into the model that they were trained in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from losses import answers_of
from shared import methods
from torch import Tensor, nn

from cu_fast.train import weighted_loss

REDUCTION = 16
RATES = (5e-5, 5e-4)  # the layers start at nothing: what moves a trained model hardly moves them
PART = ".unlearning."  # in the names of the layers' weights
FILE = "unlearning.safetensors"

Batch = methods.Batch


class Unlearning(nn.Module):
    """x [..., D] -> [..., D]; x itself while ``on`` is False."""

    def __init__(self, width: int, draw: torch.Generator) -> None:
        super().__init__()
        narrow = max(1, width // REDUCTION)
        self.down, self.up, self.on = nn.Linear(width, narrow), nn.Linear(narrow, width), True
        nn.init.normal_(self.down.weight, std=0.02, generator=draw)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x))) if self.on else x


def _behind(block: nn.Module, given: Any, output: Tensor) -> Tensor:
    return block.unlearning(output)  # the block's own: a copy of the model runs the copy's layers


def add(model: nn.Module, seed: int = 0) -> list[Unlearning]:
    """Put the layers in, and freeze all else."""
    draw = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    found = []
    for layer in model.model.layers:
        layer.mlp.unlearning = Unlearning(model.config.hidden_size, draw).to(model.dtype)
        layer.mlp.register_forward_hook(_behind)
        found.append(layer.mlp.unlearning)
    return found


def save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in model.state_dict().items() if PART in name}
    safetensors.torch.save_file(state, folder / FILE)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """The model, with the layers that a folder keeps: in place.

    Args:
        model: the fine-tuned model.
        folder: that :func:`save` wrote.

    Raises:
        ValueError: the layers are of a model of another depth.
    """
    state = safetensors.torch.load_file(folder / FILE)
    add(model)
    wanted = {name for name in model.state_dict() if PART in name}
    if wanted != set(state):
        raise ValueError(f"{folder / FILE} holds {len(state)} weights; a model with these layers has {len(wanted)}")
    model.load_state_dict(state, strict=False)
    return model


class EUL(methods.GradientAscent):
    """The selective teacher-student loss; the teacher is the model itself, its unlearning layers off."""

    per_row = 2
    ALPHA, TASK, LM = 0.8, 1.0, 0.2

    def start(self, model, tokenizer, forget: list[dict], retain: list[dict]) -> None:
        super().start(model, tokenizer, forget, retain)
        self.layers = add(model)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        for layer in self.layers:
            layer.on = False
        try:
            yield
        finally:
            for layer in self.layers:
                layer.on = True

    def loss(self, model, forget: Batch, retain: Batch) -> Tensor:
        def logits(batch: Batch) -> Tensor:
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

        with torch.no_grad(), self.off():
            gone_before, kept_before = logits(forget), logits(retain)
        gone, kept = logits(forget), logits(retain)
        every = forget["attention_mask"].float()
        return (
            self.ALPHA * divergence(kept_before, kept, retain)
            - divergence(gone_before, gone, forget)
            + self.TASK * weighted_loss(kept, retain["labels"], retain["loss_weights"], shift=True)
            - self.LM * weighted_loss(gone, forget["labels"], every, shift=True)
        )


def divergence(before: Tensor, now: Tensor, batch: Batch) -> Tensor:
    """KL(p_0 || p), a mean over answers' tokens, of logits [B, S, V]."""
    log_p0, log_p = (answers_of(values, batch).float().log_softmax(-1) for values in (before, now))
    return F.kl_div(log_p, log_p0, reduction="batchmean", log_target=True)
