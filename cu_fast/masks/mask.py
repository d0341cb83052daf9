"""A mask: which codes are deleted, how, what for, and of which codebook; its algebra and its files.

A mask is a bitset, int32 [ceil(C/32)]; bit j % 32 of word j // 32 is set where code j is deleted. It is bound to
the sha256 of its codebook, or of its sparse autoencoder, whose C latents are codes here, and refused on another one. On
disk it is a folder: ``mask.safetensors`` (the tensors) and ``mask.json`` (the record, with a checksum of both, so that an
edited file is refused). No text of the topic's data is stored: a mask must not carry what it deletes.

C codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cu_fast.files import read_json, read_safetensors, seal, unseal, visible, write_directory
from cu_fast.masks.gate import Gate, gate_shapes
from cu_fast.masks.rows import ROWS as ROWS
from cu_fast.masks.rows import SETTINGS as SETTINGS
from cu_fast.masks.rows import Autoencoder, LatentRows, row_shapes, rows_among

FORMAT_VERSIONS = (1, 2)  # 1: nothing but bits; what 2 adds would be lost on a reader of 1
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
HOW = ("strength", "clamp", "dense")
MOST = 1_000_000  # of strength and clamp: what they are multiplied with stays far inside fp32


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A set of deleted codes, what is done with them, and its provenance.

    How a code is deleted holds for a splice that keeps the hidden state ("delta"). One that replaces it takes a code away
    whole, and refuses a mask that says anything else.

    Attributes:
        bits: int32 [ceil(C/32)] on the CPU. Not copied: do not write to it.
        num_codes: C.
        codebook_sha256: of the codebook that the mask belongs to.
        topic: what the mask deletes.
        layer: name of the layer that it was found at; None = not known.
        method: how it was found (thresholds, statistics, counts), JSON values only.
        strength: how many times of what a code wrote is taken out, from 0 to 1,000,000; 1 = exactly that. None = what the
            splice takes out by itself: 2 for a codebook, 4 for a sparse autoencoder.
        clamp: added to what is left of a code's activation where it fires, in its own units. Strength 1 and a clamp below
            0 is the clamping of Farrell et al. (arXiv 2410.19278).
        dense: where one code of the mask fires, all others of it become ``clamp`` as well (DSG, arXiv 2504.08192).
        rows: of a sparse autoencoder's latents the rows that are deleted, in ascending order of the latents, so that the
            mask serves without the autoencoder; None = not at hand.
        gate: decides for which prompts it is used, in ``topics_of``; None = that is said there. Where masks for
            several layers have one name, each has a gate of its own, for the codes of its layer.

    Raises:
        ValueError: bits has another shape or dtype, or sets a bit beyond the last code; a number out of range; dense
            with clamp 0 or strength 0 with clamp 0, which change nothing; a gate with a code beyond the last.
    """

    bits: Tensor
    num_codes: int
    codebook_sha256: str
    topic: str
    layer: str | None = None
    method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strength: float | None = None
    clamp: float = 0.0
    dense: bool = False
    rows: LatentRows | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= MOST:
            raise ValueError(f"strength is {self.strength!r}; it should be a number from 0 to {MOST:,}, or None")
        if not abs(self.clamp) <= MOST or (self.dense and self.clamp == 0):
            raise ValueError(
                f"clamp is {self.clamp!r}; it should be a number from -{MOST:,} to {MOST:,}, and not 0 where the mask is dense"
            )
        if self.strength == self.clamp == 0:
            raise ValueError("strength is 0 and clamp is 0, which changes nothing; give a strength above 0, or no mask")
        words = (self.num_codes + 31) // 32
        if self.bits.dtype != torch.int32 or tuple(self.bits.shape) != (words,):
            raise ValueError(f"bits is {self.bits.dtype} {list(self.bits.shape)}; it should be int32 [{words}]")
        if bool((_unpack(self.bits)[self.num_codes :]).any()):
            raise ValueError(f"bits sets a bit beyond the last of {self.num_codes} codes")
        if self.rows is not None and len(self.rows.enc) != self.num_deleted:
            raise ValueError(
                f"rows has {len(self.rows.enc)} latents; it should have {self.num_deleted}, those that are deleted, or be None"
            )
        if self.gate is not None and (last := int(self.gate.codes[-1])) >= self.num_codes:
            raise ValueError(f"the gate has code {last}; the last of {self.num_codes} codes is {self.num_codes - 1}")

    @classmethod
    def from_ids(
        cls,
        ids: Iterable[int] | Tensor,
        *,
        topic: str,
        num_codes: int | None = None,
        codebook_sha256: str | None = None,
        sae: Autoencoder | None = None,
        layer: str | None = None,
        method: Mapping[str, Any] | None = None,
        strength: float | None = None,
        clamp: float = 0.0,
        dense: bool = False,
    ) -> Mask:
        """The mask that deletes the given codes.

        Args:
            ids: the codes, int of any shape on any device, in any order; repeated ids count once.
            topic: what the mask deletes.
            num_codes: C; None = the autoencoder's.
            codebook_sha256: of the codebook that the mask belongs to; None = the autoencoder's.
            sae: a :class:`cu_fast.sae.SAE` whose latents the ids are; None = a codebook's codes.
            layer: name of the layer that it was found at; None = not known.
            method: how it was found, JSON values only; None = {}.
            strength: as in :class:`Mask`, and so are the next two.
            clamp: as in :class:`Mask`.
            dense: as in :class:`Mask`.

        Raises:
            ValueError: an id outside [0, num_codes), or as :class:`Mask` raises.
            TypeError: neither an autoencoder nor num_codes and codebook_sha256.
        """
        if sae is not None:
            num_codes, codebook_sha256 = sae.num_latents, sae.sha256()
        elif num_codes is None or codebook_sha256 is None:
            raise TypeError("num_codes or codebook_sha256 is None; give both, or the sae whose latents the ids are")
        ids = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), dtype=torch.int64).flatten().cpu()
        if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < num_codes):
            raise ValueError(
                f"ids reach from {int(ids.min())} to {int(ids.max())}; they should lie in [0, {num_codes})"
            )
        deleted = torch.zeros((num_codes + 31) // 32 * 32, dtype=torch.bool)
        deleted[ids] = True
        rows = None if sae is None else sae.rows_of(deleted.nonzero()[:, 0])
        return cls(
            _pack(deleted), num_codes, codebook_sha256, topic, layer, dict(method or {}), strength, clamp, dense, rows
        )

    def with_strength(self, strength: float | None) -> Mask:
        """The same codes, taken out ``strength`` times; see :class:`Mask`, also for what it raises."""
        return dataclasses.replace(self, strength=strength)

    def with_clamp(self, clamp: float, *, dense: bool = False) -> Mask:
        """The same codes, set to ``clamp`` where they fire, or dense; see :class:`Mask`, also for what it raises."""
        return dataclasses.replace(self, strength=1.0, clamp=clamp, dense=dense)

    def with_gate(self, gate: Gate | None) -> Mask:
        """The same codes, for the prompts that the gate is for; None = no gate. Raises as :class:`Mask`."""
        return dataclasses.replace(self, gate=gate)

    def ids(self) -> Tensor:
        """The deleted codes, int64 [num_deleted], ascending."""
        return _unpack(self.bits).nonzero()[:, 0]

    @property
    def num_deleted(self) -> int:
        """How many codes it deletes."""
        return int(_unpack(self.bits).sum())

    @property
    def digest(self) -> str:
        """sha256 of what the mask does: its codebook, its bits, how they are deleted and its gate, not its name."""
        content = hashlib.sha256(self.codebook_sha256.encode())
        content.update(self.bits.numpy().astype("<i4").tobytes())
        if self.how:
            content.update(json.dumps(self.how).encode())
        if self.gate is not None:
            content.update(f"gate {self.gate.digest()}".encode())
        return content.hexdigest()

    @property
    def how(self) -> dict[str, Any]:
        """Of strength, clamp and dense those that are not what they are by default, by name."""
        fields = {field.name: field.default for field in dataclasses.fields(self) if field.name in HOW}
        return {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}

    def __or__(self, other: Mask) -> Mask:
        """Union: what either deletes, without a gate: that is for the codes that it was fitted with.

        Raises ValueError for masks of different codebooks, as ``&`` and ``-`` do.
        """
        return self._combine("union", other, lambda a, b: a | b)

    def __and__(self, other: Mask) -> Mask:
        """Intersection: what both delete."""
        return self._combine("intersection", other, lambda a, b: a & b)

    def __sub__(self, other: Mask) -> Mask:
        """Difference: what this one deletes and the other does not."""
        return self._combine("difference", other, lambda a, b: a & ~b)

    def _combine(self, name: str, other: Mask, operation: Callable[[Tensor, Tensor], Tensor]) -> Mask:
        self.check_codebook(other.codebook_sha256)
        if self.how != other.how:
            raise ValueError(
                f"mask {self.topic!r} deletes with {self.how or 'nothing set'}, {other.topic!r} with "
                f"{other.how or 'nothing set'}; give both their names in unlearn(), which keeps each as it is"
            )
        method = {
            "name": name,
            "parts": [{"topic": m.topic, "digest": m.digest, "method": dict(m.method)} for m in (self, other)],
        }
        topic = f"{name} of {self.topic} and {other.topic}"
        layer = self.layer if self.layer == other.layer else None
        bits = operation(self.bits, other.bits)
        made = Mask(bits, self.num_codes, self.codebook_sha256, topic, layer, method, **self.how)
        return (
            made if None in (self.rows, other.rows) else dataclasses.replace(made, rows=rows_among(made, self, other))
        )

    def after_erasing(self, kept: Tensor, codebook_sha256: str) -> Mask:
        """The same mask on the codebook that remains after codes of its own were erased.

        Args:
            kept: int64 [C - n], the old ids of the codes that remain, in their new order.
            codebook_sha256: of the codebook that remains.

        Returns:
            A mask of C - n codes. Where all of its own were erased it deletes nothing; ``method["erased"]`` is True. Where
            a code of its gate was erased it has none: fit it again.
        """
        deleted = _unpack(self.bits)[kept].nonzero()[:, 0]
        method = dict(self.method) if len(deleted) else {**self.method, "erased": True}
        left = Mask.from_ids(
            deleted, num_codes=len(kept), codebook_sha256=codebook_sha256, topic=self.topic, layer=self.layer,
            method=method, **self.how,
        )  # fmt: skip
        return left if self.gate is None else left.with_gate(self.gate.after_erasing(kept))

    def check_codebook(self, codebook_sha256: str) -> None:
        """Raises ValueError where the mask was made for another codebook."""
        if codebook_sha256 != self.codebook_sha256:
            raise ValueError(
                f"mask {self.topic!r} was made for another codebook (sha256 {self.codebook_sha256[:12]}..., "
                f"this one is {codebook_sha256[:12]}...); find it again on this codebook"
            )

    def save(self, path: str | Path, *, rows: bool = False) -> None:
        """Write the folder ``path``, whole or not at all, in place of a mask that is there already.

        Args:
            path: the folder.
            rows: also write the rows of the deleted latents, and of those that the gate looks at, (Din + Dout + 2) * 4
                bytes each, so that ``cu_fast.attach_masks`` needs no autoencoder.

        Raises:
            FileExistsError: ``path`` is a file, or a folder that holds anything but a mask.
            ValueError: a name that no folder can have, a record that JSON cannot hold, or rows that the mask lacks.
        """
        write_directory(path, self.to_files(rows=rows)[0], FILES)

    def to_files(self, *, rows: bool = False) -> tuple[dict[str, bytes], str]:
        """The files of the mask's folder, name -> content, and a checksum of all that they say.

        Args:
            rows: as for :meth:`save`.

        Raises:
            ValueError: a record that JSON cannot hold, or rows that the mask lacks.
        """
        if rows and self.rows is None:
            raise ValueError(
                f"mask {self.topic!r} has no rows: it was made for a codebook, or read from a file without them; make it "
                f"with Mask.from_ids(..., sae=...) or find_mask"
            )
        tensors, extra = {"bits": self.bits}, {"how": self.how} if self.how else {}
        if rows:
            tensors |= self.rows.tensors()
            extra["rows"] = self.rows.record()
        if self.gate is not None:
            tensors |= self.gate.tensors(rows=rows)
            extra["gate"] = self.gate.record(rows=rows)
        record = {
            "format_version": 2 if extra else 1,
            "topic": self.topic,
            "layer": self.layer,
            "num_codes": self.num_codes,
            "num_deleted": self.num_deleted,
            "codebook_sha256": self.codebook_sha256,
            "digest": self.digest,
            "method": dict(self.method),
            **extra,
        }
        content, sha256 = seal(record, f"mask {self.topic!r}")
        return {"mask.json": content, "mask.safetensors": safetensors.torch.save(tensors)}, sha256

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
        if record["format_version"] not in FORMAT_VERSIONS:
            raise ValueError(
                f"{file} has format_version {record['format_version']}; this version of cu_fast reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}"
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
        how, shapes = _how_of(record, file), {"bits": ((record["num_codes"] + 31) // 32,)}
        if "rows" in record:
            shapes |= row_shapes(record["rows"], record["num_deleted"], file)
        if "gate" in record:
            shapes |= gate_shapes(record, file)
        tensors = read_safetensors(bits_file, shapes)
        if "rows" in record:
            how["rows"] = LatentRows.read(tensors, record["rows"], bits_file)
        if "gate" in record:
            how["gate"] = Gate.read(tensors, record["gate"], bits_file)
        try:
            mask = cls(
                tensors["bits"], record["num_codes"], record["codebook_sha256"], record["topic"], record["layer"],
                record["method"], **how,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{bits_file}: {error}") from error
        if mask.digest != record["digest"] or mask.num_deleted != record["num_deleted"]:
            raise ValueError(f"{bits_file} does not match mask.json; find the mask again")
        return mask


def _how_of(record: Mapping[str, Any], file: Path) -> dict[str, Any]:
    how = record.get("how", {})
    kinds = {"strength": (int, float), "clamp": (int, float), "dense": (bool,)}
    if not isinstance(how, dict) or any(type(value) not in kinds.get(name, ()) for name, value in how.items()):
        raise ValueError(f"{file} has how {how!r}; it should hold {', '.join(HOW)} alone; find the mask again")
    return how


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


def _pack(deleted: Tensor) -> Tensor:
    """bool [32 n] -> int32 [n]."""
    bit = torch.arange(32, dtype=torch.int64)
    words = (deleted.reshape(-1, 32).long() << bit).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _unpack(bits: Tensor) -> Tensor:
    """int32 [n] -> bool [32 n]."""
    return ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()
