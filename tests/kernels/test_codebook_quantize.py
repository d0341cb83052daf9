"""codebook_quantize: the reference against the definition, and the native kernel against the reference, bit for bit."""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import hurtful
import memory
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.kernels.reference import LARGEST


def integers(row: list[float], largest: int, step: Fraction) -> list[int]:
    """A row divided by a step and rounded, ties to even."""
    made = [round(Fraction(entry) / step) for entry in row]
    assert max(map(abs, made)) <= largest
    return made


def power(row: list[float]) -> int:
    """The largest a up to 125 of which no entry times 2^a exceeds LARGEST; 0 of a row of zeros."""
    most, a = max(map(abs, row)), 125
    if most == 0:
        return 0
    while Fraction(most) * Fraction(2) ** a > LARGEST:
        a -= 1
    return a


def rounded(x: Fraction | float) -> float:
    """To fp32, ties to even; what is below 2^-125 becomes 0."""
    if not isinstance(x, Fraction):
        return x  # NaN or Inf
    if x == 0:
        return 0.0
    exponent = max(math.frexp(float(x))[1] - 24, -149)
    unit = Fraction(2) ** exponent
    y = round(x / unit) * unit
    if abs(y) >= 2**128:
        return math.copysign(math.inf, x)
    return float(y) if abs(y) >= Fraction(2) ** -125 else 0.0


def times(x: float, y: float) -> float:
    return rounded(Fraction(x) * Fraction(y)) if math.isfinite(x) and math.isfinite(y) else x * y


def plus(x: float, y: float) -> float:
    return rounded(Fraction(x) + Fraction(y)) if math.isfinite(x) and math.isfinite(y) else x + y


def definition(z, codes, similarity, k, deleted):
    """The contract, word for word, in Python's integers and fractions: one token, no tiles, no digits."""
    z = z.tolist()
    a = power(z)
    q = integers(z, LARGEST, Fraction(2) ** -a)
    scores = []
    for code in codes.tolist():
        most = max(map(abs, code))
        step = np.float32(0)
        if most >= 2.0**-100:
            step = np.float32(most / LARGEST)
            while Fraction(float(step)) * LARGEST < Fraction(most):
                step = np.nextafter(step, np.float32(np.inf))
            while Fraction(float(np.nextafter(step, np.float32(0)))) * LARGEST >= Fraction(most):
                step = np.nextafter(step, np.float32(0))
        step = float(step)
        # The quotient is a double's.
        p = [round(Fraction(entry / step)) if step else 0 for entry in code]
        squares = rounded(Fraction(sum(entry * entry for entry in p)))
        factor = step
        if similarity == "cosine":
            factor = float(np.float32(1) / np.float32(math.sqrt(squares))) if squares else 0.0
        total = sum(map(operator.mul, q, p))
        score = times(times(rounded(Fraction(total)), 2.0**-a), factor)
        if similarity == "l2":
            score = plus(score, times(-0.5, times(times(squares, step), step)))
        scores.append(score)
    running = [j for j in range(len(scores)) if math.isfinite(scores[j]) and not deleted[j]]
    best = sorted(running, key=lambda j: (-scores[j], j))[:k]
    return [scores[j] for j in best] + [0.0] * (k - len(best)), best + [-1] * (k - len(best))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("kind", ["gaussian", "tied", "equal", "denormal", "huge", "outliers", "zeros"])
def test_reference_is_the_definition(similarity, kind):
    T, E, C, k = 3, 21, 40, 7
    z = hurtful.matrix(T, E, kind, torch.float32, 1).clamp(-3e38, 3e38)
    # Tiny on both sides, every product would vanish.
    codes = hurtful.matrix(C, E, "gaussian" if kind == "denormal" else kind, torch.float32, 2).clamp(-3e38, 3e38)
    packed = ops.pack_codes(codes, similarity)
    table, row = hurtful.masks(T, C, 0.3, 3)
    got = ops.codebook_quantize(z, packed, k=k, mask_table=table, mask_row=row, impl="reference")
    for t in range(T):
        deleted = [row[t] >= 0 and bool((table[row[t], j // 32] >> (j % 32)) & 1) for j in range(C)]
        scores, ids = definition(z[t], codes, similarity, k, deleted)
        assert got.ids[t].tolist() == ids
        assert got.scores[t].tolist() == scores


@pytest.mark.parametrize("cuts", [[1], [7, 64, 65], [250, 499]])
def test_sums_of_any_split_of_the_width_add_up(cuts):
    q, p = (integers_of_rows(seed) for seed in (1, 2))
    whole = reference.integer_dot(q, p)
    bounds = list(zip([0, *cuts], [*cuts, q.shape[1]]))
    assert torch.equal(whole, sum(reference.integer_dot(q[:, a:b], p[:, a:b]) for a, b in bounds))
    assert whole.tolist() == [[sum(map(operator.mul, a, b)) for b in p.tolist()] for a in q.tolist()]


def integers_of_rows(seed):
    """Eight rows of 500 integers; the last two at their limits."""
    rows = torch.randint(-LARGEST, LARGEST + 1, (8, 500), generator=torch.Generator().manual_seed(seed))
    rows[6:] = torch.where(rows[6:] < 0, -LARGEST, LARGEST)
    return rows.int()


@settings(max_examples=examples(300), deadline=None)
@given(
    T=st.integers(0, 40) | st.sampled_from([65, 130, 257]), E=st.integers(1, 70),
    C=st.integers(1, 300) | st.integers(300, 700),
    k=st.integers(1, 70) | st.integers(1, 9), scan=st.sampled_from(["int8", "none"]),
    similarity=st.sampled_from(["cosine", "dot", "l2", "biased"]), share=hurtful.shares,
    z_kind=hurtful.kinds, code_kind=hurtful.kinds, z_dtype=hurtful.dtypes, code_dtype=hurtful.dtypes,
    layout=hurtful.layouts, seed=hurtful.seeds,
)  # fmt: skip
def test_cpu_equals_reference(
    T, E, C, k, scan, similarity, share, z_kind, code_kind, z_dtype, code_dtype, layout, seed
):
    if T > 64:  # more than a block of the exact kernel: kept small, as the reference is slow
        E, C = min(E, 20), min(C, 300)
    k = min(k, C)
    z = hurtful.strided(hurtful.matrix(T, E, z_kind, z_dtype, seed), layout)
    codes = hurtful.strided(hurtful.matrix(C, E, code_kind, code_dtype, seed + 1), layout)
    bias = hurtful.matrix(1, C, "gaussian", torch.float32, seed + 2)[0] if similarity == "biased" else None
    packed = ops.pack_codes(codes, "cosine" if similarity == "biased" else similarity, bias, scan)
    table, row = (None, None) if share is None else hurtful.masks(T, C, share, seed + 3)
    arguments = dict(k=k, mask_table=table, mask_row=row, return_hits=True)
    want = ops.codebook_quantize(z, packed, **arguments, impl="reference")
    got = ops.codebook_quantize(z, packed, **arguments, impl="cpu")
    assert torch.equal(got.ids, want.ids)
    assert hurtful.equal(got.scores, want.scores)
    assert torch.equal(got.hits, want.hits)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
class TestSelection:
    def test_order_is_score_then_id(self, impl):
        codes = torch.tensor([[1.0, 0], [2, 0], [2, 0], [-1, 0], [2, 0]])
        got = ops.codebook_quantize(torch.tensor([[1.0, 0]]), ops.pack_codes(codes, "dot"), k=5, impl=impl)
        assert got.ids.tolist() == [[1, 2, 4, 0, 3]]
        assert got.scores.tolist() == [[2, 2, 2, 1, -1]]

    def test_a_row_does_not_depend_on_the_others(self, impl):
        z, packed = torch.randn(37, 48), ops.pack_codes(torch.randn(2100, 48))
        batch = ops.codebook_quantize(z, packed, k=9, impl=impl)
        for t in (0, 17, 36):
            alone = ops.codebook_quantize(z[t : t + 1], packed, k=9, impl=impl)
            assert torch.equal(alone.ids[0], batch.ids[t]) and torch.equal(alone.scores[0], batch.scores[t])

    def test_faulty_rows_and_codes_are_never_selected(self, impl):
        z, codes = torch.randn(4, 16), torch.randn(50, 16)
        z[1, 3], z[2, 0], codes[7, 1], codes[9, 2] = torch.nan, -torch.inf, torch.nan, torch.inf
        got = ops.codebook_quantize(z, ops.pack_codes(codes), k=50, impl=impl)
        assert (got.ids[1:3] == -1).all() and got.scores[1:3].isnan().all()
        assert not torch.isin(got.ids[[0, 3]], torch.tensor([7, 9])).any()
        assert (got.ids[[0, 3]] == -1).sum(1).tolist() == [2, 2]

    def test_everything_deleted(self, impl):
        packed = ops.pack_codes(torch.randn(70, 8))
        table, row = torch.full((1, 3), -1, dtype=torch.int32), torch.tensor([0, -1], dtype=torch.int32)
        got = ops.codebook_quantize(
            torch.randn(2, 8), packed, k=4, mask_table=table, mask_row=row, return_hits=True, impl=impl
        )
        assert got.ids[0].tolist() == [-1] * 4 and got.scores[0].tolist() == [0] * 4
        assert (got.ids[1] >= 0).all() and got.hits.tolist() == [4, 0]

    def test_hits_count_what_the_mask_took(self, impl):
        z, packed = torch.randn(6, 24), ops.pack_codes(torch.randn(400, 24))
        free = ops.codebook_quantize(z, packed, k=8, impl=impl).ids
        table, row = hurtful.masks(6, 400, 0.4, 5)
        got = ops.codebook_quantize(z, packed, k=8, mask_table=table, mask_row=row, return_hits=True, impl=impl)
        assert got.hits.tolist() == reference.is_deleted(free, table, row).sum(1).tolist()
        assert not reference.is_deleted(got.ids, table, row).any()

    def test_inputs_are_not_written_to(self, impl):
        z, codes = torch.randn(5, 24), torch.randn(90, 24)
        table, row = hurtful.masks(5, 90, 0.4, 5)
        before = [t.clone() for t in (z, codes, table, row)]
        ops.codebook_quantize(z, ops.pack_codes(codes), k=8, mask_table=table, mask_row=row, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(before, (z, codes, table, row)))


def test_offsets_beyond_two_to_the_31():
    """3 C W > 2^31: the last code is found. Zero pages that are never written cost no memory."""
    C, E = 2**14 + 5, 2**16 - 64
    digits = torch.from_numpy(np.zeros((C, 3, E), dtype=np.int8))
    digits[-1, 0, -1], digits[C // 2, 0, 0] = 2, 1
    z = torch.zeros(1, E)
    z[0, 0] = z[0, -1] = 1.0
    factor = torch.full((C,), 2.0**-16)
    got = ops.codebook_quantize(z, ops.PackedCodes(digits, factor, None, E, "dot"), k=3, impl="cpu")
    assert got.ids.tolist() == [[C - 1, C // 2, 0]] and got.scores.tolist() == [[2, 1, 0]]


packed_64 = ops.pack_codes(torch.ones(64, 8))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(z=torch.ones(2, 9)), ValueError, ["z", "9", "8"]),
        (dict(z=torch.ones(2, 3, 8)), ValueError, ["z", "two dimensions"]),
        (dict(z=torch.ones(2, 8, dtype=torch.float64)), TypeError, ["z", "float64"]),
        (dict(z=[[1.0] * 8]), TypeError, ["z", "list"]),
        (dict(z=None), TypeError, ["z is NoneType"]),
        (dict(k=0), ValueError, ["k is 0", "64"]),
        (dict(k=65), ValueError, ["k is 65", "64"]),
        (dict(k=2.0), TypeError, ["k is 2.0"]),
        (dict(k=True), TypeError, ["k is True"]),
        (dict(mask_row=None), ValueError, ["mask_row is None"]),
        (dict(mask_table=None), ValueError, ["mask_table is None"]),
        (dict(mask_table=torch.zeros(1, 3, dtype=torch.int32)), ValueError, ["mask_table", "2]"]),
        (dict(mask_table=torch.zeros(1, 2, dtype=torch.int64)), TypeError, ["mask_table", "int64"]),
        (dict(mask_table=[[0, 0]]), TypeError, ["mask_table is list"]),
        (dict(mask_row=torch.zeros(3, dtype=torch.int32)), ValueError, ["mask_row", "[2]"]),
        (dict(mask_row=torch.tensor([0, 1], dtype=torch.int32)), ValueError, ["mask_row holds 1"]),
        (dict(mask_row=torch.tensor([-2, 0], dtype=torch.int32)), ValueError, ["mask_row holds -2"]),
        (dict(impl="fast"), ValueError, ["impl", "'fast'"]),
        (dict(z=torch.ones(2, 8, requires_grad=True)), RuntimeError, ["z requires grad", "cu_fast.nn"]),
        (dict(z=torch.ones(2, 8, device="meta")), ValueError, ["meta"]),
        (dict(mask_table=torch.zeros(1, 2, dtype=torch.int32, device="meta")), ValueError, ["mask_table is on meta"]),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_wrong_arguments_are_named(change, error, words, impl):
    arguments = dict(
        z=torch.ones(2, 8), k=4, impl=impl,
        mask_table=torch.zeros(1, 2, dtype=torch.int32), mask_row=torch.zeros(2, dtype=torch.int32),
    ) | change  # fmt: skip
    with pytest.raises(error) as caught:
        ops.codebook_quantize(arguments.pop("z"), packed_64, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(4),), ValueError, ["codes", "two dimensions"]),
        ((torch.ones(4, 2, dtype=torch.int32),), TypeError, ["codes", "int32"]),
        ((torch.ones(0, 2),), ValueError, ["codes", "at least one"]),
        ((torch.ones(4, 2), "euclid"), ValueError, ["similarity", "euclid"]),
        ((torch.ones(4, 2), "cosine", torch.ones(3)), ValueError, ["bias", "[4]"]),
        ((torch.ones(4, 2), "l2", torch.ones(4)), ValueError, ["bias", "l2"]),
        ((torch.ones(1, 65_536),), ValueError, ["65536 wide", "65535"]),
        ((torch.ones(4, 2), "dot", None, "fp32"), ValueError, ["scan", "'none'"]),
    ],
)
def test_pack_codes_names_wrong_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.pack_codes(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_meta_tensors_have_the_right_shapes():
    packed = ops.pack_codes(torch.ones(64, 8, device="meta"))
    got = ops.codebook_quantize(torch.ones(5, 8, device="meta"), packed, k=3, return_hits=True)
    assert got.ids.shape == got.scores.shape == (5, 3) and got.ids.dtype == torch.int32 and got.hits.shape == (5,)


def test_no_tokens_by_codes_matrix_is_built():
    setup = """
    import torch
    from cu_fast import ops
    g = torch.Generator().manual_seed(0)
    z, packed = torch.randn(2048, 8, generator=g), ops.pack_codes(torch.randn(40_000, 8, generator=g), scan="none")
    ops.codebook_quantize(z[:64], packed, k=4, impl="cpu")
    """
    matrix = 2048 * 40_000 * 4
    assert memory.growth(setup, "ops.codebook_quantize(z, packed, k=4, impl='cpu')") < matrix / 8
