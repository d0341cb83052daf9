"""The cases of triton_interpreted.py and triton_gradients.py on a GPU: every path of every Triton kernel.

Skipped without one; see docs/gpu.md. CU_FAST_TEST_GPU_ON=cpu runs them under the interpreter (gpu_examples.py).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import gpu_examples as gpu
import pytest
import triton_gradients
import triton_interpreted

pytestmark = pytest.mark.skipif(gpu.why_not("triton") is not None, reason=str(gpu.why_not("triton")))

# What Triton compiles for the first time takes a second or two, and the cases have more than a hundred such kernels.
PROCESSES = min(4, os.cpu_count() or 1)  # for each of MODULES
MODULES = (triton_interpreted, triton_gradients)


@functools.cache
def failures() -> dict[str, str | None]:
    """What each case failed with, None where it passed; cases that a process did not come to are missing."""
    started = [
        subprocess.Popen(
            [sys.executable, module.__file__, *list(module.CASES)[first::PROCESSES]], stdout=subprocess.PIPE, text=True
        )
        for module in MODULES
        for first in range(PROCESSES)
    ]
    found = [json.loads(line) for process in started for line in process.communicate()[0].splitlines()]
    return {line["case"]: line["failure"] for line in found if "case" in line}


@pytest.mark.parametrize("name", [name for module in MODULES for name in module.CASES])
def test_equals_the_reference(name):
    failure = failures().get(name, "its process ended before")
    assert failure is None, failure
