"""Checks of an operator's arguments together. Part of ``cu_fast.ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.ops.checks import (
    check_choice,
    check_device,
    check_k,
    check_mask,
    check_matrix,
    check_vector,
    refuse_grad,
    shape,
)
from cu_fast.ops.packing import PackedCodes, check_packed


def check_quantize(z: Tensor, packed: PackedCodes, k: int, mask_table: Tensor | None, mask_row: Tensor | None) -> None:
    """Raises as :func:`cu_fast.ops.codebook_quantize` says."""
    C = check_packed("packed", packed, "z", z)
    check_k(k, C)
    check_mask(mask_table, mask_row, z.shape[0], C, z.device)
    refuse_grad("codebook_quantize", z=z)


def check_bottleneck(
    x: Tensor,
    W_enc: PackedCodes | None,
    b_pre: Tensor | None,
    packed: PackedCodes,
    table: Tensor,
    b_dec: Tensor | None,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    k: int,
    activation: ops.Activation,
    mask_mode: ops.MaskMode,
    weight: ops.Weight,
    receipt: Tensor | None,
) -> None:
    """Raises as :func:`cu_fast.ops.codebook_bottleneck` says; W_enc and b_pre are its encoder."""
    if W_enc is None:
        C = check_packed("packed", packed, "x", x)
    else:
        rows = check_packed("W_enc", W_enc, "x", x)
        if rows != packed.width:
            raise ValueError(f"W_enc has {rows} rows; it should have {packed.width}, the width of the codes in packed")
        check_vector("b_pre", b_pre, W_enc.width, "D", x.device)
        C = check_packed("packed", packed, "x", x, as_wide=False)
    check_matrix("table", table)
    if table.shape[0] != C:
        raise ValueError(f"table has shape {shape(table)}; it should have {C} rows, one per code")
    check_vector("b_dec", b_dec, table.shape[1], "D", x.device)
    check_device("table", table, "x", x)
    check_k(k, C)
    check_mask(mask_table, mask_row, x.shape[0], C, x.device)
    check_choice("activation", activation, ops.ACTIVATIONS)
    check_choice("mask_mode", mask_mode, ops.MASK_MODES)
    check_choice("weight", weight, ops.WEIGHTS)
    if receipt is not None and (receipt.dtype != torch.int64 or shape(receipt) != [2] or receipt.stride(0) != 1):
        raise ValueError(f"receipt is {receipt.dtype} {shape(receipt)}; it should be int64 [2], contiguous")
    refuse_grad("codebook_bottleneck", x=x, table=table)
