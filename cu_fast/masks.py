"""Masks: which codes are deleted, what for, and for which codebook; their algebra, files, and device table.

A mask is a bitset, int32 [ceil(C/32)]; bit j % 32 of word j // 32 is set where code j is deleted. It is bound to
the sha256 of its codebook and refused on another one. On disk it is a folder: ``mask.safetensors`` (the bits) and
``mask.json`` (the record, with a checksum of both, so that an edited file is refused). No text of the topic's
data is stored: a mask must not carry what it deletes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A set of deleted codes and its provenance.

    bits: int32 [ceil(num_codes/32)] on the CPU. num_codes: C. codebook_sha256: of the codebook it belongs to.
    topic: what it deletes. layer: the layer it was found at, or None. method: how it was found (thresholds,
    statistics, counts), JSON values only.
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
        """The mask that deletes the given codes. Raises ValueError for an id outside [0, num_codes)."""
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
        return int(_unpack(self.bits).sum())

    @property
    def digest(self) -> str:
        """sha256 of what the mask does: its codebook and its bits, not its name."""
        content = hashlib.sha256(self.codebook_sha256.encode())
        content.update(self.bits.numpy().astype("<i4").tobytes())
        return content.hexdigest()

    def __or__(self, other: Mask) -> Mask:
        """Union: what either deletes."""
        return self._combine("union", other, lambda a, b: a | b)

    def __and__(self, other: Mask) -> Mask:
        """Intersection: what both delete."""
        return self._combine("intersection", other, lambda a, b: a & b)

    def __sub__(self, other: Mask) -> Mask:
        """Difference: what this one deletes and the other does not."""
        return self._combine("difference", other, lambda a, b: a & ~b)

    def _combine(self, name: str, other: Mask, operation) -> Mask:
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
        """The same mask on the codebook that remains of its own: ``kept`` holds the old ids, int64 [C']."""
        deleted = _unpack(self.bits)[kept].nonzero()[:, 0]
        return Mask.from_ids(
            deleted, num_codes=len(kept), codebook_sha256=codebook_sha256, topic=self.topic, layer=self.layer,
            method=self.method,
        )  # fmt: skip

    def check_codebook(self, codebook_sha256: str) -> None:
        """Raises ValueError where the mask was made for another codebook."""
        if codebook_sha256 != self.codebook_sha256:
            raise ValueError(
                f"mask {self.topic!r} was made for another codebook (sha256 {self.codebook_sha256[:12]}..., "
                f"this one is {codebook_sha256[:12]}...); find it again on this codebook"
            )

    def save(self, path: str | Path) -> None:
        """Write the folder ``path``, whole or not at all; a mask already there is replaced, anything else refused."""
        path = Path(path)
        if path.is_dir() and any(path.iterdir()) and not (path / "mask.json").is_file():
            raise FileExistsError(f"{path} is a folder that holds no mask; give the name of a new folder")
        write_directory(path, self.to_files())

    def to_files(self) -> dict[str, bytes]:
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
        record["record_sha256"] = _record_sha256(record)
        return {
            "mask.json": json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False).encode(),
            "mask.safetensors": safetensors.torch.save({"bits": self.bits}),
        }

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a folder written by :meth:`save`.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged, or was changed after it was saved.
        """
        path = Path(path)
        record = read_json(path / "mask.json")
        required = {
            "format_version",
            "topic",
            "layer",
            "num_codes",
            "num_deleted",
            "codebook_sha256",
            "digest",
            "method",
        }
        if not required <= set(record):
            raise ValueError(f"{path / 'mask.json'} lacks {sorted(required - set(record))}; it is not a mask's record")
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path / 'mask.json'} has format_version {record['format_version']}; this version of cu_fast "
                f"reads {FORMAT_VERSION}"
            )
        if record.pop("record_sha256", None) != _record_sha256(record):
            raise ValueError(f"{path / 'mask.json'} was changed after it was saved; find the mask again")
        if not isinstance(record["num_codes"], int) or record["num_codes"] < 1:
            raise ValueError(f"{path / 'mask.json'} has num_codes {record['num_codes']!r}; it should be an int >= 1")
        words = (record["num_codes"] + 31) // 32
        bits = read_safetensors(path / "mask.safetensors", {"bits": (words,)})["bits"]
        mask = cls(
            bits, record["num_codes"], record["codebook_sha256"], record["topic"], record["layer"], record["method"]
        )
        if mask.digest != record["digest"] or mask.num_deleted != record["num_deleted"]:
            raise ValueError(f"{path / 'mask.safetensors'} does not match mask.json; find the mask again")
        return mask


class MaskTable:
    """The masks in use on one device: ``table``, int32 [U, ceil(C/32)], written in place row by row.

    In place, because a compiled model or a captured graph holds on to the tensor. It grows, by doubling into a
    new tensor, only when a row beyond the last is written.
    """

    def __init__(self, num_codes: int, device: torch.device | str, rows: int = 8) -> None:
        self.table = torch.zeros(rows, (num_codes + 31) // 32, dtype=torch.int32, device=device)

    @torch.no_grad()
    def write(self, row: int, bits: Tensor) -> None:
        """Put a mask's bits, int32 [ceil(C/32)], into a row."""
        while row >= self.table.shape[0]:
            self.table = torch.cat([self.table, torch.zeros_like(self.table)])
        self.table[row].copy_(bits)


def _pack(deleted: Tensor) -> Tensor:
    """bool [32 n] -> int32 [n]."""
    bit = torch.arange(32, dtype=torch.int64)
    words = (deleted.reshape(-1, 32).long() << bit).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _unpack(bits: Tensor) -> Tensor:
    """int32 [n] -> bool [32 n]."""
    return ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# -- files: safetensors and JSON, whole or not at all ------------------------------------------------------------


def write_directory(path: str | Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files (names may hold sub-folders): into a folder beside it, which then takes its place."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give the name of a folder")
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, content in files.items():
            file = new / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        new.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / "was")
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError where the file holds anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it should hold an object")
    return value


def read_safetensors(path: str | Path, expected: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Exactly the expected tensors, name -> shape (None: any shape), on the CPU.

    Raises:
        FileNotFoundError, or ValueError naming the file and what is wrong: truncated or hostile content, a
        missing, unexpected or misshapen tensor.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; it should be a safetensors file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            missing, unexpected = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
            if missing or unexpected:
                raise ValueError(f"{path} lacks the tensors {missing} and holds the unexpected {unexpected}")
            for name, shape in expected.items():
                if shape is not None and shapes[name] != tuple(shape):
                    raise ValueError(
                        f"{path}: tensor {name!r} has shape {list(shapes[name])}; it should be {list(shape)}"
                    )
            return {name: file.get_tensor(name) for name in expected}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}); it may be truncated") from error
