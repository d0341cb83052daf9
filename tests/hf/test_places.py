"""Names of places: of modules, of their inputs, of pairs, and those that releases use."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_models import D, bottleneck_config, build, gemma2, inputs, llava, qwen2_vl

import cu_fast
from cu_fast.hf.places import Place, name_of, places_of

HOOKS = {  # TransformerLens' name, and the place in a Llama, a GPT-2 and a Gemma
    "hook_resid_post": ("{}", "{}", "{}"),
    "hook_resid_pre": ("{}:in", "{}:in", "{}:in"),
    "hook_mlp_out": ("{}.mlp", "{}.mlp", "{}.post_feedforward_layernorm"),
    "hook_attn_out": ("{}.self_attn", "{}.attn", "{}.post_attention_layernorm"),
    "attn.hook_z": ("{}.self_attn.o_proj:in", "{}.attn.c_proj:in", "{}.self_attn.o_proj:in"),
    "mlp.hook_in": ("{}.mlp:in", "{}.mlp:in", "{}.mlp:in"),
    # Before the norm: TransformerLens gives its MLP this after ln2.
    "hook_mlp_in": ("{}.post_attention_layernorm:in", "{}.ln_2:in", "{}.pre_feedforward_layernorm:in"),
}
MODELS = {
    "llama": (lambda: build("llama"), "model.layers.1", 0),
    "gpt2": (lambda: build("gpt2"), "transformer.h.1", 1),
    "gemma2": (gemma2, "model.layers.1", 2),
    "gemma3": (lambda: build("gemma3"), "model.layers.1", 2),
    "llava": (llava, "model.language_model.layers.1", 0),
    "qwen2_vl": (qwen2_vl, "model.language_model.layers.1", 0),
}


def place(model, name):
    reads, writes = places_of(model, name)
    assert reads == writes
    return str(writes)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_transformer_lens(name):
    make, layer, column = MODELS[name]
    model = make()
    for hook, places in HOOKS.items():
        assert place(model, f"blocks.1.{hook}") == places[column].format(layer), hook
        assert model.get_submodule(places[column].format(layer).removesuffix(":in")) is not None
    assert model.get_submodule(place(model, "hook_embed")) is model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"'hook_nothing' of layer .* is no module's input or output that is known"):
        places_of(model, "blocks.1.hook_nothing")


def test_what_the_hooks_are():
    """Against the residual stream, put together from the layers' own parts."""
    model, seen = build("llama"), {}

    def look(hook):
        at, _ = places_of(model, f"blocks.1.{hook}")
        module = model.get_submodule(at.module)

        def after(module, args, out):
            seen[hook] = out if isinstance(out, torch.Tensor) else out[0]

        def before(module, args, kwargs):
            seen[hook] = args[0] if args else kwargs["hidden_states"]

        if at.side == "in":
            module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            module.register_forward_hook(after)

    for hook in HOOKS:
        look(hook)
    with torch.no_grad():
        model(**inputs("llama"))
        middle, layer = seen["hook_resid_pre"] + seen["hook_attn_out"], model.model.layers[1]
        torch.testing.assert_close(seen["hook_mlp_in"], middle)
        torch.testing.assert_close(seen["mlp.hook_in"], layer.post_attention_layernorm(middle))
        torch.testing.assert_close(seen["hook_resid_post"], middle + seen["hook_mlp_out"])
        torch.testing.assert_close(seen["hook_attn_out"], layer.self_attn.o_proj(seen["attn.hook_z"]))


def test_names_of_releases():
    gemma = gemma2()
    assert place(gemma, "gemma-scope-2b-pt-res/layer_2") == "model.layers.2"
    assert place(gemma, "gemma-scope-2b-pt-mlp/layer_2") == "model.layers.2.post_feedforward_layernorm"
    assert place(gemma, "gemma-scope-2b-pt-att/layer_0") == "model.layers.0.self_attn.o_proj:in"
    assert place(gemma, "model.layers.1.output") == "model.layers.1"
    assert place(gemma, "model.layers.1.pre_feedforward_layernorm.output") == "model.layers.1.pre_feedforward_layernorm"
    assert place(gemma, "model.layers.1.mlp.input") == "model.layers.1.mlp:in"
    assert place(gemma, "layers.1.mlp") == "model.layers.1.mlp"


def test_names_of_modules():
    model = build("llama")
    assert places_of(model, "layers.1.mlp:in -> layers.1.mlp") == (
        Place("model.layers.1.mlp", "in"),
        Place("model.layers.1.mlp"),
    )
    assert name_of(*places_of(model, "layers.1.mlp:in->layers.1.mlp")) == "model.layers.1.mlp:in -> model.layers.1.mlp"
    assert place(model, "1.self_attn.o_proj:in") == "model.layers.1.self_attn.o_proj:in"
    assert place(model, "model.layers.1:out") == "model.layers.1"
    for layer in ("model.layers.2", "model.layers.1.mlp:in"):
        assert name_of(*places_of(model, layer)) == layer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.7", r"the model has no layer 'model.layers.7'; near names: .*model.layers"),
        ("", "the model has no layer ''"),
        ("mlp", "the model has several layers 'mlp': model.layers.0.mlp, .*give one of these names"),
        ("model.layers.1:middle", "ends in 'middle'; it should end in :in or :out"),
        ("model.layers.1 ->", "the model has no layer ''"),
        ("-> model.layers.1", "the model has no layer ''"),
        ("layers.0 -> layers.1 -> layers.2", "the model has no layer"),
        ("blocks.7.hook_resid_post", "the model has no layer number 7 under layers, h, block, blocks"),
        ("blocks.1.attn.hook_q", "'attn.hook_q' of layer .* is no module's input or output that is known"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        places_of(build("llama"), name)


@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_a_number_is_of_the_text(make):
    """The part for images has more layers, of the same width: a number beyond the text's must not land there."""
    model = make()
    assert place(model, "layers.1") == "model.language_model.layers.1"
    for name in ("blocks.4.hook_resid_post", "layers.4", "layers.4.mlp"):
        with pytest.raises(ValueError, match="the model has no layer"):
            places_of(model, name)
    tower = next(n for n, _ in model.named_modules() if n.endswith(("encoder.layers.4", "visual.blocks.4")))
    assert place(model, tower) == tower == place(model, tower.removeprefix("model.")), "by its name it is found"


def test_an_encoder_and_a_decoder_are_both_text():
    model = build("t5_encoder")
    assert place(model, "encoder.block.1") == "encoder.block.1"
    for name in ("block.1", "blocks.1.hook_resid_post"):
        with pytest.raises(ValueError, match=r"several layers 'block.1': encoder.block.1, decoder.block.1"):
            places_of(model, name)


def test_norms_behind_alone():
    """OLMo 2 has norms behind attention and MLP and none before: what a hook's name means there is not known."""
    torch.manual_seed(0)
    config = build("llama").config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = hf.Olmo2ForCausalLM(hf.Olmo2Config(**{key: config[key] for key in keys}))
    for hook in ("hook_mlp_out", "hook_attn_out", "hook_mlp_in"):
        with pytest.raises(ValueError, match="name the module instead"):
            places_of(model, f"blocks.1.{hook}")
    assert place(model, "blocks.1.hook_resid_post") == "model.layers.1"


def test_widths_of_places():
    model = build("llama")  # 4 heads of width 8, and an MLP of width 48
    for name, width, known in (
        ("model.layers.1", 24, D),
        ("model.layers.1.mlp.down_proj:in", D, 48),
        ("model.layers.1.self_attn.q_proj", 24, D),
    ):
        with pytest.raises(ValueError, match=f"d_model of layer .* is {width}; the model's width at .* is {known}"):
            cu_fast.attach(model, {name: bottleneck_config(d_model=width)})
    gpt2 = build("gpt2")
    with pytest.raises(ValueError, match=r"d_model of layer .* is 32; .*c_proj:in' is 128"):
        cu_fast.attach(gpt2, {"transformer.h.1.mlp.c_proj:in": bottleneck_config()})
    with pytest.raises(ValueError, match=r"change module 'model.layers.1'; give one for each module"):
        cu_fast.attach(model, {"layers.1": bottleneck_config(), "layers.1:in": bottleneck_config()})
