"""Deletion of latents from a hidden state that is kept. Part of ``cu_fast.ops``.

T tokens, Din and Dout widths of what is read and written, R latents, U masks in a table, at most M latents in one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.ops.checks import (
    check_choice,
    check_device,
    check_k,
    check_matrix,
    check_row,
    check_vector,
    refuse_grad,
    shape,
)
from cu_fast.ops.choice import Impl, choose, plain
from cu_fast.ops.packing import PackedCodes, check_packed

LatentKind = Literal["threshold", "topk"]
TokenScale = Literal["none", "layer_norm", "constant_norm"]
LATENT_KINDS, TOKEN_SCALES = map(get_args, (LatentKind, TokenScale))


class Latents(NamedTuple):
    """Latents of a sparse autoencoder: its own, or those alone that masks change.

    Attributes:
        enc: the encoder's rows [R, Din] with their biases, from ``pack_codes(enc, "dot", bias)``. The plane of its scan is
            read for kind "topk" alone.
        theta: fp32 [R], what a latent's pre-activation has to exceed; at least 0 in effect. Not looked at for "topk".
        dec: fp32 [R, Dout].
        kind: "threshold", or "topk": a latent fires among the k best of all R, where it is positive.
        k: of kind "topk", else None. Of this kind all latents of the autoencoder are given, in its order.
        scale: which factor a token has: "none", "layer_norm" or "constant_norm".
        norm: of scale "constant_norm".
    """

    enc: PackedCodes
    theta: Tensor
    dec: Tensor
    kind: LatentKind = "threshold"
    k: int | None = None
    scale: TokenScale = "none"
    norm: float = 1.0


class LatentMasks(NamedTuple):
    """Which latents each mask changes, and to what.

    Attributes:
        latents: int32 [U, M], per mask rows of :attr:`Latents.enc`, in ascending order of the latents that they are: it is
            the order of the sum. -1 ends a list. M <= 8192.
        change: fp32 [U, M, 3], per latent gain, clamp and idle. One that fires with activation a becomes gain a + clamp:
            gain 0 and clamp 0 take it away. idle, where it is not 0, is what a latent that does not fire becomes in a
            token at which any such latent of the mask fires (the "dense" form of DSG, arXiv 2504.08192).
    """

    latents: Tensor
    change: Tensor


class Deletion(NamedTuple):
    """What :func:`delete_latents` returns.

    Attributes:
        y: [T, Dout], in the residual's dtype.
        hits: int32 [T], how many of the mask's latents fired.
        dose: fp32 [T], ||y - residual|| / ||residual|| before rounding; 0 where nothing fired, NaN where y is.
    """

    y: Tensor
    hits: Tensor
    dose: Tensor


def delete_latents(
    x: Tensor,
    latents: Latents,
    masks: LatentMasks,
    mask_row: Tensor,
    *,
    residual: Tensor | None = None,
    impl: Impl = "auto",
) -> Deletion:
    """Take out of a hidden state what latents wrote into it, and keep the rest (contract, section 9).

    A token of which nothing fires keeps its bits, and so does one without a mask. Only the latents of masks are read,
    but for kind "topk", whose rank needs all: on a CPU only for tokens at which one of the mask's is positive.

    Args:
        x: [T, Din], fp32, bf16 or fp16: what the autoencoder reads.
        latents: the autoencoder's.
        masks: a table of masks.
        mask_row: int32 [T], per token a row of the table; -1 = nothing deleted.
        residual: [T, Dout], what is taken out of: for autoencoders that read and write at different places. None = x.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        Deletion. A token with a mask is NaN where x holds NaN or Inf, where its factor is not finite, where a
        pre-activation of the mask's is NaN, or where the mask lists a row that enc does not have.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: an input requires grad, or the implementation asked for cannot run.
    """
    enc, theta, dec, kind, k, scale, norm = latents
    _check_latents(latents, x, residual)
    _check_masks(masks, x.device)
    T = x.shape[0]
    check_row(mask_row, T, masks.latents.shape[0], x.device)
    refuse_grad("delete_latents", x=x, dec=dec, residual=residual)
    op, which = choose("delete_latents", impl, x.device), TOKEN_SCALES.index(scale)
    rows = enc.digits, enc.factor, enc.bias
    if kind == "threshold":
        return Deletion(*op(x, residual, *rows, theta, dec, which, norm, *masks, mask_row, None, None))
    check_k(k, len(theta))

    def floor_of(x: Tensor) -> tuple[Tensor, Tensor]:
        if scale != "none":
            x = x.float() * plain("token_scales")(x, which, norm)[0][:, None]
        scores, ids, _ = ops.sae_encode(x, enc, activation="none", k=k, impl=impl)
        return scores[:, -1].contiguous(), ids[:, -1].contiguous()

    fixed = *rows, torch.zeros_like(theta), dec, which, norm, *masks
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return Deletion(*op(x, residual, *fixed, mask_row, *floor_of(x)))
    # On a CPU the rank is looked up for those tokens alone at which a latent of the mask is positive.
    found = Deletion(*op(x, residual, *fixed, mask_row, None, None))
    some = found.hits.nonzero()[:, 0]
    if some.shape[0] == T > 0:
        return Deletion(*op(x, residual, *fixed, mask_row, *floor_of(x)))
    if some.shape[0]:
        part, kept = x[some], None if residual is None else residual[some]
        for whole, new in zip(found, op(part, kept, *fixed, mask_row[some], *floor_of(part))):
            whole[some] = new
    return found


def _check_latents(latents: Latents, x: Tensor, residual: Tensor | None) -> None:
    enc, theta, dec, kind, _, scale, norm = latents
    R = check_packed("enc", enc, "x", x)
    if enc.bias is None:
        raise ValueError("enc has no bias; give pack_codes the latents' biases, zeros where they have none")
    check_matrix("dec", dec)
    if dec.shape[0] != R:
        raise ValueError(f"dec has shape {shape(dec)}; it should have {R} rows, one per latent of enc")
    check_matrix("x" if residual is None else "residual", x if residual is None else residual, dec.shape[1], "dec")
    if residual is not None:
        check_device("residual", residual, "x", x)
        if residual.shape[0] != x.shape[0]:
            raise ValueError(f"residual has {residual.shape[0]} rows; it should have {x.shape[0]}, as x has")
    check_vector("theta", theta, R, "a latent each", x.device)
    check_device("dec", dec, "x", x)
    for name, tensor in (("theta", theta), ("dec", dec)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}; it should be float32")
    check_choice("kind", kind, LATENT_KINDS)
    check_choice("scale", scale, TOKEN_SCALES)
    if not 0 < norm < float("inf"):
        raise ValueError(f"norm is {norm!r}; it should be positive and finite")


def _check_masks(masks: LatentMasks, device: torch.device) -> None:
    latents, change = masks
    for name, tensor, dtype in (
        ("masks.latents", latents, torch.int32),
        ("masks.change", change, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; it should be {str(dtype).removeprefix('torch.')}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it should be on {device} like the others")
    if latents.dim() != 2 or latents.shape[1] > reference.MAX_LATENTS:
        raise ValueError(
            f"masks.latents has shape {shape(latents)}; it should be [U, M], M at most {reference.MAX_LATENTS}"
        )
    if shape(change) != [*shape(latents), 3]:
        raise ValueError(f"masks.change has shape {shape(change)}; it should be {[*shape(latents), 3]}")
