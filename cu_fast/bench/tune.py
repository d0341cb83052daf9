"""Which tiles of the Triton kernels are fastest on this GPU, and from where on the int8 scan is: ``cu-fast tune``.

    run(budget=120)     measures, and writes the user's table (triton/tiles.py); later processes read it at first use

A kernel's candidates (tune_grid.py) are the row that ships and a few others. Each is put in force for whole calls of an operator
(SCENES), compiled, and its answer compared with that of the row that ships, bit for bit; then all are timed in turns, with
cold caches, by the clock of the benchmark. The fastest is kept if it also runs with masks, hits, fp32 codes and lists of
every length (:func:`proofs`). What is kept holds while the rest is measured.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cu_fast import bench, ops
from cu_fast.bench import machine
from cu_fast.bench.cells import make_inputs
from cu_fast.bench.clock_gpu import GraphClock
from cu_fast.bench.job import Job
from cu_fast.bench.tune_grid import CROSSING, SCENES, Scene, candidates, proofs
from cu_fast.kernels import triton
from cu_fast.kernels.triton import launch, tiles
from cu_fast.kernels.triton.tiles import Config, Table

Call = Callable[[], tuple[Tensor, ...]]

BUDGET = 120.0
SECONDS, ROUNDS = 0.05, 5  # of turns, for each candidate
MARGIN = 0.99  # of the time of the row that ships: what is not below that is not faster
CROSSOVER = "crossover"  # beside the kernels: from where on the scan is faster than scoring all
NOT_REACHED = "not reached"
FACTS = ("card", "cu_fast_version", "commit", "torch_version", "triton_version", "driver_version")


def run(
    output: str | Path | None = None,
    budget: float = BUDGET,
    kernels: Iterable[str] | None = None,
    progress: bool = False,
    clock: Any = None,
) -> dict[str, Any]:
    """Measure, and write the table.

    Args:
        output: its file; default: where this package looks for it.
        budget: seconds. What was not reached by then keeps its row, and is named in "not_reached".
        kernels: keys of SCENES, or "crossover"; default: all. Rows of the others stay if they were measured on the same
            card with the same versions.
        progress: show a bar on stderr.
        clock: for tests: has the methods of GraphClock.

    Returns:
        What was written, and its "path".

    Raises:
        ValueError: an unknown kernel, or a budget that is not above 0. RuntimeError: Triton does not run on a GPU here,
            or nothing was measured; a file that was there is then as it was.
    """
    wanted = tuple(kernels or (*SCENES, CROSSOVER))
    if unknown := sorted(set(wanted) - {*SCENES, CROSSOVER}):
        raise ValueError(f"kernels has {', '.join(unknown)}; there are {', '.join((*SCENES, CROSSOVER))}")
    if not budget > 0:
        raise ValueError(f"budget is {budget:g} seconds; it should be above 0")
    device = torch.device("cuda" if clock is None else "cpu")
    if clock is None and (reason := _failure(device)) is not None:
        raise RuntimeError(f"nothing can be tuned here: {reason}")
    clock = clock or GraphClock(failure=lambda: None)
    arch = launch.arch_of(device)
    path = Path(output or tiles.home(arch))
    record = _facts(arch, clock.device)
    tuner = Tuner(arch, clock, time.perf_counter() + budget, _kept(path, record))
    with torch.inference_mode(), tqdm(tuner.steps(wanted), unit="row", disable=not progress) as steps:
        for measure in steps:
            measure()
    if not tuner.measured:
        failures = "; ".join(tuner.failures) or f"the budget of {budget:g} seconds was used up; give more with --budget"
        raise RuntimeError(f"nothing was measured, and nothing written to {path}: {failures}")
    record |= tuner.found | {"not_reached": tuner.not_reached, "failures": tuner.failures}
    tiles.write(path, record, launch.RULES)
    return record | {"path": str(path)}


def _failure(device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, under which kernels are interpreted; unset it"
    return triton.failure(device)


def _facts(arch: str, card: str) -> dict[str, Any]:
    facts = machine.facts("cuda")
    return {
        "format": tiles.FORMAT,
        "format_version": tiles.FORMAT_VERSION,
        "arch": arch,
        "card": card,
        "date": time.strftime("%Y-%m-%d"),
        **{name: facts[name] for name in ("cu_fast_version", "commit", "torch_version")},
        "triton_version": importlib.import_module("triton").__version__,
        "driver_version": _driver(),
    }


def _driver() -> str:
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return ""


def _kept(path: Path, facts: Mapping[str, Any]) -> Table:
    """What a file holds that was measured on the same card with the same versions."""
    with contextlib.suppress(ValueError):  # it is missing, or broken and replaced, as its error advises
        known = tiles.read(path, facts["arch"], launch.RULES)
        if all(known.record.get(name) == facts[name] for name in FACTS):
            return known
    return Table(launch.TABLE)


@contextlib.contextmanager
def _in_force(arch: str, table: Table) -> Iterator[None]:
    before = launch.IN_FORCE.pop(arch, None)
    launch.IN_FORCE[arch] = table
    try:
        yield
    finally:
        del launch.IN_FORCE[arch]
        if before is not None:
            launch.IN_FORCE[arch] = before


class Tuner:
    """A run: the table in force while it measures, and what it found."""

    def __init__(self, arch: str, clock: Any, end: float, kept: Table) -> None:
        self.arch, self.clock, self.end = arch, clock, end
        self.table = Table({kernel: dict(rows) for kernel, rows in kept.rows.items()}, dict(kept.tuning))
        self.found: dict[str, Any] = {
            "rows": kept.record.get("rows", {}),
            "tuning": self.table.tuning,
            "candidates": kept.record.get("candidates", {}),
            CROSSOVER: kept.record.get(CROSSOVER, []),
        }
        self.not_reached: list[str] = []
        self.failures: list[str] = []
        self.measured = 0
        self.plan = bench.Plan(device="cuda", seconds=SECONDS, rounds=ROUNDS)

    def steps(self, wanted: Iterable[str]) -> list[Callable[[], None]]:
        named = [(kernel, name) for kernel in SCENES if kernel in wanted for name in SCENES[kernel]]
        steps: list[Callable] = [functools.partial(self.row, kernel, name) for kernel, name in named]
        return steps + [self.crossover] * (CROSSOVER in wanted)

    def is_over(self) -> bool:
        return time.perf_counter() >= self.end

    def row(self, kernel: str, name: str) -> None:
        """Measure the candidates for a row, and keep the best."""
        what, key = f"{kernel} {name}", f"{name} {self.arch}"
        if self.is_over():
            self.not_reached.append(what)
            return
        scenes = SCENES[kernel][name]
        calls = [self.call(scene) for scene in scenes]
        tried, jobs, want = candidates(kernel, name, self.arch), {}, None
        shipped = next(iter(tried))
        for row, fault in tried.items():
            if fault is None and row is not shipped and self.is_over():
                tried[row] = NOT_REACHED
            elif fault is None:
                try:
                    made = [
                        self.job(call, self.with_row(kernel, key, row, scene)) for scene, call in zip(scenes, calls)
                    ]
                    want = want or [answer for _, answer in made]
                    _require_same([answer for _, answer in made], want)
                    jobs |= {(row, i): job for i, (job, _) in enumerate(made)}
                except Exception as error:  # whatever Triton and the driver raise where tiles do not fit
                    tried[row] = _text(error)
        if tried[shipped] is not None:
            self.failures.append(f"{what}: the row that ships: {tried[shipped]}")
            return
        if (left := list(tried.values()).count(NOT_REACHED)) > 0:
            self.not_reached.append(f"{what}: {left} of {len(tried)}")
        if all(fault == NOT_REACHED for row, fault in tried.items() if row is not shipped):
            return  # there is nothing to compare with
        medians = self.medians(jobs)
        us = {row: round(sum(medians[row, i] for i in range(len(scenes))), 3) for row in tried if tried[row] is None}
        best = self.best(kernel, key, us, tried, scenes[0])
        self.table.rows[kernel][key] = best
        self.found["rows"].setdefault(kernel, {})[key] = best.to_dict() | {"us": us[best]}
        self.found["candidates"].setdefault(kernel, {})[key] = [
            row.to_dict() | {"us": us.get(row), "failure": fault} for row, fault in tried.items()
        ]
        self.measured += 1

    def best(self, kernel: str, key: str, us: Mapping[Config, float], tried: dict, scene: Scene) -> Config:
        """The fastest that passes the proofs; the row that ships where none is clearly faster. Notes in ``tried``."""
        shipped = next(iter(us))
        for row in sorted(us, key=us.__getitem__):
            if us[row] > MARGIN * us[shipped]:
                break
            for proof in proofs(kernel, scene):
                call = self.call(proof)
                try:
                    got, want = (_under(self.arch, self.with_row(kernel, key, r, proof), call) for r in (row, shipped))
                    _require_same([got], [want])
                except Exception as error:
                    tried[row] = f"k = {proof.cell.k}, {proof.cell.dtype}, {proof.cell.mask} masked: {_text(error)}"
                    break
            else:
                return row
        return shipped

    def with_row(self, kernel: str, key: str, row: Config, scene: Scene) -> Table:
        rows = self.table.rows | {kernel: self.table.rows[kernel] | {key: row}}
        return self.forced(scene.scan)._replace(rows=rows)

    def forced(self, scan: bool) -> Table:
        return self.table._replace(tuning={**self.table.tuning, "scan_start": -math.inf if scan else math.inf})

    def job(self, call: Call, table: Table) -> tuple[Job, tuple[Tensor, ...]]:
        """A call under a table, compiled and ready to be timed, and its answer."""
        job = Job(functools.partial(_under, self.arch, table, call))
        job, answer = self.clock.prepare(job, job.call())
        if job.note:  # not captured: the host's time would be measured
            raise RuntimeError(job.note)
        return job, answer

    def medians(self, jobs: Mapping[Any, Job]) -> dict[Any, float]:
        """Microseconds of each job, called in turns."""
        times = {key: [self.clock.time(job)] for key, job in jobs.items()}
        bench.take_turns(jobs, times, self.plan, self.clock)
        return {key: 1e6 * statistics.median(taken) for key, taken in times.items()}

    def call(self, scene: Scene) -> Call:
        """A scene's operator, on inputs that are made here."""
        cell, inputs = scene.cell, self.clock.place(make_inputs(scene.cell))
        if cell.op == "masked_decode":
            return lambda: (ops.masked_decode(inputs.ids, inputs.weights, inputs.codes, **inputs.masks, impl="triton"),)
        if cell.op == "sae_encode":
            return lambda: (ops.sae_encode(inputs.x, inputs.codes, inputs.bias, inputs.b_pre, impl="triton"),)
        packed, options = ops.pack_codes(inputs.codes, scan="int8" if scene.scan else "fp32"), inputs.masks
        return lambda: tuple(
            ops.codebook_quantize(inputs.x, packed, k=cell.k, **options, return_hits=scene.hits, impl="triton")
        )

    def crossover(self) -> None:
        """Measure scanning against scoring all, and what tells where the one begins to be the faster."""
        cells = []
        for scene in CROSSING:
            if self.is_over():
                self.not_reached.append(CROSSOVER)
                return
            try:
                call = self.call(scene)
                scanned, scored = (self.job(call, self.forced(scan)) for scan in (True, False))
                _require_same([scanned[1]], [scored[1]])
            except Exception as error:
                self.failures.append(f"{CROSSOVER}: {_text(error)}")
                return
            medians = self.medians({"scan_us": scanned[0], "exact_us": scored[0]})
            shape = {name: getattr(scene.cell, name) for name in ("T", "E", "C", "k")}
            cells.append(shape | {name: round(us, 3) for name, us in medians.items()})
        self.table.tuning.update(fit(cells))
        self.found[CROSSOVER] = cells
        self.measured += 1


def fit(cells: Sequence[Mapping[str, float]], code_bytes: int = 2) -> dict[str, float]:
    """Fields of Tuning from times of both ways, by the model of ``launch.scan_is_faster``, or those that ship.

    cells: T, E, C, scan_us, exact_us. The cell with the least work gives the start, that with the most the rates of
    products, the largest with the fewest tokens the rate of reading. Those that lose less time in the cells are taken.
    """
    by_work = sorted(cells, key=lambda cell: (cell["T"], cell["C"] * cell["E"]))
    least, most = by_work[0], by_work[-1]
    widest = max((cell for cell in cells if cell["T"] == least["T"]), key=lambda cell: cell["C"] * cell["E"])
    read = widest["C"] * widest["E"] * code_bytes / widest["exact_us"]
    start = max(least["scan_us"] - least["C"] * least["E"] / read, 1.0)
    products = most["T"] * most["C"] * most["E"]
    rates = {
        "scan_start": start,
        "read_rate": read,
        "exact_rate": products / most["exact_us"],
        "scan_rate": products / max(most["scan_us"] - start, 0.01 * most["scan_us"]),
    }
    measured = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
    shipped = {name: getattr(launch.TUNING, name) for name in rates}
    return min(measured, shipped, key=lambda tuning: lost(cells, code_bytes, tuning))


def lost(cells: Iterable[Mapping[str, float]], code_bytes: int, tuning: Mapping[str, float]) -> float:
    """Microseconds beyond the better way's, over all cells, where these fields of Tuning choose."""
    total, all_fields = 0.0, launch.TUNING._replace(**tuning)
    for cell in cells:
        scans = launch.scan_is_faster(cell["T"], cell["C"] * cell["E"], code_bytes, all_fields)
        total += cell["scan_us" if scans else "exact_us"] - min(cell["scan_us"], cell["exact_us"])
    return total


def _under(arch: str, table: Table, call: Call) -> tuple[Tensor, ...]:
    with _in_force(arch, table):
        return call()


def _require_same(got: Sequence[tuple], want: Sequence[tuple]) -> None:
    for a, b in zip(itertools.chain(*got), itertools.chain(*want)):
        if a is not None and not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            raise ValueError("other bits than the row that ships")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# -- what is in force ----------------------------------------------------------------------------------------------


def show() -> dict[str, Any]:
    """The table in force for the GPU of this machine; without one for sm_80, whose rows the interpreter takes."""
    arch = arch_here()
    table = launch.in_force(arch)
    rows = []
    for kernel, shipped in launch.TABLE.items():
        measured = table.record.get("rows", {}).get(kernel, {})
        for name in (key for key in shipped if " " not in key):
            row = table.rows[kernel][launch.key_of(table.rows[kernel], name, arch)]
            us = measured.get(f"{name} {arch}", {}).get("us")
            rows.append({"kernel": kernel, "for": name, "tiles": row.to_dict(), "measured": us is not None, "us": us})
    fields = {name: getattr(launch.tuning_of(arch), name) for name in launch.MEASURED}
    tuning = {name: {"value": value, "measured": name in table.tuning} for name, value in fields.items()}
    gpu = torch.cuda.is_available()
    return {"arch": arch, "gpu": gpu, "table": table_in_force(arch), "rows": rows, "tuning": tuning}


def arch_here() -> str:
    return launch.arch_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def table_in_force(arch: str) -> str:
    """Which table it is, in a line."""
    table = launch.in_force(arch)
    if table.path is None:
        return "as shipped, not measured"
    return f"{table.path}, {table.record.get('card')}, {table.record.get('date')}"
