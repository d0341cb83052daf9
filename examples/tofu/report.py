"""A report of what study.py and persistence.py measured: python examples/tofu/report.py results.csv persistence.csv

Writes report.md beside results.csv and, where matplotlib is installed, plane.png: forget quality against utility, a point a
method and strength.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

STUDY = (
    "codes", "forget_quality", "utility", "of_before", "forget_rouge", "forget_rouge_low", "forget_rouge_high",
    "forget_probability", "extraction_strength", "membership_auc", "forget_fluency", "seconds", "forward", "backward",
)  # fmt: skip
EXPLAINED = """Forget quality: p of a Kolmogorov-Smirnov test of the forgotten questions' truth ratios against a model's that never saw
them ("retrained", of the same build); above 0.05 the two cannot be told apart. Utility: the harmonic mean of TOFU's nine
figures; of_before: as a share of what the same model had before. forget_*: what is left of the forgotten answers: ROUGE-L
recall with its 95 % bootstrap interval, probability, extraction strength, and how well a likelihood tells the true answers
from wrong ones (membership_auc, 0.5: not at all); fluency is the probability of what is answered instead, to that other
model. Cost: seconds on the machine named in README.md, and rows that went forward and backward."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def digits(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{float(value):.0f}" if abs(float(value)) >= 1000 else f"{float(value):.3g}"


def before(rows: list[dict[str, str]], row: dict[str, str]) -> float:
    """Utility of the model that a row's method began with."""
    build = "with bottleneck" if row["method"] in ("codeunlearn", "random") else "without bottleneck"
    if row["method"] in ("none", "retrained"):
        build = row["setting"]
    return next(
        float(other["utility"])
        for other in rows
        if (other["method"], other["setting"]) == ("none", build)
        and (other["split"], other["seed"]) == (row["split"], row["seed"])
    )


def study_table(rows: list[dict[str, str]]) -> str:
    names = ("split", "seed", "method", "setting")
    return markdown(
        (*names, *STUDY), ([*(row[name] for name in names), *(digits(row[figure]) for figure in STUDY)] for row in rows)
    )


def persistence_tables(rows: list[dict[str, str]]) -> str:
    tests: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        tests.setdefault(row["test"], {}).setdefault(row["method"], {})[row["figure"]] = row["value"]
    parts = []
    for test, methods in tests.items():
        figures = list(dict.fromkeys(name for found in methods.values() for name in found))
        lines = ([method, *(digits(found.get(name)) for name in figures)] for method, found in methods.items())
        parts.append(f"### {test}\n\n{markdown(['method', *figures], lines)}")
    return "\n\n".join(parts)


def best(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of each split and method: where a setting passes, the one that passes with the most utility, else the nearest to it."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        build = row["setting"] if row["method"] in ("none", "retrained") else ""
        groups.setdefault((row["split"], row["seed"], row["method"], build), []).append(row)
    return [
        max(some, key=lambda row: (min(float(row["forget_quality"]), 0.05), float(row["utility"])))
        for some in groups.values()
    ]


def quotations(rows: list[dict[str, str]], path: Path) -> str:
    """What the best of each method answers, question by question."""
    keys = ("split", "seed", "method", "setting")
    with path.open() as stream:
        said = {tuple(str(entry[key]) for key in keys): entry["answers"] for entry in map(json.loads, stream)}
    chosen = [tuple(row[key] for key in keys) for row in best(rows) if row["seed"] == rows[0]["seed"]]
    parts = []
    for split in dict.fromkeys(split for split, *_ in chosen):
        some = [key for key in chosen if key[0] == split]
        for question in said[some[0]]:
            lines = ([key[2], key[3], said[key][question].replace("|", "/")] for key in some)
            parts.append(f"{question}\n\n{markdown(['method', 'setting', 'answer'], lines)}")
    return "\n\n".join(parts)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    def label(row: dict[str, str]) -> str:
        return row["method"] + ", where it fires" * row["setting"].endswith("where it fires")

    splits = list(dict.fromkeys(row["split"] for row in rows))
    figure, grid = pyplot.subplots(len(splits), 2, figsize=(12, 5 * len(splits)), squeeze=False, sharey=True)
    for split, axes in zip(splits, grid):
        for name, marker in zip(dict.fromkeys(map(label, rows)), "*PosDv^X"):
            some = [row for row in rows if (label(row), row["split"]) == (name, split)]
            quality = [float(row["forget_quality"]) for row in some]
            for side, column in zip(axes, ("utility", "of_before")):
                side.scatter([float(row[column]) for row in some], quality, label=name, s=30, marker=marker)
        for side, title, column in zip(axes, ("model utility", "utility, of that before"), ("utility", "of_before")):
            side.axhline(0.05, color="grey", linewidth=0.8)
            most = max(float(row[column]) for row in rows)
            side.set(yscale="log", xlabel=title, title=split, xlim=(0.93 * most, 1.005 * most))
        axes[0].set_ylabel("forget quality (p)")
        axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="written by study.py, answers.jsonl beside it")
    parser.add_argument("persistence", type=Path, help="written by persistence.py")
    options = parser.parse_args()
    rows = read(options.results)
    for row in rows:
        whole = before(rows, row)
        row["of_before"] = str(float(row["utility"]) / whole if whole else float("nan"))
    text = f"# TOFU\n\n![plane](plane.png)\n\nWhat lost more than 7 % of utility is not drawn. {EXPLAINED}\n\n{study_table(rows)}\n\n## Does it stay gone?\n\n"
    text += persistence_tables(read(options.persistence))
    text += f"\n\n## What is answered\n\n{quotations(rows, options.results.parent / 'answers.jsonl')}"
    (options.results.parent / "report.md").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
    else:
        draw(rows, options.results.parent / "plane.png")


if __name__ == "__main__":
    main()
