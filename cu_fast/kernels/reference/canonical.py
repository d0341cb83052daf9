"""Numbers that every implementation computes in one order: dot products, and norms made of them."""

from __future__ import annotations

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5  # what is added to a standard deviation
LANES = 16  # partial sums of the canonical dot product
NORM_CODES = 512  # codes that squared_norm reads at a time on a CPU


def canonical_dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product over the last dimension as a defined fp32 number.

    16 partial sums, then a tree; multiply, then add, never fused.

    Args:
        a: [..., E], widened to fp32.
        b: [..., E], widened to fp32; the leading dimensions of a and b broadcast.

    Returns:
        fp32 [...].
    """
    a, b = a.float(), b.float()
    if pad := -a.shape[-1] % LANES:
        a, b = torch.nn.functional.pad(a, (0, pad)), torch.nn.functional.pad(b, (0, pad))
    partial = torch.zeros_like(a[..., :LANES] * b[..., :LANES])
    for e in range(0, a.shape[-1], LANES):
        partial += a[..., e : e + LANES] * b[..., e : e + LANES]
    width = LANES
    while width > 1:
        width //= 2
        partial = partial[..., :width] + partial[..., width : 2 * width]
    return partial[..., 0]


def squared_norm(codes: Tensor) -> Tensor:
    """canonical(c, c): codes [C, E] -> fp32 [C]. On a CPU NORM_CODES at a time, so that they stay in its cache."""
    at_once = codes.device.type != "cpu" or torch.compiler.is_compiling()
    chunk = len(codes) if at_once else NORM_CODES
    return torch.cat([canonical_dot(some, some) for some in codes.split(chunk)])


def inverse_norm(codes: Tensor) -> Tensor:
    """1 / sqrt(canonical(c, c)), each step rounded to fp32; 0 for a zero code. codes [C, E] -> fp32 [C]."""
    squared = squared_norm(codes)
    return torch.where(squared == 0, 0.0, 1.0 / torch.sqrt(squared))


def root(x: Tensor) -> Tensor:
    """The square root of an fp32 tensor, rounded once. torch's own of fp32 may be a unit in the last place off on a CPU."""
    return torch.sqrt(x.double()).float()  # a double is wide enough for the second rounding to change nothing


def token_scales(x: Tensor, scale: int, norm: float) -> tuple[Tensor, Tensor]:
    """What a token is multiplied with before it is encoded, and what its decoded latents are multiplied with.

    Sums are canonical, every step is rounded to fp32.

    Args:
        x: [T, D].
        scale: 0 = none: both are 1. 1 = layer norm: 1 / (std + LAYER_NORM_EPS) and std, with D - 1 in the denominator.
            2 = constant norm: norm / ||x|| and ||x|| / norm; of a row of zeros both are 0.
        norm: of scale 2.

    Returns:
        rho fp32 [T], sigma fp32 [T].
    """
    # Numbers as tensors: 3.0 / x would be (1 / x) * 3.0, rounded twice, and on a GPU x / 3.0 would be x * (1 / 3.0).
    x = x.float()
    one = torch.ones(x.shape[0], device=x.device)
    if scale == 0:
        return one, one
    if scale == 1:
        mean = canonical_dot(x, torch.ones_like(x)) / (one * x.shape[1])
        centred = x - mean[:, None]
        std = root(canonical_dot(centred, centred) / (one * (x.shape[1] - 1)))
        return one / (std + LAYER_NORM_EPS), std
    length = root(canonical_dot(x, x))
    return torch.where(length == 0, 0.0, one * norm / length), length / (one * norm)
