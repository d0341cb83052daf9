"""What is computed once per codebook: its digits, and the int8 plane of the certified scan (contract, sections 2 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast.kernels.reference.fixed import LARGEST, LEAST_ROW, digits_of, integers_of

PACK_CODES = 4096  # codes that are widened at a time
LEAST_FACTOR, MOST_FACTOR = 2.0**-123, 2.0**40  # |factor| of a code whose error has a bound, if it is not 0


def pack_digits(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of weights as integers p = rint(w / s) of 24 bits, in digits.

    s is the smallest fp32 number with LARGEST s >= max|w|; the quotient is fp64's, ties go to even. A row whose largest
    entry is below LEAST_ROW counts as zeros, with s = 0. One with NaN or Inf has p = 0 and s = NaN.

    Args:
        codes: [C, E], widened to fp32.

    Returns:
        digits int8 [C, 3, W], W = E padded to a multiple of 64: p = 65536 d[0] + 256 d[1] + d[2], d from -128 to 127.
        step fp32 [C]: s. squares fp32 [C]: the exact sum of p^2, rounded once.
    """
    parts = [_digits(some) for some in codes.split(PACK_CODES)]
    digits, step, squares = (torch.cat(part) for part in zip(*parts))
    return digits, step, squares


def _digits(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = w.float()
    finite = torch.isfinite(w).all(1)
    w = torch.where(finite[:, None], w, 0.0).double()
    largest = w.abs().amax(1)
    largest = torch.where(largest < LEAST_ROW, 0.0, largest)
    step = (largest / LARGEST).float()
    step = torch.where(step.double() * LARGEST < largest, torch.nextafter(step, step.new_tensor(torch.inf)), step)
    p = torch.where(step[:, None] > 0, w / torch.where(step == 0, 1.0, step.double())[:, None], 0.0).round().int()
    wide = p.long()
    return digits_of(p), torch.where(finite, step, torch.nan), (wide * wide).sum(1).float()


def pack_scan(digits: Tensor, factor: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as the int8 plane of the certified scan, with the terms of its error: ``csrc/core/scan.h``.

    The codes that are scanned are the integers of the digits. Norms are computed in fp64 and rounded up. The host never
    waits for the device.

    Args:
        digits: int8 [C, 3, W].
        factor: fp32 [C].
        E: the codes' width.

    Returns:
        plane uint8 [ceil(C/64), ceil(E/4), 64, 4], terms fp32 [ceil(C/64), 196] and mean fp32 [E] (0 = not centred).
    """
    C = digits.shape[0]
    inv = factor.double()
    chunks = range(0, C, PACK_CODES)

    def codes(c: int) -> Tensor:
        return integers_of(digits[c : c + PACK_CODES], E).double()

    norm = torch.cat([codes(c).norm(dim=1) for c in chunks])
    bounded = (inv == 0) | ((inv.abs() >= LEAST_FACTOR) & (inv.abs() <= MOST_FACTOR))
    total = sum(torch.where(bounded[c : c + PACK_CODES, None], codes(c), 0.0).sum(0) for c in chunks)
    mean = (total / bounded.sum()).float()
    square = torch.where(bounded, norm, 0.0).square().sum()
    mean = torch.where(mean.double().square().sum() * bounded.sum() > 0.1 * square, mean, 0.0)

    G, width = (C + 63) // 64, (E + 3) // 4 * 4
    plane = torch.full((G * 64, width), 128, dtype=torch.uint8, device=digits.device)
    terms = torch.zeros(4, G * 64, dtype=torch.float32, device=digits.device)
    for i in chunks:
        some = slice(i, min(i + PACK_CODES, C))
        use, abs_inv = bounded[some], inv[some].abs()
        d = torch.where(use[:, None], codes(i) - mean.double(), 0.0)
        step = (d.abs().amax(1) / 127).clamp(min=1)
        c = (d / step[:, None]).round()
        plane[some, :E] = (c + 128).to(torch.uint8)
        size = c.norm(dim=1) * step
        residual = (d - step[:, None] * c).norm(dim=1)
        bounds = torch.stack([residual, size, norm[some] + mean.double().norm() + 2 * size]) * abs_inv * (1 + 1e-9)
        bounds = torch.nextafter(bounds.float(), bounds.new_tensor(torch.inf).float())
        unbounded = bounds.new_tensor([torch.inf, 0.0, 0.0])[:, None]
        terms[0, some] = torch.where(use, (inv[some] * step).float(), 0.0)
        terms[1:, some] = torch.where(use, bounds, unbounded)
    largest = terms.view(4, G, 64).abs().amax(2).T
    terms = torch.cat([terms[:3].view(3, G, 64).transpose(0, 1).reshape(G, 192), largest], 1)
    plane = plane.view(G, 64, width // 4, 4).transpose(1, 2).contiguous()
    return plane, terms, mean
