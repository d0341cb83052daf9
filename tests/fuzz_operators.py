"""Random calls of every operator, compared with the reference bit for bit: python tests/fuzz_operators.py --cases 100000

    CU_FAST_SIMD=avx2 python tests/fuzz_operators.py        another instruction set
    python tests/fuzz_operators.py --tiles                  AMX, emulated where the CPU has none

Sizes are small, with now and then so many codes that the scan guesses its threshold; inputs are those of helpers/hurtful.py.
A case is one call. Not collected by pytest, which has chosen cases for every property.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import hurtful
import tiles
import torch
from calls import call, every_operator

from cu_fast.kernels import native, reference


def sizes(draw: random.Random) -> tuple[int, int, int, int]:
    """T, E, C and k."""
    T = draw.choice((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, draw.randint(1, 140)))
    E = draw.choice((1, 3, 4, 16, 63, 64, 65, 128, draw.randint(1, 260)))
    C = draw.choice((1, 63, 64, 65, 512, draw.randint(1, 1500)))
    if draw.random() < 0.03:
        T, E, C = draw.randint(1, 40), draw.randint(1, 24), draw.randint(12_300, 15_000)
    if draw.random() < 0.02:
        T, E, C = draw.randint(8, 20), 2048 + draw.randint(0, 70), draw.randint(100, 300)
    return T, E, C, draw.randint(1, min(C, draw.choice((1, 8, 40))))


def listed(made) -> list[torch.Tensor]:
    return list(made) if isinstance(made, (tuple, list)) else [made]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN is NaN, whatever its payload."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", action="store_true", help="begin again in an environment with tiles")
    options = parser.parse_args()
    if options.tiles and os.environ.get("CU_FAST_SIMD") != "amx":
        os.execvpe(sys.executable, [sys.executable, *sys.argv], os.environ | tiles.environment("amx"))
    torch.set_num_threads(1)
    cases = wrong = 0
    draw = random.Random(options.seed)
    while cases < options.cases:
        T, E, C, k = sizes(draw)
        how = dict(
            kind=draw.choice(hurtful.KINDS), dtype=draw.choice(hurtful.DTYPES), mask=draw.random() < 0.5,
            layout=draw.choice(("plain", "rows", "columns", "transposed")), scan=draw.random() < 0.8,
            seed=draw.randint(0, 2**30),
        )  # fmt: skip
        for name, given in every_operator(T, E, C, k, **how).items():
            made, wanted = (listed(call(name, **(on | given))) for on in ({}, {"on": reference}))
            cases += 1
            if not all(map(same, made, wanted)):
                wrong += 1
                print(f"differs: {name}, T={T}, E={E}, C={C}, k={k}, {how}", flush=True)
    print(f"{native.simd_level()}: {cases} cases, {wrong} differ; seed {options.seed}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
