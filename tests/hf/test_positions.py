"""Which tokens masks leave alone, because they are the first of their sequence; where it is not certain, none."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from tiny_models import VOCABULARY, C, D, attach_to, build, inputs, logits
from tiny_saes import LATENTS, make_sae, mask_of

import cu_fast
from cu_fast.hf.positions import first_of_paged, first_tokens, tokens_of
from cu_fast.masks import Mask

IDS = torch.arange(10).reshape(2, 5)


def first(given=None, length=0, n=1, **more):
    found = first_tokens({"input_ids": IDS, **(given or {}), **more}, ("input_ids", "inputs_embeds"), length, n)
    return None if found is None else found.int().tolist()


def none_of(batch=2, tokens=5):
    return [[0] * tokens] * batch


def test_the_first_tokens_of_a_batch():
    assert first() == [[1, 0, 0, 0, 0]] * 2
    assert first(n=3) == [[1, 1, 1, 0, 0]] * 2
    assert first(n=9) == [[1] * 5] * 2
    embedded = first_tokens({"inputs_embeds": torch.zeros(2, 5, 8)}, ("input_ids", "inputs_embeds"), 0, 1)
    assert embedded.int().tolist() == [[1, 0, 0, 0, 0]] * 2
    assert first_tokens({"pixel_values": torch.zeros(2, 3, 8, 8)}, ("input_ids",), 0, 1) is None
    assert first_tokens({"input_ids": torch.arange(5)}, ("input_ids",), 0, 1) is None


def test_padding_is_not_first():
    left, right = torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    assert first(attention_mask=left) == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert first(attention_mask=left, n=2) == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert first(attention_mask=right, n=4) == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert first(attention_mask=torch.zeros(2, 5)) == none_of()
    assert first(attention_mask=left, position_ids=(left.cumsum(1) - 1).clamp(min=0)) == first(attention_mask=left)


def seen(valid, length=0, room=0):
    """Which queries see which keys, bool [B, 1, S, K], as transformers makes it: who would see nothing sees everything."""
    K = valid.shape[1]
    causal = torch.arange(K + room) <= torch.arange(length, K)[:, None]
    mask = causal & torch.nn.functional.pad(valid.bool(), (0, room))[:, None]
    return (mask | ~mask.any(-1, keepdim=True))[:, None]


def added(mask, dtype=torch.float32):
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


LEFT, RIGHT = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7]), torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])


@pytest.mark.parametrize("length", [0, 2])
@pytest.mark.parametrize("valid", [LEFT, RIGHT], ids=["left", "right"])
def test_every_form_of_a_mask_says_the_same(valid, length):
    """Of S tokens after what the cache holds: of all keys, with room in a static cache, for each query, added or not."""
    given = {"input_ids": torch.zeros(2, 7 - length)}
    for name, mask in {
        "keys": valid,
        "keys, and room": torch.nn.functional.pad(valid, (0, 3)),
        "queries": seen(valid, length),
        "queries, and room": seen(valid, length, 3),
        "added": added(seen(valid, length)),
        "added, fp16": added(seen(valid, length, 3), torch.float16),
        "by kind of layer": {"full_attention": seen(valid, length), "sliding_attention": None},
        "heads": seen(valid, length).expand(2, 4, -1, -1),
    }.items():
        for held in (length, torch.tensor(length)) if mask is not valid or length else (length,):
            if torch.is_tensor(held) and "room" not in name:
                continue  # only a static cache has a tensor
            found = tokens_of(given | {"attention_mask": mask}, ("input_ids",), held)
            assert found.known and torch.equal(found.real, valid[:, length:].bool()), name
            before = found.before if torch.is_tensor(found.before) else torch.zeros(2, 1, dtype=torch.int64)
            assert torch.equal(before, valid[:, :length].sum(1, keepdim=True)), name


def test_masks_of_other_forms():
    given, every = {"input_ids": IDS}, torch.ones(2, 5, dtype=torch.bool)
    both_ways = (LEFT[:, 2:].bool()[:, None] & LEFT[:, 2:].bool()[:, :, None])[:, None]
    found = tokens_of(given | {"attention_mask": both_ways | ~both_ways.any(-1, keepdim=True)}, ("input_ids",), 0)
    assert torch.equal(found.real, LEFT[:, 2:].bool()), "an encoder's queries see what comes after them"
    for mask in (object(), torch.ones(2, 5, 5), torch.ones(2, 1, 1, 5), torch.ones(3, 5), torch.ones(2, 4)):
        found = tokens_of(given | {"attention_mask": mask}, ("input_ids",), 0)
        assert not found.known and torch.equal(found.real, every)
    # A decoder's tokens, and a mask of the encoder's.
    given = {"decoder_input_ids": IDS, "attention_mask": torch.zeros(2, 9)}
    assert tokens_of(given, ("input_ids", "decoder_input_ids"), 0).real.all()
    # Keys that the cache does not count one by one: the last ones are those of the forward.
    found = tokens_of({"input_ids": IDS, "attention_mask": LEFT}, ("input_ids",), None)
    assert torch.equal(found.real, LEFT[:, 2:].bool())


def test_after_a_cache():
    assert first(length=1) is None and first(length=7, n=3) is None
    assert first(length=2, n=3) == [[1, 0, 0, 0, 0]] * 2
    assert first(length=torch.tensor(2), n=3) == [[1, 0, 0, 0, 0]] * 2  # a static cache's length is a tensor
    assert first(length=torch.tensor(7), n=3) == none_of()
    # A mask of all tokens, those of the cache too, says which of these is the first.
    assert first(length=1, n=2, attention_mask=torch.ones(2, 6)) == [[1, 0, 0, 0, 0]] * 2
    padded = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [1] * 8])
    assert first(length=3, attention_mask=padded) == [[0, 1, 0, 0, 0], [0] * 5], "the cache holds padding alone"


def test_positions_switch_nothing_off():
    """At most n tokens per sequence are left alone, whatever positions say."""
    for positions in (torch.zeros(2, 5), torch.tensor([[0, 0, 0, 0, 0]])):
        assert first(position_ids=positions.long()) == [[1, 0, 0, 0, 0]] * 2
    assert first(position_ids=torch.arange(3, 8)[None]) == none_of(), "the caller says that they are not the first"
    assert first(position_ids=torch.arange(5).flip(0)[None]) == none_of()
    assert first(position_ids=torch.arange(5)[None].expand(3, 2, 5)) == [[1, 0, 0, 0, 0]] * 2, "of images and text"


def test_packed_rows():
    packed = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    assert first(position_ids=packed, use_cache=False) == [[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]]
    assert first(position_ids=packed, use_cache=False, n=2) == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]
    cut = torch.tensor([[1, 2, 3, 4, 0], [0, 1, 2, 3, 4]])
    found = first(position_ids=cut, use_cache=False, n=2)
    assert found == [[1, 0, 0, 0, 1], [1, 1, 0, 0, 0]], "nothing goes round the row's end"


def test_a_row_is_packed_only_where_the_model_takes_it_as_packed():
    """With a mask of attention, or a cache, tokens see the whole row before them, whatever their positions."""
    packed, alone = torch.tensor([[0, 1, 0, 1, 0]]).expand(2, 5), [[1, 0, 0, 0, 0]] * 2
    assert first(position_ids=packed) == alone, "a model that is told nothing makes a cache"
    assert first(position_ids=packed, use_cache=False, attention_mask=torch.ones(2, 5)) == alone
    assert first(position_ids=packed, use_cache=False, attention_mask=torch.ones(2, 1, 5, 5)) == alone
    assert first(position_ids=packed, use_cache=False, length=1, n=2)[0][2:] == [0, 0, 0]


def test_the_row_of_continuous_batching():
    positions = torch.tensor([[7, 0, 1, 2, 0, 9]])
    given = {"input_ids": torch.zeros(1, 6), "position_ids": positions}
    assert first_of_paged(given, ("input_ids",), 2).int().tolist() == [[0, 1, 1, 0, 1, 0]]
    assert first_of_paged({"input_ids": torch.zeros(1, 6)}, ("input_ids",), 2) is None


# -- in models ------------------------------------------------------------------------------------------------------

LAYER = "model.layers.1"


def changed_tokens(attachment, given, topics="all", **options):
    """bool [B, S]: what leaves the layer is not what it is without a mask."""
    kept = []
    layer = attachment.model.get_submodule(next(iter(attachment.bottlenecks)))
    handle = layer.register_forward_hook(
        lambda m, a, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    try:
        for entry in (None, topics):
            with torch.no_grad(), attachment.unlearn(entry):
                attachment.model(**copy.deepcopy({**given, **options}))
    finally:
        handle.remove()
    return (kept[0] != kept[1]).any(-1)


def swapped(name="llama", layer=LAYER, **options):
    """A model with an autoencoder, and a mask "all" of all of its latents: one fires at every token."""
    model, sae = build(name), make_sae()
    attachment = cu_fast.attach(model, {layer: sae}, **options)
    attachment.add_mask(mask_of(sae, range(LATENTS), "all"))
    return attachment


def test_skip_first_leaves_as_many_alone():
    given = inputs("llama")
    for skip in (0, 1, 3):
        changed = changed_tokens(swapped(skip_first=skip), given)
        assert not changed[:, :skip].any() and changed[:, skip:].all()
    assert torch.equal(changed_tokens(swapped(), given), changed_tokens(swapped(skip_first=1), given)), "the default"


@pytest.mark.parametrize(
    "name, layer",
    [
        ("t5_encoder", "encoder.block.1"),
        ("t5_decoder", "decoder.block.1"),
        ("mamba", "backbone.layers.1"),
        ("bert", "encoder.layer.1"),
    ],
)
def test_no_first_token_is_left_alone_where_it_is_no_sink(name, layer):
    """BERT's class and T5's first answer are read from it."""
    if name == "bert":
        config = hf.BertConfig(
            hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCABULARY
        )
        model, given = hf.BertModel(config).eval(), inputs("llama")
    else:
        model, given = build(name), inputs(name)
    sae = make_sae()
    attachment = cu_fast.attach(model, {layer: sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "all"))
    assert [one.skip_first for one in attachment._layers] == [0]
    assert changed_tokens(attachment, given).all()


@pytest.mark.parametrize("place", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn:in", "model.norm"])
def test_the_default_at_every_place_of_a_decoder(place):
    assert [one.skip_first for one in cu_fast.attach(build("llama"), {place: make_sae()})._layers] == [1]


def test_a_bottleneck_that_replaces_skips_nothing():
    attachment = attach_to(build("llama"), LAYER)
    (bottleneck,) = attachment.bottlenecks.values()
    sha256 = bottleneck.codebook_sha256()
    attachment.add_mask(Mask.from_ids(range(C), num_codes=C, topic="all", codebook_sha256=sha256))
    assert changed_tokens(attachment, inputs("llama")).all()


def test_positions_of_zero_switch_nothing_off_in_a_model():
    given = inputs("llama")
    attachment = swapped()
    zeros = torch.zeros_like(given["input_ids"])
    assert changed_tokens(attachment, given, position_ids=zeros)[:, 1:].all()
    assert changed_tokens(attachment, {"input_ids": given["input_ids"]}, position_ids=zeros)[:, 1:].all()
    # transformers gives a forward a cache, so this row is not packed for it: each token sees all before it.
    ones_and_zeros = torch.tensor([[0, 1, 0, 1, 0, 1]]).expand(2, 6)
    plain = {"input_ids": given["input_ids"]}
    assert changed_tokens(attachment, plain, position_ids=ones_and_zeros)[:, 1:].all()
    packed = changed_tokens(attachment, plain, position_ids=ones_and_zeros, use_cache=False)
    assert torch.equal(packed, ones_and_zeros == 1)
    four = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    assert changed_tokens(attachment, {"input_ids": given["input_ids"], "attention_mask": four})[:, 1:].all()


def test_one_token_at_a_time_through_a_state_that_does_not_know_its_length():
    """Mamba's state tells only whether it holds any tokens."""
    given = inputs("mamba")
    attachment = swapped("mamba", "backbone.layers.1", skip_first=2)
    with torch.no_grad(), attachment.unlearn("all"):
        cache = attachment.model(input_ids=given["input_ids"], use_cache=True).cache
        attachment.reset_report()
        attachment.model(input_ids=torch.tensor([[5], [6]]), cache=cache, use_cache=True)
    (report,) = attachment.report()
    assert report["changed"] == report["tokens"] == 2


def test_every_token_that_is_generated_loses_its_latents():
    """Chunks of a prompt, caches of all kinds, beams, left padding: tokens after the first are never left alone."""
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), inputs("llama")["input_ids"]], 1)
    ids[1, :2] = torch.tensor([9, 8])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    for more in (
        {},
        {"num_beams": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        attachment = swapped()
        with attachment.unlearn("all"):
            attachment.model.generate(**given, max_new_tokens=4, do_sample=False, **more)
        (report,) = attachment.report()
        rows = 2 * more.get("num_beams", 1)
        forwards = 4 if more.get("use_cache") is False else 1
        assert rows < report["tokens"] and report["tokens"] - report["changed"] <= rows * forwards, more


@pytest.mark.parametrize("skip", [1, 3])
def test_the_first_tokens_do_not_depend_on_the_cache_nor_on_chunks(skip):
    """Of prompts that are padded on the left, one by more tokens than a chunk has."""
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.long), inputs("llama")["input_ids"]], 1)
    ids[1, 2:4] = torch.tensor([9, 8])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    answers = []
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 3}):
        attachment = swapped(skip_first=skip)
        with attachment.unlearn("all"):
            found = attachment.model.generate(
                **given, **more, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        answers.append(found.logits[0])
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], atol=1e-4, rtol=1e-4)


def test_a_static_cache_in_steps_gives_what_one_forward_gives():
    given = inputs("llama")
    for name in ("llama", "gemma3", "mistral"):  # the last two have windows
        attachment = swapped(name)
        for make in (hf.DynamicCache, lambda **k: hf.StaticCache(max_cache_len=16, **k)):
            with attachment.unlearn("all"):
                want = logits(attachment.model, given, use_cache=False)
                cache = make(config=attachment.model.config)
                got = [
                    logits(attachment.model, {"input_ids": part}, cache=cache, use_cache=True)
                    for part in given["input_ids"].split([2, 3, 1], dim=1)
                ]
            torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-3, rtol=1e-3)


def test_a_layer_that_puts_tokens_first():
    """[S, B, D] with as many tokens as sequences: which is the first is not certain, so none is left alone."""

    class Core(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(D, D)

        def forward(self, x):
            return self.layer(x)

    class Model(hf.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed, self.core = torch.nn.Embedding(VOCABULARY, D), Core()

        def forward(self, input_ids):
            return self.core(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    model, sae = Model(build("llama").config).eval(), make_sae()
    attachment = cu_fast.attach(model, {"core.layer": sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "all"))
    for tokens in (2, 5):
        attachment.reset_report()
        with torch.no_grad(), attachment.unlearn("all"):
            model(torch.arange(3, 3 + 2 * tokens).reshape(2, tokens))
        (report,) = attachment.report()
        assert report["changed"] == report["tokens"] == 2 * tokens


@pytest.mark.parametrize("skip", [-1, True, 1.0, "1"])
def test_skip_first_is_checked(skip):
    with pytest.raises(ValueError, match=r"skip_first is .*; it should be an int, at least 0"):
        swapped(skip_first=skip)
    sae = make_sae()
    with pytest.raises(ValueError, match=r"skip_first is .*; it should be an int, at least 0"):
        cu_fast.attach_masks(build("llama"), [mask_of(sae, [0], "a")], layer=LAYER, skip_first=skip)
