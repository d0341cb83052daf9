"""masked_decode: the native kernel against the reference, bit for bit, and both against the equation."""

from __future__ import annotations

import hurtful
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from cu_fast import ops


@settings(max_examples=examples(120), deadline=None)
@given(
    T=st.integers(0, 30), D=st.integers(1, 150), C=st.integers(1, 200), k=st.integers(1, 20), share=hurtful.shares,
    kind=hurtful.kinds, dtype=hurtful.dtypes, weight_dtype=st.sampled_from([None, *hurtful.DTYPES]),
    other_dtype=hurtful.dtypes, extras=st.integers(0, 3), reduce=st.sampled_from(["sum", "mean"]),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]), layout=hurtful.layouts, seed=hurtful.seeds,
)  # fmt: skip
def test_cpu_equals_reference(
    T, D, C, k, share, kind, dtype, weight_dtype, other_dtype, extras, reduce, ids_dtype, layout, seed
):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, C, (T, k), generator=g, dtype=ids_dtype)
    weights = None if weight_dtype is None else hurtful.matrix(T, k, "faulty", weight_dtype, seed)
    table = hurtful.strided(hurtful.matrix(C, D, kind, dtype, seed + 1), layout)
    bias = hurtful.matrix(1, D, "gaussian", other_dtype, seed + 2)[0] if extras & 1 else None
    residual = hurtful.strided(hurtful.matrix(T, D, kind, other_dtype, seed + 3), layout) if extras & 2 else None
    mask = (None, None) if share is None else hurtful.masks(T, C, share, seed + 4)
    want = ops.masked_decode(ids, weights, table, bias, residual, *mask, reduce=reduce, impl="reference")
    got = ops.masked_decode(ids, weights, table, bias, residual, *mask, reduce=reduce, impl="cpu")
    assert got.dtype == dtype and hurtful.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_is_the_equation(impl, reduce):
    ids, weights, table = torch.randint(0, 60, (7, 5)), torch.rand(7, 5), torch.randn(60, 33)
    bias, residual = torch.randn(33), torch.randn(7, 33)
    want = (weights[..., None].double() * table[ids].double()).sum(1)
    want = (want / 5 if reduce == "mean" else want) + bias.double() + residual.double()
    got = ops.masked_decode(ids, weights, table, bias, residual, reduce=reduce, impl=impl)
    # 5 products and 7 sums of numbers below about 16.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=12 * 16 * 2**-24)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_deleted_code_adds_nothing_and_a_mean_still_divides_by_k(impl):
    table = torch.tensor([[1.0], [torch.inf], [8.0], [torch.nan]])
    mask_table, mask_row = torch.tensor([[0b1010]], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2, 3], [1, 3, -1, -1]])
    y = ops.masked_decode(ids, None, table, None, None, mask_table, mask_row, reduce="mean", impl=impl)
    assert y.tolist() == [[9 / 4], [0]]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_faulty_row_of_a_selection_stays_visible(impl):
    z, codes = torch.randn(3, 8), torch.randn(20, 8)
    z[1, 2] = torch.nan
    picked = ops.codebook_quantize(z, ops.pack_codes(codes), k=3, impl=impl)
    y = ops.masked_decode(picked.ids, picked.scores, codes, residual=torch.ones(3, 8), impl=impl)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(ids=torch.zeros(2, 3)), ValueError, ["ids", "int32"]),
        (dict(ids=torch.full((2, 3), 9)), ValueError, ["ids holds 9", "8"]),
        (dict(ids=torch.full((2, 3), -2)), ValueError, ["ids holds -2"]),
        (dict(ids=torch.full((2, 3), 9, dtype=torch.int32)), ValueError, ["ids holds 9", "8"]),
        (dict(ids=torch.full((2, 3), -2, dtype=torch.int32)), ValueError, ["ids holds -2"]),
        (dict(ids=torch.full((2, 3), 2**32)), ValueError, [f"ids holds {2**32}"]),
        (dict(weights=torch.ones(2, 4)), ValueError, ["weights", "[2, 3]"]),
        (dict(table=torch.ones(9, 4, 1)), ValueError, ["table", "two dimensions"]),
        (dict(bias=torch.ones(5)), ValueError, ["bias", "[4]"]),
        (dict(residual=torch.ones(3, 4)), ValueError, ["residual", "[2, 4]"]),
        (dict(bias=torch.ones(4, device="meta")), ValueError, ["bias is on meta"]),
        (dict(reduce="max"), ValueError, ["reduce", "max"]),
        (dict(mask_row=torch.zeros(2, dtype=torch.int32)), ValueError, ["mask_table is None"]),
        (dict(table=torch.ones(9, 4, requires_grad=True)), RuntimeError, ["table requires grad"]),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_wrong_arguments_are_named(change, error, words, impl):
    arguments = dict(ids=torch.zeros(2, 3, dtype=torch.int32), weights=None, table=torch.ones(9, 4), impl=impl)
    with pytest.raises(error) as caught:
        ops.masked_decode(**(arguments | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)
