"""sae_encode: dense and fused top-k, the native kernel against the reference, bit for bit."""

from __future__ import annotations

import hurtful
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from cu_fast import ops
from cu_fast.kernels.reference.fixed import LARGEST, LEAST


def arguments_of(T, D, E, kind, x_dtype, w_dtype, layout, biases, seed, w_kind="gaussian"):
    x = hurtful.strided(hurtful.matrix(T, D, kind, x_dtype, seed), layout)
    W_enc = hurtful.strided(hurtful.matrix(E, D, w_kind, w_dtype, seed + 1), layout)
    b_enc = hurtful.matrix(1, E, "gaussian", w_dtype, seed + 2)[0] if biases & 1 else None
    b_pre = hurtful.matrix(1, D, "gaussian", x_dtype, seed + 3)[0] if biases & 2 else None
    return x, W_enc, b_enc, b_pre


def encode(x, W_enc, b_enc=None, b_pre=None, scan="none", **options):
    return ops.sae_encode(x, ops.pack_codes(W_enc, "dot", b_enc, scan), b_pre, **options)


shapes = dict(
    T=st.integers(0, 30), D=st.integers(1, 70), E=st.integers(1, 90), kind=hurtful.kinds, x_dtype=hurtful.dtypes,
    w_dtype=hurtful.dtypes, layout=hurtful.layouts, biases=st.integers(0, 3), seed=hurtful.seeds,
    activation=st.sampled_from(["relu", "none"]),
)  # fmt: skip


@settings(max_examples=examples(80), deadline=None)
@given(**shapes)
def test_dense_cpu_equals_reference(activation, **shape):
    arguments = arguments_of(**shape)
    want = encode(*arguments, activation=activation, impl="reference")
    assert want.dtype == torch.float32
    assert hurtful.equal(encode(*arguments, activation=activation, impl="cpu"), want)


@settings(max_examples=examples(150), deadline=None)
@given(
    k=st.integers(1, 90) | st.integers(1, 9), share=hurtful.shares, scan=st.sampled_from(["int8", "none"]),
    **shapes | dict(
        T=st.integers(0, 30) | st.sampled_from([65, 130, 257]), E=st.integers(1, 90) | st.integers(90, 700),
        w_kind=hurtful.kinds,
    ),
)  # fmt: skip
def test_topk_cpu_equals_reference(activation, k, share, scan, **shape):
    if shape["T"] > 64:  # more than a block of the exact kernel: kept small, as the reference is slow
        shape |= dict(D=min(shape["D"], 20), E=min(shape["E"], 300))
    arguments = arguments_of(**shape)
    T, E = shape["T"], shape["E"]
    table, row = (None, None) if share is None else hurtful.masks(T, E, share, shape["seed"])
    options = dict(k=min(k, E), mask_table=table, mask_row=row, activation=activation)
    want = encode(*arguments, **options, impl="reference")
    assert (ops.pack_codes(arguments[1], "dot", scan=scan).scan is not None) == (scan == "int8")
    got = encode(*arguments, **options, scan=scan, impl="cpu")
    assert torch.equal(got.ids, want.ids) and hurtful.equal(got.scores, want.scores)
    assert got.hits is None


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_dense_is_the_equation(impl, activation):
    x, W, b, p = torch.randn(9, 40), torch.randn(24, 40), torch.randn(24), torch.randn(40)
    want = (x.double() - p.double()) @ W.double().T + b.double()
    want = want.relu() if activation == "relu" else want
    got = encode(x, W, b, p, activation=activation, impl=impl)
    # 40 products of two entries below 5, each of which is off by at most 2^-23 of its row's largest.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=40 * 2 * 25 * 2**-23)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_sum_is_rounded_once(impl):
    """Above the middle of two numbers of fp32 by what fp64 rounds away."""
    x = torch.tensor([[2.0**22] * 1024 + [2.0**15, 1.0, 0.0]])
    W = torch.tensor([[2.0**22] * 1024 + [2.0**15, 1.0, LARGEST]])  # its step is 1
    assert encode(x, W, activation="none", impl=impl).item() == 2.0**54 + 2.0**31


def test_tiny_products_are_cut():
    x, W = 1e-19 * torch.randn(9, 40), 1e-19 * torch.randn(24, 40)
    want, got = (encode(x, W, activation="none", impl=impl) for impl in ("reference", "cpu"))
    assert torch.equal(got, want) and (want == 0).any()
    assert want[want != 0].abs().min() >= LEAST


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_topk_is_the_best_of_dense(impl):
    x, W, b, p = torch.randn(9, 40), torch.randn(300, 40), torch.randn(300), torch.randn(40)
    dense = encode(x, W, b, p, activation="none", impl=impl)
    got = encode(x, W, b, p, k=6, impl=impl)
    best = dense.sort(dim=1, descending=True, stable=True)
    assert torch.equal(got.ids.long(), best.indices[:, :6])
    assert torch.equal(got.scores, best.values[:, :6].relu())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_do_not_depend_on_the_batch(impl):
    x, W = torch.randn(33, 40), torch.randn(25, 40)
    batch = encode(x, W, impl=impl)
    assert all(torch.equal(encode(x[t : t + 1], W, impl=impl)[0], batch[t]) for t in range(33))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_faulty_row_is_nan_even_where_relu_would_hide_it(impl):
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    z = encode(x, -torch.ones(5, 4), impl=impl)
    assert z[:2].isnan().all() and torch.equal(z[2], torch.zeros(5))


PACKED = ops.pack_codes(torch.ones(16, 8), "dot")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=torch.ones(2, 9)), ValueError, ["x", "8"]),
        (dict(W_enc=torch.ones(16, 8)), TypeError, ["W_enc is Tensor", "pack_codes"]),
        (dict(b_pre=torch.ones(8).int()), TypeError, ["b_pre", "int32"]),
        (dict(b_pre=[0.0] * 8), TypeError, ["b_pre is list"]),
        (dict(activation="gelu"), ValueError, ["activation", "gelu"]),
        (dict(k=17), ValueError, ["k is 17", "16"]),
        (dict(mask_row=torch.zeros(2, dtype=torch.int32)), ValueError, ["need k"]),
        (dict(b_pre=torch.ones(8, requires_grad=True)), RuntimeError, ["b_pre requires grad"]),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    with pytest.raises(error) as caught:
        ops.sae_encode(**(dict(x=torch.ones(2, 8), W_enc=PACKED, impl="reference") | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)
