"""The whole bottleneck with Triton: the three operators one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cu_fast.kernels.triton.codebook_quantize import codebook_quantize
from cu_fast.kernels.triton.masked_decode import masked_decode
from cu_fast.kernels.triton.sae_encode import sae_encode


def codebook_bottleneck(a: Any) -> Tensor:
    """As ``reference.codebook_bottleneck``: x [T, D] -> y [T, D] in table's dtype; receipt int64 [2] is added to."""
    mask = {"mask_table": a.mask_table, "mask_row": a.mask_row}
    none = dict.fromkeys(mask)
    excluded, zeroed = (mask, none) if a.reselect else (none, mask)
    z = a.x if a.W_digits is None else sae_encode(a)
    selected = {"z": z, "return_hits": a.reselect, **excluded}
    scores, ids, hits = codebook_quantize(SimpleNamespace(**vars(a) | selected))
    # The score of an empty slot is 0, or NaN where the row was faulty, and so is its weight.
    weights = torch.relu(scores) if a.score_weights else torch.where(ids < 0, scores, 1.0)
    if a.receipt is not None:
        if a.mask_table is not None and not a.reselect:
            hits = _deleted(ids, a.mask_table, a.mask_row)
        a.receipt[0] += a.x.shape[0]
        a.receipt[1] += hits.sum()
    decoded = {"ids": ids, "weights": weights, "bias": a.b_dec, "residual": None, **zeroed}
    return masked_decode(SimpleNamespace(**vars(a) | decoded))


def _deleted(ids: Tensor, mask_table: Tensor, mask_row: Tensor) -> Tensor:
    # Which of the ids are deleted. Nothing is counted for a mask row beyond the table: masked_decode makes its y NaN.
    if mask_table.shape[0] == 0:
        return torch.zeros_like(ids)
    row, code = mask_row.long().clamp(0, mask_table.shape[0] - 1)[:, None], ids.long().clamp(min=0)
    bit = (mask_table[row, code >> 5] >> (code & 31).int()) & 1
    exists = (mask_row >= 0) & (mask_row < mask_table.shape[0])
    return bit * exists[:, None] * (ids >= 0)
