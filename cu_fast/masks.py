"""Masks: which codes are deleted, what for, and for which codebook; their algebra, files, and device table.

A mask is a bitset, int32 [ceil(C/32)]; bit j % 32 of word j // 32 is set where code j is deleted. It is bound to
the sha256 of its codebook and refused on another one. On disk it is a folder: ``mask.safetensors`` (the bits) and
``mask.json`` (the record, with a checksum of both, so that an edited file is refused). No text of the topic's
data is stored: a mask must not carry what it deletes.

C codes, U masks in a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cu_fast.files import read_json, read_safetensors, seal, unseal, visible, write_directory

FORMAT_VERSION = 1
FILES = r"mask\.(json|safetensors)"  # what a mask's folder holds
_TYPES = {
    "format_version": int,
    "topic": str,
    "layer": (str, type(None)),
    "num_codes": int,
    "num_deleted": int,
    "codebook_sha256": str,
    "digest": str,
    "method": dict,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A set of deleted codes and its provenance.

    Attributes:
        bits: int32 [ceil(C/32)] on the CPU. Not copied: do not write to it.
        num_codes: C.
        codebook_sha256: of the codebook that the mask belongs to.
        topic: what the mask deletes.
        layer: name of the layer that it was found at; None = not known.
        method: how it was found (thresholds, statistics, counts), JSON values only.

    Raises:
        ValueError: bits has another shape or dtype, or sets a bit beyond the last code.
    """

    bits: Tensor
    num_codes: int
    codebook_sha256: str
    topic: str
    layer: str | None = None
    method: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        words = (self.num_codes + 31) // 32
        if self.bits.dtype != torch.int32 or tuple(self.bits.shape) != (words,):
            raise ValueError(f"bits is {self.bits.dtype} {list(self.bits.shape)}; it should be int32 [{words}]")
        if bool((_unpack(self.bits)[self.num_codes :]).any()):
            raise ValueError(f"bits sets a bit beyond the last of {self.num_codes} codes")

    @classmethod
    def from_ids(
        cls,
        ids: Iterable[int] | Tensor,
        *,
        num_codes: int,
        codebook_sha256: str,
        topic: str,
        layer: str | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> Mask:
        """The mask that deletes the given codes.

        Args:
            ids: the codes, int of any shape on any device, in any order; repeated ids count once.
            num_codes: C.
            codebook_sha256: of the codebook that the mask belongs to.
            topic: what the mask deletes.
            layer: name of the layer that it was found at; None = not known.
            method: how it was found, JSON values only; None = {}.

        Raises:
            ValueError: an id outside [0, num_codes).
        """
        ids = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), dtype=torch.int64).flatten().cpu()
        if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < num_codes):
            raise ValueError(
                f"ids reach from {int(ids.min())} to {int(ids.max())}; they should lie in [0, {num_codes})"
            )
        deleted = torch.zeros((num_codes + 31) // 32 * 32, dtype=torch.bool)
        deleted[ids] = True
        return cls(_pack(deleted), num_codes, codebook_sha256, topic, layer, dict(method or {}))

    def ids(self) -> Tensor:
        """The deleted codes, int64 [num_deleted], ascending."""
        return _unpack(self.bits).nonzero()[:, 0]

    @property
    def num_deleted(self) -> int:
        """How many codes it deletes."""
        return int(_unpack(self.bits).sum())

    @property
    def digest(self) -> str:
        """sha256 of what the mask does: its codebook and its bits, not its name."""
        content = hashlib.sha256(self.codebook_sha256.encode())
        content.update(self.bits.numpy().astype("<i4").tobytes())
        return content.hexdigest()

    def __or__(self, other: Mask) -> Mask:
        """Union: what either deletes. Raises ValueError for masks of different codebooks, as ``&`` and ``-`` do."""
        return self._combine("union", other, lambda a, b: a | b)

    def __and__(self, other: Mask) -> Mask:
        """Intersection: what both delete."""
        return self._combine("intersection", other, lambda a, b: a & b)

    def __sub__(self, other: Mask) -> Mask:
        """Difference: what this one deletes and the other does not."""
        return self._combine("difference", other, lambda a, b: a & ~b)

    def _combine(self, name: str, other: Mask, operation: Callable[[Tensor, Tensor], Tensor]) -> Mask:
        self.check_codebook(other.codebook_sha256)
        method = {
            "name": name,
            "parts": [{"topic": m.topic, "digest": m.digest, "method": dict(m.method)} for m in (self, other)],
        }
        topic = f"{name} of {self.topic} and {other.topic}"
        layer = self.layer if self.layer == other.layer else None
        bits = operation(self.bits, other.bits)
        return Mask(bits, self.num_codes, self.codebook_sha256, topic, layer, method)

    def after_erasing(self, kept: Tensor, codebook_sha256: str) -> Mask:
        """The same mask on the codebook that remains after codes of its own were erased.

        Args:
            kept: int64 [C - n], the old ids of the codes that remain, in their new order.
            codebook_sha256: of the codebook that remains.

        Returns:
            A mask of C - n codes. Where all of its own were erased it deletes nothing; ``method["erased"]`` is True.
        """
        deleted = _unpack(self.bits)[kept].nonzero()[:, 0]
        method = dict(self.method) if len(deleted) else {**self.method, "erased": True}
        return Mask.from_ids(
            deleted, num_codes=len(kept), codebook_sha256=codebook_sha256, topic=self.topic, layer=self.layer,
            method=method,
        )  # fmt: skip

    def check_codebook(self, codebook_sha256: str) -> None:
        """Raises ValueError where the mask was made for another codebook."""
        if codebook_sha256 != self.codebook_sha256:
            raise ValueError(
                f"mask {self.topic!r} was made for another codebook (sha256 {self.codebook_sha256[:12]}..., "
                f"this one is {codebook_sha256[:12]}...); find it again on this codebook"
            )

    def save(self, path: str | Path) -> None:
        """Write the folder ``path``, whole or not at all, in place of a mask that is there already.

        Raises:
            FileExistsError: ``path`` is a file, or a folder that holds anything but a mask.
            ValueError: a name that no folder can have, or a record that JSON cannot hold.
        """
        write_directory(path, self.to_files()[0], FILES)

    def to_files(self) -> tuple[dict[str, bytes], str]:
        """The files of the mask's folder, name -> content, and a checksum of all that they say.

        Raises:
            ValueError: a record that JSON cannot hold.
        """
        record = {
            "format_version": FORMAT_VERSION,
            "topic": self.topic,
            "layer": self.layer,
            "num_codes": self.num_codes,
            "num_deleted": self.num_deleted,
            "codebook_sha256": self.codebook_sha256,
            "digest": self.digest,
            "method": dict(self.method),
        }
        content, sha256 = seal(record, f"mask {self.topic!r}")
        return {"mask.json": content, "mask.safetensors": safetensors.torch.save({"bits": self.bits})}, sha256

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None) -> Mask:
        """Read a folder written by :meth:`save`.

        Args:
            path: the folder.
            sha256: the checksum that :meth:`to_files` gave; None = not known, any mask is taken.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, was changed after it was saved, or has another checksum than sha256.
        """
        file, bits_file = Path(path) / "mask.json", Path(path) / "mask.safetensors"
        record = read_json(file)
        if not set(_TYPES) <= set(record):
            raise ValueError(f"{file} lacks {sorted(set(_TYPES) - set(record))}; it is not a mask's record")
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format_version {record['format_version']}; this version of cu_fast reads {FORMAT_VERSION}"
            )
        found = unseal(record, file, "find the mask again")
        if sha256 not in (None, found):
            raise ValueError(f"{file} is the record of another mask than the one saved here; save the masks again")
        for name, kind in _TYPES.items():
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                raise ValueError(
                    f"{file} has {name} {record[name]!r}, a {type(record[name]).__name__}; find the mask again"
                )
        if record["num_codes"] < 1:
            raise ValueError(f"{file} has num_codes {record['num_codes']}; it should be an int >= 1")
        bits = read_safetensors(bits_file, {"bits": ((record["num_codes"] + 31) // 32,)})["bits"]
        try:
            mask = cls(
                bits, record["num_codes"], record["codebook_sha256"], record["topic"], record["layer"], record["method"]
            )
        except ValueError as error:
            raise ValueError(f"{bits_file}: {error}") from error
        if mask.digest != record["digest"] or mask.num_deleted != record["num_deleted"]:
            raise ValueError(f"{bits_file} does not match mask.json; find the mask again")
        return mask


def load_masks(path: str | Path) -> list[Mask]:
    """The mask of a folder, or the masks of its sub-folders, one per layer. Hidden entries are passed over.

    Raises:
        FileNotFoundError: a file of a mask is missing.
        ValueError: a mask is damaged, or anything else lies beside the masks: it may be a mask of which files are
            missing.
    """
    path = Path(path)
    entries = visible(path)
    parts = [entry for entry in entries if entry.is_dir()]
    if not parts:
        return [Mask.load(path)]
    if strays := [entry.name for entry in entries if not (entry / "mask.json").is_file()]:
        raise ValueError(f"{path} holds {', '.join(strays[:5])} beside masks; move what is no mask's folder away")
    return [Mask.load(part) for part in parts]


class MaskTable:
    """The masks in use on one device, written row by row.

    In place, because a compiled model keeps the tensor. It grows, by doubling into a new tensor, only when a row
    beyond the last is written; the old tensor is kept, because kernels may still read it. A row must not be written
    while a kernel reads it: on a GPU a write waits for the events that it is given, and a read for the last write.

    Args:
        num_codes: C.
        device: where the table is.
        rows: U at the start.

    Attributes:
        table: int32 [U, ceil(C/32)], a mask's bits per row.
    """

    def __init__(self, num_codes: int, device: torch.device | str, rows: int = 64) -> None:
        self.table = torch.zeros(rows, (num_codes + 31) // 32, dtype=torch.int32, device=device)
        self._outgrown: list[Tensor] = []
        self._written: tuple[Any, Any] | None = None  # the stream and the event of the last write
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In the new process: a lock that another thread of the old process held is free."""
        self._lock = threading.Lock()

    @torch.no_grad()
    def write(self, row: int, bits: Tensor, after: Iterable[Any] = ()) -> None:
        """Put a mask's bits into a row.

        Args:
            row: its number; beyond the last row the table grows.
            bits: int32 [ceil(C/32)], on any device.
            after: CUDA events that the write waits for: kernels that read the row before.
        """
        with self._lock:
            stream = stream_of(self.table.device)
            for event in after:
                stream.wait_event(event)
            while row >= self.table.shape[0]:
                self._outgrown.append(self.table)
                self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self.table[row].copy_(bits)
            self._written = None if stream is None else (stream, stream.record_event())

    def read_on(self, device: torch.device, streams: set[Any]) -> None:
        """Make the table ready for a kernel on a device's present stream.

        Args:
            device: of the kernel. A table that is elsewhere moves there.
            streams: the present stream is added to it, in place; nothing on a CPU.
        """
        if self.table.device != device:
            with self._lock:
                self.table, self._written = self.table.to(device), None
        stream = stream_of(device)
        if stream is not None:
            streams.add(stream)
            if self._written is not None and self._written[0] != stream:
                stream.wait_event(self._written[1])


def stream_of(device: torch.device) -> Any:
    """The CUDA stream that a device's kernels are queued on now; None on a CPU, where nothing is queued."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _pack(deleted: Tensor) -> Tensor:
    """bool [32 n] -> int32 [n]."""
    bit = torch.arange(32, dtype=torch.int64)
    words = (deleted.reshape(-1, 32).long() << bit).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _unpack(bits: Tensor) -> Tensor:
    """int32 [n] -> bool [32 n]."""
    return ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()
