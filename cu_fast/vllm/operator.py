"""``cu_fast_vllm::splice``: what a layer of the model calls. One declaration, any device.

It finds its layer through the forward context by name, as vLLM's attention does, so that engines in one process do not meet
and nothing of a process enters a compiled graph. It writes to its arguments: with nothing deleted, nothing is computed or copied.
It is one of ``splitting_ops``: compiled graphs are cut there, so that it runs, with its checks, in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

NAME = "cu_fast_vllm::splice"
CHILD = "codebook_bottleneck"  # behind the layer's name, in the forward context


def _splice(hidden: Tensor, residual: Tensor | None, layer: str) -> None:
    get_forward_context().no_compile_layers[f"{layer}.{CHILD}"](hidden, residual)


def _fake(hidden: Tensor, residual: Tensor | None, layer: str) -> None:
    return None


_library = torch.library.Library("cu_fast_vllm", "DEF")
_library.define("splice(Tensor(a!) hidden, Tensor(b!)? residual, str layer) -> ()")
_library.impl("splice", _splice, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=_library)
