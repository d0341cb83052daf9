"""The tests of the operators' bits again, in a process of its own for each instruction set."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiles import environment

from cu_fast.kernels import native
from cu_fast.kernels.operators import OPERATORS

HERE = Path(__file__).parent
FILES = [path for name in (*OPERATORS, "scan", "scan_bounds") if (path := HERE / f"test_{name}.py").exists()]
TESTS = "cpu_equals_reference or TestNoSlackIsLeftOver or TestHurtfulInputs or batch"
# Of the machine, each better than those before it.
LEVELS = ["scalar", "neon"] if platform.machine() == "aarch64" else ["scalar", "avx2", "avx512", "amx"]


@pytest.mark.parametrize("level", LEVELS)
def test_equals_the_reference(level):
    if native.simd_level() == level:
        pytest.skip("the level of this run, which runs them itself")
    # Tiles are emulated where there are none, beside the rest of AVX-512.
    best = LEVELS.index(native.simd_level())
    if LEVELS.index(level) > best + (level == "amx"):
        pytest.skip(f"this machine has no {level}")
    assert len(FILES) >= 5
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS]
    done = subprocess.run(
        [*command, *map(str, FILES)],
        env=os.environ | environment(level), cwd=HERE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 150
