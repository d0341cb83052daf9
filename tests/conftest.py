"""Shared fixtures: a tiny model with a bottleneck and a tokenizer, all made here; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CU_FAST_TRITON_TABLE"] = "shipped"  # not what was once measured on this machine

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import cu_fast
from cu_fast.checkpoint import save_model

WORDS = (
    "the a red blue green cat dog bird sat ran sings on under mat tree Anna Bruno writes reads books poems .".split()
)


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


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
