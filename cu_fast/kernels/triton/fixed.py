"""The score with Triton: rows in fixed point, exact integer sums on matrix units, one rounding (``csrc/core/fixed.h``).

    score(t, j) = ((fp32(S) unit_t) factor_j) + bias_j       S = sum over e of q[t, e] p[j, e], exact
    q = 65536 x0 + 256 x1 + x2                               p = 65536 p0 + 256 p1 + p2, of the digits of a code

    x, row_digits  [T, E] any dtype, rows contiguous; int8 [T, 3, W], the highest digit first, zeros beyond E
    units          [T] fp32; NaN: the row holds NaN or Inf, its digits are zeros, and so all its scores are NaN
    digits         [C, 3, W] int8, of the codes; factor, bias [C] fp32

1. fix_rows      A program per token: the largest magnitude gives the shift, then every entry is rounded and cut.
2. integer_dots  In every kernel that scores. The nine products of digits go into six int32 sums: those of one weight
                 256^n share a sum, but no more than two share one, so that none overflows up to a width of 65,535. It
                 may not, as mma.sync saturates. The six are put together as int64.
3. scores_of     Each step rounded to fp32 and none fused; what is below 2^-125 becomes +0.0.

Matrix units take 16 rows or more: fewer tokens are laid between rows of zeros, which are summed away.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels.reference import fixed
from cu_fast.kernels.triton.launch import Config, start
from cu_fast.kernels.triton.shared import widened

TWICE_LARGEST = tl.constexpr(2 * fixed.LARGEST)
MOST_SHIFT = tl.constexpr(fixed.MOST_SHIFT)
LEAST = tl.constexpr(fixed.LEAST)
INFINITE = tl.constexpr(0x7F800000)  # bits of a magnitude from which on it is Inf or NaN


@triton.jit
def power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def entries(row, pre, rho, e, E):
    """Entries e of row - pre, or of rho row, as fp32; zeros beyond E."""
    x = widened(row + e, e < E)
    if pre is not None:
        x = x - tl.load(pre + e, mask=e < E, other=0.0)
    if rho is not None:
        x = tl.where(e < E, x * rho, 0.0)
    return x


@triton.jit
def fix_row(row, pre, rho, row_digits, E, W, BLOCK_E: tl.constexpr):
    """Writes the digits [3, W] of a row and returns its unit."""
    bits = tl.zeros([BLOCK_E], tl.int32)  # of magnitudes, which are in the order of the numbers
    for first in range(0, E, BLOCK_E):
        x = entries(row, pre, rho, first + tl.arange(0, BLOCK_E), E)
        bits = tl.maximum(bits, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(bits, 0)
    fits = ((largest & 0x7FFFFF) | 0x800000) <= TWICE_LARGEST  # with a shift of 22 less the exponent q is half of it
    shift = tl.minimum(tl.where(fits, 149, 148) - (largest >> 23), MOST_SHIFT)
    for first in range(0, W, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        x = tl.where(largest < INFINITE, entries(row, pre, rho, e, E), 0.0)
        # Above 2^23 fp32 holds whole numbers alone, so this sum rounds to nearest, ties to even; its fraction is |q|.
        q = (tl.abs(x) * power_of_two(shift) + 8388608.0).to(tl.int32, bitcast=True) & 0x7FFFFF
        q = tl.where(x < 0, -q, q)
        low = ((q + 128) & 255) - 128
        q = (q - low) >> 8
        middle = ((q + 128) & 255) - 128
        tl.store(row_digits + e, ((q - middle) >> 8).to(tl.int8), mask=e < W)
        tl.store(row_digits + W + e, middle.to(tl.int8), mask=e < W)
        tl.store(row_digits + 2 * W + e, low.to(tl.int8), mask=e < W)
    return tl.where(largest < INFINITE, power_of_two(-shift), float("nan"))


@triton.jit
def fix_rows(x, x_stride, pre, row_digits, units, E, W, BLOCK_E: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    tl.store(units + t, fix_row(x + t * x_stride, pre, None, row_digits + t * 3 * W, E, W, BLOCK_E))


@triton.jit
def integer_dots(
    row_digits, t, has_t, digits, j, has_j, W, end,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """S, int64 [BLOCK_T, BLOCK_C], of entries 0 to end of rows t [BLOCK_T] and codes j [BLOCK_C]; end is W, or 0."""
    PAD: tl.constexpr = 16 // BLOCK_T if BLOCK_T < 16 else 1
    ROWS: tl.constexpr = BLOCK_T * PAD
    pad = tl.arange(0, PAD)[None, :]
    of_row = tl.reshape(t[:, None] + pad * 0, (ROWS,)).to(tl.int64)[:, None] * 3 * W
    has_row = tl.reshape(tl.where(has_t[:, None] & (pad == 0), 1, 0), (ROWS,))[:, None] != 0
    of_code, has_code = j.to(tl.int64)[None, :] * 3 * W, has_j[None, :]
    s00 = tl.zeros([ROWS, BLOCK_C], tl.int32)
    s01, s02, s11, s12, s22 = s00, s00, s00, s00, s00
    for first in range(0, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        rows, codes = row_digits + of_row + e[None, :], digits + of_code + e[:, None]
        x0 = tl.load(rows, mask=has_row, other=0)
        x1 = tl.load(rows + W, mask=has_row, other=0)
        x2 = tl.load(rows + 2 * W, mask=has_row, other=0)
        p0 = tl.load(codes, mask=has_code, other=0)
        p1 = tl.load(codes + W, mask=has_code, other=0)
        p2 = tl.load(codes + 2 * W, mask=has_code, other=0)
        s00 = tl.dot(x0, p0, s00, out_dtype=tl.int32)
        s01 = tl.dot(x0, p1, s01, out_dtype=tl.int32)
        s01 = tl.dot(x1, p0, s01, out_dtype=tl.int32)
        s02 = tl.dot(x0, p2, s02, out_dtype=tl.int32)
        s02 = tl.dot(x2, p0, s02, out_dtype=tl.int32)
        s11 = tl.dot(x1, p1, s11, out_dtype=tl.int32)
        s12 = tl.dot(x1, p2, s12, out_dtype=tl.int32)
        s12 = tl.dot(x2, p1, s12, out_dtype=tl.int32)
        s22 = tl.dot(x2, p2, s22, out_dtype=tl.int32)
    total = (s00.to(tl.int64) << 8) + s01
    total = (total << 8) + s02 + s11
    total = (total << 8) + s12
    total = (total << 8) + s22
    return total if PAD == 1 else tl.sum(tl.reshape(total, (BLOCK_T, PAD, BLOCK_C)), 1)


@triton.jit
def cut(y):
    return tl.where((y < LEAST) & (y > -LEAST), 0.0, y)


@triton.jit
def scores_of(total, unit, factor, bias, j, has_j):
    """fp32 [BLOCK_T, BLOCK_C] from S, the units of the rows [BLOCK_T], and factor and bias of codes j [BLOCK_C]."""
    y = total.to(tl.float32) * unit[:, None]
    y = cut(y * tl.load(factor + j, mask=has_j, other=0.0)[None, :])
    if bias is not None:
        y = cut(y + tl.load(bias + j, mask=has_j, other=0.0)[None, :])
    return y


class Rows:
    """Memory for rows in fixed point, of some tokens.

    Args:
        tokens: how many.
        W: bytes of a digit.
        device: of the memory.
    """

    def __init__(self, tokens: int, W: int, device: torch.device) -> None:
        self.digits = torch.empty((tokens, 3, W), dtype=torch.int8, device=device)
        self.units = torch.empty((tokens,), dtype=torch.float32, device=device)

    def fix(self, x: Tensor, pre: Tensor | None, tile: Config) -> None:
        """Start the kernel that fills it with the rows of x - pre."""
        T, E = x.shape
        start(
            fix_rows, T, tile, x=x, x_stride=x.stride(0), pre=pre, row_digits=self.digits, units=self.units, E=E,
            W=self.digits.shape[2],
        )  # fmt: skip
