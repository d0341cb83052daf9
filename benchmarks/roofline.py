"""What the kernels would take on a card at best, predicted from rates: python benchmarks/roofline.py [card].

Prints the table in docs/gpu.md. Nothing here was measured. Rates, and the constants that plans are made with, are read
from csrc/cuda/predict.h and select.h; how a selection is cut is asked of the native library.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from cu_fast.kernels import native

CUDA = Path(__file__).parents[1] / "csrc/cuda"
DIGITS = 3  # of an entry, of codes and of rows alike
ROW_DIGITS = 2  # of a row in the scan
SCAN_TILE = 256  # codes per tile of scan_codes
# Multiprocessors, compute capability, cycles per microsecond.
CARDS = {
    "A100": (108, 8, 0, 1410), "3090": (82, 8, 6, 1695), "4090": (128, 8, 9, 2520), "H100": (132, 9, 0, 1755),
    "B200": (148, 10, 0, 1850), "B300": (148, 10, 3, 1850), "5090": (170, 12, 0, 2410),
}  # fmt: skip
# Products of fp32 per cycle and multiprocessor that are not fused: half of 128.
SUMS = 64
# Of scan_codes, after the products of a tile of 256 codes and 64 tokens: cycles of a multiprocessor, for one round of
# candidates. Two warps on each scheduler: the cheap test, 551 instructions, and a round, 670, as counted in the machine code;
# and the waits of a round for memory, 1,200 cycles, assumed.
EPILOGUE_CYCLES = 3600.0
# Microseconds of the host per launch, assumed: called eagerly, and replayed from a graph.
HOST_EAGER, HOST_GRAPH = 3.0, 1.0
SCAN_LAUNCHES, EXACT_LAUNCHES, ENCODE_LAUNCHES = 8, 3, 2

# (E, C, k) -> candidates per token, and how many of them are scored: counted in simulations of normal codes
# (tests/kernels/test_cuda_plans.py counts them again).
COUNTED = {(2048, 65_536, 64): (523, 223), (512, 25_000, 8): (103, 15)}
# (what, T) -> what is to be proven on an H100, in microseconds.
TARGETS = {("selection", 1): 75, ("selection", 16): 90, ("selection", 256): 230, ("selection", 2048): 1900,
           ("bottleneck, D = 768", 1): 10}  # fmt: skip
CASES = [
    # what, T, E, C, k
    *(("selection", T, 2048, 65_536, 64) for T in (1, 16, 256, 2048)),
    ("bottleneck, D = 768", 1, 768, 10_000, 8),
    *(("selection", T, 512, 25_000, 8) for T in (1, 64, 512)),
    ("encoder, D = 4096", 2048, 4096, 0, 0),
]


def constant(name: str, file: str) -> float:
    """A number of a header; of select.h that for GPUs, not the emulation's."""
    found = re.search(rf"\b{name} =\s*([\d.e]+)", (CUDA / file).read_text().split("#else")[-1])
    return float(found[1])


class Rates(NamedTuple):
    """A card's, per microsecond, as kernels are assumed to reach them: bytes and multiply-adds. Of predict.h."""

    memory: float
    cache: float
    products: float
    many_products: float
    dot_products: float


def rates_of(card: str) -> Rates:
    """Peaks of predict.h, in 10^12 per second, times the shares that are assumed there."""
    text = (CUDA / "predict.h").read_text()
    numbers = {
        row[:2]: [float(peak) for peak in row[2:]]
        for row in re.findall(r"\{" + ", ".join(7 * [r"([\d.]+)"]) + r"\}", text)
    }
    memory, cache, products, dots = (
        constant(f"k{name}Share", "predict.h") * 1e6 for name in ("Memory", "Cache", "Products", "Dot")
    )
    peaks = numbers[tuple(map(str, CARDS[card][1:3]))]
    return Rates(*(peak * share for peak, share in zip(peaks, (memory, cache, products, products, dots), strict=True)))


class Plan(NamedTuple):
    """What plan_select decides, and predicts."""

    scans: bool
    chunk: int
    sample: float  # the share of codes in the sample
    lists: int  # keys per token that finish merges
    predicted: tuple[float, float]  # microseconds: scanned, every code scored


def plan(T: int, E: int, C: int, k: int, card: str) -> Plan:
    """For codes that have a plane."""
    if reason := native.failure():
        raise SystemExit(reason)
    text = torch.ops.cu_fast.cuda_selection_plan(T, C, E, k, True, *CARDS[card][:3])
    scans = text.startswith("int8 scan")
    numbers = [float(n) for n in re.findall(r"[\d.]*\d", text.removeprefix("int8"))]
    sample = numbers[1] / numbers[2] if scans else 0
    lists = numbers[3] * k if scans else numbers[1] * min(k, numbers[2])
    return Plan(scans, int(numbers[0]), sample, int(lists), (numbers[-2], numbers[-1]))


class Cost(NamedTuple):
    """Of one kernel: bytes from memory and from the second-level cache; microseconds of arithmetic, and of what follows it."""

    memory: float
    cache: float
    arithmetic: float
    after: float = 0

    def microseconds(self, rates: Rates) -> float:
        return max(self.memory / rates.memory, self.cache / rates.cache, self.arithmetic) + self.after


def tile_tokens(T: int) -> int:
    """select.h: tokens of a tile of exact scores."""
    return 1 if T == 1 else 4 if T <= 4 else 16 if T <= 64 else 128


def scored_exactly(T: int, E: int, C: int, rates: Rates) -> Cost:
    """select_exact, and the encoder: a tile of tokens reads all codes, the first time from memory; 64 codes all tokens."""
    tile, entries = tile_tokens(T), C * E
    rate = rates.dot_products if tile <= 4 else rates.products if T <= 64 else rates.many_products
    return Cost(DIGITS * entries, (math.ceil(T / tile) + T / 64) * DIGITS * entries, T * entries * DIGITS**2 / rate)


def rows_fixed(T: int, E: int, digits: int) -> Cost:
    """fix_rows and scan_rows: bf16 becomes digits."""
    return Cost(T * E * 2, T * E * (2 + digits), 0)


def scanned(T: int, E: int, C: int, made: Plan, card: str) -> Cost:
    """scan_codes, both launches. Each chunk reads the plane; each tile of codes the tile of tokens, unless a block keeps it."""
    rates, (multiprocessors, *capability, clock) = rates_of(card), CARDS[card]
    keeps = capability == [9, 0] and T > 32 and 32 * constant("kResidentSteps", "select.h") >= E
    entries, chunks = C * E * (1 + made.sample), math.ceil(T / made.chunk)
    tile = 4 if T <= 4 else 8 if T <= 8 else 32 if T <= 32 else 64
    tiles = sum(math.ceil(min(made.chunk, T - t) / tile) for t in range(0, T, made.chunk))
    rate = rates.products if T <= 32 else rates.many_products
    ends = tiles * C * (1 + made.sample) / SCAN_TILE * EPILOGUE_CYCLES * tile / 64
    return Cost(
        chunks * entries,
        tiles * entries * (1 if keeps else 1 + tile * ROW_DIGITS / SCAN_TILE),
        T * entries * ROW_DIGITS / rate,
        ends / (multiprocessors * clock),
    )


def threshold_found(T: int, C: int, made: Plan) -> Cost:
    """scan_threshold: a maximum per four codes of the sample, fp32."""
    return Cost(0, T * made.sample * C, 0)


def candidates_scored(T: int, E: int, C: int, k: int, rates: Rates) -> Cost:
    """score_candidates, both launches: a chunk's tokens share some of the codes that they read. 16 bytes per candidate."""
    candidates, scored = COUNTED[E, C, k]
    row = E * DIGITS
    distinct = C * (1 - math.exp(-T * scored / C))
    read = T * (2 * candidates * 16 + scored * row)
    return Cost(distinct * row, read, T * scored * E * DIGITS**2 / rates.dot_products)


def merged(T: int, made: Plan, k: int) -> Cost:
    """finish: lists of keys, of eight bytes each, become one."""
    return Cost(0, T * 8 * (made.lists + k), 0)


def gathered(T: int, k: int, D: int, made: Plan, card: str) -> Cost:
    """finish_decode: what finish does, and k rows of the table, in bf16, per token."""
    multiprocessors, _, _, clock = CARDS[card]
    return Cost(T * k * D * 2, T * k * D * 2 + merged(T, made, k).cache, T * k * D / (SUMS * multiprocessors * clock))


def predict(what: str, T: int, E: int, C: int, k: int, card: str = "H100") -> tuple[dict[str, Cost | float], int]:
    """The kernels of a case, with the microseconds that a chain of them takes beyond its work; and launches."""
    rates, width = rates_of(card), int(what.rpartition(" ")[2]) if "D = " in what else 0
    kernels: dict[str, Cost | float] = {}
    launches = 0
    if width:
        kernels["fix_rows"] = rows_fixed(T, width, DIGITS)
        kernels["sae_encode"] = scored_exactly(T, width, E, rates)
        launches += ENCODE_LAUNCHES
    if not C:
        return kernels, launches
    made = plan(T, E, C, k, card)
    chunks = math.ceil(T / made.chunk)
    if made.scans:
        kernels["scan_rows"] = rows_fixed(T, E, DIGITS + ROW_DIGITS)
        kernels["scan_codes"] = scanned(T, E, C, made, card)
        kernels["scan_threshold"] = threshold_found(T, C, made)
        kernels["score_candidates"] = candidates_scored(T, E, C, k, rates)
        kernels["chain"] = constant("kScanStart", "select.h") * chunks
        launches += SCAN_LAUNCHES * chunks
    else:
        kernels["select_exact"] = scored_exactly(T, E, C, rates)
        kernels["chain"] = constant("kExactStart", "select.h")
        launches += EXACT_LAUNCHES
    if width:
        kernels["finish_decode"] = gathered(T, k, width, made, card)
    else:
        kernels["finish"] = merged(T, made, k)
    return kernels, launches


def table(card: str = "H100") -> str:
    """Markdown: a line per kernel."""
    lines = [
        "| case | kernel | MB from memory | MB from the cache | arithmetic, us | predicted, us | target, us |",
        "|---|---|---|---|---|---|---|",
    ]
    rates = rates_of(card)
    for what, T, E, C, k in CASES:
        kernels, launches = predict(what, T, E, C, k, card)
        case = f"{what}: T = {T}, E = {E}" + (f", C = {C}, k = {k}" if C else "")
        total = 0.0
        for name, cost in kernels.items():
            taken = cost if isinstance(cost, float) else cost.microseconds(rates)
            total += taken
            known = [] if isinstance(cost, float) else [cost.memory / 1e6, cost.cache / 1e6, cost.arithmetic]
            memory, cache, arithmetic = map(_short, known) if known else ("", "", "")
            lines.append(f"| {case} | {name} | {memory} | {cache} | {arithmetic} | {_short(taken)} | |")
            case = ""
        eager, graph = launches * HOST_EAGER, launches * HOST_GRAPH
        lines.append(f"| | host, {launches} launches | | | | {eager:.0f}; from a graph {graph:.0f} | |")
        target = TARGETS.get((what, T), "") if card == "H100" and E != 512 else ""
        lines.append(f"| | all, the longer of the two | | | | **{_short(max(total, eager))}** | {target} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return "0" if value == 0 else "below 0.1" if value < 0.1 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    print(table(*sys.argv[1:]))
