"""The benchmark on a GPU, with a stand-in for CUDA's events and graphs: all but the times is what a GPU would give."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiers import heavy

from cu_fast import bench
from cu_fast.bench import clock_gpu
from cu_fast.bench.cells import MASKS_OF, Cell, make_inputs, moved
from cu_fast.bench.clock_gpu import GraphClock
from cu_fast.bench.job import Job
from cu_fast.bench.plan import providers_of
from cu_fast.bench.providers import PROVIDERS
from cu_fast.kernels import triton

TINY = {"tokens": (3,), "shapes": ((16, 700, 4),), "seconds": 1e-6, "rounds": 1}
MANY = {"delete_latents": {"shapes": ((16, 700, 600),)}}  # so many latents that some fire
GPU_PROVIDERS = PROVIDERS["cuda"]


class Cuda:
    """What GraphClock asks of torch.cuda, on the CPU. A replay only counts: its output is that of the capture."""

    def __init__(self):
        self.capturing, self.replays, self.waits = False, 0, 0

    def get_device_name(self):
        return "Test GPU"

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=4096)

    def mem_get_info(self):
        return 10**9, 10**9

    def empty_cache(self):
        pass

    def synchronize(self):
        self.waits += 1

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda stream: None)

    Stream = current_stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):
        def replay():
            self.replays += 1

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)

        def record():
            event.at = time.perf_counter()

        event.record = record
        event.elapsed_time = lambda later: 1e3 * (later.at - event.at)
        return event


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(bench, "GraphClock", lambda: GraphClock(fake, "cpu"))
    return fake


def run(op, output=None, **options):
    quick = tuple(name for name in providers_of(op, "cuda") if "compile" not in name and name != "cu_fast_triton")
    options = TINY | MANY.get(op, {}) | options
    return bench.run(bench.Plan(op, device="cuda", providers=options.pop("providers", quick), **options), output)


@pytest.mark.parametrize("op", GPU_PROVIDERS)
def test_every_row_is_whole_and_right(op, cuda):
    for row in run(op, masks=MASKS_OF[op][-2:]):
        assert tuple(row) == bench.COLUMNS and bench.config(row)["device"] == "Test GPU"
        assert bench.config(row)["cache"] == "cold" and row["int8_gops"] == row["of_ceiling"] == ""
        if "nothing to gather" in row["note"]:
            assert row["kernel_provider"] == "torch_gather" and bench.config(row)["mask"] == "one"
            continue
        assert row["status"] == "ok" and row["y_value_50"] > 0 and row["ratio"] > 0, row["note"]
        exact = "bf16" not in row["kernel_provider"] and bench.config(row)["dtype"] == "fp32"
        assert row["match"] == 1.0 or not exact or row["kernel_provider"] == "product_bf16", row
        assert "captured" not in row["note"]
        if row["kernel_provider"].startswith("cu_fast"):
            assert row["match"] == row["identical"] == 1.0
    assert cuda.replays > 0


def triton_rows():
    """Prints rows of the Triton kernels and the operators that ran; for a process of its own, as the interpreter wants."""
    gc.freeze()  # as in conftest.py
    rows, called, operator = [], set(), triton.operator
    bench.GraphClock = lambda: GraphClock(Cuda(), "cpu")
    triton.operator = lambda name: called.add(name) or operator(name)
    for op in GPU_PROVIDERS:
        small = {"tokens": (2,), "shapes": ((16, 70, 60 if op in MANY else 4),)}  # interpreting takes long
        rows += run(op, dtypes=("bf16",), masks=MASKS_OF[op][-1:], providers=("cu_fast", "cu_fast_triton"), **small)
    print(json.dumps({"rows": rows, "called": sorted(called)}))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@heavy
def test_rows_of_the_triton_kernels_are_right():
    done = subprocess.run(
        [sys.executable, "-c", "import test_bench_gpu; test_bench_gpu.triton_rows()"], cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["called"]) == set(triton.HOME)
    ours = [row for row in found["rows"] if row["kernel_provider"] == "cu_fast_triton"]
    assert [row["kernel_name"] for row in ours] == list(GPU_PROVIDERS)
    for row in ours:
        assert row["status"] == "ok" and row["match"] == row["identical"] == 1.0 and row["ratio"] > 0, row


def test_the_stand_in_has_nothing_that_torch_lacks():
    names = {name for name in vars(Cuda) if not name.startswith("_")}
    assert {name for name in names if not hasattr(torch.cuda, name)} == set()


def test_a_row_that_the_cpu_computes_otherwise_is_not_identical(cuda):
    inputs = moved(make_inputs(Cell("codebook_quantize", 5, 16, 700, 4)), "cpu")
    job = GPU_PROVIDERS["codebook_quantize"]["cu_fast"](inputs)
    scores, ids, hits = job.call()
    assert job.identical((scores, ids, hits)) == 1.0
    scores = torch.where(torch.arange(5)[:, None] == 2, scores + 1e-6, scores)
    assert job.identical((scores, ids, hits)) == 0.8


@pytest.mark.parametrize("part", ["y", "hits", "dose"])
def test_a_deletion_of_which_the_cpu_computes_one_part_otherwise_is_not_identical(part, cuda):
    inputs = moved(make_inputs(Cell("delete_latents", 5, 16, 700, 600, mask="rows")), "cpu")
    job = GPU_PROVIDERS["delete_latents"]["cu_fast"](inputs)
    deletion = job.call()
    assert job.identical(deletion) == 1.0
    getattr(deletion, part)[2] += 1
    assert job.identical(deletion) == 0.8


def test_inputs_that_were_moved_are_the_same():
    for op in GPU_PROVIDERS:
        here = make_inputs(Cell(op, 3, 16, 70, 4, "bf16", MASKS_OF[op][-1]))
        there = moved(here, "cpu")
        assert there.host is here and there.cell is here.cell
        assert torch.equal(there.x, here.x) and torch.equal(there.codes, here.codes)
        if op == "bottleneck":
            assert there.bottleneck is not here.bottleneck and there.bottleneck.impl == "cpu"
            assert torch.equal(there.bottleneck(there.x, **there.masks), here.bottleneck(here.x, **here.masks))


def test_what_waits_for_the_device_is_launched_eagerly_and_says_so(cuda):
    def call():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return 7

    job, output = GraphClock(cuda, "cpu").prepare(Job(call, note="first"), 7)
    assert job.note == "first; launched eagerly, not captured: operation not permitted when stream is capturing"
    assert job.call is call and output == 7


def test_what_is_captured_is_replayed_and_what_it_left_is_judged(cuda):
    calls = []
    job, output = GraphClock(cuda, "cpu").prepare(Job(lambda: calls.append(1) or len(calls)), 1)
    assert len(calls) == 2 and output == 2 and cuda.replays == 1  # once to warm up, once captured; the replay's output
    assert job.call() == 2 and len(calls) == 2


@pytest.mark.parametrize("cache, usual, calls, flushes", [
    ("cold", 1e-5, 10, 10), ("cold", 2e-3, 5, 5), ("cold", 1.0, 1, 1), ("warm", 1e-5, 40, 0), ("warm", 1.0, 4, 0),
])  # fmt: skip
def test_a_turn_is_a_few_calls_with_the_cache_as_asked(cache, usual, calls, flushes, cuda, monkeypatch):
    clock, made, flushed = GraphClock(cuda, "cpu"), [], []
    monkeypatch.setattr(clock_gpu.torch, "amax", lambda *_, **__: flushed.append(1))
    times = clock.turn(Job(lambda: made.append(1)), cache, usual)
    assert (len(made), len(flushed), cuda.waits) == (calls, flushes, 1)
    assert len(times) == (calls if cache == "cold" else calls // 4) and all(t >= 0 for t in times)


def test_the_cache_is_read_through_several_times(cuda):
    assert GraphClock(cuda, "cpu")._buffer.nbytes == 4 * 4096


def test_memory_is_that_of_the_gpu(cuda):
    cuda.mem_get_info = lambda: (100, 10**9)
    rows = run("codebook_quantize", dtypes=("fp32",), masks=("none",), providers=("cu_fast", "torch_fp32"))
    assert [row["status"] for row in rows] == ["ok", "skipped"] and "scores [T, C]" in rows[1]["note"]


@pytest.mark.parametrize("name", [name for name in GPU_PROVIDERS["bottleneck"] if "compile" in name])
def test_compiled_providers_compute_what_the_eager_ones_do(name, cuda, monkeypatch):
    modes, compile = [], torch.compile

    def quick(function, mode=None, **options):
        modes.append(mode)
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", quick)
    for op in GPU_PROVIDERS:
        (row,) = run(op, dtypes=("bf16",), masks=MASKS_OF[op][:1], providers=(name,))
        assert row["status"] == "ok", row["note"]
    assert modes == ["max-autotune-no-cudagraphs"] * len(GPU_PROVIDERS)


def test_rows_of_a_cpu_and_of_a_gpu_stay_apart_in_a_table(cuda, tmp_path):
    path, options = tmp_path / "rows.csv", {"dtypes": ("fp32",), "masks": ("none",)}
    run("codebook_quantize", path, **options, providers=("cu_fast", "torch_fp32"))
    bench.run(bench.Plan("codebook_quantize", providers=("cu_fast",), **TINY | options), path)
    text = bench.markdown(bench.read_rows(path))
    assert "| E, C, k | device |" in text and text.count("| Test GPU |") == text.count("| cpu |") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    with pytest.raises(RuntimeError, match="device is 'cuda', on which nothing can be measured here: "):
        run("codebook_quantize", tmp_path / "rows.csv")
    assert not (tmp_path / "rows.csv").exists()


def test_the_clock_of_other_kernels_has_other_reasons():
    with pytest.raises(RuntimeError, match="nothing can be measured here: no Triton"):
        GraphClock(failure=lambda: "no Triton")
