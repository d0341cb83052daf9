"""TOFU's figures (Maini et al., arXiv 2401.06121), and how well a likelihood tells training data: from answers' scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from cu_fast.evaluate import AnswerScores


def truth_ratio(paraphrased: AnswerScores, perturbed: AnswerScores) -> np.ndarray:
    """TOFU's R: the mean probability of a question's wrong answers over that of the right one. float64 [N].

    paraphrased: N answers. perturbed: of each question in turn the same number of wrong ones. Far below 1: known.
    """
    wrong = perturbed.probability.reshape(len(paraphrased.tokens), -1).mean(1)
    return wrong / paraphrased.probability


def model_utility(figures: Sequence[float]) -> float:
    """TOFU's: the harmonic mean of figures in [0, 1]; 0 where one of them is."""
    return statistics.harmonic_mean(figures)


def forget_quality(ratios: np.ndarray, gold: np.ndarray) -> float:
    """TOFU's: p of Kolmogorov and Smirnov's test that a model's truth ratios, on what it should have forgotten, and
    those of a model that never saw it have one distribution. Above 0.05: told apart no better than by chance."""
    return float(stats.ks_2samp(ratios, gold).pvalue)


def membership_auc(members: AnswerScores, others: AnswerScores) -> float:
    """The area under the ROC curve of an attack that takes answers with a small loss for training data.

    0.5: no better than chance. A model that never saw the members gives what the two sets differ by anyway.
    """
    loss = np.concatenate([-s.log_prob / s.tokens for s in (members, others)])
    seen = np.r_[np.ones(len(members.tokens)), np.zeros(len(others.tokens))]
    return float(roc_auc_score(seen, -loss))
