"""How functions of vLLM are wrapped: all of them are looked for before the first is changed; twice is once."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

ORIGINAL = "_cu_fast_original"


class Wrap(NamedTuple):
    """A method or function of vLLM, and what takes its place.

    Attributes:
        module: where its class is, or where a function is called.
        owner: the class; "" = it is a function.
        name: of the method.
        parameters: that it must have, self apart.
        make: from the original to its replacement.
    """

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Callable], Callable]


def found(wraps: Iterable[Wrap]) -> list[tuple[Any, Wrap]]:
    """Their classes, or modules.

    Raises:
        ImportError, AttributeError: one has moved.
        TypeError: one has other parameters.
    """
    classes = []
    for wrap in wraps:
        module = importlib.import_module(wrap.module)
        owner = getattr(module, wrap.owner) if wrap.owner else module
        original = getattr(owner, wrap.name)
        missing = set(wrap.parameters) - set(inspect.signature(original).parameters)
        if missing:
            raise TypeError(f"{wrap.owner or wrap.module}.{wrap.name} has no parameter {sorted(missing)[0]!r}")
        classes.append((owner, wrap))
    return classes


def wrap(classes: Iterable[tuple[Any, Wrap]]) -> None:
    """Put the replacements in, where they are not there yet."""
    for owner, wrap in classes:
        original: Any = getattr(owner, wrap.name)
        if not hasattr(original, ORIGINAL):
            made = functools.wraps(original)(wrap.make(original))
            setattr(made, ORIGINAL, original)
            setattr(owner, wrap.name, made)
