"""Topics deleted from SmolLM2-135M-Instruct, which stays as it is: fit, find, delete, ask, measure, undo.

    python study.py MODEL TOPICS WIKITEXT --output runs/smollm2
    python study.py MODEL untuned WIKITEXT --output runs/untuned --sae runs/smollm2/topk --neighbours model --untuned

MODEL is the folder that model.py wrote; TOPICS and WIKITEXT are folders as topics.py and WikiText-2 have them. Settings are
chosen on the questions with even numbers, and what is printed and written is of the odd ones. Nothing is ever chosen by the
questions of near.txt. With --untuned nothing is chosen, and all questions count.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from topics import (
    KNOWN,
    Item,
    answer_probabilities,
    answers,
    read_items,
    read_neighbours,
    read_texts,
    read_topics,
    running_text,
    share_said,
    text_losses,
    windows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from writing import questions, subject_of, texts_near

import cu_fast
from cu_fast.train.fit import fit_codes
from cu_fast.unlearn import CodeCounts, TextCounts, count_codes, count_texts, random_mask

LAYER = "model.layers.8"
# Behind a gate a deletion may be strong; by the even half, for neighbours that were written by hand and by the model:
# enrichment and strength of the mask, the share of neighbours' texts that may fire, and the weight of one in the gate.
GATED = {"hand": (1.5, 8.0, 0.01, 16.0), "model": (1.5, 16.0, 0.03, 4.0)}
ENRICHMENTS, STRENGTHS = (2.0, 2.5, 3.0), (2.0, 4.0, 8.0)  # tried without a gate
OTHERS_AT_LEAST, LOSS_AT_MOST = 0.95, 0.03
FIT_WINDOWS, TEST_WINDOWS, TRIAL_WINDOWS = 760, 48, 16
GATE_WINDOWS, GATE_WINDOW = 100, 32
NEAR_NAMES, SAY_AT_ONCE = 32, 20
RANDOM_ENRICHMENT, RANDOM_STRENGTH = 3.0, 2.0


class Study:
    """The model with an autoencoder, and how it answers untouched.

    Attributes:
        names: topic -> its name in English.
        items: questions of all groups, near ones behind them.
        near: which of them are near a topic, and no topic's own.
        reported: which of them count in what is reported: those with odd numbers, or all where nothing was chosen.
        before: P(answer) of the untouched model.
        rows: what was measured, for the file.
    """

    def __init__(
        self, model: Any, tokenizer: Any, attachment: Any, topics: Path, wikitext: Path, untuned: bool = False
    ) -> None:
        self.model, self.tokenizer, self.attachment, self.folder = model, tokenizer, attachment, topics
        self.names = read_topics(topics)
        own, near = read_items(topics / "items.txt"), read_items(topics / "near.txt")
        self.items = own + near
        self.near = np.array([False] * len(own) + [True] * len(near))
        self.groups = np.array([item.group for item in self.items])
        self.even = np.array([item.even for item in self.items])
        self.reported = ~self.even | untuned
        test = running_text(wikitext / "test.txt")
        self.wikitext = windows(tokenizer, test, TEST_WINDOWS)
        valid = running_text(wikitext / "valid.txt")
        self.control_windows = windows(tokenizer, valid, GATE_WINDOWS)
        self.control_lines = windows(tokenizer, valid, 8 * GATE_WINDOWS, GATE_WINDOW)[::8]
        self.texts = {name: read_texts(topics, name) for name in (*self.names, "general")}
        self.before = self.probabilities(range(len(self.items)))
        self.losses = text_losses(model, self.wikitext)
        self.rows: list[dict[str, Any]] = []

    def probabilities(self, some: Iterable[int]) -> np.ndarray:
        return answer_probabilities(self.model, self.tokenizer, [self.items[i] for i in some]).numpy()

    def left(self, after: np.ndarray, topic: str, counted: np.ndarray) -> dict[str, float]:
        """Of the mean P(answer) before, the share that is left: the topic's, the other groups', and what is near."""
        known = (self.before >= KNOWN) & counted

        def share(some: np.ndarray) -> float:
            return (
                float(after[some & known].mean() / self.before[some & known].mean()) if (some & known).any() else np.nan
            )

        others = [share((self.groups == name) & ~self.near) for name in (*self.names, "general") if name != topic]
        return {
            "target": share((self.groups == topic) & ~self.near),
            "others": float(np.mean(others)),
            "worst": min(others),
            "near": share((self.groups == topic) & self.near),
        }

    def measure(self, topic: str, counted: np.ndarray, number: int = TEST_WINDOWS) -> dict[str, float]:
        """What is left under a mask, and what it costs wikitext, in nats per token."""
        with self.attachment.unlearn(topic):
            after = self.probabilities(range(len(self.items)))
            losses = text_losses(self.model, self.wikitext[:number])
        return self.left(after, topic, counted) | {"wikitext": float((losses - self.losses[:number]).mean())}

    def add(self, what: str, topic: str, **figures: Any) -> None:
        self.rows.append({"what": what, "topic": topic, **figures})
        print(
            f"{what:28} {topic:8}",
            {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()},
            flush=True,
        )

    def counts(self, pairs: Iterable[tuple[str, str]], name: str) -> CodeCounts:
        """Of the texts, without their prompts."""
        texts = [text for _, text in pairs]
        return count_codes(self.attachment, self.tokenizer, texts, layer=None, name=name, progress=False)


def fitted(model: Any, tokenizer: Any, topics: Path, wikitext: Path, folder: Path, kind: str) -> Path:
    """Codes fitted to texts that hold none of the topics' own, once."""
    if not folder.exists():
        valid = running_text(wikitext / "valid.txt")
        texts = [tokenizer.decode(ids) for ids in windows(tokenizer, valid, FIT_WINDOWS)]
        texts += [text for _, text in read_texts(topics, "general")]
        start, stopped = time.perf_counter(), folder.with_name(f"{folder.name}.run").is_dir()
        figures = fit_codes(model, tokenizer, texts, folder, kind=kind, layer=LAYER, resume=stopped)
        print(
            "fitted",
            kind,
            {k: round(v, 4) for k, v in figures.items()},
            round(time.perf_counter() - start),
            "s",
            flush=True,
        )
    return folder


def find(
    study: Study, counts: dict[str, CodeCounts], topic: str, enrichment: float, near: CodeCounts | None = None
) -> Any:
    """A topic's mask: its texts against all others and running text, and against what is near."""
    control = sum_of([counts[name] for name in counts if name != topic])
    found = cu_fast.find_mask(
        study.attachment,
        study.tokenizer,
        counts[topic],
        control,
        topic=topic,
        neighbours={"near": near} if near else None,
        min_enrichment=enrichment,
        progress=False,
    )
    return found.mask


def sum_of(parts: Sequence[Any]) -> Any:
    return dataclasses.replace(
        parts[0], counts=sum(part.counts for part in parts), tokens=sum(part.tokens for part in parts)
    )


def written(study: Study, file: Path) -> dict[str, list[tuple[str, str]]]:
    """What the model writes for the gates, once: questions on the subjects of each topic, and on what is near it."""
    if not file.exists():
        found = {}
        for name, pairs in study.texts.items():
            prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
            subjects = list(dict.fromkeys(map(subject_of, prompts)))
            own = questions(study.model, study.tokenizer, subjects, seed=10, copies=2)
            found[name] = [pair for _, *pair in own]
            if name in study.names:
                near, found[f"near {name}"] = texts_near(
                    study.model, study.tokenizer, study.names[name], prompts, NEAR_NAMES
                )
                print("near", study.names[name], near, flush=True)
        file.write_text(json.dumps(found, ensure_ascii=False))
    return json.loads(file.read_text())


def gated(study: Study, counts: dict[str, CodeCounts], output: Path, by: str) -> None:
    """A strong deletion behind a learned gate, with neighbours by hand or by the model. The model also writes questions on
    the topics, which gates are fitted to, and the codes have to be enriched against its neighbours."""
    enrichment, strength, share, weight = GATED[by]
    sum_all = functools.partial(functools.reduce, operator.add)

    def counted(texts: Iterable[str]) -> TextCounts:
        return count_texts(study.attachment, study.tokenizer, texts, progress=False)

    told = {name: counted(itertools.chain(*some)) for name, some in study.texts.items()}
    running = counted(study.tokenizer.decode(ids) for ids in (*study.control_windows, *study.control_lines))
    if by == "model":
        pairs = written(study, output / "written.json")
    else:
        pairs = {f"near {topic}": some for topic, some in read_neighbours(study.folder).items()}
    asked = {name: counted(itertools.chain(*some)) for name, some in pairs.items()}
    for topic in study.names:
        start = time.perf_counter()
        near = study.counts(pairs[f"near {topic}"], "near") if by == "model" else None
        mask = find(study, counts, topic, enrichment, near).with_strength(strength)
        rest = [name for name in study.texts if name != topic]
        kinds = {"near": asked[f"near {topic}"]} if f"near {topic}" in asked else {}
        if by == "model":
            kinds["asked"] = sum_all([asked[name] for name in rest])
        mask = cu_fast.fit_gate(
            study.attachment,
            study.tokenizer,
            mask,
            told[topic] + asked[topic] if by == "model" else told[topic],
            sum_all([told[name] for name in rest] + [running]),
            kinds,
            max_share=share,
            neighbour_weight=weight,
            progress=False,
        )
        study.attachment.add_mask(mask, topic)
        study.add("mask and gate", topic, neighbours=by, codes=mask.num_deleted, gate_codes=len(mask.gate.codes),
                  level=mask.gate.level, seconds=time.perf_counter() - start)  # fmt: skip
    with study.attachment.unlearn(set(study.names), gated=True):
        wikitext = float((text_losses(study.model, study.wikitext) - study.losses).mean())
    for what, prompts in (
        ("gated", [item.prompt + item.prefix for item in study.items]),
        ("gated, question alone", [item.prompt for item in study.items]),
    ):
        topics = cu_fast.topics_of(study.attachment, study.tokenizer, prompts, list(study.names))
        for topic in study.names:
            fires = np.array([topic in (names or ()) for names in topics])
            after, own = study.before.copy(), (study.groups == topic) & ~study.near
            if fires.any():  # the others' are the untouched model's to the last bit
                with study.attachment.unlearn(topic):
                    after[fires] = study.probabilities(np.flatnonzero(fires))
            near = (study.groups == topic) & study.near
            study.add(
                what, topic, neighbours=by, **study.left(after, topic, study.reported), wikitext=wikitext,
                fires=float(fires[own & study.reported].mean()),
                fires_others=float(fires[~own & ~study.near & study.reported].mean()), fires_near=float(fires[near].mean()),
                near_all=study.left(after, topic, near)["near"],
            )  # fmt: skip


def say(study: Study, output: Path, by: str) -> None:
    """What the model answers, before and behind the gates, which are judged while it answers; to general questions behind
    all of them."""
    jobs: list[tuple[str, str, Item, set[str]]] = [
        (item.group, "near" if near else "target", item, {item.group})
        for item, near, reported in zip(study.items, study.near, study.reported)
        if item.group in study.names and (near or reported)
    ]
    jobs += [
        ("all", "general", item, set(study.names))
        for item, reported in zip(study.items, study.reported)
        if item.group == "general" and reported
    ]
    said: dict[tuple[str, str], list[tuple[Item, str, str]]] = {}
    with open(output / "answers.jsonl", "w") as file:
        for start in range(0, len(jobs), SAY_AT_ONCE):
            some = jobs[start : start + SAY_AT_ONCE]
            items = [item for _, _, item, _ in some]
            with study.attachment.unlearn(None):
                before = answers(study.model, study.tokenizer, items)
            with study.attachment.unlearn([names for *_, names in some], gated=True):
                after = answers(study.model, study.tokenizer, items)
            for (topic, kind, item, _), a, b in zip(some, before, after):
                said.setdefault((topic, kind), []).append((item, a, b))
                row = {"topic": topic, "kind": kind, "question": item.question, "before": a, "after": b}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for (topic, kind), triples in said.items():
        items, before, after = zip(*triples)
        study.add(f"said, {kind}", topic, neighbours=by, before=share_said(items, before), after=share_said(items, after),
                  same=float(np.mean([a == b for a, b in zip(before, after)])))  # fmt: skip


def ungated(study: Study, counts: dict[str, CodeCounts]) -> None:
    """A mask for every prompt. Settings are chosen together on the even half: the least of the topics that is left, the
    others on average at OTHERS_AT_LEAST or more, and wikitext at LOSS_AT_MOST or less."""
    settings = list(itertools.product(ENRICHMENTS, STRENGTHS))
    tried = {}
    for topic in study.names:
        for enrichment, strength in settings:
            mask = find(study, counts, topic, enrichment).with_strength(strength)
            study.attachment.add_mask(mask, topic)
            tried[topic, enrichment, strength] = mask, study.measure(topic, study.even, number=TRIAL_WINDOWS)
            study.attachment.remove_mask(topic)
    figures = np.array(
        [
            [[tried[(t, *s)][1][name] for name in ("target", "others", "wikitext")] for s in settings]
            for t in study.names
        ]
    )
    best = None
    for picks in itertools.product(range(len(settings)), repeat=len(study.names)):
        target, others, loss = figures[range(len(study.names)), picks].mean(0)
        key = (others < OTHERS_AT_LEAST or loss > LOSS_AT_MOST, target)
        if best is None or key < best[0]:
            best = key, picks
    for topic, pick in zip(study.names, best[1]):
        mask, _ = tried[(topic, *settings[pick])]
        study.attachment.add_mask(mask, topic)
        study.add("no gate", topic, codes=mask.num_deleted, enrichment=settings[pick][0], strength=settings[pick][1],
                  **study.measure(topic, study.reported))  # fmt: skip
        study.attachment.remove_mask(topic)
        mask = find(study, counts, topic, RANDOM_ENRICHMENT)
        everything = sum_of(list(counts.values()))
        study.attachment.add_mask(random_mask(mask, everything).with_strength(RANDOM_STRENGTH), topic)
        study.add(
            "random codes", topic, codes=mask.num_deleted, **study.measure(topic, study.reported, number=TRIAL_WINDOWS)
        )
        study.attachment.remove_mask(topic)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("topics", type=Path)
    parser.add_argument("wikitext", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--sae", type=Path, help="the folder of an autoencoder; without it one is fitted")
    parser.add_argument("--skip-ungated", action="store_true", help="leave out the part without gates, the longest")
    parser.add_argument(
        "--untuned", action="store_true", help="choose nothing; all questions count; implies --skip-ungated"
    )
    parser.add_argument(
        "--neighbours", choices=GATED, default="hand", help="of the gates: gen_near.json, or the model's own"
    )
    parser.add_argument("--kind", choices=("topk", "codebook"), default="topk", help="what is fitted")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    inputs = tokenizer("Which planet is the largest?", return_tensors="pt")
    with torch.inference_mode():
        untouched = model(**inputs).logits

    folder = options.sae or fitted(
        model, tokenizer, options.topics, options.wikitext, options.output / options.kind, options.kind
    )
    is_sae = options.sae is not None or options.kind == "topk"
    attachment = cu_fast.attach(model, {LAYER: folder} if is_sae else folder)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, untouched)  # nothing is deleted: nothing changed
    study = Study(model, tokenizer, attachment, options.topics, options.wikitext, options.untuned)
    counts = {name: study.counts(pairs, name) for name, pairs in study.texts.items()}
    counts["wikitext"] = study.counts([("", tokenizer.decode(ids)) for ids in study.control_windows], "wikitext")
    steps: list[Callable[[], None]] = [
        lambda: ungated(study, counts),
        lambda: gated(study, counts, options.output, options.neighbours),
        lambda: say(study, options.output, options.neighbours),
    ]
    for step in steps[options.skip_ungated or options.untuned :]:
        step()
        write(study.rows, options.output / "results.csv")
    attachment.detach()
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, untouched)  # undone


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
