"""Files: JSON and safetensors, read once and checked; folders written whole or not at all. Knows no masks.

No file that is read stays mapped: changing it later changes nothing that was loaded from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

JSON_LIMIT = 2**26  # bytes
HEADER_LIMIT = 2**27  # bytes; more than safetensors itself allows, so that its message says what is wrong
NAME_LIMIT = 230  # bytes of a folder's name; its workplace's name is ".<name>.saving-????????", of at most 255 bytes

# -- reading -----------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is too large, or holds anything but a JSON object (see :func:`parse_json`).
    """
    return parse_json(_read(Path(path), JSON_LIMIT), str(path))


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object without repeated keys, whose numbers and texts can be written again.

    Args:
        raw: the text, in an encoding that JSON allows.
        name: what messages call it.

    Raises:
        ValueError: anything else.
    """
    try:
        value = json.loads(raw, object_pairs_hook=_without_repeats)
        _canonical(value)
    except (ValueError, RecursionError) as error:  # ValueError includes UnicodeError and integers of too many digits
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a JSON {type(value).__name__}; it should hold an object")
    return value


def seal(record: Mapping[str, Any], name: str) -> tuple[bytes, str]:
    """A record as JSON text with its own checksum in it, as ``record_sha256``.

    Args:
        record: JSON values only.
        name: what messages call it.

    Returns:
        (the text, the checksum).

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    try:
        # As it will be read: JSON has no tuples, and its keys are texts.
        record = parse_json(json.dumps(record, ensure_ascii=False, allow_nan=False).encode(), "what is written")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be saved: {error}; use finite numbers, texts, lists and dicts") from error
    sha256 = _sha256(record)
    sealed = {**record, "record_sha256": sha256}
    return json.dumps(sealed, indent=2, ensure_ascii=False).encode(), sha256


def unseal(record: dict[str, Any], path: Path, advice: str) -> str:
    """Take the checksum out of a record, in place, and check it.

    Args:
        record: as :func:`read_json` gave it.
        path: of its file, for messages.
        advice: the end of the message: what to do next.

    Returns:
        The checksum.

    Raises:
        ValueError: it is not that of the record.
    """
    sha256 = record.pop("record_sha256", None)
    if sha256 != _sha256(record):
        raise ValueError(f"{path} was changed after it was saved; {advice}")
    return sha256


def read_safetensors(
    path: str | Path, expected: Mapping[str, tuple[int, ...]], sha256: str | None = None
) -> dict[str, Tensor]:
    """Exactly the expected tensors, by name, on the CPU, in memory of their own.

    Args:
        path: the file.
        expected: name -> shape.
        sha256: of the file's bytes; None = not known.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: truncated, changed or hostile content, or a missing, unexpected or misshapen tensor.
    """
    raw = _read(Path(path), HEADER_LIMIT + 8 * sum(map(math.prod, expected.values())))
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged, or was changed after it was saved (its sha256 is not the recorded one)")
    try:
        tensors = safetensors.torch.load(raw)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error!r}); it may be truncated") from error
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{path} lacks the tensors {missing} and holds the unexpected {unexpected}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}; it should be {list(shape)}"
            )
    return tensors


def visible(path: Path) -> list[Path]:
    """The entries of a folder, sorted, without hidden ones, which other programs leave; [] where there is no folder."""
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file")
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} is {size} bytes; it should be at most {limit}")
        return stream.read(size)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key is repeated among {sorted(name for name, _ in pairs)[:10]}")
    return value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(record)).hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------


def check_name(name: str, what: str, limit: int = 255) -> None:
    """Raises ValueError for a text that cannot be the name of a folder.

    Args:
        name: the text.
        what: what messages call it.
        limit: bytes of the name in the file system's encoding.
    """
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is {name!r}, which no file can be called: {error}; give another name") from error
    if size > limit:
        raise ValueError(f"{what} takes {size} bytes in a file's name; give one of at most {limit}: {name[:60]!r}...")


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all; folders that are missing are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_directory(path: str | Path, files: Mapping[str, bytes], owned: str) -> None:
    """Write a folder of files, which only its owner can read, whole or not at all; see :func:`replacing`.

    Args:
        path: the folder.
        files: name -> content; a name may hold sub-folders.
        owned: regular expression of the files that may be in the folder before, and are replaced.

    Raises:
        FileExistsError: the folder holds other files, which would be lost; or ``path`` is a file.
        ValueError: a name that no folder can have.
    """
    path = target_of(path)
    refuse_others(path, owned)
    with replacing(path) as new:
        for name, content in files.items():
            file = new / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        for entry in new.rglob("*"):  # whatever the umask: a mask's name often is a person's
            entry.chmod(0o700 if entry.is_dir() else 0o600)
        refuse_others(path, owned)


def target_of(path: str | Path) -> Path:
    """The folder that a path means, through links: a link stays, and the folder that it points to is written.

    Raises:
        FileExistsError: it is a file.
        ValueError: a name that no folder can have.
    """
    for part in Path(path).parts:
        check_name(part, "the folder's name")
    path = Path(os.path.realpath(path))
    check_name(path.name, "the folder's name", NAME_LIMIT)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give the name of a folder")
    return path


def refuse_others(path: Path, owned: str) -> None:
    """Raises FileExistsError, naming the first few, where a folder holds files other than those ``owned`` matches."""
    others = (name for name in _files_in(path) if not re.fullmatch(owned, name))
    if first := list(itertools.islice(others, 5)):
        raise FileExistsError(
            f"{path} holds other files, which are not replaced: {', '.join(first)}; move them, or give the name of a new "
            f"folder"
        )


def _files_in(path: Path) -> Iterator[str]:
    """The files and links in a folder and its sub-folders, named from it."""
    for folder, folders, files in os.walk(path):
        for name in (*files, *folders):
            entry = os.path.join(folder, name)
            if name in files or os.path.islink(entry):
                yield os.path.relpath(entry, path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, it takes the place of ``path``, whole or not at all.

    After an error or an interrupt, whenever it comes, the folder that was at ``path`` is there again. Where the system
    can exchange two folders in one step (Linux, on most file systems), a process that is killed leaves the old folder
    or the new one at ``path``. Elsewhere there is none for a moment, between two renames; a process that is killed then
    leaves the old folder in ``.<name>.saving-*/old``. The last of several writers at once wins. Folders that killed
    writers left are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.saving-"
    workplace, lock = _workplace(prefix, path.parent)
    new, old = workplace / "new", workplace / "old"
    try:
        new.mkdir()
        new.chmod(0o700)
        yield new
        for folder, _, files in os.walk(new):
            for name in (*files, "."):
                _sync(os.path.join(folder, name))
        written = new.stat()
        try:
            _swap(new, path, old)
            _sync(path.parent)
        except BaseException:
            _swap_back(written, new, path, old)
            raise
        _remove_litter(prefix, path.parent)
    finally:
        try:
            shutil.rmtree(workplace, ignore_errors=True)
        finally:
            os.close(lock)  # anything that an interrupt left in the workplace is litter from now on


def _workplace(prefix: str, parent: Path) -> tuple[Path, int]:
    """A new folder, and a descriptor that holds its lock: a free lock tells other writers that this one is dead."""
    while True:
        workplace = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = os.open(workplace, os.O_RDONLY)
        except FileNotFoundError:  # another writer took it for litter, because it was not locked yet
            continue
        with contextlib.suppress(OSError):  # on a file system without locks litter stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        if workplace.exists():
            return workplace, lock
        os.close(lock)


def _remove_litter(prefix: str, parent: Path) -> None:
    for workplace in (entry for entry in parent.iterdir() if entry.name.startswith(prefix)):
        with contextlib.suppress(OSError):  # it belongs to another user, or its writer still holds the lock
            lock = os.open(workplace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(workplace)
            finally:
                os.close(lock)


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put ``new`` at ``path``; the folder that was at ``path`` goes to ``new``, or to ``old``."""
    while True:
        try:
            if not path.exists():
                os.rename(new, path)
            elif not _exchange(new, path):
                os.rename(path, old)
                os.rename(new, path)
            return
        except OSError as error:
            # Another writer was faster: between the check and the rename a folder appeared at path, or vanished. Again.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not new.exists():
                raise
            if old.exists():
                shutil.rmtree(old)


def _swap_back(written: os.stat_result, new: Path, path: Path, old: Path) -> None:
    """Undo what :func:`_swap` did, judged by what lies where: an interrupt may come between any two steps."""
    if path.exists() and os.path.samestat(path.stat(), written):
        if new.exists():
            _exchange(new, path)
        else:
            os.rename(path, new)
    if old.exists() and not path.exists():
        os.rename(old, path)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; returns False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, ctypes.c_char_p(os.fsencode(a)), at_cwd, ctypes.c_char_p(os.fsencode(b)), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _sync(path: str | Path) -> None:
    """Write a file or a folder through to the disk. Links and the like have no content of their own."""
    if not stat.S_ISREG(mode := os.lstat(path).st_mode) and not stat.S_ISDIR(mode):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
