"""What every splice has: the module that sits at a layer of a model, and through which masks delete.

replace    y is made of the kept codes alone: what the model says passes a bottleneck (CodeUnlearn)
delta      y is x, but for what deleted codes wrote: without a mask the model is as it was, bit for bit
"""

from __future__ import annotations

import collections
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cu_fast import ops
from cu_fast.masks import ChangeTable, LatentRows, Mask, MaskTable
from cu_fast.masks.tables import RowTable, capturing

SpliceKind = Literal["replace", "delta"]
SPLICES = get_args(SpliceKind)
PENDING = 64  # calls whose counts are kept before they are added up


class Splice(nn.Module, ABC):
    """A module that reads x [..., d_in] at one place of a model and changes what leaves the same place or another.

    T tokens, C codes (of a sparse autoencoder: latents), U masks in a table.

    Attributes:
        splice: "replace" or "delta".
        strength: how many times a mask that does not say takes out what a code wrote; 1 where splice is "replace".
        mask_mode: "ablate" or "reselect".
        impl: passed to every operator; may be changed at any time.
        num_codes: C.
        k: codes kept per token; None = all that pass a threshold.
        d_in: width of what is read.
        d_out: width of what is changed.
        passed: int64 [2], the receipt: tokens, and kept codes that masks took away.
        changed: int64 [], of splice "delta": tokens that masks changed.
        dose: fp32 [2], of splice "delta": ||y - x|| / ||x|| of those tokens, their sum and the largest.
    """

    splice: SpliceKind
    strength: float
    mask_mode: ops.MaskMode
    impl: ops.Impl
    num_codes: int
    k: int | None
    d_in: int
    d_out: int
    has_latents = False  # a code's weight is no size that a mask could set where it was not kept

    def __init__(self) -> None:
        super().__init__()
        # What deletions counted, added to the receipt many at a time: one by one it takes as long as the deletion.
        self._pending: collections.deque[tuple[Tensor, Tensor]] = collections.deque()
        # On the device, so that counting waits for no kernel.
        self.register_buffer("passed", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.register_buffer("changed", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("dose", torch.zeros(2, dtype=torch.float32), persistent=False)

    @abstractmethod
    def codebook_sha256(self) -> str:
        """The identity that masks are bound to."""

    @abstractmethod
    def active(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Which codes each token keeps, nothing deleted. In evaluation mode only.

        Args:
            x: [..., d_in]; the leading dimensions are flattened to T tokens.
            depth: how many of the best are asked for; None = those that it keeps.

        Returns:
            int32 [T, n]; -1 fills rows that have fewer.
        """

    def keeps(self, x: Tensor, codes: Tensor, rows: LatentRows | None = None) -> Tensor:
        """Which of some codes each token keeps, nothing deleted. In evaluation mode only.

        Args:
            x: [..., d_in]; the leading dimensions are flattened to T tokens.
            codes: int32 [n], ascending, without repeats.
            rows: of a sparse autoencoder's latents theirs, where it is not at hand itself; None = it is.

        Returns:
            bool [T, n].
        """
        ids, codes = self.active(x), codes.to(x.device)
        place = torch.searchsorted(codes, ids).clamp(max=len(codes) - 1)
        found = (codes[place] == ids).to(torch.int32)
        kept = torch.zeros(len(ids), len(codes), dtype=torch.int32, device=x.device)
        return kept.scatter_add_(1, place, found) > 0

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor | None:
        """What the kept codes decode to, for figures: x [T, d_in] -> [T, d_out]; None where it is not known."""

    @abstractmethod
    def receipt(self) -> dict[str, Any]:
        """What ran in evaluation since ``reset_receipt()``."""

    @abstractmethod
    def constants(self) -> tuple[Any, ...]:
        """What a forward reads that is replaced, and not written to, when it changes."""

    def reset_receipt(self) -> None:
        """Set the receipt to 0, in place."""
        self._pending.clear()
        self.passed.zero_()
        self.changed.zero_()
        self.dose.zero_()

    def doses(self) -> dict[str, Any]:
        """Of splice "delta" what the receipt says of the tokens that masks changed: changed, dose and max_dose."""
        if self.splice == "replace":
            return {}
        self._settle()
        changed, (total, largest) = int(self.changed), self.dose.tolist()
        return {"changed": changed, "dose": total / max(changed, 1), "max_dose": largest}

    def refresh(self) -> None:
        """Make sure that what is computed from parameters is of the parameters as they are."""

    def new_table(self, device: torch.device | str) -> RowTable:
        """An empty table of masks, on a device; its ``tensors`` are what a forward is given."""
        return MaskTable(self.num_codes, device) if self.splice == "replace" else ChangeTable(device)

    def check_mask(self, mask: Mask) -> None:
        """Raises ValueError for a mask that this splice cannot do as it says."""
        if self.splice == "replace" and mask.how:
            raise ValueError(
                f"mask {mask.topic!r} sets {', '.join(mask.how)}; a splice that replaces the hidden state takes a code "
                f"away whole: attach with splice='delta', or give a mask without them"
            )
        if mask.dense and not self.has_latents:
            raise ValueError(f"mask {mask.topic!r} is dense; only a sparse autoencoder's latents can be, not codes")

    def row_of(self, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        """A table's row that holds all of these masks.

        Of a code that several masks change, the lowest gain, clamp and idle hold, each by itself.
        """
        if self.splice == "replace":
            bits = torch.zeros((self.num_codes + 31) // 32, dtype=torch.int32)
            for mask in masks:
                bits |= mask.bits
            return (bits,)
        ids, change = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 3)]
        for mask in masks:
            gain = 1 - (self.strength if mask.strength is None else mask.strength)
            ids.append(mask.ids())
            change.append(torch.tensor([gain, mask.clamp, mask.clamp if mask.dense else 0.0]).repeat(len(ids[-1]), 1))
        union, place = torch.cat(ids).unique(return_inverse=True)
        lowest = torch.full((len(union), 3), torch.inf)
        lowest.scatter_reduce_(0, place[:, None].expand(-1, 3), torch.cat(change), "amin")
        return union.int(), lowest

    def after_fork(self) -> None:
        """In the new process: locks that another thread of the old process held are free."""

    def _apply(self, fn, recurse=True):
        dose = self.dose
        super()._apply(fn, recurse)
        if not (dose.is_meta or self.dose.is_meta):
            self.dose = dose.to(self.dose.device)  # a sum, not a weight: in fp16 it would end at 65,504
        return self

    def _count(self, hits: Tensor, dose: Tensor, mask_row: Tensor) -> None:
        """Add to the receipt what :func:`cu_fast.ops.delete_latents` counted.

        Args:
            hits: int [T].
            dose: fp32 [T].
            mask_row: int32 [T]; where no token has a mask, none is counted.
        """
        if torch.compiler.is_compiling() or capturing(hits.device):
            self._add(hits, dose, (mask_row >= 0).any())  # a replay runs what is captured, and nothing of Python
            return
        self._pending.append((hits, dose))
        if len(self._pending) >= PENDING:
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        """Bring the receipt up to date. Threads may count meanwhile."""
        some = []
        with contextlib.suppress(IndexError):
            while True:
                some.append(self._pending.popleft())
        if not some:
            return
        self._add(*(torch.cat([part.to(self.passed.device) for part in parts]) for parts in zip(*some)))

    def _add(self, hits: Tensor, dose: Tensor, counts: Tensor | bool = True) -> None:
        dose = torch.nan_to_num(dose, nan=0.0, posinf=torch.finfo(torch.float32).max)
        self.passed[0] += len(hits) * counts
        self.passed[1] += hits.sum()
        self.changed += (hits > 0).sum()
        self.dose[0] += dose.sum()
        self.dose[1] = torch.cat([dose, self.dose[1:]]).max()
