"""The certified int8 scan: which codes may be among the k best, read from one byte per entry.

    approx = unit scale_j (<p_t, q_j> + 254 <h_t, q_j>) + mean_dot factor_j + bias_j
    error  = norm_in residual_j + miss size_j + half_l1_out |scale_j| + slop magnitude + 2^-20 |bias_j|

What is scanned are the rows in fixed point, x = q unit (fixed.py), which fp32 holds exactly, against the integers of the
codes' digits. The plane and the bound are those of ``csrc/core/scan.h``; sums of bytes are exact on every matrix unit.

1. scan_rows         A program per token: bytes p and, for entries far above the rest, high bytes h; terms of the bound.
2. scan_codes        A program per tile of codes and tokens. In the sample (some tiles): the largest lower bound of each
                     four codes.
3. scan_threshold    tau = the k-th largest of those bounds: at most the k-th best score.
4. scan_codes        All tiles: a code whose upper bound reaches tau becomes a candidate, appended by atomics. A
                     candidate without a place is counted, so the row is known to be incomplete. A deleted code becomes
                     no candidate, or, where hits are counted, one that is flagged.
5. narrow            tau again, of all lower bounds; candidates whose upper bound reaches it are chosen. Rows that are
                     incomplete or cannot be certified are left to score_codes.
6. score_candidates  Scores of the chosen, as keys for `finish`.

    terms                 [8, chunk] fp32: unit, mean_dot, norm_in, miss, half_l1_out, slop, two not used
    bytes, high           [chunk, W] int8, p and h; zeros beyond E
    high_steps, has_high  [chunk, W / STEP] and [chunk] int32, 1: h is not zero there
    exact                 [chunk] int32, 1: the row is left to score_codes
    maxima, tau           [chunk, visited BLOCK_C / 4] and [chunk] fp32
    count                 [chunk] int32, candidates found; above capacity, more than were stored
    ids, chosen           [chunk, capacity] int32; bit 31: deleted
    lower, upper          [chunk, capacity] fp32; lower is -inf for a deleted code: it must not raise tau
"""

from __future__ import annotations

import triton
import triton.language as tl

from cu_fast.kernels.triton.fixed import cut, integer_dots, scores_of
from cu_fast.kernels.triton.shared import (
    EMPTY,
    from_ordered,
    is_deleted,
    keys_of,
    mask_rows,
    ordered,
)

SMALLEST, LARGEST = tl.constexpr(2.0**-40), tl.constexpr(2.0**40)  # bounds of a certified row's largest entry
HALVINGS = tl.constexpr(7)  # at most, of the clip
RANGE = tl.constexpr(127.0)  # largest p
BASE = tl.constexpr(254.0)  # of h: an entry is unit (p + BASE h)
WIDEN = tl.constexpr(1.0 + 2.0**-18)  # covers the roundings of the bound itself


@triton.jit
def entries(row_digits, unit, e, W):
    """Entries e of a row in fixed point, as fp32."""
    high = tl.load(row_digits + e, mask=e < W, other=0).to(tl.int32)
    middle = tl.load(row_digits + W + e, mask=e < W, other=0).to(tl.int32)
    low = tl.load(row_digits + 2 * W + e, mask=e < W, other=0).to(tl.int32)
    return ((high << 16) + (middle << 8) + low).to(tl.float32) * unit


@triton.jit(do_not_specialize=["U", "chunk", "max_outliers"])
def scan_rows(
    row_digits, units, mean, mask_row, U, bytes, high, high_steps, has_high, terms, exact, poison, count,
    E, W, chunk, max_outliers, epsilon, grow, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = row_digits + t * 3 * W
    given = tl.load(units + t)
    fault = given != given
    given = tl.where(fault, 0.0, given)
    lane = tl.arange(0, BLOCK_E)
    most, squares = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, W, BLOCK_E):
        x = entries(row, given, first + lane, W)
        most = tl.maximum(most, tl.abs(x))
        squares += x * x
    largest = tl.max(most, 0)
    if mask_row is not None:
        mine = tl.load(mask_row + t)
        fault = fault | (mine < -1) | (mine >= U)
    certified = (fault == 0) & (largest >= SMALLEST) & (largest <= LARGEST)

    # The clip is halved while few entries lie above it, so that one outlier does not make the unit coarse for all.
    halving = tl.arange(0, 8)
    limits = largest / (2 << halving).to(tl.float32)
    above = tl.zeros([8], tl.int32)
    for first in range(0, W, BLOCK_E):
        x = entries(row, given, first + lane, W)
        above += tl.sum(tl.where(tl.abs(x)[:, None] > limits[None, :], 1, 0), 0)
    halvings = tl.sum(tl.where((above <= max_outliers) & (halving < HALVINGS), 1, 0), 0)
    clip = largest / (1 << halvings).to(tl.float32)

    # A row that is not certified stores zeros: its tile multiplies them, and the products are not read.
    per_unit, unit = tl.where(certified, RANGE / clip, 0.0), tl.where(certified, clip / RANGE, 0.0)
    misses, squares_in = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    out, mean_dot = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    any_high = tl.full([], 0, tl.int32)
    for first in range(0, W, BLOCK_E):
        e = first + lane
        x = entries(row, given, e, W)
        x = tl.where(certified, x, 0.0)
        whole = tl.floor(x * per_unit + 0.5)
        miss = x - unit * whole
        misses += miss * miss
        is_out = tl.abs(whole) > RANGE
        h = tl.where(is_out, tl.floor(whole / BASE + 0.5), 0.0)
        p = whole - BASE * h
        out += tl.where(is_out, tl.abs(x), 0.0)
        squares_in += tl.where(is_out, 0.0, x * x)
        if mean is not None:
            mean_dot += x * tl.load(mean + e, mask=e < E, other=0.0)
        tl.store(bytes + t * W + e, p.to(tl.int32).to(tl.int8), mask=e < W)
        tl.store(high + t * W + e, h.to(tl.int32).to(tl.int8), mask=e < W)
        steps = tl.max(tl.reshape(tl.where(is_out, 1, 0), (BLOCK_E // STEP, STEP)), 1)
        step = first // STEP + tl.arange(0, BLOCK_E // STEP)
        tl.store(high_steps + t * (W // STEP) + step, steps, mask=step < W // STEP)
        any_high = tl.maximum(any_high, tl.max(steps, 0))
    norm = tl.sqrt_rn(tl.sum(squares, 0)) * grow
    tl.store(terms + t, unit)
    tl.store(terms + chunk + t, tl.sum(mean_dot, 0))
    # Not zero, so that times an infinite residual_j it is infinite, and not NaN.
    tl.store(terms + 2 * chunk + t, tl.maximum(tl.sqrt_rn(tl.sum(squares_in, 0)) * grow, 2.0**-60))
    # The second term covers the rounding of unit * whole, and of the subtraction from x.
    tl.store(terms + 3 * chunk + t, tl.sqrt_rn(tl.sum(misses, 0)) * grow + 2.0**-22 * norm)
    tl.store(terms + 4 * chunk + t, 0.5 * tl.sum(out, 0) * grow)
    tl.store(terms + 5 * chunk + t, norm * epsilon)
    tl.store(has_high + t, any_high)
    tl.store(exact + t, tl.where(certified, 0, 1))
    tl.store(poison + t, tl.where(fault, 1, 0))
    tl.store(count + t, 0)


@triton.jit
def add_product(sums, codes, rows, first, e, plane_width, has_j, has_t):
    """sums [BLOCK_C, BLOCK_T] += the product of codes and rows over entries first + e."""
    q = tl.load(codes + first * 64, mask=has_j[:, None] & (first + e < plane_width)[None, :], other=0) ^ -128
    p = tl.load(rows + (first + e)[:, None], mask=has_t[None, :], other=0)
    return tl.dot(q, p, sums, out_dtype=tl.int32)


@triton.jit(do_not_specialize=["T", "C", "chunk", "capacity", "tiles", "visited"])
def scan_codes(
    bytes, high, high_steps, has_high, terms, exact, plane, plane_terms, factor, bias, mask_table, mask_row, words,
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
    scans = has_t & (tl.load(exact + t, mask=has_t, other=1) == 0)
    if tl.max(tl.where(scans, 1, 0), 0) == 0:
        return

    e = tl.arange(0, BLOCK_E)
    group = j // 64
    codes = plane + (group.to(tl.int64) * plane_width * 64 + j % 64 * 4)[:, None] + (e // 4 * 256 + e % 4)[None, :]
    of_token = t.to(tl.int64)[None, :] * W
    sums = tl.zeros([BLOCK_C, BLOCK_T], tl.int32)
    for first in range(0, W, BLOCK_E):
        sums = add_product(sums, codes, bytes + of_token, first, e, plane_width, has_j, has_t)
    sum = sums.to(tl.float32)
    if tl.max(tl.load(has_high + t, mask=has_t, other=0), 0) > 0:
        sums_high = tl.zeros([BLOCK_C, BLOCK_T], tl.int32)
        steps = W // BLOCK_E
        for step in range(0, steps):
            here = tl.load(high_steps + t.to(tl.int64) * steps + step, mask=has_t, other=0)
            if tl.max(here, 0) > 0:
                sums_high = add_product(sums_high, codes, high + of_token, step * BLOCK_E, e, plane_width, has_j, has_t)
        sum += BASE * sums_high.to(tl.float32)

    unit = tl.load(terms + t, mask=has_t, other=0.0)[None, :]
    mean_dot = tl.load(terms + chunk + t, mask=has_t, other=0.0)[None, :]
    norm_in = tl.load(terms + 2 * chunk + t, mask=has_t, other=0.0)[None, :]
    miss = tl.load(terms + 3 * chunk + t, mask=has_t, other=0.0)[None, :]
    half_l1_out = tl.load(terms + 4 * chunk + t, mask=has_t, other=0.0)[None, :]
    slop = tl.load(terms + 5 * chunk + t, mask=has_t, other=0.0)[None, :]
    of_group = plane_terms + group * 196
    scale = tl.load(of_group + j % 64, mask=has_j, other=0.0)
    residual = tl.load(of_group + 64 + j % 64, mask=has_j, other=0.0)
    size = tl.load(of_group + 128 + j % 64, mask=has_j, other=0.0)
    magnitude = tl.load(of_group + 195, mask=has_j, other=0.0)
    times, shift = tl.load(factor + j, mask=has_j, other=0.0), tl.where(has_j, 0.0, 0.0)
    if bias is not None:
        # Cut as the score is: that of a code of zeros is its bias alone, for which the other terms leave no room.
        shift = cut(tl.load(bias + j, mask=has_j, other=0.0))
    approx = unit * scale[:, None] * sum + mean_dot * times[:, None] + shift[:, None]
    error = norm_in * residual[:, None] + miss * size[:, None] + half_l1_out * tl.abs(scale)[:, None]
    error = WIDEN * (error + slop * magnitude[:, None] + (2.0**-20 * tl.abs(shift))[:, None])
    # Where the bound is not finite, or the bias so large that the score may overflow, nothing is known of the score.
    bounded = (error < LARGEST) & (tl.abs(shift) <= LARGEST)[:, None]
    low = tl.where(bounded, approx - error, float("-inf"))
    up = tl.where(bounded, approx + error, float("inf"))

    row, _ = mask_rows(mask_row, t, has_t, 2**31 - 1)
    pairs = has_j[:, None] & scans[None, :]
    if SAMPLE:
        if mask_table is not None:
            pairs = pairs & (is_deleted(mask_table, words, row[None, :], j[:, None], pairs) == 0)
        most = tl.max(tl.reshape(tl.where(pairs, low, float("-inf")), (BLOCK_C // 4, 4, BLOCK_T)), 1)
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


@triton.jit(do_not_specialize=["n", "k"])
def scan_threshold(maxima, exact, tau, n, k, BLOCK_N: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    if tl.load(exact + t) == 0:
        tl.store(tau + t, kth_largest(maxima + t * n, n, k, BLOCK_N))


@triton.jit(do_not_specialize=["k", "capacity"])
def narrow(count, exact, ids, lower, upper, chosen, chosen_count, k, capacity, BLOCK_N: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(count + t)
    failed = (tl.load(exact + t) != 0) | (n > capacity)
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
