"""The certified int8 scan: no input makes it miss a code. Plane and bound: test_scan_bounds.py. Calls: test_scan_calling.py.

What the scan finds is compared with the exact kernel (no plane), which the operators' own tests compare with the
reference; and here and there with the reference itself.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import hurtful
import pytest
import torch
from calls import call, cosine, plane_of
from hurtful import normal
from tiers import heavy

from cu_fast import ops
from cu_fast.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
GROUP = 64
INF, NAN = math.inf, math.nan


def select(z, codes, k=4, hits=True, **given):
    return call("codebook_quantize", z=z, codes=codes, k=k, return_hits=hits, **given)


def same(a, b) -> bool:
    return torch.equal(a[1], b[1]) and hurtful.equal(a[0], b[0]) and torch.equal(a[2], b[2])


def check(z, codes, factor=None, **given):
    """Ids, scores and hits of the scan are those of the exact kernel. Returns them."""
    given = dict(z=z, codes=codes, factor=factor, **given)
    want, got = select(**given), select(**given, scan=plane_of(codes, factor))
    for t in (want[1] != got[1]).any(1).nonzero()[:1].flatten().tolist():
        pytest.fail(f"row {t}: ids {got[1][t].tolist()}, should be {want[1][t].tolist()}")
    assert same(want, got)
    return got


# -- inputs made to hurt ---------------------------------------------------------------------------------------


def clusters(n, C, E, spread=1e-4, seed=0):
    return normal(n, E, seed=seed)[torch.arange(C) * 7 % n] + spread * normal(C, E, seed=seed + 1)


def with_rows(x, rows):
    """x with the given {row: value or factor} put over it."""
    x = x.clone()
    for row, change in rows.items():
        x[row] = change(x[row]) if callable(change) else change
    return x


CODES = {
    "gaussian": lambda C, E: normal(C, E),
    "equal": lambda C, E: normal(1, E).expand(C, E).contiguous(),
    "one cluster": lambda C, E: clusters(1, C, E, 1e-5),
    "20 clusters": lambda C, E: clusters(20, C, E),
    "500 clusters": lambda C, E: clusters(500, C, E),
    "mean": lambda C, E: normal(C, E) + 4 * normal(1, E, seed=5),
    "duplicates": lambda C, E: normal(C, E)[torch.arange(C) % (C // 3)],
    "tied": lambda C, E: hurtful.matrix(C, E, "tied", torch.float32, 1),
    "zeros": lambda C, E: torch.zeros(C, E),
    "denormal": lambda C, E: normal(C, E) * 1e-42,
    "some denormal": lambda C, E: with_rows(normal(C, E), dict.fromkeys(range(5, 60), lambda x: x * 1e-42)),
    "huge": lambda C, E: normal(C, E) * 1e38,
    "some huge": lambda C, E: with_rows(normal(C, E), {70: lambda x: x * 1e38, 700: lambda x: x.sign() * 1e38}),
    "some faulty": lambda C, E: with_rows(normal(C, E), {3: NAN, 64: INF, 65: -INF, C - 1: NAN}),
    "mixed": lambda C, E: hurtful.matrix(C, E, "mixed", torch.float32, 6),
    "outliers": lambda C, E: hurtful.matrix(C, E, "outliers", torch.float32, 7),
}
ROWS = {0: lambda x: x, 1: 0.0, 2: lambda x: x * 1e-42, 3: lambda x: x * 1e38, 4: NAN, 5: lambda x: x * 1e-13,
        6: lambda x: x * 1e13, 7: lambda x: x * 1e-3, 8: lambda x: x.abs(), 9: lambda x: -x.abs()}  # fmt: skip


def rows_of(E, T=20, outliers=2):
    """T rows: normal, zero, denormal, huge, faulty ones, and with outliers."""
    z = with_rows(normal(T, E, seed=11), ROWS)
    for t in range(12, 12 + outliers):
        z[t, :: max(1, E // 4)] *= 100.0 ** (t - 11)
    return z


class TestHurtfulInputs:
    @pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
    @pytest.mark.parametrize("kind", CODES)
    def test_codes(self, kind, similarity):
        C, E = 1500, 72
        codes = CODES[kind](C, E)
        packed = ops.pack_codes(codes, similarity, scan="none")
        z = torch.cat([rows_of(E), codes[[0, 9, C - 2]]])
        for seed, (k, share) in enumerate([(1, None), (10, 0.5), (64, 0.01), (C // 8, 1.0)]):
            mask = None if share is None else hurtful.masks(len(z), C, share, seed)
            check(z, codes, packed.factor, bias=packed.bias, k=k, mask=mask)

    @pytest.mark.parametrize("dtype", hurtful.DTYPES)
    @pytest.mark.parametrize("kind", ["gaussian", "tied", "mean", "20 clusters", "outliers"])
    def test_equals_the_reference(self, kind, dtype):
        C, E = 900, 40
        codes, z = CODES[kind](C, E).to(dtype), rows_of(E).to(dtype)
        mask, factor = hurtful.masks(len(z), C, 0.5, 2), cosine(codes)
        given = dict(z=z, codes=codes, factor=factor, k=12, mask=mask)
        assert same(check(**given), call("codebook_quantize", on=reference, **given, return_hits=True))

    @pytest.mark.parametrize("E", [*range(1, 41), 63, 100])
    def test_widths(self, E):
        codes, z = normal(530, E), rows_of(E, 16)
        check(z, codes, cosine(codes), k=5)
        check(z, codes.half(), bias=normal(530, seed=1), k=5)

    @pytest.mark.parametrize("C", [8, 63, 64, 65, 127, 513, 1000])
    def test_last_groups(self, C):
        # Every score is below zero, which is what the places behind the last code would score; and what lies there in
        # memory would win. A mean that takes less than a tenth of the codes, so that they are not centred; and one
        # that takes more.
        for mean in (0.3, 2):
            memory, z = normal(C + 64, 1024) + mean, -torch.ones(3, 1024) - 0.1 * normal(3, 1024, seed=1)
            memory[C:] = -100
            assert C < 500 or (plane_of(memory[:C])[2] != 0).all() == (mean == 2)
            for k, bias in itertools.product({1, C // 8}, (None, torch.full((C,), -1e3))):
                got = check(z, memory[:C], bias=bias, k=k)
                assert (got[1] < C).all() and (got[1] >= 0).all() and (got[0] < 0).all()

    def test_zero_bounds(self):
        # Zero codes and a small row: bounds and scores are exactly 0, and what equals the k-th best stays.
        got = check(torch.full((3, 32), 1e-3), torch.zeros(2000, 32), k=9)
        assert got[1].tolist() == [list(range(9))] * 3

    def test_rounding_alone(self):
        # Bytes, so that the scan's integers are exact. A bias of 2^25 rounds scores to multiples of 4; halfway between
        # them, the roundings of a product decide whether the scan goes down and the score goes up.
        g = torch.Generator().manual_seed(1)
        z = torch.randint(0, 2, (60, 64), generator=g).float() * 2 - 1
        codes = torch.randint(-3, 4, (1500, 64), generator=g).float()
        z[:, 0] = codes[:, 0] = 127
        check(z, codes, bias=torch.full((1500,), 2.0**25), k=9)

    @pytest.mark.parametrize("sign", ["negative", "both", "wide"])
    def test_any_inv_norm(self, sign):
        codes = normal(1200, 48) + (2 if sign != "both" else 0)
        factor = {
            "negative": -cosine(codes), "both": normal(1200, seed=2),
            "wide": normal(1200, seed=2) * 10.0 ** (torch.arange(1200) % 60 - 30),
        }[sign]  # fmt: skip
        check(rows_of(48), codes, factor, k=9)
        check(rows_of(48), codes, factor, bias=normal(1200, seed=3), k=9)

    @pytest.mark.parametrize(
        "of_rows, of_codes", [(1e37, 1e-29), (1e-37, 1e18), (1e-36, 1e-6), (2e30, 1), (5e30, 1), (1e19, 1e18)]
    )
    @pytest.mark.parametrize("mean", [0, 4])
    def test_rows_and_codes_of_far_sizes(self, of_rows, of_codes, mean):
        # Products of a row's own terms, or of a code's, would leave fp32's range where their scores do not. Or scores do,
        # where what approximates them does not: they are Inf, never selected, and must not raise tau.
        codes = (normal(1200, 48) + mean * normal(1, 48, seed=5)) * of_codes
        for bias in (None, normal(1200, seed=3) * of_rows * of_codes):
            check(normal(20, 48, seed=11) * of_rows, codes, bias=bias, k=9)

    @pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38, -3e38, 1e30, -1e30, 1e9, -1e9])
    def test_any_bias(self, value):
        codes, bias = normal(1200, 48), normal(1200, seed=3)
        bias[[0, 700, 1199]] = value
        check(rows_of(48), codes, bias=bias, k=9)

    def test_a_bias_too_small_to_count(self):
        # Codes of zeros score their bias, which is cut: they tie, though the scan would tell the biases apart.
        codes, bias = torch.zeros(1200, 48), torch.arange(1200) * 1e-41
        codes[-3:] = -1  # in no group with the first codes: such a code gives its group's bounds room
        got = check(torch.ones(3, 48), codes, bias=bias, k=9)
        assert got[1].tolist() == [list(range(9))] * 3 and not got[0].any()

    @pytest.mark.parametrize("kind", ["equal", "one cluster", "20 clusters", "zeros"])
    @pytest.mark.parametrize("k", [4, 64])
    def test_buffers_overflow(self, kind, k):
        C, E = 20_000, 32
        codes = CODES[kind](C, E)
        z = torch.cat([normal(3, E, seed=4), codes[:1]])
        check(z, codes, k=k)
        mask = hurtful.masks(4, C, 0.5, 1)
        check(z, codes, cosine(codes), k=k, mask=mask)
        check(z, codes, k=k, mask=mask, hits=False)

    @pytest.mark.parametrize("best_in", ["the sample", "the rest", "one group"])
    @pytest.mark.parametrize("k", [1, 9, 64])
    def test_a_sample_that_lies(self, best_in, k):
        # 200 groups, of which every fifteenth or so is the sample of the first threshold.
        C, E = 200 * GROUP, 48
        direction, place = normal(E, seed=5), torch.arange(C) // GROUP
        sampled = torch.isin(place, torch.arange(13) * 200 // 13)
        best = {"the sample": sampled, "the rest": ~sampled, "one group": place == 15}[best_in]
        codes = normal(C, E) + torch.where(best, 3.0, 0.0)[:, None] * direction
        z = torch.cat([direction + 0.1 * normal(9, E, seed=6), normal(9, E, seed=7)])
        check(z, codes, k=k)
        for share in (0.5, 0.97):
            check(z, codes, cosine(codes), k=k, mask=hurtful.masks(len(z), C, share, 1))
            check(z, codes, k=k, mask=hurtful.masks(len(z), C, share, 2), hits=False)

    @pytest.mark.parametrize("C, k", [(512, 64), (512, 65), (512, 512), (8192, 1024), (8192, 1025), (8200, 1024)])
    def test_limits_of_k(self, C, k):
        codes, z = normal(C, 32), rows_of(32, 14)
        check(z, codes, cosine(codes), k=k, mask=hurtful.masks(14, C, 0.3, 1))

    @pytest.mark.parametrize("k", [64, 65, 512])
    @pytest.mark.parametrize("T", [65, 128, 256, 257])
    def test_blocks_of_wide_rows(self, T, k):
        codes, z = normal(512, 2048).bfloat16(), normal(T, 2048, seed=1)
        check(z, codes, k=k)

    def test_a_narrower_exact_kernel(self):
        # The scan is given but not taken, for each of the reasons there are, in blocks of many tokens.
        codes, z = normal(600, 33), normal(300, 33, seed=1)
        check(z, codes, k=76)
        check(z, codes, bias=torch.full((600,), INF), k=3)

    def test_masks_of_ranges(self):
        C, E = 1300, 40
        codes = normal(C, E)
        z = torch.cat([codes[::100], rows_of(E)])
        ranges = [(0, 64), (64, 128), (32, 96), (1, 2), (0, C - 3), (C - 30, C), (640, 1280), (0, C)]
        bits = torch.zeros(len(ranges), (C + 31) // 32 * 32, dtype=torch.bool)
        for u, (first, last) in enumerate(ranges):
            bits[u, first:last] = True
        table = (bits.reshape(len(ranges), -1, 32).long() << torch.arange(32)).sum(2)
        table = torch.where(table >= 2**31, table - 2**32, table).int()
        for shift in range(len(ranges) + 1):
            row = ((torch.arange(len(z)) + shift) % (len(ranges) + 1) - 1).int()
            for hits in (False, True):
                got = check(z, codes, k=11, mask=(table, row), hits=hits)
                assert not reference.is_deleted(got[1], table, row).any()

    @pytest.mark.parametrize("k", [1, 16])
    def test_the_best_are_deleted(self, k):
        # Deleted codes ride along for the hits: nothing of theirs may rule out a code that is left.
        codes, z = normal(3000, 24), normal(40, 24, seed=1)
        best = call("sae_encode", on=reference, x=z, W_enc=codes).topk(200).indices
        bits = torch.zeros(40, 94 * 32, dtype=torch.bool).scatter_(1, best, True)
        table = (bits.reshape(40, 94, 32).long() << torch.arange(32)).sum(2)
        table = torch.where(table >= 2**31, table - 2**32, table).int()
        for hits in (False, True):
            got = check(z, codes, k=k, mask=(table, torch.arange(40).int()), hits=hits)
            assert (got[1] >= 0).all() and (not hits or got[2].tolist() == [k] * 40)

    @pytest.mark.parametrize("kind", ["few", "many", "all but few", "one huge"])
    def test_outliers_of_rows(self, kind):
        C, E = 2000, 130
        z, codes = normal(30, E, seed=1), normal(C, E)
        share = {"few": 0.02, "many": 0.3, "all but few": 0.97, "one huge": 0.0}[kind]
        z = torch.where(torch.rand(z.shape, generator=torch.Generator().manual_seed(3)) < share, 100 * z, z)
        if kind == "one huge":
            z[:, 77] = 1e6
        for given in (codes, codes + 4 * normal(1, E, seed=2)):
            check(z, given, k=8)
            check(z, given, cosine(given), bias=normal(C, seed=4), k=8)

    @pytest.mark.parametrize("layout", ["rows", "columns", "transposed"])
    def test_strides(self, layout):
        z, codes = normal(20, 30), normal(800, 30, seed=1)
        packed = ops.pack_codes(codes, scan="int8")
        got = ops.codebook_quantize(hurtful.strided(z, layout), packed, k=6)
        assert same(got[:2] + (got[0],), ops.codebook_quantize(z, packed._replace(scan=None), k=6)[:2] + (got[0],))
        check(z, hurtful.strided(codes, layout), k=6)

    def test_pre_bias_of_the_encoder(self):
        # What is scanned is x - b_pre: zeros in one row, and beyond fp32's range.
        x, W = normal(30, 48) + 1e5, normal(700, 48, seed=1)
        x[3], x[4] = 1e5, NAN
        given = dict(x=x, W_enc=W, b_enc=normal(700, seed=2), k=9, mask=hurtful.masks(30, 700, 0.5, 1))
        for b_pre in (None, torch.full((48,), 1e5), torch.full((48,), 3e38)):
            for relu in (False, True):
                want, got = (
                    call("sae_encode_topk", **given, b_pre=b_pre, relu=relu, scan=scan) for scan in (None, plane_of(W))
                )
                assert torch.equal(got[1], want[1]) and hurtful.equal(got[0], want[0])


# -- what does not matter, and what does -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "mean", "20 clusters", "mixed"])
def test_a_row_does_not_depend_on_the_batch(kind):
    codes = CODES[kind](2000, 40)
    plane, z = plane_of(codes), rows_of(40, 300)
    batch = select(z, codes, k=9, scan=plane)
    for t in (*range(16), 63, 64, 255, 256, 299):
        alone = select(z[t : t + 1], codes, k=9, scan=plane)
        assert torch.equal(alone[1][0], batch[1][t]) and hurtful.equal(alone[0][0], batch[0][t])


@pytest.mark.parametrize("T, C", [(1, 30_000), (7, 9000), (300, 2000)])
def test_threads(T, C):
    codes, z, before = normal(C, 64), rows_of(64, max(T, 14))[:T], torch.get_num_threads()
    plane, mask = plane_of(codes), hurtful.masks(T, C, 0.4, 1)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(select(z, codes, k=20, mask=mask, scan=plane))
    torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])
    assert same(results[0], select(z, codes, k=20, mask=mask))


def test_when_the_scan_is_taken():
    """A plane of other codes misleads the scan, and so tells whether it ran."""
    codes = normal(8200, 32)
    wrong, z = plane_of(-30 * codes), normal(5, 32, seed=1)

    def ran(k, bias=None, n=8200):
        plane = (wrong[0][: (n + 63) // 64], wrong[1][: (n + 63) // 64], wrong[2])
        given = dict(z=z, codes=codes[:n], bias=bias, k=k)
        return not same(select(**given), select(**given, scan=plane))

    # With a large k so misled a scan scores everything, and is right again.
    assert ran(1) and ran(8) and ran(8, n=4096)
    assert not ran(1025) and not ran(513, n=4096)
    assert ran(1, torch.full((8200,), 2.0**9))
    assert not ran(1, torch.full((8200,), NAN)) and not ran(1, torch.full((8200,), INF))


def test_no_tokens_by_codes_matrix_is_built():
    """Peak memory of the call, in a process of its own, stays far under T * C floats (328 MB)."""
    done = subprocess.run(
        [sys.executable, "-c", """
import resource, torch
from cu_fast import ops
torch.manual_seed(0)
T, C = 2048, 40_000
z, codes = torch.randn(T, 8), torch.randn(C, 8)
table, row = torch.full((1, C // 32), 0x0f0f, dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
packed = ops.pack_codes(codes, scan="int8")
ops.codebook_quantize(z[:8], packed, k=4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.codebook_quantize(z, packed, k=4, mask_table=table, mask_row=row, return_hits=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (T * C * 4))
"""],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1 / 8


@pytest.mark.skipif(sys.platform != "linux", reason="a process's address space is limited")
@heavy
def test_few_codes_need_little_memory():
    """Room for candidates is for as many as there are codes, not for the 4096 of a large codebook: 2 MB, not 15."""
    done = subprocess.run(
        [sys.executable, "-c", """
import resource, torch
from pathlib import Path
from cu_fast import ops
torch.set_num_threads(1)
z, packed = torch.randn(512, 64), ops.pack_codes(torch.randn(512, 64), scan="int8")
ops.codebook_quantize(z[:1], packed, k=8)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 8_000_000,) * 2)
ops.codebook_quantize(z, packed, k=8)
"""],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_inputs_are_not_written_to():
    codes, z = normal(900, 40), rows_of(40)
    mask, plane = hurtful.masks(len(z), 900, 0.5, 1), plane_of(codes)
    given = [z, codes, *mask, *plane]
    before = [t.clone() for t in given]
    select(z, codes, mask=mask, scan=plane)
    assert all(hurtful.equal(a, b) for a, b in zip(given, before))


def test_no_tokens_and_one_code():
    assert check(normal(0, 24), normal(600, 24))[1].shape == (0, 4)
    check(normal(3, 24), normal(1, 24), k=1)
