"""Deletion from a hidden state that is kept: section 9 of the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast.kernels.reference.codebook import is_missing
from cu_fast.kernels.reference.fixed import fix_rows, integer_dot, integers_of, scores_of
from cu_fast.kernels.reference.scales import root, sum16, token_scales

MAX_LATENTS = 8192  # that one mask changes: a GPU's kernel keeps a number for each in shared memory
BLOCK_T = 64  # tokens per tile
BLOCK_M = 16  # latents per tile: bounds the memory of a tile at BLOCK_T * BLOCK_M encoder rows


def delete_latents(
    x: Tensor,
    residual: Tensor | None,
    enc_digits: Tensor,
    enc_factor: Tensor,
    bias: Tensor,
    theta: Tensor,
    dec: Tensor,
    scale: int,
    norm: float,
    mask_latents: Tensor,
    mask_change: Tensor,
    mask_row: Tensor,
    floor_scores: Tensor | None,
    floor_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = residual + sigma sum_i (new_i - a_i) dec_i over the latents that a token's mask changes.

        pre_i = enc_i . (rho x) + bias_i       rho and sigma: token_scales(x)
        i fires: pre_i > max(theta_i, 0), and (pre_i, i) is not below the token's floor
        new_i = gain_i a_i + clamp_i           a_i = pre_i, where it fires
        new_i = idle_i                         a_i = 0, elsewhere, if a latent whose idle is not 0 fires

    rho x is rounded to fp32; then the score, bias included. The sum runs in the order of the mask's list, in
    fp32, multiply, then add; then sigma; then the residual; one rounding to its dtype. A token of which nothing fires keeps
    the bits of its residual.

    A token is NaN where it has a mask and its x, its sigma or a pre is not a number that can be judged (x with NaN or Inf,
    sigma not finite, pre NaN, as it is where rho x overflows), where its mask row does not exist, or where its mask lists a
    latent that does not.

    Args:
        x: [T, Din].
        residual: [T, Dout], or None = x, and Dout is Din.
        enc_digits: int8 [R, 3, W], of the encoder's rows (:func:`pack_digits`), R >= 1.
        enc_factor: fp32 [R].
        bias: fp32 [R].
        theta: fp32 [R].
        dec: fp32 [R, Dout].
        scale: 0, 1 or 2: see token_scales.
        norm: of scale 2.
        mask_latents: int32 [U, M], per mask rows of enc, in the order of their sum; -1 ends the list. M <= MAX_LATENTS.
        mask_change: fp32 [U, M, 3], per latent gain, clamp and idle.
        mask_row: int32 [T], -1 = nothing deleted.
        floor_scores: fp32 [T], the score of the last latent that a token keeps, or None = there is no floor.
        floor_ids: int32 [T], its row of enc: at equal scores smaller rows fire. None where floor_scores is.

    Returns:
        y [T, Dout] in the residual's dtype; hits int32 [T], how many of the mask's latents fired; dose fp32 [T],
        ||y - residual|| / ||residual|| before rounding: roots of sum16 of squares, 0 where nothing fired. Of a NaN token
        hits is 0 and dose NaN.
    """
    residual = x if residual is None else residual
    tiles = []
    for t in range(0, max(x.shape[0], 1), BLOCK_T):
        some = slice(t, t + BLOCK_T)
        floor = None if floor_scores is None else (floor_scores[some, None], floor_ids[some, None])
        tiles.append(
            _delete(x[some], residual[some], enc_digits, enc_factor, bias, theta, dec, scale, norm, mask_latents, mask_change,
                    mask_row[some], floor)
        )  # fmt: skip
    y, hits, dose = (torch.cat(parts) for parts in zip(*tiles))
    return y, hits, dose


def _delete(
    x: Tensor,
    residual: Tensor,
    enc_digits: Tensor,
    enc_factor: Tensor,
    bias: Tensor,
    theta: Tensor,
    dec: Tensor,
    scale: int,
    norm: float,
    mask_latents: Tensor,
    mask_change: Tensor,
    mask_row: Tensor,
    floor: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile of tokens; floor is (scores [T, 1], ids [T, 1])."""
    T, U, R = x.shape[0], mask_latents.shape[0], enc_digits.shape[0]
    has_mask = mask_row != -1
    known = (mask_row >= 0) & (mask_row < U)
    rho, sigma = token_scales(x, scale, norm)
    x = x.float()
    faulty = has_mask & ~(known & torch.isfinite(x).all(1) & torch.isfinite(sigma))
    row = torch.where(known, mask_row, 0).long()
    if U == 0:
        mask_latents, mask_change = mask_latents.new_full((1, 0), -1), mask_change.new_zeros(1, 0, 3)
    latents, change = torch.where(known[:, None], mask_latents[row], -1), mask_change[row]
    listed = (latents >= 0).long().cumprod(1).bool()  # what follows the first -1 is not looked at
    faulty |= (listed & (latents >= R)).any(1)
    ids = torch.where(listed & ~faulty[:, None], latents, 0).long().clamp(max=R - 1)
    x = torch.where(faulty[:, None], 0.0, x * rho[:, None])

    q, unit = fix_rows(x)
    pre = x.new_zeros(T, latents.shape[1])
    for m in range(0, latents.shape[1], BLOCK_M):
        some = ids[:, m : m + BLOCK_M]
        enc = integers_of(enc_digits[some.flatten()], x.shape[1]).unflatten(0, some.shape)
        pre[:, m : m + BLOCK_M] = scores_of(integer_dot(q, enc), unit, enc_factor[some], bias[some])
    faulty |= (listed & pre.isnan()).any(1)
    fires = (pre > theta[ids]) & (pre > 0)
    if floor is not None:
        fires &= (pre > floor[0]) | ((pre == floor[0]) & (ids <= floor[1]))
    fires &= listed & ~faulty[:, None]
    gain, clamp, idle = change.unbind(2)
    hot = (fires & (idle != 0)).any(1, keepdim=True)
    changed = fires | (hot & listed & (idle != 0))
    change = torch.where(fires, (gain * pre + clamp) - pre, idle)

    delta = x.new_zeros(T, residual.shape[1])
    for m in range(latents.shape[1]):
        delta = torch.where(changed[:, m, None], delta + change[:, m, None] * dec[ids[:, m]], delta)
    delta = sigma[:, None] * delta
    hits = fires.sum(1, dtype=torch.int32)
    kept = residual.float()
    dose = root(sum16(delta * delta)) / root(sum16(kept * kept))
    y = torch.where((hits > 0)[:, None], (kept + delta).to(residual.dtype), residual)
    y = torch.where(faulty[:, None], torch.nan, y).to(residual.dtype)
    return y, hits, torch.where(faulty, torch.nan, torch.where(hits > 0, dose, 0.0))


def code_changes(
    ids: Tensor,
    scores: Tensor,
    mask_latents: Tensor,
    mask_change: Tensor,
    mask_row: Tensor,
    num_codes: int,
    score_weights: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """What masks of codes add to the weight of each code that a token keeps.

    Args:
        ids: int32 [T, k], -1 = none.
        scores: fp32 [T, k].
        mask_latents: int32 [U, M], codes in ascending order; -1 ends a list.
        mask_change: fp32 [U, M, 3], gain, clamp and idle; idle is not looked at.
        mask_row: int32 [T], -1 = nothing deleted.
        num_codes: C.
        score_weights: a code's weight is relu(score); else 1.
        mean: a weight is divided by k.

    Returns:
        fp32 [T, k], 0 where nothing changes, NaN in a token whose row does not exist, or whose scores are NaN under a mask;
        bool [T, k], which codes are changed.
    """
    row = mask_row.long().clamp(0, len(mask_latents) - 1)
    listed = mask_latents[row]
    listed = torch.where(listed < 0, num_codes, listed).contiguous()  # the end of a list sorts behind every code
    place = torch.searchsorted(listed, ids.contiguous()).clamp(max=listed.shape[1] - 1)
    masked = (mask_row >= 0)[:, None]
    faulty = is_missing(mask_latents, mask_row)[:, None] | (masked & scores.isnan())
    deleted = (listed.gather(1, place) == ids) & (ids >= 0) & masked
    weight = torch.relu(scores) if score_weights else torch.ones_like(scores)
    if mean:
        weight = weight / ids.shape[1]
    gain, clamp, _ = mask_change[row].gather(1, place[..., None].expand(-1, -1, 3)).unbind(2)
    change = torch.where(deleted, (gain * weight + clamp) - weight, 0.0)
    return torch.where(faulty, torch.nan, change), deleted
