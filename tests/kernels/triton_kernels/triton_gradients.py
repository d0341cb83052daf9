"""The gradients of training as Triton kernels, as triton_interpreted.py has the operators: TRITON_INTERPRET=1 python tests/kernels/triton_kernels/triton_gradients.py"""

from __future__ import annotations

import math
from typing import NamedTuple

import hurtful
import torch
from triton_harness import Watch, bf16, fp16, fp32, on, report, same

from cu_fast.kernels import reference


class Guard:
    """Gives out memory that is full of sevens, and sees that those behind it stay."""

    def __enter__(self):
        self.given, self.new_empty = [], torch.Tensor.new_empty

        def new_empty(tensor, size, dtype=None, **by_the_interpreter):
            if by_the_interpreter:
                return self.new_empty(tensor, size, **by_the_interpreter)
            whole = self.new_empty(tensor, math.prod(size) + 2048, dtype=dtype or tensor.dtype).fill_(7)
            inner, behind = whole.split([math.prod(size), 2048])
            self.given.append(behind)
            return inner.view(size)

        torch.Tensor.new_empty = new_empty
        return self

    def __exit__(self, *_):
        torch.Tensor.new_empty = self.new_empty
        assert self.given and all((behind == 7).all() for behind in self.given), "written beyond the end"


class Dot(NamedTuple):
    T: int
    k: int
    E: int
    dtype: torch.dtype = fp32
    g: torch.dtype = fp32
    kind: str = "gaussian"
    layout: str = "plain"
    ids: torch.dtype = torch.int32


DOTS = {
    "one token, one slot, one entry": Dot(1, 1, 1),
    "one token": Dot(1, 8, 70),
    "two tiles": Dot(3, 40, 33, bf16),
    "many": Dot(9, 20, 130, ids=torch.int64),
    "fp16": Dot(6, 9, 40, fp16, fp16),
    "bf16": Dot(6, 5, 140, bf16, bf16),
    "fp16 and bf16": Dot(6, 5, 15, fp16, bf16),
    "faulty": Dot(12, 6, 20, kind="faulty"),
    "mixed": Dot(12, 6, 20, bf16, kind="mixed"),
    "huge": Dot(6, 9, 40, fp16, kind="huge"),
    "denormal": Dot(6, 9, 40, kind="denormal"),
    "rows apart": Dot(5, 4, 40, layout="rows"),
    "columns apart": Dot(5, 4, 40, bf16, layout="columns"),
    "one row": Dot(5, 4, 40, layout="one row"),
    "no tokens": Dot(0, 4, 40),
}
UNUSED = 3  # of the codes, from 0 on, and a token that has none: what they hold may not be looked at


def chosen(T: int, k: int, C: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Ids with -1 among them, some codes twice; the first codes never, the first token none."""
    ids = torch.randint(UNUSED - 1, C, (T, k), generator=torch.Generator().manual_seed(1)).to(dtype)
    ids[ids < UNUSED] = -1
    ids[1::2] = ids[1::2].sort(1).values
    if T > 1:
        ids[0] = -1
        ids[1, : min(k, 2)] = C - 1
    return ids


def near(got, exact, magnitude, roundings) -> None:
    """As near as so many roundings of fp32, and one of got's own dtype, let a sum of such magnitude be."""
    limits = torch.finfo(got.dtype)
    got, exact, magnitude = got.cpu(), exact.cpu(), magnitude.cpu()
    error = roundings * 2**-24 * magnitude
    bound = error + limits.eps / 2 * (exact.abs() + error) + limits.tiny * limits.eps / 2
    off = (got.double() - exact).abs() - bound
    assert off.numel() == 0 or off.max() <= 0, f"{got.flatten()[off.argmax()]} is not {exact.flatten()[off.argmax()]}"


def dot(case: Dot) -> None:
    """Bit for bit the sum of 16 partials; near to fp64 as PyTorch finds it."""
    from cu_fast.kernels.triton import gather_dot
    from cu_fast.nn import autograd

    C = 50
    ids = chosen(case.T, case.k, C, case.ids)
    g = hurtful.matrix(max(case.T, 1), case.E, case.kind, case.g, 2)[: case.T]
    codes = hurtful.matrix(C, case.E, case.kind, case.dtype, 3)
    codes[:UNUSED] = torch.nan
    g[(ids < 0).all(1)] = torch.nan
    g = g[1:2].expand_as(g) if case.layout == "one row" else hurtful.strided(g, case.layout)
    codes = hurtful.strided(codes, case.layout)
    with Guard():
        got = gather_dot.gather_dot(*on((ids, g, codes)))
    want = torch.where(ids < 0, 0.0, reference.sum16(g[:, None].float() * codes[ids.long().clamp(min=0)].float()))
    same([got], [want.to(case.dtype)])
    if case.kind == "gaussian":
        g, codes = g.double().nan_to_num(), codes.double().nan_to_num()
        exact, magnitude = (autograd.gather_dot(ids, *of) for of in ((g, codes), (g.abs(), codes.abs())))
        near(got, exact, magnitude, case.E / 16 + 6)  # a product, the sums of a partial, the tree


def dot_with_wrong_ids() -> None:
    """What is none of the codes gives NaN, and nothing else does."""
    from cu_fast.kernels.triton import gather_dot

    ids = torch.tensor([[0, -2, 4], [5, -1, 2]], dtype=torch.int32)
    got = gather_dot.gather_dot(*on((ids, torch.ones(2, 3), torch.ones(5, 3))))
    same([got], [torch.tensor([[3, torch.nan, 3], [torch.nan, 0, 3]])])


class Scatter(NamedTuple):
    T: int
    k: int
    E: int
    C: int = 40
    g: torch.dtype = fp32
    weights: torch.dtype = fp32
    hot: int = 0  # tokens that one code is in, all at the same slot, and another in the next
    kind: str = "gaussian"
    layout: str = "plain"
    ids: torch.dtype = torch.int32


SCATTERS = {
    "one token, one slot, one entry": Scatter(1, 1, 1),
    "one token": Scatter(1, 8, 70),
    "one code": Scatter(9, 3, 20, C=4),
    "many": Scatter(60, 5, 33, ids=torch.int64),
    "more codes than places": Scatter(7, 3, 20, C=300),
    "wide": Scatter(4, 3, 1030),
    "hot": Scatter(600, 2, 40, hot=590),
    "whole pieces": Scatter(520, 2, 17, hot=512),
    "a piece": Scatter(260, 1, 17, hot=256),
    "one less than a piece": Scatter(260, 1, 17, hot=255),
    "one more than a piece": Scatter(260, 1, 17, hot=257),
    "many pieces": Scatter(2700, 1, 3, hot=2600),
    "hot, wide": Scatter(300, 1, 1030, C=5, hot=290, g=bf16),
    "hot, bf16": Scatter(600, 2, 40, hot=590, g=bf16, weights=bf16),
    "hot, fp16": Scatter(600, 2, 40, hot=590, g=fp16, weights=fp16),
    "bf16": Scatter(60, 5, 33, g=bf16, weights=bf16),
    "fp16": Scatter(60, 5, 33, g=fp16, weights=fp16),
    "fp16 and bf16": Scatter(60, 5, 33, g=fp16, weights=bf16),
    "fp32 and bf16": Scatter(60, 5, 33, g=bf16),
    "faulty": Scatter(60, 2, 20, kind="faulty"),
    "mixed": Scatter(60, 5, 20, kind="mixed"),
    "huge": Scatter(60, 5, 20, g=fp16, kind="huge"),
    "denormal": Scatter(60, 5, 20, kind="denormal"),
    "rows apart": Scatter(60, 5, 20, layout="rows"),
    "columns apart": Scatter(60, 5, 20, g=bf16, layout="columns"),
    "one row": Scatter(60, 5, 20, layout="one row"),
    "no tokens": Scatter(0, 5, 20),
}


def scattered(case: Scatter) -> tuple:
    """ids, weights and g; NaN where nothing may look: beside -1, and in tokens without a code."""
    ids = chosen(case.T, case.k, case.C, case.ids)
    if case.hot:
        ids[ids == case.C - 1] = -1
        for i in range(min(case.k, 2)):
            ids[1 : 1 + case.hot, i] = case.C - 1 - i
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2)).to(case.weights)
    g = hurtful.matrix(max(case.T, 1), case.E, case.kind, case.g, 3)[: case.T]
    weights = weights.masked_fill(ids < 0, torch.nan)
    if case.layout == "one row":
        return ids, weights, g[:1].expand_as(g)
    g[(ids < 0).all(1)] = torch.nan
    return ids, weights, hurtful.strided(g, case.layout)


def added_in_order(ids, weights, g, C: int, piece: int) -> torch.Tensor:
    """scatter_sum a place at a time: pieces of a code in order, then their sums; fp32."""
    sums, k = torch.zeros(C, g.shape[1]), ids.shape[1]
    for j in ids.unique().tolist():
        for places in (ids.flatten() == j).nonzero()[:, 0].split(piece) if 0 <= j < C else ():
            added = torch.zeros(g.shape[1])
            for place in places.tolist():
                added = added + weights.flatten()[place].float() * g[place // k].float()
            sums[j] += added
    return sums


def scatter(case: Scatter) -> None:
    """Bit for bit what is added a place at a time; near to fp64 as PyTorch finds it."""
    from cu_fast.kernels.triton import scatter_sum
    from cu_fast.nn import autograd

    ids, weights, g = scattered(case)
    with Guard(), Watch(scatter_sum) as watch:
        got = scatter_sum.scatter_sum(*on((ids, weights, g)), case.C)
    assert watch.kernels == ["sum_pieces", "sum_codes"][case.T * case.k < 256 :]
    want = added_in_order(ids, weights, g, case.C, 256)
    same([got], [want.to(torch.promote_types(case.g, case.weights))])
    places = torch.bincount(ids[ids >= 0].long(), minlength=case.C)[:, None]
    assert (places[:UNUSED] == 0).all() and (got[on(places[:, 0] == 0)] == 0).all()
    assert not case.hot or places.max() == case.hot
    if case.kind == "gaussian":
        weights, g = weights.double().nan_to_num(), g.double().nan_to_num()
        exact, magnitude = (autograd.scatter_sum(ids, *of, case.C) for of in ((weights, g), (weights.abs(), g.abs())))
        near(got, exact, magnitude, places + 3)


def scatter_with_wrong_ids() -> None:
    """What is none of the codes is left out."""
    from cu_fast.kernels.triton import scatter_sum

    ids = torch.tensor([[0, -2, 4], [5, -1, 2]], dtype=torch.int32)
    got = scatter_sum.scatter_sum(*on((ids, torch.ones(2, 3), torch.tensor([[1.0], [2.0]]))), 5)
    same([got], [torch.tensor([[1.0], [0], [2], [0], [1]])])


def gradients_do_not_depend_on_the_tiles() -> None:
    """Every tile that ships, and smaller ones, give the same bits."""
    from cu_fast.kernels.triton import gather_dot, launch, scatter_sum

    ids, weights, g = scattered(Scatter(300, 2, 300, hot=290))
    ids, weights, g = ids[:, :1], weights[:, :1], g.nan_to_num()
    ids, weights, g = on((ids, weights, g))
    few, few_g, codes = on(chosen(5, 20, 40)), g[1:6], on(hurtful.matrix(40, 300, "gaussian", fp32, 4))
    want = scatter_sum.scatter_sum(ids, weights, g, 40), gather_dot.gather_dot(few, few_g, codes)
    small = {
        "dot_slots": launch._config(1, C=4, UNROLL=3),
        "sum_pieces": launch._config(1, E=64, UNROLL=3),
        "sum_codes": launch._config(1, E=128, UNROLL=1),
    }
    choices = [small] + [{kernel: launch.TABLE[kernel][name] for kernel in small for name in launch.TABLE[kernel]
                          if name in names} for names in (("few", "narrow"), ("many", "wide"))]  # fmt: skip
    for choice in choices:
        scatter_sum.choose = gather_dot.choose = lambda kernel, *_, choice=choice: choice[kernel]
        same([scatter_sum.scatter_sum(ids, weights, g, 40), gather_dot.gather_dot(few, few_g, codes)], want)
    scatter_sum.choose = gather_dot.choose = launch.choose


def gradients_are_small() -> None:
    """No allocation like gathered rows, [T, k, E]."""
    from cu_fast.kernels.triton import gather_dot, scatter_sum

    ids, weights, g = on(scattered(Scatter(200, 8, 80)))
    codes = on(hurtful.matrix(40, 80, "gaussian", fp32, 4))
    for run in (lambda: gather_dot.gather_dot(ids, g, codes), lambda: scatter_sum.scatter_sum(ids, weights, g, 40)):
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        largest = max(event.self_cpu_memory_usage + event.self_device_memory_usage for event in profile.events())
        assert 0 < largest <= 200 * 8 * 8 + 2**10, largest  # int64 [T, k]


def through_autograd(what: str, T: int = 40, dtype: torch.dtype = fp32) -> None:
    """impl="triton" all the way, against what torch differentiates in fp64: first gradients, and second ones."""
    from cu_fast.kernels.triton import gather_dot, masked_decode, scatter_sum
    from cu_fast.nn import autograd

    k, E, C = 2, 20, 30
    ids = chosen(T, k, C)
    ids[: T - 10, 0] = 7
    generator = torch.Generator().manual_seed(2)
    weights, z, upstream, codes = (
        torch.randn(size, generator=generator).to(dtype) for size in ((T, k), (T, E), (T, E), (C, E))
    )
    weights[ids < 0] = 0
    ids, weights, z, upstream, codes = on((ids, weights, z, upstream, codes))

    def sums(ids, weights, codes):
        return autograd.gather_sum(ids, weights, codes, "triton")

    def dots(ids, z, codes):
        return autograd.gather_dot(ids, z, codes, "triton")

    def plain_sums(ids, weights, codes):
        return (torch.where(ids < 0, 0.0, weights)[..., None] * codes[ids.clamp(min=0)]).sum(1)

    def plain_dots(ids, z, codes):
        return torch.where(ids < 0, 0.0, (z[:, None] * codes[ids.clamp(min=0)]).sum(-1))

    def found(sums, dots, of) -> list:
        weights, z, upstream, codes = (tensor.clone().requires_grad_() for tensor in of)
        if what == "gather_sum":
            return torch.autograd.grad(sums(ids, weights, codes), (weights, codes), upstream.detach())
        if what == "gather_dot":
            return torch.autograd.grad(dots(ids, z, codes), (z, codes), weights.detach())
        if what == "weights by scores":
            return torch.autograd.grad(sums(ids, dots(ids, z, codes), codes), (z, codes), upstream.detach())
        if what == "gather_sum, twice":
            first = torch.autograd.grad(sums(ids, weights, codes), weights, upstream, create_graph=True)
            return torch.autograd.grad(first, (upstream, codes), weights.detach())
        first = torch.autograd.grad(dots(ids, z, codes), z, weights, create_graph=True)
        return torch.autograd.grad(first, (weights, codes), upstream.detach())

    with Watch(gather_dot) as dots_by, Watch(scatter_sum) as codes_by, Watch(masked_decode) as sums_by:
        got = found(sums, dots, (weights, z, upstream, codes))
    assert dots_by.kernels and codes_by.kernels and sums_by.kernels, "some of it was not made by Triton"
    wide = [tensor.double() for tensor in (weights, z, upstream, codes)]
    exact = found(plain_sums, plain_dots, wide)
    magnitude = found(plain_sums, plain_dots, [tensor.abs() for tensor in wide])
    # A sum of E, of k, and of a code's places; what comes between them is rounded to dtype.
    roundings = E + k + T + 10 + 3 * torch.finfo(dtype).eps * 2**23
    for one, want, size in zip(got, exact, magnitude):
        near(one, want, size, roundings)


def through_training(similarity: str) -> None:
    """A step of the bottleneck with impl="triton": the gradients that "reference" has."""
    from cu_fast.kernels.triton import gather_dot, scatter_sum
    from cu_fast.nn import BottleneckConfig, CodebookBottleneck

    x, upstream = hurtful.matrix(20, 12, "gaussian", fp32, 1), hurtful.matrix(20, 12, "gaussian", fp32, 2)
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        config = BottleneckConfig(
            d_model=12, code_dim=9, num_codes=40, k=3, similarity=similarity, weight="score", code_dropout=0.2
        )
        given = on(x).requires_grad_()
        made = CodebookBottleneck(config).train().to(given.device)
        made.impl = impl
        with Watch(gather_dot) as dot_watch, Watch(scatter_sum) as scatter_watch:
            ((made(given) * on(upstream)).sum() + made.auxiliary_loss()).backward()
        kernels = {*dot_watch.kernels, *scatter_watch.kernels}
        assert kernels == ({"dot_slots", "sum_codes"} if impl == "triton" else set()), kernels
        results.append([given.grad, *(parameter.grad for parameter in made.parameters())])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


CASES = {
    **{f"gather_dot: {name}": (dot, case) for name, case in DOTS.items()},
    "gather_dot: wrong ids": (dot_with_wrong_ids,),
    **{f"scatter_sum: {name}": (scatter, case) for name, case in SCATTERS.items()},
    "scatter_sum: wrong ids": (scatter_with_wrong_ids,),
    "gradients: tiles": (gradients_do_not_depend_on_the_tiles,),
    "gradients: memory": (gradients_are_small,),
    **{
        f"gradients: {what}": (through_autograd, what)
        for what in ("gather_sum", "gather_dot", "weights by scores", "gather_sum, twice", "gather_dot, twice")
    },
    "gradients: hot": (through_autograd, "gather_sum", 300),
    "gradients: bf16": (through_autograd, "gather_sum", 40, bf16),
    "gradients: fp16": (through_autograd, "gather_sum", 40, fp16),
    "gradients: cosine": (through_training, "cosine"),
    "gradients: l2": (through_training, "l2"),
}


HEAVY = {
    "gradients: fp16",
    "gradients: gather_dot, twice",
    "gradients: hot",
    "gradients: l2",
    "gradients: memory",
    "gradients: tiles",
    "gradients: weights by scores",
    "scatter_sum: hot, fp16",
    "scatter_sum: many pieces",
}


if __name__ == "__main__":
    report(CASES, HEAVY)
