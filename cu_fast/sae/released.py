"""What a release's folder holds: names, shapes and dtypes before any weight is read; then the weights, checked.

Nothing is unpickled: only safetensors and npz without objects are read.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from cu_fast.files import read_safetensors, visible

FLOATS = ("F32", "BF16", "F16")
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


# -- weights ----------------------------------------------------------------------------------------------------------


def read_tensors(
    path: Path,
    wanted: Mapping[str, str],
    optional: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[dict[str, Tensor], Entry]:
    """All tensors of a file: no other than these, of these shapes, finite.

    Args:
        path: safetensors or npz.
        wanted: key -> shape in letters, as "C D"; the first key is the encoder's.
        optional: the same for keys that may be missing; None = there are none.
        sizes: letter -> what a configuration says; None = says nothing. A letter that is not in it is what the first
            tensor with it has.

    Returns:
        (key -> tensor in the file's dtype, the encoder's entry).

    Raises:
        ValueError: a missing or unexpected key; another dtype or shape; NaN or Inf; a damaged file.
    """
    found, optional, sizes = entries(path), dict(optional or {}), dict(sizes or {})
    known = {**wanted, **optional}
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(known))
    if missing or unexpected:
        raise ValueError(
            f"{path} lacks the tensors {missing} and holds the unexpected {unexpected}; it should hold {sorted(wanted)}"
            + (f", and may hold {sorted(optional)}" if optional else "")
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
    if path.suffix == ".npz":
        tensors = _read_npz(path, found)
    else:
        tensors = read_safetensors(path, {key: entry.shape for key, entry in found.items()})
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {key!r} holds NaN or Inf; every weight should be finite")
    return tensors, found[next(iter(wanted))]


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
