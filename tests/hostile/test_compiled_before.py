"""Code that was compiled, traced, captured or exported without the hooks, or that would keep the present masks in it."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiers import TEST_ALL
from tiny_models import FAMILIES, add_masks, attach_to, build, inputs, logits, under

import cu_fast
from cu_fast.hf import sites

LAYER = "model.layers.1"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def keep_a_wrapper(model):
    return torch.compile(model, backend="eager")


def call_from_a_function(model):
    return torch.compile(lambda **given: model(**given), backend="eager")


def compile_the_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


WAYS = (compile_in_place, compile_forward, keep_a_wrapper, call_from_a_function)
# Compiling takes its time: one family in two ways; with TEST_ALL all families in all ways.
CASES = [("llama", way) for way in (WAYS if TEST_ALL else WAYS[::2])]
if TEST_ALL:
    CASES += [(name, way) for name in ("gpt2", "t5_decoder", "t5_encoder", "opt", "mamba") for way in WAYS]


def test_a_plain_model_of_the_same_class_compiled_after_attach():
    """Its code fits the swapped model, but for the hooks; so does that of its layers alone."""

    def small():
        model = build("llama")
        model.config.num_hidden_layers, model.model.layers = 2, model.model.layers[:2]
        return model

    model, plain, given = small(), small(), inputs("llama")
    attachment = attach_to(model, LAYER)
    add_masks(attachment, given)
    want, base = under(attachment, "a", given), logits(plain, given)
    for way in (lambda one: torch.compile(one, backend="eager", fullgraph=True), compile_the_layers):
        for one, answer in ((plain, base), (model, want)):
            call = way(one)
            with attachment.unlearn("a"):
                torch.testing.assert_close(logits(call, given), answer)
    assert not torch.allclose(want, base, atol=1e-3)
    attachment.detach()
    assert "forward" not in vars(model) and "forward" not in vars(model.model.layers[1])


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_compiled_before_attach(name, way):
    model, given = build(name), inputs(name)
    call = way(model)
    with torch.no_grad():
        base = call(**given).logits
        attachment = attach_to(model, FAMILIES[name].layer)
        add_masks(attachment, given)
        fresh = build(name)
        other = attach_to(fresh, FAMILIES[name].layer)
        add_masks(other, given)
        attachment.reset_report()
        with attachment.unlearn("a"):
            got = call(**given).logits
        assert attachment.report()[0]["tokens"] > 0
        torch.testing.assert_close(got, under(other, "a", given), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(got, base, atol=1e-3)
        # And what was compiled with the hooks is not used without them.
        attachment.detach()
        torch.testing.assert_close(call(**given).logits, base, atol=1e-4, rtol=1e-4)


def compiled_static_generation(model, given):
    """As transformers does by itself on a GPU."""
    return model.generate(
        **given, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=False,
        compile_config=transformers.CompileConfig(backend="eager", fullgraph=False, mode=None),
    )  # fmt: skip


@pytest.fixture
def compiles_on_a_cpu(monkeypatch):
    valid = transformers.GenerationMixin._valid_auto_compile_criteria

    def always(self, model_kwargs, generation_config):
        if generation_config.compile_config is None:
            return False
        generation_config.compile_config._compile_all_devices = True
        return valid(self, model_kwargs, generation_config)

    monkeypatch.setattr(transformers.GenerationMixin, "_valid_auto_compile_criteria", always)


def test_a_static_cache_whose_decoding_was_compiled_before(compiles_on_a_cpu):
    model, given = build("llama"), inputs("llama")
    with torch.no_grad():
        plain = compiled_static_generation(model, given)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    attachment = attach_to(model, LAYER)
    add_masks(attachment, given)
    attachment.reset_report()
    with torch.no_grad(), attachment.unlearn("a"):
        masked = compiled_static_generation(model, given)
        assert attachment.report()[0]["tokens"] == given["input_ids"].numel() + 2 * 11
        assert torch.equal(masked, model.generate(**given, max_new_tokens=12, do_sample=False))
    assert not torch.equal(masked, plain)


def test_a_step_that_passes_a_swapped_layer_by_is_noticed():
    """Whatever made it: here a decoding step that runs the layers by other means, the model's hooks left out too."""
    model, given = build("llama"), inputs("llama")
    base = build("llama")
    attachment = attach_to(model, LAYER)
    add_masks(attachment, given)
    call = type(model).__call__

    def around(self, *args, **kwargs):
        decoding = kwargs["input_ids"].shape[1] == 1
        return call(base if decoding and self is model else self, *args, **kwargs)

    type(model).__call__ = around
    try:
        with attachment.unlearn("a"):
            for cache in (True, "static"):
                options = {"cache_implementation": "static"} if cache == "static" else {}
                with pytest.raises(RuntimeError, match=r"swapped layers \['model.layers.1'\] did not run"):
                    model.generate(**given, max_new_tokens=2, **options)
            model.generate(**given, max_new_tokens=1)  # the first token comes from the prompt's forward
        with attachment.unlearn(None):
            model.generate(**given, max_new_tokens=3)
    finally:
        type(model).__call__ = call


@pytest.mark.filterwarnings("ignore")
def test_export_and_tracing_are_refused():
    model, given = build("llama"), inputs("llama")
    attachment = attach_to(model, LAYER)
    add_masks(attachment, given)
    kwargs = {**given, "use_cache": False}
    for strict in (False, True):
        for topics in ("a", None):
            with attachment.unlearn(topics), pytest.raises(Exception, match="would bake the present masks in"):
                torch.export.export(model, (), kwargs, strict=strict)
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="would bake the present masks in"):
        torch.jit.trace(model.model, given["input_ids"], check_trace=False)


@pytest.mark.filterwarnings("ignore")
def test_code_that_is_fixed_is_not_attached_to():
    scripted = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.jit.script(torch.nn.Linear(32, 32)))
    with pytest.raises(TypeError, match=r"model holds torch\.jit code"):
        cu_fast.attach(scripted, {"1": cu_fast.BottleneckConfig(d_model=32, code_dim=8, num_codes=16, k=2)})


def test_nothing_is_compiled_again_where_nothing_was_compiled(monkeypatch):
    """torch._dynamo takes a second to import; a process that never compiled does not pay for it."""
    import sys

    from cu_fast.hf import attachment

    monkeypatch.setattr(
        attachment.sys, "modules", {name: m for name, m in sys.modules.items() if name != "torch._dynamo"}
    )
    monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("compiled code was forgotten"))
    attach_to(build("llama"), LAYER).detach()


def test_the_hooks_find_arguments_by_position():
    """The names are read when a model is attached to; a forward that others wrap later has the same ones."""
    assert sites.argument_names(lambda x, /, input_ids, *rest, use_cache=None, **more: None) == ("x", "input_ids")
