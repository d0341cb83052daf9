"""The scripts of a folder of examples/, imported as they import one another."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def scripts(monkeypatch: pytest.MonkeyPatch, folder: str, *names: str) -> Iterator[dict[str, ModuleType]]:
    """The folder's modules by name, and gone afterwards: for a fixture to ``yield from``."""
    monkeypatch.syspath_prepend(EXAMPLES / folder)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)
