"""Who does a cell's job: this package's implementations, and eager PyTorch code. Part of ``cu_fast.bench``.

A provider is a function that prepares a :class:`Job` for a cell's inputs, everything that a user would do once
included: packing, normalising, casting, compiling. The eager code is what a careful user writes: no copy that can be
avoided, in-place masking, cosine as a product with codes that were normalised before. Other libraries are in
``rivals``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cu_fast import ops
from cu_fast.bench.cells import Inputs
from cu_fast.bench.truth import Answer, share_identical

REFERENCE_LIMIT = 5e8  # multiply-adds; more takes the reference seconds
ALL = slice(None)
IDENTICAL_ROWS = 4  # rows that are compared with the reference, bit for bit
IDENTICAL_ROWS_GPU = 64  # rows of a GPU's that are compared with the CPU's
MEMORY_SHARE = 0.8  # of the free memory that a provider may plan to use


class Skip(Exception):
    """A provider that does not run in this cell: the status and the reason that its row will hold."""

    def __init__(self, reason: str, status: str = "skipped") -> None:
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass
class Job:
    """What is timed, and how its output is judged.

    call: timed. answer: output -> Answer, not timed; None where there is nothing to judge. identical: output ->
    share of its first rows that equal the reference's, bit for bit. before: runs untimed before each timed call.
    divide: calls that one ``call`` stands for. note: goes into the row.
    """

    call: Callable[[], Any]
    answer: Callable[[Any], Answer] | None = None
    identical: Callable[[Any], float] | None = None
    before: Callable[[], Any] | None = None
    divide: int = 1
    note: str = ""


Builder = Callable[[Inputs], Job]


def require_memory(limit: int | None, needed: int, what: str) -> None:
    """Raises Skip where ``needed`` bytes are more than may be used: of ``limit``, None = of what the CPU has free."""
    free = available_memory() if limit is None else limit
    if needed > MEMORY_SHARE * free:
        raise Skip(f"{what} would take {needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free")


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- this package ------------------------------------------------------------------------------------------------

# What is timed, with an implementation and rows to restrict it to; output -> Answer; and a note.
Ours = tuple[Callable[..., Any], Callable[[Any], Answer], str]


def ours(which: str, scan: str) -> Builder:
    """This package: "reference", "triton", or "native", the library's kernels for where the inputs are."""

    def build(inputs: Inputs) -> Job:
        cell, impl = inputs.cell, inputs.x.device.type if which == "native" else which
        if impl == "reference" and cell.T * cell.C * cell.E > REFERENCE_LIMIT:
            raise Skip("the reference runs in cells of up to 5e8 multiply-adds")
        run, answer, note = _OURS[cell.op](inputs, impl, scan)

        def identical(output: Any) -> float:
            if inputs.host is None:
                return share_identical(output, run("reference", slice(IDENTICAL_ROWS)))
            on_the_cpu = _OURS[cell.op](inputs.host, "cpu", "fp32")[0]
            return share_identical(output, on_the_cpu("cpu", slice(IDENTICAL_ROWS_GPU)))

        return Job(run, answer, identical, note=note)

    return build


def _pack(codes: Tensor, similarity: str, scan: str, bias: Tensor | None = None) -> tuple[ops.PackedCodes, str]:
    """Packed codes, and what to say of their scan."""
    packed = ops.pack_codes(codes, similarity, bias, scan=scan)
    return packed, "scan fp32" if packed.scan is None else "scan int8"


def _quantize(inputs: Inputs, impl: str, scan: str) -> Ours:
    packed, note = _pack(inputs.codes, "cosine", scan)

    def run(impl: str = impl, some: slice = ALL) -> ops.Selection:
        return ops.codebook_quantize(inputs.x[some], packed, k=inputs.cell.k, impl=impl, **_masks(inputs, some))

    return run, lambda selection: Answer(selection.ids), note


def _encode_topk(inputs: Inputs, impl: str, scan: str) -> Ours:
    packed, note = _pack(inputs.codes, "dot", scan, inputs.bias)
    W_enc, b_enc, b_pre, k = inputs.codes, inputs.bias, inputs.b_pre, inputs.cell.k

    def run(impl: str = impl, some: slice = ALL) -> ops.Selection:
        options = _masks(inputs, some)
        return ops.sae_encode(inputs.x[some], W_enc, b_enc, b_pre, k=k, scan=packed.scan, impl=impl, **options)

    return run, lambda selection: Answer(selection.ids), note


def _encode(inputs: Inputs, impl: str, scan: str) -> Ours:
    def run(impl: str = impl, some: slice = ALL) -> Tensor:
        return ops.sae_encode(inputs.x[some], inputs.codes, inputs.bias, inputs.b_pre, impl=impl)

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


def _masks(inputs: Inputs, some: slice) -> dict[str, Tensor | None]:
    row = None if inputs.mask_row is None else inputs.mask_row[some]
    return {"mask_table": inputs.mask_table, "mask_row": row}


_OURS: dict[str, Callable[[Inputs, str, str], Ours]] = {
    "sae_encode": _encode,
    "sae_encode_topk": _encode_topk,
    "codebook_quantize": _quantize,
    "masked_decode": _decode,
    "bottleneck": _bottleneck,
}


# -- PyTorch -----------------------------------------------------------------------------------------------------


def normalised(codes: Tensor) -> Tensor:
    """Codes of norm 1; F.normalize would leave those shorter than 1e-12 short."""
    return codes / codes.norm(dim=1, keepdim=True).clamp(min=1e-38)


def select(z: Tensor, codes: Tensor, bias: Tensor | None, deleted: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The usual way: all scores, -inf where deleted, topk. Returns scores and ids, [T, k]."""
    scores = F.linear(z, codes, bias)
    if deleted is not None:
        scores.masked_fill_(deleted, -torch.inf)
    return torch.topk(scores, k)


def select_latents(
    x: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor, deleted: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    values, ids = select(x - b_pre, W_enc, b_enc, deleted, k)
    return torch.relu(values), ids


def encode(x: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return torch.relu(F.linear(x - b_pre, W_enc, b_enc))


def decode(ids: Tensor, weights: Tensor | None, table: Tensor, deleted: Tensor | None) -> Tensor:
    return F.embedding_bag(ids, table, mode="sum", per_sample_weights=_ablated(ids, weights, table, deleted))


def gather_decode(ids: Tensor, weights: Tensor | None, table: Tensor, deleted: Tensor | None) -> Tensor:
    return torch.einsum("tk,tkd->td", _ablated(ids, weights, table, deleted), table[ids])


def _ablated(ids: Tensor, weights: Tensor | None, table: Tensor, deleted: Tensor | None) -> Tensor | None:
    if deleted is None:
        return weights
    kept = ~(deleted[0][ids] if len(deleted) == 1 else deleted.gather(1, ids))
    return kept.to(table.dtype) if weights is None else weights * kept


def through_bottleneck(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, codes: Tensor, table: Tensor, b_dec: Tensor, deleted: Tensor | None, k: int
) -> Tensor:
    """What a CodebookBottleneck computes: encode, the k most similar codes, the sum of their rows. x [..., D]."""
    flat = x.reshape(-1, x.shape[-1])
    ids = select(torch.relu(F.linear(flat, W_enc, b_enc)), codes, None, None, k)[1]
    return (decode(ids, None, table, deleted) + b_dec).reshape(x.shape)


def bottleneck_weights(module: Any, dtype: torch.dtype) -> list[Tensor]:
    """W_enc, b_enc, codes, table and b_dec of ``through_bottleneck``, folded as in the module itself."""
    sae, rms, codes = module.autoencoder, module.rms, module.codebook.codes.detach().float()
    W_enc = sae.W_enc.detach().float() / rms
    b_enc = sae.b_enc.detach().float() - sae.W_enc.detach().float() @ sae.b_pre.detach().float()
    W_dec, b_dec = sae.W_dec.detach().float() * rms, sae.b_dec.detach().float() * rms
    return [tensor.to(dtype) for tensor in (W_enc, b_enc, normalised(codes), codes @ W_dec.T, b_dec)]


def eager(dtype: torch.dtype, compiled: bool = False, gather: bool = False, mode: str | None = None) -> Builder:
    """PyTorch code in one dtype; ``gather``: decode by gather and einsum; ``mode``: torch.compile's."""

    def build(inputs: Inputs) -> Job:
        cell, deleted = inputs.cell, inputs.deleted
        scores = 0 if cell.op in ("sae_encode", "masked_decode") else cell.T * cell.C
        copies = 2 if cell.op == "bottleneck" else 1
        require_memory(
            inputs.memory, 4 * copies * cell.C * cell.E + 2 * dtype.itemsize * scores, "codes, and scores [T, C],"
        )

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        def wrap(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False, mode=mode) if compiled else function

        k, x = cell.k, cast(inputs.x)
        if cell.op == "codebook_quantize":
            codes, run = normalised(inputs.codes.float()).to(dtype), wrap(select)
            return Job(lambda: run(x, codes, None, deleted, k), _ids_of_topk)
        codes, bias, b_pre = cast(inputs.codes), cast(inputs.bias), cast(inputs.b_pre)
        if cell.op == "sae_encode_topk":
            run = wrap(select_latents)
            return Job(lambda: run(x, b_pre, codes, bias, deleted, k), _ids_of_topk)
        if cell.op == "sae_encode":
            run = wrap(encode)
            return Job(lambda: run(x, b_pre, codes, bias), lambda z: Answer(values=z))
        if cell.op == "masked_decode":
            ids, weights, run = inputs.ids.long(), cast(inputs.weights), wrap(gather_decode if gather else decode)
            if gather:
                require_memory(inputs.memory, 2 * dtype.itemsize * cell.T * cell.k * cell.E, "gathered rows [T, k, D]")
            return Job(lambda: run(ids, weights, codes, deleted), lambda y: Answer(values=y))
        W_enc, b_enc, unit, table, b_dec = bottleneck_weights(inputs.bottleneck, dtype)
        run = wrap(through_bottleneck)

        def answer(y: Tensor) -> Answer:
            return Answer(select(torch.relu(F.linear(x, W_enc, b_enc)), unit, None, None, k)[1], y)

        return Job(lambda: run(x, W_enc, b_enc, unit, table, b_dec, deleted, k), answer)

    return build


def dense(dtype: torch.dtype) -> Builder:
    """Decode as a product of dense activations [T, C], which exist already, with the table."""

    def build(inputs: Inputs) -> Job:
        cell = inputs.cell
        needed = (4 + dtype.itemsize) * cell.T * cell.C + dtype.itemsize * cell.C * cell.E
        require_memory(inputs.memory, needed, "dense activations [T, C]")
        ids, weights = inputs.ids.long(), inputs.weights.float()
        activations = torch.zeros(cell.T, cell.C, device=ids.device).scatter_add_(1, ids, weights).to(dtype)
        if inputs.deleted is not None:
            activations.masked_fill_(inputs.deleted, 0)
        columns = inputs.codes.to(dtype).T
        return Job(lambda: F.linear(activations, columns), lambda y: Answer(values=y), note="activations ready, masked")

    return build


def _ids_of_topk(output: tuple[Tensor, Tensor]) -> Answer:
    return Answer(output[1])


_EVERYWHERE: dict[str, Builder] = {
    "cu_fast": ours("native", "auto"),
    "cu_fast_fp32": ours("native", "fp32"),
    "reference": ours("reference", "auto"),
    "torch_fp32": eager(torch.float32),
    "torch_bf16": eager(torch.bfloat16),
    "torch_compile": eager(torch.float32, compiled=True),
}
_SCANLESS = {name: build for name, build in _EVERYWHERE.items() if name != "cu_fast_fp32"}

PROVIDERS: dict[str, dict[str, Builder]] = {
    "sae_encode": dict(_SCANLESS),
    "sae_encode_topk": dict(_EVERYWHERE),
    "codebook_quantize": dict(_EVERYWHERE),
    "masked_decode": _SCANLESS
    | {
        "torch_compile": eager(torch.float32, compiled=True, gather=True),
        "torch_gather": eager(torch.float32, gather=True),
        "torch_dense_fp32": dense(torch.float32),
        "torch_dense_bf16": dense(torch.bfloat16),
    },
    "bottleneck": dict(_SCANLESS),
}
