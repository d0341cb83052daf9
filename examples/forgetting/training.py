"""Methods that train, at every rate and after some epochs. Part of study.py."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
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


def trained_methods(folder: Path) -> Iterator[tuple[str, str, Callable[[], methods.GradientAscent]]]:
    """Method, variant, and what makes it."""
    for name, made in methods.METHODS.items():
        yield name, "", made
    for scale in SCALES:
        yield "rmu", f"scale {scale:g}, ", lambda scale=scale: losses.RMU(scale)
    yield "me+gd", "", losses.MaximumEntropy
    yield "idk+ap", "", lambda: losses.Refusal(losses.refusals(folder))
    yield "icu", "", losses.IterativeContrast
    yield "eul", "", eul.EUL


class Sweep:
    """Judges the settings of a method that trains, and keeps the weights of the best."""

    def __init__(self, study: Study, method: str) -> None:
        self.study, self.method, self.runs, self.worth = study, method, 0, ()
        self.tried: Tried | None = None
        self.model: Any = None

    def judge(self, setting: str, model: Any, cost: methods.Cost) -> None:
        """The model as it would be saved: in bf16."""
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        tried = Tried(setting, plain(rounded, self.study.tokenizer), cost)
        found = worth(self.study.judge(self.method, tried))
        self.runs += 1
        if found > self.worth:
            self.worth, self.tried, self.model = found, tried, rounded


def study_training(study: Study) -> None:
    """Each method at every rate, from the fine-tuned model."""
    forget, retain = (
        [models.row(entry["question"], entry["answer"]) for entry in some] for some in (study.forget, study.known)
    )
    seed = study.options.seed
    for method, variants in itertools.groupby(trained_methods(study.options.tofu), key=lambda made: made[0]):
        if not study.todo(method):
            continue
        sweep = Sweep(study, method)
        save, rates = (eul.save, eul.RATES) if method == "eul" else (type(study.full).save_pretrained, RATES)
        for (_, variant, make), rate in itertools.product(variants, rates):
            model = study.model("full", torch.float32)

            def judge(epoch: int, cost: methods.Cost, sweep=sweep, model=model, start=f"{variant}{rate:g}") -> None:
                sweep.judge(f"{start}, {epoch} epochs", model, cost)

            methods.unlearn(
                model,
                study.tokenizer,
                make(),
                forget,
                retain,
                learning_rate=rate,
                epochs=EPOCHS,
                seed=seed,
                measure=judge,
            )
        save(sweep.model, study.kept(method))
        study.record(method, sweep.tried, sweep.runs)
