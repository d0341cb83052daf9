"""What one ``unlearn`` deletes, as rows of mask tables; and the number that states carry for it. Part of ``cu_fast.hf.attachment``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import torch
from torch import Tensor

from cu_fast.masks import Mask, stream_of

POISON = -(2**31)  # a row that no table has
UNKNOWN_FILLING = 0  # signature of a state without a stamp, once codes were erased
PACKED = -1  # signature of a packed batch, whose sequences have different ones
CAPTURED = -2  # signature of a forward that is captured: what it computes is nothing yet
# signature -> what messages call it: in KEPT for good, in _TEXT the newest TEXTS
KEPT: dict[int, str] = {
    UNKNOWN_FILLING: "what it does not say",
    PACKED: "the masks of a packed batch",
    CAPTURED: "the capture of a graph",
}
_TEXT: dict[int, str] = {}
TEXTS = 1024


class Hold:
    """Keeps rows of the mask tables from being written again while it is referenced, by a request or a forward.

    Attributes:
        streams: the CUDA streams on which a kernel may still read the rows.
    """

    def __init__(self) -> None:
        self.streams: set[Any] = set()


@dataclasses.dataclass(eq=False)
class Request:
    """What one ``unlearn`` context deletes.

    Attributes:
        rows: rows of every layer's mask table, -1 = nothing is deleted.
        of: "all" = one row for all sequences; "sequence" = one per sequence of the batch; "token" = one per token, as
            in a packed batch.
        signature: a number for what is deleted, by content and not by name.
        codebooks: layer -> sha256 of the codebook that its masks were made for.
        hold: keeps the rows; None = the context was left.
        keys: per row the layers and digests of the masks that it is the union of.
        names: per row the names of the masks that it is the union of.
        gated: masks with a learned gate delete only where it fires, as the sequence goes on (``gating``).
        masks: layer's name -> mask's name -> mask; of a gated request.
        always: names of masks that hold whatever their gates say.
        held: keys of the rows that its Hold keeps.
        outer: the request that held where the context was entered; None = there was none.
        beyond: it deletes more than what always holds.
        deletes: a row deletes something.
    """

    rows: tuple[int, ...]
    of: Literal["all", "sequence", "token"]
    signature: int
    codebooks: dict[str, str]
    hold: Hold | None
    keys: list[frozenset[str]] = dataclasses.field(default_factory=list)
    names: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    gated: bool = False
    masks: dict[str, dict[str, Mask]] = dataclasses.field(default_factory=dict)
    always: frozenset[str] = frozenset()
    held: list[frozenset[str]] = dataclasses.field(default_factory=list)
    outer: Request | None = None
    beyond: bool = False

    def __post_init__(self) -> None:
        self.deletes = any(row >= 0 for row in self.rows)
        self._rows_on: dict[Any, Tensor] = {}

    @property
    def closed(self) -> bool:
        """Whether the context was left."""
        return self.hold is None

    def close(self) -> None:
        """Give up the rows. Forwards that read them keep the Hold until they end."""
        self.hold = None

    def rows_on(self, device: torch.device) -> Tensor:
        """The rows as an int32 vector on a device, copied there once per stream."""
        key = device, stream_of(device)
        if key not in self._rows_on:
            rows = torch.tensor(self.rows, dtype=torch.int32)
            if device.type == "cuda":
                rows = rows.pin_memory()  # so that the host need not wait for the copy
            self._rows_on[key] = rows.to(device, non_blocking=True)
        return self._rows_on[key]


class CapturedRequest(Request):
    """What holds while a forward is captured: rows that a replay fills.

    They lie in a buffer, int32 [batch], which is POISON unless a replay has filled it: no mask table has that row, and a
    token with a row that does not exist becomes NaN.

    Args:
        batch: sequences of the forward.
        device: of the swapped layers.

    Attributes:
        buffer: int32 [batch].
        states: id of a cache or an output -> itself, whether the forward continues it, and what messages call it.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__((POISON,) * batch, "sequence", CAPTURED, {}, Hold())
        self.deletes = True
        with torch.inference_mode(False):
            self.buffer = torch.full((batch,), POISON, dtype=torch.int32, device=device)
        self.states: dict[int, tuple[Any, bool, str]] = {}

    def rows_on(self, device: torch.device) -> Tensor:
        """The buffer."""
        if device != self.buffer.device:
            raise RuntimeError(
                f"a swapped layer computes on {device} and another on {self.buffer.device}; a graph is captured on one"
            )
        return self.buffer


def signature_of(content: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:8], "big") >> 1 or 1


def remember(signature: int, text: str) -> None:
    _TEXT[signature] = text
    if len(_TEXT) > TEXTS:
        _TEXT.pop(next(iter(_TEXT)), None)


def text_of(signature: int) -> str:
    """What a message calls the request of a signature."""
    return KEPT.get(signature) or _TEXT.get(signature, "masks of another process, or of long ago")
