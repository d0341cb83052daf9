"""Dot products of tokens with their codes, with Triton: w[t, i] = canonical(g[t], codes[ids[t, i]]).

    ids [T, k] int32, -1: no code;  g [T, E], codes [C, E] rows contiguous, fp32, bf16 or fp16;  w [T, k], codes' dtype

The gradient of gather_sum's weights, and the scores of codes in training. A program takes a token and a tile of its
slots, and reads the codes in place (canonical.py: 16 partials and a tree; multiply, then add, never fused). A slot
without a code is 0, whatever its token's row holds. An id beyond the last code gives NaN: on a GPU the host has not
checked it, and the error has to show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.canonical import canonical_dots, rounded_bf16
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start


@triton.jit(do_not_specialize=["C", "k"])
def dot_slots(
    ids, g, g_stride, codes, code_stride, w, C, E, k, BF16: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr
):
    slot_tiles = tl.cdiv(k, BLOCK_C)
    token = tl.program_id(0) // slot_tiles
    i = tl.program_id(0) % slot_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    at = token.to(tl.int64) * k + i
    id = tl.load(ids + at, mask=i < k, other=-1)
    uses = (id >= 0) & (id < C)
    t = token + tl.arange(0, 1)
    dots, _ = canonical_dots(
        g, g_stride, t, t >= 0, codes, code_stride, id, uses, None, E, 1, BLOCK_C, UNROLL
    )  # fmt: skip
    dots = tl.where(uses[None, :], dots, tl.where(id == -1, 0.0, float("nan"))[None, :])
    if BF16:
        tl.store(w + at[None, :], rounded_bf16(dots), mask=(i < k)[None, :])
    else:
        tl.store(w + at[None, :], dots.to(w.dtype.element_ty), mask=(i < k)[None, :])


def gather_dot(ids: Tensor, g: Tensor, codes: Tensor) -> Tensor:
    """As ``nn.autograd.gather_dot``: [T, k] in codes' dtype."""
    (T, k), (C, E) = ids.shape, codes.shape
    ids, g, codes = ids.int().contiguous(), rows_contiguous(g), rows_contiguous(codes)
    w = codes.new_empty((T, k))
    if w.numel() == 0:
        return w
    bf16 = codes.dtype == torch.bfloat16
    with launch.on_device(codes):
        tile = choose("dot_slots", launch.arch_of(codes.device), T, E, C, k, codes.dtype)
        start(
            dot_slots, T * -(-k // tile.block("C")), tile, ids=ids, g=g, g_stride=g.stride(0), codes=codes,
            code_stride=codes.stride(0), w=w.view(torch.int16) if bf16 else w, C=C, E=E, k=k, BF16=bf16,
        )  # fmt: skip
    return w
