"""Methods that train, at every rate and after some epochs: what validation prefers, and what forgets best whatever it costs.
Part of study.py."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import eul
import losses
import models
import torch
from measure import plain
from shared import methods
from trial import Study, Tried
from validation import worth

SCALES = (2.0, 8.0)  # of RMU
RATES, EPOCHS = (1e-5, 5e-5), (2, 4, 6, 8, 10)
ANY_PRICE = "{}, at any price"

Made = Callable[[], methods.GradientAscent]


def variants_of(folder: Path) -> dict[str, dict[str, Made]]:
    """Of each method its variants, and what makes them."""
    return {name: {"": made} for name, made in methods.METHODS.items()} | {
        "rmu": {f"scale {scale:g}, ": functools.partial(losses.RMU, scale) for scale in SCALES},
        "me+gd": {"": losses.MaximumEntropy},
        "idk+ap": {"": lambda: losses.Refusal(losses.refusals(folder))},
        "icu": {"": losses.IterativeContrast},
        "eul": {"": eul.EUL},
    }


class Sweep:
    """Judges the settings of a method that trains, and keeps the weights of the best."""

    def __init__(self, study: Study, method: str) -> None:
        self.study, self.method, self.runs, self.worth = study, method, 0, ()
        self.tried: Tried | None = None
        self.model: Any = None

    def judge(self, tried: Tried, model: Any) -> None:
        found = worth(self.study.judge(self.method, tried))
        self.runs += 1
        if found > self.worth:
            self.worth, self.tried, self.model = found, tried, model


class Training:
    """One method, from the fine-tuned model, at every rate."""

    def __init__(self, study: Study, method: str, variants: dict[str, Made]) -> None:
        self.study, self.method = study, method
        self.save, rates = (eul.save, eul.RATES) if method == "eul" else (type(study.full).save_pretrained, RATES)
        pairs = itertools.product(variants.items(), rates)
        self.made = {f"{variant}{rate:g}": (make, rate) for (variant, make), rate in pairs}

    def train(self, start: str, epochs: Sequence[int], measure: Callable[[Tried, Any], None]) -> None:
        """measure is given each setting, and the model as it would be saved: in bf16."""
        study, (make, rate) = self.study, self.made[start]
        model = study.model("full", torch.float32)
        forget, retain = (
            [models.row(entry["question"], entry["answer"]) for entry in some] for some in (study.forget, study.known)
        )

        def after(epoch: int, cost: methods.Cost) -> None:
            rounded = copy.deepcopy(model).to(torch.bfloat16)
            measure(Tried(f"{start}, {epoch} epochs", plain(rounded, study.tokenizer), cost), rounded)

        methods.unlearn(
            model, study.tokenizer, make(), forget, retain, learning_rate=rate, epochs=epochs, seed=study.options.seed,
            measure=after,
        )  # fmt: skip

    def sweep(self) -> None:
        """The setting that validation prefers."""
        sweep = Sweep(self.study, self.method)
        for start in self.made:
            self.train(start, EPOCHS, sweep.judge)
        self.save(sweep.model, self.study.kept(self.method))
        self.study.record(self.method, sweep.tried, sweep.runs)

    def at_any_price(self, method: str) -> None:
        """The one that forgets best whatever it does to others, trained again; nothing where validation prefers that one."""
        keys = self.study.keys(self.method)
        chosen = self.study.table.find(**keys)
        if chosen is None:
            return
        judged = [row for row in self.study.trials.rows if all(row[name] == str(value) for name, value in keys.items())]
        best = max(judged, key=lambda row: (float(row["p"]), -float(row["distance"])))["setting"]
        if best == chosen["setting"]:
            return

        def keep(tried: Tried, model: Any) -> None:
            self.save(model, self.study.kept(method))
            self.study.record(method, tried, len(judged))

        start, epochs = best.rsplit(", ", 1)
        self.train(start, [int(epochs.split()[0])], keep)


def study_training(study: Study) -> None:
    for method, variants in variants_of(study.options.tofu).items():
        training = Training(study, method, variants)
        if study.todo(method):
            training.sweep()
        if study.todo(ANY_PRICE.format(method)):
            training.at_any_price(ANY_PRICE.format(method))
