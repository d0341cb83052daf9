"""Swapped models where users put models: torch.compile, Trainer, checkpointing, accelerate's device_map."""

from __future__ import annotations

import copy
import shutil

import accelerate
import pytest
import torch
import transformers
from tiers import heavy
from tiny_models import FAMILIES, D, add_masks, attach_to, build, in_thread, inputs, logits

from cu_fast.hf import StaleCacheError

LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture
def given():
    return inputs("llama")


def shortened(model, layers):
    model.config.num_hidden_layers = layers
    model.model.layers = model.model.layers[:layers]
    return model


@pytest.fixture
def attachment(given):
    model = shortened(build("llama"), 2)
    attached = attach_to(model, *LAYERS)
    add_masks(attached, given)
    return attached


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def never_again():
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.mark.parametrize("use_cache", [False, True])
def test_compiled_whole_and_masks_change_without_compiling_again(attachment, given, use_cache):
    model = attachment.model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    topics = (None, "a", "b", {"a", "b"}, ["a", "b"], [None, "b"], None)
    results = []
    with torch.no_grad():
        with attachment.unlearn(None):
            compiled(**given, use_cache=use_cache)
        with never_again():
            for entry in topics:
                with attachment.unlearn(entry):
                    got = compiled(**given, use_cache=use_cache)
                    assert torch.equal(got.logits, model(**given, use_cache=use_cache).logits)
                results.append(got.logits)
            assert all(not torch.equal(results[0], other) for other in results[1:-1])

            # What is refused in eager mode is refused here, at run time.
            with attachment.unlearn(["a"]), pytest.raises(ValueError, match="batch holds 2 sequences"):
                compiled(**given, use_cache=use_cache)
            with attachment.unlearn("a"):
                forgotten = in_thread(lambda: logits(compiled, given, use_cache=use_cache))
            assert "copy_context" in str(forgotten["error"])

            attachment.reset_report()
            seen = []
            with attachment.unlearn("a"), attachment.observe(lambda x, b: seen.append((x.clone(), b))):
                compiled(**given, use_cache=use_cache)
            assert [b for _, b in seen] == list(attachment.bottlenecks.values())
            assert all(row["tokens"] == 12 and row["hits"] > 0 for row in attachment.report())


def test_compiled_caches_are_guarded(given):
    model = shortened(build("llama"), 1)
    attachment = attach_to(model, LAYERS[0])
    add_masks(attachment, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    token = {"input_ids": torch.tensor([[5], [6]])}
    with torch.no_grad():
        for topics, other in (("a", "b"), (None, "a"), ("b", None)):
            with attachment.unlearn(topics):
                cache = compiled(**given, use_cache=True).past_key_values
            with attachment.unlearn(other):
                for continued in (compiled, model):  # filled compiled, continued in either mode
                    with pytest.raises(StaleCacheError):
                        continued(**token, past_key_values=copy.deepcopy(cache), use_cache=True)
            with attachment.unlearn(topics):
                got, want = (m(**token, past_key_values=copy.deepcopy(cache)).logits for m in (compiled, model))
                torch.testing.assert_close(got, want)


def test_compiled_without_a_swapped_layer_raises(attachment, given):
    attachment.model.config.num_hidden_layers = 1  # as an early exit does
    compiled = torch.compile(attachment.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with attachment.unlearn(None):
            compiled(**given, use_cache=False)
        with attachment.unlearn("a"), pytest.raises(RuntimeError, match=r"layers.1'\] did not run"):
            compiled(**given, use_cache=False)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
@heavy
@pytest.mark.parametrize("mode", ["reduce-overhead", "default", "max-autotune-no-cudagraphs"])
def test_compiled_by_inductor(given, mode):
    """reduce-overhead, generate's own choice for static caches, splits the graph round our operators, here too."""
    model = shortened(build("llama"), 1)
    attachment = attach_to(model, LAYERS[0])
    add_masks(attachment, given)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        with attachment.unlearn(None):
            compiled(**given, use_cache=False)
        with never_again():
            for topics in ("a", None, ["b", "a"]):
                with attachment.unlearn(topics):
                    got, want = (m(**given, use_cache=False).logits for m in (compiled, model))
                torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_a_compiled_training_step(attachment, given):
    model = attachment.model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with attachment.unlearn(None):
        loss = compiled(**given, labels=given["input_ids"], use_cache=False).loss + attachment.auxiliary_loss()
        loss.backward()
    for bottleneck in attachment.bottlenecks.values():
        assert bottleneck.codebook.codes.grad.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_step_updates_the_codes_and_saves_them(given, tmp_path, checkpointing):
    model = build("llama")
    attachment = attach_to(model, LAYERS[1])
    add_masks(attachment, given)
    codes = attachment.bottlenecks[LAYERS[1]].codebook.codes
    before, base = codes.detach().clone(), model.lm_head.weight.detach().clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in given["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    if checkpointing:
        model.gradient_checkpointing_enable()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    with pytest.raises(RuntimeError, match="nothing was said here"):
        trainer.train()
    with attachment.unlearn(None):
        trainer.train()
    assert not torch.equal(codes, before) and not torch.equal(model.lm_head.weight, base)
    model.eval()
    with pytest.raises(RuntimeError, match="a codebook changed since mask 'a' was added"), attachment.unlearn("a"):
        pass
    assert torch.isfinite(attachment.auxiliary_loss())
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()


def test_auxiliary_losses_add_up(attachment, given):
    attachment.model.train()
    with attachment.unlearn(None):
        attachment.model(**given)
    each = [bottleneck.auxiliary_loss() for bottleneck in attachment.bottlenecks.values()]
    assert torch.equal(attachment.auxiliary_loss(), each[0] + each[1]) and each[1] > 0


def test_a_dispatched_model_with_offloaded_layers(given, tmp_path):
    """accelerate replaces module.forward and keeps weights on disk; the bottleneck goes where the layer computes."""
    model = build("llama")
    attachment = attach_to(model, LAYERS[1])
    add_masks(attachment, given)
    with torch.no_grad(), attachment.unlearn(["a", None]):
        want = model(**given).logits
    with attachment.unlearn(None):
        generated = model.generate(**given, max_new_tokens=3)
    masks = attachment.masks["a"]
    attachment.detach()

    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(model.model.layers[1].parameters()).is_meta
    attachment = attach_to(model, LAYERS[1])
    assert attachment.bottlenecks[LAYERS[1]].codebook.codes.device.type == "cpu"
    attachment.add_mask(masks)
    with torch.no_grad(), attachment.unlearn(["a", None]):
        assert torch.equal(model(**given).logits, want)
    with attachment.unlearn(None):
        assert torch.equal(model.generate(**given, max_new_tokens=3), generated)
    attachment.detach()
    assert not any("codebook" in key for key in model.state_dict())


def test_dispatched_after_attach(given):
    model = build("llama")
    attachment = attach_to(model, LAYERS[1])
    add_masks(attachment, given)
    with torch.no_grad(), attachment.unlearn("a"):
        want = model(**given).logits
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert torch.equal(model(**given).logits, want)


def test_a_compiled_encoder_decoder():
    name = "t5_encoder"
    model, given = build(name), inputs(name)
    attachment = attach_to(model, FAMILIES[name].layer)
    add_masks(attachment, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for topics in ("a", None):
            with attachment.unlearn(topics):
                assert torch.equal(compiled(**given, use_cache=False).logits, model(**given, use_cache=False).logits)
        with attachment.unlearn("a"):
            encoded = torch.compile(model.get_encoder(), fullgraph=True, backend="aot_eager")(given["input_ids"])
        assert encoded.last_hidden_state.shape[-1] == D
        with attachment.unlearn(None), pytest.raises(StaleCacheError, match="encoder's output"):
            model(encoder_outputs=encoded, decoder_input_ids=given["decoder_input_ids"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_is_refused(given):
    """A replay runs no Python, so it would not look masks up."""
    model, graph = build("llama").cuda(), torch.cuda.CUDAGraph()
    attach_to(model, LAYERS[0])
    ids = given["input_ids"].cuda()
    with torch.no_grad():
        model(ids)
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(graph):
            model(ids)
