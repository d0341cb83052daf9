"""Work that leaves the context it was given in: threads, pools, tasks, pipelines, generators, copied contexts.

Each pattern runs under its masks or raises. What would go wrong shows: the models' masks change every answer.
"""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from tiny_models import add_masks, attach_to, build, in_thread, inputs, logits, mask_for, under

import cu_fast
from cu_fast.hf import active
from cu_fast.hf import attachment as hf_attachment
from cu_fast.hf import context as hf_context
from cu_fast.hf import request as hf_request
from cu_fast.hf import topics as hf_topics

LAYER = "model.layers.1"
SILENT = "nothing was said here of what holds"
LEFT = "the unlearn context that holds here was left"


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture
def attachment(model, given):
    attached = attach_to(model, LAYER)
    add_masks(attached, given)
    return attached


@pytest.fixture
def generate(model, given):
    return lambda: model.generate(**given, max_new_tokens=4, do_sample=False)


def raises(fn, message):
    with pytest.raises(RuntimeError, match=message):
        fn()


# -- handed over inside the block, run after it --------------------------------------------------------------------


def test_a_forward_that_was_told_nothing_raises(attachment, model, given, generate):
    """Also where no mask holds anywhere: a request's may just have been lost on the way."""
    for forward in (generate, lambda: logits(model, given), lambda: model.model(**given)):
        raises(forward, SILENT)
    for name in "ab":
        attachment.remove_mask(name)
    logits(model, given)  # there is nothing left that could have been meant


def test_a_thread_beside_a_block_whose_masks_were_removed(attachment, model, given):
    with attachment.unlearn("a"):
        for name in "ab":
            attachment.remove_mask(name)
        assert SILENT in str(in_thread(lambda: logits(model, given))["error"])
    logits(model, given)


def test_a_pool_that_works_after_the_block(attachment, generate):
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait)  # a busy worker
        with attachment.unlearn("a"):
            future = pool.submit(generate)
        release.set()
        with pytest.raises(RuntimeError, match=SILENT):
            future.result()


@pytest.mark.parametrize("delay", [0, 0.001, 0.02])
def test_a_thread_that_starts_late(attachment, generate, delay):
    result = {}

    def late():
        time.sleep(delay)
        try:
            result["answer"] = generate()
        except RuntimeError as error:
            result["error"] = str(error)

    with attachment.unlearn("a"):
        thread = threading.Thread(target=late)
        thread.start()
    thread.join()
    assert SILENT in result["error"]


def test_a_pipeline_that_is_read_after_the_block(attachment, model, tokenizer):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["the cat", "a dog", "Anna writes"]

    def read(results):
        return [result[0]["generated_text"] for result in results]

    options = {"max_new_tokens": 3, "do_sample": False}
    with attachment.unlearn("a"):
        inside, later, begun = (pipe((text for text in texts), **options) for _ in range(3))
        assert len(read(inside)) == 3
        next(iter(begun))
    raises(lambda: read(later), SILENT)
    raises(lambda: read(begun), SILENT)  # its first was read inside


def test_a_lazy_map(attachment, generate):
    with attachment.unlearn("a"):
        lazy = map(lambda _: generate(), range(2))
    raises(lambda: next(lazy), SILENT)


def test_streaming_tells_its_reader_what_happened(attachment, model, given, tokenizer):
    """TextIteratorStreamer's reader waits in another thread: for ever, or taking an error for an empty answer."""
    streamer = transformers.TextIteratorStreamer(tokenizer)
    options = {"input_ids": given["input_ids"][:1], "streamer": streamer, "max_new_tokens": 3}
    with attachment.unlearn("a"):
        assert "contextvars.copy_context" in str(in_thread(lambda: model.generate(**options))["error"])
    assert "the answer ended with an error: " in str(in_thread(lambda: list(streamer))["error"])

    async def read():
        options["streamer"] = streamer = transformers.AsyncTextIteratorStreamer(tokenizer)
        with attachment.unlearn("a"):
            in_thread(lambda: model.generate(**options))
        return [text async for text in streamer]

    with pytest.raises(RuntimeError, match="ended with an error: this attachment has masks, and nothing was said"):
        asyncio.run(read())

    with attachment.unlearn("a"):
        context = contextvars.copy_context()
        streamer = transformers.TextIteratorStreamer(tokenizer)
        options["streamer"] = streamer
        streaming = threading.Thread(target=context.run, args=(lambda: model.generate(**options, do_sample=False),))
        streaming.start()
        text = "".join(streamer)
        streaming.join()
        ids = model.generate(options["input_ids"], max_new_tokens=3, do_sample=False)
        assert text.split() == tokenizer.decode(ids[0]).split()


# -- contexts that outlive their block -----------------------------------------------------------------------------


def test_a_copied_context_after_its_block(attachment, model, given):
    with attachment.unlearn("a"):
        copied = contextvars.copy_context()
        assert torch.equal(copied.run(logits, model, given), under(attachment, "a", given))
    raises(lambda: copied.run(logits, model, given), LEFT)
    with attachment.unlearn("b"):  # takes the row that "a" had
        raises(lambda: copied.run(logits, model, given), LEFT)
    with attachment.unlearn(None):
        empty = contextvars.copy_context()
    raises(lambda: empty.run(logits, model, given), LEFT)


def forked(attachment, given):
    """Which topics a worker answers under, or its error. By name: a pool can send neither a model nor a closure."""
    try:
        return logits(attachment.model, given).numpy()
    except RuntimeError as error:
        return str(error)


def test_a_worker_that_was_forked_in_a_block(attachment, model, given):
    """It outlives the block, and would answer all later requests under its topics."""
    context = multiprocessing.get_context("fork")

    def answers(queue, asked):
        while asked.get():
            queue.put(forked(attachment, given))

    queue, asked = context.Queue(), context.Queue()
    with attachment.unlearn(None):
        worker = context.Process(target=answers, args=(queue, asked), daemon=True)
        worker.start()
    with attachment.unlearn("a"):
        asked.put(True)
        assert "the process that this one was forked from" in queue.get(timeout=60)
        assert torch.equal(logits(model, given), under(attachment, "a", given)), "here it still holds"
    asked.put(False)
    worker.join()


def test_a_task_that_goes_on_after_its_block(attachment, generate):
    """A request that times out, and another that comes meanwhile: the first must not answer under the second's mask."""
    goes_on = threading.Event()

    def slow(ids, scores):
        goes_on.wait(20)
        return scores

    async def serve():
        def answer():
            return attachment.model.generate(**inputs("llama"), max_new_tokens=4, logits_processor=[slow])

        with attachment.unlearn("a"):
            first = asyncio.create_task(asyncio.to_thread(answer))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(first), 0.05)
        with attachment.unlearn("b"):
            goes_on.set()
            with pytest.raises(RuntimeError, match=LEFT):
                await first

    asyncio.run(serve())


def test_detaching_waits_for_a_generate_whose_context_was_left(attachment, model, given):
    """It would go on as the base model."""
    inside, goes_on = threading.Event(), threading.Event()

    def wait(ids, scores):
        inside.set()
        goes_on.wait(20)
        return scores

    with attachment.unlearn("a"):
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(context.run, model.generate, **given, max_new_tokens=3, logits_processor=[wait])
            assert inside.wait(20)
            attachment._active.close(attachment._active.request.get())  # as the block's end does
            for change in (
                attachment.detach,
                lambda: attachment.erase("b"),
                lambda: setattr(attachment, "always", {"b"}),
            ):
                raises(change, "while masks hold")
            goes_on.set()
            with pytest.raises(RuntimeError, match=LEFT):
                future.result()
    attachment.erase("b")
    attachment.detach()


def test_generators_in_turns(attachment, model, given):
    """Python lets a generator's block reach into the code that resumes it; at the latest its end says so."""

    def stream(topics):
        with attachment.unlearn(topics):
            for _ in range(2):
                yield logits(model, given)

    def drain(generator):
        for _ in generator:
            pass

    first, second = stream("a"), stream(None)
    next(first), next(second)
    raises(lambda: drain(first), "was left where another one holds")
    drain(second)
    raises(lambda: logits(model, given), SILENT)  # neither is still set
    for alone in (stream("a"), stream(None)):
        drain(alone)


def test_blocks_of_one_thread_end_inside_out(attachment, model, given):
    outer, inner = attachment.unlearn("a"), attachment.unlearn("b")
    outer.__enter__(), inner.__enter__()
    raises(lambda: outer.__exit__(None, None, None), "was left where another one holds")
    assert torch.equal(logits(model, given), under(attachment, "b", given))
    inner.__exit__(None, None, None)
    raises(lambda: logits(model, given), SILENT)
    raises(outer.__enter__, "was entered before")


def test_a_block_whose_object_is_not_kept(attachment, model, given):
    """Python drops it at once; that must not bring back what held before."""

    def careless():
        attachment.unlearn("a").__enter__()
        raises(lambda: logits(model, given), LEFT)

    with attachment.unlearn(None):
        contextvars.copy_context().run(careless)
        logits(model, given)


FILES = {module.__file__ for module in (hf_attachment, active, hf_context, hf_request, hf_topics)}


def interrupted_at(step, fn):
    """Run fn, with a KeyboardInterrupt before one step of the bytecode of FILES. Whether it came to that step."""
    steps = iter(range(step + 1))

    def trace(frame, event, _):
        frame.f_trace_opcodes = True
        if event == "opcode" and next(steps, None) == step:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(lambda frame, *_: trace(frame, "call", None) if frame.f_code.co_filename in FILES else None)
    try:
        fn()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_while_a_block_is_entered_or_left(attachment, model, given):
    """Whenever it comes: no mask holds for ever, nothing runs without one, and detach() is not refused for ever."""

    def block():
        with attachment.unlearn("a"):
            pass

    step = 0
    while interrupted_at(step, block):
        step += 1
        raises(lambda: logits(model, given), f"{SILENT}|{LEFT}")
        attachment._active.check_idle("nothing should be refused")
        under(attachment, "b", given)
    assert step > 400
    attachment.detach()


# -- what an operator says -----------------------------------------------------------------------------------------


def test_plain_silence(model, given):
    attachment = attach_to(model, LAYER, attach_options={"silent": "plain"})
    add_masks(attachment, given)
    base = under(attachment, None, given)
    assert torch.equal(logits(model, given), base)
    with attachment.unlearn("a"):
        assert torch.equal(in_thread(lambda: logits(model, given))["value"], base)
    attachment.always = {"a"}
    assert torch.equal(logits(model, given), under(attachment, "a", given))
    with pytest.raises(ValueError, match="silent is 'ignore'; it should be 'refuse' or 'plain'"):
        cu_fast.attach(build("llama"), {}, silent="ignore")


def test_what_always_holds(attachment, model, given):
    only_a, both = under(attachment, "a", given), under(attachment, {"a", "b"}, given)
    assert attachment.always == frozenset()
    attachment.always = {"a"}
    for topics, want in ((None, only_a), ("a", only_a), ("b", both), (["b", "b"], both)):
        assert torch.equal(under(attachment, topics, given), want)
    raises(lambda: logits(model, given), SILENT)  # "b" could have been meant
    attachment.always = ["a", "b"]
    assert torch.equal(logits(model, given), both)
    silent = model.generate(**given, max_new_tokens=3, do_sample=False)
    with attachment.unlearn(None):
        assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False), silent)
        with pytest.raises(RuntimeError, match="always cannot change while"):
            attachment.always = {}
    assert torch.equal(in_thread(lambda: logits(model, given))["value"], both)
    attachment.add_mask(attachment.masks["a"], "c")
    raises(lambda: logits(model, given), SILENT)

    with pytest.raises(ValueError, match="mask 'a' always holds; take it out of"):
        attachment.remove_mask("a")
    with pytest.raises(ValueError, match="there is no mask 'z'; there are: a, b, c"):
        attachment.always = {"z"}
    with pytest.raises(TypeError, match="always is 'a'; it should be a set of names"):
        attachment.always = "a"
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="always cannot change while masks hold"):
        attachment.always = {}
    assert attachment.always == {"a", "b"}
    attachment.mask_mode = "reselect"
    assert torch.equal(under(attachment, None, given), under(attachment, {"a", "b"}, given))
    assert not torch.equal(under(attachment, None, given), both)
    attachment.always = {"a"}
    attachment.erase("a")
    assert attachment.always == frozenset()
    attachment.always = {}
    under(attachment, None, given)


def test_a_mask_that_deletes_nothing_is_refused(attachment):
    bottleneck = attachment.bottlenecks[LAYER]
    with pytest.raises(ValueError, match="mask 'empty' deletes no code"):
        attachment.add_mask(mask_for(bottleneck, [], "empty"))
    assert "empty" not in attachment.masks


def test_names_that_are_no_names(attachment):
    for topics in (3, [3], [b"a"], b"a", ["a", [1]]):
        with pytest.raises(TypeError, match=r"an entry of unlearn\(\) is .*; it should be a mask's name"):
            attachment.unlearn(topics).__enter__()
    with pytest.raises(TypeError, match="give a list, an entry per sequence, or a set, a union"):
        attachment.unlearn(("a", "b")).__enter__()


def test_bits_that_are_written_to_after_their_mask_was_added(attachment, given):
    mask = mask_for(attachment.bottlenecks[LAYER], attachment.masks["a"][0].ids(), "mine")
    attachment.add_mask(mask)
    want = under(attachment, "a", given)
    mask.bits.zero_()
    assert torch.equal(under(attachment, "mine", given), want)


def test_texts_of_many_requests_are_not_kept(attachment, given):
    for i in range(hf_request.TEXTS + 50):
        with attachment.unlearn(["a" if i >> bit & 1 else "b" for bit in range(11)] + [None]):
            pass
    assert len(hf_request._TEXT) <= hf_request.TEXTS
    assert hf_request.text_of(attachment._topics.nothing) == "no mask"


# -- libraries that go round the hooks ------------------------------------------------------------------------------


def take_out_hooks(module):
    """As pyvene does in each call."""
    for one in module.modules():
        one._forward_hooks.clear()
        one._forward_pre_hooks.clear()


@pytest.mark.parametrize("where", ["model", "layer"])
@pytest.mark.parametrize("always", [False, True])
def test_a_model_whose_hooks_were_taken_out_does_not_answer(attachment, model, given, where, always):
    attachment.always = {"a"} if always else ()
    take_out_hooks(model if where == "model" else model.get_submodule(LAYER))
    for topics in ("a", None):
        with attachment.unlearn(topics):
            raises(lambda: logits(model, given), "hooks of module .* were taken out since attach")
    attachment.always = ()
    attachment.detach()
    assert torch.equal(logits(model, given), logits(build("llama"), given))


def test_forward_that_is_called_by_itself_runs_the_hooks(attachment, model, given):
    """As sentence-transformers does; the model around the layer, too."""
    for owner in (model, model.model):
        plain = build("llama") if owner is model else build("llama").model
        for topics in ("a", ["a", None], None):
            with torch.no_grad(), attachment.unlearn(topics):
                assert torch.equal(owner.forward(**given)[0], owner(**given)[0])
        with torch.no_grad(), attachment.unlearn("a"):
            assert not torch.equal(owner.forward(**given)[0], plain(**given)[0])
    raises(lambda: model.forward(**given), SILENT)
