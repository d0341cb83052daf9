"""A learned gate: for which prompts a mask is used, by how often the prompt's tokens keep some codes.

    value = bias + sum over j of weights_j * sqrt(the share of tokens that keep code codes_j)

The mask is used where the value is above the level. The root is there because one token in fifty that keeps a code tells
more than the difference between ten and twelve do.

A long prompt dilutes a share. A gate with a window looks at that many tokens at a time, each window half a window further
on, and its value is the largest of theirs; the last one ends with the prompt, and a prompt of no more than a window is one.
So any run of half a window and one token lies in a window as a whole.

Everything here is plain tensors, on any device and in any order of tokens: a prompt that is counted whole, or token by
token while a model generates, has the same value to the last bit.
The counts are integers; a share is rounded to fp32, and so is its root, once. A weight times a root (24 bits each) is exact
in fp64, so that it does not matter whether a device multiplies and adds in one instruction, and the products are added
in one order, a tree of halves.

B prompts, T tokens, n codes of the gate, K blocks: halves of windows, counted apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cu_fast.kernels.reference import root
from cu_fast.masks.rows import LatentRows, row_shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """Decides per prompt whether a mask is used for it. Fitted by :func:`cu_fast.unlearn.fit_gate`.

    Attributes:
        codes: int32 [n], ascending, n >= 1; codes of the mask's codebook, deleted ones or others. Not copied.
        weights: fp32 [n], of the square root of the share of tokens that keep each code.
        bias: added.
        level: the mask is used where the value is above it.
        rows: of a sparse autoencoder's latents those of the codes, in their order, so that the gate decides without the
            autoencoder; None = not at hand. No part of what is decided.
        window: tokens that are looked at together, even and at least 2; None = the whole prompt.

    Raises:
        ValueError: a wrong shape or dtype, codes that do not ascend from 0 on, a number that is not finite, or a window
            that is odd or below 2.
    """

    codes: Tensor
    weights: Tensor
    bias: float
    level: float
    rows: LatentRows | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        n = self.codes.numel()
        for name, dtype in (("codes", torch.int32), ("weights", torch.float32)):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != (n,) or n == 0:
                raise ValueError(
                    f"{name} of the gate is {tensor.dtype} {list(tensor.shape)}; it should be {dtype} [{max(n, 1)}]"
                )
        if int(self.codes[0]) < 0 or not bool((self.codes[1:] > self.codes[:-1]).all()):
            raise ValueError("codes of the gate should be at least 0, and each above the one before")
        object.__setattr__(self, "bias", float(self.bias))
        object.__setattr__(self, "level", float(self.level))
        check_window(self.window)
        if self.rows is not None and len(self.rows.enc) != n:
            raise ValueError(f"rows of the gate are {len(self.rows.enc)}; there should be {n}, one per code")
        if not (bool(self.weights.isfinite().all()) and math.isfinite(self.bias) and math.isfinite(self.level)):
            raise ValueError(f"weights, bias {self.bias} and level {self.level} of the gate should be finite")

    def num_blocks(self, tokens: int) -> int:
        """Of how many blocks a prompt of so many tokens is; 1 without a window."""
        return max(1, math.ceil(tokens / (self.window // 2))) if self.window else 1

    def count(
        self, ids: Tensor, sequence: Tensor, position: Tensor, num_sequences: int, num_blocks: int, first: int = 0
    ) -> Tensor:
        """How many tokens of each block of each sequence keep each of the gate's codes, and how many there are.

        Counts of parts of a sequence add up to those of the whole. Nothing here waits for a GPU.

        Args:
            ids: int32 [T, n'], the codes that each token keeps, none of them twice, -1 = an empty place; on the device
                of the gate, as :meth:`cu_fast.nn.Splice.active` gives them.
            sequence: int64 [T], to which of the B sequences each token belongs; -1 = none, as padding and the first
                positions, which masks leave alone.
            position: int64 [T], how many tokens that count are before each in its sequence.
            num_sequences: B.
            num_blocks: K, which are counted.
            first: the number of the first of them.

        Returns:
            int64 [B, K, n + 1], tokens last.
        """
        n = len(self.codes)
        block, blocks = self._block_of(sequence, position, num_sequences, num_blocks, first)
        place = torch.searchsorted(self.codes, ids.contiguous()).clamp(max=n - 1)
        index = torch.where(self.codes[place] == ids, block[:, None] * (n + 1) + place, blocks * (n + 1)).flatten()
        index = torch.cat([index, block * (n + 1) + n])
        counts = torch.zeros((blocks + 1) * (n + 1), dtype=torch.int64, device=ids.device)
        counts.scatter_add_(0, index, torch.ones_like(index))
        return counts.reshape(blocks + 1, n + 1)[:-1].reshape(num_sequences, num_blocks, n + 1)

    def count_kept(
        self, kept: Tensor, sequence: Tensor, position: Tensor, num_sequences: int, num_blocks: int, first: int = 0
    ) -> Tensor:
        """The same of kept: bool [T, n], which of the gate's codes tokens keep, as :meth:`cu_fast.nn.Splice.keeps` says."""
        block, blocks = self._block_of(sequence, position, num_sequences, num_blocks, first)
        found = torch.cat([kept, kept.new_ones(len(kept), 1)], 1).long()
        counts = found.new_zeros(blocks + 1, found.shape[1]).index_add_(0, block, found)
        return counts[:-1].reshape(num_sequences, num_blocks, -1)

    def _block_of(
        self, sequence: Tensor, position: Tensor, num_sequences: int, num_blocks: int, first: int
    ) -> tuple[Tensor, int]:
        """The block that each token is counted in, int64 [T], numbered through all sequences, and how many there are: the
        number of a token of none."""
        blocks = num_sequences * num_blocks
        own = position // (self.window // 2) - first if self.window else 0
        return torch.where(sequence >= 0, sequence * num_blocks + own, blocks), blocks

    def value(self, counts: Tensor) -> Tensor:
        """The gate's value of each sequence; the mask is used where it is above :attr:`level`.

        Args:
            counts: int64 [B, K, n + 1], as :meth:`count` gave them; on the device of the gate.

        Returns:
            fp64 [B]; inf for a sequence without tokens, which cannot be judged.
        """
        there = torch.ones(counts.shape[:2], dtype=torch.bool, device=counts.device)
        if counts.shape[1] > 1:
            there = counts[:, 1:, -1] > 0
            there[:, 0] = True  # a sequence of one block is a window
            counts = counts[:, :-1] + counts[:, 1:]
        tokens = counts[..., -1]
        shares = counts[..., :-1].double() / tokens.clamp(min=1).double()[..., None]
        terms = self.weights.double() * root(shares.float()).double()
        while (n := terms.shape[-1]) > 1:
            half = (n + 1) // 2
            sums = terms[..., :half].clone()
            sums[..., : n - half] += terms[..., half:]
            terms = sums
        values = torch.where(tokens > 0, self.bias + terms[..., 0], torch.inf)
        return values.where(there, -torch.inf).amax(1)

    def with_rows(self, rows: LatentRows | None) -> Gate:
        """The same gate with the rows of its latents, as ``SAE.rows_of(gate.codes)`` gives them; None = without."""
        return dataclasses.replace(self, rows=rows)

    def to(self, device: torch.device | str) -> Gate:
        """The same gate with codes and weights on a device; itself where they are there."""
        if self.codes.device == torch.device(device):
            return self
        return dataclasses.replace(self, codes=self.codes.to(device), weights=self.weights.to(device))

    def digest(self) -> str:
        """sha256 of all that decides."""
        content = hashlib.sha256(struct.pack("<qdd", len(self.codes), self.bias, self.level))
        content.update(self.codes.cpu().numpy().astype("<i4").tobytes())
        content.update(self.weights.cpu().numpy().astype("<f4").tobytes())
        if self.window:
            content.update(struct.pack("<q", self.window))
        return content.hexdigest()

    def after_erasing(self, kept: Tensor) -> Gate | None:
        """The same gate on the codes that remain.

        Args:
            kept: int64 [C - n], the old ids of the codes that remain, in their new order.

        Returns:
            The gate; None where one of its own codes was erased: its value would be another.
        """
        of = {old: new for new, old in enumerate(kept.tolist())}
        codes = [of.get(code, -1) for code in self.codes.tolist()]
        if -1 in codes:
            return None
        order = torch.tensor(codes).argsort()
        codes = torch.tensor(codes, dtype=torch.int32)[order]
        return dataclasses.replace(self, codes=codes, weights=self.weights[order], rows=None)

    def tensors(self, *, rows: bool) -> dict[str, Tensor]:
        """Codes and weights by name, for a file, and with ``rows`` those too."""
        own = {"gate_codes": self.codes.cpu(), "gate_weights": self.weights.cpu()}
        return own | (self.rows.tensors("gate_") if rows and self.rows else {})

    def record(self, *, rows: bool) -> dict[str, Any]:
        """What a mask's record says of it."""
        own = {"num_codes": len(self.codes), "bias": self.bias, "level": self.level, "sha256": self.digest()}
        own |= {"window": self.window} if self.window else {}
        return own | ({"rows": self.rows.record()} if rows and self.rows else {})

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any], file: Path) -> Gate:
        """The gate of a file.

        Args:
            tensors: of the file, of the shapes that :func:`gate_shapes` gave.
            record: what the mask's record says of it.
            file: for messages.

        Raises:
            ValueError: the tensors make no gate, or not that of the record.
        """
        try:
            gate = cls(
                tensors["gate_codes"],
                tensors["gate_weights"],
                record["bias"],
                record["level"],
                window=record.get("window"),
            )
        except ValueError as error:
            raise ValueError(f"{file}: {error}; fit the gate again") from error
        if gate.digest() != record["sha256"]:
            raise ValueError(f"{file} does not hold the gate of mask.json; fit it again")
        return gate.with_rows(LatentRows.read(tensors, record["rows"], file, "gate_")) if "rows" in record else gate


def check_window(window: int | None) -> None:
    """Raises ValueError for what is no window of a gate."""
    if window is not None and (type(window) is not int or window < 2 or window % 2):
        raise ValueError(f"window is {window!r}; it should be an even number of tokens, at least 2, or None")


def gate_shapes(record: Mapping[str, Any], file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a mask's gate by its record. Raises ValueError where that describes none."""
    gate = record["gate"]
    kinds = {"num_codes": (int,), "bias": (float,), "level": (float,), "sha256": (str,)}
    if (
        not isinstance(gate, dict)
        or set(gate) - {"rows", "window"} != set(kinds)
        or any(type(gate[name]) not in kind for name, kind in kinds.items())
        or type(gate.get("window", 0)) is not int
        or gate["num_codes"] < 1
    ):
        raise ValueError(f"{file} has gate {gate!r}, which describes none; fit the gate again")
    n = gate["num_codes"]
    return {"gate_codes": (n,), "gate_weights": (n,)} | (
        row_shapes(gate["rows"], n, file, "gate_") if "rows" in gate else {}
    )
