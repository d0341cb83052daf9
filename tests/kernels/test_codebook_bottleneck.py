"""codebook_bottleneck: the three operators in one call, the native one against the reference, bit for bit."""

from __future__ import annotations

import hurtful
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from cu_fast import ops
from cu_fast.kernels import reference

WEIGHTS = ("one", "mean", "score")


def inputs(T, D, E, C, kind, code_kind, dtype, layout, encoded, biases, seed, similarity="cosine", scan="int8"):
    """x, encoder, packed and table with b_dec; without an encoder the rows are E wide."""
    x = hurtful.strided(hurtful.matrix(T, D if encoded else E, kind, dtype, seed), layout)
    b_enc = hurtful.matrix(1, E, "gaussian", dtype, seed + 1)[0] if biases & 1 else None
    b_pre = hurtful.matrix(1, D, "gaussian", dtype, seed + 2)[0] if biases & 2 else None
    W_enc = hurtful.strided(hurtful.matrix(E, D, "gaussian", dtype, seed + 3), layout)
    codes = hurtful.matrix(C, E, code_kind, dtype, seed + 4)
    table = hurtful.strided(hurtful.matrix(C, D, "gaussian", dtype, seed + 5), layout)
    b_dec = hurtful.matrix(1, D, "gaussian", dtype, seed + 6)[0] if biases & 4 else None
    encoder = (ops.pack_codes(W_enc, "dot", b_enc, "none"), b_pre) if encoded else None
    return x, encoder, ops.pack_codes(codes, similarity, scan=scan), table, b_dec


def both(*arguments, **options):
    """What the reference and the native operator return, with their receipts, which start at something."""
    results = []
    for impl in ("reference", "cpu"):
        receipt = torch.tensor([100, 7])
        results.append((ops.codebook_bottleneck(*arguments, **options, receipt=receipt, impl=impl), receipt))
    return results


@settings(max_examples=examples(150), deadline=None)
@given(
    T=st.integers(0, 20) | st.sampled_from([65, 130]), D=st.integers(1, 40), E=st.integers(1, 40),
    C=st.integers(1, 80) | st.integers(80, 400), k=st.integers(1, 20), share=hurtful.shares, kind=hurtful.kinds,
    code_kind=hurtful.kinds, dtype=hurtful.dtypes, layout=hurtful.layouts, encoded=st.booleans(),
    biases=st.integers(0, 7), similarity=st.sampled_from(["cosine", "dot", "l2"]),
    scan=st.sampled_from(["int8", "none"]), activation=st.sampled_from(["relu", "none"]),
    mask_mode=st.sampled_from(["ablate", "reselect"]), weight=st.sampled_from(WEIGHTS), seed=hurtful.seeds,
)  # fmt: skip
def test_cpu_equals_reference(T, C, k, share, activation, mask_mode, weight, seed, **shape):
    mask = (None, None) if share is None else hurtful.masks(T, C, share, seed + 7)
    options = dict(k=min(k, C), activation=activation, mask_mode=mask_mode, weight=weight)
    (want, counts), (got, native_counts) = both(*inputs(T=T, C=C, seed=seed, **shape), *mask, **options)
    assert hurtful.equal(got, want)
    assert torch.equal(native_counts, counts) and counts[0] == 100 + T


def ordinary(T=6, C=700, encoded=True, dtype=torch.float32):
    return inputs(T, 24, 40, C, "gaussian", "gaussian", dtype, "plain", encoded, 7, 1)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
class TestMeaning:
    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("mask_mode", ["ablate", "reselect"])
    @pytest.mark.parametrize("encoded", [True, False])
    def test_is_the_three_operators(self, encoded, mask_mode, weight, impl):
        x, encoder, packed, table, b_dec = ordinary(encoded=encoded)
        mask = hurtful.masks(len(x), 700, 0.5, 3)
        receipt = torch.zeros(2, dtype=torch.int64)
        got = ops.codebook_bottleneck(
            x, encoder, packed, table, b_dec, *mask, k=5, mask_mode=mask_mode, weight=weight, receipt=receipt, impl=impl
        )
        z = ops.sae_encode(x, *encoder) if encoded else x
        free = ops.codebook_quantize(z, packed, k=5)
        chosen, left = free, mask
        if mask_mode == "reselect":
            chosen, left = ops.codebook_quantize(z, packed, k=5, mask_table=mask[0], mask_row=mask[1]), (None, None)
        weights = chosen.scores.relu() if weight == "score" else None
        reduce = "mean" if weight == "mean" else "sum"
        want = ops.masked_decode(chosen.ids, weights, table, b_dec, None, *left, reduce=reduce)
        assert torch.equal(got, want)
        # Either way the mask took the deleted codes among those that are best without it.
        taken = reference.is_deleted(free.ids, *mask).sum()
        assert receipt.tolist() == [len(x), int(taken)] and taken > 0

    def test_receipts_add_up(self, impl):
        arguments, receipt = ordinary(), torch.zeros(2, dtype=torch.int64)
        everything = torch.full((1, 22), -1, dtype=torch.int32), torch.tensor([0, 0, -1, -1, -1, 0]).int()
        for _ in range(3):
            ops.codebook_bottleneck(*arguments, *everything, k=5, receipt=receipt, impl=impl)
        ops.codebook_bottleneck(*arguments, k=5, receipt=receipt, impl=impl)
        assert receipt.tolist() == [4 * 6, 3 * 3 * 5]
        without = ops.codebook_bottleneck(*arguments, k=5, impl=impl)
        assert torch.equal(without, ops.codebook_bottleneck(*arguments, k=5, receipt=receipt, impl=impl))

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("mask_mode", ["ablate", "reselect"])
    @pytest.mark.parametrize("encoded", [True, False])
    def test_a_faulty_row_is_nan_and_alone(self, encoded, mask_mode, weight, impl):
        x, *rest = ordinary(encoded=encoded)
        table, row = torch.full((1, 22), -1, dtype=torch.int32), torch.tensor([0, 0, -1, -1, 0, 0]).int()
        options = dict(k=5, mask_mode=mask_mode, weight=weight, impl=impl)
        clean = ops.codebook_bottleneck(x, *rest, table, row, **options)
        x[1, 3], x[2, 0] = torch.nan, -torch.inf
        got = ops.codebook_bottleneck(x, *rest, table, row, **options)
        assert got[1:3].isnan().all()
        assert torch.equal(got[[0, 3, 4, 5]], clean[[0, 3, 4, 5]]) and clean.isfinite().all()

    @pytest.mark.parametrize("mask_mode", ["ablate", "reselect"])
    def test_everything_deleted_leaves_the_bias(self, mask_mode, impl):
        x, encoder, packed, table, b_dec = ordinary()
        mask = torch.full((1, 22), -1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
        options = dict(k=5, mask_mode=mask_mode, impl=impl)
        got = ops.codebook_bottleneck(x, encoder, packed, table, b_dec, *mask, **options)
        assert torch.equal(got, b_dec.expand(6, -1))

    def test_inputs_are_not_written_to(self, impl):
        x, encoder, packed, table, b_dec = ordinary()
        mask = hurtful.masks(6, 700, 0.5, 3)
        given = [x, *encoder[0][:3], encoder[1], packed.digits, packed.factor, *packed.scan, table, b_dec, *mask]
        before = [t.clone() for t in given]
        ops.codebook_bottleneck(x, encoder, packed, table, b_dec, *mask, k=5, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(given, before))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=torch.ones(2, 9)), ValueError, ["x", "24", "W_enc"]),
        (dict(encoder=None), ValueError, ["x", "40", "packed"]),
        (dict(encoder=(torch.ones(40, 24), None)), TypeError, ["W_enc is Tensor", "pack_codes"]),
        (dict(encoder=(ops.pack_codes(torch.ones(41, 24), "dot"), None)), ValueError, ["W_enc has 41 rows", "40"]),
        (dict(encoder=(ops.pack_codes(torch.ones(40, 24), "dot"), torch.ones(3))), ValueError, ["b_pre", "[24]"]),
        (dict(table=torch.ones(699, 24)), ValueError, ["table", "700 rows"]),
        (dict(table=torch.ones(700, 24).int()), TypeError, ["table", "int32"]),
        (dict(b_dec=torch.ones(3)), ValueError, ["b_dec", "[24]"]),
        (dict(table=torch.ones(700, 24, device="meta")), ValueError, ["table is on meta"]),
        (dict(table=[[1.0] * 24] * 700), TypeError, ["table is list"]),
        (dict(table=None), TypeError, ["table is NoneType"]),
        (dict(x=None), TypeError, ["x is NoneType"]),
        (dict(k=0), ValueError, ["k is 0"]),
        (dict(k=True), TypeError, ["k is True"]),
        (dict(mask_row=torch.zeros(2, dtype=torch.int32)), ValueError, ["mask_table is None"]),
        (dict(mask_mode="zero"), ValueError, ["mask_mode is 'zero'", "'ablate' or 'reselect'"]),
        (dict(weight="two"), ValueError, ["weight is 'two'", "'score'"]),
        (dict(activation="gelu"), ValueError, ["activation is 'gelu'"]),
        (dict(receipt=torch.zeros(2)), ValueError, ["receipt", "float32"]),
        (dict(receipt=torch.zeros(3, dtype=torch.int64)), ValueError, ["receipt", "[3]"]),
        (dict(receipt=torch.zeros(2, 2, dtype=torch.int64)[:, 0]), ValueError, ["receipt", "contiguous"]),
        (dict(x=torch.ones(2, 24, requires_grad=True)), RuntimeError, ["x requires grad"]),
        (dict(table=torch.ones(700, 24, requires_grad=True)), RuntimeError, ["table requires grad"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, words):
    _, encoder, packed, table, b_dec = ordinary()
    arguments = dict(x=torch.ones(2, 24), encoder=encoder, packed=packed, table=table, b_dec=b_dec, k=5) | change
    with pytest.raises(error) as caught:
        ops.codebook_bottleneck(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
