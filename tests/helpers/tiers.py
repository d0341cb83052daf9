"""`make test` is for every change, within minutes; `make test-all` adds what is too heavy for that."""

from __future__ import annotations

import os

import pytest

TEST_ALL = os.environ.get("CU_FAST_TEST_ALL") == "1"
heavy = pytest.mark.skipif(not TEST_ALL, reason="heavy: make test-all")


def heavies(*values: object) -> list:
    """Values of a parametrized test, or tuples of them, that `make test-all` alone tries."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=heavy) for value in values]


def examples(number: int) -> int:
    """Random examples of a test: so many by `make test-all`, a third of them by `make test`."""
    return number if TEST_ALL else number // 3
