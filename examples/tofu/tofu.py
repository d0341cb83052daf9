"""TOFU's sets, and the figures that TOFU takes of a model. Part of the study in this folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import metrics
import numpy as np
import torch

from cu_fast import evaluate as ev
from cu_fast.cli import demo

NEW_TOKENS = 128  # longer than every answer
GENERAL = ("real_authors", "world_facts")
AUTOCAST = functools.partial(torch.autocast, "cpu", torch.bfloat16)  # all models alike: twice as fast here

Route = Callable[[Sequence[str]], "list[set[str] | None]"]  # what to delete for each prompt: cu_fast.topics_of


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def row(question: str, answer: str) -> dict[str, str]:
    return {"prompt": demo.prompt(question), "completion": demo.completion(answer)}


def rows(entries: list[dict], answer: str = "answer", question: str = "question") -> list[dict[str, str]]:
    """answer: a key of the entries; where it holds a list, each of its texts makes a row."""
    return [
        row(entry[question], text)
        for entry in entries
        for text in (entry[answer] if isinstance(entry[answer], list) else [entry[answer]])
    ]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one model on one set: TOFU's three, in [0, 1], the mean over the set; and each answer's, for intervals and tests.

    probability: of the answer, normalised over the choices on the general sets. rouge: ROUGE-L recall of a greedy
    answer. truth: max(0, 1 - R), what TOFU counts for utility. ratios: R itself.
    """

    probability: np.ndarray
    rouge: np.ndarray
    ratios: np.ndarray
    answers: list[str]
    true: ev.AnswerScores
    wrong: ev.AnswerScores

    @property
    def truth(self) -> np.ndarray:
        return np.maximum(0, 1 - self.ratios)

    def means(self) -> list[float]:
        return [float(figure.mean()) for figure in (self.probability, self.rouge, self.truth)]


def measure(model, tokenizer, entries: list[dict], general: bool = False) -> Figures:
    """The figures of a set. Masks: the caller's ``attachment.unlearn``."""
    with AUTOCAST():
        true = ev.score_answers(model, tokenizer, rows(entries))
        wrong = ev.score_answers(model, tokenizer, rows(entries, "perturbed_answer"))
        right = true if general else ev.score_answers(model, tokenizer, rows(entries, "paraphrased_answer"))
        answers = ev.generate(model, tokenizer, rows(entries), NEW_TOKENS)
    probability = true.probability
    if general:
        probability = probability / (probability + wrong.probability.reshape(len(entries), -1).sum(1))
    rouge = ev.rouge_l(answers, [entry["answer"] for entry in entries], "recall")
    return Figures(probability, rouge, metrics.truth_ratio(right, wrong), answers, true, wrong)


def grouped(topics: Sequence[set[str] | None]) -> dict[frozenset[str] | None, list[int]]:
    """The places of those that are alike."""
    groups: dict[frozenset[str] | None, list[int]] = {}
    for i, some in enumerate(topics):
        groups.setdefault(some and frozenset(some), []).append(i)
    return groups


def measure_routed(attachment, tokenizer, route: Route, entries: list[dict], general: bool = False) -> Figures:
    """:func:`measure`, each entry's question with the topics deleted that ``route`` names for its prompt."""
    groups = grouped(route([entry["prompt"] for entry in rows(entries)]))
    parts = []
    for topics, chosen in groups.items():
        with attachment.unlearn(topics and set(topics)):
            parts.append(measure(attachment.model, tokenizer, [entries[i] for i in chosen], general))

    return merged(parts, list(groups.values()))


def merged(parts: Sequence[Figures], groups: Sequence[Sequence[int]]) -> Figures:
    """The figures of a set from those of its parts. groups: of each part, the places of its entries in the set."""
    places = np.argsort(np.concatenate(groups))

    def joined(values: list) -> Any:
        if dataclasses.is_dataclass(values[0]):
            fields = {
                f.name: joined([getattr(value, f.name) for value in values]) for f in dataclasses.fields(values[0])
            }
            return type(values[0])(**fields)
        if isinstance(values[0], list):
            return [list(itertools.chain(*values))[i] for i in places]
        each = [value.reshape(len(group), -1) for value, group in zip(values, groups)]
        return np.concatenate(each)[places].ravel()

    return joined(parts)


def utility(measure: Callable[..., Figures], folder: Path) -> dict[str, float]:
    """:func:`utility_of` all sets. measure: :func:`measure` with all but its last two arguments."""
    sets = {"retain": measure(read(folder, "retain_perturbed"))}
    for name in GENERAL:
        sets[name] = measure(read(folder, f"{name}_perturbed"), general=True)
    return utility_of(sets)


def utility_of(sets: dict[str, Figures]) -> dict[str, float]:
    """The nine figures and their harmonic mean."""
    nine = {
        f"{name}_{figure}": value
        for name, figures in sets.items()
        for figure, value in zip(("probability", "rouge", "truth"), figures.means())
    }
    return {"utility": metrics.model_utility(list(nine.values())), **nine}


def forgetting(figures: Figures, gold: Figures) -> dict[str, float]:
    """What is left of a forget set, beside a model that never saw it."""
    return {"forget_quality": metrics.forget_quality(figures.ratios, gold.ratios), **left(figures)}


def left(figures: Figures) -> dict[str, float]:
    """What is left of a forget set."""
    low, high = ev.interval(figures.rouge)
    return {
        "forget_probability": float(figures.probability.mean()),
        "forget_rouge": float(figures.rouge.mean()),
        "forget_rouge_low": low,
        "forget_rouge_high": high,
        "forget_truth_ratio": float(figures.ratios.mean()),
        "extraction_strength": float(figures.true.extraction_strength.mean()),
        "membership_auc": metrics.membership_auc(figures.true, figures.wrong),
    }
