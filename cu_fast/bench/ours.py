"""This package's operators as providers. Part of ``cu_fast.bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.bench.cells import CLAMP, Inputs
from cu_fast.bench.job import Builder, Job, Skip
from cu_fast.bench.truth import Answer, share_identical

REFERENCE_LIMIT = 5e8  # multiply-adds; more takes the reference seconds
ALL = slice(None)
IDENTICAL_ROWS = 4  # rows that are compared with the reference, bit for bit
IDENTICAL_ROWS_GPU = 64  # rows of a GPU's that are compared with the CPU's

# What is timed, with an implementation and rows to restrict it to; output -> Answer; and a note.
Ours = tuple[Callable[..., Any], Callable[[Any], Answer], str]


def ours(which: str, scan: str) -> Builder:
    """This package: "reference", "triton", or "native", the library's kernels for where the inputs are."""

    def build(inputs: Inputs) -> Job:
        cell, impl = inputs.cell, inputs.x.device.type if which == "native" else which
        scored = cell.k if cell.op == "delete_latents" else cell.C
        if impl == "reference" and cell.T * scored * cell.E > REFERENCE_LIMIT:
            raise Skip("the reference runs in cells of up to 5e8 multiply-adds")
        run, answer, note = _OURS[cell.op](inputs, impl, scan)

        def identical(output: Any) -> float:
            if inputs.host is None:
                return share_identical(output, run("reference", slice(IDENTICAL_ROWS)))
            on_the_cpu = _OURS[cell.op](inputs.host, "cpu", "none")[0]
            return share_identical(output, on_the_cpu("cpu", slice(IDENTICAL_ROWS_GPU)))

        return Job(run, answer, identical, note=note)

    return build


def _pack(codes: Tensor, similarity: str, scan: str, bias: Tensor | None = None) -> tuple[ops.PackedCodes, str]:
    """Packed codes, and what to say of their scan."""
    packed = ops.pack_codes(codes, similarity, bias, scan=scan)
    return packed, "no scan" if packed.scan is None else "scan int8"


def _quantize(inputs: Inputs, impl: str, scan: str) -> Ours:
    packed, note = _pack(inputs.codes, "cosine", scan)

    def run(impl: str = impl, some: slice = ALL) -> ops.Selection:
        return ops.codebook_quantize(inputs.x[some], packed, k=inputs.cell.k, impl=impl, **_masks(inputs, some))

    return run, lambda selection: Answer(selection.ids), note


def _encode_topk(inputs: Inputs, impl: str, scan: str) -> Ours:
    packed, note = _pack(inputs.codes, "dot", scan, inputs.bias)

    def run(impl: str = impl, some: slice = ALL) -> ops.Selection:
        options = _masks(inputs, some)
        return ops.sae_encode(inputs.x[some], packed, inputs.b_pre, k=inputs.cell.k, impl=impl, **options)

    return run, lambda selection: Answer(selection.ids), note


def _encode(inputs: Inputs, impl: str, scan: str) -> Ours:
    packed, _ = _pack(inputs.codes, "dot", "none", inputs.bias)

    def run(impl: str = impl, some: slice = ALL) -> Tensor:
        return ops.sae_encode(inputs.x[some], packed, inputs.b_pre, impl=impl)

    return run, lambda z: Answer(values=z), ""


def _decode(inputs: Inputs, impl: str, scan: str) -> Ours:
    def run(impl: str = impl, some: slice = ALL) -> Tensor:
        ids, weights = inputs.ids[some], inputs.weights[some]
        return ops.masked_decode(ids, weights, inputs.codes, impl=impl, **_masks(inputs, some))

    return run, lambda y: Answer(values=y), ""


def _bottleneck(inputs: Inputs, impl: str, scan: str) -> Ours:
    module = inputs.bottleneck

    def run(impl: str = impl, some: slice = ALL) -> Tensor:
        module.impl = impl
        return module(inputs.x[some], **_masks(inputs, some))

    return run, lambda y: Answer(module.select(inputs.x).ids, y), f"mask mode {module.mask_mode}"


def deletion(inputs: Inputs) -> tuple[ops.Latents, ops.LatentMasks]:
    """What ``delete_latents`` is given beside x and the masks' rows."""
    enc = ops.pack_codes(inputs.codes, "dot", inputs.bias, scan="none")
    latents = ops.Latents(enc, inputs.theta.float(), inputs.dec.float())
    change = torch.zeros(*inputs.latents.shape, 3, device=inputs.x.device)
    change[..., 1] = CLAMP
    return latents, ops.LatentMasks(inputs.latents, change)


def _delete(inputs: Inputs, impl: str, scan: str) -> Ours:
    latents, masks = deletion(inputs)

    def run(impl: str = impl, some: slice = ALL) -> ops.Deletion:
        return ops.delete_latents(inputs.x[some], latents, masks, inputs.mask_row[some], impl=impl)

    return run, lambda deletion: Answer(values=deletion.y), ""


def _masks(inputs: Inputs, some: slice) -> dict[str, Tensor | None]:
    row = None if inputs.mask_row is None else inputs.mask_row[some]
    return {"mask_table": inputs.mask_table, "mask_row": row}


_OURS: dict[str, Callable[[Inputs, str, str], Ours]] = {
    "sae_encode": _encode,
    "sae_encode_topk": _encode_topk,
    "codebook_quantize": _quantize,
    "masked_decode": _decode,
    "bottleneck": _bottleneck,
    "delete_latents": _delete,
}
