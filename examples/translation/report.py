"""Tables and pictures of a study: python examples/translation/report.py runs/translation/seed-0/frozen_below_study

Writes report.md beside results.csv, and, where matplotlib is installed, forgetting-ablate.png and
forgetting-reselect.png: what is lost on a topic's sentences against what is lost on the others.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from figures import NAMES
from study import CELL, CONTROLS, MODES, RULES

TARGET = -5.0  # percent of BLEU that sentences without the topic may lose
PAPER = """The paper (arXiv 2410.10866; opus_books, T5-small, S' not known), drop on sentences without the topic, percent: Julien
BLEU -65.70, METEOR -64.38, BERTScore precision -94.63; Wish BLEU -87.65, BARTScore -133.35. Its drops on the topics'
own sentences, and the other topics' figures, could not be recovered."""

Cell = dict  # a cell's CELL columns, "deleted", and {(group, metric): the row}


def read(table: Path) -> list[Cell]:
    cells: dict[tuple, Cell] = {}
    with open(table, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            key = tuple(row[name] for name in CELL)
            cell = cells.setdefault(key, {name: row[name] for name in (*CELL, "deleted", "seconds")} | {"rows": {}})
            cell["rows"][row["group"], row["metric"]] = row
    return list(cells.values())


def drop(cell: Cell, group: str, metric: str = "bleu", column: str = "drop") -> float:
    row = cell["rows"].get((group, metric))
    return float(row[column]) if row else float("nan")


def shown(cell: Cell, group: str, metric: str = "bleu") -> str:
    """Drop, its interval, and the values before and after."""
    if (group, metric) not in cell["rows"]:
        return ""
    row = {name: number(text) for name, text in cell["rows"][group, metric].items()}
    scale = 1 if metric in ("likelihood", "reference") else 100
    before, after = (scale * row[name] for name in ("before", "after"))
    return f"{row['drop']:.1f} ({row['drop_low']:.1f} to {row['drop_high']:.1f}); {before:.2f}, {after:.2f}"


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def reached(cells: list[Cell]) -> list[list[str]]:
    """For each topic the mask that forgets most among those that cost the rest at most TARGET."""
    lines = []
    for topic in dict.fromkeys(cell["topic"] for cell in cells):
        found = [cell for cell in cells if cell["topic"] == topic and cell["codes"] == "found"]
        cheap = [cell for cell in found if drop(cell, "rest") >= TARGET]
        if not cheap:
            lines.append([topic, f"none of {len(found)}", *[""] * 5])
            continue
        best = min(cheap, key=lambda cell: drop(cell, "topic"))
        name = " ".join(best[column] for column in CELL[1:5])
        lines.append([topic, f"{name} ({len(cheap)} of {len(found)} keep the rest)", best["deleted"],
                      *(shown(best, group) for group in ("topic", "near", "rest")), shown(best, "topic", "words")])  # fmt: skip
    return lines


def report(folder: Path) -> str:
    cells = read(folder / "results.csv")
    parts = ["# Topics unlearned from a translator\n"]
    if (folder / "models.csv").exists():
        with open(folder / "models.csv", newline="", encoding="utf-8") as stream:
            models = list(csv.DictReader(stream))
        parts += ["All test sentences; in [0, 1], the last two in nats a token.\n",
                  markdown(list(models[0]), ([row[n] for n in row] for row in models))]  # fmt: skip
    parts += [
        "A drop is in percent of the way from copying the source (0) to the codebook model (1), with its 95 % interval;",
        "then the figure itself, before and after, in percent.\n",
        "## Most forgotten at the lowest cost\n",
        f"Of all masks that cost the rest at most {-TARGET:g} % of BLEU the one that costs the topic most. Chosen on the",
        "sentences that are shown, so it flatters; the rule \"budget\" looks at validation sentences only.\n",
        markdown(["topic", "mask", "codes", "topic, BLEU", "near, BLEU", "rest, BLEU", "topic, its words"], reached(cells)),
        "## The paper's way\n",
        PAPER + "\n",
    ]  # fmt: skip
    as_paper = [c for c in cells if (c["control"], c["rule"], c["mode"], c["codes"]) == ("replaced", "paper", "reselect", "found")]  # fmt: skip
    head = [
        "topic",
        "S'",
        "codes",
        "topic, BLEU",
        *(f"rest, {m}" for m in ("BLEU", "METEOR", "states_p", "likelihood")),
    ]
    parts.append(markdown(head, (
        [c["topic"], c["depth"], c["deleted"], shown(c, "topic")]
        + [shown(c, "rest", metric) for metric in ("bleu", "meteor", "states_p", "likelihood")]
        for c in as_paper
    )))  # fmt: skip
    parts += ["## All cells\n", "Drops in percent, topic / near / rest.\n"]
    parts.append(markdown([*CELL, "deleted", *NAMES], (
        [c[name] for name in (*CELL, "deleted")]
        + [" / ".join(f"{drop(c, group, metric):.0f}" for group in ("topic", "near", "rest")) for metric in NAMES]
        for c in cells
    )))  # fmt: skip
    return "\n".join(parts)


def picture(cells: list[Cell], mode: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    topics = list(dict.fromkeys(cell["topic"] for cell in cells))
    rows = -(-len(topics) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(16, 4 * rows), squeeze=False)
    for axis, topic in zip(axes.flat, topics):
        for color, rule in zip(("tab:red", "tab:blue", "tab:green"), RULES):
            for style, control in zip(("-o", "--s"), CONTROLS):
                for codes in ("found", "random"):
                    line = [c for c in cells if (c["topic"], c["rule"], c["control"], c["codes"]) == (topic, rule, control, codes)
                            and c["mode"] in (mode, "ablate" if codes == "random" else mode)]  # fmt: skip
                    points = [(drop(c, "rest"), drop(c, "topic")) for c in line]
                    if points and codes == "found":
                        axis.plot(*zip(*points), style, color=color, label=f"{rule}, {control}", alpha=0.8)
                    elif points:
                        axis.plot(*zip(*points), "x", color="gray", alpha=0.6)
        axis.axvline(TARGET, color="black", linewidth=0.5)
        axis.set(title=topic, xlabel="BLEU, rest: drop, %", ylabel="BLEU, topic: drop, %")
    for axis in axes.flat[len(topics) :]:
        axis.set_axis_off()
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"mask_mode {mode}; a line's points are the depths S'; gray: as many random codes, ablate")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of results.csv")
    folder = parser.parse_args().study
    (folder / "report.md").write_text(report(folder), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return
    for mode in MODES:
        picture(read(folder / "results.csv"), mode, folder / f"forgetting-{mode}.png")


if __name__ == "__main__":
    main()
