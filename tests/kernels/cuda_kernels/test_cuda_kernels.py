"""The CUDA kernels, run on a CPU by the emulation, against the reference, bit for bit. Chosen cases: test_cuda_cases.py.

The emulation cuts small (SelectTuning in csrc/cuda/select.h), so that small inputs take every path.
"""

from __future__ import annotations

import itertools

import deletions
import emulation
import hurtful
import pytest
import torch
from calls import arguments, call, cosine, spread
from calls import plane_of as plane_by
from hurtful import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples, heavies

from cu_fast.kernels import reference

pytestmark = emulation.needed
NAN, INF = torch.nan, torch.inf


def emulated(name: str, *, seed: int = 0, multiprocessors: int = 3, wgmma: bool | None = None, **given):
    """The kernels of an operator: threads in the seed's order, memory that was not written full of NaN and -1.

    wgmma: with Hopper's kernel where it has one; None: every other seed. select_plan and scan_state, which the
    emulation alone has, must be given all that they take.
    """
    machine = emulation.load()
    machine.set_seed(seed)
    machine.set_multiprocessors(multiprocessors)
    machine.set_wgmma(seed % 2 == 0 if wgmma is None else wgmma)
    every = arguments(name, **given) if hasattr(reference, name) else spread(**given)
    torch.use_deterministic_algorithms(True)
    try:
        return getattr(machine, name)(**every)
    finally:
        torch.use_deterministic_algorithms(False)


def kernels() -> set[str]:
    """Names of the kernels that have run since the last call: scan_codes<64, true>."""
    names = set()
    for line in emulation.load().launched().splitlines():
        head, _, arguments = line.removesuffix("]").partition(" [")
        name = head.split("(cu_fast::")[0].split("::")[-1]
        values = [a.split(" = ")[1].replace("cu_fast::", "") for a in arguments.removeprefix("with ").split(";") if a]
        names.add(f"{name}<{', '.join(values)}>" if values else name)
    return names


def plane_of(codes, factor=None):
    return plane_by(codes, factor, on=reference)


def select(z, codes, k=4, hits=True, **given):
    return emulated("codebook_quantize", z=z, codes=codes, k=k, return_hits=hits, **given)


def same(a, b) -> bool:
    return all(map(hurtful.equal, a, b))


def bottleneck(x, codes, table, **given):
    return emulated("codebook_bottleneck", x=x, codes=codes, table=table, **given)


machines = st.sampled_from([1, 3, 8, 40])  # multiprocessors: into how many parts work is cut

# -- against the reference --------------------------------------------------------------------------------------


@settings(max_examples=examples(60), deadline=None)
@given(
    T=st.integers(0, 30) | st.sampled_from([4, 5, 65]), D=st.integers(1, 70) | st.integers(100, 150),
    E=st.integers(1, 90) | st.integers(100, 300), kind=hurtful.kinds, w_kind=hurtful.kinds, x_dtype=hurtful.dtypes,
    w_dtype=hurtful.dtypes, layout=hurtful.layouts, biases=st.integers(0, 3), relu=st.booleans(), seed=hurtful.seeds,
)  # fmt: skip
def test_sae_encode(T, D, E, kind, w_kind, x_dtype, w_dtype, layout, biases, relu, seed):
    x = hurtful.strided(hurtful.matrix(T, D, kind, x_dtype, seed), layout)
    W_enc = hurtful.strided(hurtful.matrix(E, D, w_kind, w_dtype, seed + 1), layout)
    b_enc = hurtful.matrix(1, E, "gaussian", w_dtype, seed + 2)[0] if biases & 1 else None
    b_pre = hurtful.matrix(1, D, "gaussian", x_dtype, seed + 3)[0] if biases & 2 else None
    given = dict(x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre, relu=relu)
    assert hurtful.equal(emulated("sae_encode", **given, seed=seed), call("sae_encode", on=reference, **given))


@settings(max_examples=examples(150), deadline=None)
@given(
    T=st.integers(0, 40) | st.sampled_from([1, 4, 8, 9, 65, 136, 137, 280]), E=st.integers(1, 70) | st.integers(1, 200),
    C=st.integers(1, 300) | st.integers(300, 900), k=st.integers(1, 120) | st.integers(1, 13), scans=st.booleans(),
    similarity=st.sampled_from(["cosine", "dot", "l2", "biased", "signed"]), share=hurtful.shares, hits=st.booleans(),
    z_kind=hurtful.kinds, code_kind=hurtful.kinds, bias_kind=hurtful.kinds, z_dtype=hurtful.dtypes,
    code_dtype=hurtful.dtypes, layout=hurtful.layouts, multiprocessors=machines, seed=hurtful.seeds,
)  # fmt: skip
def test_codebook_quantize(
    T, E, C, k, scans, similarity, share, hits, z_kind, code_kind, bias_kind, z_dtype, code_dtype, layout,
    multiprocessors, seed,
):  # fmt: skip
    if T > 60:  # kept small: the reference is slow
        E, C = min(E, 20), min(C, 300)
    k = min(k, C)
    z = hurtful.strided(hurtful.matrix(T, E, z_kind, z_dtype, seed), layout)
    codes = hurtful.strided(hurtful.matrix(C, E, code_kind, code_dtype, seed + 1), layout)
    other = hurtful.matrix(C, 1, bias_kind, torch.float32, seed + 2)[:, 0]
    _, step, squares = reference.pack_digits(codes)
    factor = step if similarity in ("dot", "l2") else reference.cosine_factor(step, squares)
    bias = reference.l2_bias(step, squares) if similarity == "l2" else None
    if similarity == "biased":
        bias = other
    elif similarity == "signed":
        factor = other
    mask = None if share is None else hurtful.masks(T, C, share, seed + 3)
    plane = plane_of(codes, factor) if scans else None
    given = dict(z=z, codes=codes, factor=factor, bias=bias, k=k, mask=mask, return_hits=hits, scan=plane)
    got = emulated("codebook_quantize", **given, seed=seed, multiprocessors=multiprocessors)
    assert same(got, call("codebook_quantize", on=reference, **given))


@settings(max_examples=examples(60), deadline=None)
@given(
    T=st.integers(0, 20) | st.sampled_from([65, 140]), D=st.integers(1, 70), E=st.integers(1, 90) | st.integers(90, 700),
    k=st.integers(1, 90) | st.integers(1, 9), share=hurtful.shares, scans=st.booleans(), kind=hurtful.kinds,
    w_kind=hurtful.kinds, x_dtype=hurtful.dtypes, w_dtype=hurtful.dtypes, layout=hurtful.layouts,
    biases=st.integers(0, 3), relu=st.booleans(), multiprocessors=machines, seed=hurtful.seeds,
)  # fmt: skip
def test_sae_encode_topk(
    T, D, E, k, share, scans, kind, w_kind, x_dtype, w_dtype, layout, biases, relu, multiprocessors, seed
):
    if T > 60:
        D, E = min(D, 20), min(E, 300)
    x = hurtful.strided(hurtful.matrix(T, D, kind, x_dtype, seed), layout)
    W_enc = hurtful.strided(hurtful.matrix(E, D, w_kind, w_dtype, seed + 1), layout)
    b_enc = hurtful.matrix(1, E, "gaussian", w_dtype, seed + 2)[0] if biases & 1 else None
    b_pre = hurtful.matrix(1, D, "gaussian", x_dtype, seed + 3)[0] if biases & 2 else None
    mask = None if share is None else hurtful.masks(T, E, share, seed + 4)
    plane = plane_of(W_enc) if scans else None
    given = dict(x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre, k=min(k, E), mask=mask, relu=relu, scan=plane)
    got = emulated("sae_encode_topk", **given, seed=seed, multiprocessors=multiprocessors)
    assert same(got, call("sae_encode_topk", on=reference, **given))


@settings(max_examples=examples(100), deadline=None)
@given(
    T=st.integers(0, 20), D=st.integers(1, 40) | st.integers(500, 530) | st.sampled_from([8, 512, 1200]),
    C=st.integers(1, 200), k=st.integers(1, 20) | st.sampled_from([127, 128, 129, 300]), share=hurtful.shares,
    kind=hurtful.kinds, dtype=hurtful.dtypes, weight_dtype=st.sampled_from([None, *hurtful.DTYPES]),
    other_dtype=hurtful.dtypes, extras=st.integers(0, 3), mean=st.booleans(), layout=hurtful.layouts,
    seed=hurtful.seeds,
)  # fmt: skip
def test_masked_decode(T, D, C, k, share, kind, dtype, weight_dtype, other_dtype, extras, mean, layout, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, C, (T, k), generator=g, dtype=torch.int32)
    weights = None  # with NaN here and there: beside -1 it makes the row NaN
    if weight_dtype is not None:
        weights = hurtful.matrix(T, k, "faulty" if seed % 2 else "gaussian", weight_dtype, seed)
    table = hurtful.strided(hurtful.matrix(C, D, kind, dtype, seed + 1), layout)
    bias = hurtful.matrix(1, D, "gaussian", other_dtype, seed + 2)[0] if extras & 1 else None
    residual = hurtful.strided(hurtful.matrix(T, D, kind, other_dtype, seed + 3), layout) if extras & 2 else None
    mask = None if share is None else hurtful.masks(T, C, share, seed + 4)
    given = dict(ids=ids, weights=weights, table=table, bias=bias, residual=residual, mask=mask, mean=mean)
    assert hurtful.equal(emulated("masked_decode", **given, seed=seed), call("masked_decode", on=reference, **given))


@settings(max_examples=examples(100), deadline=None)
@given(
    T=st.integers(0, 20) | st.sampled_from([4, 5, 140, 280]), D=st.integers(1, 40) | st.sampled_from([512, 600, 1100]),
    E=st.integers(1, 40), C=st.integers(1, 80) | st.integers(80, 400), k=st.integers(1, 14) | st.integers(12, 140),
    share=hurtful.shares, kind=hurtful.kinds, code_kind=hurtful.kinds, dtype=hurtful.dtypes, layout=hurtful.layouts,
    encoded=st.booleans(), biases=st.integers(0, 15), norms=st.booleans(), scans=st.booleans(), relu=st.booleans(),
    reselect=st.booleans(), score_weights=st.booleans(), mean=st.booleans(), counts=st.booleans(),
    multiprocessors=machines, seed=hurtful.seeds,
)  # fmt: skip
def test_codebook_bottleneck(
    T, D, E, C, k, share, kind, code_kind, dtype, layout, encoded, biases, norms, scans, relu, reselect,
    score_weights, mean, counts, multiprocessors, seed,
):  # fmt: skip
    if T > 60:
        D, C = min(D, 20), min(C, 200)
    x = hurtful.strided(hurtful.matrix(T, D if encoded else E, kind, dtype, seed), layout)
    W_enc = b_enc = b_pre = None
    if encoded:
        W_enc = hurtful.strided(hurtful.matrix(E, D, "gaussian", dtype, seed + 1), layout)
        b_enc = hurtful.matrix(1, E, "gaussian", dtype, seed + 2)[0] if biases & 1 else None
        b_pre = hurtful.matrix(1, D, "gaussian", dtype, seed + 3)[0] if biases & 2 else None
    codes = hurtful.matrix(C, E, code_kind, dtype, seed + 4)
    factor = cosine(codes) if norms else reference.pack_digits(codes)[1]
    bias = hurtful.matrix(1, C, "gaussian", torch.float32, seed + 5)[0] if biases & 4 else None
    table = hurtful.strided(hurtful.matrix(C, D, "gaussian", dtype, seed + 6), layout)
    b_dec = hurtful.matrix(1, D, "gaussian", dtype, seed + 7)[0] if biases & 8 else None
    mask = None if share is None else hurtful.masks(T, C, share, seed + 8)
    plane = plane_of(codes, factor) if scans else None
    receipts = [torch.tensor([100, 7]) if counts else None for _ in range(2)]
    given = dict(
        x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre, relu=relu, codes=codes, factor=factor, bias=bias, k=min(k, C),
        mask=mask, reselect=reselect, scan=plane, table=table, b_dec=b_dec, score_weights=score_weights, mean=mean,
    )  # fmt: skip
    want = call("codebook_bottleneck", on=reference, **given, receipt=receipts[0])
    got = emulated("codebook_bottleneck", **given, receipt=receipts[1], seed=seed, multiprocessors=multiprocessors)
    assert hurtful.equal(got, want)
    assert not counts or (torch.equal(*receipts) and receipts[1][0] == 100 + T)


def deleted(given, **how):
    """What the kernels give for delete_latents, which has to be what the reference gives."""
    want, got = call("delete_latents", on=reference, **given), emulated("delete_latents", **given, **how)
    assert deletions.same(got, want) and deletions.keeps_bits(*got, given)
    return got


@settings(max_examples=examples(100), deadline=None)
@given(
    T=st.integers(0, 20) | st.sampled_from([1, 6, 7]), Din=st.integers(1, 70) | st.sampled_from([1024, 1030]),
    Dout=st.integers(1, 70) | st.sampled_from([1024, 1030]), R=st.integers(1, 60), U=st.integers(0, 3),
    M=st.integers(0, 20) | st.sampled_from([64, 65]), scale=st.integers(0, 2), kind=hurtful.kinds,
    latent_kind=st.sampled_from(["gaussian", "tied", "faulty", "huge", "zeros"]), dtype=hurtful.dtypes,
    residual=st.sampled_from([None, *hurtful.DTYPES]), idle=st.booleans(), floor=st.booleans(), faults=st.booleans(),
    infinite=st.booleans(), layout=hurtful.layouts, multiprocessors=machines, seed=hurtful.seeds,
)  # fmt: skip
def test_delete_latents(multiprocessors, seed, **described):
    deleted(deletions.deletion(**described, seed=seed), seed=seed, multiprocessors=multiprocessors)


@pytest.mark.parametrize("multiprocessors", [3, 40], ids=["four tokens per block", "one token per block"])
@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("M", [20, 300, 1100])
def test_delete_latents_many(M, scale, multiprocessors):
    """Lists longer than a block scores at a time, and than it has slots; rows wider than it has threads."""
    sizes = {20: (2100, 2049, 70), 300: (40, 1030, 420), 1100: (20, 40, 1200)}[M]
    given = deletions.deletion(
        11, *sizes, M=M, scale=scale, dtype=torch.bfloat16, residual=torch.float16, floor=M == 20
    )
    given["mask_row"] = torch.tensor([0, 0, 1, -1, 0, 0, 0, 0, -1, 2, 0], dtype=torch.int32)
    _, hits, dose = deleted(given, multiprocessors=multiprocessors)
    assert hits.max() > M // 8 and dose.isfinite().all()
    assert ("delete_latents<4, 512, 512>" in kernels()) == (M <= 512 and multiprocessors == 3)


@pytest.mark.parametrize("row", [3, -2, deletions.INT_MIN, deletions.INT_MAX])
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_delete_latents_poisons_one_token(row, multiprocessors):
    """The token whose mask row or latent does not exist, or whose x is not finite, is NaN, and its neighbours are not."""
    given = deletions.deletion(9, 40, 33, 30, residual=torch.bfloat16)
    given["mask_row"][:] = 0
    given["mask_row"][2], given["mask_row"][5], given["mask_row"][8] = row, 1, -1
    given["mask_latents"][1] = torch.tensor([0, 30, -1, 31, 32])
    given["x"][3, 39], given["x"][6, 0], given["x"][8, 3] = NAN, -INF, NAN
    y, hits, dose = deleted(given, multiprocessors=multiprocessors)
    faulty = torch.tensor([t in (2, 3, 5, 6) for t in range(9)])
    assert torch.equal(dose.isnan(), faulty) and torch.equal(y.isnan().all(1), faulty) and not hits[faulty].any()
    assert hits[~faulty].any()


@pytest.mark.parametrize("scale", [1, 2])
def test_delete_latents_by_no_scale(scale):
    """The norm overflows, or is NaN: rho is 0 or NaN, and the block that scores other tokens makes no digits with it."""
    given = deletions.deletion(9, 40, 33, 30, scale=scale)
    given["mask_row"][:] = 0
    given["x"][2], given["x"][5, ::2], given["x"][7, 3] = 3e38, -1e36, NAN
    dose = deleted(given, multiprocessors=1)[2]
    assert torch.equal(dose.isnan(), torch.tensor([t in (2, 5, 7) for t in range(9)]))


@pytest.mark.parametrize("Dout", [33, 34, 35, 36])
def test_delete_latents_by_an_infinite_number(Dout):
    """What the last four columns hold beyond the width is not a part of the dose: 0 * Inf would be NaN."""
    given = deletions.deletion(9, 40, Dout, 30, M=1, infinite=True)
    given["bias"] += 20.0  # so that most fire
    dose = deleted(given)[2]
    assert dose.isinf().any() and not dose.isnan().any()


def test_delete_latents_of_a_token_alone():
    """A token's result does not depend on the others, nor on how many are in its block, nor on the order of threads."""
    given = deletions.deletion(18, 70, 40, 50, M=20, scale=1, residual=torch.float16, floor=True)
    batch = [deleted(given, seed=seed) for seed in range(6)]
    assert all(same(batch[0], other) for other in batch) and batch[0][1].any()
    for t in range(18):
        per_token = ("x", "residual", "mask_row", "floor_scores", "floor_ids")
        one = given | {name: given[name][t : t + 1] for name in per_token}
        assert same(deleted(one), [result[t : t + 1] for result in batch[0]])


@pytest.mark.parametrize("dtype", hurtful.DTYPES)
@pytest.mark.parametrize("T", [1, 6, 70, *heavies(3)])
@pytest.mark.parametrize("E", [1, 63, 512, 1030, *heavies(3, 64, 65, 4100)])
def test_widths(T, E, dtype):
    """Fewer entries than a step, whole steps, and more than a block holds of a row at a time."""
    z, codes = normal(T, E).to(dtype), normal(70, E, seed=1).to(dtype)
    given = dict(x=z, W_enc=codes)
    assert torch.equal(emulated("sae_encode", **given), call("sae_encode", on=reference, **given))
    want = call("codebook_quantize", on=reference, z=z, codes=codes, k=8, return_hits=True)
    assert same(select(z, codes, k=8), want) and same(select(z, codes, k=8, scan=plane_of(codes)), want)


def extreme(T, E, C, signs):
    """Rows of z and digits of codes with every digit at its limit, of one sign, or each of a random one."""
    highest = torch.tensor([127, -126])  # -127 and the others would be more than a row reaches
    g = torch.Generator().manual_seed(T + E)
    rows, codes = (torch.randint(0, 2 if signs == "random" else 1, (n, E), generator=g) for n in (T, C))
    digits = torch.zeros(C, 3, (E + 63) // 64 * 64, dtype=torch.int8)
    digits[:, 0, :E] = highest[codes]
    digits[:, 1:, :E] = -128
    q = (highest[rows] << 16) - (128 << 8) - 128
    z = q.float()
    assert torch.equal(reference.fix_rows(z)[0], q.int())
    return z, digits


WIDE = (43648, 43649, 65535)  # the last two: more than a tensor core sums


@pytest.mark.parametrize("T, E, signs", [
    (1, 100, "one"), (5, 100, "random"), (70, 100, "one"), (3, 65535, "one"), (5, 43648, "one"),
    *heavies(*itertools.product((1, 3, 5, 70), WIDE, ("one", "random"))),
])  # fmt: skip
def test_digits_at_their_limits(T, E, signs):
    """No sum of a level leaves its int32: the emulation refuses it. Beyond 43,648 entries a tensor core's might."""
    C = 20 if E > 100 else 70
    z, digits = extreme(T, E, C, signs)
    given = dict(digits=digits, factor=1e-7 * normal(C, seed=1))
    want = call("sae_encode", on=reference, x=z, W_digits=digits, W_factor=given["factor"])
    for wgmma in (False, True):
        kernels()
        assert torch.equal(emulated("sae_encode", x=z, W_digits=digits, W_factor=given["factor"], wgmma=wgmma), want)
        tile = "QuadTile" if T <= 4 or E > 43648 else "WarpgroupTile" if T > 64 and wgmma else "TensorTile"
        assert f"sae_encode_tile<{tile}" in str(kernels())
    want = call("codebook_quantize", on=reference, z=z, **given, k=8, return_hits=True)
    assert same(emulated("codebook_quantize", z=z, **given, k=8, return_hits=True), want)
    given |= dict(zip(("scan_plane", "scan_terms", "scan_mean"), reference.pack_scan(*given.values(), E)))
    if 8 * 2 <= C:
        want = call("codebook_quantize", on=reference, z=z, **given, k=2, return_hits=True)
        assert same(emulated("codebook_quantize", z=z, **given, k=2, return_hits=True), want)


@pytest.mark.parametrize("T", [1, 3, 5, 70])
def test_rows_and_codes_of_every_size(T):
    """Rows from 1e-44 to 3e38, zeros, NaN and Inf; codes too, and factors that make denormals of scores."""
    z, codes = normal(T, 40), normal(96, 40, seed=1)
    sizes = torch.tensor([1e-44, 1e-38, 2e-38, 1e-30, 1e-12, 1, 1e12, 1e30, 2.9e38, 0, NAN, INF])
    z = z / z.abs().amax(1, keepdim=True) * sizes.roll(T)[torch.arange(T) % 12, None]
    codes = codes / codes.abs().amax(1, keepdim=True) * sizes[torch.arange(96) % 12, None]
    for kind in ("dot", "cosine", "l2"):
        digits, step, squares = reference.pack_digits(codes)
        factor = reference.cosine_factor(step, squares) if kind == "cosine" else step
        bias = reference.l2_bias(step, squares) if kind == "l2" else None
        given = dict(W_digits=digits, W_factor=factor, b_enc=bias, relu=False)
        assert hurtful.equal(emulated("sae_encode", x=z, **given), call("sae_encode", on=reference, x=z, **given))
        given = dict(z=z, digits=digits, factor=factor, bias=bias, k=20, mask=hurtful.masks(T, 96, 0.3, 2))
        for k, scan in ((20, None), (12, plane_of(codes, factor))):
            given |= dict(k=k, scan=scan, return_hits=True)
            assert same(emulated("codebook_quantize", **given), call("codebook_quantize", on=reference, **given))
