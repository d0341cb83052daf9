"""Which codes belong to a topic: counting, statistics, selection. No training (CodeUnlearn, arXiv 2410.10866).

1. Target texts hold the topic, control texts do not: given, or made from the target by :func:`replace_words`.
   Neighbours are further controls, of topics near this one: what is chosen has to tell it from each of them.
2. All run through the model once. At each token the codes that it keeps, or the ``depth`` best (the paper's S'), are
   counted.
3. A rank, ``rank.py``, sorts the codes and says how many of them there are.
4. The first of them make the mask.

Counting (count.py) streams: memory does not depend on the size of the corpus.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from cu_fast.masks import Mask
from cu_fast.ops.checks import check_choice
from cu_fast.unlearn.count import CodeCounts, check_depth, count_codes, sae_of
from cu_fast.unlearn.rank import Evidence, Rank, by_activations, by_enrichment, by_share
from cu_fast.unlearn.reading import Source, only_layer
from cu_fast.unlearn.statistics import Correction, Test

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer

logger = logging.getLogger("cu_fast")

Grow = Literal["significance", "enrichment"]

# The strengths that ``choose`` may pick from: bounds of p for grow="significance", of R in bits for "enrichment".
P_LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1)
R_LEVELS = (8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5)
SIZE = 20  # latents of ranks "saebench" and "dsg", as their papers have it


@dataclasses.dataclass(frozen=True)
class CodeEvidence:
    """One chosen code. Where there are neighbours, each figure is the one that speaks least for it.

    Attributes:
        code: its id.
        enrichment: R, in bits.
        p: p-value.
        q: p-value corrected for the many codes.
        target_count: tokens of the target texts at which it was among the ``depth`` best, or fired.
        control_count: the same of the control texts.
        examples: target texts around the first places where it fired.
        against: "control", or the name of the neighbour, whose R is the smallest.
        score: what it was ranked by: R; for rank "saebench" the share of the target's tokens at which it fires; for
            "dsg" the mean square of its activation over them.
    """

    code: int
    enrichment: float
    p: float
    q: float
    target_count: int
    control_count: int
    examples: list[str]
    against: str = "control"
    score: float = math.nan


@dataclasses.dataclass(frozen=True)
class Finding:
    """What :func:`find_mask` found.

    The evidence quotes the target texts; the mask does not. Keep the mask, and show or drop the evidence.

    Attributes:
        mask: deletes the codes.
        codes: the evidence for each deleted code, highest score first.
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
    neighbours: Mapping[str, Iterable[str] | CodeCounts] | None = None,
    rank: Rank = "enrichment",
    size: int | None = None,
    depth: int | None = None,
    min_enrichment: float = 2.0,
    alpha: float = 0.05,
    test: Test = "auto",
    correction: Correction = "bh",
    retain_threshold: float = 0.01,
    percentile: float = 95.0,
    choose: Callable[[list[Mask]], int] | None = None,
    grow: Grow = "significance",
    strength: float | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> Finding:
    """Find the codes that a topic uses and others do not, and make them a mask.

    Where ``torch.distributed`` is initialised, call it in every process: see :func:`count_codes`.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        target: texts that hold the topic, as the model sees them, iterated once; or their :class:`CodeCounts`.
        control: texts that do not, iterated once; or their :class:`CodeCounts` to the same depth, so that a corpus is
            counted once for many topics.
        topic: the mask's topic, and its name.
        layer: name of the layer whose codes are counted; None = the only one that has a splice.
        neighbours: name -> texts, or counts, of a topic near this one that is to stay. What is asked of a code against
            the control is asked against each of them too. Give them to the gate as well (:func:`fit_gate`).
        rank: "enrichment" = codes with R above min_enrichment and q below alpha. "saebench" = codes that less than
            retain_threshold of the control's tokens keep, those first that most of the target's do (Farrell et al.,
            arXiv 2410.19278, as SAEBench computes it). "dsg" = latents whose mean squared activation in the target,
            divided by that in the control, is at least the percentile of all latents', those first whose mean square in
            the target is largest (Dynamic SAE Guardrails, arXiv 2504.08192). It needs a sparse autoencoder.
        size: codes of the mask, the first by the rank; None = all that pass for "enrichment", 20 for the others.
        depth: codes counted per token (S'), at least k; None = those that it keeps, the only choice for latents with a
            threshold. Deeper deletes more, also of what other topics use.
        min_enrichment: in bits: delete codes with R above it. 2 = at least four times as frequent.
        alpha: delete codes with q below it, in (0, 1].
        test: "chi2", "fisher" (exact, one-sided), or "auto" = Fisher's where an expected count is below 5.
        correction: "bh" (Benjamini-Hochberg over the codes that occur) or "none" (the paper's).
        retain_threshold: of rank "saebench": a share of tokens, in (0, 1].
        percentile: of rank "dsg", in [0, 100].
        choose: picks the strength by its effect: it is given masks that grow and returns the index of the one to use.
            With a mask per sequence, one batch can try them all. None = the mask of the significant codes. For rank
            "enrichment" without a size.
        grow: which masks ``choose`` is given. "significance" = the significant codes, then all with p below each of
            P_LEVELS, to forget more. "enrichment" = of the significant codes those with R above each of R_LEVELS, then
            all, to spare other topics, which use a code the less the more enriched it is.
        strength: of the mask; None = what the splice takes out by itself.
        batch_size: texts per forward pass.
        max_length: tokens that a text is cut to.
        progress: show a progress bar, on a terminal.

    Returns:
        Finding. Where no code passes its mask deletes nothing, and a warning says so: ``add_mask`` refuses it. The mask of
        a sparse autoencoder carries its rows.

    Raises:
        ValueError: an empty target, control or neighbour, an unknown layer or choice, a number out of range, counts of
            another codebook, layer or depth, or without squares, rank "dsg" of a codebook, or ``choose`` with another rank or a size.
        TypeError: target, control or a neighbour is one text, or holds anything but texts.
        RuntimeError: the masks brought their rows, and there is no autoencoder.
    """
    started = time.perf_counter()
    layer = only_layer(attachment, layer)
    splice = attachment.bottlenecks[layer]
    depth = splice.k if depth is None else depth
    neighbours = dict(neighbours or {})
    _check(topic, neighbours, rank, size, min_enrichment, alpha, test, correction, retain_threshold, percentile, grow)
    check_depth(splice, layer, depth)
    if choose is not None and (rank != "enrichment" or size is not None):
        raise ValueError(
            f"choose is given, and rank is {rank!r} with size {size}; it picks among masks of 'enrichment'"
        )
    if rank == "dsg":
        sae_of(splice, layer)
    options = dict(
        layer=layer, depth=depth, squares=rank == "dsg", batch_size=batch_size, max_length=max_length, progress=progress
    )
    counted = {
        name: texts
        if isinstance(texts, CodeCounts)
        else count_codes(attachment, tokenizer, texts, name=name, **options)
        for name, texts in {"target": target, "control": control, **neighbours}.items()
    }
    source = Source.of(attachment, layer, depth)
    for name, counts in counted.items():
        source.check(name, counts.source)
        if len(counts.counts) != splice.num_codes:
            raise ValueError(
                f"{name} counts {len(counts.counts)} codes; layer {layer!r} has {splice.num_codes}, so count again"
            )
        if rank == "dsg" and counts.squares is None:
            raise ValueError(f"{name} is counted without squares, which rank 'dsg' needs; count with squares=True")
    found = counted.pop("target")
    evidence = Evidence.of(found, counted, test, correction)
    if rank == "enrichment":
        candidates, passing = by_enrichment(evidence, min_enrichment, alpha)
    elif rank == "saebench":
        candidates, passing = by_share(evidence, found, counted, retain_threshold)
    else:
        candidates, passing = by_activations(evidence, found, counted, percentile)
    if passing == 0:
        logger.warning(
            "topic %r: no code has %s, so the mask deletes nothing and add_mask would refuse it; lower the thresholds, "
            "give more target texts, or a deeper depth",
            topic,
            {
                "enrichment": f"enrichment above {min_enrichment:g} and q below {alpha:g}",
                "saebench": f"a share below {retain_threshold:g} in the control",
                "dsg": f"a ratio of activations at percentile {percentile:g} that is above 0",
            }[rank],
        )
    method = {
        "name": rank,
        "depth": depth,
        **(
            dict(min_enrichment=min_enrichment, alpha=alpha, grow=grow, significant=passing)
            if rank == "enrichment"
            else dict(retain_threshold=retain_threshold) if rank == "saebench" else dict(percentile=percentile)
        ),
        "test": test,
        "correction": correction,
        "target_tokens": found.tokens,
        "control_tokens": counted["control"].tokens,
        **({"neighbours": {name: counted[name].tokens for name in neighbours}} if neighbours else {}),
    }  # fmt: skip

    def mask_of(codes: np.ndarray) -> Mask:
        identity: dict[str, Any] = dict(num_codes=splice.num_codes, codebook_sha256=splice.codebook_sha256())
        if splice.has_latents and splice.sae is not None:
            identity = dict(sae=splice.sae)
        return Mask.from_ids(
            torch.from_numpy(codes), topic=topic, layer=layer, method=method, strength=strength, **identity
        )

    chosen = candidates[:passing]
    if choose is not None and passing:
        ladder = _ladder(candidates, passing, evidence, grow)
        chosen = ladder[choose([mask_of(codes) for codes in ladder])]
    else:
        if rank == "enrichment" and size is not None:
            chosen = chosen[np.argsort(-evidence.score[chosen], kind="stable")]
        chosen = chosen[: size if rank == "enrichment" else size or SIZE]
    codes = [
        CodeEvidence(
            j, float(evidence.R[j]), float(evidence.p[j]), float(evidence.q[j]), int(found.counts[j]),
            int(counted["control"].counts[j]),
            [tokenizer.decode(window[window >= 0]) for window in found.contexts[j] if (window >= 0).any()],
            evidence.against[j], float(evidence.score[j]),
        )
        for j in sorted(chosen.tolist(), key=lambda j: (-evidence.score[j], j))
    ]  # fmt: skip
    seconds = time.perf_counter() - started
    return Finding(mask_of(chosen), codes, found.tokens, counted["control"].tokens, seconds)


def _ladder(candidates: np.ndarray, significant: int, evidence: Evidence, grow: Grow) -> list[np.ndarray]:
    """Sets of codes that grow; see ``grow`` of :func:`find_mask`."""
    if grow == "significance":
        beyond = evidence.p[candidates[significant:]]
        sizes = {significant, *(significant + int((beyond < level).sum()) for level in P_LEVELS)}
        return [candidates[:size] for size in sorted(sizes)]
    R = evidence.R[candidates[:significant]]
    enriched = candidates[:significant][np.argsort(-R, kind="stable")]
    return [enriched[:size] for size in sorted({significant, *(int((R > level).sum()) for level in R_LEVELS)} - {0})]


def _check(
    topic: str,
    neighbours: Mapping[str, Any],
    rank: Rank,
    size: int | None,
    min_enrichment: float,
    alpha: float,
    test: Test,
    correction: Correction,
    retain_threshold: float,
    percentile: float,
    grow: Grow,
) -> None:
    if not isinstance(topic, str) or not topic:
        raise ValueError(f"topic is {topic!r}; it should be a name for the mask")
    for name in neighbours:
        if not isinstance(name, str) or name in ("", "target", "control"):
            raise ValueError(f"neighbours has the name {name!r}; it should be a name, and not 'target' or 'control'")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"size is {size!r}; it should be an int, at least 1, or None")
    if not math.isfinite(min_enrichment):
        raise ValueError(f"min_enrichment is {min_enrichment}; it should be a finite number of bits")
    for name, value in (("alpha", alpha), ("retain_threshold", retain_threshold)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it should be in (0, 1]")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it should be in [0, 100]")
    check_choice("rank", rank, get_args(Rank))
    check_choice("grow", grow, get_args(Grow))
    check_choice("test", test, get_args(Test))
    check_choice("correction", correction, get_args(Correction))
