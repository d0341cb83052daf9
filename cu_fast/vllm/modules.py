"""Which module of vLLM's model a layer of an attachment is, and what is done with what leaves it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cu_fast.hf.places import BLOCKS, near
from cu_fast.vllm import operator  # noqa: F401 - declares torch.ops.cu_fast_vllm.splice

_BLOCK = re.compile(rf"(^|\.)({'|'.join(BLOCKS)})\.\d+$")


def module_for(model: nn.Module, layer: str) -> str:
    """The name of a layer's module.

    Args:
        model: vLLM's.
        layer: its name in an attachment, which is that of the transformers model.

    Raises:
        ValueError: no such module, or a place that is not what leaves one.
    """
    if " -> " in layer or layer.endswith(":in"):
        raise ValueError(
            f"layer {layer!r} reads or changes what a module is given; in vLLM cu_fast changes what leaves a module. What a "
            f"block is given is what leaves the one before it: attach there"
        )
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    name = layer if mapper is None else "".join(mapper.apply_list([f"{layer}."])).removesuffix(".")
    if name.rpartition(".")[2] != layer.rpartition(".")[2]:
        name = layer  # up_proj would be found in gate_up_proj, with which vLLM computes another one too
    names = [known for known, _ in model.named_modules() if known]
    ends = [known for known in names if known == name or known.endswith(f".{name}")]
    if name in names or len(ends) == 1:
        return name if name in names else ends[0]
    if ends:
        raise ValueError(f"vLLM's {type(model).__name__} has several modules {name!r}: {', '.join(ends)}")
    raise ValueError(f"vLLM's {type(model).__name__} has no module {name!r}; {near(name, names)}")


def is_block(name: str) -> bool:
    """Whether a module is a numbered block of a decoder, by its name."""
    return _BLOCK.search(name) is not None


def hook_for(name: str) -> Callable[[nn.Module, tuple, Any], None]:
    """A forward hook that gives a module's output to the splice of a layer, which changes it in place.

    A block of a decoder returns its hidden state, or two tensors whose sum that is: the next block's norm adds them.
    """
    pairs = is_block(name)

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            torch.ops.cu_fast_vllm.splice(output, None, name)
        elif pairs and isinstance(output, tuple) and len(output) == 2 and all(isinstance(v, Tensor) for v in output):
            torch.ops.cu_fast_vllm.splice(*output, name)
        else:
            raise RuntimeError(
                f"module {name!r} ({type(module).__name__}) returned {type(output).__name__}; a tensor is understood, and of a "
                f"block two whose sum is the hidden state"
            )

    return hook
