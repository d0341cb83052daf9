"""Rows of a sparse autoencoder that a mask carries, so that it serves without the autoencoder. R rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cu_fast.masks.mask import Mask

ROWS = ("enc", "bias", "theta", "dec")
SETTINGS = ("kind", "k", "scale", "norm", "site", "site_out")


class Autoencoder(Protocol):
    """What a mask needs of a :class:`cu_fast.sae.SAE`."""

    @property
    def num_latents(self) -> int: ...

    def sha256(self) -> str: ...

    def rows_of(self, ids: Tensor) -> LatentRows: ...


@dataclasses.dataclass(frozen=True, eq=False)
class LatentRows:
    """Rows of a sparse autoencoder for some of its latents; R of them.

    Attributes:
        enc: fp32 [R, Din], on the CPU as the next three.
        bias: fp32 [R].
        theta: fp32 [R].
        dec: fp32 [R, Dout].
        values: what the autoencoder computes with besides: kind, k, scale, norm, site and site_out, JSON values.
    """

    enc: Tensor
    bias: Tensor
    theta: Tensor
    dec: Tensor
    values: Mapping[str, Any]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """enc, bias, theta and dec."""
        return self.enc, self.bias, self.theta, self.dec

    def settings(self) -> dict[str, Any]:
        """The values, a dict of their own."""
        return dict(self.values)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """enc, bias, theta and dec by name, for a file."""
        return {prefix + name: row for name, row in zip(ROWS, self.rows())}

    def record(self) -> dict[str, Any]:
        """What the record of their file says of them."""
        widths = {"d_in": self.enc.shape[1], "d_out": self.dec.shape[1]}
        return {**widths, **self.settings(), "sha256": _sha256_of(self.tensors())}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any], file: Path, prefix: str = "") -> LatentRows:
        """The rows of a file.

        Args:
            tensors: of the file, of the shapes that :func:`row_shapes` gave.
            record: what the mask's record says of them.
            file: for messages.
            prefix: of the tensors' names.

        Raises:
            ValueError: they are not those of the record.
        """
        rows = {name: tensors[prefix + name] for name in ROWS}
        if any(row.dtype != torch.float32 for row in rows.values()) or _sha256_of(rows) != record["sha256"]:
            raise ValueError(f"{file} does not hold the rows of mask.json; find the mask again")
        return cls(*rows.values(), {name: value for name, value in record.items() if name in SETTINGS})


def row_shapes(rows: Any, R: Any, file: Path, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of R rows by what the record of their file says. Raises ValueError where that describes none."""
    if not isinstance(rows, dict) or set(rows) != {"d_in", "d_out", "sha256", *SETTINGS}:
        raise ValueError(f"{file} has rows {rows!r}, which describe none; find the mask again")
    widths = [rows["d_in"], rows["d_out"], R]
    if not all(type(width) is int and width >= 1 for width in widths):
        raise ValueError(f"{file} has rows of widths {widths}; they should be positive; find the mask again")
    shapes = (R, rows["d_in"]), (R,), (R,), (R, rows["d_out"])
    return {prefix + name: shape for name, shape in zip(ROWS, shapes)}


def rows_among(made: Mask, *parts: Mask) -> LatentRows:
    """The rows of a mask's codes, all of which are codes of one of the parts."""
    at = {code: (part.rows, i) for part in parts for i, code in enumerate(part.ids().tolist())}
    found = [at[code] for code in made.ids().tolist()]
    stacked = (
        torch.stack([rows.rows()[n][i] for rows, i in found]) if found else parts[0].rows.rows()[n][:0]
        for n in range(len(ROWS))
    )
    return LatentRows(*stacked, parts[0].rows.settings())


def _sha256_of(rows: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ROWS:
        digest.update(rows[name].contiguous().numpy().data)
    return digest.hexdigest()
