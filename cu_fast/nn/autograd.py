"""What training differentiates: sums of codes, registered with torch.library, with gradients in a fixed order.

    gather_sum   q[t]     = sum_i w[t, i] codes[ids[t, i]]                           -> [T, E]
    gather_dot   w[t, i]  = g[t] . codes[ids[t, i]]                                  -> [T, k]
    scatter_sum  codes[j] = the sum of w[t, i] g[t] over all (t, i) of ids[t, i] = j -> [C, E]

T tokens, k codes kept per token, C codes of width E. All three are derivatives of sum w[t, i] (codes[ids[t, i]] . g[t])
by one of its factors, so the first two have the others as their gradients. Id -1 adds nothing and gets no gradient.
Nothing is added by atomics: the same bits in every run, at any number of threads.

Memory beside the results: O(T k + C). gather_dot takes CHUNK_BYTES more; scatter_sum with Triton one row of E per 256
places (t, i). Any floating dtypes: results have the dtype of codes, those of scatter_sum the wider one of its factors.

gather_dot and scatter_sum are the PyTorch code below or Triton kernels (_kernels says which), which add in another order.
The operators' ``impl`` is an :data:`cu_fast.ops.Impl`; a schema of torch.library has no Literal, so it is a str here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cu_fast import ops
from cu_fast.kernels import triton
from cu_fast.ops.checks import check_values, shape
from cu_fast.ops.choice import failure, resolve

CHUNK_BYTES = 2**25  # bytes of codes that gather_dot gathers at a time


def _kernels(op: Literal["gather_dot", "scatter_sum"], impl: ops.Impl, *factors: Tensor) -> Callable | None:
    """The Triton kernels of an operator where they run, None where the PyTorch code does.

    They run where impl is "triton". On GPUs they run for every impl but "reference": the native library has no kernels
    for these operators. They know no fp64.
    """
    if any(factor.dtype == torch.float64 for factor in factors):
        return None
    device = factors[0].device
    on_gpu = device.type == "cuda" and impl != "reference" and failure("triton", device) is None
    return triton.launcher(op) if resolve(impl, device) == "triton" or on_gpu else None


def _check_shape(name: str, factor: Tensor, *wanted: int) -> None:
    if factor.shape != wanted:
        raise ValueError(f"{name} has shape {shape(factor)}; it should be {list(wanted)}")


@torch.library.custom_op("cu_fast::gather_sum", mutates_args=())
def gather_sum(ids: Tensor, weights: Tensor, codes: Tensor, impl: str = "auto") -> Tensor:
    """q[t] = sum_i weights[t, i] codes[ids[t, i]], in the order of i, by the kernels (and the bits) of masked_decode.

    Differentiable in weights and codes.

    Args:
        ids: int32 or int64 [T, k], -1 <= id < C.
        weights: [T, k].
        codes: [C, E].
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        q, [T, E] in the dtype of codes.
    """
    if codes.dtype != torch.float64:
        with torch.no_grad():
            return ops.masked_decode(ids, weights, codes, impl=impl)
    check_values("ids", ids, len(codes))
    weights = torch.where(ids < 0, 0.0, weights)
    q = codes.new_zeros(len(ids), codes.shape[1])
    for i in range(ids.shape[1]):
        q += weights[:, i, None] * codes[ids[:, i].clamp(min=0)]
    return q


@torch.library.custom_op("cu_fast::gather_dot", mutates_args=())
def gather_dot(ids: Tensor, g: Tensor, codes: Tensor, impl: str = "auto") -> Tensor:
    """w[t, i] = g[t] . codes[ids[t, i]], 0 for id -1. Differentiable in g and codes.

    Args:
        ids: int32 or int64 [T, k], -1 <= id < C.
        g: [T, E].
        codes: [C, E].
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        w, [T, k] in the dtype of codes.
    """
    check_values("ids", ids, len(codes))
    _check_shape("g", g, len(ids), codes.shape[1])
    if kernels := _kernels("gather_dot", impl, g, codes):
        return kernels(ids, g, codes)
    w = codes.new_zeros(ids.shape)
    tokens = max(1, CHUNK_BYTES // (ids.shape[1] * codes.shape[1] * codes.element_size()))
    for t in range(0, len(ids), tokens):
        some = slice(t, t + tokens)
        w[some] = codes[ids[some].clamp(min=0)].mul_(g[some, None]).sum(-1)
    return torch.where(ids < 0, 0.0, w)


@torch.library.custom_op("cu_fast::scatter_sum", mutates_args=())
def scatter_sum(ids: Tensor, weights: Tensor, g: Tensor, num_codes: int, impl: str = "auto") -> Tensor:
    """codes[j] = the sum of weights[t, i] g[t] over all (t, i) with ids[t, i] = j, in their order (Triton: in pieces).

    Computed as a gather of g's rows: once the places (t, i) are sorted by id, those of a code are a bag of tokens for
    embedding_bag. Id -1 becomes the last bag, which is dropped.

    Args:
        ids: int32 or int64 [T, k], -1 <= id < C.
        weights: [T, k].
        g: [T, E].
        num_codes: C.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        codes, [C, E] in the wider dtype of weights and g.
    """
    check_values("ids", ids, num_codes)
    _check_shape("weights", weights, *ids.shape)
    _check_shape("g", g, len(ids), g.shape[1])
    if kernels := _kernels("scatter_sum", impl, weights, g):
        return kernels(ids, weights, g, num_codes)
    dtype = torch.promote_types(weights.dtype, g.dtype)
    ids = torch.where(ids < 0, num_codes, ids).flatten()
    ids, order = torch.sort(ids, stable=True)
    starts = torch.searchsorted(ids, torch.arange(num_codes + 1, dtype=ids.dtype, device=ids.device))
    tokens, weights = order // weights.shape[1], weights.flatten()[order].to(dtype)
    g = g.to(dtype).contiguous()
    return F.embedding_bag(tokens, g, starts, mode="sum", per_sample_weights=weights)[:num_codes]


@gather_sum.register_fake
def _(ids: Tensor, weights: Tensor, codes: Tensor, impl: str = "auto") -> Tensor:
    return codes.new_empty(ids.shape[0], codes.shape[1])


@gather_dot.register_fake
def _(ids: Tensor, g: Tensor, codes: Tensor, impl: str = "auto") -> Tensor:
    return codes.new_empty(ids.shape)


@scatter_sum.register_fake
def _(ids: Tensor, weights: Tensor, g: Tensor, num_codes: int, impl: str = "auto") -> Tensor:
    return g.new_empty(num_codes, g.shape[1], dtype=torch.promote_types(weights.dtype, g.dtype))


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    # Of the two factors (weights or g, and codes) each is needed only for the gradient of the other.
    ids, factor, codes, ctx.impl = inputs
    ctx.num_codes = codes.shape[0]
    _, of_factor, of_codes, *_ = ctx.needs_input_grad
    ctx.save_for_backward(ids, factor if of_codes else None, codes if of_factor else None)


def _gather_sum_backward(ctx, g: Tensor) -> tuple:
    ids, weights, codes = ctx.saved_tensors
    of_weights = None if codes is None else gather_dot(ids, g, codes, ctx.impl)
    of_codes = None if weights is None else scatter_sum(ids, weights, g, ctx.num_codes, ctx.impl)
    return None, of_weights, of_codes, None


def _gather_dot_backward(ctx, w: Tensor) -> tuple:
    ids, g, codes = ctx.saved_tensors
    of_g = None if codes is None else gather_sum(ids, w, codes, ctx.impl)
    of_codes = None if g is None else scatter_sum(ids, w, g, ctx.num_codes, ctx.impl)
    return None, of_g, of_codes, None


gather_sum.register_autograd(_gather_sum_backward, setup_context=_keep)
gather_dot.register_autograd(_gather_dot_backward, setup_context=_keep)
