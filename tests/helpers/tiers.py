"""`make test` is for every change, within minutes; `make test-all` adds what is too heavy for that."""

from __future__ import annotations

import os

import pytest

TEST_ALL = os.environ.get("CU_FAST_TEST_ALL") == "1"
heavy = pytest.mark.skipif(not TEST_ALL, reason="heavy: make test-all")
