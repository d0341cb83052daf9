"""The int8 plane of the certified scan: section 5 of the contract."""

from __future__ import annotations

import torch
from torch import Tensor

PACK_CODES = 4096  # codes that pack_scan widens at a time


def pack_scan(codes: Tensor, inv_norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as the int8 plane of the certified scan, with the terms of its error: ``csrc/core/scan.h``.

    Norms are computed in fp64 and rounded up. The host never waits for the device.

    Args:
        codes: [C, E].
        inv_norm: fp32 [C], or None = 1.

    Returns:
        plane uint8 [ceil(C/64), ceil(E/4), 64, 4], terms fp32 [ceil(C/64), 196] and mean fp32 [E] (0 = not centred).
    """
    C, E = codes.shape
    inv = torch.ones(C, device=codes.device) if inv_norm is None else inv_norm
    inv = inv.double()
    chunks = range(0, C, PACK_CODES)
    norm = torch.cat([codes[c : c + PACK_CODES].double().norm(dim=1) for c in chunks])

    def in_range(x: Tensor) -> Tensor:
        return (x == 0) | ((x >= 2.0**-40) & (x <= 2.0**40))

    certified = in_range(norm) & in_range(norm * inv.abs()) & inv.isfinite()
    total = sum(
        torch.where(certified[c : c + PACK_CODES, None], codes[c : c + PACK_CODES].double(), 0.0).sum(0) for c in chunks
    )
    mean = (total / certified.sum()).float()
    square = torch.where(certified, norm, 0.0).square().sum()
    mean = torch.where(mean.double().square().sum() * certified.sum() > 0.1 * square, mean, 0.0)
    mean_norm = mean.double().norm()
    certified &= mean_norm * inv.abs() <= 2.0**40

    G, width = (C + 63) // 64, (E + 3) // 4 * 4
    plane = torch.full((G * 64, width), 128, dtype=torch.uint8, device=codes.device)
    terms = torch.zeros(4, G * 64, dtype=torch.float32, device=codes.device)
    for c in chunks:
        some = slice(c, min(c + PACK_CODES, C))
        use, abs_inv = certified[some], inv[some].abs()
        d = torch.where(use[:, None], codes[some].double() - mean.double(), 0.0)
        step = d.abs().amax(1) / 127
        q = torch.where(step[:, None] > 0, (d / step[:, None]).round(), 0.0)
        plane[some, :E] = (q + 128).to(torch.uint8)
        size = q.norm(dim=1) * step
        residual = (d - step[:, None] * q).norm(dim=1)
        bounds = torch.stack([residual, size, norm[some] + mean_norm + 2 * size]) * abs_inv * (1 + 1e-9)
        bounds = torch.nextafter(bounds.float(), bounds.new_tensor(torch.inf).float())
        uncertified = bounds.new_tensor([torch.inf, 0.0, 0.0])[:, None]
        terms[0, some] = torch.where(use, (inv[some] * step).float(), 0.0)
        terms[1:, some] = torch.where(use, bounds, uncertified)
    largest = terms.view(4, G, 64).abs().amax(2).T
    terms = torch.cat([terms[:3].view(3, G, 64).transpose(0, 1).reshape(G, 192), largest], 1)
    plane = plane.view(G, 64, width // 4, 4).transpose(1, 2).contiguous()
    return plane, terms, mean
