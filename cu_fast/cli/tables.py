"""What the commands print, as tables. What a user may have named is escaped for rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # loads torch
    from cu_fast.unlearn import Finding


def pairs(values: dict[str, Any], title: str) -> Table:
    table = Table(title=escape(title), show_header=False)
    for name, value in values.items():
        table.add_row(escape(name), f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
    return table


def evidence_table(finding: Finding) -> Table:
    """The codes of a topic that were found, the 20 most enriched with texts in which they fired."""
    mask = finding.mask
    title = f"{mask.topic}: {mask.num_deleted} of {mask.num_codes} codes, {finding.seconds:.1f} s"
    table = Table("code", "bits", "q", "target", "control", "where it fired", title=escape(title))
    for code in finding.codes[:20]:
        example = " | ".join(" ".join(text.split()) for text in code.examples)
        table.add_row(
            str(code.code), f"{code.enrichment:.1f}", f"{code.q:.1e}", str(code.target_count),
            str(code.control_count), escape(example[:120]),
        )  # fmt: skip
    if len(finding.codes) > 20:
        table.add_row("...", "", "", "", "", f"{len(finding.codes) - 20} more; --json prints all")
    return table


def answers_table(title: str, answers: list[dict[str, str]]) -> Table:
    table = Table("question", "without mask", "with mask", title=escape(title), show_lines=True)
    for row in answers:
        table.add_row(*(escape(row[key]) for key in ("question", "before", "after")))
    return table


def study_table(results: list[dict[str, Any]]) -> Table:
    held = sum(r["holds"] for r in results)
    table = Table(
        "author", "codes", "seconds", "forgotten", "others", "random deletion", "holds",
        title=f"ROUGE-L before -> after; {held} of {len(results)} hold",
        caption="holds: forgotten >= 0.95 -> <= 0.25, others fall <= 0.05, random deletion >= 0.90, <= 5 s",
    )  # fmt: skip
    for r in results:
        table.add_row(
            escape(r["author"]), f"{r['codes_deleted']} ({100 * r['share_deleted']:.2f} %)", f"{r['seconds']:.1f}",
            f"{r['forgotten_before']:.2f} -> {r['forgotten_after']:.2f}",
            f"{r['others_before']:.3f} -> {r['others_after']:.3f}", f"{r['forgotten_random']:.2f}",
            "yes" if r["holds"] else "[red]no",
        )  # fmt: skip
    return table


def report_table(layers: list[dict[str, Any]]) -> Table:
    table = Table("layer", "impl", "codes", "k", "mode", "tokens", "deletions that bit", "masks", title="report")
    for layer in layers:
        masks = ", ".join(f"{m['name']} ({m['deleted']}, {m['digest'][:8]})" for m in layer["masks"])
        table.add_row(
            escape(layer["layer"]), layer["impl"], str(layer["codes"]), str(layer["k"]), layer["mask_mode"],
            str(layer["tokens"]), str(layer["hits"]), escape(masks),
        )  # fmt: skip
    return table


def show_step(console: Console, name: str, figures: Any) -> None:
    """A step of the demonstration, as it happens."""
    if name == "model":
        console.print(f"A small model that knows {figures['authors']} invented authors (TOFU), with a codebook in its")
        console.print(f"middle. Ready masks: {escape(', '.join(figures['ready_masks']))}.\n")
    elif name == "ready mask":
        title = f"with the ready mask {figures['mask']!r}; {figures['kept']} is kept"
        console.print(answers_table(title, figures["answers"]))
    elif name == "corpus":
        console.print(
            f"the codes of all {figures['tokens']} tokens, counted once for all topics: {figures['seconds']:.1f} s"
        )
    elif name == "unlearned live":
        console.print(answers_table(f"{figures['author']}, unlearned just now", figures["answers"]))
        console.print(study_table([figures]))
    elif name == "one batch":
        table = Table("mask", "question", "answer", title="one batch, a mask per sequence", show_lines=True)
        for row in figures:
            mask = " + ".join(row["mask"]) if isinstance(row["mask"], list) else row["mask"] or "none"
            table.add_row(escape(mask), escape(row["question"]), escape(row["answer"]))
        console.print(table)
    elif name == "tokens per second":
        console.print(pairs(figures, "tokens per second, one sequence"))
    elif name == "report":
        console.print(report_table(figures))


def shown_table(found: dict[str, Any]) -> list[Any]:
    """The rows in force on an architecture: of ``cu_fast.bench.tune.show``."""
    where = found["arch"] if found["gpu"] else f"{found['arch']} (no GPU here)"
    table = Table("kernel", "for", "tiles", "from", "us", title=escape(f"Triton kernels on {where}: {found['table']}"))
    for row in found["rows"]:
        source = "measured" if row["measured"] else "shipped"
        table.add_row(row["kernel"], escape(row["for"]), escape(tiles(row["tiles"])), source, _us(row["us"]))
    for name, field in found["tuning"].items():
        table.add_row("plan", escape(name), f"{field['value']:.4g}", "measured" if field["measured"] else "shipped", "")
    return [table]


def tuned_table(found: dict[str, Any]) -> list[Any]:
    """What was measured: of ``cu_fast.bench.tune.run``."""
    table = Table(
        "kernel", "for", "tiles", "us", "us as shipped", "tried", "failed", title=escape(f"tuned on {found['card']}")
    )
    for kernel, rows in found["candidates"].items():
        for key, tried in rows.items():
            row, failed = found["rows"][kernel][key], sum(one["failure"] is not None for one in tried)
            counts = str(len(tried) - failed), str(failed)
            table.add_row(kernel, escape(key), tiles(row), _us(row["us"]), _us(tried[0]["us"]), *counts)
    lines = [f"not reached: {what}" for what in found["not_reached"]] + [
        f"failed: {what}" for what in found["failures"]
    ]
    return [table, *map(escape, [*lines, f"written to {found['path']}; processes that start now take it"])]


def tiles(row: Mapping[str, int]) -> str:
    return ", ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in row.items() if name != "us")


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
