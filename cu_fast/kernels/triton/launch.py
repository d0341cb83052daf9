"""How the Triton kernels are cut: pure, printable choices by architecture and shape. No result depends on them.

Nothing is tuned while a program runs: a choice is a row of TABLE, plus the rules of :func:`choose` and :func:`plan`.
Every row was compiled for every architecture before it was shipped (tests/kernels/triton_kernels); none was measured.
BLOCK_E of a kernel that scores divides what digits are padded to, so that it needs no bounds there.
``cu-fast tune`` measures rows on a user's GPU and keeps them in a file (tiles.py), which is laid over TABLE at the
first choice for an architecture.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.kernels.triton import tiles
from cu_fast.kernels.triton.tiles import Config, Table
from cu_fast.kernels.triton.tiles import config as _config

# The architectures that rows were chosen for, and the bytes of shared memory that a program may have there. Another
# NVIDIA GPU takes the rows of the newest of these that is not newer than itself, an AMD GPU those of gfx942.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}

SCORING = ("score_codes", "encode_tile", "score_candidates", "score_latents")  # they multiply digits
# Keys per token that a program of score_codes keeps in registers: the smallest list that holds k. A larger k goes
# through memory.
LISTS = (16, 64, 256)
MAX_SCAN_K = LISTS[-1]


class Tuning(NamedTuple):
    """Sizes that keep a GPU busy; smaller in tests, to take every path. `cu-fast tune` measures those of MEASURED."""

    chunk: int = 256  # tokens per pass of the scan
    candidates: int = 8192  # a row with more is scored against every code
    sample_share: int = 16  # one tile of codes in 16 gives the first threshold
    scan_start: float = 60.0  # microseconds to launch the scan's kernels
    read_rate: float = 3e6  # bytes per microsecond, from memory; this and the next two are guesses about an H100
    exact_rate: float = 30e6  # products of entries per microsecond, every code scored: nine of digits each
    scan_rate: float = 150e6  # the same, scanned: two of digits each
    # In memory at a time: keys, where k is too large for a list; numbers, of delete_latents; bytes of digits, eight for each.
    keys: int = 1 << 22


TUNING = Tuning()
MEASURED = ("scan_start", "read_rate", "exact_rate", "scan_rate")


class Plan(NamedTuple):
    """How a selection is cut."""

    scans: bool  # by the certified scan; else every code is scored
    chunk: int  # tokens at a time
    parts: int  # of the codes, each one program of score_codes per tile of tokens
    part_codes: int  # codes per part
    score_parts: int  # programs of score_candidates per token
    sample_codes: int  # scanned for the first threshold
    candidates: int  # places per token


# Kernel -> key -> tiles; :func:`choose` makes the key. A key with the architecture, "many gfx942", goes before "many".
# No row was measured.
TABLE = {
    "fix_rows": {"all": _config(4, E=1024)},
    "score_codes": {
        "one": _config(4, 4, T=1, C=32, E=64),
        "few": _config(4, 3, T=16, C=64, E=64),
        "many": _config(8, 3, T=32, C=64, E=64),
        "many gfx942": _config(4, 3, T=16, C=64, E=64),
    },
    "encode_tile": {
        "one": _config(4, 4, T=1, C=32, E=64),
        "few": _config(4, 3, T=16, C=64, E=64),
        "many": _config(8, 3, T=32, C=128, E=64),
        "many sm_90": _config(8, 3, T=64, C=64, E=64),
        "many sm_100": _config(8, 3, T=64, C=64, E=64),
        "many gfx942": _config(8, 3, T=64, C=64, E=64),
    },
    "finish": {"small": _config(4, N=1024), "large": _config(8, N=4096)},
    "scan_rows": {"all": _config(4, E=1024)},
    "scan_codes": {
        "few": _config(4, 4, T=16, C=128, E=64),
        "many": _config(8, 4, T=64, C=128, E=64),
        "many sm_100": _config(8, 4, T=32, C=64, E=64),
        "many gfx942": _config(8, 2, T=64, C=128, E=64),
    },
    "scan_threshold": {"all": _config(4, N=2048)},
    "narrow": {"all": _config(8, N=2048)},
    "score_candidates": {"all": _config(4, 3, C=32, E=64)},
    "gather_sum": {"narrow": _config(2, D=256, UNROLL=8), "wide": _config(4, D=1024, UNROLL=8)},
    "dot_slots": {"few": _config(1, C=8, UNROLL=8), "many": _config(4, C=32, UNROLL=8)},
    "sum_pieces": {"narrow": _config(2, E=256, UNROLL=8), "wide": _config(4, E=1024, UNROLL=8)},
    "sum_codes": {"narrow": _config(2, E=256, UNROLL=8), "wide": _config(4, E=1024, UNROLL=8)},
    "scale_tokens": {"all": _config(4, E=1024, UNROLL=8)},
    "score_latents": {"all": _config(4, 3, C=32, E=64)},
    "add_latents": {"narrow": _config(2, D=256, UNROLL=8), "wide": _config(4, D=1024, UNROLL=8)},
    "dose_latents": {"all": _config(1, UNROLL=16)},
}


def family(arch: str) -> str:
    """The architecture of SHARED_MEMORY whose rows an architecture takes."""
    if not arch.startswith("sm_"):
        return "gfx942"
    number = int(arch[3:])
    return max((known for known in SHARED_MEMORY if known[:3] == "sm_" and int(known[3:]) <= number),
               key=lambda known: int(known[3:]), default="sm_80")  # fmt: skip


def fault(kernel: str, row: Config, arch: str) -> str | None:
    """Why a row cannot be used, None where it can. Shared memory is checked as far as it is known uncompiled.

    Args:
        kernel: its name.
        row: the one in question.
        arch: "sm_90", "gfx942", ...
    """
    for name, size in row.blocks:
        if not 0 < size <= 1 << 16 or size & (size - 1):
            return f"{name} is {size}; it should be a power of two, at most 65536"
        if kernel in (*SCORING, "scan_codes") and name == "BLOCK_E" and not 32 <= size <= reference.ALIGN:
            return f"{name} is {size}; it should be between 32 and {reference.ALIGN}"
    if row.num_warps not in (1, 2, 4, 8, 16):
        return f"num_warps is {row.num_warps}; it should be 1, 2, 4, 8 or 16"
    if not 1 <= row.num_stages <= 8:
        return f"num_stages is {row.num_stages}; it should be between 1 and 8"
    if kernel in (*SCORING, "scan_codes"):
        codes, rows = (reference.DIGITS, reference.DIGITS) if kernel in SCORING else (1, 2)  # bytes per entry
        column = codes * row.block("C") + rows * max(dict(row.blocks).get("BLOCK_T", 1), 16)
        least = (row.num_stages - 1) * column * row.block("E")
        if least > SHARED_MEMORY[family(arch)]:
            return f"its bytes on the way take {least} B of shared memory; {SHARED_MEMORY[family(arch)]} are there"
    return None


RULES = tiles.Rules(TABLE, MEASURED, fault)
# Architecture -> its table, read at first use; cu_fast.bench.tune puts the rows that it tries in here.
IN_FORCE: dict[str, Table] = {}


def in_force(arch: str) -> Table:
    """The table of an architecture: a user's rows over TABLE. Raises ValueError where the user's file is broken."""
    if arch not in IN_FORCE:
        IN_FORCE[arch] = tiles.find(arch, RULES)
    return IN_FORCE[arch]


def key_of(rows: Iterable[str], name: str, arch: str) -> str:
    """The key of a kernel's rows for a name: with the architecture, with its family, or the name alone."""
    return next(key for key in (f"{name} {arch}", f"{name} {family(arch)}", name) if key in rows)


def choose(kernel: str, arch: str, T: int, E: int, C: int, k: int) -> Config:
    """The tiles of a kernel.

    Args:
        kernel: its name.
        arch: "sm_90", "gfx942", ...
        T: tokens.
        E: width of a code; D for gather_sum, encode_tile and the kernels of delete_latents.
        C: codes; E for encode_tile.
        k: codes kept per token.
    """
    if kernel in ("score_codes", "encode_tile"):
        name = "one" if T == 1 else "few" if T <= 16 else "many"
    elif kernel == "scan_codes":
        name = "few" if T <= 16 else "many"
    elif kernel == "finish":
        name = "small" if T > 64 and k <= LISTS[-1] else "large"
    elif kernel in ("gather_sum", "sum_pieces", "sum_codes", "add_latents"):
        name = "wide" if E > 1024 else "narrow"
    elif kernel == "dot_slots":
        name = "few" if k <= 8 else "many"
    else:
        name = "all"
    rows = in_force(arch).rows[kernel]
    row = rows[key_of(rows, name, arch)]
    return _with_list(row, next((n for n in LISTS if k <= n), 0)) if kernel == "score_codes" else row


def _with_list(row: Config, keep: int) -> Config:
    T = min(row.block("T"), 16) if keep == LISTS[-1] else row.block("T")  # the registers of more tokens would spill
    return row._replace(blocks=(("BLOCK_T", T), *row.blocks[1:], ("BLOCK_K", keep)))


def tuning_of(arch: str) -> Tuning:
    """The sizes of an architecture: a user's over TUNING."""
    return TUNING._replace(**in_force(arch).tuning)


def fixed_tokens(W: int, arch: str) -> int:
    """How many tokens are put into fixed point at a time; W: bytes of a digit."""
    return max(8 * tuning_of(arch).keys // max(reference.DIGITS * W, 1), 1)


def scan_is_faster(T: int, entries: int, tuning: Tuning) -> bool:
    """Whether the scan is estimated to be faster than scoring every code.

    The scan reads a byte per entry instead of three digits and multiplies it twice instead of nine times, but starts
    more kernels.

    Args:
        T: tokens.
        entries: C E.
        tuning: the architecture's rates.
    """
    exact = max(entries * reference.DIGITS / tuning.read_rate, T * entries / tuning.exact_rate)
    return tuning.scan_start + max(entries / tuning.read_rate, T * entries / tuning.scan_rate) < exact


def plan(T: int, E: int, C: int, k: int, has_plane: bool, multiprocessors: int, arch: str) -> Plan:
    """How a selection is cut.

    Args:
        T: tokens.
        E: width of a code.
        C: codes.
        k: codes kept per token.
        has_plane: there is an int8 plane; whether it is scanned decides :func:`scan_is_faster`.
        multiprocessors: of the device.
        arch: "sm_90", "gfx942", ...
    """
    tuning = tuning_of(arch)
    scans = has_plane and k <= MAX_SCAN_K and 8 * k <= C and scan_is_faster(T, C * E, tuning)
    tile = choose("score_codes", arch, T, E, C, k)
    if scans:
        chunk = min(T, tuning.chunk)
    elif tile.block("K") > 0:
        chunk = min(T, fixed_tokens(_ceil(E, reference.ALIGN) * reference.ALIGN, arch))
    else:
        chunk = min(T, max(tuning.keys // C, 1))
    chunk = max(chunk, 1)
    parts = max(1, min(_ceil(2 * multiprocessors, _ceil(chunk, tile.block("T"))), _ceil(C, tile.block("C"))))
    part_codes = _ceil(_ceil(C, parts), tile.block("C")) * tile.block("C")
    sample = max(_ceil(C, tuning.sample_share), 16 * k)
    score_parts = max(1, min(16, 2 * multiprocessors // chunk))
    return Plan(scans, chunk, _ceil(C, part_codes), part_codes, score_parts, min(sample, C), tuning.candidates)


def guess_rank(k: int, sample: int, C: int) -> int:
    """The rank in a sample of the codes above which k of all C should be: their number in it varies by its root."""
    expected = k * sample / C
    return math.ceil(expected + 3 * math.sqrt(expected) + 1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def configurations() -> Iterator[tuple[str, str, Config]]:
    """Every configuration that ships: kernel, key, tiles."""
    for kernel, rows in TABLE.items():
        for name, row in rows.items():
            if kernel == "score_codes":
                for keep in (*LISTS, 0):
                    yield kernel, f"{name}, list of {keep}", _with_list(row, keep)
            else:
                yield kernel, name, row


def arch_of(device: torch.device) -> str:
    """A device's architecture: "sm_90", "gfx942", ...; "sm_80" for a CPU, where Triton's interpreter runs."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def multiprocessors_of(device: torch.device) -> int:
    """A GPU's multiprocessors; 3 for a CPU, where Triton's interpreter runs, so that work is cut there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which kernels are launched on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def options(config: Config) -> dict[str, Any]:
    """Options of Triton's compiler. Products and sums are never fused: scores and norms are defined without fusion."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}


def start(kernel: Any, programs: int, config: Config, **arguments: Any) -> None:
    """Start a kernel.

    Args:
        kernel: a ``triton.jit`` function.
        programs: how many.
        config: its tiles.
        arguments: the kernel's, by name, without the tiles.
    """
    kernel[(programs,)](**arguments, **dict(config.blocks), **options(config))


def rows_contiguous(matrix: Tensor) -> Tensor:
    """The matrix [N, M]; a copy where the entries of a row are not adjacent."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def vector(x: Tensor | None) -> Tensor | None:
    """A vector as contiguous fp32, or None."""
    return None if x is None else x.float().contiguous()
