"""The tests of the operators' bits again, in a process of its own for each instruction set."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import TEST_ALL, heavy
from tiles import environment

from cu_fast.kernels import native
from cu_fast.kernels.operators import OPERATORS

HERE = Path(__file__).parent
FILES = [path for name in (*OPERATORS, "scan", "scan_bounds") if (path := HERE / f"test_{name}.py").exists()]
BOUNDS = "TestNoSlackIsLeftOver"
TESTS = f"cpu_equals_reference or {BOUNDS} or TestHurtfulInputs or batch"
# By `make test-all`: no level has code of its own for what these tests add to the others.
ALIKE = "a_sample_that_lies or blocks_of_wide_rows or width_of_a_model or buffers_overflow or masks_of_ranges"
# Of the machine, each better than those before it.
LEVELS = ["scalar", "neon"] if platform.machine() == "aarch64" else ["scalar", "avx2", "avx512", "amx"]


# For `make test` the bound that emulated tiles can do: test_native.py has a digest of every operator's results at each level.
@pytest.mark.parametrize("level", [pytest.param(level, marks=[] if level == "amx" else heavy) for level in LEVELS])
def test_equals_the_reference(level):
    if native.simd_level() == level:
        pytest.skip("the level of this run, which runs them itself")
    # Tiles are emulated where there are none, beside the rest of AVX-512.
    best = LEVELS.index(native.simd_level())
    if LEVELS.index(level) > best + (level == "amx"):
        pytest.skip(f"this machine has no {level}")
    # Emulated tiles take minutes for all of them; test_native.py has a digest of every operator's results for them.
    if level == "amx" and not TEST_ALL:
        run(level, HERE / "test_scan_bounds.py", tests=BOUNDS, least=40)
    else:
        run(level, *FILES, tests=TESTS if TEST_ALL else f"({TESTS}) and not ({ALIKE})", least=200)


def run(level: str, *files: Path, tests: str, least: int) -> None:
    # faulthandler would take the signal with which tiles are emulated.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", tests]
    done = subprocess.run(
        [*command, *map(str, files)], env=os.environ | environment(level), cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least
