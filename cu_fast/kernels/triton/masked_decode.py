"""Gather and sum with Triton: y[t] = reduce_i(w[t, i] table[ids[t, i]]) + bias + residual[t].

    ids [T, k] int32, -1: no code;  weights [T, k];  table [C, D], residual [T, D] rows contiguous, of any stride
    bias [D] fp32;  y [T, D] contiguous, table's dtype

A program takes a token and BLOCK_D columns. In the order of i: multiply, then add, in fp32; a mean divides by k; then
bias, then residual; rounded once. A deleted code is skipped, whatever its row holds. A slot without a code adds nothing,
but with the weight NaN it makes the row NaN. So do an id beyond the table and a mask row that does not exist: on a GPU
the host has not checked them, and the error has to show.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start, vector
from cu_fast.kernels.triton.shared import is_deleted, rounded_bf16, widened


@triton.jit(do_not_specialize=["C", "U", "k"])
def gather_sum(
    ids, weights, table, table_stride, bias, residual, residual_stride, mask_table, mask_row, words, U, y, C, D, k,
    mean: tl.constexpr, BF16: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // column_tiles).to(tl.int64)
    d = tl.program_id(0) % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    has_d = d < D
    row = tl.full([], -1, tl.int32)
    faulty = row != row
    if mask_row is not None:
        row = tl.load(mask_row + t)
        faulty = (row < -1) | (row >= U)
        row = tl.where(faulty, -1, row)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, k, UNROLL):
        for step in tl.static_range(UNROLL):
            i = first + step
            id = tl.load(ids + t * k + i, mask=i < k, other=-1)
            weight = tl.full([], 1.0, tl.float32)
            if weights is not None:
                weight = tl.load(weights + t * k + i, mask=i < k, other=0.0).to(tl.float32)
            uses = (id >= 0) & (id < C)
            faulty = faulty | ((uses == 0) & ((id != -1) | (weight != weight)))
            if mask_table is not None:
                uses = uses & (is_deleted(mask_table, words, row, id, uses) == 0)
            inside = d < tl.where(uses, D, 0)
            added = sums + weight * widened(table + id.to(tl.int64) * table_stride + d, inside)
            sums = tl.where(uses, added, sums)
    if mean:
        sums = tl.div_rn(sums, tl.zeros([BLOCK_D], tl.float32) + k)
    if bias is not None:
        sums = sums + tl.load(bias + d, mask=has_d, other=0.0)
    if residual is not None:
        sums = sums + widened(residual + t * residual_stride + d, has_d)
    sums = tl.where(faulty, float("nan"), sums)
    if BF16:
        tl.store(y + t * D + d, rounded_bf16(sums), mask=has_d)
    else:
        tl.store(y + t * D + d, sums.to(y.dtype.element_ty), mask=has_d)


def masked_decode(a: Any) -> Tensor:
    """As ``reference.masked_decode``: [T, D] in table's dtype."""
    (T, k), (C, D) = a.ids.shape, a.table.shape
    table, ids = rows_contiguous(a.table), a.ids.int().contiguous()
    residual = None if a.residual is None else rows_contiguous(a.residual)
    mask_table, mask_row = a.mask_table, a.mask_row
    if mask_table is not None:
        mask_table, mask_row = mask_table.contiguous(), mask_row.contiguous()
    y = table.new_empty((T, D))
    if y.numel() == 0:
        return y
    bf16 = table.dtype == torch.bfloat16
    with launch.on_device(table):
        tile = choose("gather_sum", launch.arch_of(table.device), T, D, C, k)
        start(
            gather_sum, T * -(-D // tile.block("D")), tile, ids=ids,
            weights=None if a.weights is None else a.weights.contiguous(), table=table, table_stride=table.stride(0),
            bias=vector(a.bias), residual=residual, residual_stride=0 if residual is None else residual.stride(0),
            mask_table=mask_table, mask_row=mask_row, words=-(-C // 32), U=0 if mask_table is None else len(mask_table),
            y=y.view(torch.int16) if bf16 else y, C=C, D=D, k=k, mean=a.mean, BF16=bf16,
        )  # fmt: skip
    return y
