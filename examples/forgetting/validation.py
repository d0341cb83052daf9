"""How a setting is chosen without a look at what is reported, and without a model that never saw the split.

What is forgotten  the split's paraphrased questions, at most FORGET_ROWS of them, with TOFU's answers to them. Their truth
                   ratios should look as those of strangers do to the same model: authors who do not exist. A stranger is made
                   of a forgotten author by giving the words that hardly any other row has (names, titles, places) invented
                   stand-ins, in question and answers; DRAWS times, each from other stand-ins, as truth ratios depend on the
                   names.
What is kept       retain rows that are neither measured for utility nor counted as control.

The figures: p of a Kolmogorov-Smirnov test between the two sets of truth ratios, the distance of their logarithms'
distributions, and the share of the retain answers' probability that is left. Chosen is the largest p among settings that keep
at least KEPT, of equal ones (p of 40 and 40 has few values) the nearest; else the setting that keeps most.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Sequence

import numpy as np
from measure import Measure, spaced
from scipy import stats
from shared import metrics

from cu_fast.unlearn import replace_words

KEPT = 0.99
ROWS = 40  # of the retain rows
FORGET_ROWS = 80  # of the split: all of forget01, evenly spaced ones of larger splits
RARE = 2  # a word that fewer retain rows hold is the split's own
PER_AUTHOR = 20
DRAWS, STAND_INS = 5, 20
INVENTED = (
    "Ovrin Telmo Zaskia Brunholt Keviro Marnula Istvane Quolby Drestan Pelivar Yusmina Corthwell Anduvel Harkonis Sibrael "
    "Lunetro Vassimo Otriga Feldane Mirosk Tavendel Ubrico Jalistra Nemorin Wexley Ghioran Rastovel Elquist Bo Ria Zan Tiv"
).split()
FIGURES = ("p", "distance", "kept", "reworded_probability")
CAPITAL = r"[A-Z][^\W\d_]+"


def names_of(entries: Sequence[dict]) -> list[str]:
    """The authors that entries ask about, PER_AUTHOR entries each: of each the name that most of them hold."""
    found = []
    for start in range(0, len(entries), PER_AUTHOR):
        holds = collections.Counter()
        for entry in entries[start : start + PER_AUTHOR]:
            text = f"{entry['question']} {entry['answer']}"
            holds.update(set(re.findall(rf"{CAPITAL}(?:[ -]{CAPITAL})+", text)))
        found.append(max(holds, key=lambda name: (holds[name], len(name), name)))
    return found


def strangers(entries: Sequence[dict], retain: Sequence[dict], draw: int = 0) -> list[dict]:
    """The entries, of authors who do not exist."""

    def words(some: Sequence[dict]) -> list[set[str]]:
        return [set(re.findall(rf"\b{CAPITAL}", f"{entry['question']} {entry['answer']}")) for entry in some]

    known = collections.Counter(word for row in words(retain) for word in row)
    own = sorted({word for row in words(entries) for word in row if known[word] < RARE})
    if not own:
        return list(entries)
    invented = random.Random(draw).sample(INVENTED, STAND_INS)
    return [
        {
            key: list(replace_words(value, own, invented))
            if isinstance(value, list)
            else next(replace_words([value], own, invented))
            for key, value in entry.items()
        }
        for entry in entries
    ]


def reworded(entries: Sequence[dict]) -> list[dict]:
    return [{**entry, "question": entry["paraphrased_question"]} for entry in entries]


class Validation:
    """Judges settings. Measures here are given the sets "reworded" and "others".

    Args:
        forget: the split's entries.
        retain: retain rows that are neither measured nor counted.
        known: all retain rows.
        untouched: measures the model before anything is forgotten; ``self.before`` holds what it gave.
    """

    def __init__(
        self, forget: Sequence[dict], retain: Sequence[dict], known: Sequence[dict], untouched: Measure
    ) -> None:
        apart, forget = list(retain)[:ROWS], spaced(forget, FORGET_ROWS)
        wrong = [[entry["answer"]] for entry in apart[1:] + apart[:1]]
        others = [{**entry, "perturbed_answer": some} for entry, some in zip(apart, wrong)]
        self.sets = {"reworded": (reworded(forget), False), "others": (others, True)}
        draws = [reworded(strangers(forget, known, draw)) for draw in range(DRAWS)]
        self.strange = np.concatenate([untouched("strangers", entries, False).ratios for entries in draws])
        self.before = {name: untouched(name, *given) for name, given in self.sets.items()}

    def judge(self, measure: Measure) -> dict[str, float]:
        found = {name: measure(name, *given) for name, given in self.sets.items()}
        kept = found["others"].true.probability.mean() / self.before["others"].true.probability.mean()
        ratios = found["reworded"].ratios
        distance = float(stats.wasserstein_distance(np.log(ratios), np.log(self.strange)))
        probability = float(found["reworded"].probability.mean())
        return dict(zip(FIGURES, (metrics.forget_quality(ratios, self.strange), distance, float(kept), probability)))


def worth(judged: dict[str, float]) -> tuple:
    """The larger, the better."""
    enough = judged["kept"] >= KEPT
    return enough, judged["p"] if enough else judged["kept"], -judged["distance"]
