"""What torch.compile hands to Inductor where the reference runs: nothing in which a product could be fused with a sum."""

from __future__ import annotations

import re

import pytest
import torch
from calls import every_operator
from hurtful import masks, normal
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.kernels.operators import OPERATORS, STEPS

T, D, E, C, K = 5, 20, 40, 150, 4
KEEP_VALUES = {"view", "expand", "unsqueeze", "squeeze", "slice", "select", "permute", "clone", "alias"}


def traced(function):
    """A function's results as compiled, and the graphs that a compiler was given for it."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table())
    results = torch.compile(function, fullgraph=True, backend=backend)()
    assert graphs
    return results, graphs


def name_of(node):
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def source(node):
    """The node that makes a value, behind what only arranges it."""
    while isinstance(node, torch.fx.Node) and name_of(node) in KEEP_VALUES:
        node = node.args[0]
    return node


def fusible(graphs) -> int:
    """Sums of fp32 with a product as a term: what a GPU's compiler makes a fused multiply-add of."""
    found = 0
    for graph in graphs:
        for node in graph.nodes:
            if name_of(node) in ("add", "sub") and node.meta["val"].dtype == torch.float32:
                terms = [source(term) for term in node.args if isinstance(term, torch.fx.Node)]
                found += any(name_of(term) == "mul" for term in terms)
    return found


def cases(device):
    """Calls of every operator with impl "reference", and of what is computed once per codebook."""
    x, W_enc, codes = (made.to(device) for made in (normal(T, D), normal(E, D, seed=1), normal(C, E, seed=2)))
    table, b_pre, b_dec = normal(C, D, seed=3).to(device), normal(D, seed=4).to(device), normal(D, seed=5).to(device)
    mask = dict(zip(("mask_table", "mask_row"), (part.to(device) for part in masks(T, C, 0.4, 6))))
    z, ids = normal(T, E, seed=7).to(device), (torch.arange(T * K).view(T, K) % C).int().to(device)
    encoder, book = ops.pack_codes(W_enc, "dot", normal(E).to(device)), ops.pack_codes(codes)
    wide, dec = ops.pack_codes(codes, "dot", normal(C).to(device)), normal(C, E, seed=8).to(device)
    listed = torch.tensor([[1, 4, 60, 149, -1]], dtype=torch.int32, device=device)
    deletion = (
        ops.LatentMasks(listed, normal(1, 5, 3, seed=9).to(device)),
        torch.zeros(T, dtype=torch.int32, device=device),
    )
    how = {"impl": "reference"}

    def latents(kind, scale):
        return ops.Latents(wide, torch.zeros(C, device=device), dec, kind, K if kind == "topk" else None, scale, 3.0)

    made = {
        "sae_encode": lambda: ops.sae_encode(x, encoder, b_pre, **how),
        "sae_encode_topk": lambda: ops.sae_encode(x, encoder, b_pre, k=K, **how)[:2],
        "codebook_quantize": lambda: ops.codebook_quantize(z, book, k=K, **mask, return_hits=True, **how),
        "masked_decode": lambda: ops.masked_decode(ids, None, table, b_dec, None, **mask, reduce="mean", **how),
        "codebook_bottleneck": lambda: ops.codebook_bottleneck(
            x, (encoder, b_pre), book, table, b_dec, **mask, k=K, weight="score", **how
        ),
        "delete_latents": lambda: ops.delete_latents(z, latents("threshold", "constant_norm"), *deletion, **how),
        "token_scales": lambda: ops.delete_latents(z, latents("topk", "layer_norm"), *deletion, **how),
    }
    arguments = ids, normal(T, K, seed=10).to(device), *deletion[0], deletion[1], C, True, True
    made["code_changes"] = lambda: ops.choice.plain("code_changes")(*arguments)
    if device == "meta":  # on a CPU the native library packs
        made["pack_digits"] = lambda: ops.pack_codes(codes, "dot")[:3]
        made["cosine_factor"] = lambda: ops.pack_codes(codes)[:3]
        made["l2_bias"] = lambda: ops.pack_codes(codes, "l2")[:3]
    return made


ON_META = set(OPERATORS) - {"pack_scan"} | set(STEPS)  # the plane is made on a GPU, or by the native library


@pytest.mark.parametrize("name", sorted(ON_META))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_reference_is_not_looked_into(device, name):
    if name not in (made := cases(device)):
        pytest.skip("the native library does this on a CPU")
    got, graphs = traced(made[name])
    # What is written to in place is handed to an operator that calls it.
    used = " ".join(f"{node.target} {node.args}" for graph in graphs for node in graph.nodes)
    assert re.search(rf"cu_fast_reference\.{name}\b", used) and fusible(graphs) == 0
    want = made[name]()
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert device == "meta" or torch.equal(one, other)


@pytest.mark.parametrize("name", ["masked_decode", "delete_latents", "token_scales"])
def test_what_would_be_fused_is_seen(name, monkeypatch):
    """The functions themselves hold such sums: the checker finds them where the operators are left out."""
    monkeypatch.setattr(ops, "choose", lambda op, impl, device: getattr(reference, op))
    monkeypatch.setattr(ops.latents, "choose", ops.choose)
    monkeypatch.setattr(ops.latents, "plain", lambda op: getattr(reference, op))
    assert fusible(traced(cases("meta")[name])[1]) > 0


def test_a_plane_is_made_by_an_operator(monkeypatch):
    """Where the plane of a GPU is made: pack_codes is told that kernels can run on the device."""
    monkeypatch.setattr(ops.packing, "auto_kernels", lambda device: ("cuda", ""))
    codes = normal(600, 40).to("meta")
    _, graphs = traced(lambda: ops.pack_codes(codes, scan="int8").scan)
    assert any("pack_scan" in str(node.target) for graph in graphs for node in graph.nodes) and fusible(graphs) == 0


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", [*OPERATORS, *STEPS])
def test_opcheck(name, mask):
    """Schemas, fakes, and that no result shares memory with an argument."""
    steps = reference.pack_digits(normal(C, E))[1:]
    given = {"cosine_factor": [steps], "l2_bias": [steps], "token_scales": [(normal(T, E), n, 2.0) for n in range(3)]}
    listed, row = torch.tensor([[1, 4, -1]], dtype=torch.int32), torch.tensor([0, -1, 0], dtype=torch.int32)
    kept = torch.tensor([[4, 0], [3, 1], [-1, 2]], dtype=torch.int32), normal(3, 2), listed, normal(1, 3, 3), row
    given["code_changes"] = [(*kept, C, True, False), (*kept, C, False, True)]
    operator = getattr(torch.ops.cu_fast_reference, name).default
    for arguments in given.get(name, []):
        torch.library.opcheck(operator, arguments)
    if name in OPERATORS:
        torch.library.opcheck(operator, (), every_operator(T, 20, 50, 4, mask=mask, scan=False)[name])


def test_eager_calls_are_the_functions():
    assert ops.choice.plain("masked_decode") is reference.masked_decode
