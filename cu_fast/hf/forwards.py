"""What a forward does under the request that holds: which rows of the mask tables its layers read. Part of ``cu_fast.hf.attachment``."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.hf.gating import GateState, gated_rows
from cu_fast.hf.request import CapturedRequest, Hold, Request
from cu_fast.hf.topics import Layer, Topics
from cu_fast.masks.tables import capturing
from cu_fast.nn import Splice

# Devices that have graphs. There a compiled forward carries its rows; elsewhere a layer that looks them up does
# nothing where nothing is deleted.
GRAPHS_ON = {"cuda"}
UNKNOWN = -1  # a forward's number of sequences, where its arguments do not tell


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
        handed: runner -> numbers of the layers that its compiled forward hands its rows to.
        fired: number of a layer -> keeps the rows of the gates that had fired in its last forward.
    """

    def __init__(self) -> None:
        self.ran: set[int] = set()
        self.batch: dict[int, int] = {}
        self.hold: Hold | None = None
        self.unconfirmed = False
        self.first: dict[int, Tensor] = {}
        self.gates: dict[int, tuple[GateState, Tensor]] = {}
        self.read: dict[int, Tensor] = {}
        self.handed: dict[int, Set[int]] = {}
        self.fired: dict[int, Hold] = {}


class Forwards(ABC):
    """The forwards of one attachment: the base of ``Active``, which knows what holds."""

    layers: Sequence[Layer]
    topics: Topics
    observer: ContextVar[Callable[[Tensor, Splice], None] | None]
    expand: ContextVar[int]

    def __init__(self) -> None:
        self._thread = _Thread()
        self.carried: dict[int, Any] = {}  # runner -> compiled.Carried, while its forward is traced

    @abstractmethod
    def now(self) -> Request | None:
        """The request that holds in this context."""

    @abstractmethod
    def deletes(self) -> bool:
        """Whether it deletes something."""

    def step(self) -> None:
        """A step of ``generate`` starts; the one before has ended. Raises as :meth:`confirm`."""
        if self.expand.get():
            self.confirm()
            self.forget_ran()
            self._thread.unconfirmed = True

    def confirm(self) -> None:
        """Raises RuntimeError where the last step's forward skipped a swapped layer.

        The hooks around a model see that too, but code that was compiled or captured without hooks runs none.
        """
        request = self.now()
        if self._thread.unconfirmed and request is not None and request.deletes:
            self._thread.unconfirmed = False
            self._check_ran(i for i, layer in enumerate(self.layers) if layer.in_decoder)

    def forget_ran(self) -> None:
        """As if no layer had run in this thread."""
        self._thread.ran.clear()

    def ran(self) -> list[int]:
        """Numbers of the swapped layers that ran in this thread since, in ascending order."""
        return sorted(self._thread.ran)

    def enter(self, runner: int, batch: int, first: Tensor | None = None) -> None:
        """A runner's forward starts.

        Args:
            runner: its number.
            batch: how many sequences it was given, or UNKNOWN.
            first: bool [B, S], the tokens that masks leave alone where a layer skips the first; None = there are none.

        Raises:
            RuntimeError: as :meth:`now`.
        """
        request, thread = self.now(), self._thread
        thread.batch[runner] = batch
        thread.first.pop(runner, None)
        thread.gates.pop(runner, None)
        thread.handed.pop(runner, None)
        if first is not None:
            thread.first[runner] = first
        self._forget_read(runner)
        if request is not None and request.deletes:
            thread.ran -= {i for i, layer in enumerate(self.layers) if layer.runner == runner}

    def inside(self, runner: int) -> bool:
        """Whether a runner's forward runs in this thread, its hooks included."""
        return runner in self._thread.batch

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
        self._thread.ran |= self._thread.handed.pop(runner, frozenset())
        self.ended(runner)
        if request is not None and request.deletes:
            self._check_ran(i for i, layer in enumerate(self.layers) if layer.runner == runner)

    def ended(self, runner: int) -> None:
        """A runner's forward has ended, or failed: nothing that it said holds for what is called next."""
        self._thread.batch.pop(runner, None)
        self._thread.first.pop(runner, None)
        self._forget_read(runner)

    def _forget_read(self, runner: int) -> None:
        if read := self._thread.read:
            for index in [i for i in read if self.layers[i].runner == runner]:
                del read[index]

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
        layer, thread, device, shape = self.layers[index], self._thread, x.device, x.shape
        self._check_capture(device)
        if layer.reads == layer.writes:
            self._observe(x, layer)
        request = self.now()
        batch = thread.batch.get(layer.runner)
        if not layer.batch_first and len(shape) == 3:
            layer.batch_first = shape[0] == batch != shape[1]
        if request is None:
            return None
        tokens = x.numel() // shape[-1]
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
        check_can_delete(layer, request)
        hold = thread.hold = request.hold
        if hold is None:
            return self.mask_rows(x, index)  # another thread closed the request just now: this time now() raises
        if not capturing(device):  # a replay does it before
            layer.table.read_on(device, hold.streams)
        thread.ran.add(index)
        # The tokens of a sequence are adjacent, and so are its copies under beam search: repeating rows fits both.
        rows = self._gated(request, x, index) if request.gated else request.rows_on(device)
        if (n := rows.shape[0]) != tokens:
            rows = rows[:, None].expand(-1, tokens // n).reshape(-1)
        first = thread.first.get(layer.runner) if layer.skip_first else None
        # Where it is not certain which tokens are the first, none is left alone.
        if first is not None and first.shape == shape[:-1]:
            is_square = first.shape[0] == first.shape[1] > 1
            if layer.batch_first or not is_square:
                rows = torch.where(first.reshape(-1).to(rows.device), -1, rows)
        return rows

    def rows_of(self, runner: int, batch: int, device: torch.device, handed: Set[int]) -> Tensor | None:
        """The mask tables' rows for a compiled forward that hands them to its layers, which look nothing up.

        All that :meth:`mask_rows` checks at each layer is checked here. After :meth:`enter`.

        Args:
            runner: its number.
            batch: how many sequences it was given.
            device: of its layers.
            handed: numbers of the layers that it hands them to.

        Returns:
            int32 [batch]; None where nothing is deleted.

        Raises:
            RuntimeError, ValueError: as :meth:`mask_rows`; a function observes, which a compiled forward does not call.
        """
        self._check_capture(device)
        request = self.now()
        if self.observer.get() is not None:
            raise RuntimeError(
                "observe() was called, and a compiled model on a GPU calls nothing; run it in eager mode"
            )
        if isinstance(request, CapturedRequest):
            raise RuntimeError("capture() was given a compiled model; give it the model in eager mode")
        layers = [layer for layer in self.layers if layer.runner == runner]
        self._thread.handed[runner] = handed
        if request is None:
            return None
        if request.of == "sequence":
            self._check_entries(batch, len(request.rows), layers[0])
        if not request.deletes:
            return None
        if request.gated or request.of == "token":
            what = "gated=True" if request.gated else "a packed batch"
            raise RuntimeError(f"{what} needs the model in eager mode; this forward is compiled")
        hold = self._thread.hold = request.hold
        if hold is None:
            return self.rows_of(
                runner, batch, device, handed
            )  # another thread closed it just now: this time now() raises
        for layer in layers:
            check_can_delete(layer, request)
            layer.table.read_on(device, hold.streams)
        rows = request.rows_on(device)
        return rows[:, None].expand(-1, batch // len(rows)).reshape(-1)

    def carries_on(self, runner: int) -> torch.device | None:
        """The device of a runner's layers, if a compiled forward of it carries its rows; else None."""
        device = next((v.table.tensors[0].device for v in self.layers if v.runner == runner), None)
        return device if device is not None and device.type in GRAPHS_ON else None

    def _check_capture(self, device: torch.device) -> None:
        if capturing(device) and not isinstance(self.now(), CapturedRequest):
            raise RuntimeError(
                "a swapped layer cannot be captured in a CUDA graph like this: its replay would not look masks up; capture "
                "the forward with attachment.capture(), whose replays do"
            )

    def _gated(self, request: Request, kept: Tensor, index: int) -> Tensor:
        layer = self.layers[index]
        state, counted = self._thread.gates.get(layer.runner, (None, None))
        x = kept if layer.reads == layer.writes else self._thread.read.get(index)
        if state is None or x is None or x.shape[:-1] != counted.shape:
            raise RuntimeError(
                f"layer {layer.name!r}: gated=True needs a model whose input_ids or inputs_embeds are [batch, tokens], in "
                f"eager mode; judge the prompts before, with cu_fast.topics_of, and give unlearn() what it returns"
            )
        hold, held = self.topics.hold()
        rows = gated_rows(state, self.topics, request, layer, index, x, counted, self._copies(layer), held)
        hold.streams |= request.hold.streams
        self._thread.fired[index] = hold  # the rows of the forward before are given back
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

    def _copies(self, layer: Layer) -> int:
        """How many rows of the batch ``generate`` made of one sequence, beams or answers, at a layer."""
        return 1 if layer.in_encoder else max(1, self.expand.get())

    def _check_entries(self, batch: int, entries: int, layer: Layer) -> None:
        expected = entries * self._copies(layer)
        if batch != expected:
            raise ValueError(
                f"the batch holds {batch} sequences and unlearn() was given {entries} entries; the batch should be "
                f"{expected}"
            )

    def _check_batch(self, x: Tensor, batch: int | None, entries: int, layer: Layer) -> None:
        if batch is None or batch == UNKNOWN:
            raise RuntimeError(
                f"layer {layer.name!r} ran where the number of sequences is not known, outside its model or on images; "
                f"give unlearn() one entry for all"
            )
        self._check_entries(batch, entries, layer)
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


def check_can_delete(layer: Layer, request: Request) -> None:
    """Raises RuntimeError where a layer's codes are not those of the masks, or it is in training mode."""
    if layer.name in request.codebooks and layer.bottleneck.codebook_sha256() != request.codebooks[layer.name]:
        raise RuntimeError(f"the codebook of layer {layer.name!r} changed inside the unlearn context")
    if layer.bottleneck.training:
        raise RuntimeError("a mask is active but the bottleneck is in training mode; call model.eval() first")
