"""What a forward continues from: caches of every kind, states that are no cache, encoder outputs, and what they were
filled under."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    D,
    add_masks,
    attach_to,
    bottleneck_config,
    build,
    inputs,
    logits,
    mask_for,
    under,
)

import cu_fast
from cu_fast.hf import StaleCacheError

LAYER = "model.layers.1"


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture
def attachment(given):
    attached = attach_to(build("llama"), LAYER)
    add_masks(attached, given)
    return attached


# -- states that are no cache ----------------------------------------------------------------------------------------


def rwkv():
    return hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=3)), "rwkv.blocks.1"


def xlnet():
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=D, n_layer=3, n_head=4, d_inner=48, mem_len=8)
    return hf.XLNetLMHeadModel(config), "transformer.layer.1"


@pytest.mark.parametrize(("make", "state"), [(rwkv, "state"), (xlnet, "mems")])
def test_a_state_that_carries_no_stamp(make, state):
    torch.manual_seed(0)
    model, layer = make()
    model, given = model.eval(), inputs("llama")
    more = {"input_ids": torch.tensor([[5], [6]])}
    attachment = attach_to(model, layer)
    use = {"use_cache": True} if state == "state" else {"use_mems": True}
    with torch.no_grad():
        filled = getattr(model(input_ids=given["input_ids"], **use), state)
        model(**more, **{state: filled})  # there are no masks yet
        add_masks(attachment, {"input_ids": given["input_ids"]})
        for topics in ("a", None):
            with attachment.unlearn(topics):
                for given_state in (filled, torch.stack(filled)):
                    with pytest.raises(StaleCacheError, match=f"{state} is .*only a transformers.Cache can tell"):
                        model(**more, **{state: given_state})
                model(**more)


def test_a_model_that_keeps_its_state_in_its_modules():
    config = hf.RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=D,
    )
    with pytest.raises(ValueError, match="a recurrent_gemma model keeps its recurrent state in its modules"):
        cu_fast.attach(hf.RecurrentGemmaForCausalLM(config), {"model.layers.1": bottleneck_config()})


# -- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.fixture
def t5():
    model, given = build("t5_encoder"), inputs("t5_encoder")
    attachment = attach_to(model, FAMILIES["t5_encoder"].layer)
    add_masks(attachment, given)
    return model, given, attachment


def encoded_under(attachment, model, given, topics):
    with torch.no_grad(), attachment.unlearn(topics):
        return model.get_encoder()(given["input_ids"], attention_mask=given["attention_mask"])


def test_encoder_outputs_by_position(t5):
    model, given, attachment = t5
    plain = encoded_under(attachment, model, given, None)
    mask, target = given["attention_mask"], given["decoder_input_ids"]
    with torch.no_grad(), attachment.unlearn("a"):
        for stale in (plain, (plain.last_hidden_state,)):
            with pytest.raises(StaleCacheError, match="encoder's output was computed under no mask"):
                model(None, mask, target, None, stale)
        fresh = model.get_encoder()(given["input_ids"], attention_mask=mask)
        got = model(None, mask, target, None, fresh).logits
        torch.testing.assert_close(got, logits(model, given), atol=1e-4, rtol=1e-4)


def test_an_encoder_output_whose_tensor_was_replaced(t5):
    model, given, attachment = t5
    plain = encoded_under(attachment, model, given, None)
    rest = {"attention_mask": given["attention_mask"], "decoder_input_ids": given["decoder_input_ids"]}
    with torch.no_grad(), attachment.unlearn("a"):
        replaced, written = (encoded_under(attachment, model, given, "a") for _ in range(2))
        replaced.last_hidden_state = plain.last_hidden_state
        written.last_hidden_state.copy_(plain.last_hidden_state)
        for stale in (replaced, written):
            with pytest.raises(StaleCacheError, match="holds another tensor than the encoder gave"):
                model(encoder_outputs=stale, **rest)
            with pytest.raises(StaleCacheError, match="holds another tensor than the encoder gave"):
                model.generate(encoder_outputs=stale, max_new_tokens=2)
        whole = encoded_under(attachment, model, given, "a")
        beams = model.generate(encoder_outputs=whole, max_new_tokens=3, num_beams=2, do_sample=False)
        again = model.generate(given["input_ids"], max_new_tokens=3, num_beams=2, do_sample=False)
        assert torch.equal(beams, again)


def test_a_cross_attention_cache_from_another_forward(t5):
    """Beside a self-attention cache that is new, and so holds nothing that could be stale."""
    model, given, attachment = t5
    more = {"decoder_input_ids": torch.tensor([[5], [6]]), "attention_mask": given["attention_mask"]}
    with torch.no_grad():
        with attachment.unlearn(None):
            old = model(**given, use_cache=True).past_key_values
        fresh = encoded_under(attachment, model, given, "a")
        swapped = copy.deepcopy(old)
        swapped.self_attention_cache = hf.DynamicCache()
        for cache in (hf.EncoderDecoderCache(hf.DynamicCache(), copy.deepcopy(old.cross_attention_cache)), swapped):
            with attachment.unlearn("a"), pytest.raises(StaleCacheError, match="KV cache was computed under no mask"):
                model(encoder_outputs=fresh, past_key_values=cache, **more)
        old.reset()
        with attachment.unlearn("a"):
            got = model(encoder_outputs=fresh, past_key_values=old, **more).logits
            want = model(encoder_outputs=fresh, **more).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_a_swapped_vision_tower_computed_before():
    """Given in place of the images, it was computed under other masks, and carries no stamp."""
    vision = hf.models.mllama.configuration_mllama.MllamaVisionConfig(
        hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=4, image_size=16,
        patch_size=8, vision_output_dim=2 * D, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]],
        max_num_tiles=1,
    )  # fmt: skip
    text = hf.models.mllama.configuration_mllama.MllamaTextConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.MllamaForConditionalGeneration(hf.MllamaConfig(vision_config=vision, text_config=text)).eval()
    ids, one = torch.randint(3, VOCABULARY, (2, 6)), torch.ones(2, 1, dtype=torch.long)
    pictures = {
        "pixel_values": torch.randn(2, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": one,
        "aspect_ratio_mask": one[..., None],
    }

    def seen():
        return model.model.multi_modal_projector(model.model.vision_model(**pictures).last_hidden_state).reshape(
            2, -1, D
        )

    attachment = attach_to(model, "model.vision_model.transformer.layers.1")
    with torch.no_grad():
        logits(model, {"input_ids": ids, "cross_attention_states": seen()})  # there are no masks yet
        add_masks(attachment, {"input_ids": ids, **pictures})
        with attachment.unlearn(None):
            plain = seen()
        with attachment.unlearn("a"):
            with pytest.raises(StaleCacheError, match="cross_attention_states does not tell under which masks"):
                model(input_ids=ids, cross_attention_states=plain)
            with pytest.raises(StaleCacheError, match="cross_attention_states does not tell under which masks"):
                model.generate(ids, cross_attention_states=plain, max_new_tokens=2)
            model(input_ids=ids, **pictures)


# -- erasing, and rows -----------------------------------------------------------------------------------------------


def test_a_cache_from_before_codes_were_erased(attachment, given):
    model, more = attachment.model, {"input_ids": torch.tensor([[5], [6]])}
    with torch.no_grad():
        with attachment.unlearn(None):
            caches = [model(**given, use_cache=True).past_key_values for _ in range(3)]
            with pytest.raises(RuntimeError, match=r"erase\(\) while an unlearn context is open"):
                attachment.erase("a")
        attachment.erase("a")
        with attachment.unlearn(None):
            with pytest.raises(
                StaleCacheError, match="computed under no mask, and now no mask, after codes were erased"
            ):
                model(**more, past_key_values=caches[0])
            cache = model(**given, use_cache=True).past_key_values
            model(**more, past_key_values=cache)
        attachment.erase("b")
        with attachment.unlearn(None), pytest.raises(StaleCacheError):
            model(**more, past_key_values=cache)
        # Silence means the same as None here, there are no masks left.
        with pytest.raises(StaleCacheError):
            model(**more, past_key_values=caches[1])
        attachment.detach()
        attach_to(model, LAYER)  # with all codes: neither is it what a new attachment computes
        with pytest.raises(StaleCacheError):
            model(**more, past_key_values=caches[2])


def select(cache):
    cache.batch_select_indices(torch.tensor([1, 0]))


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def by_hand(cache):
    cache.layers[0].keys = cache.layers[0].keys.flip(0)


@pytest.mark.parametrize(
    ("kind", "move"), [("dynamic", select), ("dynamic", reorder), ("dynamic", by_hand), ("static", reorder)]
)
def test_rows_of_a_cache_that_were_moved(attachment, given, kind, move):
    """Under a mask for each sequence, a row's keys and values carry its mask: moving rows moves masks."""
    model, more = attachment.model, {"input_ids": torch.tensor([[5], [6]])}

    def fill(topics):
        cache = hf.DynamicCache() if kind == "dynamic" else hf.StaticCache(config=model.config, max_cache_len=16)
        with attachment.unlearn(topics):
            model(**given, past_key_values=cache, use_cache=True)
        return cache

    with torch.no_grad():
        moved = fill(["a", None])
        move(moved)
        with attachment.unlearn(["a", None]), pytest.raises(StaleCacheError, match="rows were selected or moved"):
            model(**more, past_key_values=moved)
        kept = fill(["a", None])
        for cache in (copy.deepcopy(kept), kept):
            with attachment.unlearn(["a", None]):
                for _ in range(2):
                    model(**more, past_key_values=cache)
        same = fill("a")  # one mask for all: order says nothing
        move(same)
        with attachment.unlearn("a"):
            model(**more, past_key_values=same)
        with attachment.unlearn(["a", None]), pytest.raises(StaleCacheError, match="rows were selected or moved"):
            longer = torch.cat([given["input_ids"], more["input_ids"]], 1)
            model.generate(longer, past_key_values=moved, max_new_tokens=2)


def test_beams_move_the_rows_of_their_own_sequence(attachment, given):
    with attachment.unlearn(["a", "b"]):
        together = attachment.model.generate(**given, num_beams=3, max_new_tokens=4, do_sample=False)
    for i, topic in enumerate("ab"):
        with attachment.unlearn(topic):
            alone = attachment.model.generate(
                given["input_ids"][i : i + 1], num_beams=3, max_new_tokens=4, do_sample=False
            )
        assert torch.equal(together[i : i + 1], alone)


def test_an_early_exit_that_is_refused_leaves_the_model_whole(attachment, given):
    """transformers cuts the model's depth for it, and does not mend that where an error comes."""
    model, one = attachment.model, given["input_ids"][:1]
    before = under(attachment, None, given)
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match=r"swapped layers \['model.layers.1'\] did not run"):
        model.generate(one, assistant_early_exit=1, max_new_tokens=4)
    assert model.config.num_hidden_layers == 3
    assert torch.equal(under(attachment, None, given), before)


def test_a_mask_whose_codes_another_erased(attachment, given, tmp_path):
    """It deletes nothing more, because there is nothing more to delete; its name still says so, and is saved."""
    first, second = attachment.masks["a"][0].ids().tolist()[:2]
    bottleneck = attachment.bottlenecks[LAYER]
    attachment.add_mask(mask_for(bottleneck, [first], "part"))
    attachment.add_mask([mask_for(bottleneck, [first], "x"), mask_for(bottleneck, [second], "y")], "two of a layer")
    before = bottleneck.codebook.codes.detach().clone()
    attachment.erase("two of a layer")
    kept = [i for i in range(len(before)) if i not in (first, second)]
    assert torch.equal(bottleneck.codebook.codes, before[kept])
    assert torch.equal(under(attachment, "part", given), under(attachment, None, given))
    attachment.save(tmp_path / "saved")
    again = cu_fast.attach(build("llama"), tmp_path / "saved")
    assert again.masks["part"][0].method["erased"] and set(again.masks) == {"a", "b", "part"}


def test_erasing_is_refused_before_anything_is_erased(given):
    layers = ("model.layers.0", LAYER)
    attachment = attach_to(build("llama"), *layers)
    first, second = attachment.bottlenecks.values()
    attachment.add_mask([mask_for(first, [1], "x", layers[0]), mask_for(second, range(147), "x", LAYER)])
    shas = [b.codebook_sha256() for b in (first, second)]
    with pytest.raises(
        ValueError, match=r"erasing mask 'x' leaves layer 'model.layers.1' 3 codes; k = 4 should remain"
    ):
        attachment.erase("x")
    assert [b.codebook_sha256() for b in (first, second)] == shas


def test_a_cache_that_was_filled_by_hand(attachment, given):
    """As prefix tuning does, with keys and values that it learned: nothing says under which masks they are right."""
    with torch.no_grad(), attachment.unlearn(None):
        learned = attachment.model(**given, use_cache=True).past_key_values
        cache = hf.DynamicCache()
        for i, layer in enumerate(learned.layers):
            cache.update(layer.keys, layer.values, i)
    more = {"input_ids": torch.tensor([[5], [6]])}
    with torch.no_grad(), attachment.unlearn("a"):
        with pytest.raises(StaleCacheError, match="this KV cache was computed under no mask"):
            attachment.model(**more, past_key_values=copy.deepcopy(cache))
        with pytest.raises(StaleCacheError, match="this KV cache was computed under no mask"):
            longer = torch.cat([given["input_ids"], more["input_ids"]], 1)
            attachment.model.generate(longer, past_key_values=cache, max_new_tokens=2)


def test_a_cache_given_by_position_to_a_forward_that_others_wrapped(given):
    """Its signature names nothing; the cache is looked at all the same."""
    model = build("llama").model
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    attachment = attach_to(model, "layers.1")
    with torch.no_grad(), attachment.unlearn(None):
        cache = model(given["input_ids"], None, None, hf.DynamicCache()).past_key_values
    bottleneck = attachment.bottlenecks["layers.1"]
    attachment.add_mask(mask_for(bottleneck, range(0, 150, 2), "a"))
    with torch.no_grad(), attachment.unlearn("a"), pytest.raises(StaleCacheError, match="computed under no mask"):
        model(torch.tensor([[5], [6]]), None, None, cache)


def test_a_cache_that_went_through_the_model_without_masks(given):
    """Filled under a mask, continued where nothing is attached, and then under the mask again."""
    model = build("llama")
    attachment = attach_to(model, LAYER)
    add_masks(attachment, given)
    masks, more = attachment.masks["a"], torch.tensor([[5], [6]])
    with torch.no_grad(), attachment.unlearn("a"):
        cache = model(**given, use_cache=True).past_key_values
    bottleneck = attachment.bottlenecks[LAYER]
    attachment.detach()
    with torch.no_grad():
        model(input_ids=more, past_key_values=cache, use_cache=True)
    again = cu_fast.attach(model, {LAYER: bottleneck.config})
    again.bottlenecks[LAYER].load_state_dict(bottleneck.state_dict())
    again.add_mask(masks, "a")
    with torch.no_grad(), again.unlearn("a"):
        with pytest.raises(StaleCacheError, match="holds 7 tokens, and 6 when a forward with masks left it"):
            model(input_ids=more, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        model(input_ids=more, past_key_values=cache, use_cache=True)
