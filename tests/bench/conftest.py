"""What is measured beside the providers takes no time here: the machine's ceilings, and the collector's look at all of pytest."""

from __future__ import annotations

import gc

import pytest

from cu_fast.bench import machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SHORTEST", 0.0)
    monkeypatch.setattr(machine, "MEMORY_READ", 2**20)
    monkeypatch.setattr(machine, "REPEATS", 1)
    gc.freeze()  # each cell is measured after a collection
    yield
    gc.unfreeze()
