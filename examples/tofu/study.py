"""The TOFU study: python examples/tofu/study.py path/to/tofu --models runs/tofu --split forget01 --output runs/tofu/results.csv

Every method unlearns a split; every result is a row: what is left of the split, beside a model that never saw it, TOFU's
model utility, and what it cost. forget_fluency: how probable the twin that never saw the split finds what is answered. Rows
are added as they are measured; those that are there are not measured again.

codeunlearn, random   masks on the model with bottleneck, by depth S', rule and mode, compared with that model's gold twin;
                      "within 1.0%": the strongest, by R, that costs at most so much on validation rows (cu_fast.unlearn);
                      "where it fires": a stronger one beside it, for the prompts that speak of the split (cu_fast.unlearn)
gradient_ascent, ...  methods.py on the model without bottleneck, by rate and epochs; compared with its own gold twin
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import methods
import tofu
from models import GOLD, training_rows
from table import Table

from cu_fast import Mask
from cu_fast import evaluate as ev
from cu_fast.hf import Attachment
from cu_fast.hf.checkpoint import load_model, read_model
from cu_fast.unlearn import CodeCounts, count_codes, find_mask, level_for, random_mask, topics_of, within_loss

MAX_LOSSES = (0.002, 0.01, 0.05)
VALIDATION = 100  # rows that the rule looks at
QUOTED = 9  # every ninth answer is kept
DEPTHS = (16, 32, 64)
TRAININGS = {1e-4: (3, 5, 8, 12), 3e-4: (1, 2, 3, 4, 6)}  # learning rate: epochs after which the model is measured
OURS, PAPERS, LADDER = "R>2 BH", "R>0 p<0.05", "R>1 BH and more"
GATED = f"within {MAX_LOSSES[0]:.1%}, and {OURS} where it fires"
RULES = {
    OURS: {"min_enrichment": 2.0, "alpha": 0.05, "correction": "bh"},
    PAPERS: {"min_enrichment": 0.0, "alpha": 0.05, "correction": "none"},
    LADDER: {"min_enrichment": 1.0, "alpha": 0.05, "correction": "bh", "grow": "enrichment"},  # for within_loss
}


NOTHING = methods.Cost(0.0, 0, 0)


@dataclasses.dataclass
class Subject:
    """A model that is to forget a split, and its gold twin with what that makes of the split."""

    model: Any
    tokenizer: Any
    twin: Any
    gold: tofu.Figures
    folder: Path
    split: str
    seed: int
    table: Table

    def todo(self, method: str, setting: str) -> bool:
        return not self.table.has(split=self.split, seed=self.seed, method=method, setting=setting)

    def record(
        self, method: str, setting: str, cost: methods.Cost = NOTHING, codes: int = 0, measure: Callable | None = None
    ) -> None:
        """Measure the model as it is now, and add the row; and what it answers, to answers.jsonl beside the table.

        measure: in place of ``tofu.measure`` of this model.
        """
        measure = measure or functools.partial(tofu.measure, self.model, self.tokenizer)
        keys = {"split": self.split, "seed": self.seed, "method": method, "setting": setting}
        forget = measure(tofu.read(self.folder, f"{self.split}_perturbed"))
        said = dict(zip(self.questions(), forget.answers))
        with tofu.AUTOCAST():
            rows = [tofu.row(*pair) for pair in said.items()]
            fluency = float(ev.score_answers(self.twin, self.tokenizer, rows).probability.mean())
        self.table.add(
            keys
            | {"codes": codes, **cost._asdict()}
            | tofu.forgetting(forget, self.gold)
            | {"forget_fluency": fluency}
            | tofu.utility(measure, self.folder)
        )
        with (self.table.path.parent / "answers.jsonl").open("a") as stream:
            stream.write(json.dumps(keys | {"answers": dict(list(said.items())[::QUOTED])}) + "\n")

    def questions(self) -> list[str]:
        return [entry["question"] for entry in tofu.read(self.folder, f"{self.split}_perturbed")]


def forget_figures(model, tokenizer, folder: Path, split: str) -> tofu.Figures:
    return tofu.measure(model, tokenizer, tofu.read(folder, f"{split}_perturbed"))


def study_training(options: argparse.Namespace, table: Table, retain: list[dict]) -> None:
    """The methods that train, each on the model without bottleneck."""
    full, gold_folder = (
        options.models / f"{name}-{options.seed}" / "base" for name in ("full", gold_of(options.split))
    )
    gold, tokenizer = read_model(gold_folder)
    figures = forget_figures(gold, tokenizer, options.tofu, options.split)
    subject = Subject(gold, tokenizer, gold, figures, options.tofu, options.split, options.seed, table)
    if subject.todo("retrained", "without bottleneck"):
        subject.record("retrained", "without bottleneck")
    subject.model = read_model(full)[0]
    if subject.todo("none", "without bottleneck"):
        subject.record("none", "without bottleneck")
    forget = tofu.rows(tofu.read(options.tofu, options.split))
    for method, rate in itertools.product(methods.METHODS, TRAININGS):
        settings = {epoch: f"{rate:g}, {epoch} epochs" for epoch in TRAININGS[rate]}
        wanted = {epoch: setting for epoch, setting in settings.items() if subject.todo(method, setting)}
        if wanted:
            subject.model = read_model(full)[0]
            methods.unlearn(
                subject.model, tokenizer, methods.METHODS[method](), forget, retain, learning_rate=rate, epochs=list(wanted), seed=options.seed,
                measure=lambda epoch, cost, m=method, w=wanted: subject.record(m, w[epoch], cost),
            )  # fmt: skip


def study_masks(options: argparse.Namespace, table: Table, retain: list[dict]) -> None:
    """Masks, on the model with bottleneck."""
    folders = (options.models / f"{name}-{options.seed}" / "bundle" for name in ("full", gold_of(options.split)))
    (model, tokenizer, attachment), (gold, *_) = map(load_model, folders)
    figures = forget_figures(gold, tokenizer, options.tofu, options.split)
    subject = Subject(gold, tokenizer, gold, figures, options.tofu, options.split, options.seed, table)
    if subject.todo("retrained", "with bottleneck"):
        subject.record("retrained", "with bottleneck")
    subject.model = model
    if subject.todo("none", "with bottleneck"):
        subject.record("none", "with bottleneck")
    target = tofu.rows(tofu.read(options.tofu, options.split))
    validation, control = split_off_validation(options.tofu, retain, options.seed)

    for depth in DEPTHS:
        started = time.perf_counter()
        others = count(attachment, tokenizer, control, depth)
        print(f"counted the control {depth} deep: {time.perf_counter() - started:.1f} s", flush=True)

        def find(rule: str, choose=None, depth=depth, others=others) -> Mask:
            return find_codes(attachment, tokenizer, target, others, depth, options.split, rule, choose)

        def try_mask(method: str, rule: str, mode: str, make: Callable[[], Mask], depth=depth) -> None:
            setting = f"{depth} deep, {rule}, {mode}"
            if not subject.todo(method, setting):
                return
            started = time.perf_counter()
            mask = make()
            seconds = time.perf_counter() - started
            attachment.mask_mode = mode
            name = attachment.add_mask(mask)
            with attachment.unlearn(name):
                subject.record(method, setting, methods.Cost(seconds, len(target), 0), mask.num_deleted)
            attachment.remove_mask(name)

        for rule, mode in ((OURS, "ablate"), (OURS, "reselect"), (PAPERS, "reselect")):
            try_mask("codeunlearn", rule, mode, functools.partial(find, rule))
        for max_loss in MAX_LOSSES:
            choose = within_loss(attachment, tokenizer, validation, max_loss)
            try_mask("codeunlearn", f"within {max_loss:.1%}", "ablate", functools.partial(find, LADDER, choose))
        gated = f"{depth} deep, {GATED}"
        if subject.todo("codeunlearn", gated):
            started = time.perf_counter()
            choose = within_loss(attachment, tokenizer, validation, MAX_LOSSES[0])
            names = attachment.add_mask(find(LADDER, choose), "always"), attachment.add_mask(find(OURS), "gated")
            route = make_route(attachment, tokenizer, validation, *names)
            cost = methods.Cost(time.perf_counter() - started, 2 * len(target) + VALIDATION, 0)
            codes = sum(mask.num_deleted for mask in attachment.masks["gated"])
            subject.record(
                "codeunlearn", gated, cost, codes, functools.partial(tofu.measure_routed, attachment, tokenizer, route)
            )
            for name in names:
                attachment.remove_mask(name)
        try_mask("random", OURS, "ablate", lambda others=others: random_mask(find(OURS), others))


def make_route(attachment: Attachment, tokenizer, validation: list[dict], always: str, gated: str) -> tofu.Route:
    """Deletes ``always``; and ``gated`` for prompts that fire it more than 99 of 100 validation prompts do."""
    with tofu.AUTOCAST():
        level = level_for(attachment, tokenizer, [row["prompt"] for row in validation], attachment.masks[gated])

    def route(prompts: Sequence[str]) -> list[set[str] | None]:
        with tofu.AUTOCAST():
            return topics_of(attachment, tokenizer, prompts, {gated: level}, {always})

    return route


def split_off_validation(folder: Path, retain: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Rows for the rule to look at, none of which is among those that utility is measured on; and the others."""
    measured = {row["prompt"] for row in tofu.rows(tofu.read(folder, "retain_perturbed"))}
    validation = random.Random(seed).sample([row for row in retain if row["prompt"] not in measured], VALIDATION)
    apart = {row["prompt"] for row in validation}
    return validation, [row for row in retain if row["prompt"] not in apart]


def count(attachment: Attachment, tokenizer, rows: list[dict], depth: int) -> CodeCounts:
    (layer,) = attachment.bottlenecks
    texts = [row["prompt"] + row["completion"] for row in rows]
    with tofu.AUTOCAST():
        return count_codes(
            attachment, tokenizer, texts, layer=layer, depth=depth, examples=0, batch_size=64, progress=False
        )


def find_codes(
    attachment: Attachment, tokenizer, target: list[dict], others: CodeCounts, depth: int, topic: str, rule: str,
    choose: Callable | None = None,
) -> Mask:  # fmt: skip
    found = count(attachment, tokenizer, target, depth)
    with tofu.AUTOCAST():
        return find_mask(
            attachment, tokenizer, found, others, topic=topic, depth=depth, choose=choose, progress=False, **RULES[rule]
        ).mask


def gold_of(split: str) -> str:
    return next(name for name, left_out in GOLD.items() if left_out == split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("--models", type=Path, default=Path("runs/tofu"), help="made by models.py")
    parser.add_argument("--split", choices=[name for name in GOLD.values() if name], default="forget01")
    parser.add_argument("--only", choices=["masks", "training"], help="a half of the methods; default: both")
    parser.add_argument("--seed", type=int, default=0, help="of the models, and of what is drawn")
    parser.add_argument("--output", type=Path, default=Path("runs/tofu/results.csv"))
    options = parser.parse_args()
    table = Table(options.output)
    retain = tofu.rows(training_rows(options.tofu, options.split))
    random.Random(options.seed).shuffle(retain)
    if options.only != "training":
        study_masks(options, table, retain)
    if options.only != "masks":
        study_training(options, table, retain)


if __name__ == "__main__":
    main()
