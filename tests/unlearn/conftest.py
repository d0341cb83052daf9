"""A tiny model with a sparse autoencoder at its layer 1."""

from __future__ import annotations

import pytest
import tiny_training
import torch

import cu_fast
from cu_fast.sae import SAE


def sae(kind: str, latents: int = 120) -> SAE:
    generator = torch.Generator().manual_seed(3)
    enc, dec = (torch.randn(latents, 32, generator=generator) for _ in range(2))
    theta = torch.full((latents,), 0.1 if kind == "threshold" else 0.0)
    return SAE(enc, torch.zeros(latents), theta, dec, kind=kind, k=None if kind == "threshold" else 5)


@pytest.fixture
def make_sae():
    """A function of a kind: "threshold" or "topk"."""
    return sae


@pytest.fixture
def latents(tokenizer):
    """A function of a kind: an attachment of a threshold or a topk autoencoder."""
    return lambda kind: cu_fast.attach(tiny_training.tiny_llama(tokenizer), {"model.layers.1": sae(kind)})
