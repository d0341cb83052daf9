"""Shared fixtures: a tiny model with a bottleneck and a tokenizer, all made here; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

# Scripts that tests start in processes of their own find what the tests find.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).with_name("helpers")), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CU_FAST_TRITON_TABLE"] = "shipped"  # not what was once measured on this machine

import pytest
import tiny_training
import torch

import cu_fast
from cu_fast.hf.checkpoint import save_model


@pytest.fixture
def tokenizer():
    return tiny_training.word_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_training.tiny_llama(tokenizer)


@pytest.fixture
def attachment(model):
    config = cu_fast.BottleneckConfig(d_model=32, code_dim=32, num_codes=300, k=4, activation="none")
    attached = cu_fast.attach(model, {"model.layers.1": config})
    torch.manual_seed(1)
    (bottleneck,) = attached.bottlenecks.values()
    with torch.no_grad():
        bottleneck.codebook.codes.copy_(torch.randn(300, 32))
    return attached


@pytest.fixture
def folder(attachment, tokenizer, tmp_path):
    """A model folder with one mask, 'even codes / ü'."""
    (bottleneck,) = attachment.bottlenecks.values()
    mask = cu_fast.Mask.from_ids(
        range(0, 300, 2), num_codes=300, codebook_sha256=bottleneck.codebook_sha256(), topic="even codes / ü"
    )
    attachment.add_mask(mask)
    save_model(attachment, tokenizer, tmp_path / "model")
    return tmp_path / "model"
