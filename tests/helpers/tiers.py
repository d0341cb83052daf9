"""`make test` is for every change, within minutes; `make test-all` adds what is too heavy for that."""

from __future__ import annotations

import os

import pytest

TEST_ALL = os.environ.get("CU_FAST_TEST_ALL") == "1"
heavy = pytest.mark.skipif(not TEST_ALL, reason="heavy: make test-all")


def examples(number: int) -> int:
    """Random examples of a test: so many by `make test-all`, a third of them by `make test`."""
    return number if TEST_ALL else number // 3
