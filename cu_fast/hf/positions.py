"""Which tokens of a batch are the first of their sequence. Part of ``cu_fast.hf.attachment``.

The first position is an attention sink: its hidden state is many times as long as others, and no sparse autoencoder
was fitted to it. Masks leave it alone. Where it is not certain that a token is the first, it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def real_tokens(given: Mapping[str, Any], names: Iterable[str]) -> Tensor | None:
    """Which tokens of a forward are no padding.

    Args:
        given: a model's arguments by name.
        names: of the arguments that hold the sequences.

    Returns:
        bool [B, S]; all are true where no mask [B, S'] with S' >= S says otherwise. None = the sequences are not known.
    """
    ids = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    if ids is None or ids.dim() < 2:
        return None
    B, S = ids.shape[:2]
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == B and mask.shape[1] >= S:
        return mask[:, -S:].bool().to(ids.device)
    return torch.ones(B, S, dtype=torch.bool, device=ids.device)


def first_tokens(given: Mapping[str, Any], names: Iterable[str], length: int | Tensor, n: int) -> Tensor | None:
    """The first n tokens of each sequence.

    Args:
        given: a model's arguments by name.
        names: of the arguments that hold the sequences.
        length: tokens that the cache holds; 0 where there is none.
        n: how many, at least 1.

    Returns:
        bool [B, S]; at most n are true per sequence, of a packed row per sequence in it. None = there are none, or the
        sequences are not known.
    """
    if isinstance(length, int) and length >= n and not torch.compiler.is_compiling():
        return None
    ids = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    if ids is None or ids.dim() < 2:
        return None
    B, S = ids.shape[:2]
    real, order = None, torch.arange(1, S + 1, device=ids.device).expand(B, S)
    mask = given.get("attention_mask", given.get("decoder_attention_mask"))
    if isinstance(mask, Tensor) and mask.shape == (B, S):
        real = mask.bool().to(ids.device)
        order = real.long().cumsum(1)
    first = order + length <= n
    if (positions := _positions(given, B, S, ids.device)) is not None:
        if mask is None and given.get("use_cache") is False and isinstance(length, int) and length == 0:
            first = first | _packed(positions, n)
        first = first & (positions < n)
    return first if real is None else first & real


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
