"""A model that is split over two processes: both compute every splice whole, and have to choose alike."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

from vllm_engines import expected
from vllm_oracle import TOFU, read, tofu
from vllm_parallel import PARALLEL

pytestmark = [pytest.mark.background(TOFU), pytest.mark.background(PARALLEL)]


@pytest.fixture(scope="module")
def found():
    return read(PARALLEL)


@pytest.mark.parametrize("prompts", ["short", "long"])
def test_it_says_what_transformers_says(found, prompts):
    assert found["says"][prompts] == [answer.ids for answer in tofu()[prompts]]


def test_both_processes_count_the_same(found):
    first, second = found["reports"]
    assert first == second
    wanted = expected([answer for answers in tofu().values() for answer in answers])
    assert (first["tokens"], first["masked_tokens"]) == (wanted["tokens"], wanted["masked"])
    assert sum(layer["hits"] for layer in first["layers"].values()) == wanted["hits"] > 0
