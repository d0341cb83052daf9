"""Sums of tokens by their codes, with Triton: y[j] = the sum of w[t, i] g[t] over ids[t, i] = j.

    ids [T, k], below 0 or from C on: no code;  weights [T, k];  g [T, E] rows contiguous
    y [C, E] contiguous, the wider dtype of weights and g

The gradient of gather_sum's codes. It has no atomics, so the same bits in every run: a stable sort by id brings the
places (t, i) of a code together, in their order, and one program adds them. So that a code that most tokens keep is not
the work of a single program, a code's places are cut, from the first on, into pieces of PIECE:

    y[j] = ((piece 0 + piece 1) + ...) + the remaining places      each in fp32, in order: multiply, then add

1. sum_pieces   A program takes a whole piece and BLOCK_E columns. T k / PIECE programs per column tile are started, the
                most that are possible; only the device knows how many pieces there are, and the others add nothing.
2. sum_codes    A program takes a code and BLOCK_E columns: pieces, then the remaining places; rounded once. Codes
                without places get zeros.

Memory beside y: O(T k + C), and a row of fp32 per PIECE places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start
from cu_fast.kernels.triton.shared import rounded_bf16, widened

PIECE = 256  # unlike a tile it decides the order of the sum, and so its bits


@triton.jit
def sum_in_order(tokens, weights, g, g_stride, first, end, e, E, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr):
    """Columns e [BLOCK_E] of the sum over places first, ..., end - 1."""
    sums = tl.zeros([BLOCK_E], tl.float32)
    for base in range(first, end, UNROLL):
        for step in tl.static_range(UNROLL):
            place = base + step
            exists = place < end
            t = tl.load(tokens + place, mask=exists, other=0).to(tl.int64)
            weight = tl.load(weights + place, mask=exists, other=0.0).to(tl.float32)
            sums += weight * widened(g + t * g_stride + e, e < tl.where(exists, E, 0))  # beyond the end adds 0 * 0
    return sums


@triton.jit(do_not_specialize=["C"])
def sum_pieces(
    tokens, weights, g, g_stride, starts, pieces_before, code_of_piece, pieces, C, E,
    PIECE: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(E, BLOCK_E)
    piece = (tl.program_id(0) // column_tiles).to(tl.int64)
    e = tl.program_id(0) % column_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    j = tl.load(code_of_piece + piece)  # C beyond the last piece
    first = tl.load(starts + j) + (piece - tl.load(pieces_before + j)) * PIECE
    end = tl.where(j < C, first + PIECE, first)
    sums = sum_in_order(tokens, weights, g, g_stride, first, end, e, E, BLOCK_E, UNROLL)
    tl.store(pieces + piece * E + e, sums, mask=e < E)


@triton.jit
def sum_codes(
    tokens, weights, g, g_stride, starts, pieces_before, pieces, y, E,
    BF16: tl.constexpr, PIECE: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(E, BLOCK_E)
    j = (tl.program_id(0) // column_tiles).to(tl.int64)
    e = tl.program_id(0) % column_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    first, end = tl.load(starts + j), tl.load(starts + j + 1)
    sums = tl.zeros([BLOCK_E], tl.float32)
    if pieces is not None:
        piece, beyond = tl.load(pieces_before + j), tl.load(pieces_before + j + 1)
        first += (beyond - piece) * PIECE
        for base in range(piece, beyond, UNROLL):
            for step in tl.static_range(UNROLL):
                inside = e < tl.where(base + step < beyond, E, 0)
                sums += tl.load(pieces + (base + step) * E + e, mask=inside, other=0.0)
    sums += sum_in_order(tokens, weights, g, g_stride, first, end, e, E, BLOCK_E, UNROLL)
    if BF16:
        tl.store(y + j * E + e, rounded_bf16(sums), mask=e < E)
    else:
        tl.store(y + j * E + e, sums.to(y.dtype.element_ty), mask=e < E)


def scatter_sum(ids: Tensor, weights: Tensor, g: Tensor, num_codes: int) -> Tensor:
    """As ``nn.autograd.scatter_sum``: [num_codes, E]."""
    (T, k), E, C = ids.shape, g.shape[1], num_codes
    g = rows_contiguous(g)
    y = g.new_empty((C, E), dtype=torch.promote_types(weights.dtype, g.dtype))
    if y.numel() == 0:
        return y
    ids, order = torch.sort(ids.flatten(), stable=True)
    tokens, weights = (order // k).int(), weights.flatten()[order]
    # Where the places of each of the C codes begin, and where the last code's end. Others belong to no code.
    codes = torch.arange(C + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(ids, codes)
    pieces_before = code_of_piece = pieces = None
    if count := T * k // PIECE:
        pieces_before = torch.zeros_like(starts)
        torch.cumsum(starts.diff() // PIECE, 0, out=pieces_before[1:])
        numbers = torch.arange(count, device=ids.device)
        code_of_piece = torch.searchsorted(pieces_before, numbers, right=True) - 1
        pieces = g.new_empty((count, E), dtype=torch.float32)
    bf16 = y.dtype == torch.bfloat16
    with launch.on_device(g):
        arch = launch.arch_of(g.device)
        shared = dict(
            tokens=tokens, weights=weights, g=g, g_stride=g.stride(0), starts=starts, pieces_before=pieces_before,
            pieces=pieces, E=E, PIECE=PIECE,
        )  # fmt: skip
        if count:
            tile = choose("sum_pieces", arch, T, E, C, k)
            start(sum_pieces, count * -(-E // tile.block("E")), tile, code_of_piece=code_of_piece, C=C, **shared)
        tile = choose("sum_codes", arch, T, E, C, k)
        start(
            sum_codes, C * -(-E // tile.block("E")), tile, y=y.view(torch.int16) if bf16 else y, BF16=bf16, **shared
        )  # fmt: skip
    return y
