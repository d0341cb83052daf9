"""Which implementation runs: what ``impl=`` means on a device, and why another one does not. Part of ``cu_fast.ops``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from cu_fast.kernels import native, reference, triton

logger = logging.getLogger("cu_fast")

# The kernels that "auto" takes, by device, the first that can run. Not Triton's on a CPU, where they are interpreted.
BY_DEVICE = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("cuda", "triton")}


def available_impls() -> dict[str, str | None]:
    """Every implementation and why it cannot run here, None where it can."""
    return {
        "reference": None,
        "cpu": native.failure(),
        "cuda": native.cuda_failure(),
        "triton": triton.failure(torch.device("cuda")),
    }


def resolve(impl: str, device: torch.device) -> str:
    """The implementation that ``impl`` means for tensors on ``device``.

    Raises:
        ValueError: an unknown name. RuntimeError: an explicit choice that cannot run, with the reason.
    """
    if impl == "auto":
        return _auto(device.type, device.index)
    if impl == "reference":
        return impl
    if impl not in ("cpu", "cuda", "triton"):
        raise ValueError(f"impl is {impl!r}; it should be 'auto', 'reference', 'cpu', 'cuda' or 'triton'")
    reason = _explicit_failure(impl, device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} is not available: {reason}")
    if impl != "triton" and device.type not in (impl, "meta"):
        raise RuntimeError(
            f"impl={impl!r} needs {impl.upper()} tensors, these are on {device}; move them, or use 'auto'"
        )
    return impl


@functools.cache
def failure(impl: str, device: torch.device) -> str | None:
    """Why the kernels of "cpu", "cuda" or "triton" cannot run, None where they can. Asked once a device."""
    if impl == "triton":
        return triton.failure(device)
    if impl == "cpu":
        return native.failure()
    return native.cuda_failure(device if device.type == "cuda" else None)


# torch.compile takes the answers as constants.
@torch.compiler.assume_constant_result
def _explicit_failure(impl: str, device_type: str, index: int | None) -> str | None:
    return failure(impl, torch.device(device_type, index))


@torch.compiler.assume_constant_result
def _auto(device_type: str, index: int | None) -> str:
    return _announced(device_type, index)


@functools.cache
def _announced(device_type: str, index: int | None) -> str:
    impl, reason = kernels(torch.device(device_type, index))
    if impl is None:
        why = reason or "there are no kernels for it"
        logger.warning("on %s: impl 'reference', exact but slow, because %s", device_type, why)
        return "reference"
    what = native.simd_level() if impl == "cpu" else torch.cuda.get_device_name(index)
    logger.info("on %s: impl %r (%s)%s", device_type, impl, what, f", because {reason}" if reason else "")
    return impl


def kernels(device: torch.device) -> tuple[str | None, str]:
    """The kernels that "auto" takes on a device, None where it takes none; and why those before them cannot run, or ""."""
    reasons = []
    for impl in BY_DEVICE.get(device.type, ()):
        reason = failure(impl, device)
        if reason is None:
            return impl, "; ".join(reasons)
        reasons.append(f"{impl!r} cannot run: {reason}")
    return None, "; ".join(reasons)


def choose(op: str, impl: str, device: torch.device) -> Callable[..., Any]:
    """What runs an operator of ``kernels/operators.py``: each implementation takes the same arguments."""
    chosen = resolve(impl, device)
    if chosen == "reference":
        return getattr(reference, op)
    return triton.operator(op) if chosen == "triton" else getattr(torch.ops.cu_fast, op)
