"""Texts from a file, as windows of token ids. They stream: never held whole, and read anew for every pass.

    .jsonl, .json lines       one text per line: a JSON string, or an object with "text"
    .parquet                  one text per row, in the column "text"
    a folder                  that ``Dataset.save_to_disk`` of the ``datasets`` library wrote, with the column "text"
    any other file            one running text, as a book: windows go on over its lines

A text that is longer than a window gives several. Parquet and folders need the ``datasets`` library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cu_fast.hf import Tokenizer

BLOCK = 2**16  # characters of a running text that are read at once
COLUMN = "text"


class Texts:
    """An iterable of texts, which can be iterated again.

    Args:
        source: path of a file or folder, as the module's docstring lists them; or texts in memory.

    Attributes:
        name: for messages.
        running: the texts are pieces of one text.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an iterator, which would be empty the second time, or no texts at all.
        RuntimeError: the ``datasets`` library is needed, and not installed.
        ValueError: a folder that it did not write, or one of several splits.
    """

    def __init__(self, source: str | Path | Iterable[str]) -> None:
        self.running = False
        if not isinstance(source, (str, Path)):
            if not isinstance(source, Iterable) or isinstance(source, (Iterator, bytes)):
                raise TypeError(f"data is a {type(source).__name__}; it should be a path, or a list of strings")
            self.name, self._open = "data", lambda: iter(source)
            return
        path = Path(source)
        self.name = str(path)
        if path.is_dir() or (path.suffix == ".parquet" and path.exists()):
            rows = _dataset(path)
            self._open = lambda: (row[COLUMN] for row in rows)
        elif not path.is_file():
            raise FileNotFoundError(f"data is {path}, which does not exist; give a file of texts, or a datasets folder")
        elif path.suffix == ".jsonl":
            self._open = lambda: _json_lines(path)
        else:
            self.running, self._open = True, lambda: _blocks(path)

    def __iter__(self) -> Iterator[str]:
        try:
            for number, text in enumerate(self._open(), 1):
                if not isinstance(text, str):
                    raise TypeError(f"{self.name}, text {number} is {text!r:.60}; it should be a string")
                yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name} is no text file ({error}); it should be UTF-8") from error


def windows(texts: Texts, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Token ids, cut into windows.

    Args:
        texts: iterated once.
        tokenizer: the model's. Every window starts with what it puts before a text, as a "beginning of sequence".
        length: tokens of a window, at most.

    Yields:
        Windows of at least two tokens.
    """
    start = _start(tokenizer)
    step, rest = length - len(start), []
    for text in texts:
        ids = rest + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) - len(ids) % step if texts.running else len(ids)
        rest = ids[whole:]
        for i in range(0, whole, step):
            window = start + ids[i : min(i + step, whole)]
            if len(window) > 1:
                yield window
    if len(start) + len(rest) > 1 and rest:
        yield start + rest


def _start(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:at])


def _blocks(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as stream:
        while block := stream.read(BLOCK):
            yield block + stream.readline(BLOCK)  # to the end of the line, unless a line has no end


def _json_lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from error
            text = value.get(COLUMN) if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ValueError(f'{where} is {line.strip()[:60]!r}; it should be a string, or an object with "text"')
            yield text


def _dataset(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f"data is {path}; a parquet file or a folder is read by the datasets library, which is not installed: pip "
            f"install datasets, or give a text file or a .jsonl file"
        ) from error
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:  # a damaged file makes its reader raise errors of any kind
        raise ValueError(f"data is {path}, which the datasets library cannot read: {error}") from error
    if isinstance(rows, dict):
        raise ValueError(f"data is {path}, which holds the splits {', '.join(rows)}; give the folder of one of them")
    names = rows.column_names
    if names is not None and COLUMN not in names:
        raise ValueError(f"data is {path}, with the columns {', '.join(names)}; one should be {COLUMN!r}")
    return rows
