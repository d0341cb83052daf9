"""What is deleted now, in this thread: the run-time half of ``cu_fast.hf``. Knows tensors, not models.

A context variable holds the request that ``attachment.unlearn`` made. A compiled model cannot read one, and must
not bake it in either, so everything that depends on it is reached through the four operators at the end of this
file. They are opaque to the compiler and marked as ordered effects: they run at every call, in order, and are
never merged, dropped, folded into a constant or captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cu_fast._topics import NOTHING, Layer, Request, text_of


class StaleCacheError(RuntimeError):
    """A KV cache, or encoder outputs, computed under one set of masks and continued under another."""


class _Ran(threading.local):
    """The swapped layers that ran in this thread since their runner was entered."""

    def __init__(self) -> None:
        self.layers: set[int] = set()


class Active:
    """The run-time state of one attachment."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.request: ContextVar[Request | None] = ContextVar("cu_fast.request", default=None)
        self.observer: ContextVar[Callable | None] = ContextVar("cu_fast.observer", default=None)
        # Inside generate: how many rows of the batch a sequence may become (beams, return sequences). Else 0.
        self.expand: ContextVar[int] = ContextVar("cu_fast.expand", default=0)
        self._lock = threading.Lock()
        self.masked_contexts = 0  # open, in any thread
        self._ran = _Ran()
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    def __deepcopy__(self, memo: dict) -> Active:
        raise TypeError("a model with an attachment cannot be copied; detach(), copy, and attach() to both")

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError("a model with an attachment cannot be pickled; use save_pretrained() and attachment.save()")

    @contextlib.contextmanager
    def holding(self, request: Request) -> Iterator[None]:
        """Let a request hold in this context."""
        deletes = int(request.signature != NOTHING)
        with self._lock:
            self.masked_contexts += deletes
        try:
            token = self.request.set(request)
            try:
                yield
            finally:
                self.request.reset(token)
        finally:
            with self._lock:
                self.masked_contexts -= deletes

    def now(self) -> Request | None:
        """The request that holds here, None for none.

        Raises:
            RuntimeError: masks are active elsewhere and nobody said whether they hold here. A new thread starts
                with an empty context, so a model run in one would quietly run without them.
        """
        request = self.request.get()
        if request is None and self.masked_contexts:
            raise RuntimeError(
                "masks are active in another thread or context, and this one has not said what holds here; enter "
                "`with attachment.unlearn(...)` here (unlearn(None) deletes nothing), or start the thread with "
                "contextvars.copy_context().run"
            )
        return request

    def mask_rows(self, x: Tensor, index: int) -> Tensor | None:
        """mask_row int32 [T] for a layer's output x [B, S, D], T = B S; None where nothing is deleted."""
        layer = self.layers[index]
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a swapped layer cannot be captured in a CUDA graph: its replay would not look masks up")
        if observer := self.observer.get():
            observer(x, layer.bottleneck)
        request = self.now()
        if request is None:
            return None
        tokens = x.numel() // x.shape[-1]
        if request.per_sequence:
            self._check_batch(x, len(request.rows), layer)
        if request.signature == NOTHING:
            return None
        if layer.name in request.codebooks and layer.bottleneck.codebook_sha256() != request.codebooks[layer.name]:
            raise RuntimeError(f"the codebook of layer {layer.name!r} changed inside the unlearn context")
        if layer.bottleneck.training:
            raise RuntimeError("a mask is active but the bottleneck is in training mode; call model.eval() first")
        self._ran.layers.add(index)
        # A sequence's tokens lie together, and so do its copies under beam search.
        rows = torch.tensor(request.rows, dtype=torch.int32)
        return rows.repeat_interleave(tokens // len(rows)).to(x.device)

    def _check_batch(self, x: Tensor, entries: int, layer: Layer) -> None:
        if x.dim() != 3:
            raise RuntimeError(
                f"layer {layer.name!r} returned shape {list(x.shape)}; masks by sequence need [batch, tokens, width]"
            )
        expand = self.expand.get()
        if x.shape[0] not in (entries, entries * expand):
            expected = f"{entries}" if expand <= 1 else f"{entries} or {entries * expand}"
            raise ValueError(
                f"the batch holds {x.shape[0]} sequences and unlearn() was given {entries} entries; "
                f"the batch should be {expected}"
            )

    def enter(self, runner: int) -> None:
        """The model that runs some of the layers starts."""
        request = self.now()
        if request is not None and request.signature != NOTHING:
            self._ran.layers -= {i for i, layer in enumerate(self.layers) if layer.runner == runner}

    def leave(self, runner: int) -> None:
        """It has finished. Raises RuntimeError where masks are active and one of its swapped layers did not run."""
        request = self.now()
        if request is None or request.signature == NOTHING:
            return
        missed = [v.name for i, v in enumerate(self.layers) if v.runner == runner and i not in self._ran.layers]
        if missed:
            raise RuntimeError(
                f"masks are active, but the swapped layers {missed} did not run: nothing was deleted there"
            )

    def check_filled(self, stamp: Tensor | None, length: int | Tensor, what: str) -> Tensor:
        """The stamp, int64 [], for a cache that is about to be continued under the present request.

        Args:
            stamp: the one it carries, None where it carries none: then it counts as filled without masks.
            length: how many tokens it holds. An empty one may be filled under anything.
            what: what messages call it.

        Raises:
            StaleCacheError: it was filled under other masks.
        """
        request = self.now()
        present = NOTHING if request is None else request.signature
        filled = NOTHING if stamp is None else int(stamp)
        if filled != present and int(length) > 0:
            raise StaleCacheError(
                f"this {what} was computed under {text_of(filled)}, and now {text_of(present)} holds; start with an "
                f"new one, or continue inside the context that it comes from"
            )
        return torch.tensor(present)


# -- what a compiled model calls ---------------------------------------------------------------------------------

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, Active] = weakref.WeakValueDictionary()


def _operator(name: str):
    return torch.library.custom_op(f"cu_fast::{name}", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


@_operator("mask_rows")
def mask_rows(x: Tensor, handle: int, layer: int) -> Tensor:
    """:meth:`Active.mask_rows`; where nothing is deleted, -1 for every token."""
    rows = _by_handle[handle].mask_rows(x, layer)
    return x.new_full((x.numel() // x.shape[-1],), -1, dtype=torch.int32) if rows is None else rows


@mask_rows.register_fake
def _(x: Tensor, handle: int, layer: int) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=torch.int32)


@_operator("enter")
def enter(handle: int, runner: int) -> None:
    """:meth:`Active.enter`."""
    _by_handle[handle].enter(runner)


@_operator("leave")
def leave(handle: int, runner: int) -> None:
    """:meth:`Active.leave`."""
    _by_handle[handle].leave(runner)


@_operator("check_filled")
def check_filled(stamp: Tensor | None, length: Tensor, what: str, handle: int) -> Tensor:
    """:meth:`Active.check_filled`; length is int64 []."""
    return _by_handle[handle].check_filled(stamp, length, what)


@check_filled.register_fake
def _(stamp: Tensor | None, length: Tensor, what: str, handle: int) -> Tensor:
    return torch.empty((), dtype=torch.int64)


for _op in (enter, leave):
    _op.register_fake(lambda handle, runner: None)
for _op in (mask_rows, enter, leave, check_filled):
    _op.register_effect(torch.library.EffectType.ORDERED)
