"""In-context examples chosen by quantised k-means, and deleted again: python study.py MODEL TOPICS WIKITEXT

Rows are sentences that the model wrote about four topics; a question is to be sorted into one of these by a prompt that holds
one chosen sentence per cluster. What is measured: that deleting leaves what computing again gives, how often it has to
compute again, what both take as rows become more, and what the prompt is worth before and after. MODEL, TOPICS and WIKITEXT are what
examples/smollm2 has. It goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from erase import LIMIT, Clusters, to_integers
from transformers import AutoModelForCausalLM, AutoTokenizer

from cu_fast.bench.machine import facts

sys.path.append(str(Path(__file__).parents[1] / "smollm2"))
from topics import TOPICS, read_items, read_texts, running_text, windows

LAYER = 8
AXES, CLUSTERS, STEP, SEEDS = 16, 8, 1.0, (0, 1, 2)
STEPS = (0.25, 0.5, 1.0, 2.0)
SIZES = (1_500, 5_000, 15_000, 50_000, 150_000, 500_000)
DELETIONS, REPEATS = 300, 5
WIKITEXT_TEXTS = 400
LABELS = {"solar": " space", "potter": " magic", "ww2": " war", "france": " France"}
NO_QUESTIONS = ("N/A", "What is it?", "Who was it?")
MACHINE = ("load", "cpu_name", "simd", "threads", "cu_fast_version", "commit", "torch_version", "transformers_version")


# -- rows ---------------------------------------------------------------------------------------------------------


def sentences(topics: Path) -> list[tuple[str, str]]:
    """(topic, sentence) of the texts about the four topics: whole sentences of 40 to 200 characters, each once."""
    found: dict[str, str] = {}
    for topic in TOPICS:
        for prompt, text in read_texts(topics, topic):
            for sentence in re.split(r"(?<=[.!?])\s+", text[len(prompt) :]):
                sentence = " ".join(sentence.split())
                if 40 <= len(sentence) <= 200 and sentence[-1] in ".!?":
                    found.setdefault(sentence, topic)
    return [(topic, sentence) for sentence, topic in found.items()]


class _Seen(Exception):
    pass


@torch.inference_mode()
def states(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """The mean of what leaves a layer over the tokens behind the first, fp32 [N, D]. One text at a time, here and below: a
    row of a batch may depend on the others by a rounding, and then a deleted text would not be gone."""
    found = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        x = output if isinstance(output, torch.Tensor) else output[0]
        found.append(x[0, 1:].float().mean(0))
        raise _Seen

    handle = model.model.layers[LAYER].register_forward_hook(keep)
    for text in texts:
        try:
            model(**tokenizer(text, return_tensors="pt"), use_cache=False)
        except _Seen:
            pass
    handle.remove()
    return torch.stack(found)


def embedded(model: Any, tokenizer: Any, texts: Sequence[str], wikitext: Path) -> np.ndarray:
    """Rows along the principal axes of WikiText, each axis in units of its spread there: nothing of it is of the rows."""
    ids = windows(tokenizer, running_text(wikitext / "valid.txt"), WIKITEXT_TEXTS, 32)
    public = states(model, tokenizer, [" ".join(tokenizer.decode(row).split()) for row in ids])
    mean = public.mean(0)
    _, spread, axes = torch.linalg.svd(public - mean, full_matrices=False)
    unit = spread[:AXES] / len(public) ** 0.5
    return to_integers(torch.stack([axes[:AXES] @ (state - mean) / unit for state in states(model, tokenizer, texts)]))


def more(rows: np.ndarray, number: int) -> np.ndarray:
    """As many rows as asked for: those there are, and copies with noise of half a unit, which are synthetic."""
    draw = np.random.default_rng(0)
    copies = rows[draw.integers(0, len(rows), max(0, number - len(rows)))]
    noise = to_integers(torch.from_numpy(draw.normal(0, 0.5, copies.shape)))
    return np.concatenate([rows[:number], np.clip(copies + noise, -LIMIT, LIMIT)])


# -- deletions ----------------------------------------------------------------------------------------------------


def delete_many(rows: np.ndarray, step: float, seed: int, check_every: int) -> dict[str, Any]:
    """Delete rows in random order, and compare with computing again after each, or after some. Times are of the processor,
    which other programs on the machine change less."""
    clusters = Clusters(rows, CLUSTERS, step, seed)
    order = np.random.default_rng([seed, 1]).permutation(len(rows))[:DELETIONS]
    stayed, forced, checked, equal = [], [], 0, 0
    for number, row in enumerate(order, 1):
        start = time.process_time()
        stays = clusters.delete(int(row))
        (stayed if stays else forced).append(time.process_time() - start)
        if number % check_every == 0:
            checked, equal = checked + 1, equal + clusters.equals(clusters.recomputed())
    again = []
    for _ in range(REPEATS):
        start = time.process_time()
        clusters.recomputed()
        again.append(time.process_time() - start)
    left = rows[clusters.left]
    nearest = clusters.centres[-1][clusters.assigned[-1][clusters.left]]
    return {
        "deletions": len(order), "recomputations": len(forced), "checked": checked, "equal": equal,
        "rounds": len(clusters.sums), "delete_us": 1e6 * statistics.median(stayed), "delete_least_us": 1e6 * min(stayed),
        "recompute_us": 1e6 * statistics.median(again), "recompute_least_us": 1e6 * min(again),
        "spread_left": float(((left - nearest) ** 2).sum() / ((left - left.mean(0)) ** 2).sum()),
    }  # fmt: skip


# -- the prompt ---------------------------------------------------------------------------------------------------


class Classifier:
    """Sorts questions into the topics by the first token of a label, after a prompt of examples.

    Its log-probability counts relative to that behind texts that say nothing, under the same prompt (Zhao et al., arXiv
    2102.09690): otherwise the last example's label often wins.
    """

    def __init__(self, model: Any, tokenizer: Any, questions: Sequence[tuple[str, str]]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.texts = [text for _, text in questions] + list(NO_QUESTIONS)
        self.truth = torch.tensor([TOPICS.index(topic) for topic, _ in questions])
        self.first = [tokenizer(LABELS[topic])["input_ids"][0] for topic in TOPICS]

    @torch.inference_mode()
    def accuracy(self, examples: Sequence[tuple[str, str]], batch_size: int = 16) -> float:
        """The share of questions that are sorted right, after (topic, text) examples."""
        head = "".join(f"Text: {text}\nTopic:{LABELS[topic]}\n\n" for topic, text in examples)
        prefix = self.tokenizer(head)["input_ids"] if head else []
        past = self.model(input_ids=torch.tensor([prefix]), use_cache=True).past_key_values if prefix else None
        said = []
        for start in range(0, len(self.texts), batch_size):
            rows = [self.tokenizer(f"Text: {text}\nTopic:")["input_ids"] for text in self.texts[start:][:batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            seen = torch.nn.utils.rnn.pad_sequence(
                [torch.ones(len(prefix) + len(row), dtype=torch.int64) for row in rows], batch_first=True
            )
            cache = copy.deepcopy(past)
            if cache is not None:
                cache.batch_repeat_interleave(len(rows))
            logits = self.model(input_ids=ids, attention_mask=seen, past_key_values=cache).logits
            last = logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
            said.append(last.float().log_softmax(-1)[:, self.first])
        scores = torch.cat(said)
        asked = scores[: len(self.truth)] - scores[len(self.truth) :].mean(0)
        return float((asked.argmax(1) == self.truth).double().mean())


def prompts(classifier: Classifier, rows: np.ndarray, texts: Sequence[tuple[str, str]], seed: int) -> dict[str, Any]:
    """Accuracy with the chosen examples, and after deletions, each from the full rows; all compared with computing again."""
    topics = np.array([topic for topic, _ in texts])
    draw = np.random.default_rng([seed, 2])
    some = draw.permutation(len(rows))[: len(rows) // 10]
    first = Clusters(rows, CLUSTERS, STEP, seed).chosen
    plans = {
        "before": [], "a tenth deleted": some, "chosen deleted": first[first >= 0],
        f"{TOPICS[0]} deleted": (topics == TOPICS[0]).nonzero()[0],
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, deleted in plans.items():
        clusters = Clusters(rows, CLUSTERS, STEP, seed)
        again = sum(not clusters.delete(int(row)) for row in deleted)
        assert clusters.equals(clusters.recomputed()) and not np.isin(deleted, clusters.chosen).any()
        examples = [texts[row] for row in clusters.chosen if row >= 0]
        found[name] = {
            "deletions": len(deleted), "recomputations": again, "accuracy": classifier.accuracy(examples),
            "topics_shown": len({topic for topic, _ in examples}),
        }  # fmt: skip
    random_rows = draw.choice(len(rows), CLUSTERS, replace=False)
    found["random examples"] = {"accuracy": classifier.accuracy([texts[row] for row in random_rows])}
    return found


# -- all of it ----------------------------------------------------------------------------------------------------


class Table:
    """The rows of a CSV file that are measured, each at most once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []
        here = facts() | {"load": f"{os.getloadavg()[0]:.1f}"}
        self.machine = {name: here[name] for name in MACHINE}

    def has(self, **key: Any) -> bool:
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, **figures: Any) -> None:
        short = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
        print(short, flush=True)
        self.rows.append(short | {name: str(value) for name, value in self.machine.items()})
        names = list(dict.fromkeys(name for row in self.rows for name in row if name not in MACHINE))
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, [*names, *MACHINE], lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("topics", type=Path)
    parser.add_argument("wikitext", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/erase"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    table = Table(options.output / "results.csv")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    texts = sentences(options.topics)
    cached = options.output / "rows.npy"
    if not cached.exists():
        np.save(cached, embedded(model, tokenizer, [text for _, text in texts], options.wikitext))
    rows = np.load(cached)
    if len(rows) != len(texts):
        raise ValueError(f"{cached} holds {len(rows)} rows, and there are {len(texts)} sentences; delete it")

    for step in STEPS:
        for seed in SEEDS:
            key = {"what": "step", "rows": len(rows), "step": step, "seed": seed}
            if not table.has(**key):
                table.add(**key, **delete_many(rows, step, seed, check_every=1))
    for size in SIZES:
        for seed in SEEDS:
            key = {"what": "rows", "rows": size, "step": STEP, "seed": seed}
            if not table.has(**key):
                table.add(**key, **delete_many(more(rows, size), STEP, seed, check_every=100))
    questions = [
        (item.group, item.question) for item in read_items(options.topics / "items.txt") if item.group in TOPICS
    ]
    classifier = Classifier(model, tokenizer, questions)
    if not table.has(what="no examples"):
        table.add(what="no examples", accuracy=classifier.accuracy([]))
    for seed in SEEDS:
        if not table.has(what="random examples", seed=seed):
            for name, figures in prompts(classifier, rows, texts, seed).items():
                table.add(what=name, rows=len(rows), step=STEP, seed=seed, **figures)


if __name__ == "__main__":
    main()
