"""attach, masks, observe, report, detach, and that what cannot be done raises. unlearn: test_hf_unlearn.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    C,
    D,
    add_masks,
    attach_to,
    bottleneck_config,
    build,
    in_thread,
    inputs,
    logits,
    mask_for,
    under,
)

import cu_fast
from cu_fast.masks import Mask

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


# -- attach ------------------------------------------------------------------------------------------------------


def test_attach_says_what_is_wrong_and_changes_nothing(model, given, tmp_path):
    before, modules = logits(model, given), dict(model.named_modules())
    good = bottleneck_config()
    for source, error, message in [
        ({"model.layer.1": good}, ValueError, r"no layer 'model.layer.1'; near names: model.layers.1"),
        ({"???": good}, ValueError, r"no layer '\?\?\?'; there are: model, .*\.\.\."),
        ({LAYER: good, "model.layers.9": good}, ValueError, r"no layer 'model.layers.9'; near names: "),
        ({LAYER: bottleneck_config(d_model=48)}, ValueError, r"d_model of layer .* is 48; .*width at .* is 32"),
        (
            {LAYER: {"d_model": D}},
            TypeError,
            r"layer 'model.layers.1' has dict; it should be a BottleneckConfig, an SAE, or",
        ),
        ({}, ValueError, "no layer is named"),
        (tmp_path / "nowhere", FileNotFoundError, "nowhere.*should be a folder written by attachment.save"),
    ]:
        with pytest.raises(error, match=message):
            cu_fast.attach(model, source)
    with pytest.raises(ValueError, match="impl is 'fast'"):
        cu_fast.attach(model, {LAYER: good}, impl="fast")
    with pytest.raises(TypeError, match="model is str; it should be a transformers model"):
        cu_fast.attach("gpt2", {LAYER: good})
    with pytest.raises(TypeError, match=r"model is compiled; attach .* then call torch.compile"):
        cu_fast.attach(torch.compile(model), {LAYER: good})
    assert dict(model.named_modules()) == modules and torch.equal(logits(model, given), before)

    attach_to(model, LAYER)
    with pytest.raises(ValueError, match=r"layers \['model.layers.1'\] already have bottlenecks"):
        attach_to(model, "model.layers.0")
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(FAMILIES["llama"].config)
    with pytest.raises(ValueError, match="on the meta device; load the model's weights first"):
        attach_to(empty, LAYER)


def test_attach_leaves_the_random_state_alone_and_follows_the_seed(model):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = cu_fast.attach(model, {LAYER: bottleneck_config()})
    assert torch.equal(torch.get_rng_state(), state)
    first_hash = first.bottlenecks[LAYER].codebook_sha256()
    first.detach()
    assert cu_fast.attach(model, {LAYER: bottleneck_config()}).bottlenecks[LAYER].codebook_sha256() == first_hash


def test_attach_in_inference_mode_can_be_trained(model, given):
    with torch.inference_mode():
        attachment = attach_to(model, LAYER)
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    assert attachment.bottlenecks[LAYER].codebook.codes.grad is not None


def test_the_model_keeps_its_dtype_and_the_bottleneck_its_own(given):
    model = build("llama").bfloat16()
    attachment = attach_to(model, LAYER)
    assert attachment.bottlenecks[LAYER].codebook.codes.dtype == torch.float32
    assert logits(model, given).dtype == torch.bfloat16


def test_a_layer_may_return_a_model_output_and_any_module_is_a_model(model, given):
    """The inner model as the layer; and a plain module without a config, whose width is only known in the forward."""
    attachment = attach_to(model, "model")
    with attachment.observe(lambda x, _: entered.append(x)):
        entered = []
        output = logits(model, given)
    assert torch.equal(output, model.lm_head(attachment.bottlenecks["model"](entered[0])))

    plain = torch.nn.Sequential(
        torch.nn.Embedding(64, D), torch.nn.Linear(D, D), torch.nn.Sequential(torch.nn.Linear(D, 48))
    )
    plain.eval()
    attachment = attach_to(plain, "1")
    attachment.add_mask(mask_for(attachment.bottlenecks["1"], [1], "t"))
    with (
        attachment.unlearn(["t", None]),
        pytest.raises(RuntimeError, match=r"shape \[2, 32\] for 2 sequences; masks by"),
    ):
        plain(torch.tensor([1, 2]))
    attachment.detach()
    with pytest.raises(ValueError, match=r"d_model of layer '2.0' is 32; the model's width at '2.0' is 48"):
        attach_to(plain, "2.0")
    attach_to(plain, "2")
    with pytest.raises(ValueError, match="layer '2' returned width 48; its bottleneck's width is 32"):
        plain(torch.tensor([1, 2]))


# -- masks -------------------------------------------------------------------------------------------------------


def test_masks_are_routed_by_their_codebook(model, given):
    attachment = attach_to(model, "model.layers.0", LAYER)
    add_masks(attachment, given, "ab")
    assert {name: len(masks) for name, masks in attachment.masks.items()} == {"a": 2, "b": 2}
    first, second = attachment.bottlenecks.values()
    both = under(attachment, "a", given)
    attachment.add_mask(attachment.masks["a"][0], "only the first")
    assert not torch.equal(under(attachment, "only the first", given), both)
    report = {row["layer"]: [mask["name"] for mask in row["masks"]] for row in attachment.report()}
    assert report == {"model.layers.0": ["a", "b", "only the first"], LAYER: ["a", "b"]}

    foreign = Mask.from_ids([1], num_codes=C, codebook_sha256="0" * 64, topic="foreign")
    with pytest.raises(ValueError, match=r"'foreign' was made for another codebook \(sha256 000000000000"):
        attachment.add_mask(foreign)
    with pytest.raises(ValueError, match="there is a mask 'a' already; remove it first"):
        attachment.add_mask(attachment.masks["a"])
    with pytest.raises(ValueError, match=r"topics are \['a', 'b'\]; give them one name"):
        attachment.add_mask([attachment.masks["a"][0], attachment.masks["b"][0]])
    with pytest.raises(ValueError, match="neither should be empty"):
        attachment.add_mask([], "none")
    attachment.remove_mask("a")
    with pytest.raises(ValueError, match="there is no mask 'a'; there are: b, only the first"):
        attachment.remove_mask("a")

    with torch.no_grad():  # the same codebook twice: now the layer's name decides
        second.codebook.codes.copy_(first.codebook.codes)
    attachment.add_mask(mask_for(second, [3], "named", LAYER))
    ids = attachment.masks["only the first"][0].ids()
    for layer, book in attachment.bottlenecks.items():
        attachment.add_mask(mask_for(book, ids, f"at {layer}", layer))
    together = under(attachment, [f"at {layer}" for layer in attachment.bottlenecks], given)
    for i, layer in enumerate(attachment.bottlenecks):
        torch.testing.assert_close(together[i], under(attachment, f"at {layer}", given)[i])
    with pytest.raises(ValueError, match="'unnamed' is for layer None, and other layers have its codebook"):
        attachment.add_mask(mask_for(second, [3], "unnamed"))
    assert [[m["name"] for m in row["masks"]][-1:] for row in attachment.report()] == [
        ["at model.layers.0"], ["at model.layers.1"],
    ]  # fmt: skip


def test_a_mask_of_a_codebook_that_changed_is_refused(attachment, given):
    codes = attachment.bottlenecks[LAYER].codebook.codes
    with attachment.unlearn("a"):
        with torch.no_grad():
            codes[0] += 1
        with pytest.raises(
            RuntimeError, match=r"codebook of layer 'model.layers.1' changed inside the unlearn context"
        ):
            logits(attachment.model, given)
    with pytest.raises(RuntimeError, match="a codebook changed since mask 'a' was added"), attachment.unlearn("a"):
        pass
    with torch.no_grad():
        codes[0] -= 1
    attachment.model.bfloat16()
    with pytest.raises(RuntimeError, match="cast to another dtype"), attachment.unlearn("a"):
        pass


# -- the rest of the attachment -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_copies_pickles_and_traces_are_refused(attachment):
    for copying in (copy.deepcopy, pickle.dumps):
        for what in (attachment.model, attachment):
            with pytest.raises(TypeError, match="a model with an attachment cannot be"):
                copying(what)
    plain = torch.nn.Sequential(torch.nn.Embedding(64, D), torch.nn.Linear(D, D))
    attach_to(plain, "1")
    with pytest.raises(RuntimeError, match=r"would bake the present masks in"):
        torch.jit.trace(plain, torch.tensor([1, 2]))


def test_observe_sees_what_enters_each_bottleneck(model, given):
    attachment = attach_to(model, "model.layers.0", LAYER)
    seen = []
    with torch.no_grad():
        with attachment.observe(lambda x, bottleneck: seen.append((x, bottleneck))):
            hidden = model(**given, output_hidden_states=True).hidden_states
            assert "value" in in_thread(lambda: model(**given))  # another thread is not observed
        model(**given)
    assert [b for _, b in seen] == list(attachment.bottlenecks.values())
    assert all(torch.equal(b(x), hidden[i + 1]) for i, (x, b) in enumerate(seen))
    assert [x.shape for x, _ in seen] == [(2, 6, D)] * 2


def test_the_report_counts_what_ran(attachment, given):
    bottleneck, mask = attachment.bottlenecks[LAYER], attachment.masks["a"][0]
    kept = []
    with attachment.observe(lambda x, b: kept.append(b.select(x).ids)):
        under(attachment, None, given)
    per_sequence = (kept[0].reshape(2, -1)[..., None] == mask.ids()).any(-1).sum(-1)
    for mode in ("ablate", "reselect"):
        attachment.mask_mode = mode
        attachment.reset_report()
        under(attachment, ["a", None], given)
        under(attachment, None, given)
        (row,) = attachment.report()
        assert row.pop("impl") in ("cpu", "reference")
        assert row.pop("scan") == "none"  # too few codes for an int8 plane
        assert row == {
            "layer": LAYER, "splice": "replace", "codes": C, "k": 4, "mask_mode": mode, "tokens": 24, "hits": int(per_sequence[0]),
            "masks": [
                {"name": name, "digest": m.digest, "deleted": m.num_deleted}
                for name, (m,) in attachment.masks.items()
            ],
        }  # fmt: skip
    assert per_sequence[0] > 0 and bottleneck.mask_mode == "reselect"


def test_mask_mode(model, given):
    attachment = attach_to(model, "model.layers.0", LAYER)
    add_masks(attachment, given)
    ablated = under(attachment, "a", given)
    assert attachment.mask_mode == "ablate"
    attachment.bottlenecks[LAYER].mask_mode = "reselect"
    assert attachment.mask_mode == "mixed"
    attachment.mask_mode = "reselect"
    assert attachment.mask_mode == "reselect" and not torch.equal(under(attachment, "a", given), ablated)
    with pytest.raises(ValueError, match="mask_mode is 'zero'; it should be 'ablate' or 'reselect'"):
        attachment.mask_mode = "zero"
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="mask_mode cannot change while masks hold"):
        attachment.mask_mode = "ablate"


def test_no_use_after_detach(attachment, given, tmp_path):
    model, mask = attachment.model, attachment.masks["a"]
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match=r"detach\(\) while masks hold; leave every"):
        attachment.detach()
    attachment.detach()
    for use in (
        attachment.detach, attachment.report, lambda: attachment.unlearn("a").__enter__(),
        lambda: attachment.observe(print).__enter__(), lambda: attachment.save(tmp_path / "x"),
        lambda: attachment.add_mask(mask, "x"), lambda: attachment.load_mask(tmp_path),
        lambda: attachment.remove_mask("a"), attachment.reset_report, attachment.auxiliary_loss,
        lambda: setattr(attachment, "mask_mode", "ablate"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"the attachment was detached; attach\(\) again"):
            use()

    def mine(*args, **kwargs):
        return "mine"

    model.generate = mine
    again = attach_to(model, LAYER)
    assert model.generate() == "mine"
    again.detach()
    assert model.generate is mine


# -- names and places of masks ---------------------------------------------------------------------------------------


def test_names_are_compared_as_they_look(attachment, given):
    (bottleneck,) = attachment.bottlenecks.values()
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert attachment.add_mask(mask_for(bottleneck, [1, 2], "x"), decomposed) == composed
    with pytest.raises(ValueError, match="already; remove it first"):
        attachment.add_mask(mask_for(bottleneck, [3], "x"), composed)
    for alike in ("ca\ufb01", "cafi"), ("two words", "two\u00a0words"), ("zero", "ze\u200bro"):
        attachment.add_mask(mask_for(bottleneck, [3], "x"), alike[0])
        with pytest.raises(ValueError, match="looks like that of the mask"):
            attachment.add_mask(mask_for(bottleneck, [3], "x"), alike[1])
    assert torch.equal(under(attachment, composed, given), under(attachment, {decomposed}, given))
    attachment.always = {decomposed}
    assert attachment.always == {composed}
    attachment.always = ()
    attachment.remove_mask(decomposed)
    assert composed not in attachment.masks


def test_a_mask_of_another_place_is_taken_only_where_that_is_said():
    model = build("llama")
    attachment = attach_to(model, LAYER)
    (bottleneck,) = attachment.bottlenecks.values()
    found = mask_for(bottleneck, [1], "x", layer="model.layers.2")
    with pytest.raises(
        ValueError, match=r"was found at layer 'model.layers.2', and its codebook is at 'model.layers.1' here"
    ):
        attachment.add_mask(found)
    assert attachment.add_mask(found, elsewhere=True) == "x"
    for name, layer in (("inside", f"base_model.model.{LAYER}"), ("outside", "layers.1"), ("not known", None)):
        attachment.add_mask(mask_for(bottleneck, [1], "x", layer=layer), name)
