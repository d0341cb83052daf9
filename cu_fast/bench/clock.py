"""How a call is timed on the CPU. Part of ``cu_fast.bench``; on a GPU: ``clock_gpu``, which has the same methods."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from cu_fast.bench import machine
from cu_fast.bench.cells import Inputs
from cu_fast.bench.job import Job

SETTLE = 0.005  # seconds before a turn: threads that another library left spinning have then gone to sleep
WARM = 0.003  # seconds of untimed calls before a timed one, where the cache is to be warm
FLUSH = 2  # times the last-level cache is read through, where the cache is to be cold; lines need not leave in order


class HostClock:
    """``time.perf_counter``."""

    device = "cpu"

    def place(self, inputs: Inputs) -> Inputs:
        """The inputs where providers are to have them."""
        return inputs

    def wait(self) -> None:
        """Until everything is done that was asked for."""

    def prepare(self, job: Job, output: Any) -> tuple[Job, Any]:
        """The job as it is timed, and its output when it is called so. ``output``: that of the first call."""
        return job, output

    @functools.cached_property
    def _displacing(self) -> torch.Tensor:
        return torch.ones(FLUSH * machine.largest_cache() // 4, dtype=torch.int32)

    def time(self, job: Job, cache: str = "warm") -> float:
        """Seconds of one call, with caches as they are, or cold."""
        if cache == "cold":
            self._displacing.amax()  # read, on all threads: written lines would be written back while the call runs
            time.sleep(SETTLE)
        if job.before is not None:
            job.before()
        start = time.perf_counter()
        job.call()
        return time.perf_counter() - start

    def turn(self, job: Job, cache: str, usual: float) -> list[float]:
        """Seconds of each timed call of a provider's turn. ``usual``: what a call took before."""
        if cache == "warm":
            time.sleep(SETTLE)
        if job.before is None and cache == "warm":
            end = time.perf_counter() + WARM  # one call does not fill a victim cache
            job.call()
            while time.perf_counter() < end:
                job.call()
        return [self.time(job, cache)]
