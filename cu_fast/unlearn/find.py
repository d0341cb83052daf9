"""Which codes belong to a topic: counting, statistics, selection. No training (CodeUnlearn, arXiv 2410.10866).

1. Target texts hold the topic, control texts do not: given, or made from the target by :func:`replace_words`.
2. Both run through the model once. At each token the ``depth`` best codes are counted (the paper's S').
3. For each code: the enrichment R = log2 of its frequency in the target over that in the control (smoothed), and
   a test of independence on the 2 x 2 table of positions, corrected for the many codes.
4. Codes with R and q beyond the thresholds make the mask.

Counting (count.py) streams: memory does not depend on the size of the corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from scipy import stats

from cu_fast.masks import Mask
from cu_fast.ops.checks import check_choice
from cu_fast.unlearn.count import CodeCounts, count_codes, only_layer

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer

logger = logging.getLogger("cu_fast")

Test = Literal["auto", "chi2", "fisher"]
Correction = Literal["bh", "none"]
Grow = Literal["significance", "enrichment"]

# The strengths that ``choose`` may pick from: bounds of p for grow="significance", of R in bits for "enrichment".
P_LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1)
R_LEVELS = (8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5)


@dataclasses.dataclass(frozen=True)
class CodeEvidence:
    """One chosen code.

    Attributes:
        code: its id.
        enrichment: R, in bits.
        p: p-value.
        q: p-value corrected for the many codes.
        target_count: tokens of the target texts at which it was among the ``depth`` best.
        control_count: the same of the control texts.
        examples: target texts around the first places where it fired.
    """

    code: int
    enrichment: float
    p: float
    q: float
    target_count: int
    control_count: int
    examples: list[str]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What :func:`find_mask` found.

    The evidence quotes the target texts; the mask does not. Keep the mask, and show or drop the evidence.

    Attributes:
        mask: deletes the codes.
        codes: the evidence for each deleted code, most enriched first.
        target_tokens: tokens counted in the target texts.
        control_tokens: tokens counted in the control texts.
        seconds: that it took.
    """

    mask: Mask
    codes: list[CodeEvidence]
    target_tokens: int
    control_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; without the mask's bits."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["mask"] = {"topic": self.mask.topic, "digest": self.mask.digest, "num_deleted": self.mask.num_deleted}
        values["codes"] = [dataclasses.asdict(code) for code in self.codes]
        return values


def find_mask(
    attachment: Attachment,
    tokenizer: Tokenizer,
    target: Iterable[str] | CodeCounts,
    control: Iterable[str] | CodeCounts,
    *,
    topic: str,
    layer: str | None = None,
    depth: int | None = None,
    min_enrichment: float = 2.0,
    alpha: float = 0.05,
    test: Test = "auto",
    correction: Correction = "bh",
    choose: Callable[[list[Mask]], int] | None = None,
    grow: Grow = "significance",
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> Finding:
    """Find the codes that a topic uses and others do not, and make them a mask.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        target: texts that hold the topic, as the model sees them, iterated once; or their :class:`CodeCounts`.
        control: texts that do not, iterated once; or their :class:`CodeCounts` to the same depth, so that a corpus is
            counted once for many topics.
        topic: the mask's topic, and its name.
        layer: name of the layer whose codes are counted; None = the only one that has a bottleneck.
        depth: codes counted per token (S'), at least k; None = k. Deeper deletes more, also of what other topics use.
        min_enrichment: in bits: delete codes with R above it. 2 = at least four times as frequent.
        alpha: delete codes with q below it, in (0, 1].
        test: "chi2", "fisher" (exact, one-sided), or "auto" = Fisher's where an expected count is below 5.
        correction: "bh" (Benjamini-Hochberg over the codes that occur) or "none" (the paper's).
        choose: picks the strength by its effect: it is given masks that grow and returns the index of the one to use.
            With a mask per sequence, one batch can try them all. None = the mask of the significant codes.
        grow: which masks ``choose`` is given. "significance" = the significant codes, then all with p below each of
            P_LEVELS, to forget more. "enrichment" = of the significant codes those with R above each of R_LEVELS, then
            all, to spare other topics, which use a code the less the more enriched it is.
        batch_size: texts per forward pass.
        max_length: tokens that a text is cut to.
        progress: show a progress bar, on a terminal.

    Returns:
        Finding. Where no code is significant its mask deletes nothing, and a warning says so: ``add_mask`` refuses it.

    Raises:
        ValueError: an empty target or control, an unknown layer or choice, a number out of range, counts of another
            codebook.
        TypeError: target or control is one text, or holds anything but texts.
    """
    started = time.perf_counter()
    layer = only_layer(attachment, layer)
    bottleneck = attachment.bottlenecks[layer]
    depth = bottleneck.config.k if depth is None else depth
    if not isinstance(topic, str) or not topic:
        raise ValueError(f"topic is {topic!r}; it should be a name for the mask")
    if not math.isfinite(min_enrichment):
        raise ValueError(f"min_enrichment is {min_enrichment}; it should be a finite number of bits")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it should be in (0, 1]")
    check_choice("grow", grow, get_args(Grow))
    check_choice("test", test, get_args(Test))
    check_choice("correction", correction, get_args(Correction))
    options = dict(layer=layer, depth=depth, batch_size=batch_size, max_length=max_length, progress=progress)
    found, control = (
        texts if isinstance(texts, CodeCounts) else count_codes(attachment, tokenizer, texts, name=name, **options)
        for name, texts in (("target", target), ("control", control))
    )
    for name, counted in (("target", found), ("control", control)):
        if len(counted.counts) != bottleneck.config.num_codes:
            raise ValueError(
                f"{name} counts {len(counted.counts)} codes; layer {layer!r} has {bottleneck.config.num_codes}, so count again"
            )
    R = enrichment(found, control)
    p = p_values(found, control, test)
    q = _correct(p, (found.counts + control.counts).numpy() > 0, correction)
    candidates = np.flatnonzero(R > min_enrichment)
    candidates = candidates[np.lexsort((-R[candidates], p[candidates]))]
    # The significant codes are the first of the candidates, which are sorted by p: q grows with p.
    size = significant = int((q[candidates] < alpha).sum())
    if significant == 0:
        logger.warning(
            "topic %r: no code has enrichment above %g and q below %g, so the mask deletes nothing and add_mask would "
            "refuse it; lower the thresholds, give more target texts, or a deeper depth",
            topic, min_enrichment, alpha,
        )  # fmt: skip

    def mask_of(size: int) -> Mask:
        return Mask.from_ids(
            torch.from_numpy(candidates[:size]),
            num_codes=bottleneck.config.num_codes,
            codebook_sha256=bottleneck.codebook_sha256(),
            topic=topic,
            layer=layer,
            method={
                "name": "enrichment",
                "depth": depth,
                "min_enrichment": min_enrichment,
                "alpha": alpha,
                "test": test,
                "correction": correction,
                "grow": grow,
                "significant": significant,
                "target_tokens": found.tokens,
                "control_tokens": control.tokens,
            },
        )

    if choose is not None and significant:
        if grow == "significance":
            sizes = {significant, *(int((p[candidates] < level).sum()) for level in P_LEVELS)}
            sizes = {n for n in sizes if n >= significant}
        else:
            candidates = candidates[:significant][np.argsort(-R[candidates[:significant]], kind="stable")]
            sizes = {significant, *(int((R[candidates] > level).sum()) for level in R_LEVELS)} - {0}
        ladder = sorted(sizes)
        size = ladder[choose([mask_of(n) for n in ladder])]
    chosen = sorted(candidates[:size].tolist(), key=lambda j: (-R[j], j))
    codes = [
        CodeEvidence(
            j, float(R[j]), float(p[j]), float(q[j]), int(found.counts[j]), int(control.counts[j]),
            [tokenizer.decode(window[window >= 0]) for window in found.contexts[j] if (window >= 0).any()],
        )
        for j in chosen
    ]  # fmt: skip
    return Finding(mask_of(size), codes, found.tokens, control.tokens, time.perf_counter() - started)


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


def replace_words(texts: Iterable[str], words: Sequence[str], vocabulary: Iterable[str]) -> Iterator[str]:
    """Control texts: each of the topic's words becomes an unrelated one of similar length and the same case.

    Deterministic: a word's stand-in depends on the word and the vocabulary alone. Only whole words match, in any case;
    a plural or possessive ending (s, 's) is kept.

    Args:
        texts: that hold the topic.
        words: the topic's.
        vocabulary: texts whose words of two letters or more are the stand-ins.

    Returns:
        The control texts, one per text, made as they are asked for.

    Raises:
        ValueError: no words, an empty one, or no word in the vocabulary that is not one of the topic's.
        TypeError: words or vocabulary is one string.
    """
    for name, given in (("words", words), ("vocabulary", vocabulary)):
        if isinstance(given, str):
            raise TypeError(f"{name} is {given!r}; it should be a list of strings")
    if not all(word.strip() for word in words):
        raise ValueError(f"words is {list(words)!r}; none of them should be empty")
    topic = {word.lower() for word in words}
    pool = sorted({w.lower() for text in vocabulary for w in re.findall(r"[^\W\d_]{2,}", text)} - topic)
    if not topic or not pool:
        raise ValueError(
            f"words holds {len(topic)} and vocabulary {len(pool)} other words; both should hold at least one"
        )

    def stand_in(match: re.Match) -> str:
        word, ending = match.group(1), match.group(2) or ""
        near = sorted(pool, key=lambda other: abs(len(other) - len(word)))[: max(8, len(pool) // 50)]
        pick = near[int(hashlib.sha256(word.lower().encode()).hexdigest(), 16) % len(near)]
        return (pick.upper() if word.isupper() else pick.capitalize() if word[0].isupper() else pick) + ending

    alternatives = "|".join(sorted(map(re.escape, topic), key=len, reverse=True))
    pattern = re.compile(rf"\b({alternatives})('?s)?\b", re.IGNORECASE)
    return (pattern.sub(stand_in, text) for text in texts)


def random_mask(mask: Mask, counts: CodeCounts, seed: int = 0) -> Mask:
    """The control for a mask: as many other codes, drawn at random among those nearest in frequency.

    Each deleted code is matched with one of the eight codes, of those still free, whose counts are nearest to its own.

    Args:
        mask: deletes the topic.
        counts: of a corpus in which both kinds of code occur.
        seed: of the draws.

    Returns:
        A mask that deletes as many codes, none of them the mask's.

    Raises:
        ValueError: the mask deletes more than half of the codes.
    """
    generator = np.random.default_rng(seed)
    count = counts.counts.numpy()
    free = np.setdiff1d(np.arange(mask.num_codes), mask.ids().numpy())
    if len(free) < mask.num_deleted:
        raise ValueError(f"mask deletes {mask.num_deleted} of {mask.num_codes} codes; too few are left to match them")
    drawn = []
    for code in generator.permutation(mask.ids().numpy()):
        near = np.argsort(np.abs(count[free] - count[code]), kind="stable")[:8]
        drawn.append(pick := generator.choice(free[near]))
        free = free[free != pick]
    return Mask.from_ids(
        [int(j) for j in drawn], num_codes=mask.num_codes, codebook_sha256=mask.codebook_sha256,
        topic=f"random control of {mask.topic}", layer=mask.layer, method={"name": "random", "seed": seed},
    )  # fmt: skip


def _correct(p: np.ndarray, tested: np.ndarray, correction: Correction) -> np.ndarray:
    if correction == "none":
        return p
    q = np.ones_like(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q
