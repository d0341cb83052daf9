"""Caches and other states that one forward leaves to the next: what they were computed under. Part of ``cu_fast.hf.attachment``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import ModelOutput

from cu_fast.hf.active import Active, StaleCacheError
from cu_fast.hf.compiled import ORDER
from cu_fast.hf.gating import GateState
from cu_fast.hf.request import CapturedRequest

# Attributes that are set on the objects of transformers.
STAMP = "_cu_fast_stamp"  # of a cache or an encoder's output: the signature of the request that it was computed under
ROWS = "_cu_fast_rows"  # of a cache: its sequences have different masks; of its first tensor: no row was moved since
LENGTH = "_cu_fast_length"  # of a cache: tokens that it held when the last forward under an attachment ended
GATES = "_cu_fast_gates"  # of a cache: what the gates of a gated request have seen of its sequences
VALUE = "_cu_fast_value"  # of an encoder's output: the identity of the tensor that the stamp is for

# Arguments that carry a state from one forward to the next. A transformers.Cache can be stamped. The cache of
# continuous batching needs no stamp: each request has its own part. States of other kinds cannot be stamped.
STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
# Arguments that hold the output of a part for images or sounds. Inside generate transformers passes them on.
OF_TOWERS = ("cross_attention_states", "image_hidden_states", "mm_encoder_outputs")


def check_order(cache: Cache) -> None:
    """Raises StaleCacheError where a cache's rows were selected or moved since it was filled, or it was cropped.

    With a mask or gates per sequence the rows must be in the order in which they were filled.
    """
    state = first_tensor(cache) if getattr(cache, ROWS, False) else None
    if state is not None and not hasattr(state, ROWS):
        raise StaleCacheError(
            "this KV cache was cropped, or its rows were selected or moved, since it was filled under gates or a mask for "
            "each sequence; which row has which mask is no longer known; start with a new one"
        )


def check_length(cache: Cache) -> None:
    """Raises StaleCacheError where a cache holds more tokens than when a forward under this attachment left it.

    Of a static cache that is not known: its length is a tensor, for which the host would have to wait.
    """
    known, length = getattr(cache, LENGTH, None), _known_length(cache)
    if known is not None and length is not None and length > known:
        raise StaleCacheError(
            f"this KV cache holds {length} tokens, and {known} when a forward with masks left it; what is between was "
            f"computed without cu_fast; start with a new one"
        )


def mark_length(cache: Cache) -> None:
    """Note how many tokens a cache holds; nothing is known where the forward was compiled."""
    setattr(cache, LENGTH, None if torch.compiler.is_compiling() else _known_length(cache))


def _known_length(cache: Cache) -> int | None:
    length = length_of(cache) if knows_length(cache) else None
    return length if isinstance(length, int) else None


def gates_of(cache: Cache) -> GateState | None:
    """What gates have seen of a cache's sequences; None = it is empty.

    Raises StaleCacheError where tokens were taken out again, as drafts are in assisted decoding: gates have counted them.
    """
    length = int(length_of(cache))
    state = getattr(cache, GATES, None) if length else None
    if state is not None and state.length not in (None, length):
        raise StaleCacheError(
            f"this KV cache holds {length} tokens, and its gates have counted {state.length}; it was cropped, or a forward "
            f"failed; start with a new one"
        )
    return state


def check_filled(active: Active, value: Any, length: int | Tensor | None, what: str) -> Tensor | None:
    """:meth:`Active.check_filled`, in eager mode or in a compiled model.

    Args:
        active: the attachment's run-time state.
        value: a cache or an output, which carries its stamp as an attribute or has none.
        length: tokens in it; None = this forward makes it.
        what: what messages call it.

    Returns:
        The new stamp, int64 []; while a forward is captured the old one, since only a replay computes something.

    Raises:
        StaleCacheError: it was computed under other masks.
    """
    stamp = getattr(value, STAMP, None)
    if not torch.compiler.is_compiling():
        if isinstance(request := active.now(), CapturedRequest):
            request.states.setdefault(id(value), (value, length is not None, what))
            return stamp
        return active.check_filled(stamp, 0 if length is None else length, what)
    length = 0 if length is None else length
    length = length if isinstance(length, Tensor) else torch.full((), length)
    return torch.ops.cu_fast.check_filled(ORDER, stamp, length, what, active.handle)


def mark_order(active: Active, cache: Any) -> None:
    """Note that a cache's rows lie as they were filled, where its sequences have different masks, or gates that count for each."""
    if torch.compiler.is_compiling() or not isinstance(cache, Cache):
        return
    request, state = active.now(), first_tensor(cache)
    moves = request is not None and (request.gated or len(set(request.rows)) > 1) and state is not None
    setattr(cache, ROWS, moves)
    if moves:
        setattr(state, ROWS, True)


def check_encoded(active: Active, value: Any) -> None:
    """Raises StaleCacheError where an encoder's output was computed under other masks than hold now."""
    check_filled(active, value, 1, "encoder's output")
    # Inside generate its tensors were expanded, so they differ; generate made the output, or checked it before.
    if not torch.compiler.is_compiling() and not active.expand.get() and hasattr(value, VALUE):
        if getattr(value, VALUE) != identity_of(value):
            raise StaleCacheError("this encoder's output holds another tensor than the encoder gave; encode again")


def check_towers(active: Active, given: Mapping[str, Any]) -> None:
    """Raises StaleCacheError where an argument holds the output of a part for images or sounds: it carries no stamp."""
    name = next((name for name in OF_TOWERS if given.get(name) is not None), None)
    if name is not None and active.topics.masks:
        raise StaleCacheError(f"{name} does not tell under which masks it was computed; give what it was computed from")


def caches_of(value: Any) -> tuple[Cache, ...]:
    """The caches in an argument. An encoder-decoder has two, which may come from different forwards."""
    parts = (
        (value.self_attention_cache, value.cross_attention_cache)
        if isinstance(value, EncoderDecoderCache)
        else (value,)
    )
    return tuple(part for part in parts if isinstance(part, Cache))


def caches_in(values: Iterable[Any]) -> list[Cache]:
    """:func:`caches_of` all of these arguments."""
    return [cache for value in values if isinstance(value, Cache) for cache in caches_of(value)]


def length_of(cache: Cache) -> int | Tensor:
    """How many tokens a cache holds; 0 or 1 for a cache of linear attention, which only knows whether it holds any."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def knows_length(cache: Cache) -> bool:
    """Whether a cache tells how many tokens it holds, and not only that it holds some."""
    return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) or not cache.layers


def first_tensor(cache: Cache) -> Tensor | None:
    """A tensor with a row per sequence, which the cache replaces by a new one when it selects or moves rows."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "conv_states"))
    return next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)


def identity_of(output: ModelOutput) -> tuple[int, int]:
    """Address and version of the first tensor in an output: another tensor, or a write to it, changes them."""
    tensor = next(iter(output.values()))
    if not isinstance(tensor, Tensor):
        return 0, 0
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
