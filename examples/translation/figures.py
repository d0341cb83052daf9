"""How good translations are: what the study in this folder measures of a set of sentences.

bleu, chrf, meteor        of the translation against the reference. METEOR by words and French stems.
states_p, _r, _f          like BERTScore: tokens of translation and reference matched by the states that the judge has of
                          them, in the middle of its decoder, while it reads the source.
likelihood                like BARTScore: the mean log-likelihood of a token of the translation, given the source, to the
                          judge. nats.
reference                 the same of the reference, given the source, to the model that is measured. nats.
words                     of the sentences whose reference holds one of a topic's French words: the share whose
                          translation does.

The judge is the model without bottleneck: one that was trained on the same pairs and from which nothing was deleted.
Every figure but BLEU is a mean over sentences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import metrics
import numpy as np
import torch
from corpus import Pair, rows, words_of
from models import MAX_LENGTH
from torch import Tensor

from cu_fast import evaluate as ev
from cu_fast.rows import Collator, encode_row

Figures = Mapping[str, np.ndarray]  # [N], one for each sentence; bleu: [N, 10]
BATCH = 64
NAMES = ("bleu", "chrf", "meteor", "states_p", "states_r", "states_f", "likelihood", "reference", "words")


@dataclasses.dataclass
class Judge:
    """A model without bottleneck and its tokenizer."""

    model: torch.nn.Module
    tokenizer: Any
    known: dict[tuple[Pair, ...], list[Tensor]] = dataclasses.field(default_factory=dict)

    def likelihood(self, pairs: Sequence[Pair], translations: Sequence[str]) -> np.ndarray:
        return log_likelihood(self.model, self.tokenizer, with_french(pairs, translations))

    def states_of_references(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """:meth:`states`, computed once."""
        if (key := tuple(pairs)) not in self.known:
            self.known[key] = self.states(pairs, [pair.french for pair in pairs])
        return self.known[key]

    @torch.inference_mode()
    def states(self, pairs: Sequence[Pair], translations: Sequence[str]) -> list[Tensor]:
        """Of each translation's tokens, [tokens, D]: in the middle of the decoder, after they were read."""
        encoded = [encode_row(self.tokenizer, row, 1.0, MAX_LENGTH) for row in rows(with_french(pairs, translations))]
        collate, states = Collator(self.tokenizer.pad_token_id), []
        for start in range(0, len(encoded), BATCH):
            batch = collate(encoded[start : start + BATCH])
            given = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask", "labels")}
            layers = self.model(**given, output_hidden_states=True).decoder_hidden_states
            middle, lengths = layers[len(layers) // 2].float().cpu(), (batch["labels"] >= 0).sum(1)
            states += [row[1:length] for row, length in zip(middle, lengths)]  # 0 is the start, the end was not read
        return states


def with_french(pairs: Sequence[Pair], french: Sequence[str]) -> list[Pair]:
    return [pair._replace(french=text) for pair, text in zip(pairs, french)]


def log_likelihood(model, tokenizer, pairs: Sequence[Pair]) -> np.ndarray:
    scores = ev.score_answers(model, tokenizer, rows(pairs), MAX_LENGTH)
    return scores.log_prob / scores.tokens


def translate(model, tokenizer, pairs: Sequence[Pair]) -> list[str]:
    return ev.generate(model, tokenizer, rows(pairs), MAX_LENGTH)


def measure(
    pairs: Sequence[Pair], translations: Sequence[str], reference: np.ndarray, judge: Judge, words: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """reference: the log-likelihood of the references to the model that is measured. words: a topic's, in French."""
    truths = [pair.french for pair in pairs]
    precision, recall, f = metrics.match_states(judge.states(pairs, translations), judge.states_of_references(pairs))
    said, due = ([bool(words_of(text) & set(words)) for text in texts] for texts in (translations, truths))
    return {
        "bleu": metrics.bleu_counts(translations, truths),
        "chrf": metrics.chrf(translations, truths),
        "meteor": metrics.meteor(translations, truths, "french"),
        "states_p": precision,
        "states_r": recall,
        "states_f": f,
        "likelihood": judge.likelihood(pairs, translations),
        "reference": reference,
        "words": np.where(due, np.array(said, float), np.nan),
    }


def value(name: str, figure: np.ndarray) -> np.ndarray:
    """Of sets, from their sentences' figures: [..., N], or [..., N, 10] for bleu -> [...]; nan where there are none."""
    if name == "bleu":
        counts = figure.sum(-2)
        return np.array([metrics.bleu_of(row[None]) for row in counts.reshape(-1, 10)]).reshape(counts.shape[:-1])
    return figure.mean(-1) if figure.shape[-1] else np.full(figure.shape[:-1], np.nan)


def compare(name: str, zero: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The three values, and the paper's drop in percent, 100 (after - before) / (before - zero), with its interval.

    -100 is as bad as not to translate at all. The sentences are resampled in all three together. raw_drop:
    100 (after - before) / before, for figures that have a 0. nan: the model was no better than zero before.
    """
    if name == "words":  # of the few that count
        due = np.isfinite(before)
        zero, before, after = zero[due], before[due], after[due]

    def drop(pick: np.ndarray) -> np.ndarray:
        bottom, top, now = (value(name, figure[pick]) for figure in (zero, before, after))
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * (now - top) / (top - bottom)

    values = {
        which: float(value(name, figure)) for which, figure in (("zero", zero), ("before", before), ("after", after))
    }
    low = high = found = raw = float("nan")
    if values["before"] > values["zero"]:
        found = float(drop(np.arange(len(before))))
        low, high = ev.bootstrap(drop, len(before)) if values["before"] != values["after"] else (found, found)
    if name not in ("likelihood", "reference") and values["before"] > 0:
        raw = 100 * (values["after"] - values["before"]) / values["before"]
    return {
        "sentences": len(before),
        **values,
        "drop": found,
        "drop_low": low,
        "drop_high": high,
        "raw_drop": raw,
    }
