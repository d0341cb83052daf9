"""The V1 model runner says what transformers says, token by token, whatever shares a batch and however prompts are cut."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

from vllm.exceptions import VLLMValidationError
from vllm_engines import Counts, engine, expected, outputs, params, report, runner, says, served
from vllm_oracle import BUNDLE, LONG, SETS, SHORT, TOFU, C, J, tofu

from cu_fast.vllm.served import ATTRIBUTE

pytestmark = pytest.mark.background(TOFU)


@pytest.fixture(scope="module")
def oracle():
    return tofu()


@pytest.fixture(scope="module")
def llm():
    return engine()


def test_the_oracle_tells_masks_apart(oracle):
    for answers in oracle.values():
        assert min(answer.margin for answer in answers) > 5e-4  # fifty times what the order of a sum changes
        none, c, j, both = ([a.ids for a in answers if a.names == names] for names in SETS)
        for one, other in itertools.combinations((none, c, j, both), 2):
            assert sum(a != b for a, b in zip(one, other)) >= 2


def test_four_sets_in_one_batch(llm, oracle):
    counts, answers = Counts(llm), oracle["short"]
    assert len(answers) == 32
    assert says(llm, answers, SHORT) == [answer.ids for answer in answers]
    found = counts.since()
    assert found.pop("steps") < 2 * SHORT  # one batch, not one after another
    assert found == expected(answers)
    assert found["hits"] > 100 and found["masked"].keys() == {C, J}


def test_rows_are_given_up(llm, oracle):
    says(llm, oracle["short"], 2)
    says(llm, oracle["short"][:1], 2)
    assert report(llm)["held"] == 1  # until the next step


def test_several_answers_to_one_prompt(llm, oracle):
    answers = [answer for answer in oracle["short"] if answer.margin > 0.3]
    assert {tuple(answer.names) for answer in answers} >= {(), (C,), (C, J)}
    # So cold that the best token is always drawn: exp(-0.3 / 0.01).
    found = outputs(llm, answers, SHORT, n=3, temperature=0.01, seed=1)
    assert [[list(one.token_ids) for one in o.outputs] for o in found] == [[answer.ids] * 3 for answer in answers]


def test_prompts_cut_into_chunks(oracle):
    answers = oracle["long"]
    assert min(len(answer.prompt) for answer in answers) > 3 * 32
    llm = engine(max_num_batched_tokens=32, max_num_seqs=16, enable_chunked_prefill=True)
    counts = Counts(llm)
    assert says(llm, answers, LONG) == [answer.ids for answer in answers]
    found = counts.since()
    assert found.pop("steps") > found["tokens"] / 32
    assert found == expected(answers)


def test_preemption(oracle, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def count(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    llm = engine(num_gpu_blocks_override=18)
    counts, answers = Counts(llm), oracle["long"]
    assert says(llm, answers, LONG) == [answer.ids for answer in answers]
    assert preempted
    found, plain = counts.since(), expected(answers)
    assert found["tokens"] > plain["tokens"] and found["hits"] > plain["hits"]  # computed again, under their masks


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
DRAFT = {"method": "draft_model", "model": str(BUNDLE), "num_speculative_tokens": 3}


@pytest.mark.parametrize(("speculation", "prompts"), [(NGRAM, "long"), (DRAFT, "short")], ids=["ngram", "draft"])
def test_speculation(oracle, speculation, prompts):
    llm = engine(speculative_config=speculation, disable_log_stats=False)
    counts, answers, before = Counts(llm), oracle[prompts], drafts(llm)
    assert says(llm, answers, LONG) == [answer.ids for answer in answers]
    found, plain = counts.since(), expected(answers)
    accepted, drafted = (now - then for now, then in zip(drafts(llm), before))
    assert 0 < accepted < drafted
    assert found["tokens"] > plain["tokens"] and found["hits"] >= plain["hits"]  # drafts that were thrown away
    if speculation is DRAFT:  # it is a model without splices, and proposes what was to be forgotten
        assert served(llm) is not None and not hasattr(runner(llm).drafter.model, ATTRIBUTE)


def drafts(llm):
    """(accepted, proposed) tokens, of all engines of this process."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return [values.get(f"vllm:spec_decode_num_{kind}_tokens", 0) for kind in ("accepted", "draft")]


@pytest.mark.parametrize("silent", ["refuse", "always"])
def test_what_always_holds(oracle, silent):
    llm = engine(settings={"always": [J], "silent": silent})
    by_names = {names: [a for a in oracle["short"] if a.names == list(names)] for names in ((J,), (C, J))}
    cases = [([], (J,)), ([C], (C, J)), ([J], (J,)), ([C, J], (C, J))] + [(None, (J,))] * (silent == "always")
    jobs = [(names, answer) for names, held in cases for answer in by_names[held]]
    given = [{"prompt_token_ids": answer.prompt} for _, answer in jobs]
    found = llm.generate(given, [params(names, SHORT) for names, _ in jobs], use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in found] == [answer.ids for _, answer in jobs]
    if silent == "refuse":
        with pytest.raises(VLLMValidationError, match="say what to unlearn"):
            llm.generate(given[:1], params(None, 2), use_tqdm=False)
