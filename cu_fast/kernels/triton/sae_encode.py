"""The encoder with Triton: dense, and with k the selection of codebook_quantize.py with W_enc's rows as codes.

    z[t, e] = act(canonical(x_t - b_pre, W_enc_e) + b_enc_e)      a row of x - b_pre with NaN or Inf: NaN

    x [T, D], W_enc [E, D]  rows contiguous, fp32, bf16 or fp16;  b_enc [E], b_pre [D] fp32;  z [T, E] fp32

A program takes a tile of tokens and of rows of W_enc, C = E of them: canonical dots (canonical.py: multiply, then add,
never fused), then bias, activation and NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.canonical import canonical_dots
from cu_fast.kernels.triton.codebook_quantize import Scores, select
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start, vector


@triton.jit(do_not_specialize=["T"])
def encode_tile(
    z, z_stride, codes, code_stride, pre, bias, out, T, C, E, relu: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    code_tiles = tl.cdiv(C, BLOCK_C)
    t = tl.program_id(0) // code_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.program_id(0) % code_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    has_t, has_j = t < T, j < C
    dots, faulty = canonical_dots(
        z, z_stride, t, has_t, codes, code_stride, j, has_j, pre, E, BLOCK_T, BLOCK_C, UNROLL
    )  # fmt: skip
    if bias is not None:
        dots = dots + tl.load(bias + j, mask=has_j, other=0.0)[None, :]
    if relu:
        dots = tl.where(dots <= 0, 0.0, dots)
    dots = tl.where(faulty[:, None], float("nan"), dots)
    tl.store(out + t.to(tl.int64)[:, None] * C + j[None, :], dots, mask=has_t[:, None] & has_j[None, :])


def sae_encode(a: Any) -> Tensor:
    """As ``reference.sae_encode``: fp32 [T, E]."""
    x, W_enc = rows_contiguous(a.x), rows_contiguous(a.W_enc)
    (T, D), E = x.shape, W_enc.shape[0]
    z = x.new_empty((T, E), dtype=torch.float32)
    if z.numel() == 0:
        return z
    with launch.on_device(x):
        tile = choose("encode_tile", launch.arch_of(x.device), T, D, E, 0, W_enc.dtype)
        start(
            encode_tile, -(-T // tile.block("T")) * -(-E // tile.block("C")), tile, z=x, z_stride=x.stride(0),
            codes=W_enc, code_stride=W_enc.stride(0), pre=vector(a.b_pre), bias=vector(a.b_enc), out=z, T=T, C=E, E=D,
            relu=a.relu,
        )  # fmt: skip
    return z


def sae_encode_topk(a: Any) -> tuple[Tensor, Tensor]:
    """As ``reference.sae_encode_topk``: act(score) fp32 [T, k], in the order of the raw scores, and ids int32 [T, k]."""
    scores = Scores(rows_contiguous(a.x), rows_contiguous(a.W_enc), vector(a.b_pre), None, vector(a.b_enc))
    return select(scores, a, None, a.relu)
