"""Unlearns each topic in every way and measures it: python examples/translation/study.py DATA --models runs/translation/seed-0

The codes of a topic are found from training sentences that hold one of its words, against

replaced        the same sentences with the topic's words replaced (the paper's control), or
others          all other training sentences,

at each depth S', by

paper           R > 0 and p < 0.05, uncorrected;
corrected       R > 2 and q < 0.05 (Benjamini-Hochberg);
budget          of the corrected, from the most enriched on, as many as cost validation sentences without the topic at
                most 1 % of a token's probability,

and deleted

ablate, reselect   in that mask mode, for every sentence;
fired              in mode ablate, for those sentences that fire the mask's codes more than 99 of 100 validation
                   sentences without the topic do (what cu_fast.topics_of decides by).

Beside each mask of the first control, in mode ablate, as many random codes of the same frequency. Measured on test
sentences of stories that no model was trained on: "topic", all that hold one of its words; "near", those with a synonym
only; "rest", a sample of those without its words. The figures: figures.py.

results.csv takes a row a figure, as they come, and the study goes on where it was interrupted. models.csv holds the
models themselves, on a sample of all test sentences. report.py makes tables and pictures of both.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import TOPICS, Pair, Topic, counterparts, deal, read
from corpus import rows as rows_of
from figures import NAMES, Figures, Judge, compare, log_likelihood, measure, translate, value
from models import autocast

from cu_fast.hf.checkpoint import load_model, read_model
from cu_fast.masks import Mask
from cu_fast.unlearn import (
    CodeCounts,
    count_codes,
    find_mask,
    fired,
    level_for,
    random_mask,
    replace_words,
    within_loss,
)

DEPTHS = (8, 16, 32, 64, 104)
CONTROLS = ("replaced", "others")
RULES: dict[str, dict[str, Any]] = {
    "paper": dict(min_enrichment=0.0, alpha=0.05, test="chi2", correction="none"),
    "corrected": dict(min_enrichment=2.0, alpha=0.05),
    "budget": dict(min_enrichment=2.0, alpha=0.05, grow="enrichment"),
}
MODES = ("ablate", "reselect", "fired")
REST = 200  # test sentences without the topic
TRIED = "the study's mask"
BUDGET, BUDGET_ROWS = 0.01, 200
COMPARED = 600  # test sentences that the models are compared on
FIRE_SHARE = 0.01  # of validation sentences without the topic
Outcome = tuple[list[str], Figures, np.ndarray]  # translations, figures, for which sentences the mask held
CELL = ("topic", "control", "rule", "depth", "mode", "codes")  # codes: "found" or "random"
COLUMNS = (*CELL, "deleted", "seconds", "group", "fired", "metric", "sentences", "zero", "before", "after", "drop", "drop_low",
           "drop_high", "raw_drop")  # fmt: skip


@dataclasses.dataclass
class Study:
    """What all topics share: models, sentences, and what is said of them before anything is deleted."""

    model: Any
    tokenizer: Any
    attachment: Any
    judge: Judge
    split: dict[str, list[Pair]]
    folder: Path

    def __post_init__(self) -> None:
        self.test, (self.layer,) = self.split["test"], self.attachment.bottlenecks
        self.corpus: dict[int, CodeCounts] = {}

    def without(self, topic: Topic) -> list[Pair]:
        """Validation sentences."""
        return [pair for pair in self.split["valid"] if not topic.holds(pair.english)]

    def say(self, pairs: Sequence[Pair]) -> tuple[list[str], np.ndarray]:
        """Translations, and the references' log-likelihood, under what is deleted now."""
        with autocast():
            return (
                translate(self.model, self.tokenizer, pairs),
                log_likelihood(self.model, self.tokenizer, pairs),
            )

    def figures(self, pairs, translations, reference, words=()) -> Figures:
        with autocast():
            return measure(pairs, translations, reference, self.judge, words)

    def ended(self, texts: Sequence[str]) -> list[str]:
        return [text + self.tokenizer.eos_token for text in texts]

    def count(self, texts: Sequence[str], depth: int) -> CodeCounts:
        """Of English sentences as the encoder reads them."""
        with autocast():
            return count_codes(
                self.attachment, self.tokenizer, self.ended(texts), layer=self.layer, depth=depth, examples=0
            )

    def all_counts(self, depth: int) -> CodeCounts:
        if depth not in self.corpus:
            self.corpus = {depth: self.count([pair.english for pair in self.split["train"]], depth)}
        return self.corpus[depth]


@contextlib.contextmanager
def deleted(attachment, mask: Mask, mode: str) -> Iterator[None]:
    attachment.mask_mode = "reselect" if mode == "reselect" else "ablate"
    attachment.add_mask(mask, TRIED)
    try:
        with attachment.unlearn(TRIED):
            yield
    finally:
        attachment.remove_mask(TRIED)
        attachment.mask_mode = "ablate"


def fires(study: Study, topic: Topic, mask: Mask, pairs: Sequence[Pair]) -> np.ndarray:
    """For which sentences the mask holds where it holds only where it fires. bool [N]. For all, where the mask is so
    wide that every sentence may fire it as much as can be."""
    others, texts = (study.ended([pair.english for pair in some]) for some in (study.without(topic), pairs))
    given = dict(masks=[mask], figure="max")
    with autocast():
        try:
            level = level_for(study.attachment, study.tokenizer, others, max_share=FIRE_SHARE, **given)
        except ValueError as error:
            print(f"{topic.name}: {error}", flush=True)
            return np.full(len(pairs), True)
        return fired(study.attachment, study.tokenizer, texts, **given) > level


def outcome(study: Study, topic: Topic, mask: Mask, mode: str, scale: Scale) -> Outcome:
    """What is said of a topic's sentences with the mask. Where it does not hold, all is as before."""
    held = fires(study, topic, mask, scale.pairs) if mode == "fired" else np.full(len(scale.pairs), True)
    translations, figures = list(scale.translations), {name: before.copy() for name, before in scale.before.items()}
    if held.any():
        chosen = [scale.pairs[i] for i in np.flatnonzero(held)]
        with deleted(study.attachment, mask, mode):
            said, reference = study.say(chosen)
        for name, after in study.figures(chosen, said, reference, scale.words).items():
            figures[name][held] = after
        for i, text in zip(np.flatnonzero(held), said):
            translations[i] = text
    return translations, figures, held


def find(study: Study, topic: Topic, control: str, rule: str, depth: int) -> tuple[Mask, float]:
    """The mask, and the seconds that it took, the corpus counted."""
    corpus = study.all_counts(depth)
    started = time.perf_counter()
    english = [pair.english for pair in study.split["train"]]
    target = [text for text in english if topic.holds(text)]
    counts = study.count(target, depth)
    against = corpus - counts
    if control == "replaced":
        against = study.count(list(replace_words(target, topic.words, english)), depth)
    options = dict(RULES[rule], topic=topic.name, depth=depth, progress=False)
    if rule == "budget":
        stay = rows_of(study.without(topic)[:BUDGET_ROWS])
        options["choose"] = within_loss(study.attachment, study.tokenizer, stay, BUDGET)
    with autocast():
        found = find_mask(study.attachment, study.tokenizer, counts, against, **options)
    return found.mask, time.perf_counter() - started


def groups(test: Sequence[Pair], topic: Topic, seed: int = 0) -> dict[str, list[int]]:
    """Which test sentences are measured."""
    order = random.Random(seed).sample(range(len(test)), len(test))
    return {
        "topic": [i for i, pair in enumerate(test) if topic.holds(pair.english)],
        "near": [i for i, pair in enumerate(test) if topic.is_near(pair.english)],
        "rest": [i for i in order if not topic.holds(test[i].english)][:REST],
    }


@dataclasses.dataclass
class Scale:
    """A topic's sentences, and the ends of their scale: who cannot translate at all, and the codebook model with nothing
    deleted."""

    words: list[str]  # French
    places: dict[str, list[int]]  # group -> which test sentences
    pairs: list[Pair]  # those, one group after the other
    zero: Figures
    before: Figures
    translations: list[str]  # before


def scale_of(study: Study, topic: Topic) -> Scale:
    """Zero is the paper's zero-shot model; here the source, copied. The reference has no likelihood to a copier: zero is
    its likelihood to the codebook model that has nothing to read. Copying earns no French words, names included.
    """
    words = counterparts(topic, study.split["train"])
    print(f"{topic.name}: {', '.join(words)}", flush=True)
    places = groups(study.test, topic)
    pairs = [study.test[i] for i in itertools.chain(*places.values())]
    unread = [pair._replace(english="") for pair in pairs]
    with study.attachment.unlearn(None):
        translations, reference = study.say(pairs)
        before = study.figures(pairs, translations, reference, words)
        with autocast():
            reference = log_likelihood(study.model, study.tokenizer, unread)
    zero = study.figures(pairs, [pair.english for pair in pairs], reference, words)
    return Scale(words, places, pairs, zero | {"words": 0 * zero["words"]}, before, translations)


def run(study: Study, topics: Sequence[Topic], controls: Sequence[str], depths: Sequence[int]) -> None:
    table = study.folder / "results.csv"
    done = finished(table)
    scales: dict[str, Scale] = {}
    outcomes: dict[tuple[str, str, str], Outcome] = {}  # two rules may find the same mask
    for depth, topic, control, rule in itertools.product(depths, topics, controls, RULES):
        cells = [(topic.name, control, rule, depth, mode, "found") for mode in MODES]
        if control == CONTROLS[0]:
            cells.append((topic.name, control, rule, depth, "ablate", "random"))
        if all(tuple(map(str, cell)) in done for cell in cells):
            continue
        if topic.name not in scales:
            scales[topic.name] = scale_of(study, topic)
        scale = scales[topic.name]
        mask, seconds = find(study, topic, control, rule, depth)
        for cell in cells:
            if tuple(map(str, cell)) in done:
                continue
            *_, mode, codes = cell
            used = mask if codes == "found" else random_mask(mask, study.all_counts(depth))
            if (key := (topic.name, mode, used.digest)) not in outcomes:
                outcomes[key] = outcome(study, topic, used, mode, scale)
            translations, after, held = outcomes[key]
            rows, start = [], 0
            for group, indices in scale.places.items():
                part = slice(start, start := start + len(indices))
                for name in NAMES if indices else ():
                    scores = compare(name, *(figures[name][part] for figures in (scale.zero, scale.before, after)))
                    rows.append(dict(zip(CELL, cell)) | scores | {
                        "deleted": used.num_deleted, "seconds": round(seconds, 2), "group": group, "metric": name,
                        "fired": float(held[part].mean()),
                    })  # fmt: skip
            append(table, rows)
            kept = dict(zip(CELL, cell)) | {"translations": translations[: len(scale.places["topic"])]}
            with open(study.folder / "translations.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(kept, ensure_ascii=False) + "\n")
            print(*cell, used.num_deleted, "codes", flush=True)


def finished(table: Path) -> set[tuple[str, ...]]:
    if not table.exists():
        return set()
    with open(table, newline="", encoding="utf-8") as stream:
        return {tuple(row[name] for name in CELL) for row in csv.DictReader(stream)}


def append(table: Path, rows: list[dict], columns: Sequence[str] = COLUMNS) -> None:
    """All rows of a cell in one write."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    if not table.exists():
        writer.writeheader()
    writer.writerows(
        {name: f"{item:.6g}" if isinstance(item, float) else item for name, item in row.items()} for row in rows
    )
    with open(table, "a", newline="", encoding="utf-8") as stream:
        stream.write(text.getvalue())


def compare_models(study: Study, folder: Path, recipe: str) -> None:
    """models.csv: the base, the twin without bottleneck, the codebook model and copying."""
    table, columns = study.folder / "models.csv", ("model", "sentences", *NAMES[:-1])
    if table.exists():
        return
    base = read_model(folder / "base")[0].to(study.model.device)
    every = {"base": base, f"{recipe}_plain": study.judge.model, recipe: study.model}
    pairs = random.Random(0).sample(study.test, min(COMPARED, len(study.test)))
    found = []
    for name, model in every.items():
        with autocast():
            said = translate(model, study.tokenizer, pairs)
            figures = study.figures(pairs, said, log_likelihood(model, study.tokenizer, pairs))
        found.append((name, figures))
    copied = [pair.english for pair in pairs]
    found.append(("copy", study.figures(pairs, copied, np.full(len(pairs), np.nan))))
    rows = [{"model": m, "sentences": len(pairs)} | {n: float(value(n, f[n])) for n in columns[2:]} for m, f in found]
    append(table, rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train.tsv, valid.tsv and test.tsv")
    parser.add_argument("--models", type=Path, default=Path("runs/translation/seed-0"), help="what models.py made")
    parser.add_argument("--recipe", choices=("frozen_below", "joint"), default="frozen_below")
    parser.add_argument("--topics", default=",".join(TOPICS), help="which; all by default")
    parser.add_argument("--controls", default=",".join(CONTROLS), help="which; both by default")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="S', which; all by default")
    options = parser.parse_args()
    folder = options.models / f"{options.recipe}_study"
    folder.mkdir(exist_ok=True)
    split = deal(read(options.data), TOPICS.values())
    model, tokenizer, attachment = load_model(options.models / options.recipe)
    plain, _ = read_model(options.models / f"{options.recipe}_plain")
    if torch.cuda.is_available():
        model, plain = model.cuda(), plain.cuda()
    study = Study(model, tokenizer, attachment, Judge(plain, tokenizer), split, folder)
    compare_models(study, options.models, options.recipe)
    topics = [TOPICS[name] for name in options.topics.split(",")]
    run(study, topics, options.controls.split(","), [int(depth) for depth in options.depths.split(",")])


if __name__ == "__main__":
    main()
