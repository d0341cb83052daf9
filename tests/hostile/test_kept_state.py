"""Splices that keep the hidden state: what is held is subtracted, nothing held is the untouched model, bit for bit; and
what serving code, threads, casts, copies and gradients do to it."""

from __future__ import annotations

import contextvars
import copy
import functools
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from kept_state import GIVEN, KINDS, LAYER, PAIR, Kept, small
from tiers import heavies, heavy
from tiny_models import D, in_thread, logits, mask_for, under
from tiny_saes import LATENTS, firing, hidden, make_sae, mask_of, without

import cu_fast
from cu_fast.hf import StaleCacheError
from cu_fast.masks import Mask


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


PLACES = [("threshold", LAYER), ("topk", LAYER), ("codebook", LAYER), ("threshold", PAIR), ("topk", PAIR)]


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_what_is_held_is_subtracted_and_nothing_else(kind, place):
    """In eager mode and compiled, without compiling again."""
    plain = logits(small(), GIVEN)
    if (kind, place) == PLACES[0]:
        compiled_before = torch.compile(small(), backend="aot_eager", fullgraph=True)
        assert torch.equal(logits(compiled_before, GIVEN, use_cache=False), plain)
    kept = Kept(kind, place)
    model, attachment = kept.model, kept.attachment
    state = {name: value.clone() for name, value in model.state_dict().items()}
    # The operator that a compiled model calls does not know kinds.
    runs = [model]
    if kind == "threshold":
        runs.append(torch.compile(model, backend="aot_eager", fullgraph=True))
    entries = {
        "a": [["a"], ["a"]],
        frozenset({"a", "b"}): [["a", "b"]] * 2,
        ("b", None): [["b"], []],
    }
    with attachment.unlearn(None):
        logits(runs[-1], GIVEN, use_cache=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for topics, names in entries.items():
            topics = list(topics) if isinstance(topics, tuple) else topics
            want = kept.by_hand(names)
            for run in runs:
                with attachment.unlearn(topics):
                    got = logits(run, GIVEN, use_cache=False)
                torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
                assert (got - plain).abs().max() > 0.05
                with attachment.unlearn(None):
                    assert torch.equal(logits(run, GIVEN, use_cache=False), plain), "nothing held is the plain model"
    # What it says of itself, against the same computation.
    if kind != "codebook":
        assert not any("codebook_bottleneck" in name for name in state)
    attachment.detach()
    assert torch.equal(logits(model, GIVEN), plain)


@heavy
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("place", [LAYER, PAIR])
def test_compiled_by_inductor(place):
    """Nothing held is what inductor made of the model before attach, bit for bit."""
    plain = logits(torch.compile(small(), fullgraph=True), GIVEN, use_cache=False)
    kept = Kept("threshold", place)
    compiled = torch.compile(kept.model, fullgraph=True)
    for topics, names in ((None, None), ("a", [["a"], ["a"]]), (["b", None], [["b"], []])):
        with kept.attachment.unlearn(topics):
            got = logits(compiled, GIVEN, use_cache=False)
        if topics is None:
            assert torch.equal(got, plain)
        else:
            torch.testing.assert_close(got, kept.by_hand(names), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_for_some_sequences_leaves_the_others_alone(kind):
    kept = Kept(kind)
    with kept.attachment.unlearn(["a", None]):
        got = logits(kept.model, GIVEN)
    alone = {name: value[1:] for name, value in GIVEN.items()}
    torch.testing.assert_close(got[1:], logits(small(), alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_compilers_view_of_what_is_deleted(kind):
    """The shape, dtype and strides that the compiler is told are those that come, of a transposed tensor too."""
    kept = Kept(kind)
    active = kept.attachment._active
    x = hidden("llama", LAYER, GIVEN)
    for topics in ("a", None):
        with kept.attachment.unlearn(topics), torch.no_grad():
            active.enter(kept.attachment._layers[0].runner, 2)
            order = torch.zeros((), dtype=torch.int64)
            for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.bfloat16()):
                torch.library.opcheck(
                    torch.ops.cu_fast.delete,
                    (order, given, active.handle, 0),
                    test_utils=("test_schema", "test_faketensor"),
                )


# -- threads, growth, forks -----------------------------------------------------------------------------------------


def test_rows_grow_while_another_thread_runs():
    """Latents come to the device as masks need them, and tables get wider and longer, under a forward that goes on."""
    sae, model = make_sae(), small()
    attachment = cu_fast.attach(model, {LAYER: sae})
    ids = firing(sae, hidden("llama", LAYER, GIVEN))
    attachment.add_mask(mask_of(sae, ids[:3], "a"))
    want, over = under(attachment, "a", GIVEN), threading.Event()

    def work():
        with attachment.unlearn("a"):
            found = [logits(model, GIVEN)]
            while not over.is_set():
                found.append(logits(model, GIVEN))
        return found

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with attachment.unlearn("a"):
        assert torch.equal(logits(compiled, GIVEN, use_cache=False), want)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        held, blocks = [], []
        try:
            for i in range(70):  # more requests than a table has rows at first, and more latents than fit one's width
                attachment.add_mask(mask_of(sae, [*ids[: 3 + i % 40], i % LATENTS], f"m{i}", strength=1.0 + i))
                held.append(contextvars.copy_context())
                blocks.append(attachment.unlearn(f"m{i}"))
                held[-1].run(blocks[-1].__enter__)
        finally:
            over.set()
        found = future.result()
    assert len(found) > 2 and all(torch.equal(got, want) for got in found)
    layer = attachment._layers[0]
    assert len(layer.table.tensors[0]) > 64 and layer.table.tensors[0].shape[1] > 32 and layer.table._outgrown
    with attachment.unlearn("a"):
        assert torch.equal(logits(compiled, GIVEN, use_cache=False), want), "a compiled model finds the new tables"
    context = held[-1]
    strengths = dict.fromkeys([*ids[: 3 + 69 % 40], 69 % LATENTS], 70.0)
    got = context.run(logits, compiled, GIVEN, use_cache=False)
    kept = Kept("threshold")
    kept.taken = lambda x, names, residual=None: without(sae, x, strengths)
    torch.testing.assert_close(got, kept.by_hand([["a"], ["a"]]), atol=1e-2, rtol=1e-2)


def test_a_row_that_could_not_be_written_is_no_other_masks_row(monkeypatch):
    """An interrupt, or memory that runs out, while a row is written: the next request must not get a row in use."""
    kept = Kept("threshold")
    attachment, (layer,) = kept.attachment, kept.attachment._layers
    for i in range(3):
        attachment.add_mask(mask_of(kept.sae, [i], f"m{i}"))
    contexts = [contextvars.copy_context() for _ in range(3)]
    blocks = [attachment.unlearn(name) for name in ("a", "b", "m0")]
    for context, block in zip(contexts, blocks):
        context.run(block.__enter__)
    contexts[1].run(blocks[1].__exit__, None, None, None)  # its row is free
    write = layer.table.write

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer.table, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attachment.unlearn("m1").__enter__()
    assert layer.table.write == write
    rows = [context.run(attachment._active.request.get).rows[0] for context in (contexts[0], contexts[2])]
    with attachment.unlearn("m1"):
        rows.append(attachment._active.request.get().rows[0])
        with attachment.unlearn("m2"):
            rows.append(attachment._active.request.get().rows[0])
    assert len(set(rows)) == 4, rows
    for context, block in zip(contexts[::2], blocks[::2]):
        context.run(block.__exit__, None, None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_brings_rows():
    """A lock that a thread of the old process held is free in the new one."""
    kept = Kept("threshold")
    with kept.splice._lock:  # as another thread would hold it
        child = os.fork()
        if child == 0:
            thread = threading.Thread(target=lambda: kept.attachment.unlearn("a").__enter__(), daemon=True)
            thread.start()
            thread.join(10)
            os._exit(1 if thread.is_alive() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_union_of_too_many_latents_is_refused_and_spoils_nothing():
    """The kernels take 8,192 in one mask; a table that was widened for more would refuse every mask."""
    big = cu_fast.SAE(
        *(make_sae(d_in=D).enc.repeat(200, 1), torch.ones(9600), torch.zeros(9600)), make_sae().dec.repeat(200, 1)
    )
    model = small()
    attachment = cu_fast.attach(model, {LAYER: big})
    attachment.add_mask(mask_of(big, [0, 1], "few"))
    attachment.add_mask(mask_of(big, range(5000), "half"))
    attachment.add_mask(mask_of(big, range(4000, 9000), "rest"))
    want = under(attachment, "few", GIVEN)
    with pytest.raises(ValueError, match="change 9000 latents together; at most 8192"):
        attachment.add_mask(mask_of(big, range(9000), "all"))
    with pytest.raises(ValueError, match="change 9000 latents together; at most 8192"):
        under(attachment, {"half", "rest"}, GIVEN)
    assert torch.equal(under(attachment, "few", GIVEN), want)


# -- casts, copies, gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_is_cast(kind, dtype):
    """The counts are not: sums of doses in fp16 would be lost or infinite."""
    kept = Kept(kind)
    kept.model.to(dtype)
    if kind == "codebook":
        for name, mask in [(name, mask_for(kept.splice, ids, name)) for name, ids in kept.ids.items()]:
            kept.attachment.remove_mask(name)
            kept.attachment.add_mask(mask)
    assert kept.splice.dose.dtype == torch.float32 and kept.splice.passed.dtype == torch.int64
    plain = logits(small().to(dtype), GIVEN)
    with kept.attachment.unlearn(None):
        assert torch.equal(logits(kept.model, GIVEN), plain)
    assert not torch.equal(under(kept.attachment, "a", GIVEN), plain)
    kept.splice.dose += 70_000  # what a day of serving adds up to
    under(kept.attachment, "a", GIVEN)
    (report,) = kept.attachment.report()
    assert 0 < report["changed"] and 1000 < report["dose"] < 1e6


def test_a_model_in_double_says_so():
    for kind in ("threshold", "topk"):
        kept = Kept(kind)
        kept.model.double()
        with kept.attachment.unlearn(None):
            assert torch.equal(logits(kept.model, GIVEN), logits(small().double(), GIVEN))
        with pytest.raises(TypeError, match=r"x is torch.float64"):
            under(kept.attachment, "a", GIVEN)
    with pytest.raises(TypeError, match=r"codes is torch.float64"):
        Kept("codebook").model.double()


@pytest.mark.parametrize("kind", ("threshold", "codebook"))
def test_a_model_is_neither_copied_nor_pickled_with_an_attachment(kind):
    kept = Kept(kind)
    for copying, message in ((copy.deepcopy, "cannot be copied; detach"), (pickle.dumps, "cannot be pickled")):
        for what in (kept.model, kept.model.model.layers[1]):
            with pytest.raises(TypeError, match=message):
                copying(what)
    kept.attachment.detach()
    assert torch.equal(logits(copy.deepcopy(kept.model), GIVEN), logits(small(), GIVEN))


def test_an_autoencoder_is_no_part_of_the_model(tmp_path):
    before = small()
    kept = Kept("threshold")
    under(kept.attachment, "a", GIVEN)
    assert list(kept.model.state_dict()) == list(before.state_dict())
    assert [n for n, _ in kept.model.named_parameters()] == [n for n, _ in before.named_parameters()]
    kept.model.save_pretrained(tmp_path / "with")
    before.save_pretrained(tmp_path / "without")
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "with" / n).read_bytes() == (tmp_path / "without" / n).read_bytes() for n in names)
    kept.model.load_state_dict(before.state_dict())
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "with").eval()
    assert torch.equal(logits(again, GIVEN), logits(before, GIVEN))


@pytest.mark.parametrize(("place", "compiled"), [(LAYER, False), (PAIR, False), *heavies((PAIR, True), (LAYER, True))])
def test_gradients(place, compiled):
    """Through a deletion they raise; through a place where nothing is held they are the plain model's."""
    kept, twin = Kept("threshold", place), small()

    def gradient(model, training):
        model.train(training)
        swapped = model is kept.model
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled and swapped else model
        model.zero_grad()
        run(input_ids=GIVEN["input_ids"], labels=GIVEN["input_ids"], use_cache=False).loss.backward()
        return model.model.embed_tokens.weight.grad

    for training in (True, False):
        with kept.attachment.unlearn(None):
            got = gradient(kept.model, training)
        torch.testing.assert_close(got, gradient(twin, training), atol=1e-6, rtol=1e-5)
    with kept.attachment.unlearn("a"), pytest.raises(RuntimeError, match="has no gradient"):
        gradient(kept.model, False)
    kept.model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        under(kept.attachment, "a", GIVEN)


def test_checkpointing_runs_a_pair_again():
    kept, twin = Kept("threshold", PAIR), small()
    grads = []
    for model in (kept.model, twin):
        model.train()
        model.gradient_checkpointing_enable()
        with kept.attachment.unlearn(None):
            model(input_ids=GIVEN["input_ids"], labels=GIVEN["input_ids"], use_cache=False).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*grads)
    for model in (kept.model, twin):
        model.eval()
    torch.testing.assert_close(under(kept.attachment, "a", GIVEN), kept.by_hand([["a"], ["a"]]), atol=1e-3, rtol=1e-3)


# -- what changes under an attachment -------------------------------------------------------------------------------


def test_weights_of_a_codebook_that_are_written_to_are_used():
    kept = Kept("codebook")
    with kept.attachment.unlearn("a"):
        before = logits(kept.model, GIVEN)
        with torch.no_grad():
            kept.splice.autoencoder.W_dec.mul_(1.5)
        got = logits(kept.model, GIVEN)
    assert (got - before).abs().max() > 0.05
    torch.testing.assert_close(got, kept.by_hand([["a"], ["a"]]), atol=1e-3, rtol=1e-3)


def test_an_autoencoder_that_is_written_to_is_another_one():
    for kind in ("threshold", "topk"):
        kept = Kept(kind)
        under(kept.attachment, "a", GIVEN)
        with kept.attachment.unlearn("a"):
            kept.sae.dec.mul_(0)
            with pytest.raises(RuntimeError, match=r"the codebook of layer .* changed inside the unlearn context"):
                logits(kept.model, GIVEN)
        for topics in ("a", "b"):
            with pytest.raises(RuntimeError, match=r"a codebook changed since mask .* was added"):
                under(kept.attachment, topics, GIVEN)


def test_a_cache_knows_which_tokens_were_left_alone():
    """Filled with the first token left alone, and continued by an attachment that leaves none: two computations."""
    sae, model = make_sae(), small()
    token = {"input_ids": torch.tensor([[5], [6]])}

    def attached(skip):
        attachment = cu_fast.attach(model, {LAYER: sae}, skip_first=skip)
        attachment.add_mask(mask_of(sae, range(LATENTS), "a"))
        return attachment

    attachment = attached(1)
    with torch.no_grad(), attachment.unlearn("a"):
        cache = model(**GIVEN, use_cache=True).cache
    attachment.detach()
    attachment = attached(0)
    with torch.no_grad(), attachment.unlearn("a"), pytest.raises(StaleCacheError):
        model(**token, cache=cache)


def test_a_layer_alone_after_a_forward_that_failed():
    """The failed forward says nothing any more of sequences, or of which tokens are the first."""
    kept = Kept("threshold")
    layer = kept.model.model.norm
    x, position = hidden("llama", "model.layers.0", GIVEN), torch.arange(6)[None]
    around = {"position_embeddings": kept.model.model.rotary_emb(x, position), "position_ids": position}
    handle = layer.register_forward_pre_hook(lambda *a: 1 / 0)
    with kept.attachment.unlearn("a"), pytest.raises(ZeroDivisionError):
        logits(kept.model, GIVEN)
    handle.remove()
    with kept.attachment.unlearn("a"), pytest.raises(RuntimeError, match="ran outside its model"):
        kept.model.model.layers[1](x, **around)


def test_a_thread_without_a_context_is_refused():
    for place in (LAYER, PAIR):
        kept = Kept("threshold", place)
        with kept.attachment.unlearn("a"):
            assert "copy_context" in str(in_thread(functools.partial(logits, kept.model, GIVEN))["error"])


def test_what_a_splice_that_keeps_the_state_refuses():
    for kind in KINDS:
        kept = Kept(kind)
        with pytest.raises(RuntimeError, match="whose splice keeps the hidden state: the model's weights still hold"):
            kept.attachment.erase("a")
        with pytest.raises(ValueError, match=r"mask_mode is 'reselect'; layers .* keep the hidden state"):
            kept.attachment.mask_mode = "reselect"
        other = Mask.from_ids([0], sae=make_sae(seed=77), topic="other")
        with pytest.raises(ValueError, match="was made for another codebook"):
            kept.attachment.add_mask(other)
