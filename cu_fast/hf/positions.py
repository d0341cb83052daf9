"""Which tokens of a batch are padding, and which are the first of their sequence. Part of ``cu_fast.hf.attachment``.

The first position is an attention sink: its hidden state is many times as long as others, and no sparse autoencoder
was fitted to it. Masks leave it alone. Where it is not certain that a token is the first, it is not.

B sequences, S tokens of this forward, K keys: tokens that the cache holds, those of the forward, and places of a static
cache that nothing fills yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What the attention mask of a forward says.

    Attributes:
        real: bool [B, S], which of its tokens are no padding.
        before: int64 [B, 1], how many tokens that are no padding the cache holds; or the tokens that it holds, for all
            sequences, where the mask does not tell.
        known: there was no mask, or it has a form that was understood; else no token counts as padding.
    """

    real: Tensor
    before: Tensor | int
    known: bool


def tokens_of(given: Mapping[str, Any], names: Iterable[str], length: int | Tensor | None) -> Tokens | None:
    """Read the attention mask of a forward.

    It may be [B, K], true or 1 where a token is none of padding; [B, K] with K <= S + length, for the last K tokens; or
    [B or 1, heads or 1, S, K], which queries see which keys, added (0 and a very small number) or true and false. A token
    that no query sees is padding. transformers lets a query that would see nothing see everything; such queries do not
    count, unless all of a sequence see what comes after them, as in an encoder.

    Args:
        given: a model's arguments by name.
        names: of the arguments that hold the sequences.
        length: tokens that the cache holds, padding included; 0 where there is none, None where it does not tell.

    Returns:
        None where the sequences are not known.
    """
    name = next((name for name in names if isinstance(given.get(name), Tensor)), None)
    if name is None or given[name].dim() < 2:
        return None
    B, S = given[name].shape[:2]
    device, before = given[name].device, 0 if length is None else length
    mask = given.get("attention_mask", given.get("decoder_attention_mask"))
    if name.startswith("decoder_"):
        mask = given.get("decoder_attention_mask")
    if isinstance(mask, Mapping):  # a mask for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    everything = torch.ones(B, S, dtype=torch.bool, device=device)
    if mask is None:
        return Tokens(everything, before, True)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < S or len(mask) not in (1, B):
        return Tokens(everything, before, False)
    K, mask = mask.shape[-1], mask.to(device)
    if mask.dim() == 4 and mask.shape[2] != S:
        return Tokens(everything, before, False)
    # Where the first token of the forward is among the keys.
    start: int | Tensor = K - S
    if K > S and length is not None and (isinstance(length, Tensor) or K > S + length):
        start = length
    own = torch.arange(S, device=device) + start
    if mask.dim() == 2:
        there = mask.bool().expand(B, K)
    else:
        seen = _seen(mask).any(1).expand(B, S, K)
        key = torch.arange(K, device=device)
        ahead = (seen & (key > own[:, None])).any(2)
        usable = ~ahead | ahead.all(1, keepdim=True)
        there = (seen & usable[..., None]).any(1)
    if K > S:
        before = (there & (torch.arange(K, device=device) < start)).sum(1, keepdim=True)
    return Tokens(there.index_select(1, own), before, True)


def _seen(mask: Tensor) -> Tensor:
    """Which keys a query sees, of a mask that is added to scores, or of one that is true or 1 where it does."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.dtype.is_floating_point else mask.bool()


def first_tokens(given: Mapping[str, Any], names: Iterable[str], length: int | Tensor | None, n: int) -> Tensor | None:
    """The first n tokens of each sequence.

    Args:
        given: a model's arguments by name.
        names: of the arguments that hold the sequences.
        length: tokens that the cache holds, padding included; 0 where there is none, None where it does not tell.
        n: how many, at least 1.

    Returns:
        bool [B, S]; at most n are true per sequence, of a packed row per sequence in it. None = there are none, or the
        sequences are not known.
    """
    names = tuple(names)
    tokens = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    if tokens is None or tokens.dim() < 2 or length is None:
        return None
    B, S = tokens.shape[:2]
    compiling = torch.compiler.is_compiling()
    # A token alone comes after what the cache holds; of several the cache may hold padding alone.
    if isinstance(length, int) and length >= n and not compiling and (S == 1 or given.get("attention_mask") is None):
        return None
    real, before, _ = tokens_of(given, names, length)
    first = (real.long().cumsum(1) + before <= n) & real
    if (positions := _positions(given, B, S, tokens.device)) is not None:
        unmasked = given.get("attention_mask", given.get("decoder_attention_mask")) is None
        if unmasked and given.get("use_cache") is False and isinstance(length, int) and length == 0:
            first = first | _packed(positions, n)
        first = first & (positions < n)
    return first


def first_of_paged(given: Mapping[str, Any], names: Iterable[str], n: int) -> Tensor | None:
    """As :func:`first_tokens`, of continuous batching's row: its manager states the position of every token."""
    ids = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    if ids is None or ids.dim() < 2:
        return None
    positions = _positions(given, *ids.shape[:2], ids.device)
    return None if positions is None else positions < n


def _positions(given: Mapping[str, Any], B: int, S: int, device: torch.device) -> Tensor | None:
    """[B, S], None where they are not given or not one number per token."""
    positions = given.get("position_ids")
    if not (isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == S):
        return None
    return positions.to(device).expand(B, S)


def _packed(positions: Tensor, n: int) -> Tensor:
    """The first n tokens of each sequence of a packed row but its first one: positions begin again at 0.

    transformers parts such a row only where it is given neither a mask of attention nor a cache: else a token sees all
    that are before it, and is not the first of anything.
    """
    starts = (positions == 0) & torch.nn.functional.pad(positions[:, :-1] > 0, (1, 0))
    first = starts & False
    for shift in range(min(n, positions.shape[1])):
        moved = torch.nn.functional.pad(starts[:, : positions.shape[1] - shift], (shift, 0))
        first = first | (moved & (positions == shift))
    return first
