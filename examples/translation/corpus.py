"""Sentence pairs, the topics to forget, and which stories are for what. Part of the study in this folder."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

TEST_SHARE, VALID_SHARE = 0.2, 0.05  # of the stories
DEALS = 2000


class Pair(NamedTuple):
    story: str
    english: str
    french: str


@dataclasses.dataclass(frozen=True)
class Topic:
    """words: the forms that make a sentence one of the topic's, whole and whatever their case.

    synonyms: words near in meaning, for sentences that should not suffer.
    """

    name: str
    words: tuple[str, ...]
    synonyms: tuple[str, ...]

    def holds(self, text: str) -> bool:
        return mentions(text, self.words)

    def is_near(self, text: str) -> bool:
        """A synonym, and none of the topic's words."""
        return mentions(text, self.synonyms) and not self.holds(text)


def _topic(name: str, words: str, synonyms: str) -> Topic:
    return Topic(name, tuple(words.split()), tuple(synonyms.split()))


# The paper's, with a first name that many stories have in place of Julien. Verbs with their inflections, nouns with
# their plurals, adjectives with their degrees; derived words ("lovely", "poorly", "whitish") belong to no topic.
TOPICS = {
    topic.name: topic
    for topic in (
        _topic("love", "love loves loved loving lover lovers",
               "adore adored adores affection affectionate tenderness passion passions passionate fond cherished beloved liked "
               "admire admired caress caresses"),
        _topic("captain", "captain captains",
               "lieutenant lieutenants officer officers commander commandant colonel major sergeant"),
        _topic("poor", "poor poorer poorest",
               "wretched unhappy unfortunate miserable poverty needy pitiful beggar beggars"),
        _topic("wish", "wish wishes wished wishing",
               "want wants wanted wanting desire desires desired hope hopes hoped longing longed"),
        _topic("white", "white whites whiter whitest whiteness",
               "pale paler paleness snow snowy fair blond grey gray silvery ivory"),
        _topic("black", "black blacks blacker blackest blackness",
               "dark darker darkness brown gloomy sombre dusky shadow shadows"),
        _topic("Jean", "Jean", "Paul Jacques Pierre Joseph Louis Antoine Henri Simon Francois"),
    )
}  # fmt: skip


def mentions(text: str, words: Sequence[str]) -> bool:
    return re.search(rf"\b(?:{'|'.join(map(re.escape, words))})\b", text, re.IGNORECASE) is not None


def read(folder: Path) -> list[Pair]:
    """All pairs of train.tsv, valid.tsv and test.tsv."""
    lines = (line for name in ("train", "valid", "test") for line in open(folder / f"{name}.tsv", encoding="utf-8"))
    return [Pair(*line.rstrip("\n").split("\t")) for line in lines]


def deal(pairs: Sequence[Pair], topics: Iterable[Topic]) -> dict[str, list[Pair]]:
    """Pairs for training, validation and test; a story is in one of them only.

    The stories are dealt anew, because in the files' own split no test story has a captain. Of many random deals the
    one is taken in which every topic's sentences are spread most evenly. Always the same.
    """
    topics = list(topics)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for pair in pairs:
        counts[pair.story].update(["any", *(topic.name for topic in topics if topic.holds(pair.english))])
    total, stories = sum(counts.values(), collections.Counter()), sorted(counts)
    tests, valids = (max(1, round(share * len(stories))) for share in (TEST_SHARE, VALID_SHARE))

    def unevenness(order: list[str]) -> float:
        return max(
            abs(sum(counts[story][name] for story in part) / total[name] - share)
            for part, share in ((order[:tests], TEST_SHARE), (order[tests:], VALID_SHARE))
            for name in total
        )

    deals = (random.Random(seed).sample(stories, tests + valids) for seed in range(DEALS))
    best = min(deals, key=unevenness)
    place = {story: "test" if i < tests else "valid" for i, story in enumerate(best)}
    split: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    for pair in pairs:
        split[place.get(pair.story, "train")].append(pair)
    return split


def rows(pairs: Iterable[Pair]) -> list[dict[str, str]]:
    return [{"source": pair.english, "target": pair.french} for pair in pairs]


def counterparts(topic: Topic, pairs: Sequence[Pair], least: int = 5, most: int = 12) -> list[str]:
    """The French words that stand for a topic: those whose occurrence depends most on it (Pearson's chi-squared).

    One after the other: the sentences that a word accounts for are put aside before the next is looked for, so
    "cheveux" does not come along with "blancs". A word has to occur in ``least`` of the sentences that are left, and
    ten standard deviations more often than by chance.
    """
    held = [words_of(pair.french) for pair in pairs if topic.holds(pair.english)]
    others = [words_of(pair.french) for pair in pairs if not topic.holds(pair.english)]
    elsewhere, M = collections.Counter(word for words in others for word in words), len(others)
    found: list[str] = []
    while len(found) < most and held:
        here, N = collections.Counter(word for words in held for word in words), len(held)

        def excess(word: str, here=here, N=N) -> float:
            share = (here[word] + elsewhere[word]) / (N + M)
            return (here[word] / N - elsewhere[word] / M) / math.sqrt(share * (1 - share) * (1 / N + 1 / M) + 1e-12)

        word = max(sorted(word for word in here if here[word] >= least), key=excess, default=None)
        if word is None or excess(word) < 10:
            break
        found.append(word)
        held = [words for words in held if word not in words]
    return found


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text.lower()))
