"""Compiled models, also by a cache that plain vLLM filled first; and where vLLM cuts a graph."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import torch
import vllm_engines  # noqa: F401 - sets vLLM's variables
from tiers import heavy
from vllm.compilation.backends import split_graph
from vllm_compiled import MODELS, TASKS
from vllm_oracle import TOFU, read, tofu
from vllm_tiny import TINY, cases

from cu_fast.vllm import operator
from cu_fast.vllm.modules import hook_for

pytestmark = [pytest.mark.background(TOFU), pytest.mark.background(TINY)]
EAGER = [pytest.mark.background(TASKS["eager", kind]) for kind in ("plain", "masked")]
INDUCTOR = [heavy, *(pytest.mark.background(TASKS["inductor", kind]) for kind in ("plain", "masked"))]


@pytest.fixture(scope="module")
def found():
    return lambda backend, kind: read(TASKS[backend, kind])


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=EAGER), pytest.param("inductor", marks=INDUCTOR)])
def test_a_compiled_model_says_what_transformers_says(found, backend):
    plain, masked = found(backend, "plain"), found(backend, "masked")
    answers = {name: cases()[name].answers for name in MODELS} | {"tofu": tofu()["short"]}
    assert plain.keys() == masked.keys() == answers.keys()
    for name, wanted in answers.items():
        assert masked[name]["says"] == [answer.ids for answer in wanted], name
        assert plain[name]["says"] != masked[name]["says"] and masked[name]["masked"] and not plain[name]["masked"]
        assert plain[name]["hash"] != masked[name]["hash"]  # on which the keys of vLLM's compile cache depend
        for one in (plain[name], masked[name]):
            assert (one["mode"], one["backend"]) == ("DYNAMO_TRACE_ONCE", backend)
            assert one["graphs"] == 1  # the whole model, splices and all


class Block(torch.nn.Module):
    """A block of a decoder: one tensor, or two whose sum is the hidden state."""

    def __init__(self, pair: bool):
        super().__init__()
        self.pair, self.linear = pair, torch.nn.Linear(8, 8)

    def forward(self, x, residual):
        return (self.linear(x), residual + x) if self.pair else self.linear(x) + residual


class Decoder(torch.nn.Module):
    def __init__(self, pair: bool, hooked: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(pair) for _ in range(3))
        for i in range(hooked):
            self.layers[i].register_forward_hook(hook_for(f"model.layers.{i}"))

    def forward(self, x):
        residual = x
        for layer in self.layers:
            out = layer(x, residual)
            x, residual = out if isinstance(out, tuple) else (out, out)
        return x + residual


class Add:
    """In a layer's place: adds 1 to the sum of both."""

    def __init__(self):
        self.ran = 0

    def __call__(self, hidden, residual):
        self.ran += 1
        hidden.add_(1 if residual is None else residual + 1)
        if residual is not None:
            residual.zero_()


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("hooked", [0, 1, 2])
def test_a_graph_is_cut_at_the_operator(monkeypatch, pair, hooked):
    """Dynamo's graph, whose pieces vLLM compiles and runs in turn: what the operator writes is what the next piece reads."""
    graphs, layers = [], {f"model.layers.{i}.{operator.CHILD}": Add() for i in range(hooked)}

    class Context:
        no_compile_layers = layers

    def cut(graph, inputs):
        pieces, items = split_graph(graph, [operator.NAME])
        graphs.append((graph, items))
        return pieces

    monkeypatch.setattr(operator, "get_forward_context", lambda: Context)
    torch.manual_seed(0)
    decoder, x = Decoder(pair, hooked), torch.randn(5, 8)
    with torch.no_grad():
        eager = decoder(x)
        assert [layer.ran for layer in layers.values()] == [1] * hooked
        torch._dynamo.reset()
        compiled = torch.compile(decoder, backend=cut, fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x), eager)
        assert torch.equal(compiled(x), eager)
    assert [layer.ran for layer in layers.values()] == [3] * hooked
    ((graph, items),) = graphs
    splice = torch.ops.cu_fast_vllm.splice
    calls = [node for node in graph.graph.nodes if node.target in (splice, splice.default)]
    assert [call.args[2] for call in calls] == [f"model.layers.{i}" for i in range(hooked)]
    assert all((call.args[1] is None) == (not pair) for call in calls)
    assert [item.is_splitting_graph for item in items] == [False, True] * hooked + [False]


def test_the_operator_says_what_it_writes():
    schema = torch.ops.cu_fast_vllm.splice.default._schema
    assert [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments] == [True, True, False]
    assert not schema.returns


@pytest.mark.parametrize("pair", [False, True])
def test_a_graph_without_writes_keeps_what_the_operator_writes(monkeypatch, pair):
    """As Inductor has it, and without vLLM's cuts: writes become copies, which have to be brought back."""
    layer = Add()

    class Context:
        no_compile_layers = {f"model.layers.0.{operator.CHILD}": layer}  # noqa: RUF012

    monkeypatch.setattr(operator, "get_forward_context", lambda: Context)
    torch.manual_seed(0)
    decoder, x = Decoder(pair, 1), torch.randn(5, 8)
    with torch.no_grad():
        eager = decoder(x)
        torch._dynamo.reset()
        compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x), eager)
