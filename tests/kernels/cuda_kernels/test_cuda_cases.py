"""The CUDA kernels, run on a CPU by the emulation: what they must refuse, and the edges of what they must do."""

from __future__ import annotations

import deletions
import hurtful
import numpy as np
import pytest
import torch
from calls import call, cosine
from hurtful import normal
from test_cuda_kernels import INF, NAN, bottleneck, deleted, emulated, plane_of, pytestmark, same, select
from tiers import TEST_ALL, heavies

from cu_fast.kernels import reference

__all__ = ["pytestmark"]


@pytest.fixture(params=["every code", "scan"])
def plane(request):
    return plane_of if request.param == "scan" else lambda *_: None


class TestMaskRowsThatDoNotExist:
    """The host cannot look at them on a device: the kernels have to, and nothing may come out."""

    C, k = 300, 5

    def mask(self, T):
        row = torch.tensor([0, 5, -2, -1, 2, 3, 2**31 - 1, -(2**31)]).repeat(T)[:T].int()
        return (hurtful.masks(T, self.C, 0.4, 1)[0], row), (row >= -1) & (row < 3)

    @pytest.mark.parametrize("T", [3, 20, *heavies(8, 140)])
    @pytest.mark.parametrize("k", [5, 20])
    def test_selection(self, plane, T, k):
        z, codes = normal(T, 24), normal(self.C, 24, seed=1)
        mask, exists = self.mask(T)
        clean = mask[0], mask[1][exists]
        want = call("codebook_quantize", on=reference, z=z[exists], codes=codes, k=k, mask=clean, return_hits=True)
        for hits in (True, False):
            scores, ids, counts = select(z, codes, k=k, mask=mask, hits=hits, scan=plane(codes))
            assert (ids[~exists] == -1).all() and scores[~exists].isnan().all()
            assert same((scores[exists], ids[exists]), want[:2])
            assert not hits or (torch.equal(counts[exists], want[2]) and (counts[~exists] == 0).all())
        scores, ids = emulated("sae_encode_topk", x=z, W_enc=codes, k=k, mask=mask, relu=True, scan=plane(codes))
        assert (ids[~exists] == -1).all() and scores[~exists].isnan().all()
        assert torch.equal(ids[exists], want[1]) and torch.equal(scores[exists], want[0].relu())

    @pytest.mark.parametrize("reselect", [True, False])
    @pytest.mark.parametrize("score_weights", [True, False])
    @pytest.mark.parametrize("T, k", [(3, 5), (20, 20), *heavies((140, 5))])
    def test_bottleneck(self, plane, T, k, score_weights, reselect):
        z, codes, table = normal(T, 24), normal(self.C, 24, seed=1), normal(self.C, 600, seed=2)
        mask, exists = self.mask(T)
        given = dict(k=k, reselect=reselect, scan=plane(codes), score_weights=score_weights)
        y = bottleneck(z, codes, table, mask=mask, **given)
        want = bottleneck(z, codes, table, mask=(mask[0], mask[1].clamp(-1, 2)), **given)
        assert y[~exists].isnan().all() and torch.equal(y[exists], want[exists]) and want.isfinite().all()

    def test_decode(self):
        table, ids = normal(self.C, 600), torch.randint(-1, self.C, (8, 5)).int()
        mask, exists = self.mask(8)
        y = emulated("masked_decode", ids=ids, table=table, mask=mask, mean=True)
        assert y[~exists].isnan().all() and y[exists].isfinite().all()
        # A table of no masks: -1 is the only row.
        row = torch.tensor([-1, 0, -1, 0, -1, -1, -1, -1]).int()
        y = emulated("masked_decode", ids=ids, table=table, mask=(mask[0][:0], row), mean=True)
        assert torch.equal(y.isnan().any(1), row == 0)


def test_ids_that_are_none_of_the_tables():
    """A NaN row, without a read outside of the table; the rows beside it are as always."""
    table = normal(40, 600).half()
    ids = torch.randint(0, 40, (7, 150)).int()
    want = emulated("masked_decode", ids=ids, table=table)
    wrong = ids.clone()
    wrong[1, 0], wrong[2, 149], wrong[3, 7], wrong[4, 131], wrong[5, 5] = 40, -2, 2**31 - 1, -(2**31), 41
    for mask in (None, (torch.full((1, 2), -1).int(), torch.tensor([-1, 0, 0, 0, 0, 0, -1]).int())):
        weights = None if mask is None else torch.zeros(7, 150)
        y = emulated("masked_decode", ids=wrong, weights=weights, table=table, mask=mask)
        assert y[1:6].isnan().all() and y[[0, 6]].isfinite().all()
        assert mask is not None or torch.equal(y[[0, 6]], want[[0, 6]])


def test_a_weight_beside_no_code():
    table, ids = normal(5, 9), torch.tensor([[0, -1], [-1, 1], [-1, -1]]).int()
    weights = torch.tensor([[1, INF], [NAN, 1], [0, NAN]])
    y = emulated("masked_decode", ids=ids, weights=weights, table=table)
    assert torch.equal(y[0], table[0]) and y[1:].isnan().all()


@pytest.mark.parametrize("T", [3, 20, *heavies(140)])
def test_faulty_rows_are_nan_and_alone(plane, T):
    z, codes, table = normal(T, 40), normal(300, 40, seed=1), normal(300, 600, seed=2)
    faults = [t for t in (1, 2, 17, 135, 136) if t < T]
    broken = z.clone()
    for i, t in enumerate(faults):
        broken[t, 39 - i] = (NAN, INF, -INF)[i % 3]
    rest = [t for t in range(T) if t not in faults]
    for k in (5, 30):
        want, got = (select(x, codes, k=k, scan=plane(codes)) for x in (z, broken))
        assert (got[1][faults] == -1).all() and got[0][faults].isnan().all()
        assert all(torch.equal(a[rest], b[rest]) for a, b in zip(want, got))
        for score_weights in (False, True):
            given = dict(codes=codes, table=table, k=k, scan=plane(codes), score_weights=score_weights)
            want, got = (bottleneck(x, **given) for x in (z, broken))
            assert got[faults].isnan().all() and torch.equal(got[rest], want[rest])


@pytest.mark.parametrize("T", [1, 30, 70, *heavies(4, 9, 140)])
def test_a_row_does_not_depend_on_the_others_nor_on_the_machine(plane, T):
    z, codes, table = normal(T, 48), normal(700, 48, seed=1), normal(700, 40, seed=2)
    z[T // 2, 3] = 500.0  # an outlier
    mask = hurtful.masks(T, 700, 0.3, 2)
    for k in (9, 20):
        batch = select(z, codes, k=k, mask=mask, scan=plane(codes))
        for t in {0, T // 2, T - 1}:
            for multiprocessors in (1, 40):
                alone = mask[0], mask[1][t : t + 1]
                row = select(z[t : t + 1], codes, k=k, mask=alone, scan=plane(codes), multiprocessors=multiprocessors)
                assert all(torch.equal(a[0], b[t]) for a, b in zip(row, batch))
        given = dict(codes=codes, table=table, k=k, reselect=True, scan=plane(codes))
        y, alone = bottleneck(z, mask=mask, **given), bottleneck(z[:1], mask=(mask[0], mask[1][:1]), **given)
        assert torch.equal(alone[0], y[0])


def test_the_order_of_threads_does_not_matter(plane):
    z, codes, table = (
        hurtful.matrix(20, 48, "tied", torch.float32, 0),
        normal(700, 48, seed=1),
        normal(700, 600, seed=2),
    )
    z[7] *= 1e-3
    z[7, ::16] = 300.0
    mask = hurtful.masks(20, 700, 0.3, 2)
    results = []
    for seed in range(20 if TEST_ALL else 6):
        receipt = torch.zeros(2, dtype=torch.int64)
        given = dict(codes=codes, k=9, mask=mask, scan=plane(codes), seed=seed)
        y = bottleneck(z, table=table, reselect=True, score_weights=True, receipt=receipt, **given)
        results.append((*select(z, **given), y, receipt))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("T", [4, 16, 80])
def test_tiles_of_a_part_follow_each_other(T):
    """A block scores tile after tile: no warp may begin the next while another reads the keys of the last."""
    z, codes = normal(T, 20), normal(500, 20, seed=1)
    want = call("codebook_quantize", on=reference, z=z, codes=codes, k=60)
    for seed in range(6):
        assert same(select(z, codes, k=60, hits=False, multiprocessors=1, seed=seed)[:2], want[:2])


@pytest.mark.parametrize("T", [0, 5, *heavies(1, 137)])
@pytest.mark.parametrize("C, k", [(1, 1), (129, 129), (300, 37), (700, 1), *heavies((2, 2), (63, 63))])
@pytest.mark.parametrize("deleted", [False, True])
def test_edges(plane, T, C, k, deleted):
    """No tokens, one code, k = C, fewer codes than a tile, all deleted, all scores equal."""
    z, codes = normal(T, 20), normal(1, 20, seed=1).expand(C, 20)
    mask = (torch.full((1, (C + 31) // 32), -1).int(), torch.zeros(T).int()) if deleted else None
    given = dict(codes=codes, k=k, mask=mask, scan=plane(codes))
    scores, ids, hits = select(z, **given)
    assert ids.shape == scores.shape == (T, k) and hits.shape == (T,)
    assert torch.equal(ids, (torch.full((T, k), -1) if deleted else torch.arange(k).expand(T, k)).int())
    assert (hits == (k if deleted else 0)).all()
    assert same((scores, ids, hits), call("codebook_quantize", on=reference, z=z, return_hits=True, **given))
    y = bottleneck(z, table=torch.ones(C, 3), reselect=True, **given)
    assert torch.equal(y, torch.full((T, 3), 0.0 if deleted else float(k)))


def test_no_columns(plane):
    codes, receipt = normal(64, 8), torch.zeros(2, dtype=torch.int64)
    assert emulated("masked_decode", ids=torch.zeros(3, 2).int(), table=normal(5, 0)).shape == (3, 0)
    y = bottleneck(normal(3, 8), codes, normal(64, 0), k=2, scan=plane(codes), receipt=receipt)
    assert y.shape == (3, 0)
    assert emulated("sae_encode", x=normal(3, 8), W_enc=normal(0, 8), relu=True).shape == (3, 0)


def far_apart(width: int, seed: int) -> torch.Tensor:
    """17 rows, 2^27 elements apart: the last begins at 2^31. Pages that are not written cost no memory."""
    memory = np.zeros(2**31 + width, dtype=np.int16)
    x = torch.from_numpy(memory).view(torch.bfloat16).as_strided((17, width), (2**27, 1))
    return x.copy_(normal(17, width, seed=seed))


@pytest.mark.parametrize("width", [24, 23])  # whole fours, and not
def test_offsets_beyond_two_to_the_31(plane, width):
    x, codes = far_apart(width, 0), far_apart(width, 1)
    near_x, near_codes = x.contiguous(), codes.contiguous()
    packed = plane(near_codes)
    for rows in (17, 4):
        want = call("codebook_quantize", on=reference, z=near_x[-rows:], codes=near_codes, k=2, return_hits=True)
        assert same(select(x[-rows:], codes, k=2, scan=packed), want)
        want = call("sae_encode", on=reference, x=near_x[-rows:], W_enc=near_codes)
        assert torch.equal(emulated("sae_encode", x=x[-rows:], W_enc=codes), want)
    ids = torch.arange(17).flip(0)[:, None].int()
    want = call("masked_decode", on=reference, ids=ids, table=near_codes, residual=near_x)
    assert torch.equal(emulated("masked_decode", ids=ids, table=codes, residual=x), want)
    given = deletions.deletion(17, width, width, 20, M=9, dtype=torch.bfloat16)
    deleted(given | dict(x=x, residual=x))


def test_inputs_are_not_written_to(plane):
    z, W_enc, codes, table = normal(9, 24), normal(40, 24, seed=1), normal(700, 40, seed=2), normal(700, 24, seed=3)
    mask, factor = hurtful.masks(9, 700, 0.4, 5), cosine(codes)
    digits, W = reference.pack_digits(codes)[0], reference.pack_digits(W_enc)[:2]
    b_enc, b_pre, bias, b_dec = normal(40), normal(24), normal(700), normal(24)
    scaled, plain = plane(codes, factor), plane(table)
    ids, weights = torch.randint(0, 700, (9, 4)).int(), normal(9, 4)
    planes = (*(scaled or ()), *(plain or ()))
    given = [z, *W, digits, factor, table, *mask, b_enc, b_pre, bias, b_dec, *planes, ids, weights]
    before = [t.clone() for t in given]
    emulated(
        "codebook_bottleneck", x=z, digits=digits, table=table, W_digits=W[0], W_factor=W[1], b_enc=b_enc, b_pre=b_pre, relu=True, factor=factor, bias=bias, k=8, mask=mask,
        reselect=True, scan=scaled, b_dec=b_dec, score_weights=True, mean=True,
    )  # fmt: skip
    emulated("sae_encode_topk", x=z, W_enc=table, b_enc=bias, b_pre=b_pre, k=8, mask=mask, relu=True, scan=plain)
    emulated("masked_decode", ids=ids, weights=weights, table=table, bias=b_dec, residual=z, mask=mask, mean=True)
    assert all(map(torch.equal, given, before))
    given = deletions.deletion(9, 24, 40, 9, M=5, scale=1, floor=True)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    assert deleted(given)[1].any() and all(torch.equal(given[name], value) for name, value in before.items())


def test_a_plane_of_other_codes_is_refused():
    z, codes, table = normal(3, 24), normal(700, 24), normal(700, 8)
    for other, word in ((normal(600, 24), r"\[10, 6, 64, 4\]"), (normal(700, 20), r"\[11, 5, 64, 4\]")):
        plane = plane_of(other)
        for attempt in (
            lambda plane=plane: select(z, codes, scan=plane),
            lambda plane=plane: emulated("sae_encode_topk", x=z, W_enc=codes, k=4, scan=plane),
            lambda plane=plane: bottleneck(z, codes, table, k=4, scan=plane),
        ):
            with pytest.raises(RuntimeError, match=rf"scan_plane.*{word}"):
                attempt()
    plane = plane_of(codes)
    with pytest.raises(RuntimeError, match="scan_terms"):
        select(z, codes, scan=(plane[0], plane[1][:5], plane[2]))
    with pytest.raises(RuntimeError, match="given together"):
        select(z, codes, scan=(plane[0], None, plane[2]))


@pytest.mark.parametrize("k", [0, 701])
def test_k_that_is_not_possible_is_refused(k):
    with pytest.raises(RuntimeError, match=f"k is {k}"):
        select(normal(3, 8), normal(700, 8), k=k)
