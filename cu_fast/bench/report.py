"""The benchmark's rows as tables, for a terminal and for a README. Part of ``cu_fast.bench``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

BASELINE = "cu_fast"
AXES = ("device", "dtype", "mask", "data", "cache")  # shown where they vary
CAPTION = "2x: takes twice as long as cu_fast; *: wrong in some rows, by fp64; -: did not run (the CSV says why)"


class Sheet(NamedTuple):
    """A table as text: title, header, and a list of cells for each line."""

    title: str
    header: list[str]
    lines: list[list[str]]


def config(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's E, C, k, dtype, mask, data, cache, seed and device ("cpu" in files that do not say)."""
    return {"device": "cpu"} | json.loads(row["extra_benchmark_config_str"])


def sheets(rows: Iterable[Mapping[str, Any]]) -> list[Sheet]:
    """One sheet for each op, in the rows' order. Of rows that measured the same, the last counts."""
    by_op: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_op.setdefault(row["kernel_name"], []).append(row)
    return [_models(rows) if op == "models" else _ratios(op, rows) for op, rows in by_op.items()]


def tables(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """The sheets as rich tables."""
    made = []
    for title, header, lines in sheets(rows):
        table = Table(*map(escape, header), title=title, caption=None if title == "models" else CAPTION)
        for line in lines:
            table.add_row(*map(escape, line))
        made.append(table)
    return made


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The sheets as Markdown tables, each under its name."""
    parts = []
    for title, header, lines in sheets(rows):
        body = [header, ["---"] * len(header), *lines]
        parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in body))
    return "\n\n".join(parts)


def _ratios(op: str, rows: list[Mapping[str, Any]]) -> Sheet:
    """A line a cell: this package's time, and how many times longer the others take."""
    configs = [config(row) for row in rows]
    axes = [axis for axis in AXES if len({c[axis] for c in configs}) > 1]
    rivals = [name for name in dict.fromkeys(row["kernel_provider"] for row in rows) if name != BASELINE]
    rivals = [name for name in rivals if any(r["kernel_provider"] == name and r["status"] == "ok" for r in rows)]
    cells: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row, c in zip(rows, configs):
        key = (f"{c['E']}, {c['C']}, {c['k']}", *(c[axis] for axis in axes), str(row["x_value"]))
        cells.setdefault(key, {})[row["kernel_provider"]] = row
    header = ["E, C, k", *axes, "T", f"{BASELINE}, ms", "of ceiling", *rivals]
    lines = []
    for key, found in cells.items():
        ours = found.get(BASELINE, {})
        ceiling = ours.get("of_ceiling", "")
        time, share = _time(ours), "" if ceiling == "" else f"{100 * float(ceiling):.0f} %"
        lines.append([*key, time, share, *(_ratio(found.get(name, {})) for name in rivals)])
    return Sheet(op, header, lines)


def _models(rows: list[Mapping[str, Any]]) -> Sheet:
    header = ["model", "C, k", "bottleneck", "ms", "tokens per second", "added"]
    lines = {}
    for row in rows:
        c = config(row)
        codes = f"{c['C']}, {c['k']}"
        rate = f"{float(row['tokens_per_second']):.4g}" if row["status"] == "ok" else row["status"]
        added = "" if row["added_percent"] == "" else f"{float(row['added_percent']):+.1f} %"
        provider = row["kernel_provider"]
        lines[c["data"], codes, provider] = [c["data"], codes, provider, _time(row), rate, added]
    return Sheet("models", header, list(lines.values()))


def _time(row: Mapping[str, Any]) -> str:
    return f"{float(row['y_value_50']):.3g}{_star(row)}" if row.get("status") == "ok" else "-"


def _ratio(row: Mapping[str, Any]) -> str:
    if row.get("status") != "ok" or row["ratio"] == "":
        return _time(row) + " ms" if row.get("status") == "ok" else "-"
    return f"{float(row['ratio']):.2f}x{_star(row)}"


def _star(row: Mapping[str, Any]) -> str:
    return "*" if row["match"] != "" and float(row["match"]) < 1 else ""
