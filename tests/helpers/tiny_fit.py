"""Texts to fit codes to, with a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_training import WORDS

import cu_fast.sae

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


def provide_save_sae() -> None:
    """A stand-in, where ``cu_fast.sae`` writes no folders yet: SAELens' files with what its reader needs."""

    def save_sae(sae, folder) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            "W_enc": sae.enc.T.contiguous(),
            "W_dec": sae.dec,
            "b_enc": sae.bias,
            "b_dec": torch.zeros(sae.d_out),
        }
        save_file(weights, folder / "sae_weights.safetensors")
        config = {
            "architecture": "topk", "k": sae.k, "d_in": sae.d_in, "d_sae": sae.num_latents,
            "normalize_activations": "none", "apply_b_dec_to_input": False, "metadata": {"hook_name": sae.site},
        }  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(config))

    if not hasattr(cu_fast.sae, "save_sae"):
        cu_fast.sae.save_sae = save_sae
