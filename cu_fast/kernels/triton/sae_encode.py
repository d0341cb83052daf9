"""The encoder with Triton: dense, and with k the selection of codebook_quantize.py with W_enc's rows as codes.

    z[t, e] = act(score(t, e))      a row of x - b_pre with NaN or Inf: NaN

    x [T, D] rows contiguous, fp32, bf16 or fp16;  W_digits [E, 3, W] int8;  b_pre [D] fp32;  z [T, E] fp32

Rows of x - b_pre go into fixed point (fixed.py), some tokens at a time, so that memory does not grow with them. Then a
program takes a tile of tokens and of rows of W_enc, C = E of them: scores and activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.codebook_quantize import Scores, select
from cu_fast.kernels.triton.fixed import Rows, integer_dots, scores_of
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start, vector


@triton.jit(do_not_specialize=["T"])
def encode_tile(
    row_digits, units, digits, factor, bias, out, T, C, W, relu: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    code_tiles = tl.cdiv(C, BLOCK_C)
    t = tl.program_id(0) // code_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.program_id(0) % code_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    has_t, has_j = t < T, j < C
    total = integer_dots(row_digits, t, has_t, digits, j, has_j, W, W, BLOCK_T, BLOCK_C, BLOCK_E)
    unit = tl.load(units + t, mask=has_t, other=0.0)
    scores = scores_of(total, unit, factor, bias, j, has_j)  # NaN where the unit is
    if relu:
        scores = tl.where(scores <= 0, 0.0, scores)
    tl.store(out + t.to(tl.int64)[:, None] * C + j[None, :], scores, mask=has_t[:, None] & has_j[None, :])


def sae_encode(a: Any) -> Tensor:
    """As ``reference.sae_encode``: fp32 [T, E]."""
    x, digits = rows_contiguous(a.x), a.W_digits.contiguous()
    (T, D), (E, _, W) = x.shape, digits.shape
    z = x.new_empty((T, E), dtype=torch.float32)
    if z.numel() == 0:
        return z
    with launch.on_device(x):
        arch = launch.arch_of(x.device)
        fixing, tile = (choose(kernel, arch, T, D, E, 0) for kernel in ("fix_rows", "encode_tile"))
        chunk, pre = min(T, launch.fixed_tokens(W, arch)), vector(a.b_pre)
        of_codes = dict(digits=digits, factor=vector(a.W_factor), bias=vector(a.b_enc))
        rows = Rows(chunk, W, x.device)
        for first in range(0, T, chunk):
            some = x[first : first + chunk]
            rows.fix(some, pre, fixing)
            start(
                encode_tile, -(-len(some) // tile.block("T")) * -(-E // tile.block("C")), tile, row_digits=rows.digits,
                units=rows.units, **of_codes, out=z[first : first + chunk], T=len(some), C=E, W=W, relu=a.relu,
            )  # fmt: skip
    return z


def sae_encode_topk(a: Any) -> tuple[Tensor, Tensor]:
    """As ``reference.sae_encode_topk``: act(score) fp32 [T, k], in the order of the raw scores, and ids int32 [T, k]."""
    scores = Scores(rows_contiguous(a.x), vector(a.b_pre), a.W_digits.contiguous(), vector(a.W_factor), vector(a.b_enc))
    return select(scores, a, None, a.relu)
