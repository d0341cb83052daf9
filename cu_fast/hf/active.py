"""What is deleted now, in this thread: the run-time half of ``cu_fast.hf.attachment``. Knows tensors, not models.

A context variable holds the request that ``attachment.unlearn`` made. A compiled model cannot read one, and must
not bake it in either, so everything that depends on it is reached through the four operators at the end of this
file. They are opaque to the compiler, which is told that they write to one tensor: they run at every call, in order,
and are never merged, dropped, folded into a constant or captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from cu_fast.hf.topics import PACKED, Hold, Layer, Request, Topics, text_of

Silent = Literal["refuse", "plain"]
UNKNOWN = -1  # how many sequences a forward was given, where its arguments do not tell


class StaleCacheError(RuntimeError):
    """A KV cache, encoder outputs or another state, computed under one set of masks and continued under another."""


class _Thread(threading.local):
    """What this thread's forwards have come to.

    ran: the swapped layers that ran since their model was entered. batch: runner -> how many sequences it was given.
    hold: of the request that was looked up last; kernels that read its rows may still run. unconfirmed: inside
    generate, a step was begun, and its forward has not yet been seen to pass the swapped layers.
    """

    def __init__(self) -> None:
        self.ran: set[int] = set()
        self.batch: dict[int, int] = {}
        self.hold: Hold | None = None
        self.unconfirmed = False


class Active:
    """The run-time state of one attachment.

    silent: what a forward means whose context has not said what holds.
    """

    def __init__(self, layers: Sequence[Layer], topics: Topics, silent: Silent) -> None:
        self.layers = layers
        self.topics = topics
        self.silent = silent
        self.standing: Request | None = None  # what always holds, where something does
        self.request: ContextVar[Request | None] = ContextVar("cu_fast.request", default=None)
        self.observer: ContextVar[Callable | None] = ContextVar("cu_fast.observer", default=None)
        # Inside generate: how many rows of the batch a sequence becomes (beams, return sequences). Else 0.
        self.expand: ContextVar[int] = ContextVar("cu_fast.expand", default=0)
        self._lock = threading.RLock()  # of the next two; a request may be closed by a finalizer, at any moment
        self._open: weakref.WeakSet[Request] = weakref.WeakSet()
        self._in_use: weakref.WeakSet[Any] = weakref.WeakSet()  # of these those that delete, and what runs under them
        self._thread = _Thread()
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    def __deepcopy__(self, memo: dict) -> Active:
        raise TypeError("a model with an attachment cannot be copied; detach(), copy, and attach() to both")

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError("a model with an attachment cannot be pickled; use save_pretrained() and attachment.save()")

    # -- what holds ------------------------------------------------------------------------------------------

    def open(self, topics: Any) -> Request:
        """A request for these topics, open until :meth:`close`; it holds nowhere yet."""
        return self._opened(self.topics.request(topics))

    def _opened(self, request: Request) -> Request:
        with self._lock:
            self._open.add(request)
            if request.deletes:
                self._in_use.add(request)
        return request

    def share(self, request: Request, entry: int) -> Request:
        """One entry of an open request as a request of its own, for work that goes on after its context is left."""
        return self._opened(self.topics.share(request, entry))

    def close(self, request: Request) -> None:
        """Nothing may run under it any more; its rows are given back once the forwards that read them have ended."""
        if self._thread.hold is request.hold:
            self._thread.hold = None  # a forward of this thread, if there was one, has ended
        with self._lock:
            self._in_use.discard(request)
            self._open.discard(request)
        request.close()  # last: where an interrupt keeps it from being closed, it is closed again

    def check_idle(self, what: str) -> None:
        """Raises RuntimeError where masks hold in any thread, or a ``generate`` under masks has not ended."""
        if len(self._in_use):
            raise RuntimeError(
                f"{what} while masks hold; leave every unlearn context, and let every generate end, first"
            )

    def check_nothing_open(self, what: str) -> None:
        """Raises RuntimeError where anything was said in any thread, be it None."""
        self.check_idle(what)
        if len(self._open):
            raise RuntimeError(f"{what} while an unlearn context is open; leave every one first")

    def now(self) -> Request | None:
        """The request that holds here, None where nothing was ever to be deleted.

        Raises:
            RuntimeError: nothing was said here, though there are masks: a new thread, for one, starts with an empty
                context, and would quietly run without them. Or what was said has ended.
        """
        request = self.request.get()
        if request is None:
            if self.silent == "refuse" and self._could_be_missed():
                raise RuntimeError(
                    "this attachment has masks, and nothing was said here of what holds; enter "
                    "`with attachment.unlearn(...)` in this thread or task (unlearn(None) deletes nothing), or start "
                    "it with contextvars.copy_context().run and let it end inside the context"
                )
            return self.standing
        if request.closed:
            raise RuntimeError(
                "the unlearn context that holds here was left, or entered in the process that this one was forked from; "
                "enter `with attachment.unlearn(...)` in this thread or task, and let its work end inside"
            )
        return request

    def _could_be_missed(self) -> bool:
        """Whether there is a mask that silence may have meant: not where all of them always hold."""
        if not self.topics.masks.keys() <= self.topics.always:
            return True
        with self._lock:
            return any(request.beyond for request in self._open)  # under a name that was removed since

    @contextlib.contextmanager
    def _holding(self, request: Request) -> Iterator[None]:
        token = self.request.set(request)
        try:
            yield
        finally:
            self.request.reset(token)
            self.close(request)

    def under(self, topics: Any) -> contextlib.AbstractContextManager[None]:
        """Let topics hold for what this package itself runs."""
        return self._holding(self.open(topics))

    @contextlib.contextmanager
    def packed(self, parts: Sequence[tuple[Request | None, int]], tokens: int) -> Iterator[None]:
        """Around the forward of a packed batch, [1, tokens].

        parts: for each sequence that it holds, in order, what is deleted and how many tokens. What is left is padding.
        """
        rows = [row for part, n in parts for row in (part.rows if part else (-1,)) * n]
        rows += [-1] * (tokens - len(rows))
        codebooks = {name: sha for part, _ in parts if part for name, sha in part.codebooks.items()}
        hold = Hold()
        try:
            with self._holding(Request(tuple(rows), "token", PACKED, codebooks, hold)):
                yield
        finally:
            for part, _ in parts:
                if part and part.hold:
                    part.hold.streams |= hold.streams

    @contextlib.contextmanager
    def generating(self, expand: int) -> Iterator[None]:
        """Around ``generate``. expand: rows of the batch for a sequence."""
        request, ticket = self.now(), _Ticket()
        if request is not None and request.deletes:
            with self._lock:
                self._in_use.add(ticket)  # until it ends, whatever becomes of the context
        token, before = self.expand.set(expand), self._thread.unconfirmed
        self._thread.unconfirmed = False
        try:
            yield
            self.confirm()
        finally:
            self._thread.unconfirmed = before
            self.expand.reset(token)

    # -- a forward -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """A step of ``generate`` starts; the one before has ended."""
        if self.expand.get():
            self.confirm()
            self._thread.ran.clear()
            self._thread.unconfirmed = True

    def confirm(self) -> None:
        """Raises RuntimeError where the last step's forward passed a swapped layer by.

        The hooks around a model would tell, but code that was compiled or captured without them has none.
        """
        request = self.now()
        if self._thread.unconfirmed and request is not None and request.deletes:
            self._thread.unconfirmed = False
            self._check_ran(i for i, layer in enumerate(self.layers) if layer.in_decoder)

    def enter(self, runner: int, batch: int) -> None:
        """The model that runs some of the layers starts. batch: the sequences that it was given, or UNKNOWN."""
        request = self.now()
        self._thread.batch[runner] = batch
        if request is not None and request.deletes:
            self._thread.ran -= {i for i, layer in enumerate(self.layers) if layer.runner == runner}

    def leave(self, runner: int) -> None:
        """It has finished. Raises RuntimeError where masks are active and one of its swapped layers did not run."""
        request = self.now()
        self._thread.batch.pop(runner, None)
        if request is not None and request.deletes:
            self._check_ran(i for i, layer in enumerate(self.layers) if layer.runner == runner)

    def _check_ran(self, expected: Iterator[int]) -> None:
        if missed := [self.layers[i].name for i in expected if i not in self._thread.ran]:
            raise RuntimeError(
                f"masks are active, but the swapped layers {missed} did not run: nothing was deleted there"
            )

    def mask_rows(self, x: Tensor, index: int) -> Tensor | None:
        """mask_row int32 [T] for a layer's output x [B, S, D], T = B S; None where nothing is deleted."""
        layer = self.layers[index]
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a swapped layer cannot be captured in a CUDA graph: its replay would not look masks up")
        if observer := self.observer.get():
            observer(x, layer.bottleneck)
        request = self.now()
        batch = self._thread.batch.get(layer.runner)
        if not layer.batch_first and x.dim() == 3:
            layer.batch_first = x.shape[0] == batch != x.shape[1]
        if request is None:
            return None
        tokens = x.numel() // x.shape[-1]
        if request.of == "sequence":
            self._check_batch(x, batch, len(request.rows), layer)
        elif request.of == "token" and tokens != len(request.rows):
            raise RuntimeError(
                f"layer {layer.name!r} returned {tokens} tokens of a packed batch of {len(request.rows)}"
            )
        if not request.deletes:
            return None
        if batch is None:
            raise RuntimeError(
                f"layer {layer.name!r} ran outside its model, whose caches could not be looked at; call the model"
            )
        if layer.name in request.codebooks and layer.bottleneck.codebook_sha256() != request.codebooks[layer.name]:
            raise RuntimeError(f"the codebook of layer {layer.name!r} changed inside the unlearn context")
        if layer.bottleneck.training:
            raise RuntimeError("a mask is active but the bottleneck is in training mode; call model.eval() first")
        hold = self._thread.hold = request.hold
        if hold is None:
            return self.mask_rows(x, index)  # closed by another thread just now: say so
        layer.table.read_on(x.device, hold.streams)
        self._thread.ran.add(index)
        # A sequence's tokens lie together, and so do its copies under beam search.
        rows = request.rows_on(x.device)
        return rows if len(rows) == tokens else rows[:, None].expand(-1, tokens // len(rows)).reshape(-1)

    def _check_batch(self, x: Tensor, batch: int | None, entries: int, layer: Layer) -> None:
        expected = entries * (1 if layer.in_encoder else max(1, self.expand.get()))
        if batch is None or batch == UNKNOWN:
            raise RuntimeError(
                f"layer {layer.name!r} ran where the number of sequences is not known, outside its model or on images; "
                f"give unlearn() one entry for all"
            )
        if batch != expected:
            raise ValueError(
                f"the batch holds {batch} sequences and unlearn() was given {entries} entries; the batch should be "
                f"{expected}"
            )
        if x.dim() != 3 or x.shape[0] != batch:
            raise RuntimeError(
                f"layer {layer.name!r} returned shape {list(x.shape)} for {batch} sequences; masks by sequence need "
                f"[batch, tokens, width]"
            )
        if x.shape[1] == batch > 1 and not layer.batch_first:
            raise RuntimeError(
                f"layer {layer.name!r} returned shape {list(x.shape)}, and which of the two is the batch is not known; "
                f"run any batch whose number of tokens is another one first, or pad this one"
            )

    # -- states ----------------------------------------------------------------------------------------------

    def check_filled(self, stamp: Tensor | None, length: int | Tensor, what: str) -> Tensor:
        """The stamp, int64 [], for a cache that is about to be continued under the present request.

        Args:
            stamp: the one it carries, None where it carries none: then it counts as filled without masks, until codes
                are erased.
            length: how many tokens it holds. An empty one may be filled under anything.
            what: what messages call it.

        Raises:
            StaleCacheError: it was filled under other masks.
        """
        request = self.now()
        present = self.topics.nothing if request is None else request.signature
        filled = self.topics.unstamped if stamp is None else int(stamp)
        if filled != present and int(length) > 0:
            raise StaleCacheError(
                f"this {what} was computed under {text_of(filled)}, and now {text_of(present)} holds; start with an "
                f"new one, or continue inside the context that it comes from"
            )
        return torch.tensor(present)


class _Ticket:
    """A ``generate`` under masks, as long as it runs."""


# -- what a compiled model calls ---------------------------------------------------------------------------------

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, Active] = weakref.WeakValueDictionary()


def _close_in_child() -> None:
    """A forked worker outlives the block that it was forked in, and its copy of a request would never be closed."""
    for active in list(_by_handle.values()):
        active._lock = threading.RLock()  # whoever held it is not in this process
        active.topics.after_fork()
        for request in list(active._open):
            request.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


# What each of them says that it writes to; none touches it. As ordered effects they would be moved past one another
# where inductor splits a graph round what CUDA graphs cannot hold: torch 2.13 drops there what orders effects.
ORDER = torch.zeros((), dtype=torch.int64, device="cpu")


def _operator(name: str):
    return torch.library.custom_op(f"cu_fast::{name}", mutates_args=("order",), tags=(torch.Tag.cudagraph_unsafe,))


@_operator("mask_rows")
def mask_rows(order: Tensor, x: Tensor, handle: int, layer: int) -> Tensor:
    """:meth:`Active.mask_rows`; where nothing is deleted, -1 for every token."""
    rows = _by_handle[handle].mask_rows(x, layer)
    if rows is None:
        return x.new_full((x.numel() // x.shape[-1],), -1, dtype=torch.int32)
    return rows.clone()  # an operator's result is its own


@mask_rows.register_fake
def _(order: Tensor, x: Tensor, handle: int, layer: int) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=torch.int32)


@_operator("enter")
def enter(order: Tensor, handle: int, runner: int, batch: int) -> None:
    """:meth:`Active.enter`."""
    _by_handle[handle].enter(runner, batch)


@_operator("leave")
def leave(order: Tensor, handle: int, runner: int) -> None:
    """:meth:`Active.leave`."""
    _by_handle[handle].leave(runner)


@_operator("check_filled")
def check_filled(order: Tensor, stamp: Tensor | None, length: Tensor, what: str, handle: int) -> Tensor:
    """:meth:`Active.check_filled`; length is int64 []."""
    return _by_handle[handle].check_filled(stamp, length, what)


@check_filled.register_fake
def _(order: Tensor, stamp: Tensor | None, length: Tensor, what: str, handle: int) -> Tensor:
    return torch.empty((), dtype=torch.int64)


enter.register_fake(lambda order, handle, runner, batch: None)
leave.register_fake(lambda order, handle, runner: None)
