"""A setting that was tried, the tables, and what is the same for every method. Part of study.py."""

from __future__ import annotations

import argparse
import json
import random
import time
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import models
import numpy as np
import torch
import transformers
from measure import Measure, Sets, load_figures, plain, row_of, save_figures
from shared import Table, methods, tofu
from validation import FIGURES, ROWS, Validation, worth

from cu_fast.masks import Mask

SEED = 0  # of what is drawn
CONTROL = 800  # retain rows that are counted
NOTHING = methods.Cost(0.0, 0, 0)
RATIOS = "ratios.jsonl"  # beside the table
QUOTED = 9  # every ninth answer is kept
GOLD = {left_out: name for name, left_out in models.MODELS.items() if left_out}


def short(method: str) -> str:
    """A method's name in options, and in files' names."""
    return method.replace(", ", "-").replace(" ", "-")


class Tried(NamedTuple):
    """A setting, what it makes of the model, what it cost, further columns, and the masks that it is, where it is some."""

    setting: str
    measure: Measure
    cost: methods.Cost = NOTHING
    extra: Mapping[str, Any] = types.MappingProxyType({})
    masks: Collection[Mask] = ()


class Study:
    """The split, the sets, the tables, and the fine-tuned model.

    Attributes:
        forget, known: the split's rows and all others that the model was fine-tuned on.
        judging, control: of the others, those that settings are judged by, and those that codes are compared with; none of
            them is measured.
        untouched: the model's figures before anything is forgotten.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.read(options)
        self.full = self.model("full")
        self.start("none", plain(self.full, self.tokenizer), "untouched")

    def read(self, options: argparse.Namespace) -> None:
        """Sets what needs no model."""
        self.options, self.split, self.output = options, options.split, options.output
        self.sets = Sets(options.tofu, options.split, options.retain_rows)
        self.table, self.trials = Table(options.output), Table(options.output.with_name("validation.csv"))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
        self.tokenizer.padding_side = "left"
        gone = {entry["question"] for entry in tofu.read(options.tofu, self.split)}
        everything = tofu.read(options.tofu, "retain90") + tofu.read(options.tofu, "forget10")
        self.forget = [entry for entry in everything if entry["question"] in gone]
        self.known = [entry for entry in everything if entry["question"] not in gone]
        measured = {entry["question"] for entry in tofu.read(options.tofu, "retain_perturbed")}
        free = [entry for entry in self.known if entry["question"] not in measured]
        random.Random(SEED).shuffle(free)
        self.judging, self.control = free[:ROWS], free[ROWS:][:CONTROL]

    def start(self, method: str, as_it_is: Measure, name: str) -> None:
        """Judge from here on by a model as it is, whose row is a method's; its figures are kept under a name."""
        self.validation = Validation(self.sets.forget, self.judging, self.known, as_it_is)
        kept = self.output.with_name(f"{name}-{self.split}-{len(self.sets.retain)}.json")
        if not kept.exists():
            save_figures(kept, self.sets.measured(as_it_is))
        self.untouched = load_figures(kept) | self.validation.before
        if not self.table.has(**self.keys(method)):
            self.judge(method, Tried("", as_it_is))
            self.record(method, Tried("", lambda name, *_: self.untouched[name]))

    def model(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        folder = self.options.base if name == "base" else self.options.models / f"{name}-{self.options.seed}"
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def keys(self, method: str) -> dict[str, Any]:
        return {"split": self.split, "seed": self.options.seed, "method": method}

    def todo(self, method: str) -> bool:
        return short(method) in self.options.methods and not self.table.has(**self.keys(method))

    def kept(self, method: str) -> Path:
        """Where a method's chosen weights or mask are kept."""
        return self.output.with_name(f"{short(method)}-{self.split}-{self.options.seed}")

    def record(self, method: str, tried: Tried, runs: int = 1) -> None:
        """Measure all sets, and add the row; the truth ratios and some answers, to a file beside the table; masks too."""
        for mask in tried.masks:
            folder = self.kept(method).with_suffix(".safetensors")
            mask.save(folder / mask.topic if len(tried.masks) > 1 else folder)
        started = time.perf_counter()
        found = self.sets.measured(tried.measure)
        keys = self.keys(method) | {"setting": tried.setting}
        columns = {"codes": 0, "fires_forget": "", "fires_reworded": "", "fires_retain": "", "fires_general": ""}
        measuring = {"retain_rows": len(self.sets.retain), "measuring": round(time.perf_counter() - started)}
        forget = found["forget"]
        said = {entry["question"]: text for entry, text in zip(self.sets.forget, forget.answers)}
        self.keep_ratios(method, tried.setting, forget.ratios, dict(list(said.items())[::QUOTED]))
        self.table.add(
            keys | {"runs": runs, **tried.cost._asdict(), **columns, **tried.extra} | row_of(found) | measuring
        )

    def keep_ratios(
        self,
        method: str,
        setting: str,
        ratios: Iterable[float],
        answers: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        line = self.keys(method) | {"setting": setting, "ratios": [float(f"{ratio:.6g}") for ratio in ratios]}
        with self.output.with_name(RATIOS).open("a") as stream:
            stream.write(json.dumps(line | {"answers": dict(answers)}, ensure_ascii=False) + "\n")

    def ratios(self, method: str, setting: str) -> np.ndarray | None:
        """Of the split's questions, in order; None = not measured yet."""
        path = self.output.with_name(RATIOS)
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        keys = self.keys(method) | {"setting": setting}
        found = [line["ratios"] for line in lines if keys.items() <= line.items()]
        return np.array(found[-1]) if found else None

    def judge(self, method: str, tried: Tried) -> dict[str, float]:
        keys = self.keys(method) | {"setting": tried.setting}
        found = self.trials.find(**keys)
        if found:
            return {name: float(found[name]) for name in FIGURES}
        judged = self.validation.judge(tried.measure)
        self.trials.add(keys | {"seconds": tried.cost.seconds} | judged)
        return judged

    def best(self, method: str, settings: Sequence[Tried]) -> None:
        """Record the setting that validation prefers; where there is one, without it."""
        judged = [self.judge(method, tried) for tried in settings] if len(settings) > 1 else [None]
        pick = max(range(len(settings)), key=lambda i: worth(judged[i]) if judged[i] else ())
        self.record(method, settings[pick], len(settings))
