"""What the kernels of a selection would take on an H100 at best, predicted from rates: python benchmarks/roofline.py.

Prints the table in docs/gpu.md. Nothing here was measured; csrc/cuda/select.h decides with the same rates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# A microsecond of an H100 SXM: bytes from memory (3.35 TB/s) and from the second-level cache (5.5 TB/s, assumed),
# multiply-adds of int8 on matrix units (60 % of 1979 TOPS, assumed) and by dp4a (64 of four each per clock and
# multiprocessor, assumed: 132 at 1.7 GHz), and of fp32, not fused (half of 33.5 T operations a second).
MEMORY, CACHE = 3.35e6, 5.5e6
BYTE_PRODUCTS, DOT_PRODUCTS, PRODUCTS = 600e6, 57e6, 16.7e6
DIGITS = 3  # of an entry, of codes and of rows alike
ROW_DIGITS = 2  # of a row in the scan
CACHE_BYTES = 50e6
# select.h: tokens at a time, the share of codes in the sample, microseconds that the scan's kernels take to start.
CHUNK, SAMPLE, SCAN_START = 1024, 16, 10.0
START = 3.0  # assumed, of two or three kernels from a graph
SCORED = 4  # codes scored for each that is kept, assumed; depends on the data

CASES = [
    # what, T, E, C, k
    *(("selection", T, 2048, 65_536, 64) for T in (1, 16, 256, 2048)),
    ("bottleneck, D = 768", 1, 768, 10_000, 8),
    *(("selection", T, 512, 25_000, 8) for T in (1, 64, 512)),
]


class Cost(NamedTuple):
    """Of one kernel: bytes from memory, bytes from the second-level cache, microseconds of arithmetic."""

    memory: float
    cache: float
    arithmetic: float

    @property
    def microseconds(self) -> float:
        return max(self.memory / MEMORY, self.cache / CACHE, self.arithmetic)


def tile_tokens(T: int) -> int:
    """select.h: tokens of a tile of exact scores."""
    return 1 if T == 1 else 4 if T <= 4 else 16 if T <= 64 else 128


def scored_exactly(T: int, E: int, C: int) -> Cost:
    """select_exact, and the encoder: every tile of tokens reads all codes, the first time from memory."""
    tile, entries = tile_tokens(T), C * E
    rate = DOT_PRODUCTS if tile <= 4 else BYTE_PRODUCTS
    return Cost(DIGITS * entries, math.ceil(T / tile) * DIGITS * entries, T * entries * DIGITS**2 / rate)


def scanned(T: int, E: int, C: int) -> Cost:
    """scan_codes, both launches: each chunk of tokens reads the plane, from memory unless it fits the cache."""
    entries, chunks = C * E * (1 + 1 / SAMPLE), math.ceil(T / CHUNK)
    tiles = math.ceil(min(T, CHUNK) / 64) * chunks
    reads = 1 if C * E <= CACHE_BYTES else chunks
    return Cost(reads * entries, tiles * entries, T * entries * ROW_DIGITS / BYTE_PRODUCTS)


def candidates_scored(T: int, E: int, C: int, k: int) -> Cost:
    """score_candidates: a chunk's tokens share some of the codes that they read."""
    tokens, chunks = min(T, CHUNK), math.ceil(T / CHUNK)
    gathered = tokens * SCORED * k
    distinct = C * (1 - math.exp(-gathered / C))
    row = E * DIGITS
    return Cost(chunks * distinct * row, chunks * gathered * row, T * SCORED * k * E * DIGITS**2 / DOT_PRODUCTS)


def gathered(T: int, k: int, D: int) -> Cost:
    """finish_decode: k rows of the table, in bf16, per token."""
    return Cost(T * k * D * 2, T * k * D * 2, T * k * D / PRODUCTS)


def scans(T: int, E: int, C: int) -> bool:
    """Whether the scan is chosen: select_scans in select.h, for codes that have a plane and a k that it takes."""
    tiles = math.ceil(T / tile_tokens(T))
    exact = max(C * E * DIGITS / MEMORY, tiles * C * E * DIGITS / CACHE, T * C * E * DIGITS**2 / BYTE_PRODUCTS)
    return SCAN_START + max(C * E / MEMORY, T * C * E * ROW_DIGITS / BYTE_PRODUCTS) < exact


def predict(what: str, T: int, E: int, C: int, k: int) -> dict[str, Cost | float]:
    """The kernels of a case, and what starting them takes, in microseconds."""
    D = 768 if what.startswith("bottleneck") else 0
    kernels: dict[str, Cost | float] = {}
    if D:
        kernels["sae_encode"] = scored_exactly(T, D, E)
    if scans(T, E, C):
        kernels["scan_codes"] = scanned(T, E, C)
        kernels["score_candidates"] = candidates_scored(T, E, C, k)
        kernels["starts"] = SCAN_START * math.ceil(T / CHUNK)
    else:
        kernels["select_exact"] = scored_exactly(T, E, C)
        kernels["starts"] = START
    if D:
        kernels["finish_decode"] = gathered(T, k, D)
    return kernels


def table() -> str:
    """Markdown: a line a kernel."""
    lines = ["| case | kernel | MB from memory | arithmetic, us | predicted, us |", "|---|---|---|---|---|"]
    for what, T, E, C, k in CASES:
        kernels = predict(what, T, E, C, k)
        case = f"{what}: T = {T}, E = {E}, C = {C}, k = {k}"
        total = 0.0
        for name, cost in kernels.items():
            taken = cost if isinstance(cost, float) else cost.microseconds
            total += taken
            known = not isinstance(cost, float)
            memory, arithmetic = (_short(cost.memory / 1e6), _short(cost.arithmetic)) if known else ("", "")
            lines.append(f"| {case} | {name} | {memory} | {arithmetic} | {_short(taken)} |")
            case = ""
        lines.append(f"| | all | | | **{_short(total)}** |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return "below 0.1" if value < 0.1 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    print(table())
