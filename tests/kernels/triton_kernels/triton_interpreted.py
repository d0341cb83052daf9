"""The Triton kernels against the reference: TRITON_INTERPRET=1 python tests/kernels/triton_kernels/triton_interpreted.py"""

from __future__ import annotations

import functools
from typing import NamedTuple

import hurtful
import torch
import triton_deletions
from calls import cosine, plane_of
from triton_harness import Watch, bf16, by_reference, by_triton, fp16, fp32, on, report, same

from cu_fast.kernels import reference


class Quantize(NamedTuple):
    """A selection, and the path that it has to take: which of the rows the scan leaves to score_codes."""

    T: int
    E: int
    C: int
    k: int
    dtype: torch.dtype = fp32
    z: str = "gaussian"
    codes: str = "gaussian"
    share: float | None = None  # of the codes that are deleted
    hits: bool = False
    scan: bool = False
    score: str = "cosine"  # or "dot", "bias", "l2", "signed", "huge bias"
    layout: str = "plain"
    left: str = "none"  # of the scan to score_codes: "none", "some", "all"
    tuning: dict | None = None


SELECTIONS = {
    "one token": Quantize(1, 40, 300, 5),
    "one token, one entry, one code": Quantize(1, 1, 1, 1),
    "few tokens": Quantize(3, 33, 301, 20, bf16, share=0.5, hits=True),
    "many tokens": Quantize(18, 40, 150, 5, fp16, "faulty", "tied", share=0.5, score="dot"),
    "list of 256": Quantize(2, 24, 300, 100, share=0.3, hits=True, score="bias"),
    "keys in memory": Quantize(3, 9, 280, 258, share=0.05, hits=True, tuning={"keys": 560}),
    "some tokens at a time": Quantize(9, 33, 60, 7, bf16, share=0.3, hits=True, tuning={"keys": 100}),
    "every code": Quantize(5, 33, 40, 40, bf16, score="l2", share=0.5, hits=True),
    "everything deleted": Quantize(5, 16, 70, 4, share=1.0, hits=True),
    "no tokens": Quantize(0, 16, 70, 4, share=0.5, hits=True),
    "codes with NaN and Inf": Quantize(6, 33, 80, 60, codes="faulty", z="mixed", share=0.3, hits=True, score="bias"),
    "equal scores": Quantize(5, 17, 200, 20, codes="equal"),
    "zeros": Quantize(5, 17, 100, 20, z="zeros", score="dot"),
    "zeros of both signs": Quantize(5, 17, 100, 20, z="zeros", score="signed"),
    "huge": Quantize(5, 40, 100, 20, z="huge", codes="huge", score="huge bias"),
    "infinite bias": Quantize(5, 40, 100, 20, bf16, score="huge bias"),
    "denormal": Quantize(5, 40, 100, 20, z="denormal", codes="denormal", score="dot"),
    "rows apart": Quantize(6, 33, 100, 7, fp16, layout="rows"),
    "columns apart": Quantize(6, 33, 100, 7, layout="columns"),
    "scan": Quantize(5, 70, 300, 5, scan=True),
    "scan, two tiles of tokens": Quantize(66, 20, 70, 3, bf16, scan=True, score="dot"),
    "scan, chunks": Quantize(19, 40, 400, 5, share=0.5, hits=True, scan=True, score="bias", tuning={"chunk": 8}),
    "scan, sample": Quantize(4, 130, 1500, 3, fp16, scan=True, share=0.3, tuning={"sample_share": 4}),
    "scan, outliers": Quantize(
        9, 200, 500, 5, z="outliers", scan=True, share=0.1, hits=True, tuning={"candidates": 100}
    ),
    "scan, centred": Quantize(9, 130, 400, 5, codes="mean", scan=True, score="signed"),
    "scan, outliers, centred": Quantize(6, 140, 400, 5, bf16, "outliers", "mean", scan=True, score="l2"),
    "scan, most deleted": Quantize(7, 40, 500, 9, share=0.97, hits=True, scan=True),
    "scan, everything deleted": Quantize(3, 40, 200, 2, share=1.0, hits=True, scan=True),
    "scan, overflow": Quantize(6, 40, 300, 5, codes="equal", scan=True, left="all", tuning={"candidates": 32}),
    "scan, some overflow": Quantize(
        12, 40, 700, 5, codes="clusters20", share=0.5, hits=True, scan=True, left="some", tuning={"candidates": 64}
    ),
    "scan, a sample that lies": Quantize(
        6, 40, 1500, 16, codes="some longer", share=0.1, hits=True, scan=True, score="dot", left="all"
    ),
    "scan, rows of every size": Quantize(
        20, 40, 400, 5, bf16, "mixed", share=0.3, hits=True, scan=True, left="some", score="dot"
    ),
    "scan, faulty rows": Quantize(20, 40, 300, 5, z="faulty", scan=True, left="some"),
    "scan, codes of every size": Quantize(6, 40, 400, 5, codes="mixed", scan=True, score="signed"),
    "scan, codes with NaN and Inf": Quantize(6, 33, 400, 12, codes="faulty", scan=True, share=0.3, hits=True),
    "scan, huge bias": Quantize(6, 40, 300, 5, scan=True, score="huge bias"),
    "scan, ties": Quantize(6, 33, 400, 12, codes="tied", z="tied", scan=True, share=0.3, hits=True, score="dot"),
    "scan, zero codes": Quantize(6, 33, 200, 12, codes="zeros", scan=True, score="dot"),
    "scan, equal": Quantize(4, 33, 300, 12, codes="equal", scan=True),
    "scan, rows apart": Quantize(6, 65, 300, 5, layout="rows", scan=True),
}


def selection(case: Quantize) -> None:
    from cu_fast.kernels.triton import codebook_quantize, launch

    z = hurtful.matrix(max(case.T, 1), case.E, case.z, case.dtype, 1)[: case.T]
    codes = hurtful.matrix(case.C, case.E, "gaussian" if case.codes == "some longer" else case.codes, case.dtype, 2)
    if case.codes == "some longer":  # all in the first tile, which is in the sample
        codes[:128:4] *= 10
    z, codes = hurtful.strided(z, case.layout), hurtful.strided(codes, case.layout)
    noise = hurtful.matrix(1, case.C, "gaussian", fp32, 3)[0]
    factor = bias = None
    if case.score in ("cosine", "bias"):
        factor = cosine(codes)
    if case.score in ("bias", "huge bias"):
        bias = noise
    if case.score == "huge bias":
        bias[::50] *= 2.0**41
        bias[7] = torch.inf
    if case.score == "l2":
        bias = reference.l2_bias(*reference.pack_digits(codes)[1:])
    if case.score == "signed":
        factor = cosine(codes) * noise
    given = dict(z=z, codes=codes, factor=factor, bias=bias, k=case.k, return_hits=case.hits)
    given["mask"] = None if case.share is None else hurtful.masks(case.T, case.C, case.share, 4)
    given["scan"] = plane_of(codes, factor, on=reference) if case.scan else None
    launch.TUNING = launch.Tuning(scan_start=-1)._replace(**(case.tuning or {}))
    with Watch(codebook_quantize) as watch:
        got = by_triton("codebook_quantize", **given)
    same(got, by_reference("codebook_quantize", **given))
    assert ("scan_codes" in watch.kernels) == case.scan, watch.kernels
    if case.scan:
        left = "none" if not any(watch.left) else "all" if all(watch.left) else "some"
        assert left == case.left, f"{left} of the rows were left to score_codes: {watch.left}"


def another_default_dtype() -> None:
    """What a model's loader may have set: no array of the kernels depends on it."""
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(scan_start=-1)
    case = SELECTIONS["scan"]
    given = dict(z=hurtful.normal(case.T, case.E), codes=hurtful.normal(case.C, case.E, seed=1), k=case.k)
    given["scan"] = plane_of(given["codes"], on=reference)
    want = by_reference("codebook_quantize", **given)
    torch.set_default_dtype(bf16)
    try:
        same(by_triton("codebook_quantize", **given), want)
    finally:
        torch.set_default_dtype(fp32)


def wrong_mask_row(scan: bool) -> None:
    """A row that the table lacks poisons its token, and no other."""
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(scan_start=-1)
    z, codes = hurtful.matrix(6, 40, "gaussian", fp32, 1), hurtful.matrix(300, 40, "gaussian", fp32, 2)
    table, row = hurtful.masks(6, 300, 0.5, 4)
    given = dict(z=z, codes=codes, k=5, mask=(table, row), return_hits=True)
    scores, ids, hits = by_reference("codebook_quantize", **given)
    row[2], row[4] = 3, -2
    got = by_triton("codebook_quantize", **given, scan=plane_of(codes, on=reference) if scan else None)
    for t in (2, 4):
        scores[t], ids[t], hits[t] = torch.nan, -1, 0
    same(got, (scores, ids, hits))


def no_masks_in_the_table() -> None:
    z, codes = hurtful.matrix(3, 20, "gaussian", fp32, 1), hurtful.matrix(70, 20, "gaussian", fp32, 2)
    masks = torch.zeros(0, 3, dtype=torch.int32), torch.full((3,), -1, dtype=torch.int32)
    given = dict(z=z, codes=codes, k=5, return_hits=True)
    same(by_triton("codebook_quantize", **given, mask=masks), by_reference("codebook_quantize", **given))


def bounds(kind: str, biased: bool) -> None:
    """What is known of each code's score, for rows and codes of every size: the bound of csrc/core/scan.h, made in fp64."""
    from cu_fast.kernels.triton import codebook_quantize, launch

    launch.TUNING = launch.Tuning(scan_start=-1)
    sizes = torch.tensor([1, 0, 1e-44, 1e-37, 1e-30, 1e-13, 1e13, 1e30, 1e37]).repeat(2)
    z, codes = hurtful.normal(18, 40) * sizes[:, None], hurtful.matrix(420, 40, kind, fp32, 2)
    z[9:17, 3] *= 1e6
    factor, bias = cosine(codes), hurtful.normal(420, seed=3)
    factor[::29][:9] = torch.tensor(
        [0, 2.0**-123, 2.0**-124, 2.0**40, 1.001 * 2**40, -(2.0**40), 1e38, torch.inf, torch.nan]
    )
    bias[::31][:6] = torch.tensor([1e38, -1e38, 3e38, torch.inf, -torch.inf, torch.nan])
    given = dict(z=z, codes=codes, factor=factor, bias=bias if biased else None, k=9)
    plane, terms, mean = given["scan"] = plane_of(codes, factor, on=reference)
    with Watch(codebook_quantize, all_pass=True) as watch:
        same(by_triton("codebook_quantize", **given), by_reference("codebook_quantize", **given))
    assert not any(watch.left) and mean.any() == (kind == "mean")

    q, unit = (x.double() for x in reference.fix_rows(z))
    unit[(q == 0).all(1)] = 2.0**-125  # the reference has another
    d = reference.digits_of(q.int())[:, :, :40].double()
    c = plane.transpose(1, 2).flatten(0, 1).flatten(1)[:420, :40].double() - 128
    scale, residual, size = terms[:, :192].double().view(-1, 3, 64).transpose(0, 1).flatten(1)[:, :420]
    magnitude = terms[:, 195].double().repeat_interleave(64)[:420]
    unit, norm, miss = unit[:, None], q.norm(dim=1)[:, None], d[:, 2].norm(dim=1).clamp(min=1)[:, None]
    bias = bias.double() if biased else torch.zeros(420)
    approx = (256 * d[:, 0] + d[:, 1]) @ c.T * 256 * scale * unit + (q @ mean.double())[:, None] * factor * unit + bias
    largest = unit * norm * magnitude + bias.abs()
    error = unit * (norm * residual + miss * size) + 2.0**-19 * largest + 2.0**-120
    most = torch.finfo(fp32).max
    known = (error <= most) & (largest <= most) & (unit * norm * 2**31 <= most)
    assert 0.3 < known.float().mean() < 0.95

    ids, lower, upper = (watch.narrowed[name][:, :420].cpu() for name in ("ids", "lower", "upper"))
    assert torch.equal(ids.sort(1).values, torch.arange(420).int().expand(18, 420))
    lower, upper = (each.gather(1, ids.argsort(1)) for each in (lower, upper))
    rounding = 2.0**-20 * largest + 2.0**-16 * error + 2.0**-124
    for each, wanted in ((lower, approx - error), (upper, approx + error)):
        assert (each[~known].abs() == torch.inf).all()
        assert ((each - wanted.float()).abs() <= rounding)[known].all()
    scores = by_reference("sae_encode", x=z, W_enc=codes, W_factor=factor, b_enc=given["bias"])
    assert ((lower <= scores) & (scores <= upper))[scores.isfinite()].all()
    assert (lower[~known] < 0).all() and (upper[~known] > 0).all()


def encode(
    T: int, D: int, E: int, dtype: torch.dtype, kind: str, biases: bool, relu: bool, layout: str, **tuning: int
) -> None:
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(**tuning)
    x, W_enc = hurtful.matrix(T, D, kind, dtype, 1), hurtful.matrix(E, D, "gaussian", dtype, 2)
    x, W_enc = hurtful.strided(x, layout), hurtful.strided(W_enc, layout)
    b_enc, b_pre = (hurtful.matrix(1, n, "gaussian", dtype, 3)[0] if biases else None for n in (E, D))
    given = dict(x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre, relu=relu)
    same([by_triton("sae_encode", **given)], [by_reference("sae_encode", **given)])


def encode_topk(T: int, dtype: torch.dtype, kind: str, biases: bool, relu: bool, scan: bool) -> None:
    from cu_fast.kernels.triton import codebook_quantize, launch

    launch.TUNING = launch.Tuning(scan_start=-1)
    x, W_enc = hurtful.matrix(T, 50, kind, dtype, 1), hurtful.matrix(200, 50, "gaussian", dtype, 2)
    b_enc, b_pre = (hurtful.matrix(1, n, "gaussian", dtype, 3)[0] if biases else None for n in (200, 50))
    b_enc = None if b_enc is None else b_enc - 20
    given = dict(x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre, k=9, mask=hurtful.masks(T, 200, 0.3, 4), relu=relu)
    given["scan"] = plane_of(W_enc, on=reference) if scan else None
    with Watch(codebook_quantize) as watch:
        got = by_triton("sae_encode_topk", **given)
    same(got, by_reference("sae_encode_topk", **given))
    assert ("scan_codes" in watch.kernels) == scan


class Decode(NamedTuple):
    T: int
    k: int
    D: int
    dtype: torch.dtype = fp32
    table: str = "gaussian"
    weights: torch.dtype | None = fp32
    rest: torch.dtype | None = fp32  # of bias and residual
    share: float | None = None
    mean: bool = False
    faults: bool = False
    layout: str = "plain"


DECODES = {
    "one token": Decode(1, 8, 70),
    "wide": Decode(2, 3, 1030, bf16, mean=True),
    "fp16": Decode(6, 9, 40, fp16, rest=bf16, share=0.5),
    "bf16": Decode(6, 20, 40, bf16, weights=bf16, rest=fp16, share=0.5, mean=True),
    "nothing but the table": Decode(4, 5, 33, weights=None, rest=None, mean=True),
    "everything deleted": Decode(4, 5, 33, bf16, share=1.0),
    "faults": Decode(12, 6, 20, share=0.3, faults=True),
    "faulty table": Decode(6, 9, 40, table="faulty", share=0.5),
    "huge": Decode(6, 9, 40, fp16, table="huge"),
    "denormal": Decode(6, 9, 40, bf16, table="denormal", weights=None, rest=None, mean=True),
    "rows apart": Decode(5, 4, 40, layout="rows"),
    "columns apart": Decode(5, 4, 40, bf16, layout="columns"),
    "no tokens": Decode(0, 4, 40),
}


def decode(case: Decode) -> None:
    g, C = torch.Generator().manual_seed(1), 90
    ids = torch.randint(-1, C, (case.T, case.k), generator=g, dtype=torch.int32)
    weights = None if case.weights is None else torch.randn(case.T, case.k, generator=g).to(case.weights)
    table = hurtful.strided(hurtful.matrix(C, case.D, case.table, case.dtype, 2), case.layout)
    bias = residual = None
    if case.rest is not None:
        bias = hurtful.matrix(1, case.D, "gaussian", case.rest, 3)[0]
        residual = hurtful.strided(
            hurtful.matrix(max(case.T, 1), case.D, "gaussian", case.rest, 4)[: case.T], case.layout
        )
    mask = None if case.share is None else hurtful.masks(case.T, C, case.share, 5)
    given = dict(ids=ids, weights=weights, table=table, bias=bias, residual=residual, mask=mask, mean=case.mean)
    want = by_reference("masked_decode", **given)
    if case.faults:
        table_of_masks, row = mask
        ids[1, 2], weights[1, 2] = -1, torch.nan
        ids[2, 5], ids[3, 0], row[4], row[5] = C, -2, 3, -2
        ids[6, 1], weights[6, 1] = -1, torch.inf  # adds nothing
        exist = table_of_masks, torch.where(row.clamp(-1, 2) == row, row, -1)
        want = by_reference("masked_decode", **given | dict(ids=ids.clamp(-1, C - 1), mask=exist))
        want[2:6] = torch.nan
    same([by_triton("masked_decode", **given)], [want])


def ties_of_bf16() -> None:
    """Halfway between two numbers of bf16, and what rounds to Inf."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00008000, 0x7F7F8000, 0x00000001]
    )
    residual = torch.cat([bits.int().view(fp32), -bits.int().view(fp32)])[None]
    ids, table = torch.full((1, 1), -1, dtype=torch.int32), torch.zeros(1, 16, dtype=bf16)
    got = by_triton("masked_decode", ids=ids, table=table, residual=residual)
    assert torch.equal(got.cpu().view(torch.int16), residual.bfloat16().view(torch.int16)), got


def does_not_depend_on_the_tiles() -> None:
    """Every tile that ships for some architecture gives the same bits."""
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(scan_start=-1)
    z, codes = hurtful.matrix(20, 64, "outliers", bf16, 1), hurtful.matrix(300, 64, "gaussian", bf16, 2)
    plane, arch_of = plane_of(codes, on=reference), launch.arch_of
    given = dict(z=z, codes=codes, k=5)
    want = by_reference("codebook_quantize", **given)
    try:
        for arch in ("sm_100", "gfx942"):
            launch.arch_of = lambda device, arch=arch: arch
            for scan in (plane, None):
                same(by_triton("codebook_quantize", **given, scan=scan), want)
    finally:
        launch.arch_of = arch_of


def more_than_a_block_of_keys() -> None:
    """What finds the k best, a threshold and the candidates goes on where one block ends; a tile of faulty rows ends at once."""
    from cu_fast.kernels.triton import codebook_quantize, launch

    launch.TUNING, choose = launch.Tuning(scan_start=-1), codebook_quantize.choose
    z, codes = hurtful.normal(3, 16), hurtful.normal(330, 16, seed=1)
    given = dict(codes=codes, k=9, mask=hurtful.masks(3, 330, 0.3, 4), return_hits=True)
    short = {name: launch._config(4, N=32) for name in ("finish", "scan_threshold", "narrow")}
    codebook_quantize.choose = lambda kernel, *of: short.get(kernel) or choose(kernel, *of)
    try:
        for some in (z, z * torch.nan):
            want = by_reference("codebook_quantize", z=some, **given)
            for scan in (plane_of(codes, on=reference), None):
                same(by_triton("codebook_quantize", z=some, **given, scan=scan), want)
    finally:
        codebook_quantize.choose = choose


def through_ops(mask_mode: str, encode: bool) -> None:
    """impl="triton" of the operators and of the bottleneck, with its receipt."""
    from cu_fast import ops

    T, D, E, C, k = 6, 20, 16, 70, 5
    x, codes = hurtful.matrix(T, D if encode else E, "mixed", fp32, 1), hurtful.matrix(C, E, "tied", fp32, 2)
    W_enc = hurtful.matrix(E, D, "gaussian", fp32, 3)
    table, masks = hurtful.matrix(C, D, "gaussian", bf16, 4), hurtful.masks(T, C, 0.4, 5)
    for given in (masks, (None, None)):
        arguments, results = (x, W_enc, codes, table, given, torch.zeros(2, dtype=torch.int64)), []
        for impl, tensors in (("triton", on(arguments)), ("reference", arguments)):
            x, W_enc, codes, table, mask, receipt = tensors
            encoder = (ops.pack_codes(W_enc, "dot"), None) if encode else None
            options = dict(k=k, mask_mode=mask_mode, weight="score", receipt=receipt, impl=impl)
            y = ops.codebook_bottleneck(x, encoder, ops.pack_codes(codes), table, None, *mask, **options)
            results.append((y, receipt))
        same(*results)


CASES = {
    **{f"codebook_quantize: {name}": (selection, case) for name, case in SELECTIONS.items()},
    "codebook_quantize: wrong mask row": (wrong_mask_row, False),
    "codebook_quantize: scan, wrong mask row": (wrong_mask_row, True),
    "codebook_quantize: scan, another default dtype": (another_default_dtype,),
    "codebook_quantize: no masks in the table": (no_masks_in_the_table,),
    "codebook_quantize: scan, bounds": (bounds, "gaussian", False),
    "codebook_quantize: scan, bounds with a mean and biases": (bounds, "mean", True),
    "codebook_quantize: tiles": (does_not_depend_on_the_tiles,),
    "codebook_quantize: more than a block of keys": (more_than_a_block_of_keys,),
    "sae_encode: one token": (encode, 1, 70, 100, fp32, "gaussian", True, True, "plain"),
    "sae_encode: few tokens": (encode, 3, 33, 65, bf16, "faulty", True, True, "plain"),
    "sae_encode: many tokens": (encode, 17, 40, 100, fp16, "mixed", True, False, "rows"),
    "sae_encode: in chunks": (functools.partial(encode, keys=100), 9, 40, 30, bf16, "mixed", True, True, "rows"),
    "sae_encode: no biases": (encode, 17, 40, 30, fp32, "faulty", False, True, "columns"),
    "sae_encode_topk: one token": (encode_topk, 1, fp32, "gaussian", True, True, False),
    "sae_encode_topk: many tokens": (encode_topk, 17, bf16, "faulty", True, False, False),
    "sae_encode_topk: scan": (encode_topk, 9, bf16, "outliers", True, True, True),
    "sae_encode_topk: scan, no biases": (encode_topk, 9, fp16, "faulty", False, True, True),
    **{f"masked_decode: {name}": (decode, case) for name, case in DECODES.items()},
    "masked_decode: ties of bf16": (ties_of_bf16,),
    **triton_deletions.CASES,
    "codebook_bottleneck: ablate": (through_ops, "ablate", True),
    "codebook_bottleneck: reselect": (through_ops, "reselect", False),
}


# A kernel's every statement is met without them (test_triton_kernels.py).
HEAVY = {
    "codebook_quantize: scan, rows of every size", "codebook_quantize: scan, chunks",
    "codebook_quantize: scan, a sample that lies", "codebook_quantize: list of 256",
    "codebook_quantize: scan, some overflow", "codebook_quantize: scan, two tiles of tokens", "codebook_quantize: tiles",
    "codebook_quantize: scan, bounds with a mean and biases", "codebook_quantize: scan, most deleted",
    "delete_latents: floor, ties", "delete_latents: impl, topk", "delete_latents: layer norm of hurtful rows",
    "delete_latents: norms of hurtful rows",
}  # fmt: skip


if __name__ == "__main__":
    report(CASES, HEAVY)
