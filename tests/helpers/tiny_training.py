"""A tiny language model with a tokenizer of words, and rows to train it on; nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cu_fast.nn import BottleneckConfig

WORDS = (
    "the a red blue green cat dog bird sat ran sings on under mat tree Anna Bruno writes reads books poems .".split()
)
ROWS = [{"prompt": f"{a} {b}", "completion": f"{b} {a} ."} for a in WORDS[:6] for b in WORDS[6:12]]
CONFIG = BottleneckConfig(d_model=32, code_dim=32, num_codes=64, k=4, activation="none")
LAYERS = {"model.layers.1": CONFIG}


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_llama(tokenizer, hidden: int = 32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def arguments(folder, **settings) -> transformers.TrainingArguments:
    settings = (
        dict(num_train_epochs=12, per_device_train_batch_size=6, learning_rate=5e-3, save_strategy="no") | settings
    )
    return transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        logging_steps=6, **settings,
    )  # fmt: skip
