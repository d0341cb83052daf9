"""The bundled model forgets an author while you watch; every figure printed is measured in the run.

The model is a small causal LM trained on question-answer pairs about invented authors (TOFU, arXiv 2401.06121), with
a codebook bottleneck; ``examples/tofu_mini`` makes it. Nothing here trains.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cu_fast import evaluate
from cu_fast.hf import Attachment
from cu_fast.hf.checkpoint import load_model
from cu_fast.hf.places import near
from cu_fast.masks import Mask
from cu_fast.unlearn import CodeCounts, Finding, count_codes, find_mask, random_mask

BUNDLE = Path(__file__).parents[1] / "data" / "tofu_mini"
MAX_NEW_TOKENS = 104  # longer than every answer of the training set

# How strong a deletion should be, found on this model: it serves all of its authors.
DEPTH = 16  # codes counted at each token
GOAL = 0.245  # ROUGE-L about the author; an author never seen gets about 0.13
KEEP = 0.94  # the share of others' answers that has to stay: see kept_share
TRIAL_ROWS = 60  # answers that this is measured on


@dataclasses.dataclass(frozen=True)
class Author:
    """An author and the question-answer pairs about them."""

    name: str
    rows: list[dict[str, str]]

    @property
    def texts(self) -> list[str]:
        """What is counted: question and answer as the model was trained on them."""
        return [text(row) for row in self.rows]


@dataclasses.dataclass
class Bundle:
    """A model folder with its authors."""

    model: torch.nn.Module
    tokenizer: Any
    attachment: Attachment
    authors: list[Author]

    def author(self, name: str) -> Author:
        """Raises ValueError, with near names, for an author who is not in the training set."""
        names = {author.name.lower(): author for author in self.authors}
        if name.lower() not in names:
            known = near(name, [author.name for author in self.authors])
            raise ValueError(
                f"author is {name!r}, who is not in the training set; {known} (cu-fast demo --list shows all)"
            )
        return names[name.lower()]

    def others(self, author: Author) -> list[Author]:
        return [other for other in self.authors if other is not author]


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def completion(answer: str) -> str:
    return f" {answer}"


def text(row: dict[str, str]) -> str:
    return prompt(row["question"]) + completion(row["answer"])


def load_bundle(path: Path = BUNDLE) -> Bundle:
    """The bundled model, its tokenizer, bottleneck, masks and authors."""
    model, tokenizer, attachment = load_model(path)
    authors = [Author(**json.loads(line)) for line in (path / "authors.jsonl").read_text().splitlines()]
    return Bundle(model, tokenizer, attachment, authors)


def generate(bundle: Bundle, questions: Sequence[str], masks: Any = None) -> list[str]:
    """Greedy answers. masks: what ``attachment.unlearn`` takes; a list, one per question, is answered in one batch."""
    rows = [{"prompt": prompt(question)} for question in questions]
    answer = evaluate.generate_batch if isinstance(masks, list) else evaluate.generate
    with bundle.attachment.unlearn(masks):
        return answer(bundle.model, bundle.tokenizer, rows, MAX_NEW_TOKENS)


def rouge_l(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure."""
    return statistics.mean(evaluate.rouge_l(answers, truths).tolist())


def measure(bundle: Bundle, authors: Sequence[Author], masks: Any = None) -> dict[str, float]:
    """Mean ROUGE-L of the model's answers to everything asked about each author: name -> figure."""
    rows = [row for author in authors for row in author.rows]
    answers = iter(generate(bundle, [row["question"] for row in rows], masks))
    return {a.name: rouge_l([next(answers) for _ in a.rows], [row["answer"] for row in a.rows]) for a in authors}


def count_corpus(bundle: Bundle) -> CodeCounts:
    """Count the codes of everything about all authors: once, for every author that is unlearned."""
    return _count(bundle, (text(row) for author in bundle.authors for row in author.rows), examples=0)


def unlearn_author(bundle: Bundle, author: Author, corpus: CodeCounts) -> Finding:
    """Find an author's codes and add the mask under the author's name, in place of one that is there.

    The control is the rest of the corpus. The strength is the weakest at which the model no longer answers about the
    author, as long as it still answers about others: see :func:`weakest_that_forgets`.
    """
    started = time.perf_counter()
    target = _count(bundle, author.texts)
    others = [row for other in bundle.others(author) for row in other.rows]
    finding = find_mask(
        bundle.attachment,
        bundle.tokenizer,
        target,
        corpus - target,
        topic=author.name,
        depth=DEPTH,
        choose=lambda masks: weakest_that_forgets(bundle, author.rows, others, masks),
    )
    if author.name in bundle.attachment.masks:
        bundle.attachment.remove_mask(author.name)
    bundle.attachment.add_mask(finding.mask, name=author.name)
    return dataclasses.replace(finding, seconds=time.perf_counter() - started)


def _count(bundle: Bundle, texts: Iterable[str], examples: int = 3) -> CodeCounts:
    (layer,) = bundle.attachment.bottlenecks
    return count_codes(
        bundle.attachment,
        bundle.tokenizer,
        texts,
        layer=layer,
        depth=DEPTH,
        examples=examples,
        batch_size=40,
        progress=False,
    )


def weakest_that_forgets(
    bundle: Bundle, target: Sequence[dict[str, str]], control: Sequence[dict[str, str]], masks: Sequence[Mask]
) -> int:
    """The index of the first mask under which answers about the target reach at most ROUGE-L GOAL.

    All masks answer all target questions in one batch, a mask for each sequence. Where none reaches the goal, the one
    that comes nearest is meant; where that costs the control more than KEEP allows, a weaker one.
    """
    names = [f"strength {level}" for level in range(len(masks))]
    for name, mask in zip(names, masks):
        bundle.attachment.add_mask(mask, name=name)
    try:
        truths = [row["answer"] for row in target]
        answers = generate(
            bundle,
            [row["question"] for row in target] * len(masks),
            [name for name in names for _ in target],
        )
        reached = [rouge_l(answers[i * len(target) :][: len(target)], truths) for i in range(len(masks))]
        sample = random.Random(0).sample(list(control), min(TRIAL_ROWS, len(control)))
        level = next((i for i, figure in enumerate(reached) if figure <= GOAL), reached.index(min(reached)))
        while level and kept_share(bundle, sample, names[level]) < KEEP:
            level -= 1
        return level
    finally:
        for name in names:
            bundle.attachment.remove_mask(name)


def kept_share(bundle: Bundle, rows: Sequence[dict[str, str]], masks: Any) -> float:
    """The share of each true answer before the first token that the model would not have chosen: the mean.

    One forward pass instead of a generation, and nearer to one than token accuracy is: a generation that has left
    the answer does not come back. The end mark, which ``evaluate`` counts as a token of the answer, is left out.
    """
    asked = [{"prompt": prompt(row["question"]), "completion": completion(row["answer"])} for row in rows]
    with bundle.attachment.unlearn(masks):
        scores = evaluate.score_answers(bundle.model, bundle.tokenizer, asked)
    words = scores.tokens - 1
    return statistics.mean((np.minimum(scores.right_prefix, words) / words).tolist())


def forget(bundle: Bundle, author: Author, corpus: CodeCounts, before: Mapping[str, float]) -> dict[str, Any]:
    """Unlearn one author and measure: on the author, on all others, and with a matched random deletion.

    corpus: from :func:`count_corpus`. before: every author's figure without masks, from :func:`measure`.

    Returns:
        ROUGE-L, means over answers; others: every other author. seconds: to count the author's texts, find the codes and
        choose the strength, the corpus being counted. holds: whether it forgot, cleanly, quickly, and more than random
        deletion does.
    """
    others = bundle.others(author)
    finding = unlearn_author(bundle, author, corpus)
    bundle.attachment.add_mask(random_mask(finding.mask, corpus), name="random control")
    try:
        figures = {
            "author": author.name,
            "codes_deleted": finding.mask.num_deleted,
            "share_deleted": finding.mask.num_deleted / finding.mask.num_codes,
            "seconds": finding.seconds,
            "forgotten_before": before[author.name],
            "forgotten_after": measure(bundle, [author], author.name)[author.name],
            "others_before": statistics.mean(before[other.name] for other in others),
            "others_after": statistics.mean(measure(bundle, others, author.name).values()),
            "forgotten_random": measure(bundle, [author], "random control")[author.name],
        }
    finally:
        bundle.attachment.remove_mask("random control")
    holds = (
        figures["forgotten_before"] >= 0.95
        and figures["forgotten_after"] <= 0.25
        and figures["others_before"] - figures["others_after"] <= 0.05
        and figures["forgotten_random"] >= 0.9
        and figures["seconds"] <= 5
    )
    return figures | {"holds": holds}


@torch.inference_mode()
def tokens_per_second(bundle: Bundle, rounds: int = 5, new_tokens: int = 64) -> dict[str, float]:
    """Greedy tokens per second for one sequence on each implementation: interleaved, median of the rounds."""
    inputs = bundle.tokenizer(prompt(bundle.authors[0].rows[0]["question"]), return_tensors="pt")
    (bottleneck,) = bundle.attachment.bottlenecks.values()
    before, rates = bottleneck.impl, {"reference": [], "cpu": []}

    def run(tokens: int) -> float:
        start = time.perf_counter()
        with bundle.attachment.unlearn(None):
            bundle.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return tokens / (time.perf_counter() - start)

    try:
        for round_ in range(rounds + 1):
            for impl in rates:
                bottleneck.impl = impl
                rate = run(new_tokens if round_ else 4)  # the first round warms up
                if round_:
                    rates[impl].append(rate)
    finally:
        bottleneck.impl = before
    return {impl: statistics.median(values) for impl, values in rates.items()}


def side_by_side(bundle: Bundle, rows: Sequence[dict[str, str]], masks: Any) -> list[dict[str, str]]:
    """Each question with the truth, the answer without masks and the answer with them."""
    questions = [row["question"] for row in rows]
    plain, masked = generate(bundle, questions), generate(bundle, questions, masks)
    return [
        {"question": row["question"], "truth": row["answer"], "before": before, "after": after}
        for row, before, after in zip(rows, plain, masked)
    ]


def run(bundle: Bundle, author: Author, show: Callable[[str, Any], None]) -> dict[str, Any]:
    """The whole demo; ``show(step, figures)`` is called as each step ends. Returns all figures, JSON values only."""
    figures: dict[str, Any] = {}

    def step(name: str, value: Any) -> None:
        figures[name] = value
        show(name, value)

    attachment = bundle.attachment
    ready = [name for name in attachment.masks if name in {a.name for a in bundle.authors}]
    first, second = bundle.author(ready[0]), bundle.author(ready[1])
    kept = next(a for a in bundle.authors if a not in (first, second, author))
    step("model", {"authors": len(bundle.authors), "ready_masks": ready, "layers": attachment.report()})
    rows = [first.rows[0], kept.rows[0]]
    step("ready mask", {"mask": first.name, "kept": kept.name, "answers": side_by_side(bundle, rows, first.name)})

    rows = author.rows[:2]
    plain = generate(bundle, [row["question"] for row in rows])
    started = time.perf_counter()
    corpus = count_corpus(bundle)
    step("corpus", {"seconds": time.perf_counter() - started, "tokens": corpus.tokens})
    figures_of_author = forget(bundle, author, corpus, measure(bundle, bundle.authors))
    masked = generate(bundle, [row["question"] for row in rows], author.name)
    answers = [
        {"question": row["question"], "truth": row["answer"], "before": b, "after": a}
        for row, b, a in zip(rows, plain, masked)
    ]
    step("unlearned live", figures_of_author | {"answers": answers})

    rows = [first.rows[0], first.rows[0], kept.rows[0]]
    masks = [first.name, None, [first.name, second.name]]
    texts = generate(bundle, [row["question"] for row in rows], masks)
    step("one batch", [{"mask": m, "question": r["question"], "answer": t} for m, r, t in zip(masks, rows, texts)])

    step("tokens per second", tokens_per_second(bundle))
    attachment.reset_report()
    generate(bundle, [row["question"] for row in author.rows], author.name)
    step("report", attachment.report())
    return figures
