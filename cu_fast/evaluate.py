"""How much a model knows of what it was asked: per-answer scores, and a table of them with and without masks.

Call these inside ``attachment.unlearn(...)`` for a masked model's figures. Every metric is a field's own: TOFU's
probability (Maini et al., arXiv 2401.06121), OpenUnlearning's extraction strength (Dorna et al., arXiv 2506.12618),
ROUGE (rouge-score), BLEU (sacrebleu), the bootstrap (scipy). ``pip install 'cu-fast[eval]'`` brings what is missing.

A row is a dict: {"prompt", "completion"} for a causal model, {"source", "target"} for a sequence-to-sequence one, as
in training.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm.auto import tqdm

from cu_fast.rows import Collator, encode_row

BATCH_TOKENS = 8192  # positions of a forward pass, padding included


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """How a model takes given answers, one forward pass, each token given the true ones before it. float64 [N] each.

    log_prob: of the whole answer, nats. tokens: its length, the end mark included. right_prefix: tokens before the
    first that the model would not have chosen greedily. right_suffix: tokens after the last such.
    """

    log_prob: np.ndarray
    tokens: np.ndarray
    right_prefix: np.ndarray
    right_suffix: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        """P(answer)^(1 / length), what TOFU calls the probability."""
        return np.exp(self.log_prob / self.tokens)

    @property
    def extraction_strength(self) -> np.ndarray:
        """The largest share of an answer that the model completes word for word, given what stands before it."""
        return self.right_suffix / self.tokens

    @property
    def kept_share(self) -> np.ndarray:
        """The share of an answer that greedy generation gets right before it leaves it: 1 = known by heart."""
        return self.right_prefix / self.tokens


@torch.inference_mode()
def score_answers(model, tokenizer, rows: Sequence[Mapping[str, str]], max_length: int = 512) -> AnswerScores:
    """Score the completions (or targets) of rows. Raises ValueError for rows with other keys, or none."""
    if not rows:
        raise ValueError("rows is empty; give at least one")
    encoded = [encode_row(tokenizer, row, 0.0, max_length) for row in rows]
    seq2seq, collate = model.config.is_encoder_decoder, Collator(tokenizer.pad_token_id)
    figures = np.zeros((4, len(rows)))
    for batch in _batches([len(row["input_ids"]) + seq2seq * len(row["labels"]) for row in encoded]):
        inputs = collate([encoded[i] for i in batch])
        weights = inputs.pop("loss_weights")
        labels = inputs["labels"] if seq2seq else inputs.pop("labels")
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        logits = model(**inputs).logits.float().cpu()
        if not seq2seq:
            logits, labels, weights = logits[:, :-1], labels[:, 1:], weights[:, 1:]
        counts = weights > 0
        log_probs = -F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
        wrong = (logits.argmax(-1) != labels) & counts
        for n, i in enumerate(batch):
            missed = wrong[n][counts[n]].nonzero()[:, 0]
            length = int(counts[n].sum())
            figures[:, i] = (
                log_probs[n][counts[n]].double().sum(), length,
                missed[0] if len(missed) else length, length - 1 - missed[-1] if len(missed) else length,
            )  # fmt: skip
    return AnswerScores(*figures)


def generate(model, tokenizer, rows: Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> list[str]:
    """Greedy answers to the prompts (or sources) of rows. A causal model's tokenizer has to pad on the left."""
    answers = [""] * len(rows)
    lengths = [len(ids) + max_new_tokens for ids in tokenizer(_asked(model, tokenizer, rows))["input_ids"]]
    for batch in _batches(lengths, 4 * BATCH_TOKENS):
        for i, text in zip(batch, generate_batch(model, tokenizer, [rows[i] for i in batch], max_new_tokens)):
            answers[i] = text
    return answers


@torch.inference_mode()
def generate_batch(model, tokenizer, rows: Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> list[str]:
    """:func:`generate` in one batch and in the rows' order: for a mask per row."""
    seq2seq, texts = model.config.is_encoder_decoder, _asked(model, tokenizer, rows)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not seq2seq)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    out = out if seq2seq else out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def _asked(model, tokenizer, rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not model.config.is_encoder_decoder:
        return [row["prompt"] for row in rows]
    return [row["source"] + (tokenizer.eos_token or "") for row in rows]


def _batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices by length, in batches of at most ``tokens`` positions; one that is longer goes alone."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


# -- figures of single answers -------------------------------------------------------------------------------------


def rouge_l(answers: Sequence[str], truths: Sequence[str], figure: str = "fmeasure") -> np.ndarray:
    """ROUGE-L of each answer (rouge-score, no stemming): "fmeasure", or "recall", as TOFU counts. float64 [N]."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return np.array([getattr(scorer.score(t, a)["rougeL"], figure) for a, t in zip(answers, truths)])


# -- figures of a set ----------------------------------------------------------------------------------------------


def bleu(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Corpus BLEU (sacrebleu's defaults), in [0, 1]."""
    return _library("sacrebleu").corpus_bleu(list(answers), [list(truths)]).score / 100


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], rows: int, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of any statistic of a set of rows.

    statistic: indices of rows, drawn with replacement, int64 [resamples, rows] -> [resamples]. Paired, where it looks the
    same rows up in the figures of several models.
    """
    if rows == 1:  # there is nothing to draw
        only = float(statistic(np.zeros((1, 1), dtype=int))[0])
        return only, only
    found = stats.bootstrap(
        (np.arange(rows),), lambda drawn, axis: statistic(drawn), vectorized=True, n_resamples=resamples,
        confidence_level=level, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of a mean: 95 %, 2,000 resamples. values float64 [N]."""
    return bootstrap(lambda rows: values[rows].mean(-1), len(values), resamples=2000)


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{name} cannot be imported ({error}); run: pip install 'cu-fast[eval]'") from error


# -- a model with and without its masks ----------------------------------------------------------------------------

METRICS = ("rouge_l", "probability", "extraction_strength", "kept_share")


def compare(
    attachment, tokenizer, sets: Mapping[str, Sequence[Mapping[str, str]]], masks: Sequence[str], progress: bool = True
) -> list[dict[str, Any]]:
    """Measure sets of rows without masks, then under each mask alone.

    Returns a dict for each set and mask: set, mask ("" = none), rows; for each of METRICS its mean and the ends of its
    bootstrap interval (``rouge_l``, ``rouge_l_low``, ``rouge_l_high``); bleu of the whole set; and answers, the greedy ones.
    """
    results = []
    pairs = [(name, mask) for name in sets for mask in ("", *masks)]
    for name, mask in tqdm(pairs, desc="evaluate", disable=None if progress else True):
        rows = sets[name]
        with attachment.unlearn(mask or None):
            scores = score_answers(attachment.model, tokenizer, rows)
            answers = generate(attachment.model, tokenizer, rows)
        truths = [truth_of(row) for row in rows]
        result: dict[str, Any] = {"set": name, "mask": mask, "rows": len(rows)}
        for metric in METRICS:
            values = rouge_l(answers, truths) if metric == "rouge_l" else getattr(scores, metric)
            low, high = interval(values)
            result |= {metric: float(values.mean()), f"{metric}_low": low, f"{metric}_high": high}
        results.append(result | {"bleu": bleu(answers, truths), "answers": answers})
    return results


def truth_of(row: Mapping[str, str]) -> str:
    return (row["target"] if "target" in row else row["completion"]).strip()


def report(
    results: Sequence[Mapping[str, Any]], sets: Mapping[str, Sequence[Mapping[str, str]]], examples: int = 3
) -> str:
    """What :func:`compare` found, as Markdown: a table, and the first answers of each set side by side."""
    lines = [f"| set | mask | rows | {' | '.join(METRICS)} | bleu |", "|---" * (4 + len(METRICS)) + "|"]
    for result in results:
        cells = [f"{result[m]:.3f} ({result[f'{m}_low']:.3f} to {result[f'{m}_high']:.3f})" for m in METRICS]
        lines.append(
            f"| {result['set']} | {result['mask'] or '-'} | {result['rows']} | {' | '.join(cells)} | {result['bleu']:.3f} |"
        )
    lines.append("\nMeans, and 95 % bootstrap intervals over rows.")
    for name, rows in sets.items():
        for i, row in enumerate(rows[:examples]):
            asked = row["source"] if "source" in row else row["prompt"]
            lines += ["", f"**{name}, {i + 1}**: {_one_line(asked)}", "", f"- truth: {_one_line(truth_of(row))}"]
            lines += [
                f"- {result['mask'] or 'no mask'}: {_one_line(result['answers'][i])}"
                for result in results
                if result["set"] == name
            ]
    return "\n".join(lines) + "\n"


def write(folder: Path, results: Sequence[Mapping[str, Any]], text: str) -> None:
    """results.json with the answers, results.csv without them, report.md; files of these names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    (folder / "report.md").write_text(text)
    with (folder / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name in results[0] if name != "answers"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def _one_line(text: str) -> str:
    return " ".join(text.split())
