"""What ``attach`` puts into a model: the hooks around a forward, and around ``generate``. Part of ``cu_fast.hf``.

Under ``torch.compile`` the hooks are traced, and reach the present request through ``cu_fast._active``'s operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput

from cu_fast._active import Active

CHILD = "codebook_bottleneck"  # the bottleneck's name in its layer
STAMP = "_cu_fast_stamp"  # on a cache or an encoder's output: what it was computed under


class LayerHook:
    """Puts one layer's output through its bottleneck."""

    def __init__(self, active: Active, index: int) -> None:
        self.active, self.index, self.layer = active, index, active.layers[index]

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        layer, bottleneck = self.layer, getattr(module, CHILD)
        if x.shape[-1] != bottleneck.config.d_model:
            raise ValueError(
                f"layer {layer.name!r} returned width {x.shape[-1]}; its bottleneck's d_model is "
                f"{bottleneck.config.d_model}"
            )
        if torch.compiler.is_compiling():
            row = torch.ops.cu_fast.mask_rows(x.detach(), self.active.handle, self.index)
        elif torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace would bake the present masks in; use torch.compile")
        else:
            row = self.active.mask_rows(x, self.index)
        if row is None or bottleneck.training:  # a mask in training has raised already
            y = bottleneck(x)
        else:
            if layer.table.table.device != x.device:
                layer.table.table = layer.table.table.to(x.device)
            y = bottleneck(x, layer.table.table, row)
        if isinstance(output, Tensor):
            return y
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, next(iter(output)): y})
        return (y, *output[1:])


class ModelHook:
    """Around a model that holds swapped layers: guards what its forward continues from, and that none was left out.

    runner: its number in ``Layer.runner``. encoder_is_swapped: some swapped layers are in its encoder.
    """

    def __init__(self, active: Active, runner: int, encoder_is_swapped: bool) -> None:
        self.active, self.runner, self.encoder_is_swapped = active, runner, encoder_is_swapped

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            torch.ops.cu_fast.enter(self.active.handle, self.runner)
        else:
            self.active.enter(self.runner)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                setattr(value, STAMP, self._check_filled(value, _length(value), "KV cache"))
        if self.encoder_is_swapped and kwargs.get("encoder_outputs") is not None:
            self._check_filled(kwargs["encoder_outputs"], 1, "encoder's output")

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            torch.ops.cu_fast.leave(self.active.handle, self.runner)
        else:
            self.active.leave(self.runner)
        parts = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
        for value in parts:
            if isinstance(value, Cache) and getattr(value, STAMP, None) is None:
                setattr(value, STAMP, self._check_filled(value, 0, "KV cache"))  # this forward made it
        if isinstance(output, ModelOutput):
            setattr(output, STAMP, self._check_filled(output, 0, "output"))

    def _check_filled(self, value: Any, length: int | Tensor, what: str) -> Tensor:
        stamp = getattr(value, STAMP, None)
        if not torch.compiler.is_compiling():
            return self.active.check_filled(stamp, length, what)
        length = length if isinstance(length, Tensor) else torch.full((), length)
        return torch.ops.cu_fast.check_filled(stamp, length, what, self.active.handle)


def wrap_generate(model: nn.Module, active: Active) -> Callable[[], None]:
    """Let ``model.generate`` check the batch and say how far it expands it. Returns what undoes it."""
    before, generate = model.__dict__.get("generate"), model.generate

    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        request = active.now()
        if request is not None and request.per_sequence:
            batch = _batch(model, args, kwargs)
            if batch != len(request.rows):
                raise ValueError(
                    f"generate() was given {batch} sequences, and unlearn() {len(request.rows)} entries; "
                    f"give an entry for each sequence"
                )
        token = active.expand.set(_expansion(model, args, kwargs))
        try:
            return generate(*args, **kwargs)
        finally:
            active.expand.reset(token)

    model.generate = wrapper
    if before is None:
        return functools.partial(delattr, model, "generate")
    return functools.partial(setattr, model, "generate", before)


def _length(cache: Cache) -> int | Tensor:
    """How many tokens a cache holds; a cache of linear attention only knows whether it holds any."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def _batch(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """How many sequences ``generate`` was given."""
    names = ("inputs", model.main_input_name, "input_ids", "inputs_embeds", "decoder_input_ids")
    for value in (*args[:1], *(kwargs.get(name) for name in names)):
        if isinstance(value, Tensor):
            return value.shape[0]
    return 1 if kwargs.get("encoder_outputs") is None else kwargs["encoder_outputs"][0].shape[0]


def _expansion(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """How many rows of the batch ``generate`` makes of one sequence."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names)
