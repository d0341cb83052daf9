"""Checks of the operators' arguments: each names the argument, what it was and what it should be. Part of ``cu_fast.ops``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


def shape(tensor: Tensor) -> list[int]:
    """The shape as messages write it."""
    return list(tensor.shape)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError, with the argument's name, for a value that is not one of those allowed."""
    if value not in allowed:
        *most, last = map(repr, allowed)
        listed = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{name} is {value!r}; it should be {listed}")


def check_matrix(name: str, tensor: Tensor, width: int | None = None, of: str = "") -> None:
    """Raises for anything but a floating tensor of two dimensions.

    Args:
        name: the argument's.
        tensor: its value.
        width: of the last dimension; None = any.
        of: the argument that has that width.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it should be a tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; it should be float32, bfloat16 or float16")
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {shape(tensor)}; it should have two dimensions (flatten it first)")
    if width is not None and tensor.shape[1] != width:
        raise ValueError(f"{name} has shape {shape(tensor)}; its last dimension should be {width}, as {of} has")


def check_vector(name: str, tensor: Tensor | None, size: int, letter: str, device: torch.device) -> None:
    """Raises for anything but None or a floating vector.

    Args:
        name: the argument's.
        tensor: its value; None passes.
        size: of the vector.
        letter: what messages call the size.
        device: of the other arguments.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape or device.
    """
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it should be a tensor, or None")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; it should be float32, bfloat16 or float16")
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name} has shape {shape(tensor)}; it should be [{size}] ({letter})")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it should be on {device} like the others")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError, with both names, where two tensors are on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}; move one of them")


def check_k(k: int, C: int) -> None:
    """Raises TypeError where k is not an int, ValueError where it is not between 1 and C."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r}; it should be an int")
    if not 1 <= k <= C:
        raise ValueError(f"k is {k}; it should be between 1 and the {C} codes")


def check_mask(table: Tensor | None, row: Tensor | None, T: int, C: int, device: torch.device) -> None:
    """Raises for anything but a mask, or None twice.

    Args:
        table: mask_table, int32 [U, ceil(C/32)], or None.
        row: mask_row, int32 [T], or None.
        T: tokens.
        C: codes.
        device: of the other arguments.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape or device, only one of the two, or, on a CPU, a row beyond the table.
    """
    if table is None and row is None:
        return
    if table is None or row is None:
        missing = "mask_table" if table is None else "mask_row"
        raise ValueError(f"{missing} is None; mask_table and mask_row come together")
    words = (C + 31) // 32
    if not isinstance(table, Tensor):
        raise TypeError(f"mask_table is {type(table).__name__}; it should be a tensor, or None")
    if table.dtype != torch.int32:
        raise TypeError(f"mask_table is {table.dtype}; it should be int32")
    if table.device != device:
        raise ValueError(f"mask_table is on {table.device}; it should be on {device} like the others")
    if table.dim() != 2 or table.shape[1] != words:
        raise ValueError(f"mask_table has shape {shape(table)}; it should be [U, {words}], a bit for each of {C} codes")
    check_row(row, T, table.shape[0], device)


def check_row(row: Tensor, T: int, U: int, device: torch.device) -> None:
    """Raises for anything but a mask_row, int32 [T], of a table of U masks; on a CPU also for a row beyond the table.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape, device or value.
    """
    if not isinstance(row, Tensor):
        raise TypeError(f"mask_row is {type(row).__name__}; it should be a tensor, or None")
    if row.dtype != torch.int32:
        raise TypeError(f"mask_row is {row.dtype}; it should be int32")
    if row.device != device:
        raise ValueError(f"mask_row is on {row.device}; it should be on {device} like the others")
    if tuple(row.shape) != (T,):
        raise ValueError(f"mask_row has shape {shape(row)}; it should be [{T}], a row of the table per token")
    check_values("mask_row", row, U)


def check_values(name: str, tensor: Tensor, limit: int) -> None:
    """Raises ValueError where a CPU tensor of ints holds one below -1 or from ``limit`` on."""
    # Values are read only on a CPU, where it costs no synchronisation; while torch.compile traces there are none.
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    low, high = (int(v) for v in tensor.aminmax())
    if low < -1 or high >= limit:
        value = low if low < -1 else high
        raise ValueError(f"{name} holds {value}; it should lie between -1 and {limit - 1}")


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError, with the operator's and the argument's name, where gradients are on and one is required."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op} is for inference and {name} requires grad; call it under torch.no_grad(), "
                f"or train through cu_fast.nn, which holds the straight-through gradient"
            )
