"""What is kept in the prefix cache is used under the same masks alone. vLLM says itself how many tokens it took from there."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

from vllm_engines import BLOCK, engine, params, prompt
from vllm_oracle import LONG, TOFU, C, J, tofu

from cu_fast.vllm import admission
from cu_fast.vllm.catalog import Settings, catalog_of

pytestmark = pytest.mark.background(TOFU)


class Cached:
    """An engine with a prefix cache, and what is right."""

    def __init__(self):
        self.llm = engine(enable_prefix_caching=True)
        self.answers = {(tuple(a.prompt), tuple(a.names)): a for a in tofu()["long"]}
        self.prompts = list(dict.fromkeys(ids for ids, _ in self.answers))

    def clear(self):
        assert self.llm.reset_prefix_cache()

    def ask(self, names, which=0, salt=None):
        """(whether tokens came from the cache, whether the answer is right)."""
        ids = self.prompts[which]
        (found,) = self.llm.generate([prompt(ids, salt)], params(names, LONG), use_tqdm=False)
        assert found.num_cached_tokens % BLOCK == 0
        is_right = list(found.outputs[0].token_ids) == self.answers[ids, tuple(sorted(set(names)))].ids
        return found.num_cached_tokens > 0, is_right


@pytest.fixture(scope="module")
def kept():
    return Cached()


@pytest.fixture
def cached(kept):
    kept.clear()
    return kept


HIT, MISS = (True, True), (False, True)


def test_the_same_set_hits_and_another_does_not(cached):
    asked = [([], MISS), ([], HIT), ([C], MISS), ([C], HIT), ([C, J], MISS), ([J, C], HIT), ([], HIT), ([J], MISS),
             ([J], HIT), ([C, C], HIT), ([C], HIT)]  # fmt: skip
    for names, wanted in asked:
        assert cached.ask(names) == wanted, names


def in_turn(cached):
    """60 requests, each prompt under changing sets: (hits, wrong answers)."""
    found = [
        cached.ask(names, which)
        for which in range(len(cached.prompts))
        for names in ([C], [], [J], [C, J], [], [C, J], [J], [C], [], [C])
    ]
    assert len(found) == 60
    return sum(hit for hit, _ in found), sum(not right for _, right in found)


def test_changing_sets(cached):
    assert in_turn(cached) == (60 - 2 * 4, 0)  # the first under each set misses, of two beginnings that prompts share


def test_without_the_salt_answers_are_wrong(cached, monkeypatch):
    """The fault that these tests are for, planted: they would see it."""
    monkeypatch.setattr(admission, "salted", lambda digest, salt: salt)
    hits, wrong = in_turn(cached)
    assert hits > 52 and wrong >= 10


def test_a_clients_salt_divides_further(cached):
    assert cached.ask([C], salt="x") == MISS
    assert cached.ask([C], salt="x") == HIT
    assert cached.ask([C], salt="y") == MISS
    assert cached.ask([C]) == MISS
    assert cached.ask([], salt="x") == MISS


def test_no_salt_forges_another_set(cached):
    catalog = catalog_of(Settings.of(cached.llm.llm_engine.vllm_config))
    nothing, under_c = catalog.digest(()), catalog.digest((C,))
    assert cached.ask([C]) == MISS and cached.ask([C], salt="x") == MISS
    for salt in (under_c, f"{under_c}:", f"{under_c}:x", f":{under_c}", f"{nothing}:", "", ":", "x"):
        if salt:  # vLLM refuses an empty one
            assert cached.ask([], salt=salt) == MISS, salt
    assert cached.ask([C]) == HIT


def test_the_salt_is_the_digest_and_then_the_clients():
    assert admission.salted("0" * 64, None) == "0" * 64 + ":"
    assert admission.salted("0" * 64, "a:b") == "0" * 64 + ":a:b"
    assert admission.salted("0" * 64, "") == admission.salted("0" * 64, None)
