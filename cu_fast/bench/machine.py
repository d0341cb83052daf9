"""What the benchmark ran on, and the machine's ceilings, measured there. Part of ``cu_fast.bench``."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from cu_fast import __version__
from cu_fast.bench.cells import Cell
from cu_fast.kernels import native

PACKAGES = ("torch", "triton", "faiss-cpu", "transformers")
CEILINGS = ("int8_gops", "fp32_gflops", "memory_gb_per_s", "l3_gb_per_s")
COLUMNS = (
    *CEILINGS, "cpu_name", "simd", "threads", "cu_fast_version", "commit",
    *(f"{name.replace('-', '_')}_version" for name in PACKAGES),
)  # fmt: skip
L3_PLANE = 24e6  # bytes: an int8 plane below this is taken to be read from L3
L3_READ = 12 * 2**20
MEMORY_READ = 2**29
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CACHE = 64 * 2**20  # bytes of the last-level cache, where the system does not say
REPEATS = 9  # a ceiling is the best of so many calls
SHORTEST = 0.02  # seconds that a call of a ceiling should take


def facts(device: str = "cpu") -> dict[str, Any]:
    """What every row says of the machine, with the keys COLUMNS. Measures the CPU's ceilings with torch's threads."""
    return {
        **(ceilings() if device == "cpu" else dict.fromkeys(CEILINGS, "")),
        "cpu_name": _cpu_name(),
        "simd": native.simd_level() if native.available() else "",
        "threads": torch.get_num_threads(),
        "cu_fast_version": __version__,
        "commit": _commit(),
        **{f"{name.replace('-', '_')}_version": _version(name) for name in PACKAGES},
    }


def ceilings() -> dict[str, float | str]:
    """Peaks in 10^9 operations (2 per multiply-add) or bytes per second, "" where they cannot be measured."""
    if not native.available():
        return dict.fromkeys(CEILINGS, "")
    rates = (_peak("int8"), _peak("fp32"), _read(MEMORY_READ), _read(L3_READ))
    return {name: float(f"{rate:.4g}") for name, rate in zip(CEILINGS, rates)}


def _peak(kind: str) -> float:
    size = 10_000
    while True:
        start = time.perf_counter()
        torch.ops.cu_fast.peak(kind, size)
        if time.perf_counter() - start >= SHORTEST:
            return _rate(torch.ops.cu_fast.peak, kind, size)
        size *= 2


def _read(size: int) -> float:
    return _rate(torch.ops.cu_fast.peak_read, torch.ones(size // 4, dtype=torch.int32))


def _rate(work, *args) -> float:
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        done = work(*args)
        best = max(best, done / (time.perf_counter() - start))
    return best / 1e9


def largest_cache() -> int:
    """Bytes of the CPU's last-level cache; CACHE where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((1024 * int(size.removesuffix("K")) for size in sizes), default=CACHE)


def of_ceiling(cell: Cell, milliseconds: float, facts: dict[str, Any], cache: str = "warm") -> float | str:
    """What share of the machine an int8 scan of all codes in this time would use, "" where there is none.

    The larger of two: 2 T E C operations at the int8 peak, and C E bytes, read once, from L3 or, if they do not fit
    there or caches are cold, from memory.
    """
    if cell.op not in ("codebook_quantize", "sae_encode_topk") or facts["int8_gops"] == "":
        return ""
    plane = cell.C * cell.E
    bandwidth = facts["l3_gb_per_s" if plane < L3_PLANE and cache == "warm" else "memory_gb_per_s"]
    least = max(2 * cell.T * plane / facts["int8_gops"], plane / bandwidth) / 1e6
    return least / milliseconds


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    """The checkout's commit, "-dirty" where files differ from it; "" outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        tracked = subprocess.run([*git[:3], "ls-files", "--error-unmatch", __file__], capture_output=True)
        found = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if tracked.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
