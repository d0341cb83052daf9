"""A CUDA graph on a CPU: what a call does is written down, operator by operator, and done again at the same addresses.

with recorded.graphs(monkeypatch): attachment.capture(...) records so, and the CPU is said to have graphs.

As on a GPU a replay runs no Python of the call. Unlike there what is captured also runs once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from cu_fast import ops
from cu_fast.hf import attachment, capture, forwards
from cu_fast.nn import splice
from cu_fast.ops import checks, latents
from cu_fast.ops.choice import choose

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Recorder(TorchDispatchMode):
    """Writes down every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in WAITS:
            raise RuntimeError(f"{operator} waits for the device, and cannot be captured")
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for operator, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def graphs(monkeypatch) -> None:
    """Let ``Attachment.capture`` take a model on the CPU."""
    inside: list[bool] = []
    devices = {"cpu"}
    for module in (forwards, attachment):
        monkeypatch.setattr(module, "GRAPHS_ON", devices)
    for module in (forwards, splice):
        monkeypatch.setattr(module, "capturing", lambda device: bool(inside))
    monkeypatch.setattr(
        import_utils, "is_cuda_stream_capturing", lambda: bool(inside)
    )  # transformers then waits for nothing
    values = checks.check_values
    # The values of a tensor are looked at on a CPU alone.
    # And a row that does not exist raises there: PyTorch's operations, which have the same bits, make the token NaN.
    for module in (ops, latents):
        monkeypatch.setattr(
            module, "choose", lambda name, impl, device: choose(name, "reference" if inside else impl, device)
        )
    for module in (checks, ops):
        monkeypatch.setattr(module, "check_values", lambda *arguments: None if inside else values(*arguments))

    @contextlib.contextmanager
    def recording():
        inside.append(True)
        try:
            with Recorder() as recorder:
                yield recorder
        finally:
            inside.pop()

    def record(call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        call()
        with recording() as recorder:
            output = call()

        def replay() -> None:
            with torch.no_grad():
                recorder.replay()

        return output, replay

    monkeypatch.setattr(capture, "record", record)
