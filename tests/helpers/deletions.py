"""Arguments of delete_latents, made to hurt: lists that end early, with junk behind; ties with the floor; idle values."""

from __future__ import annotations

from typing import Any

import hurtful
import torch
from torch import Tensor

from cu_fast.kernels import reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def lists(U: int, M: int, R: int, g: torch.Generator) -> Tensor:
    """Per mask ascending latents, then -1, then what must not be looked at; the first list is full where R allows."""
    table = torch.full((U, M), -1, dtype=torch.int32)
    junk = torch.tensor([R, 0, INT_MAX, INT_MIN, R - 1], dtype=torch.int32)
    for u in range(U):
        most = min(M, R)
        count = most if u == 0 else int(torch.randint(0, most + 1, (1,), generator=g))
        table[u, :count] = torch.randperm(R, generator=g)[:count].sort().values.int()
        behind = M - count - 1
        if behind > 0:
            table[u, count + 1 :] = junk.repeat(behind // len(junk) + 1)[:behind]
            table[u, count] = -1 if u % 2 else -7  # any number below 0 ends a list
    return table


def last_kept(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Score and id of the last of the k best per token, as sae_encode with k finds them."""
    order = pre.nan_to_num(-torch.inf).sort(dim=1, descending=True, stable=True).indices[:, k - 1 : k]
    return pre.gather(1, order)[:, 0].contiguous(), order[:, 0].int().contiguous()


def deletion(
    T: int, Din: int, Dout: int, R: int, U: int = 3, M: int = 5, *, scale: int = 0, kind: str = "gaussian",
    dtype: torch.dtype = torch.float32, residual: torch.dtype | None = torch.float32, latent_kind: str = "gaussian",
    idle: bool = True, floor: bool = False, faults: bool = False, infinite: bool = False,
    layout: str = "plain", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The operator's arguments by name. residual: its dtype; None = x is what is deleted from."""
    g = torch.Generator().manual_seed(seed)
    x = hurtful.matrix(max(T, 1), Din, kind, dtype, seed)[:T]
    enc = hurtful.matrix(R, Din, latent_kind, torch.float32, seed + 1)
    dec = hurtful.matrix(R, Din if residual is None else Dout, "gaussian", torch.float32, seed + 2)
    bias, theta = torch.randn(R, generator=g), torch.randn(R, generator=g) - 1  # what is below 0 counts as 0
    change = torch.zeros(U, M, 3)
    change[:, :, 0] = torch.randint(0, 3, (U, M), generator=g) * 0.5  # 1 = kept
    change[:, :, 1] = torch.randint(-1, 2, (U, M), generator=g) * 1.7
    if idle:
        change[:, :, 2] = torch.randint(0, 2, (U, M), generator=g) * 0.9
    if infinite:
        change[:, ::2, 1] = torch.inf  # what is added, 0 * Inf beyond the width would be NaN
    row = torch.randint(-1, max(U, 0), (T,), generator=g, dtype=torch.int32)
    if U > 0:
        row[::3] = 0  # the full list
    table = lists(U, M, R, g)
    given = dict(
        x=hurtful.strided(x, layout), enc=hurtful.strided(enc, layout), bias=bias, theta=theta,
        dec=hurtful.strided(dec, layout), scale=scale, norm=7.3, mask_latents=table, mask_change=change, mask_row=row,
    )  # fmt: skip
    if residual is not None:
        other = hurtful.matrix(max(T, 1), Dout, kind, residual, seed + 3)[:T]
        other[other == 0] = -0.0  # 0 + -0.0 would be 0.0: bits are kept, not added to
        given["residual"] = hurtful.strided(other, layout)
    if floor and T:
        scaled = x.float() * reference.token_scales(x, scale, 7.3)[0][:, None]
        digits, step, _ = reference.pack_digits(enc)
        pre = reference.sae_encode(scaled, digits, step, bias, None, False)
        given["floor_scores"], given["floor_ids"] = last_kept(pre, max(1, R // 3))
    if faults:
        wrong = torch.tensor([U, -2, INT_MIN, INT_MAX], dtype=torch.int32)
        row[: len(wrong)] = wrong[: len(row)]
        if U > 1 and M > 0:
            table[1, 0] = R
        bias[R // 2] = torch.nan
        enc[R // 3, 0] = torch.inf
    return given


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Whether y, hits and dose agree, NaN with NaN."""
    return all(map(hurtful.equal, got, want))


def keeps_bits(y: Tensor, hits: Tensor, dose: Tensor, given: dict[str, Any]) -> bool:
    """Whether a token of which nothing fired, and that is not NaN, has the bits of its residual."""
    kept = given["residual"] if given.get("residual") is not None else given["x"]
    integers = torch.int32 if kept.dtype == torch.float32 else torch.int16
    some = (hits == 0) & ~dose.isnan()
    return torch.equal(y[some].contiguous().view(integers), kept[some].contiguous().view(integers))
