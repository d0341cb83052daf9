"""delete_latents: the native kernel against the reference, bit for bit, and both against the equation."""

from __future__ import annotations

import hurtful
import pytest
import torch
from calls import call, latent_masks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiers import examples
from torch import Tensor

from cu_fast import ops
from cu_fast.kernels import reference

FP32 = torch.float32
CHANGES = ("random", "taken away", "idle", "kept", "faulty", "huge", "zeros")
IMPLS = ("reference", "cpu")


def changes(U: int, M: int, kind: str, seed: int) -> Tensor:
    change = hurtful.normal(U, M, 3, seed=seed)
    if kind in ("faulty", "huge", "zeros"):
        return hurtful.matrix(U * M, 3, kind, FP32, seed).view(U, M, 3)
    if kind == "taken away":
        change.zero_()
    elif kind == "kept":
        change[...] = torch.tensor([1.0, 0.0, 0.0])
    elif kind == "idle":
        change[..., 2] *= hurtful.normal(U, M, seed=seed + 1) > 0.8
    else:
        change[..., 2] = 0
    return change


def example_of(
    T: int, D: int, *, M: int = 9, U: int = 2, R: int = 40, seed: int = 0, dtype: torch.dtype = FP32
) -> dict:
    """A plain deletion from x itself; no token has mask -1."""
    latents, _ = latent_masks(U, M, R, seed)
    return dict(
        x=hurtful.matrix(T, D, "gaussian", dtype, seed), enc=hurtful.normal(R, D, seed=seed + 1) / D**0.5,
        bias=torch.zeros(R), theta=torch.full((R,), 0.5), dec=hurtful.normal(R, D, seed=seed + 2), scale=0, norm=1.0,
        mask_latents=latents, mask_change=torch.zeros(U, M, 3), mask_row=torch.arange(T, dtype=torch.int32) % max(U, 1),
    )  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    """The same numbers in the same places, the sign of zero included; NaN is NaN."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.float(), b.float()
    number = ~a.isnan()
    return torch.equal(number, ~b.isnan()) and torch.equal(a[number].view(torch.int32), b[number].view(torch.int32))


def check(arguments: dict) -> tuple[Tensor, ...]:
    want = call("delete_latents", on=reference, **arguments)
    got = call("delete_latents", **arguments)
    for name, one, other in zip(("y", "hits", "dose"), got, want, strict=True):
        assert same_bits(one, other), name
    return got


@settings(max_examples=examples(400), deadline=None)
@given(
    T=st.sampled_from([0, 1, 2, 3, 5, 17, 70, 140]), Din=st.sampled_from([1, 2, 7, 16, 33, 100, 530]),
    Dout=st.sampled_from([None, 1, 20, 129, 260]), R=st.integers(1, 80), U=st.integers(0, 4),
    M=st.sampled_from([0, 1, 2, 5, 8, 20, 37, 90]), kind=hurtful.kinds, enc_kind=hurtful.kinds, dec_kind=hurtful.kinds,
    theta_kind=st.sampled_from(["gaussian", "tied", "faulty"]), change=st.sampled_from(CHANGES), dtype=hurtful.dtypes,
    other_dtype=hurtful.dtypes, layout=hurtful.layouts, other_layout=hurtful.layouts, scale=st.integers(0, 2),
    norm=st.sampled_from([1.0, 12.0, 0.37, 1e-30]), floor=st.booleans(), beyond=st.booleans(), listed=st.booleans(),
    sorted_rows=st.booleans(), seed=hurtful.seeds,
)  # fmt: skip
def test_cpu_equals_reference(
    T, Din, Dout, R, U, M, kind, enc_kind, dec_kind, theta_kind, change, dtype, other_dtype, layout, other_layout, scale,
    norm, floor, beyond, listed, sorted_rows, seed,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    latents = torch.randint(0 if listed else -1, R + beyond, (U, M), generator=g, dtype=torch.int32)
    row = torch.randint(-1, U, (T,), generator=g, dtype=torch.int32)
    residual = Dout and hurtful.strided(hurtful.matrix(T, Dout, kind, other_dtype, seed + 1), other_layout)
    check(dict(
        x=hurtful.strided(hurtful.matrix(T, Din, kind, dtype, seed), layout), residual=residual,
        enc=hurtful.strided(hurtful.matrix(R, Din, enc_kind, FP32, seed + 2), other_layout),
        bias=hurtful.normal(R, seed=seed + 3), theta=hurtful.matrix(1, R, theta_kind, FP32, seed + 4)[0],
        dec=hurtful.strided(hurtful.matrix(R, Dout or Din, dec_kind, FP32, seed + 5), layout), scale=scale, norm=norm,
        mask_latents=latents, mask_change=changes(U, M, change, seed + 6), mask_row=row.sort().values if sorted_rows else row,
        floor_scores=torch.randn(T, generator=g) if floor else None,
        floor_ids=torch.randint(0, R, (T,), generator=g, dtype=torch.int32) if floor else None,
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", hurtful.DTYPES)
@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize(("T", "M"), [(1, 345), (67, 20), (130, 41)])
def test_cpu_equals_reference_at_the_width_of_a_model(T, M, scale, dtype):
    given = example_of(T, 2304, M=M, R=400, dtype=dtype)
    _, hits, dose = check(given | dict(scale=scale, norm=48.0, bias=torch.full((400,), -0.1)))
    assert hits.sum() > 0 and (dose > 0).any()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("T", "D", "M"), [(1, 600, 900), (3, 300, 1500), (50, 200, 500), (200, 64, 300)])
def test_cpu_equals_reference_on_any_number_of_threads(threads, T, D, M):
    # The first three also have parts of the masks' lists.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, hits, _ = check(example_of(T, D, M=M, R=2 * M, U=3))
        assert hits.sum() > 0
    finally:
        torch.set_num_threads(before)


def test_cpu_equals_reference_of_the_longest_mask():
    R = ops.latents.reference.MAX_LATENTS
    given = example_of(3, 20, M=R, R=R, U=1)
    given["mask_latents"] = torch.arange(R, dtype=torch.int32)[None]
    _, hits, _ = check(given | dict(mask_change=changes(1, R, "idle", 0)))
    assert hits.min() > R // 5


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_and_neighbours_change_nothing(impl):
    on = reference if impl == "reference" else torch.ops.cu_fast
    given = example_of(150, 100, U=5, M=23) | dict(scale=1)
    given["mask_row"] = torch.randint(-1, 5, (150,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    whole = call("delete_latents", on=on, **given)
    for some in (
        torch.randperm(150, generator=torch.Generator().manual_seed(1)),
        torch.arange(149, 150),
        torch.arange(3, 40),
    ):
        part = call("delete_latents", on=on, **given | dict(x=given["x"][some], mask_row=given["mask_row"][some]))
        assert all(map(torch.equal, part, (one[some] for one in whole)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", hurtful.DTYPES)
def test_a_token_without_a_hit_keeps_its_bits(impl, dtype):
    on = reference if impl == "reference" else torch.ops.cu_fast
    given = example_of(6, 20, U=1, dtype=dtype)
    integer = torch.int32 if dtype == FP32 else torch.int16
    residual = hurtful.matrix(6, 33, "gaussian", dtype, 7)
    payload = torch.tensor(
        0x7FC12345 if dtype == FP32 else 0x7FC5 if dtype == torch.bfloat16 else 0x7E21, dtype=integer
    )
    residual[:, 3], residual.view(integer)[:, 5], residual[:, 7] = -0.0, payload, torch.inf
    given |= dict(
        residual=residual, dec=hurtful.normal(40, 33), mask_row=torch.tensor([0, -1, 0, -1, 0, 0], dtype=torch.int32)
    )
    given["x"][3, 0] = torch.nan  # not read: the token has no mask
    y, hits, dose = call("delete_latents", on=on, **given | dict(theta=torch.full((40,), 1e9)))
    assert torch.equal(y.view(integer), residual.view(integer))
    assert not hits.any() and not dose.any()
    y, hits, _ = call(
        "delete_latents", on=on, **given | dict(theta=torch.full((40,), -1e9), bias=torch.full((40,), 9.0))
    )
    assert (hits > 0).tolist() == [True, False, True, False, True, True]
    assert torch.equal(y.view(integer)[[1, 3]], residual.view(integer)[[1, 3]]) and (y[0, 1] != residual[0, 1]).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_is_the_equation(impl, scale):
    D, R = 70, 50
    given = example_of(9, D, U=2, M=20, R=R, seed=3) | dict(scale=scale, norm=3.0)
    given["residual"], given["mask_change"] = hurtful.normal(9, D, seed=9), hurtful.normal(2, 20, 3, seed=10)
    given["mask_change"][0, :, 2] = 0
    y, hits, dose = call("delete_latents", on=reference if impl == "reference" else torch.ops.cu_fast, **given)

    x, enc, dec = (given[name].double() for name in ("x", "enc", "dec"))
    std, length = x.std(1, keepdim=True), x.norm(dim=1, keepdim=True)
    rho = (1.0, 1 / (std + 1e-5), 3 / length)[scale]
    sigma = (1.0, std, length / 3)[scale]
    pre = (rho * x) @ enc.T + given["bias"].double()
    fires = pre > given["theta"]
    want = given["residual"].double().clone()
    for t in range(9):
        for u in [int(given["mask_row"][t])]:
            listed = [int(i) for i in given["mask_latents"][u] if i >= 0]
            change = given["mask_change"][u].double()
            hot = any(fires[t, i] and change[m, 2] != 0 for m, i in enumerate(listed))
            for m, i in enumerate(listed):
                new = change[m, 0] * pre[t, i] + change[m, 1] if fires[t, i] else change[m, 2] if hot else 0
                want[t] += torch.as_tensor(sigma).expand(9, 1)[t] * (new - pre[t, i] * fires[t, i]) * dec[i]
            assert hits[t] == sum(int(fires[t, i]) for i in listed)
    moved = (want - given["residual"]).norm(dim=1) / given["residual"].double().norm(dim=1)
    # pre: 70 products of about 1 / 8; then 20 products of numbers below 30.
    torch.testing.assert_close(y.double(), want, rtol=0, atol=20 * 30 * 2**-22)
    torch.testing.assert_close(dose.double(), moved, rtol=2**-18, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_faults_make_nan_tokens_alone(impl):
    given = example_of(9, 24, U=4, M=6, R=40, seed=5)
    given["mask_row"] = torch.tensor([0, 0, 0, -1, 1, 2, 3, 0, 0], dtype=torch.int32)
    given["mask_latents"] = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 40, -1, -1, -1], [8, -1, 99, 99, 99, 99], [9, 10, 11, -1, -1, -1]], dtype=torch.int32)  # fmt: skip
    given["x"][1, 3], given["x"][2, 4], given["x"][3, 0] = torch.nan, -torch.inf, torch.nan
    given["bias"][11] = torch.nan  # mask 3
    on = reference if impl == "reference" else torch.ops.cu_fast
    y, hits, dose = call("delete_latents", on=on, **given | dict(residual=torch.ones(9, 24)))
    bad = torch.tensor([False, True, True, False, True, False, True, False, False])
    assert torch.equal(y.isnan().all(1), bad) and torch.equal(y.isnan().any(1), bad) and torch.equal(dose.isnan(), bad)
    assert not hits[bad].any()
    # A row of one number: its standard deviation divides by 0.
    one = example_of(2, 1, R=10, seed=6) | dict(scale=1)
    assert call("delete_latents", on=on, **one)[0].isnan().all()
    huge = example_of(2, 24, R=40) | dict(scale=2)
    huge["x"][0] = 3e38
    assert call("delete_latents", on=on, **huge)[0].isnan().all(1).tolist() == [True, False]


def test_a_row_that_overflows_is_nan():
    # x and sigma are finite, rho x is Inf: what cannot be scored is not taken for what does not fire.
    given = example_of(3, 5, U=1, M=3, R=3) | dict(
        x=torch.full((3, 5), 1e-21), enc=torch.ones(3, 5), scale=2, norm=1e20
    )
    given["mask_latents"] = torch.arange(3, dtype=torch.int32)[None]
    y, hits, dose = check(given)
    assert y.isnan().all() and dose.isnan().all() and not hits.any()


def test_denormals_are_kept():
    given = example_of(5, 40, M=20)
    given |= dict(x=given["x"] * 1e-41, bias=hurtful.normal(40), theta=torch.zeros(40), dec=given["dec"] * 1e-41)
    want = call("delete_latents", on=reference, **given)
    assert torch.set_flush_denormal(True)
    try:
        got = call("delete_latents", **given)
    finally:
        torch.set_flush_denormal(False)
    assert want[1].sum() > 0 and (want[0] != given["x"]).any()
    assert torch.equal(got[0].view(torch.int32), want[0].view(torch.int32)) and torch.equal(got[1], want[1])


@settings(max_examples=examples(60), deadline=None)
@given(
    T=st.integers(1, 40), R=st.integers(1, 90), k=st.integers(1, 90), ties=st.booleans(), seed=hurtful.seeds,
    scale=st.sampled_from(["none", "layer_norm", "constant_norm"]), impl=st.sampled_from(IMPLS),
)  # fmt: skip
@example(T=3, R=5, k=5, ties=True, seed=0, scale="none", impl="cpu")
def test_topk_is_that_of_all_latents(T, R, k, ties, seed, scale, impl):
    k, D = min(k, R), 18
    kind = "tied" if ties else "gaussian"
    x, enc = hurtful.matrix(T, D, kind, FP32, seed), hurtful.matrix(R, D, kind, FP32, seed + 1)
    bias, dec = torch.zeros(R) if ties else hurtful.normal(R, seed=seed + 2), hurtful.normal(R, D, seed=seed + 3)
    mask_latents, change = latent_masks(3, max(1, R // 2), R, seed)
    row = torch.randint(-1, 3, (T,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    latents = ops.Latents(ops.pack_codes(enc, "dot", bias), torch.full((R,), torch.nan), dec, "topk", k, scale, 2.0)
    got = ops.delete_latents(x, latents, ops.LatentMasks(mask_latents, change), row, impl=impl)

    rho, sigma = reference.token_scales(x, ops.latents.TOKEN_SCALES.index(scale), 2.0)
    pre = call("sae_encode", on=reference, x=x * rho[:, None], W_enc=enc, b_enc=bias)
    rank = pre.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    fires = (rank < k) & (pre > 0)
    want = x.double().clone()
    for t in range(T):
        u = int(row[t])
        listed = mask_latents[u][mask_latents[u] >= 0].long() if u >= 0 else torch.zeros(0, dtype=torch.long)
        assert got.hits[t] == fires[t, listed].sum()
        gain, clamp, idle = change[u, : len(listed)].double().unbind(1)
        hot = bool((fires[t, listed] & (idle != 0)).any())
        a = torch.where(fires[t, listed], pre[t, listed], 0).double()
        new = torch.where(fires[t, listed], gain * a + clamp, idle if hot else 0 * idle)
        want[t] += sigma[t].double() * ((new - a) @ dec[listed].double())
    size = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.y.double(), want, rtol=0, atol=size * (R + 4) * 2**-22)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 3, 1)), r"x must have shape \[T, Din\]"),
        (dict(x=torch.ones(2, 4, dtype=torch.int32)), "x must be Float, BFloat16 or Half"),
        (dict(enc=torch.ones(9, 65)), r"enc_digits must have shape \[R, 3, round_up\(Din, 64\)\] = \[any, 3, 64\], got Char \[9, 3, 128\]"),
        (dict(enc_digits=torch.ones(9, 3, 64)), "enc_digits must be Char, got Float"),
        (dict(enc_digits=torch.ones(0, 3, 64).char(), dec=torch.ones(0, 4)), "enc_digits has 0 rows"),
        (dict(enc_factor=torch.ones(8)), r"enc_factor must have shape \[R\] = \[9\]"),
        (dict(dec=torch.ones(8, 4)), r"dec must have shape \[R, Dout\] = \[9, any\]"),
        (dict(dec=torch.ones(9, 4).double()), "dec must be Float, got Double"),
        (dict(dec=torch.ones(9, 6)), "residual must be given where dec is not as wide as x"),
        (dict(residual=torch.ones(2, 5)), r"residual must have shape \[T, Dout\] = \[2, 4\]"),
        (dict(residual=torch.ones(2, 4).double()), "residual must be Float, BFloat16 or Half"),
        (dict(bias=torch.ones(8)), r"bias must have shape \[R\] = \[9\]"),
        (dict(bias=torch.ones(9).half()), "bias must be Float"),
        (dict(theta=torch.ones(8)), r"theta must have shape \[R\] = \[9\]"),
        (dict(theta=torch.ones(9).bfloat16()), "theta must be Float"),
        (dict(scale=3), "scale is 3, must be 0, 1 or 2"),
        (dict(scale=-1), "scale is -1"),
        (dict(mask_latents=torch.zeros(2, 3).int()[0]), r"mask_latents must have shape \[U, M\]"),
        (dict(mask_latents=torch.zeros(1, 3)), "mask_latents must be Int"),
        (dict(mask_latents=torch.zeros(1, 8193).int(), mask_change=torch.zeros(1, 8193, 3)), "lists 8193 latents per mask, must be at most 8192"),
        (dict(mask_change=torch.zeros(1, 3, 2)), r"mask_change must have shape \[U, M, 3\] = \[1, 3, 3\]"),
        (dict(mask_change=torch.zeros(1, 3, 3).half()), "mask_change must be Float"),
        (dict(mask_row=torch.zeros(3).int()), r"mask_row must have shape \[T\] = \[2\]"),
        (dict(mask_row=torch.zeros(2).long()), "mask_row must be Int"),
        (dict(mask_row=torch.tensor([0, 1]).int()), r"mask_row\[1\] is 1, must be in \[-1, 1\)"),
        (dict(mask_row=torch.tensor([-2, 0]).int()), r"mask_row\[0\] is -2"),
        (dict(floor_scores=torch.zeros(2)), "floor_scores and floor_ids must be given together, got only floor_scores"),
        (dict(floor_ids=torch.zeros(2).int()), "got only floor_ids"),
        (dict(floor_scores=torch.zeros(3), floor_ids=torch.zeros(2).int()), r"floor_scores must have shape \[T\] = \[2\]"),
        (dict(floor_scores=torch.zeros(2), floor_ids=torch.zeros(2).long()), "floor_ids must be Int"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_operator_are_named(change, message):
    given = dict(
        x=torch.ones(2, 4), enc=torch.ones(9, 4), bias=torch.zeros(9), theta=torch.zeros(9), dec=torch.ones(9, 4), scale=0,
        norm=1.0, mask_latents=torch.zeros(1, 3).int(), mask_change=torch.zeros(1, 3, 3), mask_row=torch.zeros(2).int(),
    )  # fmt: skip
    call("delete_latents", **given)
    with pytest.raises(RuntimeError, match=message):
        call("delete_latents", **given | change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(enc=torch.ones(9, 4)), TypeError, ["enc is Tensor", "pack_codes"]),
        (dict(enc=ops.pack_codes(torch.ones(9, 4), "dot")), ValueError, ["enc has no bias"]),
        (dict(x=torch.ones(2, 5)), ValueError, ["x has shape [2, 5]", "4", "enc"]),
        (dict(dec=torch.ones(8, 4)), ValueError, ["dec has shape [8, 4]", "9 rows"]),
        (dict(dec=torch.ones(9, 5)), ValueError, ["x has shape [2, 4]", "5", "dec"]),
        (dict(dec=torch.ones(9, 4).double()), TypeError, ["dec is torch.float64"]),
        (dict(residual=torch.ones(2, 5)), ValueError, ["residual has shape [2, 5]", "4"]),
        (dict(residual=torch.ones(3, 4)), ValueError, ["residual has 3 rows", "2"]),
        (dict(theta=torch.ones(9).half()), TypeError, ["theta is torch.float16"]),
        (dict(kind="relu"), ValueError, ["kind is 'relu'", "threshold", "topk"]),
        (dict(kind="topk", k=10), ValueError, ["k is 10", "9"]),
        (dict(scale="rms"), ValueError, ["scale is 'rms'", "layer_norm"]),
        (dict(norm=0.0), ValueError, ["norm is 0.0", "positive"]),
        (dict(norm=float("inf")), ValueError, ["norm is inf"]),
        (dict(latents=torch.zeros(1, 3)), TypeError, ["masks.latents is torch.float32", "int32"]),
        (dict(latents=torch.zeros(3).int()), ValueError, ["masks.latents has shape [3]", "[U, M]"]),
        (dict(latents=torch.zeros(1, 8193).int()), ValueError, ["masks.latents", "at most 8192"]),
        (dict(change=torch.zeros(1, 3, 2)), ValueError, ["masks.change has shape [1, 3, 2]", "[1, 3, 3]"]),
        (dict(change=torch.zeros(1, 3, 3).half()), TypeError, ["masks.change is torch.float16"]),
        (dict(row=torch.ones(2).int()), ValueError, ["mask_row holds 1"]),
        (dict(row=torch.zeros(3).int()), ValueError, ["mask_row", "[2]"]),
        (dict(x=torch.ones(2, 4, requires_grad=True)), RuntimeError, ["x requires grad"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_arguments_are_named(change, error, words, impl):
    given = dict(
        x=torch.ones(2, 4), enc=ops.pack_codes(torch.ones(9, 4), "dot", torch.zeros(9)), theta=torch.zeros(9),
        dec=torch.ones(9, 4), kind="threshold", k=None, scale="none", norm=1.0, latents=torch.zeros(1, 3).int(), change=torch.zeros(1, 3, 3),
        row=torch.zeros(2).int(), residual=None,
    ) | change  # fmt: skip
    latents = ops.Latents(**{name: given[name] for name in ops.Latents._fields if name in given})
    masks = ops.LatentMasks(given["latents"], given["change"])
    with pytest.raises(error) as caught:
        ops.delete_latents(given["x"], latents, masks, given["row"], residual=given["residual"], impl=impl)
    assert all(word in str(caught.value) for word in words), str(caught.value)
