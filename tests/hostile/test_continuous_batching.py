"""transformers' continuous batching: each request keeps the masks under which it was added, until it ends."""

from __future__ import annotations

import time

import pytest
import torch
import transformers as hf
from tiny_models import add_masks, attach_to, build, in_thread, inputs
from tiny_saes import LATENTS, make_sae, mask_of
from transformers.generation import ContinuousBatchingConfig

import cu_fast

TOPICS = ["a", None, "b", {"a", "b"}]
TOKENS = 5


def config(**changes):
    return ContinuousBatchingConfig(**{"num_blocks": 64, "page_size": 16, "max_batch_tokens": 64, **changes})


def made():
    model = build("llama")
    model.set_attn_implementation("eager")
    model.generation_config = hf.GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1
    )
    return model


def attached_to(model):
    attachment = attach_to(model, "model.layers.0", "model.layers.1")
    add_masks(attachment, inputs("llama", batch=4))
    return attachment


@pytest.fixture
def model():
    return made()


@pytest.fixture
def attachment(model):
    return attached_to(model)


@pytest.fixture
def alone():
    """What a prompt answers alone under its topics: of a twin, since a manager changes its model's attention."""
    twin = attached_to(made())

    def answer(prompt, topics):
        with twin.unlearn(topics):
            return twin.model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()

    return answer


@pytest.fixture
def prompts():
    return inputs("llama", batch=4)["input_ids"].tolist()


@pytest.fixture
def want(alone, prompts):
    return [alone(prompt, topics) for prompt, topics in zip(prompts, TOPICS)]


def answers(outputs):
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture
def manager(model, attachment, alone):  # its thread seeds torch: whatever is random is made before it starts
    manager = model.init_continuous_batching(continuous_batching_config=config())
    manager.start()
    yield manager
    manager.stop(block=True)


def collect(manager, ids):
    results = {}
    while len(results) < len(ids):
        result = manager.get_result(timeout=20)
        assert result is not None, "the manager gave no result"
        if result.is_finished():
            results[result.request_id] = result
    return [results[name] for name in ids]


def until_idle(attachment):
    """A manager's thread notices within its next round that a request has ended."""
    for _ in range(100):
        try:
            return attachment._active.check_idle("nothing")
        except RuntimeError:
            time.sleep(0.05)
    pytest.fail("requests that have ended still hold masks")


def test_a_batch_with_a_mask_for_each_prompt(model, attachment, prompts, want, alone):
    with attachment.unlearn(TOPICS):
        assert answers(model.generate_batch(prompts, continuous_batching_config=config())) == want
    with attachment.unlearn("a"):
        outputs = model.generate_batch(prompts, continuous_batching_config=config())
    assert answers(outputs) == [alone(prompt, "a") for prompt in prompts]
    assert len({tuple(a) for a in want}) > 2 and answers(outputs) != want
    until_idle(attachment)


def test_requests_that_are_added_in_a_block_and_run_after_it(attachment, manager, prompts, want):
    ids = []
    for prompt, topics in zip(prompts, TOPICS):
        with attachment.unlearn(topics):
            ids.append(manager.add_request(prompt))
    with attachment.unlearn("b"):  # its rows are not theirs
        assert [result.generated_tokens for result in collect(manager, ids)] == want
    until_idle(attachment)


def test_many_requests_from_many_threads(attachment, manager, prompts, want):
    ids = {}

    def add(i):
        with attachment.unlearn(TOPICS[i % 4]):
            ids[i] = manager.add_request(prompts[i % 4], request_id=f"mine {i}")

    for i in range(24):
        assert "error" not in in_thread(lambda i=i: add(i))
    results = collect(manager, [ids[i] for i in range(24)])
    assert [result.generated_tokens for result in results] == want * 6


def test_prompts_that_begin_alike_share_nothing(attachment, manager, prompts, alone):
    """A prefix that was computed under one mask, or none, is not another's."""
    long = (prompts[0] * 8)[:40]  # several pages
    expected = [alone(long, topics) for topics in (None, "a", None, "b")]
    for topics, tokens in zip((None, "a", None, "b"), expected):
        with attachment.unlearn(topics):
            name = manager.add_request(long)
        assert collect(manager, [name])[0].generated_tokens == tokens


def test_several_sequences_of_a_request(model, attachment, prompts, want):
    model.generation_config.num_return_sequences = 2
    with attachment.unlearn(TOPICS):
        got = answers(model.generate_batch(prompts, continuous_batching_config=config()))
    assert got == [tokens for tokens in want for _ in range(2)]


def test_little_room_for_keys_and_values(model, attachment, prompts, want):
    """Requests are put off, and begun again from their tokens."""
    with attachment.unlearn(TOPICS):
        few = config(num_blocks=3, max_batch_tokens=16)
        assert answers(model.generate_batch(prompts, continuous_batching_config=few)) == want


def test_silence_is_refused_where_a_request_is_added(model, attachment, manager, prompts):
    with pytest.raises(RuntimeError, match="nothing was said here"):
        manager.add_request(prompts[0])
    with pytest.raises(RuntimeError, match="nothing was said here"):
        manager.add_requests(prompts)
    with pytest.raises(RuntimeError, match="nothing was said here"):
        model.generate_batch(prompts)
    with attachment.unlearn(["a", "b"]):
        with pytest.raises(ValueError, match=r"4 requests were given, and unlearn\(\) 2 entries"):
            model.generate_batch(prompts)
        with pytest.raises(ValueError, match=r"4 requests were given, and unlearn\(\) 2 entries"):
            manager.add_requests(prompts)
        with pytest.raises(ValueError, match=r"1 requests were given, and unlearn\(\) 2 entries"):
            manager.add_request(prompts[0])
    with attachment.unlearn("a"):
        manager.add_request(prompts[0], request_id="x", max_new_tokens=40)
        with pytest.raises(ValueError, match="request_id 'x' is that of a request that has not ended"):
            manager.add_request(prompts[1], request_id="x")


def test_masks_are_kept_while_a_request_runs(attachment, manager, prompts):
    with attachment.unlearn("a"):
        name = manager.add_request(prompts[0], max_new_tokens=40)
    for change in (attachment.detach, lambda: attachment.erase("b"), lambda: setattr(attachment, "always", {"b"})):
        with pytest.raises(RuntimeError, match="while masks hold"):
            change()
    collect(manager, [name])
    until_idle(attachment)
    attachment.erase("b")


def test_a_cancelled_request_holds_nothing(attachment, manager, prompts):
    with attachment.unlearn("a"):
        name = manager.add_request(prompts[0], max_new_tokens=50)
    manager.cancel_request(name)
    until_idle(attachment)


def test_a_manager_from_before_attach(model, prompts):
    early = model.init_continuous_batching(continuous_batching_config=config())
    attachment = attach_to(model, "model.layers.1")
    add_masks(attachment, inputs("llama"))
    early.start()
    with attachment.unlearn("a"):
        name = early.add_request(prompts[0])
    (result,) = collect(early, [name])
    assert "nothing was said here" in result.error and not result.generated_tokens
    early.stop(block=True)


def test_a_persistent_manager(model, attachment, prompts, want):
    for _ in range(2):
        with attachment.unlearn(TOPICS):
            got = model.generate_batch(prompts, continuous_batching_config=config(), persistent_manager=True)
        assert answers(got) == want
    until_idle(attachment)
    attachment.detach()
    with pytest.raises(ValueError, match="model holds a batching manager"):
        attach_to(model, "model.layers.1")
    plain = answers(model.generate_batch(prompts, continuous_batching_config=config()))
    assert plain != want and "_cu_fast" not in vars(model)
    model.destroy_cached_continuous_batching_manager()
    attach_to(model, "model.layers.1").detach()


def test_what_always_holds_is_in_every_request(attachment, manager, prompts, alone):
    attachment.always = {"a"}
    with attachment.unlearn(None):
        name = manager.add_request(prompts[0])
    assert collect(manager, [name])[0].generated_tokens == alone(prompts[0], "a")
    until_idle(attachment)
    attachment.always = {"a", "b"}  # every mask: silence says nothing less
    name = manager.add_request(prompts[0])
    assert collect(manager, [name])[0].generated_tokens == alone(prompts[0], {"a", "b"})


def test_a_version_of_transformers_that_batches_otherwise(model, attachment, monkeypatch):
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    monkeypatch.delattr(ContinuousBatchingManager, "_generation_step")
    with pytest.raises(RuntimeError, match=r"batches in a way that cu_fast does not know .* no _generation_step"):
        model.init_continuous_batching(continuous_batching_config=config())


def test_tokens_that_are_generated_are_no_first_tokens():
    """Of a packed row the first token is another sequence's next one, which masks change, and not an attention sink."""

    def kept(model):
        sae = make_sae()
        attachment = cu_fast.attach(model, {"model.layers.1": sae})
        attachment.add_mask(mask_of(sae, range(LATENTS), "all"))
        return attachment

    model, prompts = made(), inputs("llama", batch=3)["input_ids"].tolist()
    attachment, twin = kept(model), kept(made())
    with twin.unlearn("all"):
        want = [twin.model.generate(torch.tensor([p]))[0, len(p) :].tolist() for p in prompts]
    with attachment.unlearn("all"):
        outputs = model.generate_batch(prompts, continuous_batching_config=config(), warmup=False)
    until_idle(attachment)
    assert answers(outputs) == want
    (report,) = attachment.report()
    assert report["changed"] == 3 * (len(prompts[0]) - 1 + TOKENS - 1), "all but the first of each prompt"
