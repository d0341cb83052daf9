"""What a release's folder holds: names, shapes and dtypes before any weight is read; then the weights, checked.

Read are safetensors and npz without objects. A pickle is opened in one place, for `cu-fast sae convert` alone, and by PyTorch's
reader that makes tensors and plain values, and no objects.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from cu_fast.files import read_json, read_safetensors, visible

FLOATS = ("F32", "BF16", "F16")
TORCH_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NPZ_DTYPES = {"<f4": "F32", "<f2": "F16"}
BLOCK = 4096  # rows that are widened to fp64 at once: all of them would take twice the memory of the file


class Entry(NamedTuple):
    """A tensor of a file: its dtype as safetensors writes it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


# -- what is there ----------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    """The files in a folder and in its folders, named from it; those of deeper folders are not looked for."""
    names = []
    for entry in visible(folder):
        inner = visible(entry) if entry.is_dir() else [entry]
        names += [file.relative_to(folder).as_posix() for file in inner if file.is_file()]
    return names


def entries(path: Path) -> dict[str, Entry]:
    """What a safetensors or npz file says that it holds, by key.

    Raises:
        ValueError: it is truncated, or no such file.
    """
    if path.suffix == ".npz":
        return _npz_entries(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: Entry(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}); it may be truncated") from error


def _npz_entries(path: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key in found:
                    raise ValueError(f"the key {key!r} is repeated")
                with archive.open(info) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0
                    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)
                    # A header may claim any size: numpy would ask for that much memory.
                    claimed = stream.tell() + math.prod(shape) * dtype.itemsize
                if not dtype.hasobject and claimed != info.file_size:
                    raise ValueError(f"the array {key!r} takes {info.file_size} bytes; its header says {claimed}")
                found[key] = Entry(NPZ_DTYPES.get(dtype.str, str(dtype)), tuple(shape))
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is not a sound npz file ({error}); it may be truncated") from error
    return found


def unpickled(path: Path) -> dict[str, Any]:
    """What a file of torch.save holds by key, where that is tensors and plain values: no object is made, no code runs.

    Raises:
        ValueError: it holds objects, or anything but a dict; or it is truncated.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle anything; PyTorch's own message advises to let its code run
        raise ValueError(
            f"{path} is not read: it is truncated, or holds {_objects(path)} beside tensors, and objects are never unpickled. "
            f"Load it with the library that wrote it, and save its tensors alone: "
            f"torch.save(autoencoder.state_dict(), {path.name!r})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds a {type(state).__name__}; it should hold a dict from names to tensors")
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}


def _objects(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged, or of PyTorch's old format, for which it cannot tell
        names = []
    return f"objects ({', '.join(sorted(names)[:5])})" if names else "objects"


def _entry_of(tensor: Tensor) -> Entry:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    dtype = TORCH_DTYPES.get(tensor.dtype, str(tensor.dtype)) if plain else f"{tensor.layout} on {tensor.device}"
    return Entry(dtype, tuple(tensor.shape))


# -- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """One file of tensors of a release, in its folder.

    Attributes:
        folder: absolute.
        name: of the file, from the folder.
        k: latents kept per token, as the caller says; None = not said.
        state: of a pickle what it holds, by key; None for the other formats, which are read when they are asked for.
        entries: what the file says that it holds, by key.
    """

    folder: Path
    name: str
    k: int | None = None
    state: dict[str, Any] | None = field(default=None, repr=False)
    entries: dict[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        state = self.state
        found = entries(self.path) if state is None else {k: _entry_of(v) for k, v in state.items() if _is_tensor(v)}
        object.__setattr__(self, "entries", found)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / self.name

    def config(self, name: str) -> dict[str, Any]:
        """A configuration in the release's folder; ValueError where it is no JSON object."""
        return read_json(self.folder / name)

    def values(self) -> dict[str, Any]:
        """Of a pickle what is no tensor, by key."""
        return {key: value for key, value in (self.state or {}).items() if not _is_tensor(value)}

    def tensors(
        self,
        wanted: Mapping[str, str],
        optional: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
        others: Collection[str] = (),
    ) -> tuple[dict[str, Tensor], Entry]:
        """All tensors of the file: no other than these, of these shapes, finite.

        Args:
            wanted: key -> shape in letters, as "C D", "" for a single number; the first key is the encoder's.
            optional: the same for keys that may be missing; None = there are none.
            sizes: letter -> what a configuration says; None = says nothing. A letter that is not in it is what the first
                tensor with it has.
            others: keys that may be there too, and may be anything.

        Returns:
            (key -> tensor in the file's dtype, the encoder's entry).

        Raises:
            ValueError: a missing or unexpected key; another dtype or shape; NaN or Inf; a damaged file.
        """
        path, found, optional, sizes = self.path, self.entries, dict(optional or {}), dict(sizes or {})
        known = {**wanted, **optional}
        missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(known) - set(others))
        if missing or unexpected:
            raise ValueError(
                f"{path} lacks the tensors {missing} and holds the unexpected {unexpected}; it should hold "
                f"{sorted(wanted)}" + (f", and may hold {sorted(optional)}" if optional else "")
            )
        for key, letters in known.items():
            if key not in found:
                continue
            dtype, shape = found[key]
            if dtype not in FLOATS:
                raise ValueError(f"{path}: tensor {key!r} is {dtype}; it should be one of {', '.join(FLOATS)}")
            names = letters.split()
            if len(shape) == len(names):
                for name, size in zip(names, shape):
                    sizes.setdefault(name, size)
            if 0 in shape or list(shape) != [sizes.get(name) for name in names]:
                said = ", ".join(f"{name} = {sizes[name]}" for name in sorted(set(names)) if name in sizes)
                raise ValueError(
                    f"{path}: tensor {key!r} has shape {list(shape)}; it should be [{', '.join(names)}], not empty"
                    + (f", with {said}" if said else "")
                )
        tensors = self._read()
        for key in known.keys() & tensors.keys():
            if not torch.isfinite(tensors[key]).all():
                raise ValueError(f"{path}: tensor {key!r} holds NaN or Inf; every weight should be finite")
        return tensors, found[next(iter(wanted))]

    def _read(self) -> dict[str, Tensor]:
        if self.state is not None:
            return {key: self.state[key] for key in self.entries}
        if self.path.suffix == ".npz":
            return _read_npz(self.path, self.entries)
        return read_safetensors(self.path, {key: entry.shape for key, entry in self.entries.items()})


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _read_npz(path: Path, found: Mapping[str, Entry]) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in found}
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a sound npz file ({error}); it may be truncated") from error


def refuse_scaling(path: Path, tensors: Mapping[str, Tensor], *keys: str) -> None:
    """Raises ValueError where one of the keys is there and is not all ones: no rule is known for it."""
    for key in keys:
        if key in tensors and not (tensors[key] == 1).all():
            worst = tensors[key].flatten()[(tensors[key].flatten() - 1).abs().argmax()]
            raise ValueError(f"{path}: tensor {key!r} holds {worst:.6g}; it should be all ones, or not be there")


# -- settings ---------------------------------------------------------------------------------------------------------


def integer(path: Path, config: Mapping[str, Any], key: str) -> int:
    """A positive integer of a configuration; ValueError for anything else."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {key!r} is {value!r}; it should be a positive integer")
    return value


def flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false of a configuration, or the default where it is missing; ValueError for anything else."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{path}: {key!r} is {value!r}; it should be true or false")
    return value


def text(path: Path, config: Mapping[str, Any], key: str) -> str | None:
    """A text of a configuration; None where it is missing or null; ValueError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}: {key!r} is {value!r}; it should be a text")
    return value


def number(path: Path, config: Mapping[str, Any], key: str, name: str | None = None) -> float:
    """A positive, finite number of a configuration; ValueError for anything else.

    Args:
        path: of the configuration.
        config: the object that holds it.
        key: in the object.
        name: what messages call it; None = its key.
    """
    value = config.get(key)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {(name or key)!r} is {value!r}; it should be a positive number")
    return float(value)


def chosen(path: Path, config: Mapping[str, Any], key: str, default: str, allowed: Collection[str]) -> str:
    """One of several texts of a configuration, or the default where it is missing; ValueError for anything else."""
    value = config.get(key, default)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{path}: {key!r} is {value!r}; it should be {' or '.join(map(repr, allowed))}")
    return value


def part(path: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside a configuration; empty where it is missing or null; ValueError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key!r} is {value!r}; it should be an object")
    return value or {}


def at_most(path: Path, k: int, C: int) -> int:
    """k; ValueError where it is more than there are latents."""
    if k > C:
        raise ValueError(f"{path}: 'k' is {k}; it should be at most C = {C}")
    return k


# -- folding: in fp64, kept in fp32 -----------------------------------------------------------------------------------


def product(rows: Tensor, vector: Tensor) -> Tensor:
    """fp64 [C]: each of the rows [C, D] times the vector [D]."""
    return torch.cat([block.double() @ vector.double() for block in rows.split(BLOCK)])


def lengths(rows: Tensor) -> Tensor:
    """fp64 [C]: the Euclidean norm of each of the rows [C, D]."""
    return torch.cat([block.double().norm(dim=1) for block in rows.split(BLOCK)])


def folded(rows: Tensor, factor: Tensor | float = 1.0, centred: bool = False) -> Tensor:
    """Rows as they are kept: fp32 [C, D], contiguous, in memory of their own.

    Args:
        rows: [C, D], in any floating dtype.
        factor: what each row is multiplied with: fp64 [C], or a number.
        centred: the mean of each row is taken off first.
    """
    factors = torch.as_tensor(factor, dtype=torch.float64).expand(len(rows))
    out = torch.empty(rows.shape, dtype=torch.float32)
    for new, block, by in zip(out.split(BLOCK), rows.split(BLOCK), factors.split(BLOCK)):
        block = block.double()
        new.copy_((block - block.mean(1, keepdim=True) if centred else block) * by[:, None])
    return out


def gated(sub: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gated autoencoder as one of thresholds: it fires where u + b_gate > 0, as e u + b_mag, with e = exp(r_mag).

    Args:
        sub: [C], what is subtracted from W . x to give u.
        b_gate: [C].
        b_mag: [C].
        r_mag: [C].

    Returns:
        (e, what multiplies the rows of the encoder; bias; theta), fp64 [C] each.
    """
    e, b_mag = r_mag.double().exp(), b_mag.double()
    return e, b_mag - e * sub, (b_mag - e * b_gate.double()).clamp(min=0)
