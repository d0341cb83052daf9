"""TOFU's figures of a pretrained model, fast enough for two cores. Part of the study in this folder.

The answers of a question, the true one, its paraphrase and the wrong ones, share the prompt: it is read once, and its cache is
repeated. Only the answers' positions go through the output layer. Generation takes rows whose true answers are equally long
together, and ends at twice the longest of them (at least LEAST_TOKENS, at most tofu.NEW_TOKENS), so that one row that rambles
does not hold up all. What TOFU defines is as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
import transformers
from shared import metrics, tofu

from cu_fast import evaluate as ev

POSITIONS = 8192  # of a forward pass over answers, padding included
HEAD_ROWS = 1024  # that the output layer turns into words' probabilities at once
GENERATED = 64  # rows that are generated at once
PIECE = 4  # tokens of an answer after which a gate that is judged while the model answers is judged again
LEAST_TOKENS = 48  # a general question's answer is a name, and what is said may be a sentence

Prompt = Callable[[str], str]


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def score(
    model, tokenizer, prompts: Sequence[str], answers: Sequence[Sequence[str]], piece: int | None = None
) -> ev.AnswerScores:
    """:func:`cu_fast.evaluate.score_answers` of every answer of every prompt, in order: N prompts with n answers each.

    piece: as of :func:`score_batch`; then each answer is read after a prompt of its own, as its deletions are.
    """
    n = len(answers[0])
    if piece and n > 1:
        alone = [[text] for some in answers for text in some]
        return score(model, tokenizer, [text for text in prompts for _ in range(n)], alone, piece)
    asked = tokenizer(list(prompts))["input_ids"]
    said = [[ids_of(tokenizer, text) + [tokenizer.eos_token_id] for text in some] for some in answers]
    longest = [max(map(len, some)) for some in said]
    figures = np.zeros((4, len(prompts), n))
    order = sorted(range(len(prompts)), key=lambda i: longest[i])
    while order:
        size = max(1, POSITIONS // (n * longest[order[-1]] + max(len(asked[i]) for i in order[-64:])))
        batch, order = order[-size:], order[:-size]
        given = [asked[i] for i in batch], [one for i in batch for one in said[i]]
        found = score_batch(model, tokenizer, *given, n, piece)
        figures[:, batch] = found.reshape(4, len(batch), n)
    return ev.AnswerScores(*figures.reshape(4, -1))


def score_batch(
    model, tokenizer, asked: list[list[int]], said: list[list[int]], n: int, piece: int | None = None
) -> np.ndarray:
    """float64 [4, B n], the fields of AnswerScores.

    Args:
        asked: ids of B prompts.
        said: of B n answers.
        n: answers of a prompt.
        piece: tokens of the answers that are read at once; None = all. A gate that is judged while the model answers sees
            a piece as a whole.
    """
    pad = tokenizer.pad_token_id
    width = max(map(len, asked))
    prompts = torch.tensor([[pad] * (width - len(ids)) + ids for ids in asked])
    there = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked])
    length = max(map(len, said))
    answers = torch.tensor([ids + [pad] * (length - len(ids)) for ids in said])
    real = torch.arange(length) < torch.tensor([len(ids) for ids in said])[:, None]

    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    hidden = model.model(input_ids=prompts, attention_mask=there, use_cache=True, **{name: cache}).last_hidden_state
    hidden = hidden[:, -1:].repeat_interleave(n, 0)
    if length > 1:
        if n > 1:  # else its rows would be moved, which masks per prompt do not allow
            cache.batch_repeat_interleave(n)
        seen = torch.cat([there.repeat_interleave(n, 0), real[:, :-1].long()], 1)
        parts = [hidden]
        for ids in answers[:, :-1].split(piece or length, 1):
            width += ids.shape[1]
            more = model.model(input_ids=ids, attention_mask=seen[:, :width], use_cache=True, **{name: cache})
            parts.append(more.last_hidden_state)
        hidden = torch.cat(parts, 1)

    log_p, right = torch.zeros(answers.shape, dtype=torch.float64), torch.ones(answers.shape, dtype=torch.bool)
    given, wanted = hidden[real], answers[real]
    parts = [_said(model.lm_head(x), y) for x, y in zip(given.split(HEAD_ROWS), wanted.split(HEAD_ROWS))]
    log_p[real], right[real] = (torch.cat(part) for part in zip(*parts))
    tokens = real.sum(1)
    # The first wrong token, and the number of right ones behind the last wrong one; padding counts as right.
    prefix = torch.where(right.all(1), tokens, (~right).int().argmax(1))
    suffix = torch.where(right.all(1), tokens, tokens - length + (~right).flip(1).int().argmax(1))
    return torch.stack([log_p.sum(1), tokens, prefix, suffix]).double().numpy()


def _said(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of words wanted, and whether they are the likeliest."""
    log_p = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    return log_p.double(), logits.argmax(-1) == wanted


def generate(model, tokenizer, prompts: Sequence[str], truths: Sequence[str]) -> list[str]:
    """Greedy answers."""
    lengths = [len(ids_of(tokenizer, text)) for text in truths]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    said = [""] * len(prompts)
    for start in range(0, len(order), GENERATED):
        batch = order[start : start + GENERATED]
        tokens = min(tofu.NEW_TOKENS, max(LEAST_TOKENS, 2 * lengths[batch[-1]]))
        rows = [{"prompt": prompts[i]} for i in batch]
        for i, text in zip(batch, ev.generate_batch(model, tokenizer, rows, tokens)):
            said[i] = text
    return said


def measure(
    model,
    tokenizer,
    entries: list[dict],
    general: bool = False,
    *,
    prompt: Prompt = models.prompt,
    speak: bool = True,
    piece: int | None = None,
) -> tofu.Figures:
    """As ``tofu.measure``, of a chat model. prompt: makes it of a question. speak: whether it answers; else ROUGE is 0. piece:
    as of :func:`score`."""
    right = [] if general else ["paraphrased_answer"]
    wrong = len(entries[0]["perturbed_answer"])
    prompts = [prompt(entry["question"]) for entry in entries]
    answers = [[entry["answer"], *(entry[key] for key in right), *entry["perturbed_answer"]] for entry in entries]
    scores = score(model, tokenizer, prompts, answers, piece)

    def part(columns: slice) -> ev.AnswerScores:
        fields = (getattr(scores, name).reshape(len(entries), -1)[:, columns].ravel() for name in FIELDS)
        return ev.AnswerScores(*fields)

    true, other = part(slice(0, 1)), part(slice(-wrong, None))
    probability = true.probability
    if general:
        probability = probability / (probability + other.probability.reshape(len(entries), -1).sum(1))
    truths = [entry["answer"] for entry in entries]
    said = generate(model, tokenizer, prompts, truths) if speak else [""] * len(entries)
    rouge = ev.rouge_l(said, truths, "recall")
    ratios = metrics.truth_ratio(true if general else part(slice(1, 2)), other)
    return tofu.Figures(probability, rouge, ratios, said, true, other)


FIELDS = tuple(inspect.signature(ev.AnswerScores).parameters)
SPOKEN = ("forget", "retain", *tofu.GENERAL)
Measure = Callable[[str, list[dict], bool], tofu.Figures]  # of a set's name and entries, and whether it is general
Fires = Mapping[str, Sequence["set[str] | None"]]  # a set's name -> for each entry the topics that are deleted


def spaced(entries: Sequence[dict], rows: int) -> list[dict]:
    """At most so many, evenly spaced."""
    return list(entries[:: max(1, len(entries) // rows)][:rows])


class Sets:
    """The sets that figures are taken of.

    Args:
        folder: TOFU's files.
        split: what is forgotten.
        retain_rows: how many rows of retain_perturbed are measured, evenly spaced; None = all 400.
    """

    def __init__(self, folder: Path, split: str, retain_rows: int | None = None) -> None:
        self.forget = tofu.read(folder, f"{split}_perturbed")
        retain = tofu.read(folder, "retain_perturbed")
        self.retain = spaced(retain, retain_rows) if retain_rows else retain
        self.general = {name: tofu.read(folder, f"{name}_perturbed") for name in tofu.GENERAL}

    def items(self) -> Iterator[tuple[str, list[dict], bool]]:
        """Name, entries, and whether they are general knowledge."""
        yield "forget", self.forget, False
        yield "retain", self.retain, False
        for name, entries in self.general.items():
            yield name, entries, True

    def measured(self, measure: Measure) -> dict[str, tofu.Figures]:
        return {name: measure(name, entries, general) for name, entries, general in self.items()}


def plain(model, tokenizer, prompt: Prompt = models.prompt, piece: int | None = None) -> Measure:
    """A measure of a model as it is, which speaks on the sets of :class:`Sets` alone."""

    def measured(name: str, entries: list[dict], general: bool) -> tofu.Figures:
        return measure(model, tokenizer, entries, general, prompt=prompt, speak=name in SPOKEN, piece=piece)

    return measured


def behind_a_gate(
    touched: Callable[[Collection[str]], Measure], untouched: dict[str, tofu.Figures], fires: Fires
) -> Measure:
    """A measure of a model that is changed for some prompts alone. The others have the untouched model's bits.

    Args:
        touched: of topics, which measures the model while they are deleted.
        untouched: each set's figures of the model as it was.
        fires: the topics that are deleted for each entry of each set.
    """

    def measured(name: str, entries: list[dict], general: bool) -> tofu.Figures:
        groups = tofu.grouped(fires[name])
        if list(groups) == [None]:
            return untouched[name]
        parts = [
            some(untouched[name], places)
            if topics is None
            else touched(topics)(name, [entries[i] for i in places], general)
            for topics, places in groups.items()
        ]
        return tofu.merged(parts, list(groups.values()))

    return measured


def some(figures: tofu.Figures, places: Sequence[int]) -> tofu.Figures:
    """The figures of some entries."""

    def cut(scores: ev.AnswerScores) -> ev.AnswerScores:
        each = (getattr(scores, name).reshape(len(figures.answers), -1)[places].ravel() for name in FIELDS)
        return ev.AnswerScores(*each)

    arrays = (getattr(figures, name)[places] for name in ("probability", "rouge", "ratios"))
    return tofu.Figures(*arrays, [figures.answers[i] for i in places], cut(figures.true), cut(figures.wrong))


def row_of(found: dict[str, tofu.Figures]) -> dict[str, float]:
    """What a table says of the sets' figures."""
    return tofu.left(found["forget"]) | tofu.utility_of({name: found[name] for name in found if name != "forget"})


def save_figures(path: Path, found: dict[str, tofu.Figures]) -> None:
    plain = {name: dataclasses.asdict(figures) for name, figures in found.items()}
    path.write_text(json.dumps(plain, default=lambda array: array.tolist(), ensure_ascii=False))


def load_figures(path: Path) -> dict[str, tofu.Figures]:
    def made(of: dict[str, Any]) -> tofu.Figures:
        scores = {key: ev.AnswerScores(*map(np.array, of.pop(key).values())) for key in ("true", "wrong")}
        return tofu.Figures(
            **{key: value if key == "answers" else np.array(value) for key, value in of.items()}, **scores
        )

    return {name: made(of) for name, of in json.loads(path.read_text()).items()}
