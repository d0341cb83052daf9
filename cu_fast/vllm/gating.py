"""Masks for those prompts alone that fire them: judged on the prompt, in the step that computes it.

A prompt is computed in one step: chunked prefill is refused at start, and such requests do not read the prefix cache. So what
is decided depends on the prompt alone, never on the batch, and a request that was preempted is judged alike again. Where
a level is given, that is the mean number of the mask's codes that a token of the prompt keeps, as ``cu_fast.unlearn.fired``
counts; else the value of the mask's learned gate. Positions that masks leave alone do not count; a prompt of no others is
unlearned.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from cu_fast.masks import Gate, Mask
from cu_fast.nn import Splice

_KNOWN: weakref.WeakKeyDictionary[Mask, tuple[Tensor, Gate | None]] = weakref.WeakKeyDictionary()


def fires(splice: Splice, mask: Mask, level: float | None, x: Tensor) -> bool:
    """Whether a prompt is one that a mask is for.

    Args:
        splice: of the layer.
        mask: for that layer.
        level: codes per token; None = the mask's gate decides.
        x: [T, d_in], what the layer reads at the prompt's tokens that count.
    """
    if not len(x):
        return True
    codes, gate = _on(mask, x.device)
    if level is None:
        position = torch.arange(len(x), device=x.device)
        kept = splice.keeps(x, gate.codes, gate.rows)
        counts = gate.count_kept(kept, torch.zeros_like(position), position, 1, gate.num_blocks(len(x)))
        return bool(gate.value(counts) > gate.level)
    return int(splice.keeps(x, codes, mask.rows).sum()) / len(x) > level


def _on(mask: Mask, device: torch.device) -> tuple[Tensor, Gate | None]:
    """A mask's codes, int32 [n], and its gate on a device: the same tensors each time, as a splice keeps what is of them."""
    codes, gate = _KNOWN.get(mask, (None, None))
    if codes is None or codes.device != device:
        codes, gate = mask.ids().to(device, torch.int32), mask.gate and mask.gate.to(device)
        _KNOWN[mask] = codes, gate
    return codes, gate
