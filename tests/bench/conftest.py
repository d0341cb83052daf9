"""What is measured beside the providers takes no time here, and what a script of benchmarks/ registers ends with the test."""

from __future__ import annotations

import gc

import pytest

from cu_fast.bench import machine
from cu_fast.bench.providers import PROVIDERS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SHORTEST", 0.0)
    monkeypatch.setattr(machine, "MEMORY_READ", 2**20)
    monkeypatch.setattr(machine, "REPEATS", 1)
    monkeypatch.setattr(machine, "largest_cache", lambda: 2**12)
    gc.freeze()  # each cell is measured after a collection, which would look at all of pytest
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for device, ops in PROVIDERS.items():
        monkeypatch.setitem(PROVIDERS, device, {op: dict(known) for op, known in ops.items()})
