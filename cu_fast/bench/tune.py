"""Which tiles of the Triton kernels are fastest on this GPU, and from where on the int8 scan is: ``cu-fast tune``.

    run(budget=120)     measures, and writes the user's table (triton/tiles.py); later processes read it at first use

A row's candidates (tune_grid.py) are the one that ships and a few others. Each is put in force for whole calls of an
operator, compiled, and its answer compared with that of the row that ships, bit for bit; then all are timed in turns, with
cold caches, by the clock of the benchmark. The fastest is kept if it also runs with masks, hits, fp32 codes and lists of
every length (:func:`proofs`). What is kept holds while the rest is measured.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from cu_fast.bench.ours import deletion
from cu_fast.bench.tune_grid import CROSSING, SCENES, Scene, candidates, proofs
from cu_fast.kernels import triton
from cu_fast.kernels.reference import DIGITS
from cu_fast.kernels.triton import launch, tiles
from cu_fast.kernels.triton.tiles import Config, Table

Answer = tuple[Tensor | None, ...]
Call = Callable[[], Answer]

SECONDS, ROUNDS = 0.05, 5  # of turns, per candidate
MARGIN = 0.99  # of the time of the row that ships: what is not below that is not faster


def run(
    output: str | Path | None = None, budget: float = 120.0, progress: bool = False, clock: Any = None
) -> dict[str, Any]:
    """Measure, and write the table.

    Args:
        output: its file; default: where this package looks for it.
        budget: seconds, looked at between rows. What was not reached keeps what ships, and is named in "not_reached".
        progress: show a bar on stderr.
        clock: for tests: has the methods of GraphClock.

    Returns:
        What was written, and its "path".

    Raises:
        ValueError: a budget that is not above 0. RuntimeError: Triton does not run on a GPU here, or nothing was
            measured; a file that was there is then as it was.
    """
    if not budget > 0:
        raise ValueError(f"budget is {budget:g} seconds; it should be above 0")
    device = torch.device("cuda" if clock is None else "cpu")
    if clock is None and (reason := _failure(device)) is not None:
        raise RuntimeError(f"nothing can be tuned here: {reason}")
    clock = clock or GraphClock(failure=lambda: None)
    arch, end = launch.arch_of(device), time.perf_counter() + budget
    path, tuner = Path(output or tiles.home(arch)), Tuner(arch, clock)
    steps = {
        f"{kernel} {name}": functools.partial(tuner.row, kernel, name) for kernel in SCENES for name in SCENES[kernel]
    }
    steps["crossover"] = tuner.crossover
    not_reached, failures = [], []
    with torch.inference_mode():
        for what, measure in tqdm(steps.items(), unit="row", disable=not progress):
            if time.perf_counter() >= end:
                not_reached.append(what)
                continue
            try:
                measure()
            except Exception as error:  # whatever Triton and the driver raise
                failures.append(f"{what}: {_text(error)}")
    if len(not_reached) + len(failures) == len(steps):
        why = "; ".join(failures) or f"the budget of {budget:g} seconds was used up; give more with --budget"
        raise RuntimeError(f"nothing was measured, and nothing written to {path}: {why}")
    record = _facts(arch, clock.device) | tuner.found | {"not_reached": not_reached, "failures": failures}
    tiles.write(path, record, launch.RULES)
    return record | {"path": str(path)}


def _failure(device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, under which kernels are interpreted; unset it"
    return triton.failure(device)


def _facts(arch: str, card: str) -> dict[str, Any]:
    facts = machine.facts("cuda")
    facts = {name: facts[name] for name in ("cu_fast_version", "commit", "torch_version", "triton_version")}
    what = {"format": tiles.FORMAT, "format_version": tiles.FORMAT_VERSION, "arch": arch}
    return what | {"card": card, "date": time.strftime("%Y-%m-%d")} | facts


class Tuner:
    """The rows in force while it measures, and what it found."""

    def __init__(self, arch: str, clock: Any) -> None:
        self.arch, self.clock = arch, clock
        self.rows = {kernel: dict(rows) for kernel, rows in launch.TABLE.items()}
        self.found: dict[str, Any] = {"rows": {}, "tuning": {}, "candidates": {}, "crossover": []}
        self.plan = bench.Plan(device="cuda", seconds=SECONDS, rounds=ROUNDS)

    def row(self, kernel: str, name: str) -> None:
        """Measure the candidates for a row, and keep the best."""
        scenes, key = SCENES[kernel][name], f"{name} {self.arch}"
        calls = [self.call(scene) for scene in scenes]
        tried, jobs, want = candidates(kernel, name, self.arch), {}, None
        shipped = next(iter(tried))
        for row in [row for row, fault in tried.items() if fault is None]:
            try:
                tables = [self.table(scene.scan, kernel, key, row) for scene in scenes]
                made = [self.job(call, table) for call, table in zip(calls, tables)]
                want = want or [answer for _, answer in made]
                _require_same([answer for _, answer in made], want)
                jobs |= {(row, i): job for i, (job, _) in enumerate(made)}
            except Exception as error:  # where tiles do not fit
                if row is shipped:
                    raise
                tried[row] = _text(error)
        medians = self.medians(jobs)
        us = {row: round(sum(medians[row, i] for i in range(len(scenes))), 3) for row in tried if tried[row] is None}
        best = self.best(kernel, key, us, tried, scenes[0])
        self.rows[kernel][key] = best
        self.found["rows"].setdefault(kernel, {})[key] = best.to_dict() | {"us": us[best]}
        self.found["candidates"].setdefault(kernel, {})[key] = [
            row.to_dict() | {"us": us.get(row), "failure": fault} for row, fault in tried.items()
        ]

    def best(self, kernel: str, key: str, us: Mapping[Config, float], tried: dict, scene: Scene) -> Config:
        """The fastest that passes the proofs; the row that ships where none is clearly faster. Notes in ``tried``."""
        shipped = next(iter(us))
        for row in sorted(us, key=us.__getitem__):
            if us[row] > MARGIN * us[shipped]:
                break
            for proof in proofs(kernel, scene):
                call = self.call(proof)
                try:
                    got, want = (
                        _under(self.arch, self.table(proof.scan, kernel, key, r), call) for r in (row, shipped)
                    )
                    _require_same([got], [want])
                except Exception as error:
                    tried[row] = f"k = {proof.cell.k}, {proof.cell.dtype}, {proof.cell.mask} masked: {_text(error)}"
                    break
            else:
                return row
        return shipped

    def crossover(self) -> None:
        """Measure scanning against scoring all, and what tells where the one begins to be the faster."""
        for scene in CROSSING:
            call = self.call(scene)
            scanned, scored = (self.job(call, self.table(scan)) for scan in (True, False))
            _require_same([scanned[1]], [scored[1]])
            medians = self.medians({"scan_us": scanned[0], "exact_us": scored[0]})
            shape = {name: getattr(scene.cell, name) for name in ("T", "E", "C", "k")}
            self.found["crossover"].append(shape | {name: round(us, 3) for name, us in medians.items()})
        self.found["tuning"] = fit(self.found["crossover"])

    def table(self, scan: bool, kernel: str = "", key: str = "", row: Config | None = None) -> Table:
        """What was kept, with a row in place of one of them; it scans, or scores every code, whatever the shape."""
        rows = self.rows if row is None else self.rows | {kernel: self.rows[kernel] | {key: row}}
        return Table(rows, {"scan_start": -math.inf if scan else math.inf})

    def job(self, call: Call, table: Table) -> tuple[Job, Answer]:
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
            packed = ops.pack_codes(inputs.codes, "dot", inputs.bias, scan="none")
            return lambda: (ops.sae_encode(inputs.x, packed, inputs.b_pre, impl="triton"),)
        if cell.op == "delete_latents":
            latents, masks = deletion(inputs)
            return lambda: ops.delete_latents(inputs.x, latents, masks, inputs.mask_row, impl="triton")
        packed, options = ops.pack_codes(inputs.codes, scan="int8" if scene.scan else "none"), inputs.masks
        return lambda: ops.codebook_quantize(
            inputs.x, packed, k=cell.k, **options, return_hits=scene.hits, impl="triton"
        )


def fit(cells: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Fields of Tuning from times of both ways, by the model of ``launch.scan_is_faster``, or those that ship.

    cells: T, E, C, scan_us, exact_us. The cell with the least work gives the start, that with the most the rates of
    products, the largest with the fewest tokens the rate of reading. Those that lose less time in the cells are taken.
    """
    by_work = sorted(cells, key=lambda cell: (cell["T"], cell["C"] * cell["E"]))
    least, most = by_work[0], by_work[-1]
    widest = max((cell for cell in cells if cell["T"] == least["T"]), key=lambda cell: cell["C"] * cell["E"])
    read = widest["C"] * widest["E"] * DIGITS / widest["exact_us"]
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
    return min(measured, shipped, key=lambda tuning: lost(cells, tuning))


def lost(cells: Iterable[Mapping[str, float]], tuning: Mapping[str, float]) -> float:
    """Microseconds beyond the better way's, over all cells, where these fields of Tuning choose."""
    total, all_fields = 0.0, launch.TUNING._replace(**tuning)
    for cell in cells:
        scans = launch.scan_is_faster(cell["T"], cell["C"] * cell["E"], all_fields)
        total += cell["scan_us" if scans else "exact_us"] - min(cell["scan_us"], cell["exact_us"])
    return total


def _under(arch: str, table: Table, call: Call) -> Answer:
    before = launch.IN_FORCE.pop(arch, None)
    launch.IN_FORCE[arch] = table
    try:
        return call()
    finally:
        del launch.IN_FORCE[arch]
        if before is not None:
            launch.IN_FORCE[arch] = before


def _require_same(got: Sequence[Answer], want: Sequence[Answer]) -> None:
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
