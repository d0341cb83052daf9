"""Which codes belong to a topic: counting, statistics, selection. No training (CodeUnlearn, arXiv 2410.10866).

1. Target texts hold the topic, control texts do not: given, or made from the target by :func:`replace_words`.
2. Both run through the model once. At each token the ``depth`` best codes are counted (the paper's S').
3. For each code: the enrichment R = log2 of its frequency in the target over that in the control (smoothed), and
   a test of independence on the 2 x 2 table of positions, corrected for the many codes.
4. Codes with R and q beyond the thresholds make the mask.

Counting streams: memory does not depend on the size of the corpus.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from cu_fast.masks import Mask

logger = logging.getLogger("cu_fast")

TESTS = ("auto", "chi2", "fisher")

# The strengths that ``choose`` is offered: beyond significance, or from the most enriched codes on.
P_LEVELS = (0.001, 0.003, 0.01, 0.03, 0.1)
R_LEVELS = (8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5)


class _Counted(Exception):
    """Ends a forward pass at the layer that is counted: nothing above it is needed."""


@dataclasses.dataclass
class CodeCounts:
    """How often each code was among the ``depth`` best: counts int64 [C] over ``tokens`` positions.

    contexts: for each code at most ``examples`` windows of token ids, int32 [C, examples, window], -1 = none.
    """

    counts: Tensor
    tokens: int
    contexts: Tensor

    def __sub__(self, other: CodeCounts) -> CodeCounts:
        """The counts of what is left of a corpus without a part of it; no contexts."""
        return CodeCounts(self.counts - other.counts, self.tokens - other.tokens, self.contexts[:, :0])


@dataclasses.dataclass(frozen=True)
class CodeEvidence:
    """One chosen code: enrichment R in bits, p and q (corrected p), counts, and where it fired."""

    code: int
    enrichment: float
    p: float
    q: float
    target_count: int
    control_count: int
    examples: list[str]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What :func:`find_mask` found: the mask, and the evidence for each deleted code, most enriched first.

    The evidence quotes the target texts; the mask does not. Keep the mask, and show or drop the evidence.
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
    attachment,
    tokenizer,
    target: Iterable[str] | CodeCounts,
    control: Iterable[str] | CodeCounts,
    *,
    topic: str,
    layer: str | None = None,
    depth: int | None = None,
    min_enrichment: float = 2.0,
    alpha: float = 0.05,
    test: Literal["auto", "chi2", "fisher"] = "auto",
    correction: Literal["bh", "none"] = "bh",
    choose: Callable[[list[Mask]], int] | None = None,
    grow: Literal["significance", "enrichment"] = "significance",
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> Finding:
    """Find the codes that a topic uses and others do not, and make them a mask.

    Args:
        attachment: from ``cu_fast.attach``. tokenizer: the model's.
        target: texts that hold the topic, as the model sees them. control: texts that do not. Iterated once. Either
            may be counted already (:func:`count_codes`, to the same depth): a corpus once for many topics.
        topic: the mask's name.
        layer: which bottleneck; None where there is one.
        depth: codes counted at each token (S'), None = k. Deeper deletes more, also of what others use.
        min_enrichment: delete codes with R > min_enrichment, in bits: 2 = at least four times as frequent.
        alpha: and with q < alpha. test: "chi2", "fisher" (exact, one-sided), or "auto": Fisher where an expected
            count is below 5. correction: "bh" (Benjamini-Hochberg over the codes seen) or "none" (the paper's).
        choose: the strength, by its effect. It is given masks that grow and returns the index of the one to use; with
            a mask for each sequence, one batch can try them all. None: the significant codes.
        grow: which masks. "significance": the significant codes, then all with p below each of P_LEVELS, to forget
            more. "enrichment": of the significant codes those with R above each of R_LEVELS, then all, to spare
            others: the more enriched a code, the less they use it.
        batch_size: texts a forward pass. max_length: tokens a text is cut to.
        progress: a progress bar, on a terminal.

    Returns:
        Finding. Where no code is significant its mask deletes nothing, and a warning says so: ``add_mask`` refuses it.

    Raises:
        ValueError: an empty target or control, an unknown layer, a threshold out of range, counts of another codebook.
    """
    started = time.perf_counter()
    layer = _only_layer(attachment, layer)
    bottleneck = attachment.bottlenecks[layer]
    depth = bottleneck.config.k if depth is None else depth
    if not isinstance(topic, str) or not topic:
        raise ValueError(f"topic is {topic!r}; it should be a name for the mask")
    if not math.isfinite(min_enrichment):
        raise ValueError(f"min_enrichment is {min_enrichment}; it should be a finite number of bits")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it should be in (0, 1]")
    for name, value, allowed in (
        ("grow", grow, ("significance", "enrichment")),
        ("test", test, TESTS),
        ("correction", correction, ("bh", "none")),
    ):
        _check_choice(name, value, allowed)
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
    size = significant = int((q[candidates] < alpha).sum())  # the first ones: q grows with p
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


@torch.no_grad()
def count_codes(
    attachment,
    tokenizer,
    texts: Iterable[str],
    *,
    layer: str,
    depth: int,
    name: str = "texts",
    examples: int = 3,
    window: int = 5,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> CodeCounts:
    """Run texts through the model, unmasked, and count at each token the ``depth`` best codes of a layer.

    examples: contexts kept for each code, the first seen: ``window`` tokens to each side.

    Raises:
        ValueError: there are no texts, or they hold no token; an unknown layer, a number out of range.
        TypeError: texts is one text, or holds something else than texts.
    """
    layer = _only_layer(attachment, layer)
    model, bottleneck = attachment.model, attachment.bottlenecks[layer]
    k, C = bottleneck.config.k, bottleneck.config.num_codes
    for number, value, least, most in (
        ("depth", depth, k, C),
        ("examples", examples, 0, math.inf),
        ("window", window, 0, math.inf),
        ("batch_size", batch_size, 1, math.inf),
        ("max_length", max_length, 1, math.inf),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{number} is {value!r}; it should be an int, at least {least}, at most {most}")
    counts = CodeCounts(
        torch.zeros(C, dtype=torch.int64), 0, torch.full((C, examples, 2 * window + 1), -1, dtype=torch.int32)
    )
    seen = torch.zeros(C, dtype=torch.int64)

    def observe(x: Tensor, observed) -> None:
        if observed is not bottleneck:
            return  # an earlier one, whose output this one's input depends on
        valid = attention.flatten().bool()
        ids = bottleneck.select(x, depth).ids[valid.to(x.device)].cpu().long()
        counts.counts += torch.bincount(ids[ids >= 0], minlength=C)
        counts.tokens += len(ids)
        if examples:
            _keep_contexts(counts.contexts, seen, ids[:, :k], tokens, valid, window)
        raise _Counted

    # An encoder is run alone: what a decoder would answer is not part of the texts.
    runner = model.get_encoder() if model.config.is_encoder_decoder else model
    training = model.training
    model.eval()
    try:
        with attachment.unlearn(None), attachment.observe(observe):
            for batch in tqdm(
                _batches(texts, batch_size), desc=f"count {name}", unit="batch", disable=None if progress else True
            ):
                encoded = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
                tokens, attention = encoded["input_ids"], encoded["attention_mask"]
                if tokens.numel() == 0:  # every text of the batch is empty
                    continue
                with contextlib.suppress(_Counted):
                    runner(input_ids=tokens.to(model.device), attention_mask=attention.to(model.device))
    finally:
        model.train(training)
    if counts.tokens == 0:
        raise ValueError(f"{name} holds no text; give at least one that is not empty")
    return counts


def enrichment(target: CodeCounts, control: CodeCounts) -> np.ndarray:
    """R = log2 of the smoothed frequency in target over that in control, for every code: float64 [C].

    Smoothing adds half an occurrence to each count and one position to each total.
    """
    a = (target.counts.numpy() + 0.5) / (target.tokens + 1)
    b = (control.counts.numpy() + 0.5) / (control.tokens + 1)
    return np.log2(a / b)


def p_values(target: CodeCounts, control: CodeCounts, test: str = "auto") -> np.ndarray:
    """The p-value that a code's occurrence is independent of the set, for every code: float64 [C].

    "chi2": Pearson's chi-squared on the 2 x 2 table, 1 degree of freedom. "fisher": the exact one-sided test
    (more in target). "auto": Fisher where an expected count is below 5, else chi-squared. 1 for an unseen code.
    """
    _check_choice("test", test, TESTS)
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
    exact &= a > 0  # P(X >= 0) = 1, which p holds already
    p[seen[exact]] = stats.hypergeom.sf(a[exact] - 1, n + m, a[exact] + b[exact], n)
    return p


def replace_words(texts: Iterable[str], words: Sequence[str], vocabulary: Iterable[str]) -> Iterator[str]:
    """Control texts: each of the topic's words becomes an unrelated one of similar length and the same case.

    Deterministic: a word's stand-in depends on the word and the vocabulary alone. Words match whole and whatever
    their case; a plural or possessive ending (s, 's) is kept.

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

    counts: of a corpus in which both kinds of code occur. Each deleted code is matched with one of the eight
    free codes whose counts are nearest to its own.
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


def _correct(p: np.ndarray, tested: np.ndarray, correction: str) -> np.ndarray:
    if correction == "none":
        return p
    q = np.ones_like(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q


def _keep_contexts(contexts: Tensor, seen: Tensor, ids: Tensor, tokens: Tensor, valid: Tensor, window: int) -> None:
    """Note where codes fired, until each has its number of contexts. ids [n, k] of the valid positions."""
    examples = contexts.shape[1]
    padded = torch.nn.functional.pad(torch.where(valid.reshape(tokens.shape), tokens, -1), (window, window), value=-1)
    windows = padded.unfold(1, 2 * window + 1, 1).reshape(-1, 2 * window + 1)[valid]
    fresh = seen[ids.clamp(min=0)] < examples
    for position, slot in (fresh & (ids >= 0)).nonzero().tolist():
        code = int(ids[position, slot])
        if seen[code] < examples:
            contexts[code, seen[code]] = windows[position].int()
            seen[code] += 1


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    if isinstance(texts, (str, Mapping)):
        raise TypeError(f"texts is a {type(texts).__name__}; it should be an iterable of strings")
    batch: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts holds {text!r}, a {type(text).__name__}; it should be an iterable of strings")
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(map(repr, allowed))}")


def _only_layer(attachment, layer: str | None) -> str:
    layers = list(attachment.bottlenecks)
    if layer is None and len(layers) == 1:
        return layers[0]
    if layer not in layers:
        raise ValueError(f"layer is {layer!r}; it should be one of {', '.join(layers)}")
    return layer
