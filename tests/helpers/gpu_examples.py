"""Where the GPU tests run, and their examples: seeded pseudo-random ones, since a GPU machine may lack hypothesis.

CU_FAST_TEST_GPU_ON=cpu runs the same files on the CPU's kernels: it shows that the tests hold together, not the GPU.
CU_FAST_TEST_GPU_ON=cuda makes it an error, not a skipped test, that the GPU cannot be used.
CU_FAST_TEST_GPU_IMPL=triton tests the Triton kernels instead; on the CPU that needs TRITON_INTERPRET=1, and patience.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import hurtful
import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.kernels import native, triton

DEVICE = os.environ.get("CU_FAST_TEST_GPU_ON", "cuda")  # also the name of its native kernels
DRY = DEVICE == "cpu"
CHOSEN = os.environ.get("CU_FAST_TEST_GPU_IMPL", "auto")  # what a model is told
IMPL = DEVICE if CHOSEN == "auto" else CHOSEN
REFERENCE_LIMIT = 2e7  # multiply-adds; more takes the reference seconds
SIMILARITIES = ("cosine", "dot", "l2")
TOKENS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 64, 65, 100, 130, 257, 300)
WIDTHS = (1, 3, 8, 16, 17, 31, 32, 33, 64, 65, 100, 257)
CODES = (1, 2, 31, 32, 33, 64, 65, 100, 255, 256, 257, 400, 700, 1500)
KEPT = (1, 2, 5, 8, 20, 32, 33, 64, 100)


def why_not(impl: str = IMPL) -> str | None:
    """Why the tests cannot run here, None where they can. Where a device was asked for, that is an error."""
    if impl == "triton":
        reason = native.failure() or triton.failure(torch.device(DEVICE))
    else:
        reason = native.failure() if DRY else native.cuda_failure()
    if reason is not None and "CU_FAST_TEST_GPU_ON" in os.environ:
        raise RuntimeError(f"CU_FAST_TEST_GPU_ON is {DEVICE!r}, where {impl!r} cannot run: {reason}")
    return reason


def on(value: Any, device: str = DEVICE) -> Any:
    """Tensors to the device, in tuples too; strides survive."""
    if isinstance(value, Tensor):
        once = value[tuple(slice(1) if step == 0 else slice(None) for step in value.stride())]  # of what is expanded
        like = {"dtype": value.dtype, "device": device}
        return torch.empty_strided(once.shape, once.stride(), **like).copy_(once).expand(value.shape)
    if isinstance(value, tuple):
        return tuple(on(part, device) for part in value)
    if isinstance(value, dict):
        return {name: on(part, device) for name, part in value.items()}
    return value


def identical(got: Any, want: Any) -> bool:
    """The same bits, signs of zeros included; NaN equals NaN. Tensors, or tuples of tensors and None."""
    if want is None:
        return got is None
    if not isinstance(want, Tensor):
        return all(identical(a, b) for a, b in zip(got, want, strict=True))
    got, want = got.cpu(), want.cpu()
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    bits = {2: torch.int16, 4: torch.int32}[want.element_size()]
    same = got.contiguous().view(bits) == want.contiguous().view(bits)
    return bool((same | (got.isnan() & want.isnan())).all())


def oracle(work: int) -> str:
    """What to compare with on the CPU: the reference, or the CPU's kernels, as exact, where it would take too long."""
    return "reference" if work <= REFERENCE_LIMIT else "cpu"


# -- examples ----------------------------------------------------------------------------------------------------


def this_card() -> tuple[int, int, int]:
    """Multiprocessors and compute capability of this GPU; an H100's where there is none."""
    if not torch.cuda.is_available():
        return 132, 9, 0
    found = torch.cuda.get_device_properties(0)
    return found.multi_processor_count, found.major, found.minor


def codes_that_scan(T: int, E: int, k: int, C: int, card: tuple[int, int, int] | None = None) -> int:
    """C, or as many more codes as the CUDA kernels scan on a card rather than score; None = this one."""
    if native.failure() is not None:
        return C
    card = card or this_card()
    while not torch.ops.cu_fast.cuda_selection_plan(T, C, E, k, True, *card).startswith("int8 scan"):
        C += C // 8 + 1
        if C * E > 1 << 29:
            raise ValueError(f"no codebook of a reasonable size is scanned at T={T} E={E} k={k}")
    return C


def _size(r: random.Random) -> dict[str, int]:
    """T, E and C whose product the reference can do, k <= C."""
    while True:
        T, E, C = r.choice(TOKENS), r.choice(WIDTHS), r.choice(CODES)
        if T * E * C <= REFERENCE_LIMIT:
            return {"T": T, "E": E, "C": C, "k": min(r.choice(KEPT), C)}


def _scanned_size(r: random.Random) -> dict[str, int]:
    """Sizes that select.h sends through the scan on a GPU: many tokens, or codes that take long to read; few of these."""
    few = r.random() < 0.2
    T = r.choice((1, 4, 7, 8, 9, 16, 32, 33) if few else (64, 65, 129, 256, 257, 300, 515, 1030))
    E, k = (
        r.choice((257, 512, 1000) if few else (64, 96, 130, 257, 512, 1000)),
        r.choice((1, 4, 8, 20, 64, 65, 128, 400)),
    )
    return {"T": T, "E": E, "C": codes_that_scan(T, E, k, 8 * k + r.choice((4096, 4097, 4133, 4351))), "k": k}


def _masks(r: random.Random, T: int, C: int, seed: int) -> tuple[Tensor | None, Tensor | None]:
    share = r.choice(hurtful.SHARES)
    return (None, None) if share is None else hurtful.masks(T, C, share, seed)


def _vector(r: random.Random, size: int, dtype: torch.dtype, seed: int) -> Tensor | None:
    return hurtful.matrix(1, size, "gaussian", dtype, seed)[0] if r.random() < 0.5 else None


def _matrix(r: random.Random, rows: int, width: int, dtype: torch.dtype, seed: int, kind: str | None = None) -> Tensor:
    made = hurtful.matrix(rows, width, kind or r.choice(hurtful.KINDS), dtype, seed)
    return hurtful.strided(made, r.choice(hurtful.LAYOUTS))


def selection(seed: int, scanned: bool = False) -> dict[str, Any]:
    """What select() takes. Kinds, dtypes, layouts, masks, bias and plane vary. ``scanned``: large enough for the scan."""
    r = random.Random(seed)
    T, E, C, k = (_scanned_size(r) if scanned else _size(r)).values()
    dtype = torch.float32 if scanned and T <= 16 else r.choice(hurtful.DTYPES)
    similarity = r.choice(SIMILARITIES)
    return {
        "z": _matrix(r, T, E, r.choice(hurtful.DTYPES), seed),
        "codes": _matrix(r, C, E, dtype, seed + 1),
        "similarity": similarity,
        "bias": None if similarity == "l2" else _vector(r, C, dtype, seed + 2),
        "k": k,
        "mask": _masks(r, T, C, seed + 3),
        "hits": r.random() < 0.5,
        "scan": "int8" if scanned else r.choice(["int8", "none"]),
    }


def select(z, codes, similarity, bias, k, mask, hits, scan, *, impl: str) -> ops.Selection:
    """codebook_quantize of such an example; the reference takes no plane."""
    packed = ops.pack_codes(codes, similarity, bias, scan="none" if impl == "reference" else scan)
    table, row = mask
    return ops.codebook_quantize(z, packed, k=k, mask_table=table, mask_row=row, return_hits=hits, impl=impl)


def encoding(seed: int) -> dict[str, Any]:
    """What encode() takes: dense, or with k and masks."""
    r = random.Random(seed)
    size, dtype, dense = _size(r), r.choice(hurtful.DTYPES), r.random() < 0.4
    T, D, E, k = size.values()
    return {
        "x": _matrix(r, T, D, r.choice(hurtful.DTYPES), seed),
        "W_enc": _matrix(r, E, D, dtype, seed + 1),
        "b_enc": _vector(r, E, dtype, seed + 2),
        "b_pre": _vector(r, D, dtype, seed + 3),
        "activation": r.choice(["relu", "none"]),
        "k": None if dense else k,
        "mask": (None, None) if dense else _masks(r, T, E, seed + 4),
        "scan": None if dense else r.choice(["int8", "none"]),
    }


def encode(x, W_enc, b_enc, b_pre, activation, k, mask, scan, *, impl: str) -> Tensor | ops.Selection:
    packed = ops.pack_codes(W_enc, "dot", b_enc, "none" if k is None or impl == "reference" else scan)
    options = {"activation": activation, "k": k, "mask_table": mask[0], "mask_row": mask[1]}
    return ops.sae_encode(x, packed, b_pre, **options, impl=impl)


def decoding(seed: int) -> dict[str, Any]:
    """What masked_decode takes, ids as it does; -1 and NaN weights beside it included."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    T, D, C, k = _size(r).values()
    dtype = r.choice(hurtful.DTYPES)
    weights = _matrix(r, T, k, r.choice(hurtful.DTYPES), seed + 1) if r.random() < 0.7 else None
    table, row = _masks(r, T, C, seed + 4)
    return {
        "ids": torch.randint(-1, C, (T, k), generator=g, dtype=r.choice([torch.int32, torch.int64])),
        "weights": weights,
        "table": _matrix(r, C, D, dtype, seed + 2),
        "bias": _vector(r, D, dtype, seed + 3),
        "residual": _matrix(r, T, D, dtype, seed + 5) if r.random() < 0.5 else None,
        "mask_table": table,
        "mask_row": row,
        "reduce": r.choice(["sum", "mean"]),
    }


def passage(seed: int) -> dict[str, Any]:
    """What through() takes: a whole bottleneck."""
    r = random.Random(seed)
    size, dtype, encoded = _size(r), r.choice(hurtful.DTYPES), r.random() < 0.7
    T, E, C, k = size.values()
    D, kind = r.choice(WIDTHS), r.choice(["gaussian", "gaussian", "tied", "outliers"])
    return {
        "x": _matrix(r, T, D if encoded else E, dtype, seed),
        "W_enc": _matrix(r, E, D, dtype, seed + 1, kind) if encoded else None,
        "b_enc": _vector(r, E, dtype, seed + 2) if encoded else None,
        "b_pre": _vector(r, D, dtype, seed + 3) if encoded else None,
        "codes": _matrix(r, C, E, dtype, seed + 4),
        "similarity": r.choice(SIMILARITIES),
        "scan": r.choice(["int8", "none"]),
        "table": _matrix(r, C, D, dtype, seed + 5, kind),
        "b_dec": _vector(r, D, dtype, seed + 6),
        "mask": _masks(r, T, C, seed + 7),
        "k": k,
        "activation": r.choice(["relu", "none"]),
        "mask_mode": r.choice(["ablate", "reselect"]),
        "weight": r.choice(["one", "mean", "score"]),
    }


def through(
    x, W_enc, b_enc, b_pre, codes, similarity, scan, table, b_dec, mask, *, impl: str, **options
) -> tuple[Tensor, Tensor]:
    """y and the receipt, which starts at something."""
    packed = ops.pack_codes(codes, similarity, scan="none" if impl == "reference" else scan)
    receipt = torch.tensor([100, 7], device=x.device)
    encoder = None if W_enc is None else (ops.pack_codes(W_enc, "dot", b_enc, "none"), b_pre)
    y = ops.codebook_bottleneck(x, encoder, packed, table, b_dec, *mask, **options, receipt=receipt, impl=impl)
    return y, receipt


# -- streams, graphs, memory: what the CPU has none of, stood in for in a dry run ----------------------------------


def parts(outputs: Any) -> list[Tensor]:
    """The tensors that an operator returned."""
    return [outputs] if isinstance(outputs, Tensor) else [part for part in outputs if part is not None]


def capture(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Capture a call in a CUDA graph: its outputs, and a function that computes them anew where they are."""
    with torch.no_grad():
        if DRY:
            outputs = function()

            def again() -> None:
                with torch.no_grad():
                    new = function()
                for old, fresh in zip(parts(outputs), parts(new), strict=True):
                    old.copy_(fresh)

            return outputs, again
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
    return outputs, graph.replay


@contextlib.contextmanager
def no_waiting():
    """What waits for the device raises."""
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes of the device that tensors hold."""
    return 0 if DRY else torch.cuda.memory_allocated()


def streams(count: int) -> list[contextlib.AbstractContextManager]:
    """Contexts: each puts work on another stream, that starts after what is queued now."""
    if DRY:
        return [contextlib.nullcontext() for _ in range(count)]
    made = [torch.cuda.Stream() for _ in range(count)]
    for stream in made:
        stream.wait_stream(torch.cuda.current_stream())
    return [torch.cuda.stream(stream) for stream in made]


def settle() -> None:
    """Wait for everything."""
    if not DRY:
        torch.cuda.synchronize()
