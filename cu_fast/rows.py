"""Rows of text as padded batches, for training and for scoring. Keys of a row: see ``cu_fast.train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cu_fast.hf import Tokenizer


@dataclasses.dataclass
class Collator:
    """Makes a batch, padded on the right, of rows that :func:`encode_row` gave.

    A batch of B rows, the longest of S tokens, holds input_ids, attention_mask and labels int64 [B, S] and loss_weights
    fp32 [B, S]. Padding has attention 0, label -100 and weight 0. For a sequence-to-sequence model labels and
    loss_weights have the targets' length instead.

    Attributes:
        pad: the id that input_ids are padded with.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, list]]) -> dict[str, Tensor]:
        def padded(name: str, value: float, dtype: torch.dtype) -> Tensor:
            return nn.utils.rnn.pad_sequence(
                [torch.tensor(row[name], dtype=dtype) for row in rows], batch_first=True, padding_value=value
            )

        return {
            "input_ids": padded("input_ids", self.pad, torch.int64),
            "attention_mask": nn.utils.rnn.pad_sequence(
                [torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in rows], batch_first=True
            ),
            "labels": padded("labels", -100, torch.int64),
            "loss_weights": padded("loss_weights", 0.0, torch.float32),
        }


def encode_row(tokenizer: Tokenizer, row: Mapping[str, str], prompt_weight: float, max_length: int) -> dict[str, list]:
    """One row as lists of numbers.

    Args:
        tokenizer: the model's.
        row: with the keys {"text"}, {"prompt", "completion"} or {"source", "target"}.
        prompt_weight: weight of a prompt's tokens in the loss.
        max_length: tokens that a row is cut to, a source and a target each.

    Returns:
        input_ids, labels and loss_weights; labels and loss_weights have the same length.

    Raises:
        ValueError: a row with other keys.
    """
    keys = set(row)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if keys >= {"source", "target"}:
        labels = (tokenizer(row["target"], add_special_tokens=False)["input_ids"] + end)[:max_length]
        ids = (tokenizer(row["source"], add_special_tokens=False)["input_ids"] + end)[:max_length]
        return {"input_ids": ids, "labels": labels, "loss_weights": [1.0] * len(labels)}
    if keys >= {"prompt", "completion"}:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
    elif "text" in keys:
        prompt, completion = [], tokenizer(row["text"])["input_ids"] + end
    else:
        raise ValueError(
            f"a row has the keys {sorted(keys)}; it should have 'text', 'prompt' and 'completion', or 'source' and 'target'"
        )
    ids = (prompt + completion)[:max_length]
    weights = ([prompt_weight] * len(prompt) + [1.0] * len(completion))[:max_length]
    return {"input_ids": ids, "labels": ids, "loss_weights": weights}
