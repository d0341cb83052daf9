"""The operators that training differentiates: gradients right, in one order, small; and the bottleneck on top of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_nn import FAMILIES, bottleneck
from tiers import heavy
from torch.utils.checkpoint import checkpoint

from cu_fast import ops
from cu_fast.nn import autograd, training
from cu_fast.nn.autograd import gather_dot, gather_sum, scatter_sum

# -1, a code twice in a row, codes 3 and 6 never.
IDS = torch.tensor([[0, 2, 2], [-1, 5, 1], [4, 4, 4], [-1, -1, -1], [1, 5, 0]], dtype=torch.int32)
C, E = 7, 5


def operands(dtype=torch.float64, requires_grad=True):
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(IDS.shape, generator=g, dtype=dtype)
    weights[0, 1] = weights[4, 2] = 0
    made = weights, *(torch.randn(n, E, generator=g, dtype=dtype) for n in (len(IDS), C))
    return tuple(tensor.requires_grad_(requires_grad) for tensor in made)


def large(T=700, C=90, E=80, k=8):
    """Codes with about 60 places each, one with 700; some ids -1."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, C - 5, (T, k), generator=g, dtype=torch.int32)
    ids[:, 3] = 7
    return ids, *(torch.randn(shape, generator=g) for shape in ((T, k), (T, E), (C, E)))


def plain_sum(ids, weights, codes, impl="auto"):
    """gather_sum by what torch differentiates itself."""
    weights = torch.where(ids < 0, 0.0, weights.to(codes.dtype))
    return F.embedding_bag(ids.long().clamp(min=0), codes, per_sample_weights=weights, mode="sum")


def plain_dot(ids, g, codes, impl="auto"):
    rows = F.embedding(ids.long().clamp(min=0), codes)
    return torch.where(ids < 0, 0.0, torch.einsum("te,tke->tk", g, rows))


@pytest.mark.parametrize("ids", [IDS, IDS.long()])
def test_gradients_are_right(ids):
    weights, g, codes = operands()
    assert torch.autograd.gradcheck(lambda w, c: gather_sum(ids, w, c), (weights, codes))
    assert torch.autograd.gradcheck(lambda g, c: gather_dot(ids, g, c), (g, codes))
    torch.testing.assert_close(gather_sum(ids, weights, codes), plain_sum(ids, weights, codes))
    torch.testing.assert_close(gather_dot(ids, g, codes), plain_dot(ids, g, codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_they_are_operators(dtype, requires_grad):
    weights, g, codes = operands(dtype, requires_grad)
    torch.library.opcheck(gather_sum, (IDS, weights, codes))
    torch.library.opcheck(gather_dot, (IDS, g, codes))
    torch.library.opcheck(scatter_sum, (IDS, weights.detach(), g.detach(), C))


@pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])
def test_the_sum_has_the_bits_of_inference(impl):
    ids, weights, _, codes = large()
    assert torch.equal(gather_sum(ids, weights, codes, impl), ops.masked_decode(ids, weights, codes))


def test_gradients_have_the_same_bits_at_any_number_of_threads():
    ids, weights, upstream, codes = large()
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 3, 4):
            torch.set_num_threads(n)
            w, c = weights.clone().requires_grad_(), codes.clone().requires_grad_()
            gather_sum(ids, w, c).backward(upstream)
            seen.append((w.grad, c.grad))
    finally:
        torch.set_num_threads(threads)
    for of_weights, of_codes in seen[1:]:
        assert torch.equal(of_weights, seen[0][0]) and torch.equal(of_codes, seen[0][1])


def test_a_codes_gradient_is_added_in_order():
    """1e8 and -1e8 leave only what came after them."""
    g = torch.tensor([[1.0], [1e8], [-1e8], [2.0]])
    got = scatter_sum(torch.tensor([[1], [1], [1], [1]]), torch.ones(4, 1), g, 3)
    assert got.tolist() == [[0.0], [2.0], [0.0]]
    got = scatter_sum(torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.0, 1e8], [-1e8, 5.0]]), torch.ones(2, 1), 2)
    assert got.tolist() == [[5.0], [0.0]]


def test_gradients_are_as_near_to_fp64_as_torchs():
    ids, weights, upstream, codes = large()

    def gradients(of, dtype):
        w, c = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (weights, codes))
        of(ids, w, c).backward(upstream.to(dtype))
        return w.grad.double(), c.grad.double()

    exact, ours, torchs = (
        gradients(of, dtype)
        for of, dtype in ((plain_sum, torch.float64), (gather_sum, torch.float32), (plain_sum, torch.float32))
    )
    # A sum of n products is off by at most about n roundings of the sum of their magnitudes.
    places = (ids[..., None] == torch.arange(len(codes))).sum((0, 1))[:, None]
    magnitude = scatter_sum(ids, weights.abs().double(), upstream.abs().double(), len(codes))
    bounds = (
        codes.shape[1] * 2**-24 * gather_dot(ids, upstream.abs().double(), codes.abs().double()),
        (places + 1) * 2**-24 * magnitude,
    )
    for want, bound, *got in zip(exact, bounds, ours, torchs):
        for one in got:
            assert ((one - want).abs() <= bound).all()


def test_an_empty_slot_gets_and_gives_nothing():
    """Also where its token's gradient is NaN, as a faulty row's is."""
    weights, g, codes = operands(torch.float32)
    with torch.no_grad():
        g[3] = torch.nan
    gather_sum(IDS, weights, codes).backward(g.detach())
    assert codes.grad.isfinite().all() and weights.grad.isfinite().all()
    assert (weights.grad[IDS < 0] == 0).all() and (codes.grad[[3, 6]] == 0).all()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    weights, _, codes = operands(torch.float32)
    for name, of in (("gather_dot", codes), ("scatter_sum", weights)):
        with monkeypatch.context() as patch:
            patch.setattr(autograd, name, None)
            given = [tensor if tensor is of else tensor.detach() for tensor in (weights, codes)]
            gather_sum(IDS, *given).sum().backward()


def test_chunks_change_nothing(monkeypatch):
    ids, _, g, codes = large()
    whole = gather_dot(ids, g, codes)
    torch.testing.assert_close(whole, plain_dot(ids, g, codes), rtol=1e-5, atol=1e-5)
    for size in (1, 8 * 80 * 4 * 33):  # a token at a time; 33, which leaves a tail of 7
        monkeypatch.setattr(autograd, "CHUNK_BYTES", size)
        assert torch.equal(gather_dot(ids, g, codes), whole)


def test_no_allocation_is_as_large_as_all_gathered_rows(monkeypatch):
    monkeypatch.setattr(autograd, "CHUNK_BYTES", 2**18)
    ids, weights, g, codes = large(T=4000)  # a row a place: 10 MB
    for run in (lambda: gather_dot(ids, g, codes), lambda: scatter_sum(ids, weights, g, len(codes))):
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert 2**16 < largest <= 2**18 + 2**16, largest  # int64 [T, k] is 2^18 bytes


def test_without_tokens():
    weights, codes = torch.ones(0, 3, requires_grad=True), torch.ones(C, E, requires_grad=True)
    gather_sum(IDS[:0], weights, codes).sum().backward()
    assert not codes.grad.any() and weights.grad.shape == (0, 3)


@pytest.mark.parametrize("op", [gather_sum, gather_dot, scatter_sum])
def test_an_id_beyond_the_codes_is_an_error(op):
    weights, g, codes = operands(requires_grad=False)
    factors = {gather_sum: (weights, codes), gather_dot: (g, codes), scatter_sum: (weights, g, C)}[op]
    with pytest.raises(ValueError, match="ids holds 7"):
        op(IDS + 2, *factors)


@pytest.mark.parametrize("wrong", [
    lambda weights, g, codes: gather_dot(IDS, g[:, 1:], codes),
    lambda weights, g, codes: gather_dot(IDS, g[1:], codes),
    lambda weights, g, codes: scatter_sum(IDS, weights, g[1:], C),
    lambda weights, g, codes: scatter_sum(IDS, weights[:, 1:], g, C),
])  # fmt: skip
def test_a_wrong_shape_is_an_error(wrong):
    """A kernel would read beyond the end."""
    with pytest.raises(ValueError, match=r"(g|weights) has shape .* should be"):
        wrong(*operands(requires_grad=False))


@pytest.mark.parametrize("impl, device, dtype, reason, triton", [
    ("auto", "cuda", torch.float32, None, True), ("cuda", "cuda", torch.bfloat16, None, True),
    ("triton", "cuda", torch.float16, None, True), ("triton", "cpu", torch.float32, None, True),
    ("auto", "cuda", torch.float32, "too old", False), ("reference", "cuda", torch.float32, None, False),
    ("triton", "cuda", torch.float64, None, False), ("auto", "cpu", torch.float32, None, False),
    ("cpu", "cpu", torch.float32, None, False),
])  # fmt: skip
def test_where_triton_finds_gradients(monkeypatch, impl, device, dtype, reason, triton):
    monkeypatch.setattr(autograd, "resolve", lambda impl, device: {"auto": device.type}.get(impl, impl))
    monkeypatch.setattr(autograd, "failure", lambda impl, device: reason)
    monkeypatch.setattr(autograd.triton, "launcher", lambda op: op)
    factors = [SimpleNamespace(device=torch.device(device), dtype=dtype) for dtype in (torch.float32, dtype)]
    assert autograd._kernels("gather_dot", impl, *factors) == ("gather_dot" if triton else None)


def test_triton_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights, g, codes = operands(torch.float32, requires_grad=False)
    for run in (lambda: gather_dot(IDS, g, codes, "triton"), lambda: scatter_sum(IDS, weights, g, C, "triton")):
        with pytest.raises(RuntimeError, match="impl='triton' is not available"):
            run()
    assert gather_dot(IDS, g.double(), codes.double(), "triton").dtype == torch.float64


def test_the_gradients_have_the_sums_impl(monkeypatch):
    asked = []
    monkeypatch.setattr(autograd, "_kernels", lambda op, impl, *factors: asked.append((op, impl)))
    weights, g, codes = operands(torch.float32)
    gather_sum(IDS, weights, codes, "reference").sum().backward()
    gather_dot(IDS, g, codes, "cpu").sum().backward()
    every = [("gather_dot", "reference"), ("scatter_sum", "reference"), ("gather_dot", "cpu"), ("scatter_sum", "cpu")]
    assert asked == every
    asked.clear()
    step(made_by("topk_sae", "reference"), torch.randn(9, 24), torch.randn(9, 24))
    assert set(asked) == set(every[:2])


# -- the bottleneck ------------------------------------------------------------------------------------------


def made_by(name, impl="auto", **settings):
    """A bottleneck in training: codes and encoder where random numbers put them."""
    made = bottleneck(**(FAMILIES[name] | settings | {"normalize": False}))
    made.impl = impl
    return made.train()


def step(made, x, upstream, call=lambda made, x: made(x)):
    """One backward pass; the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(0)  # of code dropout
    y = call(made, x)
    ((y * upstream).sum() + made.auxiliary_loss()).backward()
    return {"x": x.grad} | {name: parameter.grad for name, parameter in made.named_parameters()}


def alike(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("settings", [{}, {"code_dropout": 0.3}, {"similarity": "cosine"}, {"l1_weight": 0.1}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bottlenecks_gradient_is_what_torch_would_find(name, settings, monkeypatch):
    x, upstream = 3 * torch.randn(40, 24), torch.randn(40, 24)
    got = step(made_by(name, **settings), x, upstream)
    monkeypatch.setattr(training, "gather_sum", plain_sum)
    monkeypatch.setattr("cu_fast.nn.codebook.gather_dot", plain_dot)
    alike(got, step(made_by(name, **settings), x, upstream), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_similarities_are_the_scores_and_their_gradient_the_formulas(similarity):
    book = made_by("topk_sae", similarity=similarity).codebook
    z, upstream = torch.randn(5, 24, requires_grad=True), torch.randn(5, 6)
    want = ops.codebook_quantize(z.detach(), ops.pack_codes(book.codes.detach(), similarity), k=6)
    got = book.similarities(z, want.ids)
    torch.testing.assert_close(got.detach(), want.scores, rtol=1e-5, atol=1e-5)
    rows = book.codes[want.ids]
    dot = (z[:, None] * rows).sum(-1)
    formula = {
        "cosine": dot / rows.square().sum(-1).sqrt(), "dot": dot, "l2": dot - 0.5 * rows.square().sum(-1)
    }[similarity]  # fmt: skip
    for one, other in zip(*(torch.autograd.grad(of, (z, book.codes), upstream) for of in (got, formula))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_commitment_moves_the_encoder_and_the_codebooks_loss_the_codes():
    made = made_by("codeunlearn")
    made(3 * torch.randn(40, 24))
    parameters = made.autoencoder.W_enc, made.codebook.codes
    for name, moved, still in (("commitment", 0, 1), ("codebook", 1, 0)):
        found = torch.autograd.grad(made.losses[name], parameters, allow_unused=True, retain_graph=True)
        assert found[moved].any() and (found[still] is None or not found[still].any())


def test_a_faulty_token_is_not_counted():
    x = torch.randn(3, 24)
    x[1, 0] = torch.nan
    made = made_by("codeunlearn")
    y = made(x)
    assert int(made.codebook.counts.sum()) == 2 * 8
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpointed_step_has_the_same_gradient(name):
    x, upstream = 3 * torch.randn(40, 24), torch.randn(40, 24)
    got = step(made_by(name, code_dropout=0.3), x, upstream, lambda made, x: checkpoint(made, x, use_reentrant=False))
    alike(got, step(made_by(name, code_dropout=0.3), x, upstream), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_step_has_the_same_gradient(name):
    x, upstream = 3 * torch.randn(40, 24), torch.randn(40, 24)
    torch._dynamo.reset()
    made = made_by(name, code_dropout=0.3)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    got = step(made, x, upstream, lambda _, x: compiled(x))
    alike(got, step(made_by(name, code_dropout=0.3), x, upstream), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_under_autocast(name):
    """As transformers' Trainer does it with bf16=True: codes and their gradient stay fp32."""
    x, made = torch.randn(40, 24, requires_grad=True), made_by(name, code_dropout=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(x).square().sum() + made.auxiliary_loss()
    loss.backward()
    assert made.codebook.codes.grad.dtype == torch.float32 and made.codebook.codes.grad.any()
    assert all(p.grad.isfinite().all() for p in made.parameters()) and x.grad.isfinite().all()


def curve(name, seed, impl="auto"):
    """The losses of 25 steps on points around 64 centres."""
    g = torch.Generator().manual_seed(seed)
    made = made_by(name, impl)
    x = 3 * torch.randn(64, 24, generator=g)[torch.randint(64, (256,), generator=g)]
    made.seed_codes(x, g)
    optimizer, losses = torch.optim.Adam(made.parameters(), lr=5e-3), []
    for _ in range(25):
        made(x)
        loss = made.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["codeunlearn", "topk_sae"])
def test_a_loss_curve_is_the_references(name, monkeypatch):
    ours = [curve(name, seed, "cpu") for seed in (0, 1)]
    assert torch.equal(curve(name, 0, "reference"), ours[0])  # the same codes and sums, bit for bit; one gradient
    monkeypatch.setattr(training, "gather_sum", plain_sum)
    monkeypatch.setattr("cu_fast.nn.codebook.gather_dot", plain_dot)
    spread = (ours[0] - ours[1]).abs().max()
    assert (curve(name, 0) - ours[0]).abs().max() < 0.1 * spread and ours[0][-1] < ours[0][0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@heavy
def test_a_step_is_small():
    """No [T, C] (67 MB) and no [T, k, E] (17 MB): the gradient of the codes takes 4 MB, their digits 3, the int8 plane 1."""
    script = Path(__file__).parents[2] / "benchmarks" / "train_memory.py"
    arguments = "-T 1024 -D 64 -E 64 -C 16384 -k 64".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # each thread has scratch of its own
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    peaks = {name: float(peak) for name, peak, *_ in map(str.split, done.stdout.splitlines()[2:4])}
    assert peaks["eager"] > 60 and peaks["cu_fast"] < 14, done.stdout
