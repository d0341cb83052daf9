"""Encode, selection and decode: section 1 of the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast.kernels.reference.fixed import fix_rows, integer_dot, integers_of, scores_of

BLOCK_C = 1024  # codes per tile
NO_SCAN = (None, None, None)
BLOCK_T = 64  # tokens per tile


def is_deleted(ids: Tensor, mask_table: Tensor, mask_row: Tensor) -> Tensor:
    """Whether each code is deleted in its token's row of the table.

    Args:
        ids: int [T, n], or [1, n] = the same for every token; -1 is never deleted.
        mask_table: int32 [U, ceil(C/32)].
        mask_row: int32 [T], -1 = nothing deleted.

    Returns:
        bool [T, n].
    """
    if mask_table.shape[0] == 0:
        return torch.zeros(mask_row.shape[0], ids.shape[1], dtype=torch.bool, device=ids.device)
    row = mask_row.long().clamp(0, len(mask_table) - 1)[:, None]
    code = ids.long().clamp(min=0)
    bit = (mask_table[row, code >> 5] >> (code & 31).int()) & 1
    return (bit != 0) & (mask_row >= 0)[:, None] & (ids >= 0)


def is_missing(mask_table: Tensor, mask_row: Tensor) -> Tensor:
    """bool [T]: the table [U, ...] has no such row, so that what is deleted is not known; the token becomes NaN."""
    return (mask_row < -1) | (mask_row >= len(mask_table))


def _keep_best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # Among equal scores the columns are in order of id, so a stable sort gives the contract's total order.
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def codebook_quantize(
    z: Tensor,
    digits: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    k: int,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    return_hits: bool,
    scan_plane: Tensor | None,
    scan_terms: Tensor | None,
    scan_mean: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best codes of every row of z: score descending, then id ascending.

    Args:
        z: [T, E].
        digits: int8 [C, 3, W], of the codes (:func:`pack_digits`).
        factor: fp32 [C].
        bias: fp32 [C], or None = 0.
        k: codes kept per token.
        mask_table: int32 [U, ceil(C/32)], or None = nothing deleted.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        return_hits: count the deleted codes that would have been among a token's k.
        scan_plane: ignored here, as the next two: the three tensors of :func:`pack_scan`, or None.
        scan_terms: ignored here.
        scan_mean: ignored here.

    Returns:
        scores fp32 [T, k], ids int32 [T, k] and hits int32 [T] ([0] unless return_hits). A slot that no code can fill
        holds id -1 and score 0; a row of z with NaN or Inf holds id -1 and score NaN.
    """

    def quantize(z: Tensor, mask_row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, unit = fix_rows(z)
        finite_row = ~unit.isnan()[:, None]
        if mask_table is not None:
            finite_row = finite_row & ~is_missing(mask_table, mask_row)[:, None]
        T, C = z.shape[0], digits.shape[0]
        empty = -torch.inf  # a code's score is finite, so -inf marks an empty slot
        best = unit.new_full((T, k), empty), torch.full((T, k), -1, dtype=torch.int32, device=z.device)
        best_unmasked = best

        for c in range(0, C, BLOCK_C):
            some = slice(c, c + BLOCK_C)
            total = integer_dot(q, integers_of(digits[some], z.shape[1]))
            score = scores_of(total, unit, factor[some], None if bias is None else bias[some])
            score = torch.where(torch.isfinite(score), score, empty)
            ids = torch.arange(c, c + score.shape[1], dtype=torch.int32, device=z.device).expand(T, -1)
            if mask_table is not None:
                deleted = is_deleted(ids, mask_table, mask_row)
                if return_hits:
                    best_unmasked = _keep_best(
                        torch.cat([best_unmasked[0], score], 1), torch.cat([best_unmasked[1], ids], 1), k
                    )
                score = torch.where(deleted, empty, score)
            best = _keep_best(torch.cat([best[0], score], 1), torch.cat([best[1], ids], 1), k)

        scores, ids = best
        taken = (scores > empty) & finite_row
        ids = torch.where(taken, ids, -1)
        scores = torch.where(taken, scores, torch.where(finite_row, 0.0, torch.nan))
        hits = torch.zeros(T, dtype=torch.int32, device=z.device)
        if return_hits and mask_table is not None:
            score, code = best_unmasked
            hit = is_deleted(code, mask_table, mask_row) & (score > empty) & finite_row
            hits = hit.sum(1, dtype=torch.int32)
        return scores, ids, hits

    tiles = [
        quantize(z[t : t + BLOCK_T], None if mask_row is None else mask_row[t : t + BLOCK_T])
        for t in range(0, max(z.shape[0], 1), BLOCK_T)
    ]
    scores, ids, hits = (torch.cat(parts) for parts in zip(*tiles))
    return scores, ids, hits if return_hits else hits[:0]


def sae_encode(
    x: Tensor, W_digits: Tensor, W_factor: Tensor, b_enc: Tensor | None, b_pre: Tensor | None, relu: bool
) -> Tensor:
    """z = act((x - b_pre) W_enc^T + b_enc), every entry a score of W_enc's rows.

    Args:
        x: [T, D].
        W_digits: int8 [E, 3, W], of the rows of W_enc (:func:`pack_digits`).
        W_factor: fp32 [E].
        b_enc: [E], or None = 0.
        b_pre: [D], or None = 0.
        relu: act is relu; else the identity.

    Returns:
        fp32 [T, E]; a row of x - b_pre with NaN or Inf is NaN.
    """
    x = x.float() if b_pre is None else x.float() - b_pre.float()
    q, unit = fix_rows(x)
    z = unit.new_empty(x.shape[0], W_digits.shape[0])
    for e in range(0, W_digits.shape[0], BLOCK_C):
        some = slice(e, e + BLOCK_C)
        total = integer_dot(q, integers_of(W_digits[some], x.shape[1]))
        z[:, some] = scores_of(total, unit, W_factor[some], None if b_enc is None else b_enc[some].float())
    return torch.relu(z) if relu else z


def sae_encode_topk(
    x: Tensor,
    W_digits: Tensor,
    W_factor: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    relu: bool,
    scan_plane: Tensor | None,
    scan_terms: Tensor | None,
    scan_mean: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The TopK-SAE's encoder: W_enc's rows are the codes, so C is E.

    Args:
        x: [T, D].
        W_digits: int8 [E, 3, W].
        W_factor: fp32 [E].
        b_enc: [E], or None = 0.
        b_pre: [D], or None = 0.
        k: latents kept per token.
        mask_table: int32 [U, ceil(E/32)], or None = nothing deleted.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        relu: act is relu; else the identity.
        scan_plane: ignored here, as the next two: the three tensors of :func:`pack_scan`, or None.
        scan_terms: ignored here.
        scan_mean: ignored here.

    Returns:
        act(score) fp32 [T, k] and ids int32 [T, k], in the order of the scores before act.
    """
    x = x.float() if b_pre is None else x.float() - b_pre.float()
    bias = None if b_enc is None else b_enc.float()
    scores, ids, _ = codebook_quantize(x, W_digits, W_factor, bias, k, mask_table, mask_row, False, *NO_SCAN)
    return torch.relu(scores) if relu else scores, ids


def codebook_bottleneck(
    x: Tensor,
    W_digits: Tensor | None,
    W_factor: Tensor | None,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    relu: bool,
    digits: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    k: int,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    reselect: bool,
    scan_plane: Tensor | None,
    scan_terms: Tensor | None,
    scan_mean: Tensor | None,
    table: Tensor,
    b_dec: Tensor | None,
    score_weights: bool,
    mean: bool,
    receipt: Tensor | None,
) -> Tensor:
    """The three operators one after the other.

    Args:
        x: [T, D].
        W_digits: int8 [E, 3, W], or None = x is z, and E is D.
        W_factor: fp32 [E]; None where W_digits is.
        b_enc: [E], or None = 0.
        b_pre: [D], or None = 0.
        relu: the encoder's activation is relu; else the identity.
        digits: int8 [C, 3, W].
        factor: fp32 [C].
        bias: fp32 [C], or None = 0.
        k: codes kept per token.
        mask_table: int32 [U, ceil(C/32)], or None = nothing deleted.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        reselect: a deleted code is not selected; else it is selected and its weight is 0.
        scan_plane: ignored here, as the next two: the three tensors of :func:`pack_scan`, or None.
        scan_terms: ignored here.
        scan_mean: ignored here.
        table: [C, D].
        b_dec: [D], or None = 0.
        score_weights: a code's weight is relu(score); else 1.
        mean: the sum is divided by k.
        receipt: int64 [2], added to in place: tokens, and codes that the mask took; None = not counted.

    Returns:
        y, [T, D] in table's dtype.
    """
    none = (None, None)
    excluded, zeroed = ((mask_table, mask_row), none) if reselect else (none, (mask_table, mask_row))
    z = x if W_digits is None else sae_encode(x, W_digits, W_factor, b_enc, b_pre, relu)
    scores, ids, hits = codebook_quantize(z, digits, factor, bias, k, *excluded, True, *NO_SCAN)
    if not reselect and mask_table is not None:
        hits = is_deleted(ids, mask_table, mask_row).sum(1, dtype=torch.int32)
    # The score of an empty slot is 0, or NaN where the row was faulty, and so is its weight.
    weights = torch.relu(scores) if score_weights else torch.where(ids < 0, scores, 1.0)
    if receipt is not None:
        receipt[0] += x.shape[0]
        receipt[1] += hits.sum()
    return masked_decode(ids, weights, table, b_dec, None, *zeroed, mean)


def masked_decode(
    ids: Tensor,
    weights: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    mean: bool,
) -> Tensor:
    """y = reduce_i(w_i table[ids_i]) + bias + residual, added in that order in fp32, rounded once.

    A deleted code adds nothing, whatever its row holds. Nor does id -1; but with the weight NaN, which is the score of
    a row with NaN or Inf, it makes the row NaN, so that the fault stays visible.

    Args:
        ids: int [T, k], -1 <= id < C.
        weights: [T, k], or None = 1.
        table: [C, D].
        bias: [D], or None = 0.
        residual: [T, D], or None = 0.
        mask_table: int32 [U, ceil(C/32)], or None = nothing deleted.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        mean: the sum is divided by k.

    Returns:
        y, [T, D] in table's dtype.
    """
    T, k = ids.shape
    weights = torch.ones(T, k, device=ids.device) if weights is None else weights.float()
    use = ids >= 0
    if mask_table is not None:
        use = use & ~is_deleted(ids, mask_table, mask_row)
    acc = torch.zeros(T, table.shape[1], device=table.device)
    for i in range(k):
        row = table[ids[:, i].long().clamp(min=0)].float()
        acc = torch.where(use[:, i, None], acc + weights[:, i, None] * row, acc)
    if mean:
        acc = acc / k
    if bias is not None:
        acc = acc + bias.float()
    if residual is not None:
        acc = acc + residual.float()
    faulty = ((ids < 0) & torch.isnan(weights)).any(1, keepdim=True)
    if mask_table is not None:
        faulty = faulty | is_missing(mask_table, mask_row)[:, None]
    return torch.where(faulty, torch.nan, acc).to(table.dtype)
