"""The scan of the CUDA kernels, run on a CPU by the emulation: its bounds, held against exact scores.

What comes out of it is compared in test_cuda_kernels.py; which way rows go, in test_cuda_ways.py.
"""

from __future__ import annotations

import math

import hurtful
import pytest
import torch
from calls import call, cosine
from hurtful import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_kernels import INF, NAN, emulated, plane_of, pytestmark, same, select
from tiers import examples

from cu_fast.kernels import reference

__all__ = ["pytestmark"]
PLACES = 300  # kCandidates of the emulation
CHUNK = 72
MOST = torch.finfo(torch.float32).max


def deleted_of(mask, T, C):
    ids = torch.arange(C)[None]
    if mask is None:
        return torch.zeros(T, C, dtype=torch.bool)
    return reference.is_deleted(ids, mask[0], mask[1].clamp(-1, len(mask[0]) - 1))


def sampled_groups(C, k):
    """The groups of 64 codes that the threshold comes from: a quarter, at most 512 codes, or 16 k; spread evenly."""
    groups = (C + 63) // 64
    n = min(groups, (max(min((C + 3) // 4, 512), 16 * k) + 63) // 64)
    return [visit * groups // n for visit in range(n)]


class Scan:
    """What a scan leaves of one chunk, by the names of ScanWork, beside the scores (NaN: not finite)."""

    def __init__(self, z, codes, pre=None, factor=None, bias=None, k=4, mask=None, counts_hits=False, **how):
        digits, step, _ = reference.pack_digits(codes)
        self.factor = step if factor is None else factor
        self.bias = torch.zeros(len(codes)) if bias is None else bias
        self.plane = plane_of(codes, factor)
        state = emulated(
            "scan_state", z=z, codes=codes, pre=pre, factor=factor, bias=bias, k=k, mask=mask or (None, None),
            counts_hits=counts_hits, scan=self.plane, **how,
        )  # fmt: skip
        (
            self.count,
            self.tau,
            self.id,
            self.lower,
            self.upper,
            self.scored,
            self.maxima,
            self.reached,
            terms,
            columns,
        ) = state
        self.unit, self.mean_dot, self.norm, self.miss = terms[:, :4].T
        self.start = terms[:, 4:6].contiguous().view(torch.int32)
        self.scans = ~self.unit.isnan()
        self.q, self.fixed_unit = reference.fix_rows(z.float() if pre is None else z.float() - pre)
        self.k, self.T, self.C, self.E, self.counts_hits = k, len(z), *codes.shape, counts_hits
        # Bytes of [T / 4, steps, 2, 4 tokens of 2 digits, 4 words], by token.
        bytes = columns.view(torch.int8).reshape(*columns.shape[:3], 4, 2, 16).permute(0, 3, 4, 1, 2, 5)
        bytes = bytes.reshape(-1, 2, columns.shape[1] * 32)
        self.digits = bytes[: self.T]
        assert not bytes[self.T :].any()  # read, so written
        total = reference.integer_dot(self.q, reference.integers_of(digits, self.E))
        score = reference.scores_of(total, self.fixed_unit, self.factor, bias)
        self.score = torch.where(score.isfinite(), score, NAN)
        self.deleted = deleted_of(mask, self.T, self.C)
        self.alive = ~self.deleted & ~self.score.isnan()

    def candidates(self, t):
        """Of a row: ids, whether they are deleted, lower, upper, scored."""
        n = min(int(self.count[t]), PLACES)
        raw = self.id[t, :n]
        return (raw & 0x7FFFFFFF).long(), raw < 0, self.lower[t, :n], self.upper[t, :n], self.scored[t, :n]

    def check(self):
        """Every bound holds, and nothing that may be among the best is missing. Returns ways of the rows, counted."""
        ways = dict.fromkeys(("certified", "overflowed", "misled", "exact"), 0)
        sampled = self.k * min(64 * self.maxima.shape[1], self.C) / self.C
        rank = math.ceil(sampled + 3 * math.sqrt(sampled) + 1)
        for t in range(self.T):
            if not self.scans[t]:
                ways["exact"] += 1
                continue
            best = self.score[t][self.alive[t]].sort(descending=True).values
            kth = best[self.k - 1] if len(best) >= self.k else torch.tensor(-INF)
            # tau is a guess, the maximum of that rank; each is the largest approximation of four codes.
            maxima = self.maxima[t].flatten().sort(descending=True).values
            assert self.tau[t] == (maxima[rank - 1] if rank <= len(maxima) else -INF)
            ids, gone, lower, upper, scored = self.candidates(t)
            assert len(ids.unique()) == len(ids) and (ids < self.C).all()
            assert torch.equal(gone, self.deleted[t, ids]) and (self.counts_hits or not gone.any())
            score = self.score[t, ids]
            assert not (score > upper).any() and not (score < lower).any()
            assert (lower[gone] == -INF).all()
            assert (score.isnan() <= ((upper == INF) & (lower == -INF))).all()
            assert not (upper < self.tau[t]).any()
            if self.count[t] > PLACES:
                ways["overflowed"] += 1
                continue
            # At most the k-th best score, so a guess below it was right.
            assert self.reached[t] <= kth
            if self.reached[t] < self.tau[t]:
                ways["misled"] += 1
                continue
            ways["certified"] += 1
            found = torch.zeros(self.C, dtype=torch.bool).index_fill(0, ids, True)
            reaches = ~self.score[t].isnan() & (self.score[t] >= kth) & (self.counts_hits | self.alive[t])
            assert (reaches <= found).all()
            # What has been scored was scored exactly; that are k of the best known, if there are so many.
            known = ~scored.isnan()
            assert torch.equal(scored[known], score[known])
            if (lower > -INF).sum() >= self.k:
                assert torch.equal(
                    known & ~gone, (lower >= lower.sort(descending=True).values[self.k - 1]) & ~score.isnan()
                )
        self.check_maxima()
        self.check_terms()
        self.check_bounds()
        return ways

    def check_maxima(self):
        assert self.maxima.shape == (self.T, len(sampled_groups(self.C, self.k)), 16)
        approx_of, error, rounded = self.bounds()
        room_of = 2.0**-20 * rounded + 2.0**-120
        bounded = (rounded < 0.99 * MOST) & (error < 0.99 * MOST)
        unclear = (~bounded & (rounded <= 1.01 * MOST) & (error <= 1.01 * MOST)).any(1)
        for visit, group in enumerate(sampled_groups(self.C, self.k)):
            codes = torch.arange(64) + 64 * group
            inside = torch.where(codes < self.C, codes, 0)
            runs = (codes < self.C) & ~self.deleted[:, inside]
            approx, room = (torch.where(runs & bounded[:, inside], x[:, inside], -INF) for x in (approx_of, room_of))
            of_four = approx.reshape(self.T, 16, 4).amax(2)
            room = room.reshape(self.T, 16, 4).amax(2)
            found = self.maxima[:, visit].double()
            assert ((found == of_four) | ((found - of_four).abs() <= room))[self.scans & ~unclear].all()

    def check_terms(self):
        """The row's terms against what they are of its integers: never too small, and not much too large."""
        use = self.scans
        q, unit, digits = self.q[use], self.unit[use].double(), self.digits[use]
        zero = (q == 0).all(1)
        assert torch.equal(unit[~zero], self.fixed_unit[use][~zero].double()) and (unit[zero] == 2.0**-125).all()
        wanted = reference.digits_of(q)
        assert torch.equal(digits, wanted[:, :2, : digits.shape[2]])
        assert torch.equal(self.start[use], -128 * digits.int().sum(2, dtype=torch.int32))
        norm, miss = unit * q.double().norm(dim=1), unit * wanted[:, 2].double().norm(dim=1).clamp(min=1)
        norm = torch.where(norm * 2**31 > MOST, INF, norm)
        for bound, value in ((self.norm[use].double(), norm), (self.miss[use].double(), miss)):
            assert ((bound >= value) & (bound <= value * (1 + 1e-6))).all()
        exact, mean = q.double() @ self.plane[2].double(), self.plane[2].double()
        room = 2**-24 * exact.abs() + 2**-40 * q.double().norm(dim=1) * mean.norm()
        assert ((self.mean_dot[use] - exact).abs() <= room).all()

    def bounds(self):
        """approx and error of every code, as core/scan.h defines them, in fp64; and what kScanRounding multiplies."""
        plane, terms = self.plane[:2]
        c = plane.transpose(1, 2).reshape(len(plane) * 64, -1)[: self.C, : self.E].double() - 128
        groups = terms[:, :192].reshape(-1, 3, 64).transpose(0, 1)
        scale, residual, size = groups.reshape(3, -1)[:, : self.C].double()
        magnitude = terms[:, 195].double().repeat_interleave(64)[: self.C]
        first, second = (self.digits[:, i, : self.E].double() @ c.T for i in (0, 1))
        factor, bias = self.factor.double(), torch.where(self.bias.abs() < 2.0**-125, 0.0, self.bias).double()
        unit, mean_dot, norm, miss = (x[:, None].double() for x in (self.unit, self.mean_dot, self.norm, self.miss))
        approx = (256 * first + second) * scale * 256 * unit + mean_dot * factor * unit + bias
        rounded = norm * magnitude + bias.abs()
        return approx, norm * residual + miss * size + 2**-19 * rounded + 2**-120, rounded

    def check_bounds(self):
        """Every code's score is within its bounds; those of candidates are what core/scan.h says, and no wider. A code
        whose bound reaches tau is a candidate, whether or not it is among the best."""
        approx, error, rounded = self.bounds()
        bounded = (rounded < 0.99 * MOST) & (error < 0.99 * MOST) & self.scans[:, None]
        assert ((approx - self.score.double()).abs() <= error)[bounded].all()
        unbounded = ~((rounded <= 1.01 * MOST) & (error <= 1.01 * MOST))
        reaches = bounded & (approx + error - 2.0**-20 * rounded > self.tau[:, None].double())
        reaches &= self.counts_hits | ~self.deleted
        self.needed = 0.0  # the largest share of its error that a score needs
        for t in self.scans.nonzero().flatten().tolist():
            ids, gone, lower, upper, _ = self.candidates(t)
            found = torch.zeros(self.C, dtype=torch.bool).index_fill(0, ids, True)
            assert self.count[t] > PLACES or (reaches[t] <= found).all()
            none, some = unbounded[t, ids], bounded[t, ids] & ~gone
            assert (lower[none] == -INF).all() and (upper[none] == INF).all()
            lower, upper, ids = lower[some].double(), upper[some].double(), ids[some]
            middle, half = (lower + upper) / 2, (upper - lower) / 2
            # approx and its bounds are rounded: each time to 2^-24 of what kScanRounding takes 2^-19 of.
            assert ((middle - approx[t, ids]).abs() <= 0.3 * error[t, ids]).all()
            assert ((half / error[t, ids] - 1).abs() <= 0.1).all()
            self.needed = max([self.needed, *((self.score[t, ids] - middle).abs() / half).tolist()])


@settings(max_examples=examples(150), deadline=None)
@given(
    T=st.integers(1, 20) | st.sampled_from([4, 5, 8, 9, 32, 33, 65, 72]), E=st.integers(1, 80) | st.integers(80, 400),
    C=st.integers(8, 170) | st.integers(170, 1100), k=st.integers(1, 100) | st.integers(1, 9), share=hurtful.shares,
    counts_hits=st.booleans(), epilogue=st.sampled_from(["none", "cosine", "biased", "signed"]), centred=st.booleans(),
    z_kind=hurtful.kinds, code_kind=hurtful.kinds, other_kind=hurtful.kinds, z_dtype=hurtful.dtypes,
    code_dtype=hurtful.dtypes, layout=hurtful.layouts, seed=hurtful.seeds,
)  # fmt: skip
def test_bounds_hold_and_nothing_is_missing(
    T, E, C, k, share, counts_hits, epilogue, centred, z_kind, code_kind, other_kind, z_dtype, code_dtype, layout, seed
):
    C = min(C, 300) if T > 20 or E > 80 else C
    z = hurtful.strided(hurtful.matrix(T, E, z_kind, z_dtype, seed), layout)
    codes = hurtful.strided(hurtful.matrix(C, E, code_kind, code_dtype, seed + 1), layout)
    other = hurtful.matrix(C, 1, other_kind, torch.float32, seed + 2)[:, 0]
    pre = normal(E, seed=seed) if centred else None
    factor = {"none": None, "signed": other}.get(epilogue, cosine(codes))
    mask = None if share is None else hurtful.masks(T, C, share, seed + 3)
    counts_hits = counts_hits and share is not None
    bias = other if epilogue == "biased" else None
    options = dict(bias=bias, k=min(k, C // 8), mask=mask, counts_hits=counts_hits, seed=seed)
    Scan(z, codes, pre=pre, factor=factor, **options).check()


# -- rows and codes of every size ---------------------------------------------------------------------------------


def scanned(z, codes, k, **given):
    """The scan of what is given, which holds; the selection is the reference's."""
    scan = Scan(z, codes, k=k, **given)
    scan.check()
    given = dict(z=z, codes=codes, k=k, scan=scan.plane, **given)
    assert same(select(**given), call("codebook_quantize", on=reference, **given, return_hits=True))
    return scan


@pytest.mark.parametrize("bias", [None, normal(700, seed=2)], ids=["", "biased"])
def test_rows_of_every_size(bias):
    z, codes = normal(20, 40), normal(700, 40, seed=1)
    for t, size in enumerate((0, 1e-38, 1e-42, 2.0**-125, 1e-20, 1e20, 2.0**90, 1e30, 3e38)):
        z[t] *= size / z[t].abs().max()
    z[9, 7] *= 1e6  # the others keep a few bits
    z[10], z[11, 39], z[12, 0], z[13, 5] = z[9] * 1e-30, NAN, INF, -INF
    scan = scanned(z, codes, 5, bias=bias)
    assert (~scan.scans).nonzero().flatten().tolist() == [11, 12, 13]
    # Of the last two rows the first product of a score may overflow. Of those before no score is out of reach.
    assert (scan.norm == INF).nonzero().flatten().tolist() == [7, 8]
    assert (scan.count[[4, 5, 6]] < PLACES).all() and (scan.count[0] == 700) == (bias is None)


@pytest.mark.parametrize("T", [1, 20])
def test_codes_of_every_size(T):
    z, codes, bias = normal(T, 40), normal(700, 40, seed=1), torch.zeros(700)
    codes[600:] = 0
    factor = cosine(codes)
    sizes = (0, 2.0**-123, -(2.0**-123), 2.0**-124, 1e-42, 2.0**40, -(2.0**40), 2.0**41, 1e38, INF, -INF, NAN)
    bounded = [True, True, True, False, False, True, True, *5 * [False]]
    factor[3 : 3 + len(sizes)] = torch.tensor(sizes)
    scan = scanned(z, codes, 70, factor=factor)
    residual = scan.plane[1][:, 64:128].flatten()
    assert residual[3 : 3 + len(sizes)].isfinite().tolist() == bounded
    for large in (1e38, -1e38, 3e38, INF, -INF, NAN):
        bias[::50] = large
        scanned(z, codes, 70, factor=cosine(codes), bias=bias)
        scanned(1e30 * z, codes, 70, factor=cosine(codes), bias=bias)


# -- bounds without slack: inputs for which one term is all that there is -----------------------------------------


def integers(*shape, most, seed):
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_residual_of_the_codes():
    # The row points where all codes were rounded from: <q, d - step c> is all of ||q|| ||d - step c||.
    z, c = normal(256).sign(), integers(16, 256, most=100, seed=1)
    c[:, 0] = 127 * z[0]
    off = 0.49 * z
    off[0] = 0
    scan = scanned(z.expand(11, -1), (c + torch.tensor([1.0, -1]).repeat(8)[:, None] * off) / 127, 1)
    assert 0.9 < scan.needed < 1


def test_third_digit_of_the_row():
    # Codes of one magnitude are exact; all third digits point in their direction.
    code = normal(256).sign()
    z = 256 * integers(256, most=1000, seed=2) + 127 * code
    z[0] = 127 * 65793
    assert 0.9 < scanned(z.expand(11, -1), torch.stack(4 * [code, -code]), 1).needed < 1


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("T", [1, 8, 32, 72])
def test_low_bytes_of_the_second_sum(T, wgmma):
    """The cheap test drops them: 255 / 256 of a unit of the first sum, which the scale of the best code makes much."""
    z = torch.zeros(T, 8)
    z[:, 0], z[:, 1] = 127 * 65536, 85 * 256  # two digits: nothing is left for the third
    codes, factor = torch.zeros(700, 8), torch.ones(700)
    codes[::2, 4], codes[1::2, 4] = 127, -127  # as bytes they are exact, and not centred
    codes[::7, 0], codes[::7, 4] = 127, 0
    # Sums of 127 and 255, where the others have 127 * 127 and 0: scored a little higher, approximated 0.7 % lower. In a
    # four of codes that score nothing.
    codes[604] = torch.tensor([1.0, 3, 0, 127, 0, 0, 0, 0])
    factor[604] = 1.0001 * (127 * 127 * 256) / (127 * 256 + 255)
    scan = Scan(z, codes, factor=factor, k=1, wgmma=wgmma)
    assert scan.check()["certified"] == T and (scan.tau == scan.score[:, 0]).all()
    assert (scan.score[:, 604] > scan.tau).all()
    given = dict(z=z, codes=codes, factor=factor, k=1, scan=scan.plane)
    assert (select(**given, wgmma=wgmma)[1] == 604).all()
