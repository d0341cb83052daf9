"""The bundled model forgets an author while you watch; every figure printed is measured in the run.

The model is a small causal LM trained on question-answer pairs about invented authors (TOFU, arXiv 2401.06121), with
a codebook bottleneck; ``examples/tofu_mini`` makes it. Nothing here trains.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cu_fast.hf import Attachment
from cu_fast.hf.checkpoint import load_model
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
            near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or list(names)[:3]
            raise ValueError(
                f"author is {name!r}, who is not in the training set; near: "
                f"{', '.join(names[n].name for n in near)} (cu-fast demo --list shows all)"
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


@torch.inference_mode()
def generate(
    bundle: Bundle,
    questions: Sequence[str],
    masks: Any = None,
    batch_size: int = 80,
) -> list[str]:
    """Greedy answers. masks: what ``attachment.unlearn`` takes."""
    answers: list[str] = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # little padding
    if isinstance(masks, list):
        order, batch_size = list(range(len(questions))), len(questions)
    with bundle.attachment.unlearn(masks):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = bundle.tokenizer([prompt(questions[i]) for i in rows], return_tensors="pt", padding=True)
            out = bundle.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            texts = bundle.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts):
                answers[i] = text.strip()
    return answers


def rouge_l(answers: Iterable[str], truths: Iterable[str]) -> float:
    """Mean ROUGE-L F-measure (rouge-score, no stemming)."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise RuntimeError("the demo measures with rouge-score; run: pip install 'cu-fast[demo]'") from error
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return statistics.mean(scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(answers, truths))


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


@torch.inference_mode()
def kept_share(bundle: Bundle, rows: Sequence[dict[str, str]], masks: Any) -> float:
    """The share of each true answer before the first token that the model would not have chosen: the mean.

    One forward pass instead of a generation, and nearer to one than token accuracy is: a generation that has left
    the answer does not come back.
    """
    prompts = [len(bundle.tokenizer(prompt(row["question"]))["input_ids"]) for row in rows]
    answers = [len(bundle.tokenizer(completion(row["answer"]))["input_ids"]) for row in rows]
    encoded = bundle.tokenizer([text(row) for row in rows], return_tensors="pt", padding=True, padding_side="right")
    with bundle.attachment.unlearn(masks):
        logits = bundle.model(**encoded).logits
    right = logits[:, :-1].argmax(-1) == encoded["input_ids"][:, 1:]
    shares = [
        float(right[i, start - 1 : start - 1 + length].long().cumprod(0).sum()) / length
        for i, (start, length) in enumerate(zip(prompts, answers))
    ]
    return statistics.mean(shares)


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """What one author's deletion did. ROUGE-L, means over answers; others: every other author.

    seconds: to count the author's texts, find the codes and choose the strength, the corpus being counted.
    """

    author: str
    codes_deleted: int
    share_deleted: float
    seconds: float
    forgotten_before: float
    forgotten_after: float
    others_before: float
    others_after: float
    forgotten_random: float

    @property
    def holds(self) -> bool:
        """Whether it forgot, cleanly, quickly, and more than random deletion does."""
        return (
            self.forgotten_before >= 0.95
            and self.forgotten_after <= 0.25
            and self.others_before - self.others_after <= 0.05
            and self.forgotten_random >= 0.9
            and self.seconds <= 5
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"holds": self.holds}


def study(bundle: Bundle, author: Author, corpus: CodeCounts, before: Mapping[str, float]) -> Forgetting:
    """Unlearn one author and measure: on the author, on all others, and with a matched random deletion.

    corpus: from :func:`count_corpus`. before: every author's figure without masks, from :func:`measure`.
    """
    others = bundle.others(author)
    finding = unlearn_author(bundle, author, corpus)
    control = random_mask(finding.mask, corpus)
    bundle.attachment.add_mask(control, name="random control")
    try:
        return Forgetting(
            author.name,
            finding.mask.num_deleted,
            finding.mask.num_deleted / finding.mask.num_codes,
            finding.seconds,
            before[author.name],
            measure(bundle, [author], author.name)[author.name],
            statistics.mean(before[other.name] for other in others),
            statistics.mean(measure(bundle, others, author.name).values()),
            measure(bundle, [author], "random control")[author.name],
        )
    finally:
        bundle.attachment.remove_mask("random control")


def study_many(bundle: Bundle, number: int, seed: int, progress: bool = True) -> list[Forgetting]:
    """:func:`study` for authors picked at random; their masks are removed again."""
    if not 1 <= number <= len(bundle.authors):
        raise ValueError(f"number is {number}; it should be between 1 and {len(bundle.authors)} authors")
    corpus, before = count_corpus(bundle), measure(bundle, bundle.authors)
    results = []
    for author in tqdm(random.Random(seed).sample(bundle.authors, number), disable=None if progress else True):
        results.append(study(bundle, author, corpus, before))
        bundle.attachment.remove_mask(author.name)
    return results


@torch.inference_mode()
def tokens_per_second(bundle: Bundle, rounds: int = 5, new_tokens: int = 64) -> dict[str, float]:
    """Greedy tokens a second for one sequence on each implementation: interleaved, median of the rounds."""
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
    forgetting = study(bundle, author, corpus, measure(bundle, bundle.authors))
    masked = generate(bundle, [row["question"] for row in rows], author.name)
    answers = [
        {"question": row["question"], "truth": row["answer"], "before": b, "after": a}
        for row, b, a in zip(rows, plain, masked)
    ]
    step("unlearned live", forgetting.to_dict() | {"answers": answers})

    rows = [first.rows[0], first.rows[0], kept.rows[0]]
    masks = [first.name, None, [first.name, second.name]]
    texts = generate(bundle, [row["question"] for row in rows], masks)
    step("one batch", [{"mask": m, "question": r["question"], "answer": t} for m, r, t in zip(masks, rows, texts)])

    step("tokens per second", tokens_per_second(bundle))
    attachment.reset_report()
    generate(bundle, [row["question"] for row in author.rows], author.name)
    step("report", attachment.report())
    return figures
