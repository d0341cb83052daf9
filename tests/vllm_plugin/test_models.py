"""Llama, GPT-2 and Gemma 3 with both kinds of splice say in vLLM what they say in transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

from vllm_engines import Counts, expected, params, prompt, says, tiny
from vllm_tiny import CASES, CONFIGS, DELTA, SETS, TINY, TOKENS, cases

pytestmark = pytest.mark.background(TINY)
IGNORE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def made():
    return cases()


@pytest.mark.parametrize("name", CASES)
def test_masks_change_what_is_said(made, name):
    case = made[name]
    by_set = [[a.ids for a in case.answers if a.names == names] for names in SETS]
    assert len(by_set[0]) >= 4
    for other in by_set[1:]:
        assert sum(a != b for a, b in zip(by_set[0], other)) >= len(other) - 1
    assert by_set[1] != by_set[2] != by_set[3] != by_set[1]
    is_delta = set(CASES[name][1].values()) == {DELTA}
    assert is_delta == (by_set[0] == [a.ids for a in case.bare])


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_transformers_says(made, name):
    case = made[name]
    llm = tiny(case.model, case.attachment)
    counts = Counts(llm)
    assert says(llm, case.answers, TOKENS, **IGNORE) == [answer.ids for answer in case.answers]
    found = counts.since()
    assert found.pop("steps") < 2 * TOKENS
    assert found == expected(case.answers)
    assert found["hits"] > 1000


@pytest.mark.parametrize("name", [name for name, (_, kinds) in CASES.items() if DELTA in kinds.values()])
def test_the_first_position_is_left_alone(made, name):
    """There are prompts for which it matters; so the test above shows it."""
    case = made[name]
    pairs = list(zip(case.answers, case.all_positions))
    assert all(a.prompt == b.prompt and a.names == b.names for a, b in pairs)
    assert any(a.ids != b.ids for a, b in pairs) and all(a.ids == b.ids for a, b in pairs if not a.names)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_delta_with_nothing_deleted_is_plain_vllm_bit_for_bit(made, family):
    """Also where others of the batch are under masks; the batches are of one shape, since matrix products depend on it."""
    case = made[f"{family}-delta"]
    prompts = [prompt(answer.prompt) for answer in case.bare] * 2
    plain, masked = tiny(case.model, None), tiny(case.model, case.attachment)

    def run(llm, names):
        given = [params(one, TOKENS, logprobs=1, **IGNORE) for one in names]
        found = [output.outputs[0] for output in llm.generate(prompts, given, use_tqdm=False)]
        values = [[step[token].logprob for step, token in zip(one.logprobs, one.token_ids)] for one in found]
        return [list(one.token_ids) for one in found], values

    n = len(case.bare)
    ids, values = run(plain, [None] * 2 * n)
    assert ids[:n] == [answer.ids for answer in case.bare]
    assert run(masked, [[]] * 2 * n) == (ids, values)
    mixed_ids, mixed_values = run(masked, [[]] * n + [["a"]] * n)
    assert (mixed_ids[:n], mixed_values[:n]) == (ids[:n], values[:n])
    assert mixed_ids[n:] != ids[n:]


def test_the_compile_cache_depends_on_the_layers(made):
    """Else a graph with the splices of other layers, or with none, could be taken from it."""
    model, attachments = (
        made["llama-delta"].model,
        [None, *(made[f"llama{place}-delta"].attachment for place in ("", "-mlp"))],
    )
    hashes = [tiny(model, attachment).llm_engine.vllm_config.compute_hash() for attachment in attachments]
    assert len(set(hashes)) == 3
