"""The Triton kernels under Triton's interpreter, against the reference: TRITON_INTERPRET=1 python tests/kernels/triton_kernels/triton_interpreted.py

Without TRITON_INTERPRET on a GPU. Prints a line of JSON for each case of CASES. In a process of its own: the interpreter
cannot be left again, nor what a kernel did to a GPU's context.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
import warnings
from typing import NamedTuple

import deletions
import gpu_examples
import hurtful
import torch
from calls import call, cosine, plane_of

from cu_fast.kernels import reference

on = functools.partial(gpu_examples.on, device="cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def by_triton(name: str, **given):
    """The Triton kernels of an operator, on the device that the cases are for."""
    return call(name, on=torch.ops.cu_fast_triton, **on(given))


def by_reference(name: str, **given):
    return call(name, on=reference, **given)


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
    high: bool | None = None  # whether some row has high bytes
    tuning: dict | None = None


SELECTIONS = {
    "one token": Quantize(1, 40, 300, 5),
    "one token, one entry, one code": Quantize(1, 1, 1, 1),
    "few tokens": Quantize(3, 33, 301, 20, bf16, share=0.5, hits=True),
    "many tokens": Quantize(18, 40, 150, 5, fp16, "faulty", "tied", share=0.5, score="dot"),
    "list of 256": Quantize(2, 24, 300, 100, share=0.3, hits=True, score="bias"),
    "keys in memory": Quantize(3, 20, 330, 270, share=0.1, hits=True, tuning={"keys": 660}),
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
    "scan, two tiles of tokens": Quantize(66, 64, 150, 3, bf16, scan=True, score="dot"),
    "scan, chunks": Quantize(19, 40, 400, 5, share=0.5, hits=True, scan=True, score="bias", tuning={"chunk": 8}),
    "scan, sample": Quantize(4, 130, 1500, 3, fp16, scan=True, share=0.3, tuning={"sample_share": 4}),
    "scan, outliers": Quantize(9, 200, 500, 5, z="outliers", scan=True, high=True, share=0.1, hits=True),
    "scan, centred": Quantize(9, 130, 400, 5, codes="mean", scan=True, score="signed"),
    "scan, outliers, centred": Quantize(6, 140, 400, 5, bf16, "outliers", "mean", scan=True, high=True, score="l2"),
    "scan, most deleted": Quantize(7, 40, 500, 9, share=0.97, hits=True, scan=True),
    "scan, everything deleted": Quantize(3, 40, 200, 2, share=1.0, hits=True, scan=True),
    "scan, overflow": Quantize(6, 40, 300, 5, codes="equal", scan=True, left="all", tuning={"candidates": 32}),
    "scan, some overflow": Quantize(
        12, 40, 700, 5, codes="clusters20", share=0.5, hits=True, scan=True, left="some", tuning={"candidates": 64}
    ),
    "scan, rows without a bound": Quantize(
        20, 40, 400, 5, bf16, "mixed", share=0.3, hits=True, scan=True, left="some", score="dot"
    ),
    "scan, faulty rows": Quantize(20, 40, 300, 5, z="faulty", scan=True, left="some"),
    "scan, codes without a bound": Quantize(6, 40, 400, 5, codes="mixed", scan=True, score="signed"),
    "scan, codes with NaN and Inf": Quantize(6, 33, 400, 12, codes="faulty", scan=True, share=0.3, hits=True),
    "scan, huge bias": Quantize(6, 40, 300, 5, scan=True, score="huge bias"),
    "scan, ties": Quantize(
        6, 33, 400, 12, codes="tied", z="tied", scan=True, high=False, share=0.3, hits=True, score="dot"
    ),
    "scan, zero codes": Quantize(6, 33, 200, 12, codes="zeros", scan=True, score="dot"),
    "scan, equal": Quantize(4, 33, 300, 12, codes="equal", scan=True),
    "scan, rows apart": Quantize(6, 65, 300, 5, layout="rows", scan=True),
}


class Watch:
    """Starts kernels, and looks at what they leave."""

    def __init__(self, module):
        self.module, self.left, self.high, self.kernels = module, [], [], []
        self.start, module.start = module.start, self

    def __call__(self, kernel, programs, config, **arguments):
        self.start(kernel, programs, config, **arguments)
        name = kernel.__name__
        self.kernels.append(name)
        if name == "scan_codes" and not arguments["SAMPLE"]:
            self.high.append(bool(arguments["has_high"][: arguments["T"]].any()))
        if name == "narrow":
            self.left += arguments["exact"][:programs].tolist()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.module.start = self.start


def same(got, want) -> None:
    for name, a, b in zip(("first", "second", "third"), got, want):
        a, b = a.cpu(), b.cpu()
        if not hurtful.equal(a, b):
            raise AssertionError(f"the {name} result differs: {a.flatten()[:6]} is not {b.flatten()[:6]}")


def selection(case: Quantize) -> None:
    from cu_fast.kernels.triton import codebook_quantize, launch

    z = hurtful.matrix(max(case.T, 1), case.E, case.z, case.dtype, 1)[: case.T]
    codes = hurtful.matrix(case.C, case.E, case.codes, case.dtype, 2)
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
        bias = reference.factors(*reference.pack_digits(codes)[1:], "l2")[1]
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
        assert case.high is None or any(watch.high) == case.high, watch.high


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


def needs_its_bound(term: str) -> None:
    """Codes whose bytes promise more than they hold, and others that hold more: what is left out of the bound drops them."""
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(scan_start=-1)
    C, E, k = 256, 64, 5
    sign = torch.arange(E) % 2 * 2.0 - 1
    better = torch.arange(C)[:, None] % 3 == 0
    z = sign * 100  # bytes as they are: the largest entry is 127
    codes = sign.expand(C, E) * 50
    if term == "residual":
        codes = codes + torch.where(better, 0.45, -0.45) * sign
        codes[~better[:, 0], 6] += sign[6]
    if term == "miss":
        z = torch.where(sign > 0, 100.45, 100.55)  # to 100 and 101
        codes = torch.where(better, 100.0 * (sign > 0), 103.0 * (sign < 0))
    if term == "outliers":
        z = sign.clone()
        z[2] = 1e4
        codes = torch.where(better, codes, 90 * sign)
        codes[:, 2] = torch.where(better[:, 0], 50.4, 49.6)
    z[0], codes[:, 0] = 127 if term != "outliers" else 0, 127
    codes = torch.cat([codes, -codes])  # no mean
    given = dict(z=z[None].contiguous(), codes=codes, k=k, scan=plane_of(codes, on=reference))
    assert not given["scan"][2].any()
    same(by_triton("codebook_quantize", **given), by_reference("codebook_quantize", **given))


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


class Delete(NamedTuple):
    """Tokens of which something has to fire, unless `fires` says otherwise; the rest: deletions.deletion."""

    T: int
    Din: int
    Dout: int
    R: int
    U: int = 3
    M: int = 5
    scale: int = 0
    kind: str = "gaussian"
    dtype: torch.dtype = fp32
    residual: torch.dtype | None = fp32
    latent_kind: str = "gaussian"
    idle: bool = True
    floor: bool = False
    faults: bool = False
    layout: str = "plain"
    seed: int = 0
    fires: bool = True
    tuning: dict | None = None


DELETIONS = {
    "one token": Delete(1, 40, 40, 20, U=1, M=9, residual=None, seed=1),
    "one entry, one latent": Delete(9, 1, 1, 1, M=1, residual=None),
    "layer norm": Delete(9, 33, 40, 20, scale=1, dtype=bf16, residual=bf16),
    "layer norm, one entry": Delete(5, 1, 3, 20, scale=1, fires=False),
    "constant norm": Delete(9, 33, 40, 20, scale=2, dtype=fp16, residual=fp16),
    "norms of hurtful rows": Delete(24, 20, 17, 20, scale=2, kind="mixed"),
    "layer norm of hurtful rows": Delete(24, 20, 17, 20, scale=1, kind="mixed", dtype=bf16, residual=None),
    "no idle values": Delete(9, 40, 15, 20, idle=False),
    "floor": Delete(14, 40, 15, 20, M=20, floor=True),
    "floor, ties": Delete(14, 17, 15, 30, M=30, kind="tied", latent_kind="tied", floor=True),
    "long lists": Delete(5, 33, 15, 150, M=140, floor=True, scale=2),
    "wide": Delete(3, 140, 1030, 20, dtype=bf16, residual=None),
    "wide, fp16": Delete(3, 140, 1030, 20, residual=fp16),
    "NaN and Inf": Delete(20, 33, 40, 20, kind="faulty", residual=None),
    "latents with NaN and Inf": Delete(20, 33, 40, 20, latent_kind="faulty"),
    "huge": Delete(9, 2, 40, 20, kind="huge"),
    "huge, layer norm": Delete(9, 33, 40, 20, kind="huge", scale=1, fires=False),  # squares are infinite
    "denormal": Delete(9, 33, 40, 20, kind="denormal", residual=None, scale=2),
    "zeros": Delete(9, 33, 40, 20, kind="zeros", scale=2, residual=None),
    "faults": Delete(30, 33, 40, 20, faults=True),
    "rows apart": Delete(7, 33, 40, 20, layout="rows"),
    "columns apart": Delete(7, 33, 40, 20, dtype=bf16, residual=bf16, layout="columns"),
    "some tokens at a time": Delete(9, 33, 40, 20, scale=1, floor=True, tuning={"keys": 150}),
    "no latents in the masks": Delete(5, 33, 40, 20, M=0, fires=False),
    "no masks in the table": Delete(5, 33, 40, 20, U=0, fires=False),
    "no tokens": Delete(0, 33, 40, 20, fires=False),
}


def deletion(case: Delete) -> None:
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(**(case.tuning or {}))
    *described, fires, _ = case
    given = deletions.deletion(**dict(zip(Delete._fields, described)))
    want = by_reference("delete_latents", **given)
    got = tuple(result.cpu() for result in by_triton("delete_latents", **given))
    same(got, want)
    assert deletions.keeps_bits(*got, given)
    assert (want[1] > 0).any() == fires, f"{want[1]} latents fired"
    assert want[2].isnan().any() or not case.faults


def infinite(value: float, scale: int, with_an_empty_list: bool) -> None:
    """A token with Inf is NaN wherever it has a mask; one that its factor makes infinite, where its mask lists a latent."""
    given = deletions.deletion(8, 4, 5, 9, U=2, scale=scale)
    given["x"][::2] = value
    given["mask_latents"][1], given["mask_row"] = -1, torch.tensor([0, 0, 1, 1, -1, -1, 0, 1], dtype=torch.int32)
    want = by_reference("delete_latents", **given)
    same(by_triton("delete_latents", **given), want)
    assert want[2].isnan().tolist() == [True, False, with_an_empty_list, False, False, False, True, False]


def deletion_through_ops(kind: str, scale: str) -> None:
    """impl="triton" of the public operator; the rank of "topk" is Triton's too."""
    from cu_fast import ops

    given = deletions.deletion(12, 40, 33, 50, M=20, dtype=bf16, residual=bf16)
    results = []
    for impl, at in (("triton", on(given)), ("reference", given)):
        enc, k = ops.pack_codes(at["enc"], "dot", at["bias"]), 9 if kind == "topk" else None
        latents = ops.Latents(enc, at["theta"], at["dec"], kind=kind, k=k, scale=scale)
        masks = ops.LatentMasks(at["mask_latents"], at["mask_change"])
        results.append(ops.delete_latents(at["x"], latents, masks, at["mask_row"], residual=at["residual"], impl=impl))
    same(*results)
    assert results[1].hits.any()


CASES = {
    **{f"codebook_quantize: {name}": (selection, case) for name, case in SELECTIONS.items()},
    "codebook_quantize: wrong mask row": (wrong_mask_row, False),
    "codebook_quantize: scan, wrong mask row": (wrong_mask_row, True),
    "codebook_quantize: no masks in the table": (no_masks_in_the_table,),
    **{
        f"codebook_quantize: scan, {term} (bound)": (needs_its_bound, term) for term in ("residual", "miss", "outliers")
    },
    "codebook_quantize: tiles": (does_not_depend_on_the_tiles,),
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
    **{f"delete_latents: {name}": (deletion, case) for name, case in DELETIONS.items()},
    "delete_latents: Inf": (infinite, torch.inf, 0, True),
    "delete_latents: Inf, layer norm": (infinite, torch.inf, 1, True),
    "delete_latents: Inf, constant norm": (infinite, torch.inf, 2, True),
    "delete_latents: scaled beyond fp32": (infinite, 1e36, 1, False),  # its standard deviation is 0
    "delete_latents: impl": (deletion_through_ops, "threshold", "layer_norm"),
    "delete_latents: impl, topk": (deletion_through_ops, "topk", "constant_norm"),
    "codebook_bottleneck: ablate": (through_ops, "ablate", True),
    "codebook_bottleneck: reselect": (through_ops, "reselect", False),
}


def report(cases: dict[str, tuple]) -> None:
    """Runs the cases that the command line names, or all."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of the NaN and Inf that are meant
    torch.set_num_threads(1)
    for name in sys.argv[1:] or cases:
        run, *arguments = cases[name]
        begin = time.process_time()
        try:
            run(*arguments)
            failure = None
        except Exception:
            failure = traceback.format_exc()
        print(
            json.dumps({"case": name, "failure": failure, "seconds": round(time.process_time() - begin, 2)}), flush=True
        )


if __name__ == "__main__":
    report(CASES)
