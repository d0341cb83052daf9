"""Four topics deleted from SmolLM2-135M-Instruct, which stays as it is: fit, find, delete, ask, measure, undo.

    python study.py MODEL TOPICS WIKITEXT --output runs/smollm2

MODEL is the folder that model.py wrote; TOPICS and WIKITEXT are folders as topics.py and WikiText-2 have them. Settings are
chosen on the questions with even numbers, and what is printed and written is of the odd ones.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from topics import (
    KNOWN,
    TOPICS,
    answer_probabilities,
    answers,
    read_items,
    read_neighbours,
    read_texts,
    running_text,
    share_said,
    text_losses,
    windows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import cu_fast
from cu_fast.train.fit import fit_codes
from cu_fast.unlearn import count_codes, random_mask

LAYER = "model.layers.8"
GATED_ENRICHMENT, GATED_STRENGTH = (
    1.5,
    8.0,
)  # behind a gate a deletion may be strong; of 1 to 2 and 8, 16 by the even half
ENRICHMENTS, STRENGTHS = (2.0, 2.5, 3.0), (2.0, 4.0, 8.0)  # tried without a gate
OTHERS_AT_LEAST, LOSS_AT_MOST = 0.95, 0.03
FIT_WINDOWS, TEST_WINDOWS, TRIAL_WINDOWS = 760, 48, 16
GATE_WINDOWS, GATE_WINDOW = 100, 32
RANDOM_ENRICHMENT, RANDOM_STRENGTH = 3.0, 2.0


class Study:
    """The model with an autoencoder, and how it answers untouched.

    Attributes:
        items: questions of all groups, near ones behind them.
        near: which of them are near a topic, and no topic's own.
        before: P(answer) of the untouched model.
        rows: what was measured, for the file.
    """

    def __init__(self, model: Any, tokenizer: Any, attachment: Any, topics: Path, wikitext: Path) -> None:
        self.model, self.tokenizer, self.attachment, self.topics = model, tokenizer, attachment, topics
        own, near = read_items(topics / "items.txt"), read_items(topics / "near.txt")
        self.items = own + near
        self.near = np.array([False] * len(own) + [True] * len(near))
        self.groups = np.array([item.group for item in self.items])
        self.even = np.array([item.even for item in self.items])
        test = running_text(wikitext / "test.txt")
        self.wikitext = windows(tokenizer, test, TEST_WINDOWS)
        valid = running_text(wikitext / "valid.txt")
        self.control_windows = windows(tokenizer, valid, GATE_WINDOWS)
        self.control_lines = windows(tokenizer, valid, 8 * GATE_WINDOWS, GATE_WINDOW)[::8]
        self.texts = {name: read_texts(topics, name) for name in (*TOPICS, "general")}
        self.neighbours = read_neighbours(topics)
        self.before = self._probabilities()
        self.losses = text_losses(model, self.wikitext)
        self.rows: list[dict[str, Any]] = []

    def _probabilities(self) -> np.ndarray:
        return answer_probabilities(self.model, self.tokenizer, self.items).numpy()

    def left(self, after: np.ndarray, topic: str, half: bool) -> dict[str, float]:
        """Of the mean P(answer) before, the share that is left: the topic's, the other groups', and what is near."""
        known = (self.before >= KNOWN) & (self.even == half)

        def share(some: np.ndarray) -> float:
            return (
                float(after[some & known].mean() / self.before[some & known].mean()) if (some & known).any() else np.nan
            )

        others = [share((self.groups == name) & ~self.near) for name in (*TOPICS, "general") if name != topic]
        return {
            "target": share((self.groups == topic) & ~self.near),
            "others": float(np.mean(others)),
            "worst": min(others),
            "near": share((self.groups == topic) & self.near),
        }

    def measure(self, topic: str, half: bool, number: int = TEST_WINDOWS) -> dict[str, float]:
        """What is left under a mask, and what it costs wikitext, in nats per token."""
        with self.attachment.unlearn(topic):
            after = self._probabilities()
            losses = text_losses(self.model, self.wikitext[:number])
        return self.left(after, topic, half) | {"wikitext": float((losses - self.losses[:number]).mean())}

    def add(self, what: str, topic: str, **figures: Any) -> None:
        self.rows.append({"what": what, "topic": topic, **figures})
        print(
            f"{what:28} {topic:8}",
            {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()},
            flush=True,
        )

    def counts(self, name: str) -> Any:
        texts = [text for _, text in self.texts[name]]
        return count_codes(self.attachment, self.tokenizer, texts, layer=None, name=name, progress=False)


def fitted(model: Any, tokenizer: Any, topics: Path, wikitext: Path, folder: Path, kind: str) -> Path:
    """Codes fitted to texts that hold none of the topics' own, once."""
    if not folder.exists():
        valid = running_text(wikitext / "valid.txt")
        texts = [tokenizer.decode(ids) for ids in windows(tokenizer, valid, FIT_WINDOWS)]
        texts += [text for _, text in read_texts(topics, "general")]
        start = time.perf_counter()
        figures = fit_codes(model, tokenizer, texts, folder, kind=kind, layer=LAYER)
        print(
            "fitted",
            kind,
            {k: round(v, 4) for k, v in figures.items()},
            round(time.perf_counter() - start),
            "s",
            flush=True,
        )
    return folder


def find(study: Study, counts: dict[str, Any], topic: str, enrichment: float) -> Any:
    """A topic's mask: its texts against all others and running text."""
    control = sum_of([counts[name] for name in counts if name != topic])
    found = cu_fast.find_mask(
        study.attachment,
        study.tokenizer,
        counts[topic],
        control,
        topic=topic,
        min_enrichment=enrichment,
        progress=False,
    )
    return found.mask


def sum_of(parts: Sequence[Any]) -> Any:
    return dataclasses.replace(
        parts[0], counts=sum(part.counts for part in parts), tokens=sum(part.tokens for part in parts)
    )


def gated(study: Study, counts: dict[str, Any]) -> None:
    """A strong deletion behind a learned gate."""
    for topic in TOPICS:
        start = time.perf_counter()
        mask = find(study, counts, topic, GATED_ENRICHMENT).with_strength(GATED_STRENGTH)

        def with_prompts(texts: Sequence[tuple[str, str]]) -> list[str]:
            return [part for pair in texts for part in pair]

        others = [part for name in study.texts if name != topic for part in with_prompts(study.texts[name])]
        others += [study.tokenizer.decode(ids) for ids in (*study.control_windows, *study.control_lines)]
        near = {"near": with_prompts(study.neighbours[topic])} if topic in study.neighbours else None
        mask = cu_fast.unlearn.fit_gate(
            study.attachment, study.tokenizer, mask, with_prompts(study.texts[topic]), others, near, progress=False
        )
        study.attachment.add_mask(mask, topic)
        seconds = time.perf_counter() - start
        with study.attachment.unlearn(topic):
            after = study._probabilities()
        with study.attachment.unlearn(topic, gated=True):
            losses = text_losses(study.model, study.wikitext)
        odd, own = ~study.even, (study.groups == topic) & ~study.near
        for what, prompts in (
            ("gated", [item.prompt + item.prefix for item in study.items]),
            ("gated, question alone", [item.prompt for item in study.items]),
        ):
            topics = cu_fast.topics_of(study.attachment, study.tokenizer, prompts, [topic])
            fires = np.array([names is not None for names in topics])
            study.add(
                what, topic, codes=mask.num_deleted, seconds=seconds,
                **study.left(np.where(fires, after, study.before), topic, half=False),
                wikitext=float((losses - study.losses).mean()), fires=float(fires[own & odd].mean()),
                fires_others=float(fires[~own & ~study.near & odd].mean()),
                fires_near=float(fires[(study.groups == topic) & study.near].mean()),
            )  # fmt: skip


def say(study: Study, output: Path) -> None:
    """What the model answers, before and behind the gates, which are judged while it answers."""
    with open(output / "answers.jsonl", "w") as file:
        for topic in TOPICS:
            own = [
                item
                for item, near in zip(study.items, study.near)
                if item.group == topic and not near and not item.even
            ]
            near = [item for item, near in zip(study.items, study.near) if item.group == topic and near]
            general = [item for item in study.items if item.group == "general" and not item.even]
            for kind, items in (("target", own), ("near", near), ("general", general)):
                if not items:
                    continue
                with study.attachment.unlearn(None):
                    before = answers(study.model, study.tokenizer, items)
                with study.attachment.unlearn(topic, gated=True):
                    after = answers(study.model, study.tokenizer, items)
                study.add(f"said, {kind}", topic, before=share_said(items, before), after=share_said(items, after),
                          same=float(np.mean([a == b for a, b in zip(before, after)])))  # fmt: skip
                for item, a, b in zip(items, before, after):
                    row = {"topic": topic, "kind": kind, "question": item.question, "before": a, "after": b}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def ungated(study: Study, counts: dict[str, Any]) -> None:
    """A mask for every prompt. Settings are chosen together on the even half: the least of the topics that is left, the
    others on average at OTHERS_AT_LEAST or more, and wikitext at LOSS_AT_MOST or less."""
    settings = list(itertools.product(ENRICHMENTS, STRENGTHS))
    tried = {}
    for topic in TOPICS:
        for enrichment, strength in settings:
            mask = find(study, counts, topic, enrichment).with_strength(strength)
            study.attachment.add_mask(mask, topic)
            tried[topic, enrichment, strength] = mask, study.measure(topic, half=True, number=TRIAL_WINDOWS)
            study.attachment.remove_mask(topic)
    figures = np.array(
        [[[tried[(t, *s)][1][name] for name in ("target", "others", "wikitext")] for s in settings] for t in TOPICS]
    )
    best = None
    for picks in itertools.product(range(len(settings)), repeat=len(TOPICS)):
        target, others, loss = figures[range(len(TOPICS)), picks].mean(0)
        key = (others < OTHERS_AT_LEAST or loss > LOSS_AT_MOST, target)
        if best is None or key < best[0]:
            best = key, picks
    for topic, pick in zip(TOPICS, best[1]):
        mask, _ = tried[(topic, *settings[pick])]
        study.attachment.add_mask(mask, topic)
        study.add("no gate", topic, codes=mask.num_deleted, enrichment=settings[pick][0], strength=settings[pick][1],
                  **study.measure(topic, half=False))  # fmt: skip
        study.attachment.remove_mask(topic)
        mask = find(study, counts, topic, RANDOM_ENRICHMENT)
        everything = sum_of(list(counts.values()))
        study.attachment.add_mask(random_mask(mask, everything).with_strength(RANDOM_STRENGTH), topic)
        study.add(
            "random codes", topic, codes=mask.num_deleted, **study.measure(topic, half=False, number=TRIAL_WINDOWS)
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
    study = Study(model, tokenizer, attachment, options.topics, options.wikitext)
    counts = {name: study.counts(name) for name in study.texts}
    lines = [tokenizer.decode(ids) for ids in study.control_windows]
    counts["wikitext"] = count_codes(attachment, tokenizer, lines, layer=None, name="wikitext", progress=False)
    steps: list[Callable[[], None]] = [
        lambda: ungated(study, counts),
        lambda: gated(study, counts),
        lambda: say(study, options.output),
    ]
    for step in steps[options.skip_ungated :]:
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
