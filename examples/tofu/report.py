"""Tables and a picture of what study.py and persistence.py measured: python examples/tofu/report.py results.csv persistence.csv

Prints Markdown. --picture FILE draws forget quality against model utility, a point for each method and strength (matplotlib).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

STUDY = (
    "codes",
    "forget_quality",
    "utility",
    "forget_rouge",
    "forget_probability",
    "extraction_strength",
    "membership_auc",
    "seconds",
)
PERSISTENCE = ("rouge", "rouge_low", "rouge_high", "probability", "extraction_strength")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def table(rows: list[dict[str, str]], names: tuple[str, ...], figures: tuple[str, ...]) -> str:
    """Markdown: columns of text, then of figures, three digits each."""
    lines = [f"| {' | '.join((*names, *figures))} |", "|---" * len((*names, *figures)) + "|"]
    lines += [
        f"| {' | '.join([*(row[name] for name in names), *(f'{float(row[figure]):.3g}' for figure in figures)])} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for method in dict.fromkeys(row["method"] for row in rows):
        some = [row for row in rows if row["method"] == method]
        quality = [max(float(row["forget_quality"]), 1e-4) for row in some]
        axes.scatter([float(row["utility"]) for row in some], quality, label=method, s=25)
    axes.axhline(0.05, color="grey", linewidth=0.8)
    axes.set(yscale="log", xlabel="model utility", ylabel="forget quality (p; below 1e-4: drawn there)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="written by study.py")
    parser.add_argument("persistence", type=Path, nargs="?", help="written by persistence.py")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = read(options.results)
    print(table(rows, ("split", "method", "setting"), STUDY))
    if options.persistence:
        print(f"\n{table(read(options.persistence), ('test', 'method'), PERSISTENCE)}")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
