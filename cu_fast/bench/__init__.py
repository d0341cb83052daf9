"""The benchmark: operators and the whole bottleneck, against PyTorch code that does the same.

    run(Plan(op="codebook_quantize", tokens=(1, 64), seconds=0.5), output="rows.csv")

A cell of the grid is measured with all its providers in one go: prepared, warmed, then called in turns, in an order
that is shuffled anew in each round. Each row of the result is one provider in one cell: its median time with the
20th and 80th percentile, whether its answer was right, and what machine and versions it ran on. Nothing is left out:
a provider that cannot run, or does not fit into memory, has a row that says why. ``benchmarks/README.md`` holds the
protocol and every column's meaning.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cu_fast.bench import machine
from cu_fast.bench.cells import Cell, make_inputs
from cu_fast.bench.clock import HostClock
from cu_fast.bench.clock_gpu import GraphClock
from cu_fast.bench.job import Builder, Job, Skip, require_memory
from cu_fast.bench.plan import Plan, make_plan, providers_of
from cu_fast.bench.report import config, markdown, tables
from cu_fast.bench.truth import Truth
from cu_fast.files import write_file

__all__ = ["COLUMNS", "Plan", "Work", "config", "make_plan", "markdown", "read_rows", "run", "tables", "write_rows"]

BASELINE = "cu_fast"  # what ``ratio`` compares with
MODEL_BASELINE = "none"  # what ``added_percent`` compares with: benchmarks/bench_models.py

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "status", "note", "match",
    "identical", "ratio", "added_percent", "tokens_per_second", "rounds", "first_call_ms", "of_ceiling",
    *machine.COLUMNS, "timestamp",
)  # fmt: skip


class Work(NamedTuple):
    """A cell, its providers, and what makes their inputs: cell, plan, clock -> inputs, and the truth, None = not judged."""

    cell: Cell
    builders: Mapping[str, Builder]
    prepare: Callable[[Cell, Plan, Any], tuple[Any, Truth | None]]


def run(
    plan: Plan, output: str | Path | None = None, progress: bool = False, work: Iterable[Work] | None = None
) -> list[dict[str, Any]]:
    """Measure every cell of a plan.

    Args:
        output: a CSV file. Rows are added to what it holds, after each cell, whole or not at all.
        progress: show a bar of cells on stderr.
        work: what is measured instead of the plan's own cells, in the way that the plan says.

    Returns:
        The new rows, dicts with the keys COLUMNS; what does not apply is "".

    Raises:
        ValueError: ``output`` exists and has other columns. RuntimeError: there is no such device. Before anything is
            measured.
    """
    clock = GraphClock() if plan.device == "cuda" else HostClock()
    known = read_rows(output) if output is not None and Path(output).exists() else []
    new: list[dict[str, Any]] = []
    with _threads(plan.threads), torch.inference_mode():
        facts = machine.facts(plan.device)
        for one in tqdm(_work(plan) if work is None else list(work), unit="cell", disable=not progress):
            new += measure_cell(one, plan, facts, clock)
            if output is not None:
                write_rows(output, known + new)
    return new


def _work(plan: Plan) -> list[Work]:
    work = []
    for cell in plan.cells():
        builders = providers_of(cell.op, plan.device)
        chosen = {name: build for name, build in builders.items() if name in (plan.providers or builders)}
        work.append(Work(cell, chosen, _prepare))
    return work


def measure_cell(work: Work, plan: Plan, facts: dict[str, Any], clock: HostClock | GraphClock) -> list[dict[str, Any]]:
    """Measure one cell: a row per provider, in their order."""
    cell, builders, prepare = work
    rows = {name: _empty_row(cell, name, plan, facts, clock.device) for name in builders}
    jobs: dict[str, Job] = {}
    times: dict[str, list[float]] = {}
    try:
        with torch.inference_mode(False), torch.no_grad():
            inputs, truth = prepare(cell, plan, clock)
    except Skip as skip:
        for row in rows.values():
            row |= {"status": skip.status, "note": str(skip)}
        return list(rows.values())
    if any(name.startswith("torch_compile") for name in builders):
        torch.compiler.reset()  # else a recompilation limit, reached in one cell, leaves the next one uncompiled
    for name, build in builders.items():
        with _failures_go_into(rows[name]):
            with torch.inference_mode(False), torch.no_grad():
                job = build(inputs)
            if job.before is not None:
                job.before()
            start = time.perf_counter()
            answer = job.call()
            clock.wait()
            rows[name] |= {"first_call_ms": _round(1e3 * (time.perf_counter() - start))}
            job, answer = clock.prepare(job, answer)
            rows[name]["note"] = job.note
            if truth is not None and job.answer is not None:
                rows[name]["match"] = truth.match(job.answer(answer))
            if job.identical is not None:
                rows[name]["identical"] = job.identical(answer)
            del answer
            times[name] = [clock.time(job, plan.cache)]  # which counts where it is too slow to be called more often
            jobs[name] = job
    take_turns(jobs, times, plan, clock)
    for name, taken in times.items():
        p20, p50, p80 = (1e3 * t / jobs[name].divide for t in np.percentile(taken, (20, 50, 80)))
        rows[name] |= {"status": "ok", "rounds": len(taken), "tokens_per_second": _round(1e3 * cell.T / p50)}
        rows[name] |= {"y_value_20": _round(p20), "y_value_50": _round(p50), "y_value_80": _round(p80)}
        if name.startswith(BASELINE):
            rows[name]["of_ceiling"] = _round(machine.of_ceiling(cell, p50, facts, plan.cache))
    _compare(rows)
    return list(rows.values())


def _prepare(cell: Cell, plan: Plan, clock: HostClock | GraphClock) -> tuple[Any, Truth | None]:
    require_memory(plan.memory, cell.input_bytes, "the cell's own tensors")
    inputs = make_inputs(cell, plan.seed, plan.memory)
    return clock.place(inputs), Truth(inputs)


def take_turns(
    jobs: Mapping[str, Job], times: dict[str, list[float]], plan: Plan, clock: HostClock | GraphClock
) -> None:
    """Call the jobs in rounds, in an order drawn for each, until the time is used and enough rounds are done."""
    order = np.random.default_rng(plan.seed)
    usual = {name: times[name][0] for name in jobs}
    active = [name for name in jobs if usual[name] <= plan.seconds]
    for name in active:
        times[name].clear()
    end = time.perf_counter() + plan.seconds * len(active)
    gc.collect()
    gc.disable()
    try:
        for number in itertools.count():
            if not active or (number >= plan.rounds and time.perf_counter() >= end):
                return
            for index in order.permutation(len(active)):
                name = active[index]
                times[name] += clock.turn(jobs[name], plan.cache, usual[name])
    finally:
        gc.enable()


@contextlib.contextmanager
def _failures_go_into(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Skip as skip:
        row |= {"status": skip.status, "note": str(skip)}
    except Exception as error:  # one provider's fault must not cost the others' rows
        row |= {"status": "failed", "note": f"{type(error).__name__}: {error}"[:300]}


def _empty_row(cell: Cell, provider: str, plan: Plan, facts: dict[str, Any], device: str) -> dict[str, Any]:
    config = cell.config | {"cache": plan.cache, "seed": plan.seed, "device": device}
    return dict.fromkeys(COLUMNS, "") | {
        "kernel_name": cell.op,
        "kernel_provider": provider,
        "kernel_operation_mode": "forward",
        "metric_name": "speed",
        "metric_unit": "ms",
        "x_name": "T",
        "x_label": "tokens",
        "x_value": cell.T,
        "extra_benchmark_config_str": json.dumps(config),
        "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
        **facts,
    }


def _compare(rows: Mapping[str, dict[str, Any]]) -> None:
    """Fill in ``ratio``, time over this package's, and ``added_percent``, over the model without a bottleneck."""
    ours, base = (rows.get(name, {}).get("y_value_50", "") for name in (BASELINE, MODEL_BASELINE))
    for row in rows.values():
        if row["y_value_50"] == "":
            continue
        if ours != "":
            row["ratio"] = _round(row["y_value_50"] / ours)
        if base != "":
            row["added_percent"] = _round(100 * (row["y_value_50"] / base - 1))


def _round(value: float | str) -> float | str:
    return value if value == "" else float(f"{value:.5g}")


# -- files -------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file that :func:`write_rows` wrote. Raises ValueError where it has other columns."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        odd = sorted(set(reader.fieldnames or ()) ^ set(COLUMNS))
        raise ValueError(f"{path} is not of this benchmark, or of another version of it: columns {odd} differ")
    return rows


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a CSV file in one step, so that an interruption leaves the old one or the new one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
