"""What ``cu-fast tune`` tries: candidates for each row of the Triton kernels' table, and the calls that they are timed in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from cu_fast.bench.cells import Cell
from cu_fast.kernels.triton import launch, tiles
from cu_fast.kernels.triton.tiles import Config


class Scene(NamedTuple):
    """A call in which a row is timed; scan: by the int8 scan, else every code is scored."""

    cell: Cell
    scan: bool = False
    hits: bool = False


def _quantize(T: int, k: int, scan: bool = False, E: int = 512, C: int = 25_000) -> Scene:
    return Scene(Cell("codebook_quantize", T, E, C, k, "bf16"), scan)


def _encode(T: int) -> Scene:
    return Scene(Cell("sae_encode", T, 2048, 2048, 1, "bf16"))


def _decode(D: int) -> Scene:
    return Scene(Cell("masked_decode", 256, D, 25_000, 32, "bf16"))


def _delete(k: int, E: int = 2304) -> Scene:
    return Scene(Cell("delete_latents", 64, E, 8192, k, "bf16", "rows"))


# By kernel and what a row is chosen for, in the order of measuring: what takes most of the time first.
SCENES: dict[str, dict[str, tuple[Scene, ...]]] = {
    "score_codes": {
        "one": (_quantize(1, 8), _quantize(1, 64)),
        "few": (_quantize(4, 8), _quantize(4, 64)),
        "many": (_quantize(64, 8), _quantize(64, 64)),
    },
    "scan_codes": {"few": (_quantize(8, 8, scan=True),), "many": (_quantize(256, 8, scan=True),)},
    "gather_sum": {"narrow": (_decode(768),), "wide": (_decode(4096),)},
    "encode_tile": {"one": (_encode(1),), "few": (_encode(4),), "many": (_encode(256),)},
    "fix_rows": {"all": (_encode(256),)},
    "finish": {"small": (_quantize(256, 64, scan=True),), "large": (_quantize(1, 64),)},
    "score_candidates": {"all": (_quantize(256, 64, scan=True),)},
    "narrow": {"all": (_quantize(256, 64, scan=True),)},
    "scan_threshold": {"all": (_quantize(256, 64, scan=True),)},
    "scan_rows": {"all": (_quantize(256, 8, scan=True, E=2048, C=8192),)},
    "scale_tokens": {"all": (_delete(20),)},
    "score_latents": {"all": (_delete(20), _delete(345))},
    "add_latents": {"narrow": (_delete(345, 768),), "wide": (_delete(345),)},
    "dose_latents": {"all": (_delete(20),)},
}
# Where scanning and scoring all are compared; the first and last of each axis give the rates.
CROSSING = [_quantize(T, 8, scan=True, C=C) for C in (4096, 25_000) for T in (1, 8, 64, 256)]


def _rows(num_warps: Sequence[int], num_stages: Sequence[int] = (2,), **blocks: Sequence[int]) -> tuple[Config, ...]:
    cut = itertools.product(num_warps, num_stages, *blocks.values())
    return tuple(tiles.config(warps, stages, **dict(zip(blocks, sizes))) for warps, stages, *sizes in cut)


_FEW = {
    "one": _rows((2, 4), (2, 4), T=(1,), C=(32, 64), E=(64,)),
    "few": _rows((4, 8), (2, 3), T=(16,), C=(32, 64), E=(64,)),
}
_SUMS = {
    "narrow": _rows((2,), D=(128, 256, 512), UNROLL=(4, 8)),
    "wide": _rows((4,), D=(512, 1024, 2048), UNROLL=(4, 8)),
}
GRID: dict[str, dict[str, tuple[Config, ...]]] = {
    "score_codes": _FEW | {"many": _rows((4, 8), (3,), T=(16, 32), C=(32, 64), E=(64,))},
    "scan_codes": {
        "few": _rows((4, 8), (2, 4), T=(16,), C=(64, 128), E=(64,)),
        "many": _rows((8,), (2, 4), T=(32, 64), C=(64, 128), E=(64,)),
    },
    "gather_sum": _SUMS,
    "encode_tile": _FEW | {"many": _rows((4, 8), (3,), T=(32, 64), C=(64, 128), E=(64,))},
    "fix_rows": {"all": _rows((4, 8), E=(512, 1024, 2048))},
    "finish": {"small": _rows((4, 8), N=(512, 1024, 2048)), "large": _rows((4, 8), N=(2048, 4096, 8192))},
    "score_candidates": {"all": _rows((4,), (2, 3, 4), C=(16, 32, 64), E=(64,))},
    "narrow": {"all": _rows((4, 8), N=(1024, 2048, 4096))},
    "scan_threshold": {"all": _rows((4, 8), N=(1024, 2048, 4096))},
    "scan_rows": {"all": _rows((4, 8), E=(512, 1024, 2048))},
    "scale_tokens": {"all": _rows((2, 4), E=(512, 1024), UNROLL=(4, 8))},
    "score_latents": {"all": _rows((2, 4, 8), (2, 3), C=(16, 32, 64), E=(64,))},
    "add_latents": _SUMS,
    "dose_latents": {"all": _rows((1, 2), UNROLL=(8, 16, 32))},
}


def shipped_row(kernel: str, name: str, arch: str) -> Config:
    rows = launch.TABLE[kernel]
    return rows[launch.key_of(rows, name, arch)]


def candidates(kernel: str, name: str, arch: str) -> dict[Config, str | None]:
    """What is tried for a row, that which ships first, and why some cannot be tried; None where nothing is known."""
    return {row: launch.fault(kernel, row, arch) for row in (shipped_row(kernel, name, arch), *GRID[kernel][name])}


def proofs(kernel: str, scene: Scene) -> list[Scene]:
    """What a row has to run beside its scenes: more to hold, and lists of every length where the kernel keeps one."""
    ks = (*launch.LISTS, launch.LISTS[-1] + 1) if kernel == "score_codes" else (scene.cell.k,)
    mask = {"sae_encode": "none", "delete_latents": "one"}.get(scene.cell.op, "50%")
    return [
        Scene(dataclasses.replace(scene.cell, k=min(k, scene.cell.C), dtype="fp32", mask=mask), scene.scan, hits=True)
        for k in ks
    ]
