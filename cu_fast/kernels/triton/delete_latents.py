"""Deletion from a hidden state that is kept, with Triton: y = residual + sigma sum_i change_i dec_i.

    x [T, Din], residual [T, Dout]  rows contiguous, of any stride, fp32, bf16 or fp16;  dec [R, Dout] fp32
    enc_digits [R, 3, W] int8, enc_factor [R] fp32
    mask_latents [U, M] int32, mask_change [U, M, 3] fp32, mask_row [T] int32;  y [T, Dout] contiguous, residual's dtype

1. scale_tokens    A program takes a token: rho and sigma, sums of 16 partials and a tree (shared.py), and rho x in fixed
                   point (fixed.py).
2. score_latents   A program takes a token, and tiles of its mask's latents: which fire, and by how much each changes.
3. add_latents     A program takes a token and BLOCK_D columns, and adds the rows of dec in the order of the mask's list.
                   Where nothing fired it copies bits: the residual is read, and y written, as integers.
4. dose_latents    A program takes a token: the two norms of its dose.

Between them, per token: rho x, 3 W bytes; the ids and changes of its mask's latents, M each; the sum, Dout in fp32. Tokens
are taken as many at a time as Tuning.keys has room for. An id is kept as -2 - id if the latent does not fire and has an
idle value: only the whole mask tells whether that is added.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton.fixed import Rows, fix_row, integer_dots, scores_of
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start, vector
from cu_fast.kernels.triton.shared import dots16, is_finite, rounded_bf16, tree_sum, widened

LAYER_NORM_EPS = tl.constexpr(reference.LAYER_NORM_EPS)
FAULTY = tl.constexpr(-1)  # in `state`; else whether an idle value is added: 1 or 0
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@triton.jit
def sum16(row, E, mean, SQUARED: tl.constexpr, UNROLL: tl.constexpr):
    """[1]: sum16(x), or sum16((x - mean)^2)."""
    partial = tl.zeros([1, 16], tl.float32)
    for first in range(0, E, 16 * UNROLL):
        for step in tl.static_range(UNROLL):
            e = first + step * 16 + tl.arange(0, 16)[None, :]
            entry = widened(row + e, e < E)
            if SQUARED:
                entry = tl.where(e < E, entry - mean[:, None], 0.0)
                entry = entry * entry
            partial += entry
    return tree_sum(partial, 1)


@triton.jit
def token_scales(row, E, norm, SCALE: tl.constexpr, UNROLL: tl.constexpr):
    """rho and sigma, [1]."""
    zero = tl.zeros([1], tl.float32)
    rho, sigma = zero + 1.0, zero + 1.0
    if SCALE == 1:
        mean = tl.div_rn(sum16(row, E, zero, False, UNROLL), zero + E)
        sigma = tl.sqrt_rn(tl.div_rn(sum16(row, E, mean, True, UNROLL), zero + (E - 1)))
        rho = tl.div_rn(rho, sigma + LAYER_NORM_EPS)
    if SCALE == 2:
        length = tl.sqrt_rn(sum16(row, E, zero, True, UNROLL))
        rho = tl.where(length == 0, 0.0, tl.div_rn(zero + norm, length))
        sigma = tl.div_rn(length, zero + norm)
    return rho, sigma


@triton.jit(do_not_specialize=["U"])
def scale_tokens(
    x, x_stride, mask_row, row_digits, units, sigmas, norm, E, W, U,
    SCALE: tl.constexpr, BLOCK_E: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(mask_row + t)
    exists = (row >= 0) & (row < U)
    # Of a token without a mask nothing is read.
    width, digit_width = tl.where(exists, E, 0), tl.where(exists, W, 0)
    x_row, one = x + t * x_stride, tl.arange(0, 1)
    rho, sigma = token_scales(x_row, width, norm, SCALE, UNROLL)
    unit = fix_row(x_row, None, rho if SCALE != 0 else None, row_digits + t * 3 * W, width, digit_width, BLOCK_E)
    if SCALE == 0:  # other scales of a row with NaN or Inf are not finite by themselves
        sigma = tl.where(unit != unit, float("nan"), sigma)
    tl.store(sigmas + t + one, sigma)
    tl.store(units + t, unit)


@triton.jit(do_not_specialize=["R", "U", "M"])
def score_latents(
    row_digits, units, sigmas, enc_digits, enc_factor, bias, theta, mask_latents, mask_change, mask_row, floor_scores,
    floor_ids, ids, changes, state, hits, R, W, U, M, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(mask_row + t)
    exists = (row >= 0) & (row < U)
    latents = tl.where(exists, row, 0).to(tl.int64) * M
    count = tl.where(exists, M, 0)
    one = tl.arange(0, 1)
    at_token = tl.program_id(0) + one
    unit = tl.load(units + at_token)
    faulty = tl.where((row == -1) | (exists & is_finite(tl.load(sigmas + at_token))), 0, 1)
    fired = tl.zeros([1], tl.int32)
    idles = tl.zeros([1], tl.int32)
    for first in range(0, count, BLOCK_C):
        i = first + tl.arange(0, BLOCK_C)
        id = tl.load(mask_latents + latents + i, mask=i < count, other=-1)
        count = tl.minimum(count, tl.min(tl.where(id < 0, i, M), 0))  # what follows the first -1 is not looked at
        listed = i < count
        known = listed & (id < R)
        width = tl.where(first < count, W, 0)
        total = integer_dots(row_digits, at_token, at_token >= 0, enc_digits, id, known, W, width, 1, BLOCK_C, BLOCK_E)
        pre = tl.reshape(scores_of(total, unit, enc_factor, bias, id, known), (BLOCK_C,))
        faulty = faulty | tl.max(tl.where(listed & ((known == 0) | (pre != pre)), 1, 0), 0)
        fires = known & (pre > tl.load(theta + id, mask=known, other=0.0)) & (pre > 0)
        if floor_scores is not None:
            floor = tl.load(floor_scores + t)
            fires = fires & ((pre > floor) | ((pre == floor) & (id <= tl.load(floor_ids + t))))
        change = mask_change + (latents + i) * 3
        gain, clamp = tl.load(change, mask=listed, other=0.0), tl.load(change + 1, mask=listed, other=0.0)
        idle = tl.load(change + 2, mask=listed, other=0.0)
        has_idle = listed & (idle != 0)
        fired += tl.sum(tl.where(fires, 1, 0), 0)
        idles |= tl.max(tl.where(fires & has_idle, 1, 0), 0)
        at = t * M + i
        tl.store(ids + at, tl.where(fires, id, tl.where(has_idle, -2 - id, -1)), mask=i < M)
        tl.store(changes + at, tl.where(fires, (gain * pre + clamp) - pre, idle), mask=i < M)
    tl.store(state + t + one, tl.where(faulty != 0, FAULTY, idles))
    tl.store(hits + t + one, tl.where(faulty != 0, 0, fired))


@triton.jit(do_not_specialize=["M"])
def add_latents(
    ids, changes, sigmas, state, hits, dec, dec_stride, residual, residual_stride, sums_out, y, D, M,
    BF16: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // column_tiles).to(tl.int64)
    d = tl.program_id(0) % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    has_d = d < D
    idles = tl.load(state + t)
    fired = tl.load(hits + t) > 0
    sums = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, tl.where(fired, M, 0), UNROLL):
        for step in tl.static_range(UNROLL):
            at = t * M + first + step
            id = tl.load(ids + at, mask=first + step < M, other=-1)
            change = tl.load(changes + at, mask=first + step < M, other=0.0)
            id = tl.where((idles == 1) & (id < -1), -2 - id, id)
            inside = d < tl.where(id >= 0, D, 0)
            added = sums + change * tl.load(dec + id.to(tl.int64) * dec_stride + d, mask=inside, other=0.0)
            sums = tl.where(id >= 0, added, sums)
    sums = tl.load(sigmas + t) * sums
    tl.store(sums_out + t * D + d, sums, mask=d < tl.where(fired, D, 0))
    bits = tl.load(residual + t * residual_stride + d, mask=has_d, other=0)
    if BF16:
        changed = rounded_bf16((bits.to(tl.int32) << 16).to(tl.float32, bitcast=True) + sums)
        bits = tl.where(idles == FAULTY, 0x7FC0, tl.where(fired, changed, bits)).to(tl.int16)
    elif y.dtype.element_ty == tl.int16:
        changed = (bits.to(tl.float16, bitcast=True).to(tl.float32) + sums).to(tl.float16).to(tl.int16, bitcast=True)
        bits = tl.where(idles == FAULTY, 0x7E00, tl.where(fired, changed, bits)).to(tl.int16)
    else:
        changed = (bits.to(tl.float32, bitcast=True) + sums).to(tl.int32, bitcast=True)
        bits = tl.where(idles == FAULTY, 0x7FC00000, tl.where(fired, changed, bits))
    tl.store(y + t * D + d, bits, mask=has_d)


@triton.jit
def dose_latents(sums, residual, residual_stride, state, hits, dose, D, UNROLL: tl.constexpr):
    t = tl.program_id(0) + tl.arange(0, 1)
    fired = tl.load(hits + t) > 0
    width = tl.where(tl.load(hits + tl.program_id(0)) > 0, D, 0)
    token = tl.program_id(0).to(tl.int64)
    added = dots16(sums + token * D, sums, D, t, fired, width, 1, UNROLL)
    kept = dots16(
        residual + token * residual_stride, residual, residual_stride, t, fired, width, 1, UNROLL
    )  # fmt: skip
    share = tl.div_rn(tl.sqrt_rn(added), tl.sqrt_rn(kept))
    share = tl.where(tl.load(state + t) == FAULTY, float("nan"), tl.where(fired, share, 0.0))
    tl.store(dose + t, share)


def delete_latents(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.delete_latents``: y [T, Dout] in residual's dtype, hits int32 [T], dose fp32 [T]."""
    x, residual = rows_contiguous(a.x), rows_contiguous(a.x if a.residual is None else a.residual)
    (T, Din), Dout, (U, M), R = x.shape, residual.shape[1], a.mask_latents.shape, a.enc_digits.shape[0]
    y = residual.new_empty((T, Dout))
    hits, dose = x.new_empty((T,), dtype=torch.int32), x.new_empty((T,), dtype=torch.float32)
    if T == 0:
        return y, hits, dose
    integers = INTEGERS[residual.dtype]
    enc_digits, dec = a.enc_digits.contiguous(), rows_contiguous(a.dec)
    W = enc_digits.shape[2]
    mask = dict(mask_latents=a.mask_latents.contiguous(), mask_change=a.mask_change.contiguous())
    mask_row, floor_scores, floor_ids = (
        None if v is None else v.contiguous() for v in (a.mask_row, a.floor_scores, a.floor_ids)
    )
    with launch.on_device(x):
        arch = launch.arch_of(x.device)
        chunk = min(T, max(launch.tuning_of(arch).keys // max(2 * M + Dout + W, 1), 1))
        ids, changes = (x.new_empty((chunk, M), dtype=dtype) for dtype in (torch.int32, torch.float32))
        sums, sigmas = (x.new_empty(shape, dtype=torch.float32) for shape in ((chunk, Dout), (chunk,)))
        rows = Rows(chunk, W, x.device)
        state = x.new_empty((chunk,), dtype=torch.int32)
        widths = {"scale_tokens": Din, "score_latents": Din, "add_latents": Dout, "dose_latents": Dout}
        tiles = {name: choose(name, arch, T, width, R, M) for name, width in widths.items()}
        column_tiles = -(-Dout // tiles["add_latents"].block("D"))
        for t in range(0, T, chunk):
            tokens = slice(t, t + chunk)
            count = len(x[tokens])
            fixed = dict(row_digits=rows.digits, units=rows.units, sigmas=sigmas, mask_row=mask_row[tokens], W=W, U=U)
            shared = dict(state=state, hits=hits[tokens])
            start(
                scale_tokens, count, tiles["scale_tokens"], x=x[tokens], x_stride=x.stride(0), **fixed, norm=a.norm, E=Din,
                SCALE=a.scale,
            )  # fmt: skip
            start(
                score_latents, count, tiles["score_latents"], **fixed, enc_digits=enc_digits,
                enc_factor=vector(a.enc_factor), bias=vector(a.bias), theta=vector(a.theta), **mask,
                floor_scores=None if floor_scores is None else floor_scores[tokens],
                floor_ids=None if floor_ids is None else floor_ids[tokens], ids=ids, changes=changes, **shared, R=R, M=M,
            )  # fmt: skip
            if Dout > 0:
                start(
                    add_latents, count * column_tiles, tiles["add_latents"], ids=ids, changes=changes, sigmas=sigmas,
                    dec=dec, dec_stride=dec.stride(0), residual=residual[tokens].view(integers),
                    residual_stride=residual.stride(0), sums_out=sums, y=y[tokens].view(integers), D=Dout, M=M,
                    BF16=residual.dtype == torch.bfloat16, **shared,
                )  # fmt: skip
            start(
                dose_latents, count, tiles["dose_latents"], sums=sums, residual=residual[tokens],
                residual_stride=residual.stride(0), dose=dose[tokens], D=Dout, **shared,
            )  # fmt: skip
    return y, hits, dose
