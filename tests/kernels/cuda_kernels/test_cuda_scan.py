"""The scan of the CUDA kernels, run on a CPU by the emulation: its bounds, held against exact scores.

What comes out of it is compared in test_cuda_kernels.py; which way rows go, in test_cuda_ways.py.
"""

from __future__ import annotations

import hurtful
import torch
from calls import cosine
from hurtful import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_kernels import INF, NAN, emulated, plane_of, pytestmark

from cu_fast.kernels import reference

__all__ = ["pytestmark"]
PLACES = 300  # kCandidates of the emulation
CHUNK = 136


def deleted_of(mask, T, C):
    ids = torch.arange(C)[None]
    if mask is None:
        return torch.zeros(T, C, dtype=torch.bool)
    return reference.is_deleted(ids, mask[0], mask[1].clamp(-1, len(mask[0]) - 1))


class Scan:
    """What a scan leaves of one chunk, by the names of ScanWork, beside the scores (NaN: not finite)."""

    def __init__(self, z, codes, pre=None, factor=None, bias=None, k=4, mask=None, counts_hits=False, **how):
        digits, step, _ = reference.pack_digits(codes)
        factor = step if factor is None else factor
        self.plane = plane_of(codes, factor)
        state = emulated(
            "scan_state", z=z, codes=codes, pre=pre, factor=factor, bias=bias, k=k, mask=mask or (None, None),
            counts_hits=counts_hits, scan=self.plane, **how,
        )  # fmt: skip
        self.exact, self.count, self.tau, self.id, self.lower, self.upper, self.scored, self.maxima = state[:8]
        terms, low, high, self.high_steps = state[8:]
        self.unit, self.mean_dot, self.norm_in, self.miss, self.half_l1_out, self.slop = terms[:, :6].double().T
        self.start, self.high_start = terms[:, 6:].contiguous().view(torch.int32).T
        self.low, self.high = self.rows(low), self.rows(high)
        q, unit = reference.fix_rows(z.float() if pre is None else z.float() - pre)
        self.z = q * unit.double()[:, None]  # what is scanned
        total = reference.integer_dot(q, reference.integers_of(digits, z.shape[1]))
        score = reference.scores_of(total, unit, factor, bias)
        self.score = torch.where(score.isfinite(), score, NAN)
        self.k, (self.T, self.C), self.counts_hits = k, score.shape, counts_hits
        self.deleted = deleted_of(mask, self.T, self.C)
        self.alive = ~self.deleted & ~self.score.isnan()

    def rows(self, fragments):
        """Bytes of each row, read back from [T / 8, steps, 2, 8 tokens, 4 words]."""
        blocks, steps = fragments.shape[:2]
        by_token = fragments.view(torch.int8).reshape(blocks, steps, 2, 8, 4, 4).permute(0, 3, 1, 2, 4, 5)
        return by_token.reshape(blocks * 8, steps * 32).double()

    def candidates(self, t):
        """Of a row: ids, whether they are deleted, lower, upper, scored."""
        n = min(int(self.count[t]), PLACES)
        raw = self.id[t, :n]
        return (raw & 0x7FFFFFFF).long(), raw < 0, self.lower[t, :n], self.upper[t, :n], self.scored[t, :n]

    def check(self):
        """Every bound holds, and nothing that may be among the best is missing. Returns ways of the rows, counted."""
        ways = dict.fromkeys(("certified", "overflowed", "exact"), 0)
        for t in range(self.T):
            if self.exact[t]:
                ways["exact"] += 1
                continue
            best = self.score[t][self.alive[t]].sort(descending=True).values
            kth = best[self.k - 1] if len(best) >= self.k else torch.tensor(-INF)
            assert self.tau[t] <= kth
            # tau is the k-th largest of the maxima, each of which is the largest lower bound of four codes.
            maxima = self.maxima[t].flatten()
            assert self.tau[t] == maxima.sort(descending=True).values[self.k - 1]
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
        return ways

    def check_maxima(self):
        tiles, visited = (self.C + 255) // 256, self.maxima.shape[1]
        for visit in range(visited):
            codes = torch.arange(256) + visit * tiles // visited * 256
            inside = torch.where(codes < self.C, codes, 0)
            runs = (codes < self.C) & ~self.deleted[:, inside]
            best = torch.where(runs & ~self.score[:, inside].isnan(), self.score[:, inside], -INF)
            of_four = best.reshape(self.T, 64, 4).amax(2)
            assert (self.maxima[:, visit] <= of_four)[self.exact == 0].all()

    def check_terms(self):
        """The row's terms against fp64: never too small, and not much too large."""
        steps = (self.high[: self.T].reshape(self.T, -1, 32) != 0).any(2)
        bits = (self.high_steps[:, :, None] >> torch.arange(32) & 1).reshape(self.T, -1) != 0
        assert torch.equal(bits[:, : steps.shape[1]], steps) and not bits[:, steps.shape[1] :].any()
        use = self.exact == 0
        z, E = self.z.double()[use], self.z.shape[1]
        low, high = (x[: self.T][use] for x in (self.low, self.high))
        assert (low[:, E:] == 0).all() and (high[:, E:] == 0).all()
        assert (low.abs() <= 127).all() and (high.abs() <= 64).all()
        assert torch.equal(self.start[use].double(), -128 * low.sum(1))
        assert torch.equal(self.high_start[use].double(), -128 * high.sum(1))
        low, high, norm = low[:, :E], high[:, :E], z.norm(dim=1)
        assert (self.high[self.T :] == 0).all() or self.T % 8  # what is there is multiplied, and never looked at
        outliers = high != 0
        assert (outliers.sum(1) <= max(4, E // 64)).all()
        zero = torch.zeros_like(z)
        epsilon = 1.01 * 2**-24 * (E // 16 + 40)
        rounding = 2**-22 * norm
        for bound, value, room in (
            (self.norm_in[use], torch.where(outliers, zero, z).norm(dim=1), 2**-59),
            (self.miss[use], (z - self.unit[use, None] * (low + 254 * high)).norm(dim=1), 2 * rounding),
            (self.half_l1_out[use], 0.5 * torch.where(outliers, z.abs(), zero).sum(1), 0),
            (self.slop[use], norm * epsilon, 1e-6 * norm * epsilon),
        ):
            assert (bound >= value * (1 - 1e-15)).all() and (bound <= value * (1 + 1e-3) + room + 1e-44).all()
        mean = self.plane[2].double()
        assert ((self.mean_dot[use] - z @ mean).abs() <= norm * mean.norm() * epsilon).all()
        return outliers


@settings(max_examples=150, deadline=None)
@given(
    T=st.integers(1, 20) | st.sampled_from([8, 9, 16, 17, 64, 65, 129, 136]), E=st.integers(1, 80) | st.integers(80, 400),
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
    scan = Scan(z, codes, pre=pre, factor=factor, **options)
    scan.check()
    scan.check_terms()


# -- bounds without slack: inputs for which one term is all that there is -----------------------------------------


class TestEachTerm:
    """Errors as large as the bound allows: were it smaller by a tenth, a score would lie outside of it."""

    E, C, k = 256, 72, 9

    def gaps(self, z, codes, bias=None, T=11):
        """Bounds of up to 8 codes, which hold. Fewer than k are not deleted, so that all of them are candidates.

        Returns how far the score is from the middle of its bounds, and half of their distance.
        """
        places = torch.tensor([0, 3, 17, 31, 32, 63, 64, 71])[: len(codes)]
        all_codes = torch.zeros(self.C, self.E).index_copy(0, places, codes)
        all_bias = None if bias is None else torch.zeros(self.C).index_copy(0, places, bias)
        bits = torch.full((3,), -1, dtype=torch.int64)
        for place in places.tolist():
            bits[place // 32] &= ~(1 << place % 32)
        mask = bits.int()[None], torch.zeros(T).int()
        scan = Scan(z.expand(T, -1), all_codes, bias=all_bias, k=self.k, mask=mask)
        assert scan.check() == dict(certified=T, overflowed=0, exact=0) and (scan.count == len(codes)).all()
        scan.check_terms()
        ids, _, lower, upper, _ = scan.candidates(T - 1)
        by_place = ids.sort().indices
        lower, upper = lower[by_place].double(), upper[by_place].double()
        return (scan.score[T - 1, places] - (lower + upper) / 2).abs(), (upper - lower) / 2

    def signs(self, seed=0):
        return normal(self.E, seed=seed).sign()

    def bytes(self, *shape, most, seed):
        return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()

    def test_residual_of_the_codes(self):
        # The row points where all codes were rounded from: <z, d - step q> is all of ||z|| ||d - step q||.
        z, q = self.signs(), self.bytes(8, self.E, most=100, seed=1)
        q[:, 0] = 127 * z[0]
        off = 0.49 * z
        off[0] = 0
        turns = torch.tensor([1.0, -1]).repeat(4)[:, None]
        gap, bound = self.gaps(z, (q + turns * off) / 127)
        assert (gap > 0.9 * bound).all()

    def test_rounding_of_the_row(self):
        # Codes of one magnitude are exact; the row is half a unit off, in their direction.
        code = self.signs()
        z = self.bytes(self.E, most=126, seed=2) + 0.49 * code
        z[0] = 127
        gap, bound = self.gaps(z, torch.stack([code, -code]))
        assert (gap > 0.9 * bound).all()

    def test_outliers(self):
        # Few entries, 128 times the others, and there all codes are half a step off.
        z = self.signs()
        z[1:5] *= 128
        q = self.bytes(8, self.E, most=100, seed=3)
        q[:, 0] = 127
        off = torch.zeros(self.E)
        off[1:5] = 0.49 * z[1:5].sign()
        turns = torch.tensor([1.0, -1]).repeat(4)[:, None]
        gap, bound = self.gaps(z, (q + turns * off) / 127)
        assert (gap > 0.9 * bound).all()

    def beyond(self, scan, *terms):
        """How many scores would lie outside of their bounds, were these all the terms."""
        beyond = 0
        for t in range(scan.T):
            ids, _, lower, upper, _ = scan.candidates(t)
            groups = scan.plane[1][ids // 64].double()
            residual, size = (groups.gather(1, (at + ids % 64)[:, None])[:, 0] for at in (64, 128))
            parts = dict(
                residual=scan.norm_in[t] * residual, miss=scan.miss[t] * size, slop=scan.slop[t] * groups[:, 195]
            )
            gap = (scan.score[t, ids].double() - (lower.double() + upper.double()) / 2).abs()
            beyond += int((gap > sum(parts[term] for term in terms)).sum())
        return beyond

    def test_rounding_of_the_sums(self):
        # All codes are their mean: little is left of them but the rounding of two dot products.
        z, codes = normal(CHUNK, 999, seed=1), normal(1, 999, seed=2).expand(self.C, 999)
        scan = Scan(z, codes, k=self.k)
        assert scan.check()["certified"] == CHUNK
        assert self.beyond(scan, "residual", "miss") > 1000 and self.beyond(scan, "residual", "miss", "slop") == 0

    def test_bias(self):
        # So large that two sums which hardly differ may be rounded to neighbours, 8 apart.
        z, codes = normal(CHUNK, self.E), normal(self.C, self.E, seed=1)
        bias = 1e8 + 3e7 * torch.rand(self.C, generator=torch.Generator().manual_seed(2))
        scan = Scan(z, codes, bias=bias, k=self.k)
        scan.check()
        assert self.beyond(scan, "residual", "miss", "slop") > 3
        # Where it may overflow, nothing is known.
        for large in (2.0**41, -1e38, INF, NAN):
            bias[2] = large
            scan = Scan(z, codes, bias=bias, k=self.k)
            scan.check()
            for t in range(CHUNK):
                ids, _, lower, upper, _ = scan.candidates(t)
                assert lower[ids == 2].tolist() == [-INF] and upper[ids == 2].tolist() == [INF]
