"""How much more often a code occurs in one set of texts than in another, and how sure that is. C codes."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy import stats

from cu_fast.ops.checks import check_choice
from cu_fast.unlearn.count import CodeCounts

Test = Literal["auto", "chi2", "fisher"]
Correction = Literal["bh", "none"]


def enrichment(target: CodeCounts, control: CodeCounts) -> np.ndarray:
    """R = log2 of the smoothed frequency in target over that in control.

    Smoothing adds half an occurrence to each count and one token to each total.

    Args:
        target: of the texts that hold the topic.
        control: of texts that do not, for the same codebook and depth.

    Returns:
        R in bits, float64 [C].
    """
    a = (target.counts.numpy() + 0.5) / (target.tokens + 1)
    b = (control.counts.numpy() + 0.5) / (control.tokens + 1)
    return np.log2(a / b)


def p_values(target: CodeCounts, control: CodeCounts, test: Test = "auto") -> np.ndarray:
    """The p-values of each code's occurrence being independent of the set, target or control.

    Args:
        target: of the texts that hold the topic.
        control: of texts that do not, for the same codebook and depth.
        test: "chi2" = Pearson's chi-squared on the 2 x 2 table, 1 degree of freedom. "fisher" = the exact one-sided
            test (more in target). "auto" = Fisher's where an expected count is below 5, else chi-squared.

    Returns:
        float64 [C]; 1 for a code that occurs in neither.

    Raises:
        ValueError: an unknown test.
    """
    check_choice("test", test, get_args(Test))
    a, b = target.counts.numpy().astype(float), control.counts.numpy().astype(float)
    n, m = target.tokens, control.tokens
    seen = np.flatnonzero((a + b > 0) & (a + b < n + m))
    p = np.ones(len(a))
    a, b = a[seen], b[seen]
    observed = np.stack([a, b, n - a, m - b])
    share = (a + b) / (n + m)
    expected = np.stack([n * share, m * share, n * (1 - share), m * (1 - share)])
    exact = np.full(len(seen), test == "fisher") if test != "auto" else expected.min(0) < 5
    p[seen[~exact]] = stats.chisquare(observed[:, ~exact], expected[:, ~exact], ddof=2).pvalue
    exact &= a > 0  # for a = 0 the one-sided p is P(X >= 0) = 1, the value that p starts with
    p[seen[exact]] = stats.hypergeom.sf(a[exact] - 1, n + m, a[exact] + b[exact], n)
    return p


def corrected(p: np.ndarray, tested: np.ndarray, correction: Correction) -> np.ndarray:
    """q: p-values corrected for the many codes.

    Args:
        p: float64 [C].
        tested: bool [C], the codes that occur.
        correction: "bh" (Benjamini-Hochberg over those) or "none".
    """
    if correction == "none":
        return p
    q = np.ones_like(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q
