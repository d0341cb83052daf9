"""The GPU's tests on the CPU's kernels: that they hold together, before a machine with a GPU has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_examples
import gpu_small
import pytest
import torch
from tiers import heavy

from cu_fast.kernels import native

HERE = Path(__file__).parent


@heavy
@pytest.mark.parametrize("name", ["test_gpu.py", "test_gpu_use.py"])
def test_on_the_cpu(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    environment = os.environ | {"CU_FAST_TEST_GPU_ON": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > {"test_gpu.py": 150, "test_gpu_use.py": 20}[name]


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
@pytest.mark.parametrize(
    "card", [(132, 9, 0), (108, 8, 0), (82, 8, 6), (128, 8, 9), (148, 10, 0), (148, 10, 3), (170, 12, 0)]
)
def test_small_selections_are_scanned_on_every_card(card):
    """They take every width of scan_codes, and stay small enough for compute-sanitizer."""
    widths = set()
    for T, E, C, k, *_, scans in gpu_small.SELECTIONS:
        if scans:
            more = gpu_examples.codes_that_scan(T, E, k, C, card)
            plan = torch.ops.cu_fast.cuda_selection_plan(T, more, E, k, True, *card)
            assert plan.startswith("int8 scan") and more * E < 2.5e8
            widths.add(next(width for width in (4, 8, 32, 64) if T <= width or width == 64))
    assert widths == {4, 8, 32, 64}
