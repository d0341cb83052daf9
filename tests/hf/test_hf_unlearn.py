"""unlearn: what holds where, for which sequence, thread and cache; and that what goes round it raises."""

from __future__ import annotations

import contextvars
import copy
import threading

import pytest
import torch
import transformers
from tiny_models import FAMILIES, add_masks, attach_to, build, in_thread, inputs, logits, mask_for, under

from cu_fast.hf import StaleCacheError

LAYER = "model.layers.1"


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


# -- unlearn -----------------------------------------------------------------------------------------------------


def test_what_unlearn_understands(attachment, given):
    base = under(attachment, None, given)
    a, b, both = (under(attachment, topics, given) for topics in ("a", "b", {"a", "b"}))
    assert len({tuple(t.flatten().tolist()) for t in (base, a, b, both)}) == 4
    assert torch.equal(under(attachment, None, given), base)
    assert torch.equal(under(attachment, [["a", "b"], ("b", "a")], given), both)
    attachment.add_mask(attachment.masks["a"][0] | attachment.masks["b"][0], "union")
    assert torch.equal(under(attachment, "union", given), both)
    mixed = under(attachment, [None, "b"], given)
    torch.testing.assert_close(mixed[0], base[0])
    torch.testing.assert_close(mixed[1], b[1])


def test_unlearn_says_what_is_wrong(attachment, given):
    for topics, error, message in [
        ("aa", ValueError, "there is no mask 'aa'; near names: a"),
        (["a", "zzz"], ValueError, "there is no mask 'zzz'; there are: a, b"),
        ([], ValueError, "given an empty list"),
        ([[], "a"], ValueError, "an entry of unlearn.* is an empty collection; say None"),
    ]:
        with pytest.raises(error, match=message), attachment.unlearn(topics):
            pass
    for topics in (["a"], ["a", "b", None], [None] * 3):
        with attachment.unlearn(topics):
            with pytest.raises(ValueError, match=rf"batch holds 2 sequences and unlearn\(\) was given {len(topics)}"):
                logits(attachment.model, given)
            with pytest.raises(ValueError, match=rf"generate\(\) was given 2 sequences, and unlearn\(\) {len(topics)}"):
                attachment.model.generate(**given)
    attachment.bottlenecks[LAYER].train()
    with attachment.unlearn(None):
        pass
    attachment.model.train()
    with (
        pytest.raises(RuntimeError, match=r"training mode; call model.eval\(\) before unlearn"),
        attachment.unlearn("a"),
    ):
        pass
    attachment.model.eval()
    with attachment.unlearn("a"):
        attachment.model.train()
        with pytest.raises(RuntimeError, match="training mode"):
            logits(attachment.model, given)


def test_a_batch_in_generate_is_the_input_or_its_beams_and_nothing_else(attachment, given):
    """Three beams make six rows of two sequences; four rows would be somebody else's idea of the batch."""
    model = attachment.model

    def doubled(ids, scores):
        return logits(model, {"input_ids": torch.cat([ids, ids])})[: len(ids), -1]

    with attachment.unlearn(["a", "b"]):
        with pytest.raises(ValueError, match=r"batch holds 4 sequences .* the batch should be 2$"):
            model.generate(**given, max_new_tokens=2, logits_processor=[doubled])
        config = transformers.GenerationConfig(num_beams=2, max_new_tokens=2, do_sample=False)
        assert len(model.generate(given["input_ids"], config)) == 2
        embeddings = model.get_input_embeddings()(given["input_ids"])
        assert len(model.generate(inputs_embeds=embeddings, max_new_tokens=2)) == 2
        sampled = model.generate(**given, do_sample=True, num_return_sequences=3, max_new_tokens=2)
        assert len(sampled) == 6
    with attachment.unlearn(["a"]):
        assert len(model.generate(max_new_tokens=2)) == 1  # from the beginning-of-sequence token


def test_an_inner_context_replaces_the_outer_one(attachment, given):
    base, a, b = (under(attachment, topics, given) for topics in (None, "a", "b"))
    with attachment.unlearn("a"):
        assert torch.equal(under(attachment, "b", given), b)
        assert torch.equal(under(attachment, None, given), base)
        assert torch.equal(under(attachment, ["b", "b"], given), b)
        with pytest.raises(KeyError), attachment.unlearn("b"):
            raise KeyError
        assert torch.equal(logits(attachment.model, given), a)
    assert torch.equal(under(attachment, None, given), base)


def test_rows_are_shared_counted_and_used_again(attachment, given):
    bottleneck, table = attachment.bottlenecks[LAYER], attachment._layers[0].table
    for i in range(70):
        attachment.add_mask(mask_for(bottleneck, [i], f"m{i}"))
    for i in range(70):
        with attachment.unlearn(f"m{i}"), attachment.unlearn([f"m{i}", None]):
            assert attachment._active.request.get().rows == (0, -1)
    assert len(table.table) == 64
    kept = table.table
    with torch.inference_mode(), attachment.unlearn([f"m{i}" for i in range(70)]):
        assert attachment._active.request.get().rows == tuple(range(70))
        with attachment.unlearn("m69"):
            assert attachment._active.request.get().rows == (69,)
    assert len(table.table) == 128 and table.table is not kept
    with attachment.unlearn("m3"):  # the table that grew in inference mode is written to outside it
        pass


def test_a_row_that_is_held_is_not_handed_out(attachment):
    """Contexts of several threads do not close in the order they were opened."""
    table = attachment._layers[0].table.table
    first, second = attachment._topics.request("a"), attachment._topics.request("b")
    again = attachment._topics.request("b")
    first.close()
    again.close()
    third = attachment._topics.request({"a", "b"})
    assert (first.rows, second.rows, again.rows, third.rows) == ((0,), (1,), (1,), (0,))
    assert torch.equal(table[1], attachment.masks["b"][0].bits)
    assert torch.equal(table[0], (attachment.masks["a"][0] | attachment.masks["b"][0]).bits)


# -- threads -----------------------------------------------------------------------------------------------------


def test_threads_use_different_masks(attachment, given):
    topics = ["a", "b", None, ["a", "b"], ["b", None], {"a", "b"}]
    expected = [under(attachment, t, given) for t in topics]
    barrier, results = threading.Barrier(len(topics)), {}

    def run(i):
        with attachment.unlearn(topics[i]):
            for _ in range(5):
                barrier.wait()
                results.setdefault(i, []).append(logits(attachment.model, given))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(topics))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        assert len(results[i]) == 5 and all(torch.equal(got, want) for got in results[i])


def test_a_thread_that_was_not_told_raises(attachment, given):
    """The TextIteratorStreamer pattern: generate in a thread, started inside the context."""
    model = attachment.model
    options = {**given, "max_new_tokens": 3, "do_sample": False}
    with attachment.unlearn("a"):
        expected = model.generate(**options)
        for fn in (lambda: model.generate(**options), lambda: logits(model, given), lambda: model.model(**given)):
            assert "copy_context" in str(in_thread(fn)["error"])
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(model.generate, **options))["value"], expected)
        assert torch.equal(in_thread(lambda: under(attachment, "b", given))["value"], under(attachment, "b", given))
        assert "value" in in_thread(lambda: under(attachment, None, given))
    for fn in (lambda: model.generate(**options), lambda: logits(model, given)):  # no mask holds anywhere now
        assert "nothing was said here" in str(in_thread(fn)["error"])
    with pytest.raises(RuntimeError, match="nothing was said here of what holds"):
        logits(model, given)


# -- caches ------------------------------------------------------------------------------------------------------


def test_a_cache_knows_content_not_names(attachment, given):
    model = attachment.model
    attachment.add_mask(attachment.masks["a"], "alias")
    more = {"input_ids": torch.tensor([[5], [6]])}

    def fill(topics):
        with attachment.unlearn(topics):
            return model(**given, use_cache=True).past_key_values

    with torch.no_grad():
        for filled, then in [("a", "alias"), ("a", ["a", "a"]), (["a", "b"], ["alias", "b"]), (None, [None, None])]:
            cache = copy.deepcopy(fill(filled))
            with attachment.unlearn(then):
                model(**more, past_key_values=cache)
        for filled, then in [("a", ["a", None]), (["a", "b"], ["b", "a"]), ({"a", "b"}, "a"), (["a", None], None)]:
            cache = copy.deepcopy(fill(filled))
            with attachment.unlearn(then), pytest.raises(StaleCacheError, match="this KV cache was computed under"):
                model(**more, past_key_values=cache)
        cache = fill("a")
        attachment.mask_mode = "reselect"
        with attachment.unlearn("a"), pytest.raises(StaleCacheError, match=r"\(ablate, .*\(reselect, "):
            model(**more, past_key_values=cache)


def test_an_emptied_cache_may_be_filled_under_anything(attachment, given):
    model = attachment.model
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    for topics in ("a", "b", None):
        with torch.no_grad(), attachment.unlearn(topics):
            got = model(**given, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, under(attachment, topics, given), atol=1e-4, rtol=1e-4)
        cache.reset()


def test_encoder_outputs_are_not_decoded_under_other_masks():
    model, given = build("t5_encoder"), inputs("t5_encoder")
    attachment = attach_to(model, FAMILIES["t5_encoder"].layer)
    add_masks(attachment, given)
    source = {key: given[key] for key in ("input_ids", "attention_mask")}
    target = {"decoder_input_ids": given["decoder_input_ids"], "attention_mask": given["attention_mask"]}
    with torch.no_grad():
        with attachment.unlearn(None):
            unmasked = model.get_encoder()(**source)
        with attachment.unlearn("a"):
            encoded = model.get_encoder()(**source)
            got = model(encoder_outputs=encoded, **target).logits
            assert torch.equal(got, logits(model, given))
            for stale in (unmasked, (unmasked.last_hidden_state,)):
                with pytest.raises(StaleCacheError, match=r"encoder's output was computed under no mask, and now a \("):
                    model(encoder_outputs=stale, **target)
            with pytest.raises(StaleCacheError):
                model.generate(encoder_outputs=unmasked)
        with (
            attachment.unlearn(None),
            pytest.raises(StaleCacheError, match=r"encoder's output was computed under a \(.*now no mask holds"),
        ):
            model(encoder_outputs=encoded, **target)


# -- what goes round the bottleneck -------------------------------------------------------------------------------


def test_a_layer_that_does_not_run_raises(attachment, given):
    model = attachment.model
    with attachment.unlearn("a"):
        logits(model, given)
        model.config.num_hidden_layers = 1  # as an early exit does
        with pytest.raises(RuntimeError, match=r"swapped layers \['model.layers.1'\] did not run"):
            logits(model, given)
        model.config.num_hidden_layers = 3
    layer, model.model.layers[1] = model.model.layers[1], build("llama").model.layers[1]
    with (
        pytest.raises(RuntimeError, match=r"layer 'model.layers.1' was replaced since attach"),
        attachment.unlearn("a"),
    ):
        pass
    model.model.layers = model.model.layers[:1]
    with (
        pytest.raises(RuntimeError, match=r"layer 'model.layers.1' was replaced since attach"),
        attachment.unlearn("a"),
    ):
        pass
    assert layer.codebook_bottleneck is attachment.bottlenecks[LAYER]
