"""The operators as Triton kernels: the same bits on GPUs that the native library holds no code for, AMD's too.

The operators are declared in ``operators.py`` and registered as ``torch.ops.cu_fast_triton.*`` when this package is
imported; each file's function takes one argument, which has the operator's arguments by name. gather_dot and
scatter_sum are needed in training alone: the native library lacks them, ``nn/autograd.py`` registers them, and their
functions take its arguments. Triton itself is imported by the first call; :func:`failure` says why the kernels cannot
run on a device. Which tiles a kernel is cut into: ``launch.py``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable

import torch

from cu_fast.kernels.operators import OPERATORS

HOME = {  # operator -> its file
    "codebook_quantize": "codebook_quantize",
    "sae_encode": "sae_encode",
    "sae_encode_topk": "sae_encode",
    "masked_decode": "masked_decode",
    "codebook_bottleneck": "codebook_bottleneck",
    "delete_latents": "delete_latents",
}


def operator(name: str) -> torch._ops.OpOverload:
    """A registered operator by its name. Its first call imports Triton: check :func:`failure` before."""
    return getattr(torch.ops.cu_fast_triton, name).default


@functools.cache
def launcher(name: str) -> Callable:
    """The function that starts an operator's kernels, or those of gather_dot or scatter_sum; it imports Triton."""
    return getattr(importlib.import_module(f"cu_fast.kernels.triton.{HOME.get(name, name)}"), name)


def _register() -> torch.library.Library:
    # Not by torch.library.custom_op, which takes longer to call.
    library = torch.library.Library("cu_fast_triton", "DEF")
    for name in HOME:
        operator = OPERATORS[name]
        library.define(operator.schema)
        for device in ("CPU", "CUDA"):  # "CPU" for Triton's interpreter; AMD GPUs are "CUDA" too
            library.impl(name, operator.takes_named(lambda a, name=name: launcher(name)(a)), device)
        operator.register_fake("cu_fast_triton", library)
    return library


_library = _register()  # torch removes the operators when this object is freed


def failure(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, in a sentence; None if they can."""
    device = torch.device(device)
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if version(triton.__version__) < (3, 6):
        return f"triton {triton.__version__} is installed, the kernels need 3.6 or newer; pip install -U triton"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton has no CPU kernels; move the tensors to a GPU, or set TRITON_INTERPRET=1 to try them slowly"
    if device.type != "cuda":
        return f"Triton has no kernels for {device.type}; move the tensors to an NVIDIA or AMD GPU"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False; check with nvidia-smi or rocm-smi that there is a GPU"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(device)
            return f"{name} has compute capability {capability[0]}.{capability[1]}, the Triton kernels need 8.0"
        if capability >= (10, 0) and version(triton.__version__) < (3, 7):
            # Its ptxas, of CUDA 12.9, fuses pairs of products and sums there despite --fmad=false.
            return (
                f"triton {triton.__version__} computes other scores on this GPU; pip install -U triton (3.7 or newer)"
            )
    return None


def version(text: str) -> tuple[int, int]:
    """Major and minor number of a version: (3, 9) for "3.9.0+git1234"."""
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))
