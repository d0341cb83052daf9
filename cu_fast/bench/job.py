"""What is timed: a provider's job in a cell, or why it has none. Part of ``cu_fast.bench``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from cu_fast.bench.cells import Inputs
from cu_fast.bench.truth import Answer

MEMORY_SHARE = 0.8  # of the free memory that a provider may plan to use


class Skip(Exception):
    """A provider that does not run in this cell: the status and the reason that its row will hold."""

    def __init__(self, reason: str, status: str = "skipped") -> None:
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass
class Job:
    """What is timed, and how its output is judged.

    call: timed. answer: output -> Answer, not timed; None where there is nothing to judge. identical: output ->
    share of its first rows that equal the reference's, bit for bit. before: runs untimed before each timed call.
    divide: calls that one ``call`` stands for. note: goes into the row.
    """

    call: Callable[[], Any]
    answer: Callable[[Any], Answer] | None = None
    identical: Callable[[Any], float] | None = None
    before: Callable[[], Any] | None = None
    divide: int = 1
    note: str = ""


Builder = Callable[[Inputs], Job]


def require_memory(limit: int | None, needed: int, what: str) -> None:
    """Raises Skip where ``needed`` bytes are more than may be used: of ``limit``, None = of what the CPU has free."""
    free = available_memory() if limit is None else limit
    if needed > MEMORY_SHARE * free:
        raise Skip(f"{what} would take {needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free")


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
