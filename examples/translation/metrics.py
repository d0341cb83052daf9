"""Scores of translations by the words and the states that they share with a reference: chrF, METEOR, BERTScore's, BLEU."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence

import numpy as np
import sacrebleu
import torch.nn.functional as F
from nltk.stem import SnowballStemmer
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.meteor_score import single_meteor_score
from torch import Tensor


def chrf(answers: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """chrF of each answer (sacrebleu's defaults), in [0, 1]. float64 [N]."""
    return np.array([sacrebleu.sentence_chrf(a, [t]).score / 100 for a, t in zip(answers, truths)])


def meteor(answers: Sequence[str], truths: Sequence[str], language: str = "english") -> np.ndarray:
    """METEOR of each answer (nltk's defaults), by words and their Snowball stems; no synonyms. float64 [N]."""
    score = functools.partial(
        single_meteor_score,
        stemmer=SnowballStemmer(language),
        wordnet=types.SimpleNamespace(synsets=lambda word: []),
    )
    return np.array([score(wordpunct_tokenize(t), wordpunct_tokenize(a)) for a, t in zip(answers, truths)])


def match_states(answers: Sequence[Tensor], truths: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BERTScore's matching (Zhang et al., arXiv 1904.09675): precision, recall and F of each answer, float64 [N].

    Texts are given as a model's hidden states at their tokens, [tokens, D] each. Every token is matched with the one of
    the other text whose cosine is highest; precision is the mean over the answer's tokens, recall over the truth's. No
    idf weights, no rescaling. A text without tokens: 0.
    """
    means = np.zeros((2, len(answers)))
    for i, (answer, truth) in enumerate(zip(answers, truths)):
        if len(answer) and len(truth):
            cosines = F.normalize(answer.double(), dim=-1) @ F.normalize(truth.double(), dim=-1).T
            means[:, i] = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
    precision, recall = means
    total = precision + recall
    return precision, recall, np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total != 0)


def bleu_counts(answers: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """What BLEU counts of each answer, so that any set's can be added up: float64 [N, 10].

    Matches and n-grams of one to four words, and the words of the answer and of the truth.
    """
    scores = [sacrebleu.sentence_bleu(a, [t]) for a, t in zip(answers, truths)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float).reshape(-1, 10)


def bleu_of(counts: np.ndarray) -> float:
    """Corpus BLEU, as ``cu_fast.evaluate.bleu``, of the answers whose rows of :func:`bleu_counts` are given: [n, 10]."""
    *grams, words, truth_words = (int(n) for n in counts.sum(0))
    return sacrebleu.BLEU.compute_bleu(grams[:4], grams[4:], words, truth_words, smooth_method="exp").score / 100
