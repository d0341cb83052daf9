"""Dot products of tokens with their codes, with Triton: w[t, i] = sum16(g[t] codes[ids[t, i]]).

    ids [T, k] int32, -1: no code;  g [T, E], codes [C, E] rows contiguous, fp32, bf16 or fp16;  w [T, k], codes' dtype

The gradient of gather_sum's weights, and in training what stands for a score and has a gradient; selections have the
scores of fixed.py. A program takes a token and a tile of its
slots, and reads the codes in place (shared.py: 16 partials and a tree; multiply, then add, never fused). A slot
without a code is 0, whatever its token's row holds. An id beyond the last code gives NaN: on a GPU the host has not
checked it, and the error has to show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start
from cu_fast.kernels.triton.shared import dots16, rounded_bf16


@triton.jit(do_not_specialize=["C", "k"])
def dot_slots(
    ids, g, g_stride, codes, code_stride, w, C, E, k, BF16: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr
):
    slot_tiles = tl.cdiv(k, BLOCK_C)
    token = (tl.program_id(0) // slot_tiles).to(tl.int64)
    i = tl.program_id(0) % slot_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    at = token * k + i
    id = tl.load(ids + at, mask=i < k, other=-1)
    uses = (id >= 0) & (id < C)
    dots = dots16(g + token * g_stride, codes, code_stride, id, uses, E, BLOCK_C, UNROLL)
    dots = tl.where(uses, dots, tl.where(id == -1, 0.0, float("nan")))
    if BF16:
        tl.store(w + at, rounded_bf16(dots), mask=i < k)
    else:
        tl.store(w + at, dots.to(w.dtype.element_ty), mask=i < k)


def gather_dot(ids: Tensor, g: Tensor, codes: Tensor) -> Tensor:
    """As ``nn.autograd.gather_dot``: [T, k] in codes' dtype."""
    (T, k), (C, E) = ids.shape, codes.shape
    ids, g, codes = ids.int().contiguous(), rows_contiguous(g), rows_contiguous(codes)
    w = codes.new_empty((T, k))
    if w.numel() == 0:
        return w
    bf16 = codes.dtype == torch.bfloat16
    with launch.on_device(codes):
        tile = choose("dot_slots", launch.arch_of(codes.device), T, E, C, k)
        start(
            dot_slots, T * -(-k // tile.block("C")), tile, ids=ids, g=g, g_stride=g.stride(0), codes=codes,
            code_stride=codes.stride(0), w=w.view(torch.int16) if bf16 else w, C=C, E=E, k=k, BF16=bf16,
        )  # fmt: skip
    return w
