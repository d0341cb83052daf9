"""A forward in a CUDA graph, replayed under whatever masks hold: ``attachment.capture()``. Part of ``cu_fast.hf.attachment``.

A replay runs no Python, so nothing of what the hooks do. Before it the host checks once what they check in every forward,
and fills the buffer that the captured layers read their rows of the mask tables from (:class:`CapturedRequest`). The last
thing that is captured makes the buffer POISON again: a replay that was not armed computes NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from cu_fast.hf.active import Active
from cu_fast.hf.forwards import check_can_delete
from cu_fast.hf.request import POISON, CapturedRequest, Request
from cu_fast.hf.states import STAMP, check_length, check_order, length_of, mark_length, mark_order
from cu_fast.masks import stream_of


class CapturedForward:
    """A call of the model, captured. Made by ``Attachment.capture``, which says how it is used.

    Attributes:
        output: what the call returned: tensors that every replay writes again.
    """

    def __init__(
        self,
        active: Active,
        check_usable: Callable[[], None],
        call: Callable[[], Any],
        batch: int,
        device: torch.device,
    ) -> None:
        self._active, self._check_usable, self._device = active, check_usable, device
        self._lock = threading.Lock()
        self._done: Any = None  # event of the last replay: until then its kernels may read the buffer
        self._request = request = CapturedRequest(batch, device)
        buffer, is_open = request.buffer, active.holding(request)
        with torch.no_grad(), is_open:

            def masked() -> Any:
                output = call()
                buffer.fill_(POISON)
                return output

            buffer.fill_(-1)
            active.forget_ran()
            self.output, self._replay = record(masked, device)
            buffer.fill_(POISON)
            ran = active.ran()
        if not ran:
            raise RuntimeError("the call ran no swapped layer; give capture() a call of the model")
        self._layers = [active.layers[i] for i in ran]
        self._reads = [_what_is_read(layer) for layer in self._layers]

    def replay(self) -> Any:
        """Run what was captured under the masks that hold in this context.

        The kernels are queued on the present stream, behind those of the replay before. Two threads may replay in turns;
        each finds the output of the last one.

        Returns:
            :attr:`output`.

        Raises:
            RuntimeError: as a forward, where nothing was said or a layer cannot delete; what the captured kernels read was
                replaced since: capture again.
            ValueError: another number of entries in ``unlearn`` than sequences were captured.
            StaleCacheError: a cache that the call continues was filled under other masks.
        """
        self._check_usable()
        request = self._active.now()
        hold = None if request is None else request.hold
        if request is not None and hold is None:
            return self.replay()  # another thread closed it just now: this time now() raises
        rows = self._rows(request)
        with self._lock:
            states = self._states(request)
            if (stream := stream_of(self._device)) is not None and self._done is not None:
                stream.wait_event(self._done)
            for layer in self._layers if hold is not None else ():
                layer.table.read_on(self._device, hold.streams)
            try:
                self._request.buffer.copy_(rows)
                self._replay()
            except BaseException:
                self._request.buffer.fill_(POISON)
                raise
            self._done = None if stream is None else stream.record_event()
            for value, stamp in states:
                setattr(value, STAMP, stamp)
                mark_order(self._active, value)
                if isinstance(value, Cache):
                    mark_length(value)
        return self.output

    def _rows(self, request: Request | None) -> torch.Tensor:
        """The rows for the buffer, int32 [1] or [batch], once it is certain that what was captured can delete them."""
        if self._active.observer.get() is not None:
            raise RuntimeError("observe() was called, and a replay calls nothing; run the model itself")
        if isinstance(request, CapturedRequest):
            raise RuntimeError("a captured forward cannot be part of another one; call the model there")
        for layer, read in zip(self._layers, self._reads):
            if any(now is not before for now, before in zip(_what_is_read(layer), read, strict=True)):
                raise RuntimeError(
                    f"layer {layer.name!r} reads other tensors than were captured: its table of masks has grown, or its "
                    f"weights, mask_mode or impl were changed; capture again"
                )
        if request is None:
            return torch.full((1,), -1, dtype=torch.int32, device=self._device)
        if request.gated or request.of == "token":
            what = "gated=True" if request.gated else "a packed batch"
            raise RuntimeError(f"{what} needs the model itself; a replay cannot do it")
        if request.of == "sequence" and len(request.rows) != len(self._request.rows):
            raise ValueError(
                f"unlearn() was given {len(request.rows)} entries, and {len(self._request.rows)} sequences were captured"
            )
        for layer in self._layers if request.deletes else ():
            check_can_delete(layer, request)
        return request.rows_on(self._device)

    def _states(self, request: Request | None) -> list[tuple[Any, Any]]:
        """What the call continues or makes, with the stamp that it has after the replay."""
        states = []
        for value, is_continued, what in self._request.states.values():
            length = 0
            if is_continued:
                is_cache = isinstance(value, Cache)
                length = length_of(value) if is_cache else 1
                if is_cache:
                    check_length(value)
                    check_order(value)
            states.append((value, self._active.check_filled(getattr(value, STAMP, None), length, what)))
        return states


def record(call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Run a call, so that whatever is made at its first use exists, then capture it: its output, and what replays it."""
    side, present = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(present)
    with torch.cuda.stream(side):
        call()
    present.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        output = call()
    return output, graph.replay


def _what_is_read(layer: Any) -> tuple[Any, ...]:
    """What a captured layer holds the addresses of, and what decided which kernels were captured."""
    splice = layer.bottleneck
    return *layer.table.tensors, *splice.constants(), splice.mask_mode, splice.impl
