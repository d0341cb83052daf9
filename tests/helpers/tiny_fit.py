"""Texts to fit codes to, with a tiny model."""

from __future__ import annotations

import random

from tiny_training import WORDS

LAYER = "model.layers.1"


def sentences(number: int, seed: int = 0) -> list[str]:
    """Random sentences of two to twelve words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(number)]


def settings(**changes) -> dict:
    """For ``fit_codes``: small, quick, and in fp32."""
    return {
        "layer": LAYER, "num_codes": 64, "k": 4, "code_dim": 24, "max_length": 16, "model_batch_size": 4,
        "batch_size": 64, "epochs": 3.0, "bf16": False,
        "arguments": {"disable_tqdm": True, "logging_steps": 5, "save_steps": 20}, **changes,
    }  # fmt: skip
