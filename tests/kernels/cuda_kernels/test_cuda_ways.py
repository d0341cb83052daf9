"""The ways that a row may go through a selection on a GPU, each taken and counted. Run on a CPU by the emulation."""

from __future__ import annotations

import hurtful
import pytest
import torch
from calls import call
from hurtful import normal
from test_cuda_kernels import INF, NAN, bottleneck, emulated, kernels, plane_of, pytestmark, same, select
from test_cuda_scan import CHUNK, PLACES, Scan, sampled_groups
from tiers import heavies

from cu_fast.kernels import reference

__all__ = ["pytestmark"]
PLAN = ("scans", "chunk", "parts", "part_codes", "capacity", "score_parts", "sample_groups", "rank")


def plan(T, C, E, k, scans, multiprocessors=3):
    made = emulated("select_plan", T=T, C=C, E=E, k=k, has_plane=scans, multiprocessors=multiprocessors)
    return dict(zip(PLAN, made, strict=True))


def wanted(z, codes, k, mask=None):
    return call("codebook_quantize", on=reference, z=z, codes=codes, k=k, mask=mask, return_hits=True)


def agrees(z, codes, k, mask=None, **how):
    got = select(z, codes, k=k, mask=mask, scan=plane_of(codes), **how)
    assert same(got, wanted(z, codes, k, mask))
    return got


class TestWays:
    @pytest.mark.parametrize("k", [1, 5, 12, 13, 30])
    def test_certified(self, k):
        z, codes = normal(CHUNK, 40), normal(900, 40, seed=1)
        scan = Scan(z, codes, k=k)
        assert scan.check()["certified"] >= CHUNK - 2
        # Not many more than k of them, as the sample is good and the bounds are narrow.
        assert scan.count.float().mean() < 4 * k + 30
        agrees(z, codes, k)

    def test_overflowed(self):
        z = normal(CHUNK, 40)
        for codes in (normal(1, 40, seed=1).expand(700, 40), normal(1, 40, seed=1) + 1e-5 * normal(700, 40)):
            assert Scan(z, codes, k=5).check()["overflowed"] == CHUNK
            agrees(z, codes, 5)
        # The places are enough for as many, and not for one more.
        for C, way in ((PLACES, "certified"), (PLACES + 1, "overflowed")):
            codes = normal(1, 40, seed=1).expand(C, 40)
            scan = Scan(z, codes, k=5)
            assert scan.check()[way] == CHUNK and (scan.count == C).all()
            agrees(z, codes, 5)

    @pytest.mark.parametrize(
        "C", [16, 40, PLACES, *heavies(100, 256)]
    )  # scored by teams of 32, 16, 8 and 4; a second window
    @pytest.mark.parametrize("E", [40, 1100, *heavies(600)])
    def test_every_candidate_counts(self, C, E):
        # All codes are candidates, in no order, and each is among the best of some row.
        z, codes = normal(24, E), normal(1, E, seed=1) + 1e-6 * normal(C, E)
        scan = Scan(z, codes, k=C // 8)
        assert scan.check()["certified"] == 24 and (scan.count == C).all()
        mask = hurtful.masks(24, C, 0.5, 2)
        for multiprocessors in (1, 40):
            agrees(z, codes, C // 8, multiprocessors=multiprocessors)
            agrees(z, codes, C // 8, mask, multiprocessors=multiprocessors)

    def test_fewer_than_k_are_left(self):
        # Of codes, of those that are deleted, and of scores that are finite.
        z, codes, bias = normal(9, 20), normal(200, 20, seed=1), torch.zeros(200)
        bias[22:], bias[175:] = NAN, INF
        for deleted in (190, 15, 5):
            bits = torch.arange(224).reshape(7, 32) % 200 < deleted
            mask = ((bits.long() << torch.arange(32)).sum(1).to(torch.int32)[None], torch.zeros(9).int())
            for k in (13, 25):
                given = dict(z=z, codes=codes, bias=bias, k=k, mask=mask, scan=plane_of(codes))
                want = call("codebook_quantize", on=reference, **given, return_hits=True)
                assert same(select(**given), want) and same(select(**given | dict(scan=None)), want)

    @pytest.mark.parametrize("k", [5, 40, *heavies(12, 70)])
    @pytest.mark.parametrize("T", [1, 3, 20])
    def test_one_part_holds_the_best(self, T, k):
        z, apart, masks = normal(T, 20), normal(3000, 20, seed=1), hurtful.masks(T, 3000, 0.5, 2)
        apart[64:128] *= 10
        apart[1000:1003] = apart[64]  # equal scores, in another part
        equal = apart[:1].expand(3000, -1)  # the smallest ids are the best
        assert plan(T, 3000, 20, k, False, 40)["parts"] > 8
        for codes in (apart, equal):
            for mask in (None, masks):
                assert same(select(z, codes, k=k, mask=mask, multiprocessors=40), wanted(z, codes, k, mask))

    def test_more_columns_than_a_block_decodes(self):
        z, codes, table = normal(3, 24), normal(300, 24, seed=1), normal(300, 2100, seed=2)
        for k in (5, 20):  # merged in shared memory, or by the one block of a token
            receipt, expected = torch.zeros(2, 2, dtype=torch.int64)
            given = dict(codes=codes, table=table, k=k, mask=hurtful.masks(3, 300, 0.3, 3), reselect=True)
            want = call("codebook_bottleneck", on=reference, x=z, **given, receipt=expected)
            for scan in (None, plane_of(codes)):
                receipt.zero_()
                assert torch.equal(bottleneck(z, **given, scan=scan, receipt=receipt), want)
                assert torch.equal(receipt, expected) and expected[1] > 0

    def test_misled(self):
        # The best are all in the sample: more are expected than there are.
        z, codes, mask = normal(CHUNK, 40), normal(1100, 40, seed=1), hurtful.masks(CHUNK, 1100, 0.1, 2)
        for group in sampled_groups(1100, 30):
            codes[64 * group : 64 * group + 64 : 8] *= 10
        for given in (dict(k=30), dict(k=30, mask=mask, counts_hits=True)):
            assert Scan(z, codes, **given).check()["misled"] > CHUNK / 4
        agrees(z, codes, 30)
        agrees(z, codes, 30, mask)

    @pytest.mark.parametrize("C, k, groups", [(8, 1, 1), (70, 8, 2), (900, 5, 4), (2600, 5, 8), (2600, 60, 15)])
    def test_sample(self, C, k, groups):
        # A quarter of the codes, no more than 512, no less than 16 k; four groups to a block if there are many tokens.
        assert plan(3, C, 40, k, True)["sample_groups"] == groups == len(sampled_groups(C, k))
        for T, wgmma in ((3, False), (40, False), (40, True)):
            z, codes, mask = normal(T, 40), normal(C, 40, seed=1), hurtful.masks(T, C, 0.3, 2)
            Scan(z, codes, k=k, mask=mask, wgmma=wgmma).check()

    def test_mask_rows_that_do_not_exist(self):
        row = torch.tensor([-1, 0, 2, 3, -2, 5] + 14 * [1]).int()
        scan = Scan(torch.ones(20, 40), normal(700, 40), k=5, mask=(torch.zeros(3, 22).int(), row))
        assert scan.check()["exact"] == 3 and (~scan.scans).nonzero().flatten().tolist() == [3, 4, 5]

    @pytest.mark.parametrize("k", [5, 20])
    def test_deleted_codes_ride_along(self, k):
        z, codes = normal(CHUNK, 40), normal(900, 40, seed=1)
        mask = hurtful.masks(CHUNK, 900, 0.3, 2)
        scan = Scan(z, codes, k=k, mask=mask, counts_hits=True)
        assert scan.check()["certified"] > CHUNK / 2
        flagged = sum(int(scan.candidates(t)[1].sum()) for t in range(CHUNK))
        assert flagged > CHUNK
        scores, ids, hits = agrees(z, codes, k, mask)
        assert hits.sum() > CHUNK
        # They go nowhere if hits are not asked for.
        assert Scan(z, codes, k=k, mask=mask).check()["certified"] > CHUNK / 2
        assert same(select(z, codes, k=k, mask=mask, hits=False, scan=plane_of(codes))[:2], (scores, ids))

    def test_everything_deleted(self):
        z, codes = normal(9, 40), normal(150, 40, seed=1)
        mask = torch.full((1, 5), -1).int(), torch.zeros(9).int()
        assert (Scan(z, codes, k=5, mask=mask).count == 0).all()
        scan = Scan(z, codes, k=5, mask=mask, counts_hits=True)
        scan.check()
        assert (scan.tau == -INF).all() and (scan.count == 150).all()
        agrees(z, codes, 5, mask)

    @pytest.mark.parametrize("C", [150, 700])
    def test_zero_bounds(self, C):
        # Scores are exactly 0, and bounds what a score of 0 may be off by.
        z, codes = torch.full((3, 32), 1e-3), torch.zeros(C, 32)
        scan = Scan(z, codes, k=9)
        assert scan.check()["certified" if C < PLACES else "overflowed"] == 3
        assert (scan.upper[:, :C].nan_to_num(1) < 2.0**-119).all() if C < PLACES else (scan.count == C).all()
        assert agrees(z, codes, 9)[1].tolist() == 3 * [list(range(9))]

    def test_a_row_of_zeros_and_codes_without_bounds(self):
        # 0 times Inf is no bound: every code stays. Scores are the biases.
        z, codes, bias = torch.zeros(3, 32), normal(150, 32), normal(150, seed=1)
        scan = Scan(z, codes, factor=torch.full((150,), 2.0**41), bias=bias, k=9)
        assert scan.check()["certified"] == 3 and (scan.count == 150).all() and (scan.score == bias).all()

    def test_biases_that_are_cut(self):
        # A code of zeros scores its bias alone, which is 0 if it is too small: then ids decide, in bounds too.
        z, codes, bias = normal(3, 32), torch.zeros(700, 32), 1e-41 * torch.arange(700.0)
        assert Scan(z, codes, bias=bias, k=9).check()["exact"] == 0
        got = select(z, codes, k=9, bias=bias, scan=plane_of(codes))
        assert got[1].tolist() == 3 * [list(range(9))] and (got[0] == 0).all()

    @pytest.mark.parametrize(
        "T, kernel, stage",  # of so many steps of 32 entries
        [
            (4, "scan_codes<4", 32), (5, "scan_codes<8", 16), (32, "scan_codes<32", 4), (72, "scan_codes<64", 2),
            (33, "scan_codes_sm90<", 2), (65, "scan_codes_sm90<", 2),
            *heavies(
                (1, "scan_codes<4", 32), (8, "scan_codes<8", 16), (9, "scan_codes<32", 4), (33, "scan_codes<64", 2),
                (64, "scan_codes_sm90<", 2), (72, "scan_codes_sm90<", 2),
            ),
        ],
    )  # fmt: skip
    def test_tiles_and_widths(self, T, kernel, stage):
        kernels()
        wgmma = kernel == "scan_codes_sm90<"
        # A third tile, which a block begins while others read its second; more stages than the four that there are.
        for C, E in ((264, 1), (600, 64 * stage - 5), (8, 32 * (4 * stage + 5) + 7)):
            z, codes = normal(T, E), normal(C, E, seed=1)
            Scan(z, codes, k=1, wgmma=wgmma).check()
            agrees(z, codes, 1, wgmma=wgmma)
        ran = {name for name in kernels() if name.startswith("scan_codes")}
        # One block per tile of tokens takes all three tiles, and keeps the tokens if they are few steps.
        assert len(ran) == 2 + (wgmma and T > 64) and all(name.startswith(kernel) for name in ran)

    def test_widest(self):
        # The largest sums: all three digits of z are 127, the bytes of two codes 127 and -127.
        E = 65535
        z, codes = torch.full((1, E), 127 * 65793.0), normal(16, E, seed=1)
        codes[3], codes[4] = 1, -1
        assert Scan(z, codes, k=2).check()["certified"] == 1
        agrees(z, codes, 2)

    @pytest.mark.parametrize("T", [CHUNK + 1, *heavies(2 * CHUNK + 9)])
    def test_chunks(self, T):
        z, codes, table = normal(T, 24), normal(500, 24, seed=1), normal(500, 20, seed=2)
        z[CHUNK + 0, 3], z[CHUNK - 1, 2] = NAN, 300.0
        mask = hurtful.masks(T, 500, 0.3, 3)
        for k in (5, 20):
            got = agrees(z, codes, k, mask)
            for reselect in (True, False):
                receipt, expected = torch.zeros(2, 2, dtype=torch.int64)
                given = dict(
                    x=z, codes=codes, k=k, mask=mask, reselect=reselect, scan=plane_of(codes), table=table,
                    score_weights=True,
                )  # fmt: skip
                want = call("codebook_bottleneck", on=reference, **given, receipt=expected)
                assert hurtful.equal(bottleneck(**given, receipt=receipt), want)
                assert torch.equal(receipt, expected) and (not reselect or receipt[1] == got[2].sum())

    def test_memory_that_is_bounded(self):
        """Wide rows, and many keys: fewer tokens at a time than there are; of the encoder too."""
        for T, E, C, k, chunk in ((136, 5300, 9, 2, 68), (40, 9, 2000, 2000, 20)):
            assert plan(T, C, E, k, False)["chunk"] == chunk
            z, codes = normal(T, E), normal(C, E, seed=1)
            assert same(select(z, codes, k=k, hits=True), wanted(z, codes, k))
        x, W_enc = normal(136, 5300), normal(5, 5300, seed=1)
        given = dict(x=x, W_enc=W_enc, relu=False)
        assert torch.equal(emulated("sae_encode", **given), call("sae_encode", on=reference, **given))

    def test_plans_are_all_taken(self):
        """Of every kind: lists in shared memory or not, one part or several, up to more than a warp's."""
        seen = set()
        for T, C, k, scans, multiprocessors in (
            (1, 900, 5, False, 3), (136, 900, 5, False, 1), (3, 900, 64, False, 3), (3, 900, 65, False, 3),
            (3, 900, 900, False, 3), (20, 900, 100, False, 40), (1, 5000, 13, False, 40), (1, 5000, 12, True, 40),
            (2, 5000, 300, True, 40), (30, 900, 12, True, 40), (30, 900, 65, True, 3), (136, 900, 100, True, 3),
        ):  # fmt: skip
            p = plan(T, C, 10, k, scans, multiprocessors)
            assert p["scans"] == scans
            parts = 33 if p["parts"] > 32 else min(p["parts"], 2)
            seen |= {("lists", p["scans"], p["capacity"] > 64), ("merged", k > 12), ("parts", p["scans"], parts)}
            seen |= {("score parts", min(p["score_parts"], 2))} if scans else set()
            z, codes = normal(T, 10), normal(C, 10, seed=1)
            mask = hurtful.masks(T, C, 0.3, 3)
            agrees(z, codes, k, mask, multiprocessors=multiprocessors)
            got = select(z, codes, k=k, mask=mask, multiprocessors=multiprocessors)
            assert same(got, wanted(z, codes, k, mask))
        two = {False, True}
        assert seen >= {("lists", a, b) for a in two for b in two} | {("merged", a) for a in two}
        assert seen >= {("parts", scans, parts) for scans in two for parts in (1, 2, 33)}
        assert seen >= {("score parts", 1), ("score parts", 2)}
