"""Another thread writes to an operator's arguments while the operator runs: an error or odd numbers, never a crash."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from tiers import TEST_ALL, heavies

RACE = """
import sys, threading, time
import torch
from calls import call
from cu_fast import ops
from cu_fast.nn import autograd

sys.setswitchinterval(1e-5)
torch.set_num_threads(1)
T, E, C, k = 512, 64, 4096, 8
rng = torch.Generator().manual_seed(0)
codes = torch.randn(C, E, generator=rng)
packed = ops.pack_codes(codes, "cosine", scan="int8")
z = torch.randn(T, E, generator=rng)
weights = torch.rand(T, k, generator=rng)
ids = torch.randint(C, (T, k), generator=rng, dtype=torch.int32)
table = torch.randint(-(2**31), 2**31 - 1, (4, C // 32), generator=rng, dtype=torch.int64).int()
row = torch.randint(4, (T,), generator=rng, dtype=torch.int32)
given = dict(digits=packed.digits, factor=packed.factor, k=k, mask=(table, row))
scanned = dict(scan=packed.scan)


def bottleneck(reselect):
    call("codebook_bottleneck", x=z, table=codes, reselect=reselect, score_weights=True, **scanned, **given)


CASES = {
    "masked_decode": lambda: call("masked_decode", ids=ids, weights=weights, table=codes, mask=(table, row)),
    "codebook_quantize": lambda: call("codebook_quantize", z=z, return_hits=True, **scanned, **given),
    "every code scored": lambda: call("codebook_quantize", z=z, return_hits=True, **given),
    "sae_encode_topk": lambda: call("sae_encode_topk", x=z, W_digits=packed.digits, W_factor=packed.factor, k=k, mask=(table, row), relu=True),
    "ablate": lambda: bottleneck(False),
    "reselect": lambda: bottleneck(True),
    "gather_sum": lambda: autograd.gather_sum(ids, weights, codes),
    "gather_dot": lambda: autograd.gather_dot(ids, z, codes),
    "scatter_sum": lambda: autograd.scatter_sum(ids, weights, z, C),
}
ARGUMENTS = {
    "ids": (ids, 2**30), "mask_row": (row, 2**30), "mask_table": (table, -1), "weights": (weights, float("nan")),
    "z": (z, float("inf")), "scan_terms": (packed.scan.terms, float("nan")),
}


def race(run, tensor, wild):
    # How many calls refused what they saw, while another thread writes to the tensor.
    good, over = tensor.clone(), threading.Event()

    def write():
        while not over.is_set():
            tensor.fill_(wild)
            tensor.copy_(good)

    writer = threading.Thread(target=write)
    writer.start()
    refused, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        try:
            run()
        except (ValueError, RuntimeError, IndexError):
            refused += 1
    over.set()
    writer.join()
    tensor.copy_(good)
    return refused


argument, *cases = sys.argv[1:]
for case in cases:
    print(case, end=": ", flush=True)
    print(race(CASES[case], *ARGUMENTS[argument]), flush=True)
"""


def refused(argument: str, cases: list[str]) -> dict[str, int]:
    """How many calls refused what they saw, case by case, in a process that must live."""
    done = subprocess.run([sys.executable, "-c", RACE, argument, *cases], capture_output=True, text=True, timeout=300)
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr
    assert done.returncode == 0, f"{ended} after {done.stdout!r}"
    return {case: int(count) for case, count in (line.split(": ") for line in done.stdout.splitlines())}


SELECTIONS = ["codebook_quantize", "every code scored", "sae_encode_topk", "reselect"]
# A process and a second for each.
INDICES = [("ids", ["masked_decode"]), ("mask_row", ["masked_decode", "codebook_quantize"])]
NUMBERS = heavies(
    ("z", ["codebook_quantize", "every code scored"]), ("scan_terms", ["codebook_quantize"]), ("weights", ["masked_decode"]),
    ("mask_table", ["codebook_quantize", "masked_decode"]),
)  # fmt: skip
if TEST_ALL:
    INDICES += [("ids", ["gather_sum", "gather_dot", "scatter_sum"]), ("mask_row", ["ablate", *SELECTIONS])]


@pytest.mark.parametrize(("argument", "cases"), INDICES)
def test_an_index_written_during_a_call_is_refused_or_not_seen(argument, cases):
    counts = refused(argument, cases)
    assert all(counts[case] > 0 for case in cases), counts  # the wild value was there to be read


@pytest.mark.parametrize(("argument", "cases"), NUMBERS)
def test_a_number_written_during_a_call_does_no_harm(argument, cases):
    counts = refused(argument, cases)
    assert all(counts[case] == 0 for case in cases), counts
