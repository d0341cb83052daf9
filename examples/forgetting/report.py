"""The table of a study: python report.py results.csv ratios.jsonl > report.md

Forget quality p is of a row's truth ratios and those of the row "retrained" with the same split and seed, or, where that seed has
none, with the first that has one; without any it is left out. Utility is also given as a share of the fine-tuned model's own ("none").
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shared import metrics

COLUMNS = (
    "p", "of_before", "utility", "retain_probability", "forget_rouge", "forget_probability", "fires_forget",
    "fires_reworded", "fires_retain", "fires_general", "codes", "seconds", "forward", "backward", "runs", "retain_rows",
)  # fmt: skip
KEYS = ("split", "seed", "method", "setting")


def digits(value: str | float | None) -> str:
    if value in (None, ""):
        return ""
    return f"{float(value):.0f}" if abs(float(value)) >= 1000 else f"{float(value):.3g}"


def rows_of(results: Path, ratios: Path) -> list[dict[str, object]]:
    """The rows of the table, with p and of_before."""
    with results.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = {}
    for line in ratios.read_text().splitlines():
        of = json.loads(line)
        found[tuple(str(of[key]) for key in KEYS)] = np.array(of["ratios"])

    def other(row: dict, method: str, any_seed: bool = False) -> dict | None:
        same = [o for o in rows if (o["method"], o["split"]) == (method, row["split"])]
        own = [o for o in same if o["seed"] == row["seed"]]
        return next(iter([*own, *(same if any_seed else [])]), None)

    table = []
    for row in rows:
        before, gold = other(row, "none"), other(row, "retrained", any_seed=True)
        mine, its = (found[tuple(r[key] for key in KEYS)] if r else None for r in (row, gold))
        whole = float(before["utility"]) if before else 0.0
        p = None if its is None else metrics.forget_quality(mine, its)
        table.append(row | {"p": p, "of_before": float(row["utility"]) / whole if whole else None})
    return table


def markdown(table: Sequence[dict[str, object]]) -> str:
    lines = [[str(row[key]) for key in KEYS] + [digits(row[column]) for column in COLUMNS] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*KEYS, *COLUMNS], ["---"] * len(KEYS + COLUMNS), *lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("ratios", type=Path)
    options = parser.parse_args()
    print(markdown(rows_of(options.results, options.ratios)))
