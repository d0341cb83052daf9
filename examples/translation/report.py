"""Tables and pictures of a study: python examples/translation/report.py runs/translation/seed-0/frozen_below_study

Writes report.md beside results.csv, and, where matplotlib is installed, forgetting-ablate.png,
forgetting-reselect.png and forgetting-fired.png: the topic's words that are no longer said in its sentences, against what
the others lose of BLEU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from figures import NAMES
from study import CELL, CONTROLS, MODES, RULES

TARGET = -5.0  # percent of BLEU that sentences without the topic may lose
PAPER = """The paper (arXiv 2410.10866; opus_books, T5-small, S' not known), drop on sentences without the topic, percent: Julien
BLEU -65.70, METEOR -64.38, BERTScore precision -94.63; Wish BLEU -87.65, BARTScore -133.35. Its drops on the topics'
own sentences, and the other topics' figures, could not be recovered."""

PAPERS = {"control": "replaced", "rule": "paper", "mode": "reselect", "codes": "found"}
GROUPS = ("topic", "near", "rest")

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


def by_setting(cells: list[Cell]) -> dict[tuple[str, ...], list[Cell]]:
    """Setting (all of CELL but the topic) -> its cells, a topic each."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[name] for name in CELL[1:]), []).append(cell)
    return found


def mean(figures: Iterable[float]) -> float:
    """Of those that are figures: a topic that the model translated no better than a copier has no drop."""
    return statistics.fmean(list(filter(math.isfinite, figures)) or [math.nan])


def settings_table(settings: dict[tuple[str, ...], list[Cell]]) -> str:
    head = (*CELL[1:], "topics", "deleted", "topic: BLEU", "topic: least", "topic: its words", "near: BLEU", "rest: BLEU",
            "rest: most", f"topics whose rest loses at most {-TARGET:g} %")  # fmt: skip
    lines = []
    for setting, group in settings.items():
        topic, rest = ([drop(cell, which) for cell in group] for which in ("topic", "rest"))
        words, near = mean(drop(c, "topic", "words") for c in group), mean(drop(c, "near") for c in group)
        figures = (mean(topic), max(filter(math.isfinite, topic), default=math.nan), words, near, mean(rest), min(rest))
        lines.append([*setting, len(group), round(mean(float(cell["deleted"]) for cell in group)),
                      *(f"{figure:.1f}" for figure in figures), sum(d >= TARGET for d in rest)])  # fmt: skip
    return markdown(head, lines)


def best(settings: dict[tuple[str, ...], list[Cell]]) -> tuple[str, ...]:
    """Of those settings of all topics that cost every topic's rest at most TARGET, the one that costs the topics most."""
    topics = max(map(len, settings.values()))
    found = {s: group for s, group in settings.items() if s[-1] == "found" and len(group) == topics}
    kept = {s: group for s, group in found.items() if all(drop(cell, "rest") >= TARGET for cell in group)} or found
    return min(kept, key=lambda setting: mean(drop(cell, "topic") for cell in kept[setting]))


def topics_table(group: list[Cell]) -> str:
    """A setting, topic by topic."""
    head = ["topic", "codes", "held for, % of topic / near / rest", "topic, BLEU", "near, BLEU", "rest, BLEU",
            *(f"rest, {name}" for name in ("METEOR", "states_p", "likelihood")), "topic, its words"]  # fmt: skip
    lines = []
    for cell in group:
        held = (100 * float(cell["rows"][g, "bleu"]["fired"]) for g in GROUPS if (g, "bleu") in cell["rows"])
        lines.append([cell["topic"], cell["deleted"], " / ".join(f"{share:.0f}" for share in held),
                      *(shown(cell, g) for g in GROUPS),
                      *(shown(cell, "rest", name) for name in ("meteor", "states_p", "likelihood")),
                      shown(cell, "topic", "words")])  # fmt: skip
    return markdown(head, lines)


def report(folder: Path) -> str:
    cells = read(folder / "results.csv")
    parts = ["# Topics unlearned from a translator\n"]
    if (folder / "models.csv").exists():
        with open(folder / "models.csv", newline="", encoding="utf-8") as stream:
            models = list(csv.DictReader(stream))
        parts += ["A sample of test sentences; in [0, 1], the last two in nats a token.\n",
                  markdown(list(models[0]), ([row[n] for n in row] for row in models))]  # fmt: skip
    settings = by_setting(cells)
    ours = best(settings)
    parts += [
        "A drop is in percent of the way from copying the source (0) to the codebook model (1), with its 95 % interval;",
        "then the figure itself, before and after, in percent.\n",
        "## All settings\n",
        'Drops, means over topics; "least" and "most": the topic that loses least, the rest that loses most. nan: a topic',
        "whose sentences were translated no better than by copying them before; it is in no mean.\n",
        settings_table(settings),
        f"## {' '.join(ours[:-1])}\n",
        f"Of the settings that cost no topic's rest more than {-TARGET:g} % of BLEU the one that costs the topics most.",
        "It was chosen on the sentences that are shown.\n",
        topics_table(settings[ours]),
        "## The paper's way\n",
        PAPER + "\n",
    ]
    for setting in (setting for setting in settings if PAPERS.items() <= dict(zip(CELL[1:], setting)).items()):
        parts += [f"### S' = {setting[CELL.index('depth') - 1]}\n", topics_table(settings[setting])]
    parts += ["## All cells\n", "Drops in percent, topic / near / rest.\n"]
    parts.append(markdown([*CELL, "deleted", *NAMES], (
        [c[name] for name in (*CELL, "deleted")]
        + [" / ".join(f"{drop(c, group, metric):.0f}" for group in GROUPS) for metric in NAMES]
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
                    points = [(drop(c, "rest"), drop(c, "topic", "words")) for c in line]
                    if points and codes == "found":
                        axis.plot(*zip(*points), style, color=color, label=f"{rule}, {control}", alpha=0.8)
                    elif points:
                        axis.plot(*zip(*points), "x", color="gray", alpha=0.6)
        axis.axvline(TARGET, color="black", linewidth=0.5)
        axis.set(title=topic, xlabel="BLEU, rest: drop, %", ylabel="its words in the topic: drop, %")
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
