"""The V2 model runner, which GPUs use, says what transformers says. Here Triton's interpreter runs its kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

from vllm_engines import expected
from vllm_oracle import TOFU, C, J, read, tofu
from vllm_v2 import V2

pytestmark = [pytest.mark.background(TOFU), pytest.mark.background(V2)]
CASES = {"mixed": "short", "chunked": "long", "speculation": "long", "preemption": "long"}


@pytest.fixture(scope="module")
def found():
    return read(V2)


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_transformers_says(found, case):
    answers = tofu()[CASES[case]]
    assert found.keys() == CASES.keys() and "vllm.v1.worker.gpu.model_runner" in found[case]["runner"]
    assert found[case]["says"] == [answer.ids for answer in answers]
    assert found[case]["held"] == 1  # that of a request which came after them, until the next step


@pytest.mark.parametrize("case", ["mixed", "chunked"])
def test_what_it_counts(found, case):
    plain = expected(tofu()[CASES[case]])
    assert {name: found[case][name] for name in plain} == plain
    assert plain["hits"] > 100 and plain["masked"].keys() == {C, J}
    if case == "chunked":
        assert found[case]["steps"] > plain["tokens"] / 32


@pytest.mark.parametrize("case", ["speculation", "preemption"])
def test_what_is_computed_again(found, case):
    plain = expected(tofu()["long"])
    assert found[case]["tokens"] > plain["tokens"] and found[case]["hits"] >= plain["hits"]
    assert (found[case]["preempted"] > 0) == (case == "preemption")
