"""A compiled forward that carries its rows, as on a GPU: what lies between ``rows_of`` and ``leave`` is one graph.

There is no GPU here: the CPU is said to have graphs.
"""

from __future__ import annotations

import contextlib
import shutil
import threading

import pytest
import torch
from tiers import heavies, heavy
from tiny_models import build, inputs, logits
from tiny_saes import firing, hidden, make_sae, mask_of
from tiny_splices import KINDS, LAYERS, with_autoencoder, with_codebooks

from cu_fast import attach
from cu_fast.hf import StaleCacheError, compiled, forwards

TOPICS = (None, "a", "b", ["a", "b"], [None, "b"], {"a", "b"}, None)


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(forwards, "GRAPHS_ON", {"cpu"})
    torch._dynamo.reset()


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture(params=KINDS)
def attachment(request, given):
    return KINDS[request.param](given)


@pytest.fixture(params=["replace", pytest.param("autoencoder-at-two-places", marks=heavy)])
def some(request, given):
    """Compiling takes its time: one model, and by `make test-all` one of the other kind."""
    return KINDS[request.param](given)


def traced(model, fullgraph=True):
    """The model compiled, and the names of this package's operators in its graphs."""
    seen = []

    def backend(graph, example):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.extend(name.split(".")[1] for name in names if name.startswith("cu_fast."))
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, example)

    return torch.compile(model, fullgraph=fullgraph, backend=backend), seen


def test_its_layers_look_nothing_up_and_masks_change_and_are_counted(attachment, given):
    model = attachment.model
    with attachment.unlearn({"a", "b"}):
        pass  # its table is wide enough: one that grows is another tensor
    call, seen = traced(model)
    with torch.no_grad():
        with attachment.unlearn(None):
            call(**given, use_cache=False)
        asked = set(seen) & {*dir(compiled)}
        assert {"rows_of", "leave"} <= asked and not asked & {"mask_rows", "delete", "remember"}
        results, reports = [], []
        for one in (call, model):
            attachment.reset_report()
            with torch._dynamo.config.patch(error_on_recompile=True):
                for topics in TOPICS:
                    with attachment.unlearn(topics):
                        results.append(one(**given, use_cache=False).logits)
            reports.append(attachment.report())
        results, eager = results[: len(TOPICS)], results[len(TOPICS) :]
        torch.testing.assert_close(results, eager)
    # A graph copies what it does not know to stay; and nothing is kept of a trace that has ended.
    kept = [tensor for layer in attachment._layers for tensor in layer.table.tensors]
    assert {tensor._dynamo_static_input_type for tensor in kept} == {"unguarded"}
    assert attachment._active.carried == {}
    assert torch.equal(results[0], results[-1])
    assert all(not torch.equal(results[0], other) for other in results[1:-1])
    for other, row in zip(*reports, strict=True):
        assert row["hits"] > 0
        assert {**row, "dose": 0, "max_dose": 0} == {**other, "dose": 0, "max_dose": 0}
        for figure in {"dose", "max_dose"} & row.keys():
            assert other[figure] == pytest.approx(row[figure], rel=1e-4)


@pytest.mark.parametrize("place", ["layers.0", *heavies("norm")])
def test_a_trace_that_is_broken(some, given, place):
    """A break anywhere in the model parts ``rows_of`` from the layers: they look their rows up."""
    attachment, model = some, some.model
    model.model.get_submodule(place).register_forward_hook(lambda *_: torch._dynamo.graph_break())
    call, seen = traced(model, fullgraph=False)
    with torch.no_grad():
        for topics in TOPICS:
            with attachment.unlearn(topics):
                want = model(**given, use_cache=False).logits
                torch.testing.assert_close(call(**given, use_cache=False).logits, want)
    assert "rows_of" in seen and {"mask_rows", "delete"} & set(seen)


def test_threads_with_masks_of_their_own(some, given):
    attachment, model = some, some.model
    call, _ = traced(model)
    wanted, wrong = {}, []
    with torch.no_grad():
        for name in ("a", "b", None):
            with attachment.unlearn(name):
                wanted[name] = call(**given, use_cache=False).logits

    def serve(name):
        with torch.no_grad(), attachment.unlearn(name):
            wrong.extend(
                name for _ in range(20) if not torch.equal(call(**given, use_cache=False).logits, wanted[name])
            )

    threads = [threading.Thread(target=serve, args=(name,)) for name in (*wanted, *wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_layer_that_is_left_out_is_noticed(given):
    attachment = with_codebooks(given)
    attachment.model.config.num_hidden_layers = 1  # as an early exit does
    call, _ = traced(attachment.model)
    with torch.no_grad():
        with attachment.unlearn(None):
            call(**given, use_cache=False)
        with attachment.unlearn("a"), pytest.raises(RuntimeError, match=r"layers.1'\] did not run"):
            call(**given, use_cache=False)


def test_the_first_tokens_are_left_alone(given):
    sae = make_sae()
    attachment = attach(build("llama"), {LAYERS[1]: sae}, splice="delta", skip_first=2)
    latents = firing(sae, hidden("llama", LAYERS[1], given))
    attachment.add_mask(mask_of(sae, sorted(latents[:6]), "a"))
    given["attention_mask"][1, :2] = 0  # padding on the left
    call, seen = traced(attachment.model)
    with torch.no_grad(), attachment.unlearn("a"):
        torch.testing.assert_close(
            call(**given, use_cache=False).logits, attachment.model(**given, use_cache=False).logits
        )
    assert "rows_of" in seen and "delete" not in seen


def test_where_the_batch_is_open_rows_are_looked_up(given):
    """As many tokens as sequences: which dimension is the batch's has not been seen yet."""
    attachment = with_codebooks(given)
    for layer in attachment._layers:
        layer.batch_first = False
    call, seen = traced(attachment.model)
    few = {name: value[:, :2] for name, value in given.items()}
    with torch.no_grad():
        with attachment.unlearn("a"):
            call(**few, use_cache=False)
        with attachment.unlearn(["a", "b"]), pytest.raises(RuntimeError, match="which of the two is the batch"):
            call(**few, use_cache=False)
    assert "rows_of" in seen and "mask_rows" in seen


@pytest.mark.parametrize(
    ("topics", "more", "error", "message"),
    [
        (["a"], {}, ValueError, "batch holds 2 sequences and unlearn"),
        ("a", {"gated": True}, RuntimeError, "gated=True needs the model in eager mode"),
    ],
)
def test_what_is_refused(given, topics, more, error, message):
    attachment = with_codebooks(given)
    call, _ = traced(attachment.model)
    with torch.no_grad():
        with attachment.unlearn(None):
            call(**given, use_cache=False)
        with attachment.unlearn(topics, **more), pytest.raises(error, match=message):
            call(**given, use_cache=False)


def test_what_would_not_be_seen_is_refused(given):
    attachment = with_codebooks(given)
    call, _ = traced(attachment.model)
    bottleneck = attachment.bottlenecks[LAYERS[1]]
    with torch.no_grad(), attachment.unlearn("a"):
        call(**given, use_cache=False)
        with attachment.observe(lambda x, splice: None), pytest.raises(RuntimeError, match="compiled model on a GPU"):
            call(**given, use_cache=False)
        cache = attachment.model(**given, use_cache=True).past_key_values
        bottleneck.codebook.codes[0, 0] += 1
        with pytest.raises(RuntimeError, match=r"codebook of layer .* changed inside"):
            call(**given, use_cache=False)
        bottleneck.codebook.codes[0, 0] -= 1
    with torch.no_grad(), attachment.unlearn("b"), pytest.raises(StaleCacheError):
        call(input_ids=torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)
    failed = []

    def silent():
        with contextlib.suppress(RuntimeError):
            failed.append(logits(call, given))

    with attachment.unlearn("a"):
        thread = threading.Thread(target=silent)
        thread.start()
        thread.join()
    assert failed == []


def test_a_forward_with_gradients(given):
    """Where nothing is deleted a splice that keeps the hidden state hands the gradient on: it is looked up."""
    attachment = with_autoencoder(given)
    call, seen = traced(attachment.model)
    with attachment.unlearn(None):
        call(**given, use_cache=False).logits.sum().backward()
    assert "delete" in seen and attachment.model.model.embed_tokens.weight.grad.abs().sum() > 0
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="a deletion has no gradient"):
        call(**given, use_cache=False).logits.sum().backward()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
@heavy
@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_by_inductor(attachment, given, mode):
    call = torch.compile(attachment.model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for topics in TOPICS:
            with attachment.unlearn(topics):
                got, want = (one(**given, use_cache=False).logits for one in (call, attachment.model))
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("static", [True, *heavies(False)])
def test_generate(some, given, static):
    attachment, model = some, some.model
    options = {"cache_implementation": "static"} if static else {}
    want = {}
    for name in ("a", "b"):
        with attachment.unlearn(name):
            want[name] = model.generate(**given, max_new_tokens=6, do_sample=False)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    for name in ("a", "b"):
        with attachment.unlearn(name):
            assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False, **options), want[name])
