"""Sums over one row that every implementation adds up in one order: the norms of a token."""

from __future__ import annotations

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5  # what is added to a standard deviation
LANES = 16  # partial sums of sum16


def sum16(x: Tensor) -> Tensor:
    """The sum over the last dimension in a defined order: 16 partial sums, then a tree.

    Args:
        x: [..., E], widened to fp32.

    Returns:
        fp32 [...].
    """
    x = x.float()
    if pad := -x.shape[-1] % LANES:
        x = torch.nn.functional.pad(x, (0, pad))
    partial = torch.zeros_like(x[..., :LANES])
    for e in range(0, x.shape[-1], LANES):
        partial += x[..., e : e + LANES]
    width = LANES
    while width > 1:
        width //= 2
        partial = partial[..., :width] + partial[..., width : 2 * width]
    return partial[..., 0]


def root(x: Tensor) -> Tensor:
    """The square root of an fp32 tensor, rounded once. torch's own of fp32 may be a unit in the last place off on a CPU."""
    return torch.sqrt(x.double()).float()  # a double is wide enough for the second rounding to change nothing


def token_scales(x: Tensor, scale: int, norm: float) -> tuple[Tensor, Tensor]:
    """What a token is multiplied with before it is encoded, and what its decoded latents are multiplied with.

    Sums are sum16, every step is rounded to fp32.

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
        return one, one.clone()
    if scale == 1:
        mean = sum16(x) / (one * x.shape[1])
        centred = x - mean[:, None]
        std = root(sum16(centred * centred) / (one * (x.shape[1] - 1)))
        return one / (std + LAYER_NORM_EPS), std
    length = root(sum16(x * x))
    return torch.where(length == 0, 0.0, one * norm / length), length / (one * norm)
