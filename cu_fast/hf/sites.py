"""What attaching needs to know of a model: its layers' widths and devices, and which of its parts runs them.

Part of ``cu_fast.hf.attachment``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

# Arguments whose first dimension is the sequences, in every model. Not images or sounds: a sequence may have several.
SEQUENCES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def argument_names(function: Callable) -> tuple[str, ...]:
    """Names of a function's positional arguments, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, None where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def prefixes(name: str) -> list[str]:
    """The names of the modules around a layer, outermost first: "a.b.c" -> "", "a", "a.b"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def hidden_size(model: nn.Module, name: str) -> int | None:
    """D as the config of the innermost model around a layer states it, None where no config does."""
    configs = [getattr(model.get_submodule(prefix), "config", None) for prefix in prefixes(name)]
    config = [config for config in configs if config is not None][-1:]
    return getattr(config[0].get_text_config(), "hidden_size", None) if config else None


def model_type(model: nn.Module) -> str | None:
    """What the model's config calls its family, None where it says nothing."""
    return getattr(getattr(model, "config", None), "model_type", None)


def device_of(layer: nn.Module) -> torch.device:
    """The device that a layer computes on: accelerate's execution device where weights are offloaded, else theirs."""
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            if getattr(part, "execution_device", None) is not None:
                return torch.device(part.execution_device)
    return next(itertools.chain(layer.parameters(), layer.buffers()), torch.empty(0)).device


def part(model: nn.Module, which: Literal["encoder", "decoder"]) -> nn.Module | None:
    """The encoder or decoder of a model, None where it has none. Only an encoder-decoder has an encoder."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    get = getattr(model, f"get_{which}", None)
    return get() if get is not None and (is_encoder_decoder or which == "decoder") else None


def has_sink(model: nn.Module, name: str) -> bool:
    """Whether the first position at a module is an attention sink, which nothing is read from: of causal attention alone.

    A position that all others see too (an encoder's class token), or that the first answer is read from (a decoder's start
    token), is none; nor is one without attention. ``is_causal`` of the attention modules that are nearest says so.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    for around in (name, *reversed(prefixes(name))):
        if causal := [m.is_causal for m in model.get_submodule(around).modules() if hasattr(m, "is_causal")]:
            return all(causal)
    return False


def is_in(layer: nn.Module, part: nn.Module | None) -> bool:
    """Whether a layer is a module of a part."""
    return part is not None and any(module is layer for module in part.modules())


def sequences(model: nn.Module, owner: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of ``owner``, a part of the model, whose first dimension is the model's sequences."""
    if not isinstance(owner, PreTrainedModel):
        return argument_names(owner.forward)[:1]
    return tuple(dict.fromkeys((getattr(model, "main_input_name", "input_ids"), *SEQUENCES)))


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of one instance. Returns a function that undoes it."""
    own = vars(owner)
    undo = (
        functools.partial(setattr, owner, name, own[name]) if name in own else functools.partial(delattr, owner, name)
    )
    setattr(owner, name, value)
    return undo
