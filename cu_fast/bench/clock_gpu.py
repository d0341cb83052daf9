"""How a call is timed on a GPU: replayed from a CUDA graph, between CUDA events. Part of ``cu_fast.bench``.

A turn is a few calls. Before each the second-level cache is emptied, or, with a warm cache, the call is made untimed a
few times; that runs while the events and the call are put into the queue, so that what is timed does not wait for the
host. The cache is emptied by reading, not by writing: written lines would have to be written back while the call runs.
What cannot be captured, since it waits for the device, is launched eagerly, and its row says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cu_fast.bench.cells import Inputs, moved
from cu_fast.bench.job import Job
from cu_fast.kernels import native

FLUSH = 4  # times the second-level cache is read through; its lines need not leave in order
SAMPLES = 10  # calls of a turn, at most
TURN = 0.01  # seconds of a turn, about
WARM_CALLS = 3  # untimed calls before a timed one, where the cache is to be warm


class GraphClock:
    """CUDA events around replays of a graph. ``cuda`` and ``place_on`` are for tests, which have no GPU.

    failure: why what is to be measured cannot run, None where it can; default: of the native kernels.
    """

    def __init__(
        self, cuda: Any = torch.cuda, place_on: str = "cuda", failure: Callable[[], str | None] | None = None
    ) -> None:
        if cuda is torch.cuda and (reason := (failure or native.cuda_failure)()) is not None:
            raise RuntimeError(f"device is 'cuda', on which nothing can be measured here: {reason}")
        self._cuda, self._place_on = cuda, place_on
        self.device = cuda.get_device_name()
        size = FLUSH * cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.ones(size // 4, dtype=torch.int32, device=place_on)
        self._largest = torch.zeros((), dtype=torch.int32, device=place_on)

    def place(self, inputs: Inputs) -> Inputs:
        """The inputs on the GPU; memory is the GPU's from here on."""
        self._cuda.empty_cache()
        on_gpu = moved(inputs, self._place_on)
        free = self._cuda.mem_get_info()[0]
        return dataclasses.replace(on_gpu, memory=free if inputs.memory is None else inputs.memory)

    def wait(self) -> None:
        self._cuda.synchronize()

    def prepare(self, job: Job, output: Any) -> tuple[Job, Any]:
        """The job as a graph's replay, and what that computes; as it is, with a note, where it cannot be captured."""
        try:
            replay = self._capture(job)
        except Exception as error:  # whatever a library raises that waits for the device
            self.wait()
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            return dataclasses.replace(job, note=_joined(job.note, f"launched eagerly, not captured: {reason}")), output
        captured = dataclasses.replace(job, call=replay)
        output = captured.call()
        self.wait()
        return captured, output

    def _capture(self, job: Job):
        side = self._cuda.Stream()  # capture wants what is allocated lazily to exist, and not on the default stream
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side):
            job.call()
        self._cuda.current_stream().wait_stream(side)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            output = job.call()

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    def time(self, job: Job, cache: str = "cold") -> float:
        """Seconds of one call."""
        return self.turn(job, cache, TURN)[0]

    def turn(self, job: Job, cache: str, usual: float) -> list[float]:
        """Seconds of each timed call of a provider's turn. ``usual``: what a call took before."""
        events = []
        for _ in range(max(1, min(SAMPLES, int(TURN / max(usual, 1e-9))))):
            if cache == "cold":
                torch.amax(self._buffer, dim=0, out=self._largest)
            else:
                for _ in range(WARM_CALLS):
                    job.call()
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job.call()
            end.record()
            events.append((start, end))
        self.wait()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def _joined(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more
