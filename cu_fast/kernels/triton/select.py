"""The k best codes of each token by scoring every code, and the end of every selection.

    score(t, j) = canonical(z_t - pre, c_j) inv_norm_j + bias_j        best: higher score, then smaller id

    kept, gone   [T, stride] int64 keys (canonical.py): codes that may be selected, deleted ones (None: nobody asks)

1. score_codes   A program takes a tile of tokens and one part of the codes, tile by tile: canonical dots, keys. Of each
                 token it keeps BLOCK_K >= k keys in registers: while the best of the tile beats the worst kept, they
                 change places. Where k is too large for that (BLOCK_K = 0) all keys are kept; the host then takes few
                 tokens at a time. A deleted code's key goes to `gone`, or nowhere: a predicate, not a score.
2.               A row with NaN or Inf, or whose mask row does not exist, is poisoned: nothing is selected.
3. finish        A program a token takes the largest of its n keys below the last one taken, k times.

Behind a scan, score_codes does only the rows that the scan could not do; a tile without any ends at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cu_fast.kernels.triton.canonical import (
    EMPTY,
    FIRST_KEY,
    canonical_dots,
    id_of,
    is_deleted,
    keys_of,
    mask_rows,
    score_of,
)


@triton.jit
def exchange(best, tile):
    """The best keys of both: best [BLOCK_T, BLOCK_K], whose keys differ; tile [BLOCK_T, BLOCK_C]."""
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
    z, z_stride, codes, code_stride, inv_norm, bias, pre, mask_table, mask_row, words, U,
    wanted, poison, kept, gone, T, C, E, parts, part_codes, stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
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
    faulty = exists != exists
    if BLOCK_K > 0:
        places = tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
        best = places.to(tl.int64) + EMPTY  # nobody's, and all different
        if gone is not None:
            best_gone = best
    end = tl.minimum(part * part_codes + part_codes, C)
    for first in range(part * part_codes, end, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        has_j = j < end
        dots, faulty = canonical_dots(
            z, z_stride, t, has_t, codes, code_stride, j, has_j, pre, E, BLOCK_T, BLOCK_C, UNROLL
        )
        keys = tl.where(has_t[:, None], keys_of(dots, j, has_j, inv_norm, bias), EMPTY)
        keys_gone = keys
        if mask_table is not None:
            pairs = has_t[:, None] & has_j[None, :]
            deleted = is_deleted(mask_table, words, row[:, None], j[None, :], pairs)
            keys_gone = tl.where(deleted, keys, EMPTY)
            keys = tl.where(deleted, EMPTY, keys)
        if BLOCK_K > 0:
            best = exchange(best, keys)
            if gone is not None:
                best_gone = exchange(best_gone, keys_gone)
        else:
            at = rows + j.to(tl.int64)[None, :]
            tl.store(kept + at, keys, mask=has_t[:, None] & has_j[None, :])
            if gone is not None:
                tl.store(gone + at, keys_gone, mask=has_t[:, None] & has_j[None, :])
    if BLOCK_K > 0:
        at = rows + (part * BLOCK_K + places)
        tl.store(kept + at, best, mask=has_t[:, None])
        if gone is not None:
            tl.store(gone + at, best_gone, mask=has_t[:, None])
    tl.store(poison + t, tl.where(faulty | (exists == 0), 1, 0), mask=has_t)


@triton.jit
def largest_below(keys, n, first, last, BLOCK_N: tl.constexpr):
    """The largest of n keys below `last`; first: the first BLOCK_N of them."""
    best = tl.max(tl.where(first < last, first, EMPTY), 0)
    for start in range(BLOCK_N, n, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        more = tl.load(keys + at, mask=at < n, other=EMPTY)
        best = tl.maximum(best, tl.max(tl.where(more < last, more, EMPTY), 0))
    return best


@triton.jit(do_not_specialize=["k", "places", "stride"])
def finish(
    kept, gone, poison, exact, chosen, scores, ids, hits, k, places, stride, relu: tl.constexpr, BLOCK_N: tl.constexpr
):
    """n keys a token: `places`, or where a scan did it, which `exact` denies, chosen[t]."""
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
        if gone is not None:
            first_gone = tl.load(gone + t * stride + at, mask=at < n, other=EMPTY)
            last = tl.full([], 2**63 - 1, tl.int64)
            for _ in range(k):
                best = largest_below(kept + t * stride, n, first, last, BLOCK_N)
                best_gone = largest_below(gone + t * stride, n, first_gone, last, BLOCK_N)
                count += tl.where((best_gone > best) & (best_gone > FIRST_KEY), 1, 0)
                last = tl.maximum(best, best_gone)
        tl.store(hits + t, count)
