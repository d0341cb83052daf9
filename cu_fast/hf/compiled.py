"""What a compiled model calls to reach the present request. Part of ``cu_fast.hf.attachment``.

A compiled model cannot read a context variable, and must not bake its value in either, so everything that depends on it is
reached through these operators. They are opaque to the compiler, which is told that they write to one tensor: they run at
every call, in order, and are never merged, dropped, folded into a constant or captured in a CUDA graph.

On a GPU a forward that is traced as a whole calls two of them: ``rows_of`` before its layers and ``leave`` behind. Its rows
are data that flows from the one to the layers (:class:`Carried`), so what lies between can be captured in one CUDA graph,
and none can be replayed with the rows of another call. Elsewhere, and where the trace was broken in between, each layer
calls ``mask_rows`` or ``delete``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cu_fast.hf.active import by_handle

# The tensor that each operator claims to write to, so that the compiler keeps their order; none touches it. Declared as
# ordered effects they would change order: inductor of torch 2.13 drops the order of effects where it splits a graph
# around code that CUDA graphs cannot hold.
ORDER = torch.zeros((), dtype=torch.int64, device="cpu")


def _operator(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    return torch.library.custom_op(f"cu_fast::{name}", mutates_args=("order",), tags=(torch.Tag.cudagraph_unsafe,))


@_operator("mask_rows")
def mask_rows(order: Tensor, x: Tensor, handle: int, layer: int) -> Tensor:
    """:meth:`Active.mask_rows` of the layer with that number; -1 for every token where nothing is deleted."""
    rows = by_handle[handle].mask_rows(x, layer)
    if rows is None:
        return x.new_full((x.numel() // x.shape[-1],), -1, dtype=torch.int32)
    return rows.clone()  # torch.library: a result must not alias a tensor that others hold


@mask_rows.register_fake
def _(order: Tensor, x: Tensor, handle: int, layer: int) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=torch.int32)


@_operator("delete")
def delete(order: Tensor, kept: Tensor, handle: int, layer: int) -> tuple[Tensor, Tensor]:
    """:meth:`Active.delete` of the layer with that number, contiguous; and bool [], whether anything is deleted."""
    y = by_handle[handle].delete(kept, layer)
    if y is kept:
        return y.clone(memory_format=torch.contiguous_format), torch.tensor(False)
    return y.contiguous(), torch.tensor(True)


@delete.register_fake
def _(order: Tensor, kept: Tensor, handle: int, layer: int) -> tuple[Tensor, Tensor]:
    return kept.new_empty(kept.shape), torch.empty((), dtype=torch.bool, device="cpu")


@torch.library.custom_op("cu_fast::pass_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def pass_gradient(grad: Tensor, deleted: Tensor) -> Tensor:
    """The gradient of what :func:`delete` left as it was. Raises RuntimeError where it deleted."""
    if deleted:
        raise RuntimeError("a deletion has no gradient; leave the unlearn context, or enter unlearn(None), to train")
    return grad.clone(memory_format=torch.contiguous_format)


@pass_gradient.register_fake
def _(grad: Tensor, deleted: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


class Differentiable(torch.autograd.Function):
    """What :func:`delete` gave, with a gradient to what it was given where nothing was deleted."""

    @staticmethod
    def forward(ctx, kept: Tensor, y: Tensor, deleted: Tensor) -> Tensor:
        ctx.save_for_backward(deleted)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (deleted,) = ctx.saved_tensors
        return torch.ops.cu_fast.pass_gradient(grad, deleted), None, None


@_operator("remember")
def remember(order: Tensor, x: Tensor, handle: int, layer: int) -> None:
    """:meth:`Active.remember` of the layer with that number; a copy, since the compiler may use the memory again."""
    by_handle[handle].remember(x.clone(), layer)


@_operator("enter")
def enter(order: Tensor, handle: int, runner: int, batch: int, first: Tensor | None) -> None:
    """:meth:`Active.enter`."""
    by_handle[handle].enter(runner, batch, None if first is None else first.clone())


@_operator("rows_of")
def rows_of(
    order: Tensor, handle: int, runner: int, batch: int, first: Tensor | None, device: torch.device, number: int
) -> Tensor:
    """:meth:`Active.enter` and :meth:`Active.rows_of`; -1 for every sequence where nothing is deleted."""
    active = by_handle[handle]
    active.enter(runner, batch, None if first is None else first.clone())
    rows = active.rows_of(runner, batch, device, _handed[number])
    return torch.full((batch,), -1, dtype=torch.int32, device=device) if rows is None else rows.clone()


@rows_of.register_fake
def _(
    order: Tensor, handle: int, runner: int, batch: int, first: Tensor | None, device: torch.device, number: int
) -> Tensor:
    return torch.empty((batch,), dtype=torch.int32, device=device)


@_operator("leave")
def leave(order: Tensor, handle: int, runner: int) -> None:
    """:meth:`Active.leave`."""
    by_handle[handle].leave(runner)


@_operator("check_filled")
def check_filled(order: Tensor, stamp: Tensor | None, length: Tensor, what: str, handle: int) -> Tensor:
    """:meth:`Active.check_filled`; length is int64 []."""
    return by_handle[handle].check_filled(stamp, length, what)


@check_filled.register_fake
def _(order: Tensor, stamp: Tensor | None, length: Tensor, what: str, handle: int) -> Tensor:
    return torch.empty((), dtype=torch.int64)


enter.register_fake(lambda order, handle, runner, batch, first: None)
remember.register_fake(lambda order, x, handle, layer: None)
leave.register_fake(lambda order, handle, runner: None)


@dataclasses.dataclass
class Carried:
    """The rows of a compiled forward, while it is traced.

    Attributes:
        rows: int32 [B].
        first: as in :meth:`Active.enter`.
        number: of this forward among all that were traced.
        trace: number of the trace that they are part of. Another trace finds here what the first one left when it was
            broken: a tensor of whichever thread ran last.
        read: number of a layer -> what it read, where it changes another place, until that place is reached.
    """

    rows: Tensor
    first: Tensor | None
    number: int
    trace: int
    read: dict[int, Tensor] = dataclasses.field(default_factory=dict)


_traces = itertools.count()
_handed: list[set[int]] = []  # per traced forward the numbers of the layers that it hands its rows to


# What follows runs while a trace is made, and gives constants of what is compiled.


@torch.compiler.assume_constant_result
def trace_number() -> int:
    """The number of the trace that is being made."""
    context = torch._guards.TracingContext.get()
    if not hasattr(context, "cu_fast_number"):
        context.cu_fast_number = next(_traces)
    return context.cu_fast_number


@torch.compiler.assume_constant_result
def begin(handle: int, runner: int) -> int:
    """The number of a runner's forward. A graph reads what its layers read where it is, and copies none at each replay."""
    for layer in (layer for layer in by_handle[handle].layers if layer.runner == runner):
        for tensor in filter(torch.is_tensor, tree_leaves((layer.table.tensors, layer.bottleneck.constants()))):
            torch._dynamo.mark_static_address(tensor)
    _handed.append(set())
    return len(_handed) - 1


@torch.compiler.assume_constant_result
def hand_to(number: int, layer: int) -> int:
    """Note that a forward hands its rows to a layer: what is compiled runs the layer, always."""
    _handed[number].add(layer)
    return layer
