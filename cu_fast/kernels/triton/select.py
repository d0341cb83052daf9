"""The k best codes of each token by scoring every code, and the end of every selection.

    score(t, j): fixed.py        best: higher score, then smaller id

    kept         [T, stride] int64 keys (shared.py) of codes that may be selected
    deleted      [T, stride] int64 keys of deleted codes; None: hits are not counted
    poison       [T] int32, 1: the row is poisoned, nothing is selected and its scores are NaN

1. score_codes   A program takes a tile of tokens and one part of the codes, tile by tile: scores, keys. Per token
                 it keeps BLOCK_K >= k keys in registers: while the best key of the tile is better than the worst kept, the two
                 change places. Where k is too large for registers (BLOCK_K = 0) all keys go to memory; the host then
                 takes few tokens at a time. The mask is a predicate, not a score: a deleted code's key goes to
                 `deleted`, or nowhere. A row with NaN or Inf, or whose mask row does not exist, is poisoned.
2. finish        A program per token takes the largest of its n keys below the last one taken, k times.

After a scan, score_codes does only the rows that the scan could not do; a tile without any returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cu_fast.kernels.triton.fixed import integer_dots, scores_of
from cu_fast.kernels.triton.shared import (
    EMPTY,
    FIRST_KEY,
    id_of,
    is_deleted,
    keys_of,
    mask_rows,
    score_of,
)


@triton.jit
def exchange(best, tile):
    """The BLOCK_K best keys of both, per token: best [BLOCK_T, BLOCK_K], all different; tile [BLOCK_T, BLOCK_C]."""
    most, worst = tl.max(tile, 1), tl.min(best, 1)
    entering = tl.max(tl.where(most > worst, 1, 0), 0)
    while entering > 0:
        enters = (most > worst)[:, None]
        best = tl.where(enters & (best == worst[:, None]), most[:, None], best)
        tile = tl.where(enters & (tile == most[:, None]), EMPTY, tile)
        most, worst = tl.max(tile, 1), tl.min(best, 1)
        entering = tl.max(tl.where(most > worst, 1, 0), 0)
    return best


@triton.jit(do_not_specialize=["U", "T", "C", "parts", "part_codes", "stride"])
def score_codes(
    row_digits, units, digits, factor, bias, mask_table, mask_row, words, U,
    wanted, poison, kept, deleted, T, C, W, parts, part_codes, stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    t = tl.program_id(0) // parts * BLOCK_T + tl.arange(0, BLOCK_T)
    has_t = t < T
    if wanted is not None:
        has_t = has_t & (tl.load(wanted + t, mask=has_t, other=0) != 0)
        if tl.max(tl.where(has_t, 1, 0), 0) == 0:
            return
    row, exists = mask_rows(mask_row, t, has_t, U)
    rows = t.to(tl.int64)[:, None] * stride
    unit = tl.load(units + t, mask=has_t, other=0.0)
    if BLOCK_K > 0:
        places = tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
        best = places.to(tl.int64) + EMPTY  # below every real key, and distinct: exchange needs no tie rule
        if deleted is not None:
            best_deleted = best
    end = tl.minimum(part * part_codes + part_codes, C)
    for first in range(part * part_codes, end, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        has_j = j < end
        total = integer_dots(row_digits, t, has_t, digits, j, has_j, W, W, BLOCK_T, BLOCK_C, BLOCK_E)
        keys = keys_of(scores_of(total, unit, factor, bias, j, has_j), j, has_j)
        keys = tl.where(has_t[:, None], keys, EMPTY)
        keys_deleted = keys
        if mask_table is not None:
            pairs = has_t[:, None] & has_j[None, :]
            of_deleted = is_deleted(mask_table, words, row[:, None], j[None, :], pairs)
            keys_deleted = tl.where(of_deleted, keys, EMPTY)
            keys = tl.where(of_deleted, EMPTY, keys)
        if BLOCK_K > 0:
            best = exchange(best, keys)
            if deleted is not None:
                best_deleted = exchange(best_deleted, keys_deleted)
        else:
            at = rows + j.to(tl.int64)[None, :]
            tl.store(kept + at, keys, mask=has_t[:, None] & has_j[None, :])
            if deleted is not None:
                tl.store(deleted + at, keys_deleted, mask=has_t[:, None] & has_j[None, :])
    if BLOCK_K > 0:
        at = rows + (part * BLOCK_K + places)
        tl.store(kept + at, best, mask=has_t[:, None])
        if deleted is not None:
            tl.store(deleted + at, best_deleted, mask=has_t[:, None])
    tl.store(poison + t, tl.where((unit != unit) | (exists == 0), 1, 0), mask=has_t)


@triton.jit
def largest_below(keys, n, first, last, BLOCK_N: tl.constexpr):
    """The largest of n keys that is below `last`. `first` holds the first BLOCK_N of the n, in registers."""
    best = tl.max(tl.where(first < last, first, EMPTY), 0)
    for start in range(BLOCK_N, n, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        more = tl.load(keys + at, mask=at < n, other=EMPTY)
        best = tl.maximum(best, tl.max(tl.where(more < last, more, EMPTY), 0))
    return best


@triton.jit(do_not_specialize=["k", "places", "stride"])
def finish(
    kept, deleted, poison, exact, chosen, scores, ids, hits, k, places, stride,
    relu: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A token has `places` keys, or chosen[t] where a scan did its row: exact is given, and exact[t] is 0."""
    t = tl.program_id(0).to(tl.int64)
    n = places
    if exact is not None:
        n = tl.where(tl.load(exact + t) != 0, places, tl.load(chosen + t))
    poisoned = tl.load(poison + t) != 0
    n = tl.where(poisoned, 0, n)
    at = tl.arange(0, BLOCK_N)
    first = tl.load(kept + t * stride + at, mask=at < n, other=EMPTY)
    last = tl.full([], 2**63 - 1, tl.int64)
    for i in range(k):
        last = largest_below(kept + t * stride, n, first, last, BLOCK_N)
        taken = last > FIRST_KEY
        score = tl.where(taken, score_of(last), tl.where(poisoned, float("nan"), 0.0))
        if relu:
            score = tl.where(score <= 0, 0.0, score)
        tl.store(scores + t * k + i, score)
        tl.store(ids + t * k + i, tl.where(taken, id_of(last), -1))
    if hits is not None:
        count = tl.full([], 0, tl.int32)
        if deleted is not None:
            first_deleted = tl.load(deleted + t * stride + at, mask=at < n, other=EMPTY)
            last = tl.full([], 2**63 - 1, tl.int64)
            for _ in range(k):
                best = largest_below(kept + t * stride, n, first, last, BLOCK_N)
                best_deleted = largest_below(deleted + t * stride, n, first_deleted, last, BLOCK_N)
                count += tl.where((best_deleted > best) & (best_deleted > FIRST_KEY), 1, 0)
                last = tl.maximum(best, best_deleted)
        tl.store(hits + t, count)
