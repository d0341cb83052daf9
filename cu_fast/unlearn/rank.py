"""How codes are ranked: by enrichment, by how often they fire, by how large their activations are. C codes.

Each rank gives the codes in order, and how many of the first pass; each looks at the control and at every neighbour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from cu_fast.unlearn.count import CodeCounts
from cu_fast.unlearn.statistics import Correction, Test, corrected, enrichment, p_values

Rank = Literal["enrichment", "saebench", "dsg"]
LEAST_SQUARE = 1e-12  # a control's mean square counts as at least this: its latents may never fire


@dataclasses.dataclass
class Evidence:
    """What the counts say of every code, against the control and the neighbours at once.

    Attributes:
        R: float64 [C], the smallest enrichment, in bits.
        p: float64 [C], the largest p-value.
        q: float64 [C], the largest corrected p-value.
        against: per code the name of the control with the smallest enrichment.
        score: float64 [C], what the codes are ranked by.
    """

    R: np.ndarray
    p: np.ndarray
    q: np.ndarray
    against: list[str]
    score: np.ndarray

    @classmethod
    def of(cls, target: CodeCounts, controls: Mapping[str, CodeCounts], test: Test, correction: Correction) -> Evidence:
        """Compute it from counts; ``controls`` is the control and the neighbours, by name."""
        R, p, q = [], [], []
        for control in controls.values():
            R.append(enrichment(target, control))
            p.append(p_values(target, control, test))
            q.append(corrected(p[-1], (target.counts + control.counts).numpy() > 0, correction))
        names = list(controls)
        least = np.stack(R).argmin(0)
        smallest = np.stack(R).min(0)
        return cls(smallest, np.stack(p).max(0), np.stack(q).max(0), [names[i] for i in least], smallest)


def by_enrichment(evidence: Evidence, min_enrichment: float, alpha: float) -> tuple[np.ndarray, int]:
    """Codes with R above a bound: the significant ones first, each part by p, then by R.

    Returns:
        Their ids, int64, and how many are significant.
    """
    candidates = np.flatnonzero(evidence.R > min_enrichment)
    p, q, R = (figure[candidates] for figure in (evidence.p, evidence.q, evidence.R))
    return candidates[np.lexsort((-R, p, q >= alpha))], int((q < alpha).sum())


def by_share(
    evidence: Evidence, target: CodeCounts, controls: Mapping[str, CodeCounts], retain_threshold: float
) -> tuple[np.ndarray, int]:
    """Codes that few tokens of every control keep, by how many of the target's do; at equal shares the smaller id first.

    Sets ``evidence.score`` to the share of the target's tokens.

    Returns:
        Their ids, int64, and how many there are.
    """
    share = target.counts.numpy() / target.tokens
    passing = share > 0
    for control in controls.values():
        passing &= control.counts.numpy() / control.tokens < retain_threshold
    evidence.score = share
    ids = np.flatnonzero(passing)
    ids = ids[np.argsort(-share[ids], kind="stable")]
    return ids, len(ids)


def by_activations(
    evidence: Evidence, target: CodeCounts, controls: Mapping[str, CodeCounts], percentile: float
) -> tuple[np.ndarray, int]:
    """Latents whose mean square is large in the target, beside that in every control.

    The ratio of a latent is the smallest one over the controls, and 0 where it does not fire in the target. The
    percentile is that of the ratios of all C latents. Sets ``evidence.score`` to the mean square in the target.

    Returns:
        Their ids by the mean square in the target, int64, and how many there are.
    """
    square = target.squares.numpy() / target.tokens
    largest = np.max([control.squares.numpy() / control.tokens for control in controls.values()], axis=0)
    ratio = square / np.maximum(largest, LEAST_SQUARE)
    evidence.score = square
    ids = np.flatnonzero((ratio >= np.percentile(ratio, percentile)) & (ratio > 0))
    ids = ids[np.argsort(-square[ids], kind="stable")]
    return ids, len(ids)
