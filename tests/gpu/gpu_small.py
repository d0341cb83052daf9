"""Every kernel on small inputs, for compute-sanitizer: PYTHONPATH=tests/helpers python tests/gpu/gpu_small.py. Not a pytest file.

All that is not a kernel of this package happens on the CPU, packing included: instrumented kernels are slow. The
answers are compared with the CPU's, so that a kernel that a tool made do nothing is noticed.
"""

from __future__ import annotations

import gpu_examples as gpu
import hurtful
import torch
from gpu_examples import DEVICE, IMPL, identical, on

from cu_fast import ops

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

# What select.h decides by. T: one to four or more tokens share a tile of exact scores, and 4, 8, 32 or 64 one of
# the scan, which needs some work to be worth it: with a plane there are at least C codes, and as many as it takes.
# k: the lists change at 64 and at 512.
# T, E, C, k, dtype, kind of z, kind of codes, share deleted, plane
SELECTIONS = [
    (1, 40, 300, 5, fp32, "gaussian", "gaussian", None, False),
    (4, 64, 500, 70, bf16, "gaussian", "tied", 0.5, False),
    (17, 33, 301, 20, fp16, "faulty", "gaussian", 0.5, False),
    (3, 48, 1300, 600, fp32, "gaussian", "gaussian", 0.3, False),
    (3, 520, 36_000, 6, bf16, "gaussian", "gaussian", 0.5, True),
    (8, 520, 36_000, 6, bf16, "outliers", "gaussian", None, True),
    (30, 520, 26_000, 20, bf16, "outliers", "mean", 0.5, True),
    (70, 520, 28_000, 65, fp16, "mixed", "mixed", 0.5, True),
    (260, 260, 14_000, 8, fp32, "gaussian", "tied", 0.01, True),
    (200, 520, 9000, 4, fp32, "gaussian", "equal", None, True),
    (200, 520, 9000, 520, fp32, "gaussian", "gaussian", 0.3, True),
]


def selections() -> None:
    for T, E, C, k, dtype, kind, code_kind, share, scans in SELECTIONS:
        C = gpu.codes_that_scan(T, E, k, C) if scans else C
        z, codes = hurtful.matrix(T, E, kind, dtype, 1), hurtful.matrix(C, E, code_kind, dtype, 2)
        table, row = (None, None) if share is None else hurtful.masks(T, C, share, 3)
        options = {"k": k, "mask_table": table, "mask_row": row, "return_hits": share is not None}
        packed = ops.pack_codes(codes, scan="int8" if scans else "none")
        want = ops.codebook_quantize(z, packed, **options, impl="cpu")
        got = ops.codebook_quantize(on(z), moved(packed), **on(options), impl=IMPL)
        require(identical(got, want), f"codebook_quantize at T={T} E={E} C={C} k={k}")


def moved(packed: ops.PackedCodes) -> ops.PackedCodes:
    return packed.to(DEVICE)


def encoders() -> None:
    for T, D, E, dtype in ((1, 70, 200, fp32), (5, 64, 130, bf16), (40, 33, 90, fp16)):
        x, W_enc = hurtful.matrix(T, D, "faulty", dtype, 1), hurtful.matrix(E, D, "gaussian", dtype, 2)
        b_enc, b_pre = (hurtful.matrix(1, width, "gaussian", fp32, 3)[0] for width in (E, D))
        masks = dict(zip(("mask_table", "mask_row"), hurtful.masks(T, E, 0.5, 4)))
        for options in ({}, {"k": 9, **masks}):
            packed = ops.pack_codes(W_enc, "dot", b_enc)
            want = ops.sae_encode(x, packed, b_pre, **options, impl="cpu")
            got = ops.sae_encode(on(x), moved(packed), on(b_pre), **on(options), impl=IMPL)
            require(identical(got, want), f"sae_encode at T={T} D={D} E={E}")


def decoders() -> None:
    for T, k, D, dtype in ((1, 8, 600, bf16), (9, 140, 70, fp32), (3, 5, 1030, fp16)):
        g = torch.Generator().manual_seed(1)
        ids, weights = torch.randint(-1, 300, (T, k), generator=g, dtype=torch.int32), torch.randn(T, k, generator=g)
        rest = (hurtful.matrix(300, D, "gaussian", dtype, 2), hurtful.matrix(1, D, "gaussian", fp32, 3)[0],
                hurtful.matrix(T, D, "gaussian", dtype, 4), *hurtful.masks(T, 300, 0.4, 5))  # fmt: skip
        want = ops.masked_decode(ids, weights, *rest, impl="cpu")
        require(identical(ops.masked_decode(*on((ids, weights, *rest)), impl=IMPL), want), f"masked_decode at T={T}")


def bottlenecks() -> None:
    for T, E, C, scan in ((1, 64, 900, "none"), (260, 256, gpu.codes_that_scan(260, 256, 8, 20_000), "int8")):
        x, W_enc, codes, table = (
            hurtful.matrix(rows, width, "gaussian", bf16, seed)
            for seed, (rows, width) in enumerate(((T, 48), (E, 48), (C, E), (C, 530)))
        )
        packed, mask = ops.pack_codes(codes, scan=scan), hurtful.masks(T, C, 0.5, 5)
        encoder = ops.pack_codes(W_enc, "dot")
        for options in ({"mask_mode": "ablate"}, {"mask_mode": "reselect", "weight": "score"}):
            receipt = torch.zeros(2, dtype=torch.int64)
            there = on(receipt)
            want = ops.codebook_bottleneck(
                x, (encoder, None), packed, table, None, *mask, k=8, receipt=receipt, **options, impl="cpu"
            )
            got = ops.codebook_bottleneck(
                on(x), (moved(encoder), None), moved(packed), on(table), None, *on(mask), k=8, receipt=there, **options,
                impl=IMPL,
            )  # fmt: skip
            require(identical((got, there), (want, receipt)), f"codebook_bottleneck at T={T}")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"error: {what} differs from the CPU's")


if __name__ == "__main__":
    if (reason := gpu.why_not()) is not None:
        raise SystemExit(f"error: {reason}")
    selections()
    encoders()
    decoders()
    bottlenecks()
    gpu.settle()
    print(f"every kernel ran on {DEVICE} and agrees with the CPU")
