"""Controls: texts without a topic, made from those with it; and a mask of other codes for a mask of a topic."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cu_fast.masks import Mask
from cu_fast.unlearn.count import CodeCounts


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
        ValueError: the mask deletes more than half of the codes, or counts are of another codebook.
    """
    if counts.source is not None and counts.source.codebook_sha256 != mask.codebook_sha256:
        raise ValueError(
            f"counts are of {counts.source}; the mask is of codebook {mask.codebook_sha256[:12]}...: count again"
        )
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
