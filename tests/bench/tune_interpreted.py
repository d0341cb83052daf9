"""`cu-fast tune` under Triton's interpreter, in a process of its own: TRITON_INTERPRET=1 python tests/tune_interpreted.py ...

tune FOLDER    runs with a stand-in clock, for which the FAVOURITES are fast: what was written, or the error
use            which rows are chosen by the table in force, and what a selection by them does
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import hurtful
import torch
from calls import call, plane_of
from test_bench_gpu import Cuda

from cu_fast.bench import tune, tune_grid
from cu_fast.bench.cells import Cell
from cu_fast.bench.clock_gpu import GraphClock
from cu_fast.bench.tune_grid import Scene
from cu_fast.kernels import reference
from cu_fast.kernels.triton import codebook_quantize, delete_latents, fixed, launch, masked_decode, sae_encode


def quantize(T: int, C: int = 20, k: int = 1, scan: bool = False) -> tuple[Scene]:
    return (Scene(Cell("codebook_quantize", T, 20, C, k, "bf16"), scan),)


def encode(T: int) -> tuple[Scene]:
    return (Scene(Cell("sae_encode", T, 33, 33, 1, "bf16")),)


def decode(D: int) -> tuple[Scene]:
    return (Scene(Cell("masked_decode", 3, D, 40, 3, "bf16")),)


def delete() -> tuple[Scene]:
    return (Scene(Cell("delete_latents", 2, 20, 20, 15, "bf16", "rows")),)


# As those of tune_grid, and tiny; of most kernels one row: interpreting takes long.
SCENES = {
    "score_codes": {"one": quantize(1), "few": (*quantize(2), *quantize(2, k=17))},
    "scan_codes": {"few": quantize(1, scan=True)},  # "many" is seen to by `use`: many tokens take long
    "gather_sum": {"wide": decode(1030)},
    "encode_tile": {"one": encode(1)},
    "fix_rows": {"all": encode(1)},
    "finish": {"large": quantize(1)},
    "add_latents": {"narrow": delete()},
    **{name: {"all": delete()} for name in ("scale_tokens", "score_latents", "dose_latents")},
    **{name: {"all": quantize(1, scan=True)} for name in ("score_candidates", "narrow", "scan_threshold", "scan_rows")},
}
CROSSING = [*quantize(1, scan=True), *quantize(2, 40, scan=True)]
# Of each grid one row, the last that does not ship.
FAVOURITES = {
    (kernel, name): next(row for row in reversed(rows) if row != tune_grid.shipped_row(kernel, name, "sm_80"))
    for kernel, named in tune_grid.GRID.items()
    for name, rows in named.items()
}
GRID = {
    kernel: {name: (FAVOURITES[kernel, name],) for name in named} for kernel, named in SCENES.items()
}  # fmt: skip
started = []


def watch() -> None:
    """Note what is started."""
    for module in (codebook_quantize, delete_latents, fixed, masked_decode, sae_encode):

        def start(kernel, programs, config, begin=module.start, **arguments):
            started.append((kernel.__name__, config))
            begin(kernel, programs, config, **arguments)

        module.start = start


def cut_as(config: launch.Config, row: launch.Config) -> bool:
    """Whether a kernel was started with a row; score_codes has its list besides."""
    return config._replace(blocks=config.blocks[: len(row.blocks)]) == row


class Clock:
    """Has the methods of GraphClock. A call takes 50 us, and 1 us less for each favourite that it starts."""

    device = "Test GPU"

    def __init__(self, slow: str | None, captures: bool) -> None:
        self.seconds, self.slow, self.captures = {}, slow, captures

    def place(self, inputs):
        started.clear()
        return inputs

    def wait(self):
        pass

    def prepare(self, job, output):
        favourites = [(kernel, row) for (kernel, _), row in FAVOURITES.items() if kernel != self.slow]
        found = sum(
            any(kernel == name and cut_as(config, row) for name, config in started) for kernel, row in favourites
        )
        self.seconds[job.call] = 1e-6 * (50 - found)
        started.clear()
        if not self.captures:
            job.note = "launched eagerly, not captured: it waits"
        return job, output

    def time(self, job):
        return self.seconds[job.call]

    def turn(self, job, cache, usual):
        assert cache == "cold" and usual == self.time(job)
        return [self.time(job)]


def measure(file: Path, slow: str | None = None, captures: bool = True, budget: float = 1e6) -> dict | str:
    """What was written, or the error."""
    try:
        return tune.run(file, budget, clock=Clock(slow, captures))
    except RuntimeError as error:
        return f"{error}; {file.name} {'exists' if file.exists() else 'is not there'}"


def tuned(folder: Path) -> dict:
    """Runs of cu_fast.bench.tune: one of everything, and others in which something goes wrong."""
    tune_grid.GRID, tune.SCENES, tune.CROSSING, tune.SECONDS, tune.ROUNDS = GRID, SCENES, CROSSING, 1e-9, 1
    watch()
    tune.proofs = lambda *asked: tune_grid.proofs(*asked)[:1]
    runs = {"all": measure(folder / "all.json", slow="finish")}
    runs["no time"] = measure(folder / "none.json", budget=1e-9)
    tune.CROSSING = CROSSING[:1]
    tune.SCENES = {"encode_tile": SCENES["encode_tile"]}
    runs["not captured"] = measure(folder / "none.json", captures=False)
    runs["graphs"] = tune.run(folder / "graphs.json", clock=GraphClock(Cuda(), "cpu"))
    tune.SCENES, clock = {"gather_sum": {"narrow": decode(33), "wide": decode(1030)}}, iter([0, 5, 20, 20])
    GRID["gather_sum"]["narrow"] = (FAVOURITES["gather_sum", "narrow"],)
    tune.time = SimpleNamespace(perf_counter=lambda: next(clock), strftime=time.strftime)
    runs["little time"] = measure(folder / "little.json", budget=10)
    tune.time = time

    begin, favourite = codebook_quantize.start, FAVOURITES["score_codes", "one"]
    tune.SCENES, tune.proofs = {"score_codes": {"one": quantize(1, C=65)}}, tune_grid.proofs

    def start(kernel, programs, config, **arguments):
        if kernel.__name__ == "score_codes" and cut_as(config, favourite) and faults[name](config, arguments):
            arguments["factor"] = arguments["factor"] + 1
        begin(kernel, programs, config, **arguments)

    def too_large(config, arguments):
        if config.block("K") == 64:
            raise RuntimeError("out of resource: shared memory\nmore")

    codebook_quantize.start = start
    faults = {
        "other bits": lambda config, arguments: True,
        "other bits with masks": lambda config, arguments: arguments["mask_table"] is not None,
        "too large": too_large,
    }
    for name in faults:
        runs[name] = measure(folder / "fault.json")
    return runs


def use() -> dict:
    """What a process does that finds a table: its choices, what a selection starts, and whether it is the reference's."""
    rows = {
        f"{kernel} {name}": repr(launch.choose(kernel, "sm_80", *shape))
        for kernel, shapes in SHAPES.items()
        for name, shape in shapes.items()
    }
    watch()
    same = []
    for T, scan in ((2, True), (2, False), (17, True)):
        z, codes = (hurtful.matrix(n, 64, kind, torch.bfloat16, n) for n, kind in ((T, "outliers"), (90, "gaussian")))
        if T == 17:
            table = launch.in_force("sm_80")
            launch.IN_FORCE["sm_80"] = table._replace(
                rows=table.rows
                | {"scan_codes": table.rows["scan_codes"] | {"many sm_80": FAVOURITES["scan_codes", "many"]}}
            )
        given = dict(z=z, codes=codes, k=5, mask=hurtful.masks(T, 90, 0.3, 3), return_hits=True)
        given["scan"] = plane_of(codes, on=reference) if scan else None
        got, want = (call("codebook_quantize", on=each, **given) for each in (torch.ops.cu_fast_triton, reference))
        same.append(all(map(hurtful.equal, got, want)))
    tuning = {name: getattr(launch.tuning_of("sm_80"), name) for name in launch.MEASURED}
    kept = {(name, repr(config)) for name, config in started}
    return {"rows": rows, "tuning": tuning, "same": same, "started": sorted(kept)}


# T, E, C, k for a name of a kernel.
SHAPES = {
    "score_codes": {"one": (1, 512, 25_000, 8), "few": (4, 512, 25_000, 8)},
    "encode_tile": {"one": (1, 512, 25_000, 8)},
    "scan_codes": {"few": (8, 512, 25_000, 8)},
    "gather_sum": {"wide": (8, 4096, 25_000, 8)},
    "finish": {"large": (1, 512, 25_000, 8)},
    "add_latents": {"narrow": (64, 512, 25_000, 8)},
    **{name: {"all": (64, 512, 25_000, 8)} for name in ("score_candidates", "narrow", "scan_threshold", "scan_rows")},
    **{name: {"all": (64, 512, 25_000, 8)} for name in ("fix_rows", "scale_tokens", "score_latents", "dose_latents")},
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    print(json.dumps(use() if sys.argv[1] == "use" else tuned(Path(sys.argv[2]))))
