"""What plan_select decides with the sizes of a real GPU (csrc/cuda/select.h): a plan needs none, so every card is asked."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from calls import cosine
from hurtful import normal
from test_scan_bounds import emulated as bounds_of
from tiers import heavy

from cu_fast import ops
from cu_fast.kernels import native
from cu_fast.ops import packing

pytestmark = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
CARDS = {  # multiprocessors and compute capability
    "A100": (108, 8, 0), "3090": (82, 8, 6), "4090": (128, 8, 9), "H100": (132, 9, 0), "B200": (148, 10, 0),
    "B300": (148, 10, 3), "5090": (170, 12, 0),
}  # fmt: skip
MOST = 512 << 20  # bytes of a selection's memory


class Planned:
    """A plan's text, read back."""

    def __init__(self, T, C, E, k, card="H100", plane=True):
        self.text = torch.ops.cu_fast.cuda_selection_plan(T, C, E, k, plane, *CARDS.get(card, card))
        self.scans = self.text.startswith("int8 scan: ")
        assert self.scans or self.text.startswith("every code scored: ")
        self.chunk = self.number(r"(\d+) tokens at a time")
        self.memory = self.number(r"(\d+) bytes of memory")
        if "predicted" in self.text:
            self.candidates = self.number(r"([\d.]+) candidates per token")
            self.places = self.number(r"for (\d+) places")
            self.scored = self.number(r"([\d.]+) of them scored")
            self.scan, self.exact = self.number(r"([\d.]+) us scanned"), self.number(r"([\d.]+) us with every code")

    def number(self, pattern):
        return float(re.search(pattern, self.text)[1])


# -- a card's rates ----------------------------------------------------------------------------------------------


def test_times_by_hand():
    """One token: bytes from memory, at nine tenths of 3.35 and of 2.04 TB/s; the sample is a sixteenth."""
    entries = 2048 * 65_536
    for card, rate in (("H100", 3.015e6), ("A100", 1.836e6)):
        p = Planned(1, 65_536, 2048, 64, card)
        assert p.exact == pytest.approx(5 + 3 * entries / rate, abs=0.06)
        scored = p.scored * 2048 * 3 / ({"H100": 5.5e6, "A100": 4e6}[card])
        assert p.scan == pytest.approx(50 + 17 / 16 * entries / rate + scored, abs=0.06)
    # 2,048 tokens, in two chunks: a tile of 64 reads the plane, and its own digits for each 256 codes; or products.
    p = Planned(2048, 65_536, 2048, 64)
    scored = 2048 * p.scored * 2048 * 3 / 5.5e6
    assert p.scan == pytest.approx(100 + 17 / 16 * 32 * 1.5 * entries / 5.5e6 + scored, abs=1)
    assert p.exact == pytest.approx(5 + 9 * 2048 * entries / (0.6 * 989e6), abs=1)
    p = Planned(2048, 65_536, 2048, 64, "B300")
    scored = 2048 * p.scored * 2048 * 3 / 8e6
    assert p.scan == pytest.approx(100 + 17 / 16 * 2 * 2048 * entries / (0.6 * 82e6) + scored, abs=1)
    # Few tokens are multiplied by dp4a.
    assert Planned(4, 65_536, 2048, 64, "B300").exact == pytest.approx(5 + 9 * 4 * entries / 70e6, abs=0.06)


def test_plans_differ_where_cards_do():
    scans = {card: Planned(1, 50_000, 1024, 64, card).scans for card in CARDS}
    assert scans == {
        "A100": True,
        "3090": True,
        "4090": True,
        "H100": False,
        "B200": False,
        "B300": False,
        "5090": True,
    }
    scans = {card: Planned(100, 65_536, 1024, 64, card).scans for card in CARDS}
    assert all(scans.values())
    # Where int8 is slow on matrix units, two products instead of nine are worth more.
    assert Planned(16, 65_536, 2048, 64, "B300").scans and not Planned(16, 65_536, 2048, 64, "B200").scans


@pytest.mark.parametrize(
    "unknown, known", [((7, 5), "A100"), ((8, 7), "3090"), ((9, 9), "H100"), ((11, 0), "B300"), ((12, 1), "5090")]
)
def test_an_unknown_card_has_the_rates_of_the_nearest_older(unknown, known):
    like = Planned(256, 65_536, 2048, 64, known)
    got = Planned(256, 65_536, 2048, 64, (CARDS[known][0], *unknown))
    assert got.text == like.text
    others = [
        Planned(256, 65_536, 2048, 64, (CARDS[known][0], *CARDS[card][1:])).text for card in CARDS if card != known
    ]
    assert got.text not in others


def test_the_plan_of_packed_codes_is_for_their_card(monkeypatch):
    class Factor(list):
        device = torch.device("cuda")

    monkeypatch.setattr(packing, "resolve", lambda impl, device: impl)
    found = SimpleNamespace(multi_processor_count=108, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    for scan in (None, "a plane"):
        packed = ops.PackedCodes(None, Factor(25_000 * [1.0]), None, 512, "dot", scan)
        want = Planned(300, 25_000, 512, 8, "A100", scan is not None)
        assert ops.selection_plan(300, packed, 8) == want.text and want.scans == (scan is not None)


# -- candidates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "E, C, k, counted",
    [  # counted in fp64, by core/scan.h: test_candidates_of_the_guess of test_scan_bounds.py
        (2048, 65_536, 64, 510),
        (4096, 16_384, 64, 680),
        (512, 25_000, 64, 342),
        (512, 25_000, 8, 134),
    ],
)
def test_expected_candidates_are_near_what_was_counted(E, C, k, counted):
    expected = Planned(256, C, E, k).candidates
    assert counted / 1.5 < expected < counted * 1.5


@pytest.mark.parametrize(
    "E, C, k",
    [
        (512, 25_000, 8),
        (512, 25_000, 64),
        (96, 4000, 100),
        pytest.param(4096, 16_384, 64, marks=heavy),
        pytest.param(2048, 65_536, 64, marks=heavy),
    ],
)
def test_expected_candidates_are_those_of_the_plans_sample(E, C, k):
    """The threshold as the kernels take it: from maxima of four codes each. And what is scored after it."""
    z, codes = normal(32, E), normal(C, E, seed=1)
    approx, bound = bounds_of(z, codes, cosine(codes), None, None)
    tiles = -(-C // 256)
    sample = min(tiles, max(-(-tiles // 16), -(-16 * k // 256)))
    starts = [visit * tiles // sample * 256 for visit in range(sample)]
    sampled = torch.cat([approx[:, start : start + 256] for start in starts], 1)
    expected = k * sampled.shape[1] / C
    rank = math.ceil(expected + 3 * math.sqrt(expected) + 1)
    padded = torch.nn.functional.pad(sampled, (0, -sampled.shape[1] % 4), value=-math.inf)
    tau = padded.unflatten(1, (-1, 4)).amax(2).topk(rank).values[:, -1:]
    kth = approx.topk(k).values[:, -1:]
    p = Planned(256, C, E, k)
    for got, least in ((p.candidates, tau), (p.scored, kth)):
        counted = float((approx + bound >= least).sum(1).double().mean())
        assert counted / 1.25 < got < counted * 1.25


def test_a_scan_whose_candidates_have_no_places_is_refused():
    p = Planned(256, 65_536, 16_384, 64, "A100")
    assert p.scan < p.exact and p.candidates > p.places == 2048 and not p.scans
    p = Planned(256, 65_536, 8192, 64)
    assert p.scan < p.exact and p.candidates < 2048 and p.scans
    # More than 2,048 where k is larger.
    p = Planned(256, 300_000, 8192, 300)
    assert p.places == 2400 and p.scans == (p.candidates <= 2400)


def test_scoring_candidates_is_part_of_the_prediction():
    """Of 8,192 codes about 2,300 have to be scored: one by one they cost more than all of them in tiles."""
    p = Planned(256, 8192, 4096, 1024)
    assert p.candidates < p.places and p.scored > 2000 and p.scan > p.exact and not p.scans
    assert Planned(256, 8192, 4096, 8).scans


# -- memory ------------------------------------------------------------------------------------------------------


def test_memory_is_bounded():
    largest, single = 0, 0
    for T in (1, 5, 100, 1000, 10**6):
        for C in (64, 5000, 65_536, 10**6, 10**8):
            for E in (32, 2048, 65_535):
                for k in (1, 64, 300, 1024, 1025, 10_000, 10**6, C):
                    for card in ("H100", (10**4, 9, 0)):
                        for plane in (True, False):
                            if k > C:
                                continue
                            p = Planned(T, C, E, k, card, plane)
                            # A token needs its digits, the k best of one part, and with hits as many deleted ones,
                            # twice where they are merged in memory; a scan's sample as well.
                            least = 3 * (E + 63) + 32 * k + 200
                            least += (2 * (E + 31) + 16 * p.places + 16 * C // 256 // 16 + 600) * 4 if p.scans else 0
                            assert p.memory <= max(MOST, least if p.chunk == 1 else 0), (T, C, E, k, card, plane)
                            largest, single = max(largest, p.memory), single + (p.memory > MOST)
    assert largest > MOST / 2 and single


def test_more_fits_where_less_is_needed():
    assert Planned(8192, 65_536, 512, 64, plane=False).chunk == 8192
    assert Planned(8192, 65_536, 512, 64).chunk == 1024
    assert 128 <= Planned(8192, 65_536, 512, 65_536, plane=False).chunk < 1024
