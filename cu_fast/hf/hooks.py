"""What ``attach`` puts into a model: the hooks around a forward, and around ``generate``. Part of ``cu_fast.hf.attachment``.

Under ``torch.compile`` the hooks are traced, and reach the present request through ``cu_fast.hf.active``'s operators.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils import ModelOutput

from cu_fast.hf.active import ORDER, UNKNOWN, Active, Differentiable, StaleCacheError
from cu_fast.hf.gating import GateState
from cu_fast.hf.places import Place
from cu_fast.hf.positions import first_of_paged, first_tokens, real_tokens
from cu_fast.hf.sites import SEQUENCES, argument_names
from cu_fast.nn.bottleneck import refuse_gradient

CHILD = "codebook_bottleneck"  # the bottleneck's name in its layer
# Attributes that are set on the objects of transformers.
STAMP = "_cu_fast_stamp"  # of a cache or an encoder's output: the signature of the request that it was computed under
ROWS = "_cu_fast_rows"  # of a cache: its sequences have different masks; of its first tensor: no row was moved since
GATES = "_cu_fast_gates"  # of a cache: what the gates of a gated request have seen of its sequences
VALUE = "_cu_fast_value"  # of an encoder's output: the identity of the tensor that the stamp is for

# Arguments that carry a state from one forward to the next. A transformers.Cache can be stamped. The cache of
# continuous batching needs no stamp: each request has its own part. States of other kinds cannot be stamped.
STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
# Arguments that hold the output of a part for images or sounds. Inside generate transformers passes them on.
OF_TOWERS = ("cross_attention_states", "image_hidden_states", "mm_encoder_outputs")


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
        if torch.compiler.is_compiling():
            torch.ops.cu_fast.remember(ORDER, x.detach(), self.active.handle, self.index)
        else:
            self.active.remember(x, self.index)

    def _changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """What leaves the place: x itself where a splice that keeps the hidden state deletes nothing."""
        layer, splice = self.layer, getattr(module, CHILD)
        if splice is not layer.bottleneck and getattr(splice, "_orig_mod", None) is not layer.bottleneck:
            raise RuntimeError(
                f"the bottleneck of layer {layer.name!r} was replaced since attach(), and masks are made for the other one"
            )
        self._check_width(x, splice.d_out, "d_out" if splice.d_in != splice.d_out else "width")
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "torch.export and torch.jit.trace would bake the present masks in; use torch.compile, or detach() first"
            )
        compiling = torch.compiler.is_compiling()
        if splice.splice == "delta":
            if compiling:
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
        given = {**dict(zip(self.arguments, args)), **kwargs}
        batch = next((given[name].shape[0] for name in self.sequences if isinstance(given.get(name), Tensor)), UNKNOWN)
        first = None
        if self.skip_first and (torch.compiler.is_compiling() or self.active.deletes()):
            first = self._first(given)
        if torch.compiler.is_compiling():
            torch.ops.cu_fast.enter(ORDER, self.active.handle, self.runner, batch, first)
        else:
            self.active.enter(self.runner, batch, first)
            self._judge(given, first)
        for name in STATES:
            value = given.get(name)
            known = (Cache, PagedAttentionCache) if name in self.recurrent else (Cache, PagedAttentionCache, Tensor)
            if not (value is None or isinstance(value, known)) and self.active.topics.masks:
                raise StaleCacheError(
                    f"{name} is {type(value).__name__}, and only a transformers.Cache can tell what it was computed "
                    f"under; pass use_cache=False, or None for {name}"
                )
        for value in (*args, *kwargs.values()):
            for cache in _caches(value):
                # Inside generate transformers moves rows too, but only within a sequence.
                if not torch.compiler.is_compiling() and not self.active.expand.get():
                    check_order(cache)
                setattr(cache, STAMP, self._check_filled(cache, _length(cache), "KV cache"))
        if self.encoder_is_swapped and given.get("encoder_outputs") is not None:
            check_encoded(self.active, given["encoder_outputs"])
        if self.tower_is_swapped and not torch.compiler.is_compiling() and not self.active.expand.get():
            check_towers(self.active, given)

    def _first(self, given: Mapping[str, Any]) -> Tensor | None:
        """bool [B, S], the tokens that some layer's masks leave alone; None = there are none, or they are not known."""
        if any(isinstance(value, PagedAttentionCache) for value in given.values()):
            return first_of_paged(given, SEQUENCES, self.skip_first)
        caches = [cache for value in given.values() for cache in _caches(value)]
        length = _length(caches[0]) if caches else 0
        if caches and not _knows_length(caches[0]) and length:
            return None  # it holds one token or more
        return first_tokens(given, SEQUENCES, length, self.skip_first)

    def _judge(self, given: Mapping[str, Any], first: Tensor | None) -> None:
        """Let the gates of a gated request go on from what they have seen of the sequences in the cache."""
        request = self.active.now()
        runs_layers = any(layer.runner == self.runner for layer in self.active.layers)
        if request is None or not request.gated or not runs_layers:
            return
        caches = [cache for value in given.values() for cache in _caches(value)]
        state = getattr(caches[0], GATES, None) if caches and int(_length(caches[0])) else None
        counted = real_tokens(given, SEQUENCES)
        if counted is not None:
            self.active.judge(self.runner, state or GateState(), counted if first is None else counted & ~first)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook: stamps the caches and the output. Raises RuntimeError where a swapped layer did not run."""
        state = None
        if torch.compiler.is_compiling():
            torch.ops.cu_fast.leave(ORDER, self.active.handle, self.runner)
        else:
            state = self.active.judged(self.runner)
            self.active.leave(self.runner)
        made = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
        for value in (*args, *kwargs.values(), *made):
            for cache in _caches(value):
                if state is not None:
                    setattr(cache, GATES, state)
                if getattr(cache, STAMP, None) is None:  # this forward made the cache
                    setattr(cache, STAMP, self._check_filled(cache, 0, "KV cache"))
                self._mark_order(cache)
        if isinstance(output, ModelOutput):
            setattr(output, STAMP, self._check_filled(output, 0, "output"))
            if not torch.compiler.is_compiling():
                setattr(output, VALUE, _identity(output))

    def ended(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook that is called where the forward failed, too."""
        if not torch.compiler.is_compiling():
            self.active.ended(self.runner)

    def _check_filled(self, value: Any, length: int | Tensor, what: str) -> Tensor:
        return check_filled(self.active, value, length, what)

    def _mark_order(self, cache: Cache) -> None:
        if torch.compiler.is_compiling():
            return
        request, state = self.active.now(), _first_tensor(cache)
        moves = request is not None and len(set(request.rows)) > 1 and state is not None
        setattr(cache, ROWS, moves)
        if moves:
            setattr(state, ROWS, True)


def check_order(cache: Cache) -> None:
    """Raises StaleCacheError where a cache's rows were selected or moved since it was filled.

    With a mask per sequence the rows must be in the order in which they were filled.
    """
    state = _first_tensor(cache) if getattr(cache, ROWS, False) else None
    if state is not None and not hasattr(state, ROWS):
        raise StaleCacheError(
            "this KV cache's rows were selected or moved since it was filled under a mask for each sequence; which row "
            "has which mask is no longer known; start with a new one"
        )


def check_filled(active: Active, value: Any, length: int | Tensor, what: str) -> Tensor:
    """:meth:`Active.check_filled`, in eager mode or in a compiled model.

    Args:
        active: the attachment's run-time state.
        value: a cache or an output, which carries its stamp as an attribute or has none.
        length: tokens in it.
        what: what messages call it.

    Returns:
        The new stamp, int64 [].

    Raises:
        StaleCacheError: it was computed under other masks.
    """
    stamp = getattr(value, STAMP, None)
    if not torch.compiler.is_compiling():
        return active.check_filled(stamp, length, what)
    length = length if isinstance(length, Tensor) else torch.full((), length)
    return torch.ops.cu_fast.check_filled(ORDER, stamp, length, what, active.handle)


def check_encoded(active: Active, value: Any) -> None:
    """Raises StaleCacheError where an encoder's output was computed under other masks than hold now."""
    check_filled(active, value, 1, "encoder's output")
    # Inside generate its tensors were expanded, so they differ; generate made the output, or checked it before.
    if not torch.compiler.is_compiling() and not active.expand.get() and hasattr(value, VALUE):
        if getattr(value, VALUE) != _identity(value):
            raise StaleCacheError("this encoder's output holds another tensor than the encoder gave; encode again")


def check_towers(active: Active, given: Mapping[str, Any]) -> None:
    """Raises StaleCacheError where an argument holds the output of a part for images or sounds: it carries no stamp."""
    name = next((name for name in OF_TOWERS if given.get(name) is not None), None)
    if name is not None and active.topics.masks:
        raise StaleCacheError(f"{name} does not tell under which masks it was computed; give what it was computed from")


def wrap_generate(model: nn.Module, active: Active) -> Callable[[], None]:
    """Let ``model.generate`` check its batch and its states, and announce each step.

    Returns:
        A function that undoes it.
    """
    undo = contextlib.ExitStack()
    generate, prepare = model.generate, getattr(model, "prepare_inputs_for_generation", None)
    names = argument_names(generate)

    if prepare is not None:

        @functools.wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            active.step()
            return prepare(*args, **kwargs)

        undo.callback(replace_attribute(model, "prepare_inputs_for_generation", prepared))

    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        with _ended_streamer(given.get("streamer")), _same_depth(model):
            request = active.now()
            batch = _batch(model, given)
            if request is not None and request.of == "sequence" and batch != len(request.rows):
                raise ValueError(
                    f"generate() was given {batch} sequences, and unlearn() {len(request.rows)} entries; "
                    f"give an entry for each sequence"
                )
            for cache in itertools.chain.from_iterable(map(_caches, given.values())):
                check_order(cache)
            if given.get("encoder_outputs") is not None and any(layer.in_encoder for layer in active.layers):
                check_encoded(active, given["encoder_outputs"])
            if any(not (layer.in_encoder or layer.in_decoder) for layer in active.layers):
                check_towers(active, given)
            with active.generating(_expansion(model, given)):
                return generate(*args, **kwargs)

    undo.callback(replace_attribute(model, "generate", wrapper))
    return undo.close


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of one instance. Returns a function that undoes it."""
    own = vars(owner)
    undo = (
        functools.partial(setattr, owner, name, own[name]) if name in own else functools.partial(delattr, owner, name)
    )
    setattr(owner, name, value)
    return undo


@contextlib.contextmanager
def _ended_streamer(streamer: Any) -> Iterator[None]:
    """End the streamer after an error: its reader, in another thread, would wait for ever for more tokens."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            with contextlib.suppress(Exception):
                streamer.end()
        raise


@contextlib.contextmanager
def _same_depth(model: nn.Module) -> Iterator[None]:
    """Put the config's depth back after an error: transformers' early exit lowers it for a while, without a finally."""
    configs = [module.config for module in (model, getattr(model, "base_model", model)) if hasattr(module, "config")]
    depths = [getattr(config, "num_hidden_layers", None) for config in configs]
    try:
        yield
    except BaseException:
        for config, depth in zip(configs, depths):
            if depth is not None:
                config.num_hidden_layers = depth
        raise


def _caches(value: Any) -> tuple[Cache, ...]:
    """The caches in an argument. An encoder-decoder has two, which may come from different forwards."""
    parts = (
        (value.self_attention_cache, value.cross_attention_cache)
        if isinstance(value, EncoderDecoderCache)
        else (value,)
    )
    return tuple(part for part in parts if isinstance(part, Cache))


def _length(cache: Cache) -> int | Tensor:
    """How many tokens a cache holds; 0 or 1 for a cache of linear attention, which only knows whether it holds any."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def _knows_length(cache: Cache) -> bool:
    """Whether a cache tells how many tokens it holds, and not only that it holds some."""
    return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) or not cache.layers


def _first_tensor(cache: Cache) -> Tensor | None:
    """A tensor with a row per sequence, which the cache replaces by a new one when it selects or moves rows."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "conv_states"))
    return next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)


def _identity(output: ModelOutput) -> tuple[int, int]:
    """Address and version of the first tensor in an output: another tensor, or a write to it, changes them."""
    tensor = next(iter(output.values()))
    if not isinstance(tensor, Tensor):
        return 0, 0
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _batch(model: nn.Module, given: Mapping[str, Any]) -> int:
    """How many sequences ``generate`` was given."""
    for name in ("inputs", model.main_input_name, *SEQUENCES):
        if isinstance(given.get(name), Tensor):
            return given[name].shape[0]
    return 1 if given.get("encoder_outputs") is None else given["encoder_outputs"][0].shape[0]


def _expansion(model: nn.Module, given: Mapping[str, Any]) -> int:
    """How many rows of the batch ``generate`` makes of one sequence: the larger of beams and return sequences."""
    config = given.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(given.get(name) or getattr(config, name, None) or 1 for name in names)
