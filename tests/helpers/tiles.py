"""Environments in which the CPU kernels use an instruction set: environment("amx") for a subprocess.

On a machine without matrix tiles their instructions are emulated (tiles.cpp), one by one: exact, and a thousand times slower.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
LEVELS = ("scalar", "avx2", "avx512", "amx", "neon")


@functools.cache
def emulator() -> Path:
    """The library that a process has to load before cu_fast. Built where the source is newer."""
    library = Path(__file__).parents[2] / "build/tiles/libtiles.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
            compiler = os.environ.get("CXX") or "g++"
            flags = "-O3 -mavx2 -std=c++20 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror".split()
            subprocess.run([*compiler.split(), *flags, str(SOURCE), "-o", str(library)], check=True)
    return library


def environment(level: str) -> dict[str, str]:
    """Variables to add to those of a process that is to use the level."""
    variables = {"CU_FAST_SIMD": level}
    if level == "amx" and platform.machine() == "x86_64" and "amx_int8" not in Path("/proc/cpuinfo").read_text():
        variables["LD_PRELOAD"] = str(emulator())
    return variables
