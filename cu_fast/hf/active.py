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

from cu_fast import ops
from cu_fast.hf.gating import GateState, gated_rows
from cu_fast.hf.request import PACKED, Hold, Request, text_of
from cu_fast.hf.topics import Entry, Layer, Topics
from cu_fast.nn import Splice

Silent = Literal["refuse", "plain"]
UNKNOWN = -1  # a forward's number of sequences, where its arguments do not tell


class StaleCacheError(RuntimeError):
    """A KV cache, encoder outputs or another state, computed under one set of masks and continued under another."""


class _Thread(threading.local):
    """What this thread's forwards have done so far.

    Attributes:
        ran: numbers of the swapped layers that ran since their runner was entered.
        batch: runner -> how many sequences it was given, or UNKNOWN; only of those that run now.
        hold: of the request that was looked up last, because kernels that read its rows may still run.
        unconfirmed: in generate, a step was begun, and its forward was not yet seen to run the swapped layers.
        first: runner -> bool [B, S], which tokens are the first of their sequence; absent = none, or not known.
        gates: runner -> what the gates of a gated request have seen of its sequences, and bool [B, S], which of this
            forward's tokens they count.
        read: number of a layer -> what it read, where it changes another place, until that place is reached.
    """

    def __init__(self) -> None:
        self.ran: set[int] = set()
        self.batch: dict[int, int] = {}
        self.hold: Hold | None = None
        self.unconfirmed = False
        self.first: dict[int, Tensor] = {}
        self.gates: dict[int, tuple[GateState, Tensor]] = {}
        self.read: dict[int, Tensor] = {}


class Active:
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
        self._thread = _Thread()
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
        with self._lock:
            return any(request.beyond for request in self._open)  # its mask may have been removed since

    @contextlib.contextmanager
    def _holding(self, request: Request) -> Iterator[None]:
        token = self.request.set(request)
        try:
            yield
        finally:
            self.request.reset(token)
            self.close(request)

    def under(self, topics: Entry | list[Entry]) -> contextlib.AbstractContextManager[None]:
        """While the context is open topics are deleted; for forwards that this package itself runs."""
        return self._holding(self.open(topics))

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
            with self._holding(Request(tuple(rows), "token", PACKED, codebooks, hold)):
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

    # -- a forward -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """A step of ``generate`` starts; the one before has ended. Raises as :meth:`confirm`."""
        if self.expand.get():
            self.confirm()
            self._thread.ran.clear()
            self._thread.unconfirmed = True

    def confirm(self) -> None:
        """Raises RuntimeError where the last step's forward skipped a swapped layer.

        The hooks around a model see that too, but code that was compiled or captured without hooks runs none.
        """
        request = self.now()
        if self._thread.unconfirmed and request is not None and request.deletes:
            self._thread.unconfirmed = False
            self._check_ran(i for i, layer in enumerate(self.layers) if layer.in_decoder)

    def enter(self, runner: int, batch: int, first: Tensor | None = None) -> None:
        """A runner's forward starts.

        Args:
            runner: its number.
            batch: how many sequences it was given, or UNKNOWN.
            first: bool [B, S], the tokens that masks leave alone where a layer skips the first; None = there are none.

        Raises:
            RuntimeError: as :meth:`now`.
        """
        request = self.now()
        self._thread.batch[runner] = batch
        self._thread.first.pop(runner, None)
        self._thread.gates.pop(runner, None)
        if first is not None:
            self._thread.first[runner] = first
        self._forget_read(runner)
        if request is not None and request.deletes:
            self._thread.ran -= {i for i, layer in enumerate(self.layers) if layer.runner == runner}

    def judge(self, runner: int, state: GateState, counted: Tensor) -> None:
        """The gates of this forward count these tokens, and go on from a state. After :meth:`enter`.

        Args:
            runner: its number.
            state: of the sequences that the forward continues.
            counted: bool [B, S], neither padding nor the first of a sequence.
        """
        self._thread.gates[runner] = state, counted

    def judged(self, runner: int) -> GateState | None:
        """What gates have seen of this forward's sequences; None where no request is gated."""
        return self._thread.gates.pop(runner, (None, None))[0]

    def leave(self, runner: int) -> None:
        """A runner's forward has ended. Raises RuntimeError where masks hold and one of its layers did not run."""
        request = self.now()
        self.ended(runner)
        if request is not None and request.deletes:
            self._check_ran(i for i, layer in enumerate(self.layers) if layer.runner == runner)

    def ended(self, runner: int) -> None:
        """A runner's forward has ended, or failed: nothing that it said holds for what is called next."""
        self._thread.batch.pop(runner, None)
        self._thread.first.pop(runner, None)
        self._forget_read(runner)

    def _forget_read(self, runner: int) -> None:
        for index in [i for i in self._thread.read if self.layers[i].runner == runner]:
            del self._thread.read[index]

    def _check_ran(self, expected: Iterator[int]) -> None:
        if missed := [self.layers[i].name for i in expected if i not in self._thread.ran]:
            raise RuntimeError(
                f"masks are active, but the swapped layers {missed} did not run: nothing was deleted there"
            )

    def mask_rows(self, x: Tensor, index: int) -> Tensor | None:
        """The mask table's rows for what leaves the place that a layer changes.

        Args:
            x: [B, S, D], or another shape [..., D] where one row holds for all.
            index: of the layer.

        Returns:
            int32 [T], T = B S; None where nothing is deleted.

        Raises:
            RuntimeError: the rows are not known, or the layer cannot delete: each message says why.
            ValueError: another number of sequences than of entries in ``unlearn``.
        """
        layer = self.layers[index]
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a swapped layer cannot be captured in a CUDA graph: its replay would not look masks up")
        if layer.reads == layer.writes:
            self._observe(x, layer)
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
            return self.mask_rows(x, index)  # another thread closed the request just now: this time now() raises
        layer.table.read_on(x.device, hold.streams)
        self._thread.ran.add(index)
        # The tokens of a sequence are adjacent, and so are its copies under beam search: repeating rows fits both.
        rows = self._gated(request, x, index) if request.gated else request.rows_on(x.device)
        if len(rows) != tokens:
            rows = rows[:, None].expand(-1, tokens // len(rows)).reshape(-1)
        first = self._thread.first.get(layer.runner) if layer.skip_first else None
        # Where it is not certain which tokens are the first, none is left alone.
        if first is not None and first.shape == x.shape[:-1]:
            is_square = first.shape[0] == first.shape[1] > 1
            if layer.batch_first or not is_square:
                rows = torch.where(first.reshape(-1).to(rows.device), -1, rows)
        return rows

    def _gated(self, request: Request, kept: Tensor, index: int) -> Tensor:
        layer = self.layers[index]
        state, counted = self._thread.gates.get(layer.runner, (None, None))
        x = kept if layer.reads == layer.writes else self._thread.read.get(index)
        if state is None or x is None or x.shape[:-1] != counted.shape:
            raise RuntimeError(
                f"layer {layer.name!r}: gated=True needs a model whose input_ids or inputs_embeds are [batch, tokens], in "
                f"eager mode; judge the prompts before, with cu_fast.topics_of, and give unlearn() what it returns"
            )
        rows = gated_rows(state, self.topics, request, layer, index, x, counted)
        return torch.tensor(rows, dtype=torch.int32).to(x.device)

    def _observe(self, x: Tensor, layer: Layer) -> None:
        if observer := self.observer.get():
            observer(x, layer.bottleneck)

    def remember(self, x: Tensor, index: int) -> None:
        """Keep what a layer reads until :meth:`delete`, which changes another place."""
        self._observe(x, self.layers[index])
        if self.deletes():
            self._thread.read[index] = x.detach().clone()  # models write to hidden states in place

    def delete(self, kept: Tensor, index: int) -> Tensor:
        """What leaves the place that a layer with splice "delta" changes.

        Args:
            kept: [..., d_out], what would leave it.
            index: of the layer.

        Returns:
            ``kept`` itself where nothing is deleted.

        Raises:
            RuntimeError, ValueError: as :meth:`mask_rows`; the place that is read was not passed in this forward.
        """
        layer = self.layers[index]
        rows, elsewhere = self.mask_rows(kept, index), layer.reads != layer.writes
        x = self._thread.read.pop(index, None) if elsewhere else kept
        if rows is None:
            return kept
        if x is None or x.shape[:-1] != kept.shape[:-1]:
            got = "nothing was read" if x is None else f"{list(x.shape)} was read for {list(kept.shape)}"
            raise RuntimeError(f"layer {layer.name!r}: {got}; the place that is read should run before the other one")
        tables = ops.LatentMasks(*layer.table.tensors)
        return layer.bottleneck(x, tables, rows, **({"residual": kept} if elsewhere else {}))

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
        present = self.topics.nothing if request is None else request.signature
        filled = self.topics.unstamped if stamp is None else int(stamp)
        if filled != present and int(length) > 0:
            raise StaleCacheError(
                f"this {what} was computed under {text_of(filled)}, and now {text_of(present)} holds; start with a "
                f"new one, or continue inside the context that it comes from"
            )
        return torch.tensor(present)


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
