"""The certified int8 scan: which codes may be among the k best, read from one byte per entry.

    approx = (I scale_j) (256 unit_t) + (mean_dot_t factor_j) unit_t + bias_j      I = 256 <d_0, c_j> + <d_1, c_j>
    error  = norm_t residual_j + miss_t size_j + 2^-19 (norm_t magnitude_g + |bias_j|) + 2^-120

d_0, d_1 and d_2 are the digits of q_t (fixed.py), the highest first, and the two highest are scanned. c_j, the terms of
a code and the bound are those of ``csrc/core/scan.h``. Sums of bytes are exact on every matrix unit, and stay below
2^31: they may not wrap, as mma.sync saturates. Where the error is Inf or NaN, nothing is known of the score.

1. scan_rows         A program per token: the terms of its row.
2. scan_codes        A program per tile of codes and tokens, with a product for each digit. In the sample (some tiles):
                     the largest approximation of each four codes.
3. scan_threshold    tau is guessed: an approximation of so high a rank that k codes should be above it.
4. scan_codes        All tiles: a code whose upper bound reaches tau becomes a candidate, appended by atomics. A
                     candidate without a place is counted, so the row is known to be incomplete. A deleted code becomes
                     no candidate, or, where hits are counted, one that is flagged.
5. narrow            The k-th largest lower bound; candidates whose upper bound reaches it are chosen. Rows that are
                     incomplete or poisoned are left to score_codes.
6. score_candidates  Scores of the chosen, as keys for `finish`.
7. prove             The guess held if k scores reach it: then no code below it is selected. Else the row is left to
                     score_codes.

    terms          [3, chunk] fp32: norm = unit ||q|| or Inf, miss = unit max(||d_2||, 1), both rounded up; mean_dot = <q, mean>
    poison         [chunk] int32, as in select.py: the row is not scanned
    exact          [chunk] int32, 1: the row is left to score_codes
    maxima, tau    [chunk, visited BLOCK_C / 4] and [chunk] fp32
    count          [chunk] int32, candidates found; above capacity, more than were stored
    ids, chosen    [chunk, capacity] int32; bit 31: deleted
    lower, upper   [chunk, capacity] fp32; lower is -inf for a deleted code: it must not raise tau
"""

from __future__ import annotations

import triton
import triton.language as tl

from cu_fast.kernels.triton.fixed import cut, integer_dots, scores_of
from cu_fast.kernels.triton.shared import (
    EMPTY,
    FIRST_KEY,
    from_ordered,
    is_deleted,
    is_finite,
    keys_of,
    mask_rows,
    ordered,
    score_of,
)

ROUND_UP = tl.constexpr(1.0 + 2.0**-22)  # more than the roundings of a norm
ROUNDING, TINY = tl.constexpr(2.0**-19), tl.constexpr(2.0**-120)  # kScanRounding and kScanTiny of core/scan.h
WIDEN = tl.constexpr(1.0 + 2.0**-18)  # covers the roundings of the bound itself


@triton.jit(do_not_specialize=["U", "chunk"])
def scan_rows(row_digits, units, mean, mask_row, U, terms, poison, count, E, W, chunk, BLOCK_E: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    squares, misses = tl.zeros([BLOCK_E], tl.float64), tl.zeros([BLOCK_E], tl.int32)
    mean_dot = tl.zeros([BLOCK_E], tl.float64)
    for first in range(0, W, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        digits = row_digits + t * 3 * W + e
        high = tl.load(digits, mask=e < W, other=0).to(tl.int32)
        middle = tl.load(digits + W, mask=e < W, other=0).to(tl.int32)
        low = tl.load(digits + 2 * W, mask=e < W, other=0).to(tl.int32)
        q = ((high << 16) + (middle << 8) + low).to(tl.float64)
        squares += q * q
        misses += low * low
        if mean is not None:
            mean_dot += q * tl.load(mean + e, mask=e < E, other=0.0).to(tl.float64)
    unit = tl.load(units + t)
    norm = tl.sqrt_rn(tl.sum(squares, 0).to(tl.float32)) * ROUND_UP
    miss = tl.sqrt_rn(tl.maximum(tl.sum(misses, 0), 1).to(tl.float32)) * ROUND_UP
    tl.store(terms + t, unit * norm * 2.0**31 * 2.0**-31)  # norm_of in core/scan.h
    tl.store(terms + chunk + t, unit * miss)
    tl.store(terms + 2 * chunk + t, tl.sum(mean_dot, 0).to(tl.float32))
    _, exists = mask_rows(mask_row, t, t >= 0, U)
    tl.store(poison + t, tl.where((unit != unit) | (exists == 0), 1, 0))
    tl.store(count + t, 0)


@triton.jit(do_not_specialize=["T", "C", "chunk", "capacity", "tiles", "visited"])
def scan_codes(
    row_digits, units, terms, poison, plane, plane_terms, factor, bias, mask_table, mask_row, words,
    maxima, tau, count, ids, lower, upper, T, C, plane_width, W, chunk, capacity, tiles, visited,
    COUNTS_HITS: tl.constexpr, SAMPLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token_tiles = tl.cdiv(T, BLOCK_T)
    visit = tl.program_id(0) // token_tiles
    tile = visit
    if SAMPLE:  # tiles spread over all codes: neighbours may be alike
        tile = (visit.to(tl.int64) * tiles // visited).to(tl.int32)
    t = tl.program_id(0) % token_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    has_t, has_j = t < T, j < C
    scans = has_t & (tl.load(poison + t, mask=has_t, other=1) == 0)
    if tl.max(tl.where(scans, 1, 0), 0) == 0:
        return

    e = tl.arange(0, BLOCK_E)
    group = j // 64
    codes = plane + (group.to(tl.int64) * plane_width * 64 + j % 64 * 4)[:, None] + (e // 4 * 256 + e % 4)[None, :]
    of_token = row_digits + t.to(tl.int64)[None, :] * 3 * W
    sums_0 = tl.zeros([BLOCK_C, BLOCK_T], tl.int32)
    sums_1 = sums_0
    for first in range(0, W, BLOCK_E):
        # Bytes beyond the plane, and those of codes beyond C, meet digits of 0 or are not used.
        c = tl.load(codes + first * 64, mask=has_j[:, None] & (first + e < plane_width)[None, :], other=0) ^ -128
        digits = of_token + (first + e)[:, None]
        sums_0 = tl.dot(c, tl.load(digits, mask=has_t[None, :], other=0), sums_0, out_dtype=tl.int32)
        sums_1 = tl.dot(c, tl.load(digits + W, mask=has_t[None, :], other=0), sums_1, out_dtype=tl.int32)
    product = 256.0 * sums_0.to(tl.float32) + sums_1.to(tl.float32)

    unit = tl.load(units + t, mask=has_t, other=0.0)[None, :]
    norm = tl.load(terms + t, mask=has_t, other=0.0)[None, :]
    miss = tl.load(terms + chunk + t, mask=has_t, other=0.0)[None, :]
    mean_dot = tl.load(terms + 2 * chunk + t, mask=has_t, other=0.0)[None, :]
    of_group = plane_terms + group * 196
    scale = tl.load(of_group + j % 64, mask=has_j, other=0.0)[:, None]
    residual = tl.load(of_group + 64 + j % 64, mask=has_j, other=0.0)[:, None]
    size = tl.load(of_group + 128 + j % 64, mask=has_j, other=0.0)[:, None]
    magnitude = tl.load(of_group + 195, mask=has_j, other=0.0)[:, None]
    times = tl.load(factor + j, mask=has_j, other=0.0)[:, None]
    approx = (product * scale) * (256.0 * unit) + (mean_dot * times) * unit
    largest = norm * magnitude  # approx is not larger: if it overflows, so does this, and the error
    if bias is not None:
        shift = cut(tl.load(bias + j, mask=has_j, other=0.0))[:, None]  # as in the score
        approx += shift
        largest += tl.abs(shift)
    error = WIDEN * (norm * residual + miss * size + ROUNDING * largest + TINY)
    low = tl.where(is_finite(error), approx - error, float("-inf"))
    up = tl.where(is_finite(error), approx + error, float("inf"))

    row, _ = mask_rows(mask_row, t, has_t, 2**31 - 1)
    pairs = has_j[:, None] & scans[None, :]
    if SAMPLE:
        if mask_table is not None:
            pairs = pairs & (is_deleted(mask_table, words, row[None, :], j[:, None], pairs) == 0)
        known = tl.where(pairs & is_finite(error), approx, float("-inf"))
        most = tl.max(tl.reshape(known, (BLOCK_C // 4, 4, BLOCK_T)), 1)
        fours = visit * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)
        at = t.to(tl.int64)[None, :] * (visited * (BLOCK_C // 4)) + fours[:, None]
        tl.store(maxima + at, most, mask=scans[None, :])
    else:
        least = tl.load(tau + t, mask=scans, other=float("inf"))
        passes = pairs & ((up < least[None, :]) == 0)
        id = j[:, None] + tl.zeros([1, BLOCK_T], tl.int32)
        if mask_table is not None:
            deleted = is_deleted(mask_table, words, row[None, :], j[:, None], passes)
            if COUNTS_HITS:
                id = tl.where(deleted, id | -(2**31), id)
                low = tl.where(deleted, float("-inf"), low)
            else:
                passes = passes & (deleted == 0)
        place = tl.atomic_add(count + t[None, :] + tl.zeros([BLOCK_C, 1], tl.int32), 1, mask=passes, sem="relaxed")
        at = t[None, :] * capacity + place
        fits = passes & (place < capacity)
        tl.store(ids + at, id, mask=fits)
        tl.store(lower + at, low, mask=fits)
        tl.store(upper + at, up, mask=fits)


@triton.jit
def above_infinity(values, at, n):
    """Values as `ordered` integers; the smallest integer for -inf, and for places from n on."""
    x = tl.load(values + at, mask=at < n, other=float("-inf"))
    return tl.where(x > float("-inf"), ordered(x), -(2**31))


@triton.jit
def kth_largest(values, n, k, BLOCK_N: tl.constexpr):
    """The k-th largest of n floats, found bit by bit from the top; -inf if fewer than k are larger than -inf."""
    at = tl.arange(0, BLOCK_N)
    first = above_infinity(values, at, n)
    found = tl.full([], -(2**31), tl.int32)
    for i in range(32):
        candidate = found ^ (tl.full([], 1, tl.int32) << (31 - i))  # sets the next bit; the first step clears the sign
        reach = tl.sum(tl.where(first >= candidate, 1, 0), 0)
        for start in range(BLOCK_N, n, BLOCK_N):
            reach += tl.sum(tl.where(above_infinity(values, start + at, n) >= candidate, 1, 0), 0)
        found = tl.where(reach >= k, candidate, found)
    return tl.where(found == -(2**31), float("-inf"), from_ordered(found))


@triton.jit(do_not_specialize=["n", "rank"])
def scan_threshold(maxima, poison, tau, n, rank, BLOCK_N: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    if tl.load(poison + t) == 0:
        tl.store(tau + t, kth_largest(maxima + t * n, n, rank, BLOCK_N))


@triton.jit(do_not_specialize=["k", "capacity"])
def narrow(count, poison, exact, ids, lower, upper, chosen, chosen_count, k, capacity, BLOCK_N: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(count + t)
    failed = (tl.load(poison + t) != 0) | (n > capacity)
    n = tl.where(failed, 0, n)
    tau = kth_largest(lower + t * capacity, n, k, BLOCK_N)
    used = tl.full([], 0, tl.int32)
    for start in range(0, n, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        up = tl.load(upper + t * capacity + at, mask=at < n, other=float("-inf"))
        reaches = (at < n) & ((up < tau) == 0)
        ones = tl.where(reaches, 1, 0)
        place = used + tl.cumsum(ones, 0) - 1
        tl.store(chosen + t * capacity + place, tl.load(ids + t * capacity + at, mask=reaches, other=0), mask=reaches)
        used += tl.sum(ones, 0)
    tl.store(chosen_count + t, used)
    tl.store(exact + t, tl.where(failed, 1, 0))


@triton.jit(do_not_specialize=["C", "capacity", "parts", "stride"])
def score_candidates(
    row_digits, units, digits, factor, bias, chosen, chosen_count, kept, deleted, W, capacity, parts, stride,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) // parts + tl.arange(0, 1)
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    n = tl.load(chosen_count + token)
    unit = tl.load(units + t)
    for first in range(part * BLOCK_C, n, parts * BLOCK_C):
        at = first + tl.arange(0, BLOCK_C)
        id = tl.load(chosen + token * capacity + at, mask=at < n, other=0)
        j = id & 0x7FFFFFFF
        total = integer_dots(row_digits, t, t >= 0, digits, j, at < n, W, W, 1, BLOCK_C, BLOCK_E)
        keys = keys_of(scores_of(total, unit, factor, bias, j, at < n), j, at < n)
        place = (token * stride + at)[None, :]
        tl.store(kept + place, tl.where((id < 0)[None, :], EMPTY, keys), mask=(at < n)[None, :])
        if deleted is not None:
            tl.store(deleted + place, tl.where((id < 0)[None, :], keys, EMPTY), mask=(at < n)[None, :])


@triton.jit(do_not_specialize=["k", "stride"])
def prove(kept, chosen_count, poison, tau, exact, k, stride, BLOCK_N: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    if tl.load(poison + t) == 0:
        guess = tl.load(tau + t)
        n = tl.load(chosen_count + t)
        reach = tl.full([], 0, tl.int32)
        for start in range(0, n, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            keys = tl.load(kept + t * stride + at, mask=at < n, other=EMPTY)
            reach += tl.sum(tl.where((keys > FIRST_KEY) & (score_of(keys) >= guess), 1, 0), 0)
        if (reach < k) & (guess > float("-inf")):
            tl.store(exact + t, 1)
