"""The masks in use on one device, written row by row.

U masks in a table, C codes, at most M codes in a mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RowTable:
    """Tensors with a row per mask, written in place, because a compiled model keeps them.

    A table grows, by doubling into new tensors, only when a row beyond the last is written, or one wider than it is; the
    old tensors are kept, because kernels may still read them. A row must not be written while a kernel reads it: on a
    GPU a write waits for the events that it is given, and a read for the last write.

    Args:
        empty: per tensor an empty row.
        rows: U at the start.

    Attributes:
        tensors: one per empty row, [U, ...].
    """

    def __init__(self, empty: tuple[Tensor, ...], rows: int = 64) -> None:
        self._empty = empty
        self.tensors = tuple(row.repeat(rows, *[1] * row.dim()) for row in empty)
        self._outgrown: list[tuple[Tensor, ...]] = []
        self._written: tuple[Any, Any] | None = None  # the stream and the event of the last write
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In the new process: a lock that another thread of the old process held is free."""
        self._lock = threading.Lock()

    @torch.no_grad()
    def write(self, row: int, values: tuple[Tensor, ...], after: Iterable[Any] = ()) -> None:
        """Put a mask into a row.

        Args:
            row: its number; beyond the last row the table grows.
            values: per tensor its row, on any device; where it is shorter than the table's the rest is empty.
            after: CUDA events that the write waits for: kernels that read the row before.
        """
        with self._lock:
            stream = stream_of(self.tensors[0].device)
            for event in after:
                stream.wait_event(event)
            while row >= len(self.tensors[0]):
                self._replace(tuple(torch.cat([t, self._rows_like(t)]) for t in self.tensors))
            while len(values[0]) > self.tensors[0].shape[1]:
                self._empty = tuple(torch.cat([empty, empty]) for empty in self._empty)
                self._replace(tuple(torch.cat([t, self._rows_like(t)[:, t.shape[1] :]], 1) for t in self.tensors))
            for tensor, empty, value in zip(self.tensors, self._empty, values):
                tensor[row].copy_(torch.cat([value, empty[len(value) :].to(value.device)]))
            self._written = None if stream is None else (stream, stream.record_event())

    def _rows_like(self, tensor: Tensor) -> Tensor:
        """As many empty rows as a tensor of the table has."""
        empty = self._empty[next(i for i, own in enumerate(self.tensors) if own is tensor)].to(tensor.device)
        return empty.repeat(len(tensor), *[1] * empty.dim())

    def _replace(self, tensors: tuple[Tensor, ...]) -> None:
        self._outgrown.append(self.tensors)
        self.tensors = tensors

    def read_on(self, device: torch.device, streams: set[Any]) -> None:
        """Make the table ready for a kernel on a device's present stream.

        Args:
            device: of the kernel. A table that is elsewhere moves there.
            streams: the present stream is added to it, in place; nothing on a CPU.
        """
        if self.tensors[0].device != device:
            with self._lock, torch.inference_mode(False):  # what inference mode makes cannot be written to later
                self.tensors, self._written = tuple(tensor.to(device) for tensor in self.tensors), None
        stream = stream_of(device)
        if stream is not None:
            streams.add(stream)
            if self._written is not None and self._written[0] != stream:
                stream.wait_event(self._written[1])


class MaskTable(RowTable):
    """The bits of masks, for a splice that replaces the hidden state.

    Args:
        num_codes: C.
        device: where the table is.
        rows: U at the start.
    """

    def __init__(self, num_codes: int, device: torch.device | str, rows: int = 64) -> None:
        super().__init__((torch.zeros((num_codes + 31) // 32, dtype=torch.int32, device=device),), rows)

    @property
    def table(self) -> Tensor:
        """int32 [U, ceil(C/32)], a mask's bits per row."""
        return self.tensors[0]


class ChangeTable(RowTable):
    """What masks change, for a splice that keeps the hidden state: ``ops.LatentMasks``.

    The tensors are latents int32 [U, M], ascending and ended by -1, and change fp32 [U, M, 3].

    Args:
        device: where the table is.
        rows: U at the start.
    """

    def __init__(self, device: torch.device | str, rows: int = 64) -> None:
        M = 32  # at the start
        empty = torch.full((M,), -1, dtype=torch.int32, device=device), torch.zeros(M, 3, device=device)
        super().__init__(empty, rows)


def stream_of(device: torch.device) -> Any:
    """The CUDA stream that a device's kernels are queued on now; None on a CPU, where nothing is queued."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def capturing(device: torch.device) -> bool:
    """Whether what is called on a device now is captured in a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
