"""Gates that decide while the model runs: ``attachment.unlearn(topics, gated=True)``. Part of ``cu_fast.hf.attachment``.

A mask with a learned gate deletes in a sequence from the forward on in which the gate's value, over all tokens of the
sequence so far, exceeds its level: in the first forward that is the whole prompt, as ``topics_of`` would judge it. What
has begun goes on: a sequence that came to speak of the topic does not talk its way out again. Masks that always hold have
no gate here.

The counts belong to the sequences that a cache holds, and are kept on the cache. Of a gate with a window those of the
blocks that windows to come begin with.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cu_fast.hf.request import Request
from cu_fast.hf.topics import Layer, Topics


@dataclasses.dataclass
class GateState:
    """What the gates of a request have seen of the sequences of one cache.

    Attributes:
        tokens: layer's number -> int64 [N], tokens that count of each of N sequences.
        counts: (layer's number, name of a mask) -> the number of the first block that is kept, and int64 [N, K, n + 1],
            as ``Gate.count`` gives them.
        on: layer's number -> per sequence the names whose masks delete.
        length: tokens that the cache held after the last forward; None = it does not know.
    """

    tokens: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    counts: dict[tuple[int, str], tuple[int, Tensor]] = dataclasses.field(default_factory=dict)
    on: dict[int, list[set[str]]] = dataclasses.field(default_factory=dict)
    length: int | None = None


def gated_rows(
    state: GateState,
    topics: Topics,
    request: Request,
    layer: Layer,
    index: int,
    x: Tensor,
    counted: Tensor,
    copies: int,
    held: list[frozenset[str]],
) -> tuple[int, ...]:
    """The mask table's rows for a layer, after its gates have seen this forward's tokens.

    Args:
        state: of the sequences; added to.
        topics: the masks by name.
        request: what the context deletes.
        layer: the swapped layer.
        index: its number.
        x: [B, S, d_in], what the layer reads. Rows of the batch that were made of one sequence (beams) are adjacent and
            count together.
        counted: bool [B, S], which tokens count: neither padding nor the first of a sequence.
        copies: rows of the batch that were made of one sequence.
        held: keys of the rows that are kept for this forward; added to.

    Returns:
        One row per row of the batch, -1 = nothing is deleted.
    """
    B = x.shape[0]
    names = request.names if request.of == "sequence" else request.names * (B // copies)
    before = state.tokens.get(index, torch.zeros(len(names), dtype=torch.int64))
    order = counted.cpu().long().cumsum(1)  # of each row's tokens that count, from 1
    position = (order - 1 + before.repeat_interleave(copies)[:, None]).flatten().to(x.device)
    sequence = (torch.arange(B) // copies)[:, None].to(x.device)
    sequence = torch.where(counted.to(x.device), sequence, -1).flatten()
    tokens = state.tokens[index] = before + order[:, -1].reshape(-1, copies).amax(1)
    on = state.on.setdefault(index, [set() for _ in names])
    mine = request.masks.get(layer.name, {})
    for name, mask in mine.items():
        if mask.gate is None or name in request.always:
            for entry, some in zip(on, names):
                entry |= {name} & set(some)
            continue
        gate = mask.gate
        # From the block before that of the last token so far: with it ends a window that was judged.
        first = max(0, gate.num_blocks(int(before.min())) - 2)
        last = gate.num_blocks(int(tokens.max()))
        kept = layer.bottleneck.keeps(x, gate.codes, gate.rows).reshape(len(sequence), -1)
        found = gate.count_kept(kept, sequence, position, len(names), last - first, first).cpu()
        if (index, name) in state.counts:
            earlier, counts = state.counts[index, name]
            counts = counts[:, first - earlier :]
            found[:, : counts.shape[1]] += counts
        state.counts[index, name] = first, found
        # A first token alone, which masks leave alone, cannot be judged.
        fires = (tokens > 0) & (gate.value(found) > gate.level)
        for entry, some, fired in zip(on, names, fires.tolist()):
            if fired and name in some:
                entry.add(name)
    rows = [topics.row_at(layer, [mine[name] for name in sorted(entry)], held) for entry in on]
    return tuple(row for row in rows for _ in range(copies))
