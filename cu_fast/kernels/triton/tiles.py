"""A user's table of tiles, a JSON file that ``cu-fast tune`` wrote: its place, reading, checking and writing.

    format, format_version, arch     what it is, and for which architecture
    card, date, *_version, ...       the GPU and the versions that were measured; for people
    rows                             kernel -> key -> parameters, num_warps, num_stages, us; keys as in launch.TABLE,
                                     with the architecture: "many sm_90"
    tuning                           fields of launch.Tuning
    candidates, crossover, ...       all measurements; for people

A file with an error raises. Skipping it would bring the rows that ship back without a word.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMAT, FORMAT_VERSION = "cu_fast.triton_table", 1
VARIABLE = "CU_FAST_TRITON_TABLE"
SHIPPED = "shipped"  # value of the variable: no file is read


class Config(NamedTuple):
    """How a kernel is cut: its tiles, by the names of its parameters, and Triton's options."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 2

    def block(self, name: str) -> int:
        """The size of a tile: "T" for BLOCK_T; a parameter of more than one letter by its name."""
        return dict(self.blocks)[_parameter(name)]

    def to_dict(self) -> dict[str, int]:
        """Every number by its name."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


def _parameter(name: str) -> str:
    return f"BLOCK_{name}" if len(name) == 1 else name


def config(num_warps: int, num_stages: int = 2, **blocks: int) -> Config:
    """A Config; tiles are named as for :meth:`Config.block`."""
    return Config(tuple((_parameter(name), size) for name, size in blocks.items()), num_warps, num_stages)


Rows = Mapping[str, Mapping[str, Config]]


class Table(NamedTuple):
    """The rows of an architecture: a user's over those that ship.

    Attributes:
        rows: kernel -> key -> tiles.
        tuning: fields of launch.Tuning that the user's file sets.
        path: of the user's file; None = there is none.
        record: all that the file says.
    """

    rows: Rows
    tuning: Mapping[str, float] = {}
    path: Path | None = None
    record: Mapping[str, Any] = {}


class Rules(NamedTuple):
    """What a file may hold.

    Attributes:
        shipped: the rows that ship.
        fields: names in ``tuning`` that a file may set.
        fault: (kernel, row, architecture) -> why the row cannot be used, None where it can.
    """

    shipped: Rows
    fields: tuple[str, ...]
    fault: Callable[[str, Config, str], str | None]


def home(arch: str) -> Path:
    """The path of a user's table, whether the file exists or not."""
    named = os.environ.get(VARIABLE)
    if named and named != SHIPPED:
        return Path(named)
    # Not Path.home(), which raises for a user without a home folder.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "cu_fast", f"triton-{arch}.json")


def find(arch: str, rules: Rules) -> Table:
    """The table of an architecture. Raises ValueError where the file is broken, or is named and does not exist."""
    named, path = os.environ.get(VARIABLE), home(arch)
    if named == SHIPPED or not (named or os.path.exists(path)):
        return Table(rules.shipped)
    return read(path, arch, rules)


def read(path: Path, arch: str, rules: Rules) -> Table:
    """A user's table, laid over the rows that ship.

    Args:
        path: of the file.
        arch: the architecture that it should be for.
        rules: what it may hold.

    Raises:
        ValueError: the file cannot be read or holds anything else; the message names the file and the row.
    """
    try:
        return _read(path, arch, rules)
    except (OSError, ValueError) as error:
        unset = f", or unset {VARIABLE}" if os.environ.get(VARIABLE) else ""
        raise ValueError(
            f"the table of Triton tiles {path}: {error}; delete it or run `cu-fast tune` again{unset}"
        ) from error


def _read(path: Path, arch: str, rules: Rules) -> Table:
    try:
        record = _object("the file", json.loads(path.read_bytes()))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    for name, wanted in (("format", FORMAT), ("format_version", FORMAT_VERSION), ("arch", arch)):
        if record.get(name) != wanted:
            raise ValueError(f"{name} is {record.get(name)!r}; it should be {wanted!r}")
    rows: dict[str, Mapping[str, Config]] = dict(rules.shipped)
    for kernel, given in _object("rows", record.get("rows")).items():
        if kernel not in rules.shipped:
            raise ValueError(f"rows: {kernel!r} is no kernel; there are {', '.join(rules.shipped)}")
        mine = {key: _row(kernel, key, row, arch, rules) for key, row in _object(kernel, given).items()}
        rows[kernel] = {**rules.shipped[kernel], **mine}
    tuning = _object("tuning", record.get("tuning"))
    for name, value in tuning.items():
        if name not in rules.fields:
            raise ValueError(f"tuning: {name!r} is no field; there are {', '.join(rules.fields)}")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"tuning: {name} is {value!r}; it should be a number above 0")
    return Table(rows, tuning, path, record)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.40}; it should be an object")
    return value


def _row(kernel: str, key: str, given: Any, arch: str, rules: Rules) -> Config:
    where, name = f"{kernel}, row {key!r}", key.removesuffix(f" {arch}")
    names = [name for name in rules.shipped[kernel] if " " not in name]
    if name == key or name not in names:
        keys = ", ".join(f"{name} {arch}" for name in names)
        raise ValueError(f"{where} is none of this kernel and architecture; there are {keys}")
    shipped = rules.shipped[kernel][name]
    given, wanted = _object(where, given), [*shipped.to_dict(), "us"]
    if set(given) != set(wanted):
        raise ValueError(f"{where} has {', '.join(given)}; it should have {', '.join(wanted)}")
    for parameter in shipped.to_dict():
        if type(given[parameter]) is not int:
            raise ValueError(f"{where}: {parameter} is {given[parameter]!r}; it should be a whole number")
    if type(given["us"]) not in (int, float) or not 0 < given["us"] < math.inf:
        raise ValueError(f"{where}: us is {given['us']!r}; it should be a number above 0")
    row = Config(
        tuple((name, given[name]) for name, _ in shipped.blocks), given["num_warps"], given["num_stages"]
    )  # fmt: skip
    if (reason := rules.fault(kernel, row, arch)) is not None:
        raise ValueError(f"{where}: {reason}")
    return row


def write(path: Path, record: Mapping[str, Any], rules: Rules) -> None:
    """Write a table, whole or not at all. It is read again first, so that no file is written that would be refused.

    Args:
        path: of the file.
        record: all that it should say.
        rules: what it may hold.

    Raises:
        ValueError: the record would be refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        read(partial, record["arch"], rules)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
