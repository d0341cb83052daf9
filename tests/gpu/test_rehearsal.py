"""The GPU's tests on the CPU's kernels: that they hold together, before a machine with a GPU has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import heavy

HERE = Path(__file__).parent


@heavy
@pytest.mark.parametrize("name", ["test_gpu.py", "test_gpu_use.py"])
def test_on_the_cpu(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    environment = os.environ | {"CU_FAST_TEST_GPU_ON": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > {"test_gpu.py": 150, "test_gpu_use.py": 20}[name]
