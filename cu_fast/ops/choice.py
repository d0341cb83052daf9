"""Which implementation runs: what ``impl=`` means on a device, and why another one does not. Part of ``cu_fast.ops``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from cu_fast.kernels import native, reference, triton
from cu_fast.ops.checks import check_choice

logger = logging.getLogger("cu_fast")

Impl = Literal["auto", "reference", "cpu", "cuda", "triton"]
IMPLS = get_args(Impl)

# Per device the kernels that "auto" tries, in order. Not Triton's on a CPU, where they are interpreted.
BY_DEVICE = {"cpu": ("cpu",), "meta": ("cpu",), "cuda": ("cuda", "triton")}


def available_impls() -> dict[str, str | None]:
    """Every implementation's name, with the reason why it cannot run on this machine, None where it can."""
    return {
        "reference": None,
        "cpu": native.failure(),
        "cuda": native.cuda_failure(),
        "triton": triton.failure(torch.device("cuda")),
    }


def resolve(impl: Impl, device: torch.device) -> str:
    """The implementation that ``impl`` means for tensors on ``device``.

    Args:
        impl: "auto", "reference", "cpu", "cuda" or "triton".
        device: of the tensors.

    Returns:
        "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: an unknown name.
        RuntimeError: an explicit choice that cannot run, with the reason.
    """
    if impl == "auto":
        return _auto(device.type, device.index)
    if impl == "reference":
        return impl
    check_choice("impl", impl, IMPLS)
    reason = _explicit_failure(impl, device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} is not available: {reason}")
    if impl != "triton" and device.type not in (impl, "meta"):
        raise RuntimeError(
            f"impl={impl!r} needs {impl.upper()} tensors, these are on {device}; move them, or use 'auto'"
        )
    return impl


@functools.cache
def failure(impl: Literal["cpu", "cuda", "triton"], device: torch.device) -> str | None:
    """Why the kernels of "cpu", "cuda" or "triton" cannot run on a device, None where they can. Cached per device."""
    if impl == "triton":
        return triton.failure(device)
    if impl == "cpu":
        return native.failure()
    return native.cuda_failure(device if device.type == "cuda" else None)


# torch.compile takes the answers of this function and the next as constants: it cannot trace what they call.
@torch.compiler.assume_constant_result
def _explicit_failure(impl: str, device_type: str, index: int | None) -> str | None:
    return failure(impl, torch.device(device_type, index))


@torch.compiler.assume_constant_result
def _auto(device_type: str, index: int | None) -> str:
    return _announced(device_type, index)


@functools.cache
def _announced(device_type: str, index: int | None) -> str:
    impl, reason = auto_kernels(torch.device(device_type, index))
    if impl is None:
        why = reason or "there are no kernels for it"
        logger.warning("on %s: impl 'reference', exact but slow, because %s", device_type, why)
        return "reference"
    what = native.simd_level() if impl == "cpu" else torch.cuda.get_device_name(index)
    logger.info("on %s: impl %r (%s)%s", device_type, impl, what, f", because {reason}" if reason else "")
    return impl


def auto_kernels(device: torch.device) -> tuple[str | None, str]:
    """The kernels that "auto" takes on a device, and why those it tries before them cannot run.

    Returns:
        ("cpu", "cuda" or "triton"; None where none can run, the reasons; "" where the first can run).
    """
    reasons = []
    for impl in BY_DEVICE.get(device.type, ()):
        reason = failure(impl, device)
        if reason is None:
            return impl, "; ".join(reasons)
        reasons.append(f"{impl!r} cannot run: {reason}")
    return None, "; ".join(reasons)


def plain(op: str) -> Callable[..., Any]:
    """A function of the reference; while torch.compile traces, the operator that it does not look into."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.cu_fast_reference, op)
    return getattr(reference, op)


def choose(op: str, impl: Impl, device: torch.device) -> Callable[..., Any]:
    """The function that runs an operator of ``kernels/operators.py``. Every implementation takes the same arguments.

    Raises:
        ValueError, RuntimeError: as :func:`resolve`.
    """
    chosen = resolve(impl, device)
    if chosen == "reference":
        return plain(op)
    return triton.operator(op) if chosen == "triton" else getattr(torch.ops.cu_fast, op)
