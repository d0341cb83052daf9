"""Every supported family: what leaves the swapped layer has gone through the bottleneck, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, D, add_masks, attach_to, build, inputs, logits, under

from cu_fast.hf import StaleCacheError

ALL = sorted(FAMILIES)
DECODERS = [name for name in ALL if name != "t5_encoder"]


@pytest.fixture(params=ALL)
def name(request):
    return request.param


def hidden(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_the_output_is_the_bottlenecks_of_the_base_layers(name):
    """By hand: the base model's layer output, through the bottleneck, put in place of what the next layer is given."""
    family, given = FAMILIES[name], inputs(name)
    model = build(name)
    base = logits(model, given)
    attachment = attach_to(model, family.layer)
    swapped = logits(model, given)
    assert not torch.allclose(swapped, base, atol=1e-3)

    bottleneck = attachment.bottlenecks[family.layer]
    by_hand = build(name)
    left = {}

    def replace(module, args, kwargs):
        left["in"] = args[0]
        return (bottleneck(args[0]), *args[1:]), kwargs

    by_hand.get_submodule(family.layer).register_forward_hook(lambda m, a, output: left.update(out=hidden(output)))
    by_hand.get_submodule(family.next).register_forward_pre_hook(replace, with_kwargs=True)
    assert torch.equal(logits(by_hand, given), swapped)
    assert torch.equal(left["in"], left["out"]), "the layer's output, after its residual, is what the next one gets"


def test_the_cache_changes_nothing(name):
    """Greedy generation with a cache, without one, and by hand without generate: the same tokens."""
    model, given = build(name), inputs(name)
    attachment = attach_to(model, FAMILIES[name].layer)
    add_masks(attachment, given)
    prompt = {key: given[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False}
    with attachment.unlearn(None):
        plain = model.generate(**prompt, **options)
    for topics in ("a", ["a", None]):
        with attachment.unlearn(topics):
            cached = model.generate(**prompt, **options, use_cache=True)
            assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
            if not name.startswith("t5"):
                ids = prompt["input_ids"]
                for _ in range(5):
                    ids = torch.cat([ids, logits(model, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
                assert torch.equal(cached, ids)
        assert not torch.equal(cached, plain), "the mask should have changed what is said"
    assert torch.equal(cached[1], plain[1]), "the sequence without a mask says what it said"


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(("t5", "mamba"))])
def test_left_padding(name):
    """A padded sequence gives the logits of the sequence alone, masks included."""
    model, given = build(name), inputs(name, batch=1)
    attachment = attach_to(model, FAMILIES[name].layer)
    add_masks(attachment, given)
    ids = given["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    other = torch.randint(3, 60, padded.shape, generator=torch.Generator().manual_seed(5))
    attention = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    batch = {"input_ids": torch.cat([padded, other]), "attention_mask": attention}
    batch["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    if name == "opt":
        del batch["position_ids"]  # OPT works them out from the attention mask
    for entry in (None, "a"):
        with attachment.unlearn([entry]):
            alone = logits(model, given)
        with attachment.unlearn([entry, "b"]):
            together = logits(model, batch)
        torch.testing.assert_close(together[:1, 3:], alone, atol=2e-4, rtol=1e-4)


def test_per_sequence_masks_equal_single_runs(name):
    """Given the same activations a bottleneck's outputs are equal bit for bit; end to end they are close.

    So what differs end to end is the base model's own arithmetic: its layers round differently by batch.
    """
    model, given = build(name), inputs(name, batch=3)
    attachment = attach_to(model, FAMILIES[name].layer)
    add_masks(attachment, given)
    entries = ["a", None, ["a", "b"]]
    bottleneck = attachment.bottlenecks[FAMILIES[name].layer]
    layer = attachment._layers[0]

    entered = []
    under(attachment, None, inputs(name, batch=2))  # a batch from which it can be told which dimension is the batch
    with attachment.observe(lambda x, _: entered.append(x.clone())):
        with attachment.unlearn(entries) as active:
            together = logits(model, given)
            rows = active._active.request.get().rows
            x = entered[0]
            row = torch.tensor(rows, dtype=torch.int32).repeat_interleave(x.shape[1])
            batched = bottleneck(x, layer.table.table, row)
            for i in range(3):
                alone = bottleneck(x[i : i + 1], layer.table.table, row[i * x.shape[1] : (i + 1) * x.shape[1]])
                assert torch.equal(alone[0], batched[i])
        for i, entry in enumerate(entries):
            entered.clear()
            with attachment.unlearn([entry]):
                single = logits(model, {key: value[i : i + 1] for key, value in given.items()})
            torch.testing.assert_close(together[i], single[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_beams_and_return_sequences_follow_their_sequence(name):
    model, given = build(name), inputs(name, batch=2)
    attachment = attach_to(model, FAMILIES[name].layer)
    add_masks(attachment, given)
    prompt = {key: given[key] for key in ("input_ids", "attention_mask")}
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        options |= {"max_new_tokens": 4, "do_sample": False}
        with attachment.unlearn(["a", "b"]):
            together = model.generate(**prompt, **options)
        each = len(together) // 2
        for i, topic in enumerate("ab"):
            with attachment.unlearn(topic):
                alone = model.generate(**{key: value[i : i + 1] for key, value in prompt.items()}, **options)
            assert torch.equal(together[i * each : (i + 1) * each], alone)


@pytest.mark.parametrize("name", [n for n in ALL if n != "t5_encoder"])
def test_a_cache_is_not_continued_under_other_masks(name):
    model, given = build(name), inputs(name)
    attachment = attach_to(model, FAMILIES[name].layer)
    add_masks(attachment, given)
    key = "cache_params" if name == "mamba" else "past_key_values"
    more = {"decoder_input_ids" if name.startswith("t5") else "input_ids": torch.tensor([[5], [6]])}
    with torch.no_grad():
        with attachment.unlearn("a"):
            first = model(**given, use_cache=True)
            if name.startswith("t5"):
                more["encoder_outputs"] = (first.encoder_last_hidden_state,)
            cache = getattr(first, key)
            model(**more, **{key: cache}, use_cache=True)
            with attachment.unlearn("b"), pytest.raises(StaleCacheError, match=r"under a \(.*now b \("):
                model(**more, **{key: cache}, use_cache=True)
        with attachment.unlearn(None):
            with pytest.raises(StaleCacheError, match=r"under a \(.*now no mask"):
                model(**more, **{key: cache}, use_cache=True)
            unmasked = getattr(model(**given, use_cache=True), key)
        with attachment.unlearn("a"), pytest.raises(StaleCacheError, match=r"under no mask, and now a"):
            model(**more, **{key: unmasked}, use_cache=True)


def test_hidden_states_are_recorded_after_the_bottleneck(name):
    """Also where transformers put its recording hooks there before attach."""
    model, given = build(name), inputs(name)
    key = {"t5_decoder": "decoder_hidden_states", "t5_encoder": "encoder_hidden_states"}.get(name, "hidden_states")
    index = 1 if name == "mamba" else 2  # the others record the embedding first
    with torch.no_grad():
        model(**given, output_hidden_states=True)
        attachment = attach_to(model, FAMILIES[name].layer)
        entered = []
        with attachment.observe(lambda x, _: entered.append(x)):
            recorded = model(**given, output_hidden_states=True)[key][index]
        assert torch.equal(recorded, attachment.bottlenecks[FAMILIES[name].layer](entered[0]))


def test_detach_restores_the_model_bit_for_bit(name):
    model, given = build(name), inputs(name)
    before = logits(model, given)
    keys, attributes = list(model.state_dict()), {n: _attributes(m) for n, m in model.named_modules()}
    attachment = attach_to(model, FAMILIES[name].layer)
    assert len(model.state_dict()) > len(keys)
    logits(model, given)
    attachment.detach()
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, given), before)
    assert {n: _attributes(m) for n, m in model.named_modules()} == attributes


def _attributes(module):
    """Everything a module holds, hooks and instance attributes too, by identity where it cannot be compared."""
    return {
        key: dict(value) if isinstance(value, dict) else value if isinstance(value, (bool, str, set)) else id(value)
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers")
    }


def test_a_nan_hidden_state_shows(name):
    model, given = build(name), inputs(name)
    attach_to(model, FAMILIES[name].layer)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[given["input_ids"][0, 2]] = torch.nan
        if name == "t5_decoder":
            embedding.weight[given["decoder_input_ids"][0, 1]] = torch.nan
    result = logits(model, given)
    assert result[0].isnan().any() and result.shape[-1] > D
