"""What the operators return, without data: what torch.compile and meta tensors need, for the native library and Triton.

Arguments as in ``csrc/ops.cpp``; the schemas of the Triton operators are read from these signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_quantize(
    z: Tensor,
    codes: Tensor,
    inv_norm: Tensor | None,
    bias: Tensor | None,
    k: int,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    return_hits: bool,
    scan_plane: Tensor | None,
    scan_terms: Tensor | None,
    scan_mean: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, ids = _selection(z, k)
    return scores, ids, ids.new_empty(z.shape[0] if return_hits else 0)


def sae_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_pre: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty((x.shape[0], W_enc.shape[0]), dtype=torch.float32)


def sae_encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    relu: bool,
    scan_plane: Tensor | None,
    scan_terms: Tensor | None,
    scan_mean: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _selection(x, k)


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
    return table.new_empty((x.shape[0], table.shape[1]))


def pack_scan(codes: Tensor, inv_norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (C, E), floats = codes.shape, {"dtype": torch.float32}
    plane = codes.new_empty(((C + 63) // 64, (E + 3) // 4, 64, 4), dtype=torch.uint8)
    return plane, codes.new_empty(((C + 63) // 64, 196), **floats), codes.new_empty(E, **floats)


def masked_decode(
    ids: Tensor,
    weights: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    mean: bool,
) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]))


def _selection(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0], k)
    return z.new_empty(shape, dtype=torch.float32), z.new_empty(shape, dtype=torch.int32)
