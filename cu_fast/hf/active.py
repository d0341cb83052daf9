"""What is deleted now, in this thread: the run-time half of ``cu_fast.hf.attachment``. Knows tensors, not models.

A context variable holds the request that ``attachment.unlearn`` made. A compiled model cannot read one: what it calls is
in ``compiled.py``.
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

from cu_fast.hf.forwards import Forwards
from cu_fast.hf.request import PACKED, CapturedRequest, Hold, Request, text_of
from cu_fast.hf.topics import Entry, Layer, Topics
from cu_fast.nn import Splice

Silent = Literal["refuse", "plain"]


class StaleCacheError(RuntimeError):
    """A KV cache, encoder outputs or another state, computed under one set of masks and continued under another."""


class Active(Forwards):
    """The run-time state of one attachment. It can be neither copied nor pickled.

    Args:
        layers: the swapped layers.
        topics: the masks by name.
        silent: what happens in a forward whose context has not said what holds: "refuse" or "plain".

    Attributes:
        standing: the request of the masks that always hold; None = none does.
        request: the request that holds in this context; None = nothing was said.
        observer: called with the output of every swapped layer in this context; None = there is none.
        expand: in generate, how many rows of the batch are made of a sequence (beams, return sequences); else 0.
        handle: the number by which the operators of a compiled model find this object.
    """

    def __init__(self, layers: Sequence[Layer], topics: Topics, silent: Silent) -> None:
        super().__init__()
        self.layers = layers
        self.topics = topics
        self.silent = silent
        self.standing: Request | None = None
        self.request: ContextVar[Request | None] = ContextVar("cu_fast.request", default=None)
        self.observer: ContextVar[Callable[[Tensor, Splice], None] | None] = ContextVar(
            "cu_fast.observer", default=None
        )
        self.expand: ContextVar[int] = ContextVar("cu_fast.expand", default=0)
        # Guards the next two. Reentrant: a finalizer may close a request at any moment, in a thread that holds it.
        self._lock = threading.RLock()
        self._open: weakref.WeakSet[Request] = weakref.WeakSet()
        self._in_use: weakref.WeakSet[Any] = weakref.WeakSet()  # open requests that delete, and tickets
        self.handle = next(_handles)
        by_handle[self.handle] = self

    def __deepcopy__(self, memo: dict) -> Active:
        raise TypeError("a model with an attachment cannot be copied; detach(), copy, and attach() to both")

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError("a model with an attachment cannot be pickled; use save_pretrained() and attachment.save()")

    # -- what holds ------------------------------------------------------------------------------------------

    def open(self, topics: Entry | list[Entry], gated: bool = False) -> Request:
        """A request for topics, open until :meth:`close`; it holds in no context yet. Raises as ``Topics.request``."""
        return self._opened(self.topics.request(topics, gated))

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
        """End a request: no more forwards run under it. Its rows are given back once those running have ended."""
        if self._thread.hold is request.hold:
            self._thread.hold = None  # the forwards of this thread have ended
            self._thread.fired.clear()
        with self._lock:
            self._in_use.discard(request)
            self._open.discard(request)
        request.close()  # last: after an interrupt before this line, __del__ of the context closes it again

    def check_idle(self, what: str) -> None:
        """Raises RuntimeError where masks hold in any thread, or a ``generate`` under masks has not ended."""
        if len(self._in_use):
            raise RuntimeError(
                f"{what} while masks hold; leave every unlearn context, and let every generate end, first"
            )

    def check_nothing_open(self, what: str) -> None:
        """Raises RuntimeError where an ``unlearn`` context is open in any thread, be it ``unlearn(None)``, as well."""
        self.check_idle(what)
        if len(self._open):
            raise RuntimeError(f"{what} while an unlearn context is open; leave every one first")

    def now(self) -> Request | None:
        """The request that holds in this context, else the standing one; None where nothing is deleted.

        Raises:
            RuntimeError: there are masks and nothing was said in this context: a new thread, say, starts with an empty
                context and would quietly run without masks. Or the context that was entered has been left.
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

    def deletes(self) -> bool:
        """Whether the request that holds in this context deletes something. Raises as :meth:`now`."""
        request = self.now()
        return request is not None and request.deletes

    def _could_be_missed(self) -> bool:
        """Whether a forward in silence may have been meant to delete: there is a mask that does not always hold."""
        if not self.topics.masks.keys() <= self.topics.always:
            return True
        if not len(self._open):
            return False
        with self._lock:
            return any(request.beyond for request in self._open)  # its mask may have been removed since

    @contextlib.contextmanager
    def holding(self, request: Request) -> Iterator[None]:
        """While the context is open a request holds; then it is closed."""
        token = self.request.set(request)
        try:
            yield
        finally:
            self.request.reset(token)
            self.close(request)

    def under(self, topics: Entry | list[Entry]) -> contextlib.AbstractContextManager[None]:
        """While the context is open topics are deleted; for forwards that this package itself runs."""
        return self.holding(self.open(topics))

    @contextlib.contextmanager
    def packed(self, parts: Sequence[tuple[Request | None, int]], tokens: int) -> Iterator[None]:
        """Around the forward of a packed batch, [1, tokens].

        Args:
            parts: per sequence, in order, its request (None = nothing is deleted) and its number of tokens.
            tokens: of the batch; those behind the last sequence are padding.
        """
        rows = [row for part, n in parts for row in (part.rows if part else (-1,)) * n]
        rows += [-1] * (tokens - len(rows))
        codebooks = {name: sha for part, _ in parts if part for name, sha in part.codebooks.items()}
        hold = Hold()
        try:
            with self.holding(Request(tuple(rows), "token", PACKED, codebooks, hold)):
                yield
        finally:
            for part, _ in parts:
                if part and part.hold:
                    part.hold.streams |= hold.streams

    @contextlib.contextmanager
    def generating(self, expand: int) -> Iterator[None]:
        """Around ``generate``. ``expand``: how many rows of the batch are made of one sequence."""
        request, ticket = self.now(), _Ticket()
        if request is not None and request.deletes:
            with self._lock:
                self._in_use.add(ticket)  # until generate ends, even where the context is left before
        token, before = self.expand.set(expand), self._thread.unconfirmed
        self._thread.unconfirmed = False
        try:
            yield
            self.confirm()
        finally:
            self._thread.unconfirmed = before
            self.expand.reset(token)

    # -- states ----------------------------------------------------------------------------------------------

    def check_filled(self, stamp: Tensor | None, length: int | Tensor, what: str) -> Tensor:
        """Check a cache that a forward is about to continue under the present request.

        Args:
            stamp: that the cache carries, int64 []; None = it carries none and counts as filled without masks, or, once
                codes were erased, under unknown ones.
            length: tokens in the cache. An empty cache fits every request.
            what: what messages call it.

        Returns:
            Its new stamp, int64 [].

        Raises:
            StaleCacheError: the cache was filled under other masks.
        """
        request = self.now()
        if isinstance(request, CapturedRequest):
            raise RuntimeError("capture() was given a compiled model; give it the model in eager mode")
        present = self.topics.nothing if request is None else request.signature
        filled = self.topics.unstamped if stamp is None else int(stamp)
        if filled != present and int(length) > 0:
            raise StaleCacheError(
                f"this {what} was computed under {text_of(filled)}, and now {text_of(present)} holds; start with a "
                f"new one, or continue inside the context that it comes from"
            )
        return torch.full((), present, dtype=torch.int64, device="cpu")


class _Ticket:
    """Stands for a ``generate`` under masks while it runs."""


_handles = itertools.count()
by_handle: weakref.WeakValueDictionary[int, Active] = weakref.WeakValueDictionary()


def _close_in_child() -> None:
    """Close the requests in a forked process: the block that it was forked in is left only in the old process."""
    for active in list(by_handle.values()):
        active._lock = threading.RLock()  # a thread that held the old one is not in this process
        active.topics.after_fork()
        for request in list(active._open):
            request.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
