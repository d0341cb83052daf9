"""The cells that are measured on a GPU, the most telling first, until the time is used: python benchmarks/gpu_cells.py.

Rows go to <output>/<card>.csv, cell by cell; the tables are printed, each part after it was measured. Exit status 1 if
an answer of this package was wrong or not that of the CPU, bit for bit, or if it could not be measured.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import rivals
import torch

from cu_fast import bench
from cu_fast.bench.providers import PROVIDERS

rivals.register()

LARGE, WIDE, SMALL = (2048, 65_536, 64), (512, 65_536, 64), (768, 10_000, 8)
GEMMA = ((2304, 16_384, 20), (2304, 16_384, 345))
NARROW = ((512, 25_000, 8), (512, 25_000, 64))
# Compiling takes most of a minute, and so may what Triton compiles: both have parts of their own.
COMPILED = ("cu_fast", "torch_bf16", "torch_compile_bf16")
TRITON = ("cu_fast", "cu_fast_triton", "torch_bf16")
EAGER = {
    op: tuple(name for name in known if "compile" not in name and "triton" not in name)
    for op, known in PROVIDERS["cuda"].items()
}


def plan(op: str, tokens: tuple[int, ...], *shapes: tuple[int, int, int], **options: Any) -> bench.Plan:
    options = {"dtypes": ("bf16",), "masks": ("none",), "providers": EAGER[op], "seconds": 0.15} | options
    return bench.Plan(op, tokens=tokens, shapes=shapes, device="cuda", **options)


def plans() -> list[bench.Plan]:
    return [
        plan("codebook_quantize", (1, 16), LARGE, masks=("none", "50%")),
        plan("bottleneck", (1,), SMALL),
        plan("codebook_quantize", (2048,), LARGE),
        plan("codebook_quantize", (2048,), WIDE),
        plan("codebook_quantize", (2048, 16), LARGE, providers=TRITON),
        plan("bottleneck", (1,), SMALL, providers=TRITON),
        plan("codebook_quantize", (1, 8, 64, 512), *NARROW),
        plan("masked_decode", (1, 64, 2048), SMALL, LARGE),
        plan("codebook_quantize", (2048,), LARGE, masks=("50%", "rows")),
        plan("bottleneck", (1,), SMALL, providers=COMPILED),
        plan("codebook_quantize", (1, 16), LARGE, cache="warm"),
        plan("bottleneck", (1, 16, 256), SMALL, cache="warm"),
        plan("codebook_quantize", (1,), LARGE, providers=COMPILED),
        plan("bottleneck", (16, 256, 2048), SMALL),
        plan("codebook_quantize", (64, 256), LARGE),
        plan("codebook_quantize", (1, 64, 512), *NARROW, dtypes=("fp32",)),
        plan("sae_encode_topk", (1, 64, 2048), (768, 24_576, 32)),
        plan("sae_encode", (1, 64, 2048), (2048, 2048, 1)),
        plan("delete_latents", (1, 64, 2048), *GEMMA, masks=("one", "rows")),
        plan("codebook_quantize", (512,), NARROW[0], data=("outliers", "clusters20", "equal")),
        plan("codebook_quantize", (2048,), LARGE, providers=COMPILED),
        plan("masked_decode", (2048,), LARGE, providers=TRITON),
        plan("sae_encode", (1, 2048), (2048, 2048, 1), providers=TRITON),
        plan("sae_encode_topk", (64,), (768, 24_576, 32), providers=TRITON),
        plan("delete_latents", (1, 64), GEMMA[1], masks=("rows",), providers=TRITON),
    ]


def wrong(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of this package, None where nothing is."""
    if not row["kernel_provider"].startswith("cu_fast"):
        return None
    if row["status"] != "ok":
        return f"{row['status']}: {row['note']}"
    if row["match"] != 1.0 or row["identical"] != 1.0:
        return f"right in {row['match']} of the rows, identical to the CPU's in {row['identical']}"
    return "launched eagerly: " + row["note"] if "not captured" in row["note"] else None


def measure(wanted: list[bench.Plan], path: Path, end: float) -> list[str]:
    """Measure plan by plan until the time is used; returns what was wrong."""
    faults = []
    for number, one in enumerate(wanted):
        if time.monotonic() >= end:
            print(f"not run, the time is used: {len(wanted) - number} of {len(wanted)} parts")
            break
        start = time.monotonic()
        rows = bench.run(one, path)
        print(f"{bench.markdown(rows)}\n\n{time.monotonic() - start:.1f} s\n", flush=True)
        for row in rows:
            if fault := wrong(row):
                cell = f"{row['kernel_name']} {row['kernel_provider']} T={row['x_value']} {bench.config(row)}"
                faults.append(f"{cell}: {fault}")
                print(f"wrong: {faults[-1]}\n", flush=True)
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="folder of the CSV file")
    parser.add_argument("--budget", type=float, default=300, help="seconds, looked at between parts")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    faults = measure(plans(), options.output / f"{card}.csv", end)
    print(f"{len(faults)} rows of this package are wrong")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
