"""Memory that one training step of the bottleneck takes beyond what was there before it: python benchmarks/train_memory.py.

Forward, losses and backward, this package against eager PyTorch, each in its own process: the peak of the resident
memory during the step over the resident memory before it (Linux: VmHWM, reset; VmRSS). Parameters and x are there
before, gradients are not. malloc is told to give freed tensors back, so that nothing hides in them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cu_fast.nn import BottleneckConfig, CodebookBottleneck

NAMES = ("eager", "cu_fast")


def eager(bottleneck: CodebookBottleneck, x: Tensor) -> Tensor:
    """CodebookBottleneck's training forward as one would write it: y [T, D], losses in bottleneck.losses."""
    sae, codes, k = bottleneck.autoencoder, bottleneck.codebook.codes, bottleneck.config.k
    z = torch.relu(F.linear(x - sae.b_pre, sae.W_enc, sae.b_enc))
    with torch.no_grad():
        ids = (z @ F.normalize(codes).T).topk(k).indices
    q = F.embedding_bag(ids, codes, mode="sum")
    y = F.linear(q + (z - z.detach()), sae.W_dec, sae.b_dec)
    scale_x, scale_z = x.var(0).mean(), z.detach().var(0).mean()
    bottleneck.losses = {
        "reconstruction": F.mse_loss(y, x) / scale_x,
        "commitment": F.mse_loss(z, q.detach()) / scale_z,
        "codebook": F.mse_loss(q, z.detach()) / scale_z,
        "l1": codes.detach().abs().mean(),
    }
    return y


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, T: int, D: int, E: int, C: int, k: int) -> str:
    """Megabytes beyond the start at the forward's peak, after it, and at the backward's peak; seconds."""
    torch.manual_seed(0)
    for shape in ((64, D, E, 1024, k), (T, D, E, C, k)):  # first small: libraries load
        tokens, d_model, code_dim, num_codes, kept = shape
        bottleneck = CodebookBottleneck(BottleneckConfig(d_model, code_dim, num_codes, kept, normalize=False)).train()
        x, upstream = torch.randn(tokens, d_model), torch.randn(tokens, d_model)
        step = bottleneck if name == "cu_fast" else lambda x, b=bottleneck: eager(b, x)
        reset_peak()
        before, started = status("VmRSS"), time.perf_counter()
        y = step(x)
        forward, between = status("VmHWM"), status("VmRSS")
        reset_peak()
        torch.autograd.backward([y, bottleneck.auxiliary_loss()], [upstream, None])
        backward, seconds = status("VmHWM"), time.perf_counter() - started
        del y, step
    peaks = [(peak - before) / 1e6 for peak in (max(forward, backward), forward, between, backward)]
    return " ".join(f"{value:.1f}" for value in [*peaks, seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for letter, value in (("T", 4096), ("D", 512), ("E", 512), ("C", 65_536), ("k", 8)):
        parser.add_argument(f"-{letter}", type=int, default=value)
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = {letter: getattr(options, letter) for letter in "TDECk"}
    if options.only:
        print(measure(options.only, **shape))
        return
    print(
        ", ".join(f"{letter} = {value}" for letter, value in shape.items()),
        f"; the codes: {shape['C'] * shape['E'] * 4 / 1e6:.0f} MB",
    )
    print(f"{'MB':8} {'peak':>8} {'forward':>8} {'kept':>8} {'backward':>8} {'seconds':>8}")
    peaks = {}
    for name in NAMES:
        arguments = [word for letter, value in shape.items() for word in (f"-{letter}", str(value))]
        done = subprocess.run(
            [sys.executable, __file__, "--only", name, *arguments],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        values = done.stdout.split()
        peaks[name] = float(values[0])
        print(f"{name:8}", *(f"{value:>8}" for value in values))
    print(f"cu_fast / eager: {peaks['cu_fast'] / peaks['eager']:.2f}")


if __name__ == "__main__":
    main()
