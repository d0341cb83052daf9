"""The score that every implementation computes alike: fixed point, an exact integer sum, one rounding (contract, section 2).

Rows of x and rows of weights become integers of 24 bits. Their dot product is the exact integer, so no order, tile, batch or
split of the width can change it. Weights are stored as three balanced digits to the base 256, which fit int8.

T tokens, E width, C codes (or other rows of weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast.kernels.reference.scales import root

DIGITS = 3
LARGEST = 127 * (2**16 + 2**8 + 1)  # what three balanced digits of 8 bits reach
MOST_SHIFT = 125  # so that 2^-shift is a normal number, and every denormal entry of x becomes 0
LEAST_ROW = 2.0**-100  # a row of weights whose largest entry is below counts as zeros
LEAST = 2.0**-125  # a product or sum below becomes 0, so that no result depends on how a processor treats denormals
MOST_WIDTH = 65_535  # the sum of two products of digits over a row stays inside an int32
ALIGN = 64  # digits are padded with zeros to a multiple of this
EXACT_WIDTH = 2**14  # 23 + 15 bits of a product and 14 of the sum: exact in fp64, in any order


def fix_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers: q = rint(x 2^a), ties to even, a the largest integer <= MOST_SHIFT with max|x| 2^a <= LARGEST.

    Args:
        x: [T, E], widened to fp32.

    Returns:
        q int32 [T, E]; the unit 2^-a, fp32 [T], 1 of a row of zeros. Of a row with NaN or Inf q is 0 and the unit NaN.
    """
    x = x.float()
    finite = torch.isfinite(x).all(1)
    x = torch.where(finite[:, None], x, 0.0).double()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    is_zero = largest == 0
    a = torch.frexp(LARGEST / torch.where(is_zero, 1.0, largest)).exponent - 1
    # The quotient is rounded, so that a may be off by one.
    a = torch.where(torch.ldexp(largest, a + 1) <= LARGEST, a + 1, a)
    a = torch.where(torch.ldexp(largest, a) > LARGEST, a - 1, a)
    a = torch.where(is_zero, 0, a.clamp(max=MOST_SHIFT)).int()
    unit = torch.ldexp(torch.ones_like(a, dtype=torch.float32), -a)
    return torch.ldexp(x, a[:, None]).round().int(), torch.where(finite, unit, torch.nan)


def integers_of(digits: Tensor, E: int) -> Tensor:
    """Digits int8 [C, 3, W] as the integers that they stand for, int32 [C, E]."""
    high, middle, low = digits[:, :, :E].int().unbind(1)
    return (high << 16) + (middle << 8) + low


def digits_of(p: Tensor) -> Tensor:
    """Integers int32 [C, E], at most LARGEST in magnitude, as balanced digits int8 [C, 3, W]: the highest first."""
    low = (p + 128 & 255) - 128
    rest = p - low >> 8
    middle = (rest + 128 & 255) - 128
    digits = torch.stack([rest - middle >> 8, middle, low], 1).to(torch.int8)
    return torch.nn.functional.pad(digits, (0, -p.shape[1] % ALIGN))


def integer_dot(q: Tensor, p: Tensor) -> Tensor:
    """The exact dot products of integer rows: q int32 [T, E], p int32 [..., E], of 24 bits -> int64 [T, ...].

    p is [C, E], the same for all rows of q, or [T, M, E]. Two products in fp64, which hold every partial sum exactly, so
    that they may run in any order, fused or not.
    """
    shared = p.dim() == 2
    total = q.new_zeros((len(q), p.shape[-2]), dtype=torch.int64)
    for e in range(0, q.shape[1], EXACT_WIDTH):
        a, b = q[:, e : e + EXACT_WIDTH].double(), p[..., e : e + EXACT_WIDTH]
        high = (b + 128) >> 8
        for part, shift in ((high, 8), (b - (high << 8), 0)):
            part = part.double()
            product = a @ part.T if shared else (part @ a[:, :, None])[:, :, 0]
            total += product.long() << shift
    return total


def scores_of(total: Tensor, unit: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """((fp32(total) unit) factor) + bias, each step rounded to fp32, none fused.

    A product or a sum below LEAST in magnitude becomes +0.0.

    Args:
        total: int64 [T, n].
        unit: fp32 [T], of the rows; NaN makes a score NaN.
        factor: fp32 [n] or [T, n], of the codes; NaN makes a score NaN.
        bias: as factor, or None = 0.

    Returns:
        fp32 [T, n].
    """
    y = _cut((total.float() * unit[:, None]) * factor)
    return y if bias is None else _cut(y + bias)


def _cut(y: Tensor) -> Tensor:
    return torch.where(y.abs() < LEAST, 0.0, y)


def cosine_factor(step: Tensor, squares: Tensor) -> Tensor:
    """What a code's integer product is multiplied with for cosine: 1 / sqrt(squares), in which the step cancels.

    For an inner product and for L2 it is the step.

    Args:
        step: fp32 [C], of :func:`pack_digits`.
        squares: fp32 [C], of :func:`pack_digits`.

    Returns:
        fp32 [C]; 0 for a zero code, NaN for one with NaN or Inf.
    """
    inverse = torch.where(squares == 0, 0.0, 1.0 / root(squares))
    return torch.where(step.isnan(), step, inverse)


def l2_bias(step: Tensor, squares: Tensor) -> Tensor:
    """What is added to a code's product for L2: -0.5 ((squares step) step), fp32 [C]. Arguments as above."""
    return _cut(-0.5 * ((squares * step) * step))
