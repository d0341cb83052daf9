"""The native library: loads it, says why it cannot be loaded, and registers the fakes of its operators.

Importing this module loads ``cu_fast/_C.abi3.so``, which registers ``torch.ops.cu_fast.*``; ``csrc/ops.cpp`` lists
them. A library that is missing or broken is not an error here: :func:`failure` holds the reason.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cu_fast.kernels.operators import OPERATORS

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def load(library: Path) -> str | None:
    """Load a native library. Returns the reason why it cannot be used, None where it can."""
    if not library.exists():
        return (
            f"the native library {library} was not built; install a C++20 compiler (g++ >= 12 or clang), then "
            "install cu-fast again into this environment (pip install --force-reinstall --no-deps)"
        )
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the native library {library} cannot be loaded into torch {torch.__version__}: {error}"
    return None


_failure = load(LIBRARY)


def available() -> bool:
    """Whether the native operators exist: the library was loaded."""
    return _failure is None


def failure() -> str | None:
    """Why the native library was not loaded, in a sentence; None where it was."""
    return _failure


def simd_level() -> str:
    """The instruction set that the CPU kernels use: "scalar", "avx2", "avx512", "amx" or "neon".

    The best of the machine, or the one that ``CU_FAST_SIMD`` named when the library was loaded.

    Raises:
        RuntimeError: there is no library (see :func:`failure`), or CU_FAST_SIMD names a level that does not exist
            or that the machine lacks.
    """
    if _failure is not None:
        raise RuntimeError(_failure)
    return torch.ops.cu_fast.simd_level()


def cuda_build() -> str:
    """The GPUs that the library holds code for, in the notation of CU_FAST_ARCHS (sources.py): "80;90a;PTX 90".

    "" where there is no library, or where it was built without CUDA.
    """
    return torch.ops.cu_fast.cuda_build() if _failure is None else ""


def cuda_failure(device: torch.device | int | None = None) -> str | None:
    """Why the CUDA kernels cannot be used on a device, in a sentence; None where they can.

    Initialises CUDA, once the library and torch are found to be built for it.

    Args:
        device: None = the current one.
    """
    if _failure is not None:
        return _failure
    if torch.version.hip is not None:
        return f"torch {torch.__version__} was built for AMD GPUs, the CUDA kernels are for NVIDIA's"
    built = cuda_build()
    if not built:
        return (
            f"the native library {LIBRARY} was built without CUDA; install the CUDA toolkit (nvcc), then install "
            "cu-fast again from its sources with CU_FAST_CUDA=1, which makes what is missing an error"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch >= 2.11"
    if not torch.cuda.is_available():
        return (
            "torch.cuda.is_available() is False; check with nvidia-smi, and CUDA_VISIBLE_DEVICES, that there is a GPU, "
            f"and that its driver is new enough for torch's CUDA {torch.version.cuda}"
        )
    if old := torch.ops.cu_fast.cuda_driver_failure():
        return old
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(arch, *capability) for arch in built.split(";")):
        return None
    gpu = f"the GPU {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"{gpu}, the CUDA kernels need 8.0 or newer; move the tensors to the CPU or to a newer GPU"
    own = f"{capability[0]}{capability[1]}"
    return f"{gpu}, the native library was built for {built}; install cu-fast again with CU_FAST_ARCHS='{built};{own}'"


def _runs(arch: str, major: int, minor: int) -> bool:
    # Whether an entry of cuda_build() runs on a GPU. An entry names a compute capability: PTX runs on it and on every
    # newer one, code on it and on newer minor versions, code with the suffix "a" on it alone.
    ptx, number, suffix = re.fullmatch(r"(PTX )?(\d+)([af]?)", arch).groups()
    have, want = divmod(int(number), 10), (major, minor)
    if suffix == "a":
        return have == want
    return have <= want and (ptx is not None or have[0] == major)


if _failure is None:
    for _operator in OPERATORS.values():
        _operator.register_fake("cu_fast")
