"""The whole bottleneck with Triton: the three operators one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast.kernels.triton.codebook_quantize import codebook_quantize
from cu_fast.kernels.triton.masked_decode import masked_decode
from cu_fast.kernels.triton.sae_encode import sae_encode


def codebook_bottleneck(
    x: Tensor,
    W_enc: Tensor | None,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    relu: bool,
    codes: Tensor,
    inv_norm: Tensor | None,
    bias: Tensor | None,
    k: int,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    reselect: bool,
    scan_plane: Tensor | None,
    scan_terms: Tensor | None,
    scan_mean: Tensor | None,
    table: Tensor,
    b_dec: Tensor | None,
    score_weights: bool,
    mean: bool,
    receipt: Tensor | None,
) -> Tensor:
    """As ``reference.codebook_bottleneck``: x [T, D] -> y [T, D] in table's dtype; receipt int64 [2] is added to."""
    mask, none = (mask_table, mask_row), (None, None)
    excluded, zeroed = (mask, none) if reselect else (none, mask)
    z = x if W_enc is None else sae_encode(x, W_enc, b_enc, b_pre, relu)
    scores, ids, hits = codebook_quantize(
        z, codes, inv_norm, bias, k, *excluded, reselect, scan_plane, scan_terms, scan_mean
    )
    # The score of an empty slot is 0, or NaN where the row was faulty, and so is its weight.
    weights = torch.relu(scores) if score_weights else torch.where(ids < 0, scores, 1.0)
    if receipt is not None:
        if mask_table is not None and not reselect:
            hits = _deleted(ids, mask_table, mask_row)
        receipt[0] += x.shape[0]
        receipt[1] += hits.sum()
    return masked_decode(ids, weights, table, b_dec, None, *zeroed, mean)


def _deleted(ids: Tensor, mask_table: Tensor, mask_row: Tensor) -> Tensor:
    # Which of the ids are deleted. A row that the table does not have has made its ids' y NaN: nothing is counted.
    if mask_table.shape[0] == 0:
        return torch.zeros_like(ids)
    row, code = mask_row.long().clamp(0, mask_table.shape[0] - 1)[:, None], ids.long().clamp(min=0)
    bit = (mask_table[row, code >> 5] >> (code & 31).int()) & 1
    exists = (mask_row >= 0) & (mask_row < mask_table.shape[0])
    return bit * exists[:, None] * (ids >= 0)
