"""Raw operators, called by the names of their arguments. What is not given is None, or False.

    call("codebook_quantize", z=z, codes=codes, k=8, mask=masks, scan=plane)     the native library
    call("codebook_quantize", on=reference, z=z, codes=codes, k=8)               the reference
    call("masked_decode", on=torch.ops.cu_fast_triton, ids=ids, table=table)     any other that has the operators

mask is (mask_table, mask_row) or None, scan (scan_plane, scan_terms, scan_mean) or None. Rows of weights are given as they
are: codes, W_enc and enc stand for their digits and, unless it is given too, their factor, the step.
"""

from __future__ import annotations

import inspect
from typing import Any

import hurtful
import torch
from torch import Tensor

from cu_fast.kernels import native, reference, triton

assert native.LIBRARY and triton.HOME  # importing them registers torch.ops.cu_fast and torch.ops.cu_fast_triton
GROUPS = {"mask": ("mask_table", "mask_row"), "scan": ("scan_plane", "scan_terms", "scan_mean")}


WEIGHTS = {"codes": "", "W_enc": "W_", "enc": "enc_"}


def spread(**given: Any) -> dict[str, Any]:
    """The same arguments, with those of a group, and digits and factor of weights, under their own names."""
    for group, members in GROUPS.items():
        if (values := given.pop(group, None)) is not None:
            given.update(zip(members, values, strict=True))
    for weights, prefix in WEIGHTS.items():
        if (values := given.pop(weights, None)) is not None:
            digits, step, _ = reference.pack_digits(values)
            given.setdefault(f"{prefix}digits", digits)
            if given.get(f"{prefix}factor") is None:
                given[f"{prefix}factor"] = step
    return given


def cosine(codes: Tensor) -> Tensor:
    """The factors of codes under similarity "cosine"."""
    return reference.cosine_factor(*reference.pack_digits(codes)[1:])


def arguments(name: str, **given: Any) -> dict[str, Any]:
    """All arguments of an operator, in the order of its schema."""
    if name != "pack_digits":
        given = spread(**given)
    parameters = inspect.signature(getattr(reference, name)).parameters
    absent = {"bool": False, "Tensor | None": None}
    made = {key: given.pop(key, absent.get(p.annotation, inspect.Parameter.empty)) for key, p in parameters.items()}
    assert not given, f"{name} has no {', '.join(given)}"
    needed = [key for key, value in made.items() if value is inspect.Parameter.empty]
    assert not needed, f"{name} needs {', '.join(needed)}"
    return made


def call(name: str, on: Any = torch.ops.cu_fast, **given: Any) -> Any:
    return getattr(on, name)(**arguments(name, **given))


def plane_of(codes: Tensor, factor: Tensor | None = None, on: Any = torch.ops.cu_fast) -> tuple[Tensor, ...]:
    """What the group scan takes, of these codes; factor: None = their steps."""
    given = {} if factor is None else {"factor": factor}
    return tuple(call("pack_scan", on=on, codes=codes, E=codes.shape[1], **given))


def latent_masks(U: int, M: int, R: int, seed: int) -> tuple[Tensor, Tensor]:
    """mask_latents and mask_change of masks that list up to M of R latents; one in three has an idle that is not 0."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.full((U, M), -1, dtype=torch.int32)
    for row in latents:
        n = min(int(torch.randint(M // 2, M + 1, (1,), generator=g)), R)
        row[:n] = torch.randperm(R, generator=g)[:n].sort().values
    change = torch.randn(U, M, 3, generator=g)
    change[..., 2] *= (torch.arange(U) % 3 == 2)[:, None]
    return latents, change


def every_operator(
    T: int, E: int, C: int, k: int, *, kind: str = "gaussian", dtype: torch.dtype = torch.float32, layout: str = "plain",
    mask: bool = True, scan: bool = True, seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The arguments of each operator, for one set of sizes. scan: with planes; mask: with all else that is optional."""
    z = hurtful.strided(hurtful.matrix(T, E, kind, dtype, seed), layout)
    codes = hurtful.strided(hurtful.matrix(C, E, kind, dtype, seed + 1), layout)
    bias = pre = W_enc = masks = receipt = None
    if mask:
        bias = hurtful.matrix(1, C, "gaussian", torch.float32, seed + 2)[0]
        pre = hurtful.matrix(1, E, "gaussian", dtype, seed + 3)[0]
        masks = hurtful.masks(T, C, 0.4, seed + 4)
        W_enc = hurtful.matrix(E, E, "gaussian", dtype, seed + 5)
        receipt = torch.zeros(2, dtype=torch.int64)
    factor = cosine(codes)
    scaled, plain = (plane_of(codes, factor), plane_of(codes)) if scan else (None, None)
    scores, ids, _ = call("codebook_quantize", on=reference, z=z, codes=codes, k=k)
    enc, (mask_latents, mask_change) = (
        hurtful.matrix(C, E, kind, torch.float32, seed + 6),
        latent_masks(3, C // 2, C, seed),
    )
    theta, floor_scores = hurtful.normal(C, seed=seed + 7), hurtful.normal(T, seed=seed + 8)
    given = {
        "codebook_quantize": dict(
            z=z, codes=codes, factor=factor, bias=bias, k=k, mask=masks, return_hits=mask, scan=scaled
        ),
        "sae_encode": dict(x=z, W_enc=codes, b_enc=bias, b_pre=pre, relu=mask),
        "sae_encode_topk": dict(x=z, W_enc=codes, b_enc=bias, b_pre=pre, k=k, mask=masks, relu=mask, scan=plain),
        "masked_decode": dict(
            ids=ids, weights=scores if mask else None, table=codes, bias=pre, residual=z if mask else None, mask=masks,
            mean=mask,
        ),
        "codebook_bottleneck": dict(
            x=z, W_enc=W_enc, b_enc=pre, b_pre=pre, relu=mask, codes=codes, factor=factor, bias=bias, k=k,
            mask=masks, reselect=scan, scan=scaled, table=codes, b_dec=pre, score_weights=mask, mean=not mask,
            receipt=receipt,
        ),
        "delete_latents": dict(
            x=z, residual=hurtful.matrix(T, E, kind, dtype, seed + 9) if mask else None,
            enc=hurtful.strided(enc, layout), bias=hurtful.normal(C, seed=seed + 10), theta=theta, dec=enc.flip(0),
            scale=seed % 3, norm=3.0, mask_latents=mask_latents, mask_change=mask_change,
            mask_row=(torch.arange(T) % 4 - 1).int().flip(0), floor_scores=floor_scores if mask else None,
            floor_ids=torch.arange(T, dtype=torch.int32) if mask else None,
        ),
        "pack_digits": dict(codes=codes),
        "pack_scan": dict(codes=codes, E=E, **({"factor": factor} if mask else {})),
    }  # fmt: skip
    return {name: arguments(name, **one) for name, one in given.items()}
