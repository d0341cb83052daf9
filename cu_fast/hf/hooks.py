"""What ``attach`` puts into a model: the hooks around a forward. Part of ``cu_fast.hf.attachment``.

Under ``torch.compile`` the hooks are traced, and reach the present request through the operators of ``compiled.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils import ModelOutput

from cu_fast import ops
from cu_fast.hf.active import Active, StaleCacheError
from cu_fast.hf.compiled import ORDER, Carried, Differentiable, begin, hand_to, trace_number
from cu_fast.hf.forwards import UNKNOWN
from cu_fast.hf.gating import GateState
from cu_fast.hf.places import Place
from cu_fast.hf.positions import first_of_paged, first_tokens, tokens_of
from cu_fast.hf.sites import SEQUENCES, argument_names
from cu_fast.hf.states import (
    GATES,
    STAMP,
    STATES,
    VALUE,
    caches_in,
    check_encoded,
    check_filled,
    check_length,
    check_order,
    check_towers,
    gates_of,
    identity_of,
    knows_length,
    length_of,
    mark_length,
    mark_order,
)
from cu_fast.nn.bottleneck import refuse_gradient

CHILD = "codebook_bottleneck"  # the bottleneck's name in its layer


class LayerHook:
    """Puts what leaves one place of a model through its splice.

    Args:
        active: the attachment's run-time state.
        index: of the layer in ``active.layers``.
    """

    def __init__(self, active: Active, index: int) -> None:
        self.active, self.index, self.layer = active, index, active.layers[index]

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The module's output with its first tensor, x [B, S, D], replaced. A forward hook.

        Raises:
            RuntimeError, ValueError: as :meth:`Active.mask_rows`; another splice or width than at first; an export.
        """
        x = output if isinstance(output, Tensor) else output[0]
        y = self._changed(module, x)
        if y is x:
            return None
        return with_first(output, y)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's arguments with the first, x [B, S, D], replaced. A forward pre-hook. Raises as :meth:`after`."""
        name, x = first_argument(module, args, kwargs, self.layer.writes)
        y = self._changed(module, x)
        if y is x:
            return None
        return (args, {**kwargs, name: y}) if name else ((y, *args[1:]), kwargs)

    def read_after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Keep the module's output for the place that is changed. A forward hook."""
        self._read(output if isinstance(output, Tensor) else output[0])

    def read_before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the module's first argument for the place that is changed. A forward pre-hook."""
        self._read(first_argument(module, args, kwargs, self.layer.reads)[1])

    def _read(self, x: Tensor) -> None:
        self._check_width(x, self.layer.bottleneck.d_in, "d_in")
        if torch.compiler.is_compiling() and (carried := self._carried()) is not None:
            carried.read[self.index] = x.detach().clone()  # models write to hidden states in place
        elif torch.compiler.is_compiling():
            torch.ops.cu_fast.remember(ORDER, x.detach(), self.active.handle, self.index)
        else:
            self.active.remember(x, self.index)

    def _changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """What leaves the place: x itself where a splice that keeps the hidden state deletes nothing."""
        layer, splice = self.layer, module._modules.get(CHILD)
        if splice is not layer.bottleneck and getattr(splice, "_orig_mod", None) is not layer.bottleneck:
            raise RuntimeError(
                f"the bottleneck of layer {layer.name!r} was replaced since attach(), and masks are made for the other one"
            )
        if x.shape[-1] != splice.d_out:
            self._check_width(x, splice.d_out, "d_out" if splice.d_in != splice.d_out else "width")
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "torch.export and torch.jit.trace would bake the present masks in; use torch.compile, or detach() first"
            )
        compiling = torch.compiler.is_compiling()
        if compiling and (row := self._carried_rows(x, splice)) is not None:
            return self._masked(x, splice, row)
        if splice.splice == "delta":
            if compiling:
                self._hand_over()
                y, deleted = torch.ops.cu_fast.delete(ORDER, x.detach(), self.active.handle, self.index)
                has_gradient = x.requires_grad and torch.is_grad_enabled()
                return Differentiable.apply(x, y, deleted) if has_gradient else y
            y = self.active.delete(x, self.index)
            return refuse_gradient(x, y) if y is not x and x.requires_grad and torch.is_grad_enabled() else y
        if compiling:
            row = torch.ops.cu_fast.mask_rows(ORDER, x.detach(), self.active.handle, self.index)
        else:
            row = self.active.mask_rows(x, self.index)
        if row is None or splice.training:  # in training with a mask mask_rows has raised
            return splice(x)
        return splice(x, layer.table.table, row)

    def _carried(self) -> Carried | None:
        """The rows that this trace carries for the layer's forward."""
        carried = self.active.carried.get(self.layer.runner)
        return carried if carried is not None and carried.trace == trace_number() else None

    def _carried_rows(self, x: Tensor, splice: nn.Module) -> Tensor | None:
        """int32 [T]; None where they have to be looked up: none are carried, or which dimension is the batch's is open."""
        carried = self._carried()
        has_gradient = splice.splice == "delta" and x.requires_grad and torch.is_grad_enabled()
        if carried is None or splice.training or has_gradient:
            return None
        if (reads_elsewhere := self.layer.reads != self.layer.writes) and self.index not in carried.read:
            return None
        B = carried.rows.shape[0]
        if x.dim() != 3 or x.shape[0] != B or (x.shape[1] == B > 1 and not self.layer.batch_first):
            return None
        if reads_elsewhere and carried.read[self.index].shape[:-1] != x.shape[:-1]:
            return None
        rows = carried.rows.to(x.device)[:, None].expand(x.shape[:2]).reshape(-1)
        first = carried.first if self.layer.skip_first else None
        if first is not None and first.shape == x.shape[:2]:
            rows = torch.where(first.reshape(-1).to(x.device), -1, rows)
        hand_to(carried.number, self.index)
        return rows

    def _masked(self, x: Tensor, splice: nn.Module, row: Tensor) -> Tensor:
        table = self.layer.table
        if splice.splice == "replace":
            return splice(x, table.table, row)
        masks = ops.LatentMasks(*table.tensors)
        if self.layer.reads == self.layer.writes:
            return splice(x, masks, row)
        return splice(self._carried().read.pop(self.index), masks, row, residual=x)

    def _hand_over(self) -> None:
        """What was read and carried goes where :meth:`Active.delete` finds it."""
        carried = self._carried()
        if carried is not None and self.index in carried.read:
            torch.ops.cu_fast.remember(ORDER, carried.read.pop(self.index), self.active.handle, self.index)

    def _check_width(self, x: Tensor, width: int, name: str) -> None:
        if x.shape[-1] != width:
            raise ValueError(
                f"layer {self.layer.name!r} returned width {x.shape[-1]}; its bottleneck's {name} is {width}"
            )


def with_first(output: Any, y: Tensor) -> Any:
    """A module's output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, ModelOutput):
        return type(output)(**{**output, next(iter(output)): y})
    if hasattr(output, "_fields"):  # a named tuple
        return output._replace(**{output._fields[0]: y})
    return type(output)((y, *output[1:]))


def first_argument(module: nn.Module, args: tuple, kwargs: dict[str, Any], place: Place) -> tuple[str | None, Tensor]:
    """(its name, or None where it was given by position; the first argument of a place's module)."""
    if args:
        return None, args[0]
    name = next(iter(argument_names(module.forward)), None)
    if name not in kwargs:
        raise RuntimeError(
            f"the module of {str(place)!r} was given no first argument, but {sorted(kwargs)}; name the output of the "
            f"module before it instead"
        )
    return name, kwargs[name]


class ModelHook:
    """Around a model that holds swapped layers: checks the states that a forward continues, and that every layer ran.

    Args:
        active: the attachment's run-time state.
        model: the one that the hooks are registered on.
        runner: its number in ``Layer.runner``.
        encoder_is_swapped: some swapped layers are in its encoder.
        tower_is_swapped: it is the whole model, and some swapped layers are in a part that is neither its encoder nor
            its decoder.
        sequences: names of the arguments whose first dimension is the number of sequences.
        skip_first: positions at the start of each sequence that some layer's masks leave alone.
    """

    def __init__(
        self,
        active: Active,
        model: nn.Module,
        runner: int,
        *,
        encoder_is_swapped: bool,
        tower_is_swapped: bool,
        sequences: tuple[str, ...],
        skip_first: int,
    ) -> None:
        self.active, self.runner, self.sequences, self.skip_first = active, runner, sequences, skip_first
        self.encoder_is_swapped, self.tower_is_swapped = encoder_is_swapped, tower_is_swapped
        self.arguments = argument_names(model.forward)
        # In other models an argument "state" is a plain tensor, which carries nothing from forward to forward.
        is_recurrent = getattr(getattr(model, "config", None), "model_type", None) in ("rwkv", "xlstm")
        self.recurrent = ("mems", "past_buckets_states", *(["state"] if is_recurrent else []))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook. Raises StaleCacheError where a state that is given was computed under other masks."""
        active, compiling = self.active, torch.compiler.is_compiling()
        given = {**dict(zip(self.arguments, args)), **kwargs}
        batch = next((given[name].shape[0] for name in self.sequences if isinstance(given.get(name), Tensor)), UNKNOWN)
        first = None
        if self.skip_first and (compiling or active.deletes()):
            first = self._first(given)
        if compiling:
            self._enter(batch, first)
        else:
            active.enter(self.runner, batch, first)
            self._judge(given, first)
        for name in STATES:
            value = given.get(name)
            if value is None:
                continue
            known = (Cache, PagedAttentionCache) if name in self.recurrent else (Cache, PagedAttentionCache, Tensor)
            if not isinstance(value, known) and active.topics.masks:
                raise StaleCacheError(
                    f"{name} is {type(value).__name__}, and only a transformers.Cache can tell what it was computed "
                    f"under; pass use_cache=False, or None for {name}"
                )
        for cache in caches_in((*args, *kwargs.values())):
            if not compiling and active.topics.masks:
                check_length(cache)
            # Inside generate transformers moves rows too, but only within a sequence.
            if not compiling and not active.expand.get():
                check_order(cache)
            setattr(cache, STAMP, check_filled(active, cache, length_of(cache), "KV cache"))
        if self.encoder_is_swapped and given.get("encoder_outputs") is not None:
            check_encoded(active, given["encoder_outputs"])
        if self.tower_is_swapped and not compiling and not active.expand.get():
            check_towers(active, given)

    def _enter(self, batch: int, first: Tensor | None) -> None:
        active, runner = self.active, self.runner
        device = active.carries_on(runner)
        if device is None or batch == UNKNOWN:
            torch.ops.cu_fast.enter(ORDER, active.handle, runner, batch, first)
        else:
            number = begin(active.handle, runner)
            rows = torch.ops.cu_fast.rows_of(ORDER, active.handle, runner, batch, first, device, number)
            active.carried[runner] = Carried(rows, first, number, trace_number())

    def _first(self, given: Mapping[str, Any]) -> Tensor | None:
        """bool [B, S], the tokens that some layer's masks leave alone; None = there are none, or they are not known."""
        if any(isinstance(value, PagedAttentionCache) for value in given.values()):
            return first_of_paged(given, SEQUENCES, self.skip_first)
        return first_tokens(given, SEQUENCES, _length(caches_in(given.values())), self.skip_first)

    def _judge(self, given: Mapping[str, Any], first: Tensor | None) -> None:
        """Let the gates of a gated request go on from what they have seen of the sequences in the cache."""
        request = self.active.now()
        if request is None or not request.gated:
            return
        if not any(layer.runner == self.runner for layer in self.active.layers):
            return
        caches = caches_in(given.values())
        state = gates_of(caches[0]) if caches else None
        tokens = tokens_of(given, SEQUENCES, _length(caches))
        if tokens is not None and not tokens.known:
            raise RuntimeError(
                "gated=True was given an attention mask that does not tell which tokens are padding; give a mask "
                "[batch, tokens], or judge the prompts before, with cu_fast.topics_of, and give unlearn() what it returns"
            )
        if tokens is not None:
            counted = tokens.real if first is None else tokens.real & ~first
            self.active.judge(self.runner, state or GateState(), counted)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook: stamps the caches and the output. Raises RuntimeError where a swapped layer did not run."""
        active, state, compiling = self.active, None, torch.compiler.is_compiling()
        if compiling:
            active.carried.pop(self.runner, None)
            torch.ops.cu_fast.leave(ORDER, active.handle, self.runner)
        else:
            state = active.judged(self.runner)
            active.leave(self.runner)
        made = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
        caches = caches_in((*args, *kwargs.values(), *made))
        if state is not None and caches:
            state.length = int(length_of(caches[0])) if knows_length(caches[0]) else None
        for cache in caches:
            if state is not None:
                setattr(cache, GATES, state)
            if getattr(cache, STAMP, None) is None:  # this forward made the cache
                setattr(cache, STAMP, check_filled(active, cache, None, "KV cache"))
            mark_order(active, cache)
            mark_length(cache)
        if isinstance(output, ModelOutput):
            # Where nothing is traced past its own __setattr__, which looks through its fields each time.
            put = setattr if compiling else object.__setattr__
            put(output, STAMP, check_filled(active, output, None, "output"))
            if not compiling:
                put(output, VALUE, identity_of(output))

    def ended(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook that is called where the forward failed, too."""
        if not torch.compiler.is_compiling():
            self.active.ended(self.runner)


def _length(caches: list[Cache]) -> int | Tensor | None:
    """How many tokens the cache of a forward holds, 0 without one; None = some, and it does not know how many."""
    if not caches:
        return 0
    length = length_of(caches[0])
    return length if knows_length(caches[0]) or not length else None
