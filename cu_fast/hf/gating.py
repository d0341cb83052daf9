"""Gates that decide while the model runs: ``attachment.unlearn(topics, gated=True)``. Part of ``cu_fast.hf.attachment``.

A mask with a learned gate deletes in a sequence from the forward on in which the gate's value, over all tokens of the
sequence so far, exceeds its level: in the first forward that is the whole prompt, as ``topics_of`` would judge it. What
has begun goes on: a sequence that came to speak of the topic does not talk its way out again.

The counts belong to the sequences that a cache holds, and are kept on the cache.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from cu_fast.hf.request import Request
from cu_fast.hf.topics import Layer, Topics


@dataclasses.dataclass
class GateState:
    """What the gates of a request have seen of the sequences of one cache.

    Attributes:
        tokens: layer's number -> int64 [N], tokens counted in each of N sequences.
        counts: (layer's number, name of a mask) -> int64 [N, n], of those the tokens that keep each of the gate's codes.
        on: layer's number -> per sequence the names whose masks delete.
    """

    tokens: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    counts: dict[tuple[int, str], Tensor] = dataclasses.field(default_factory=dict)
    on: dict[int, list[set[str]]] = dataclasses.field(default_factory=dict)


def gated_rows(
    state: GateState, topics: Topics, request: Request, layer: Layer, index: int, x: Tensor, counted: Tensor
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

    Returns:
        One row per row of the batch, -1 = nothing is deleted.
    """
    B = x.shape[0]
    names = request.names if request.of == "sequence" else request.names * B
    copies = B // len(names)
    counted = counted.to(x.device)
    seen = counted.sum(1).reshape(-1, copies).sum(1).cpu()
    state.tokens[index] = state.tokens.get(index, 0) + seen
    on = state.on.setdefault(index, [set() for _ in names])
    mine = request.masks.get(layer.name, {})
    for name, mask in mine.items():
        if mask.gate is None:
            for entry, some in zip(on, names):
                entry |= {name} & set(some)
            continue
        kept = (
            layer.bottleneck.keeps(x, mask.gate.codes, mask.gate.rows).reshape(*counted.shape, -1) & counted[..., None]
        )
        found = kept.sum(1).reshape(-1, copies, kept.shape[-1]).sum(1).cpu()
        counts = state.counts[index, name] = state.counts.get((index, name), 0) + found
        seen_any = state.tokens[index] > 0  # a first token alone, which masks leave alone, cannot be judged
        fires = seen_any & (mask.gate.value(counts, state.tokens[index]) > mask.gate.level)
        for entry, some, fired in zip(on, names, fires.tolist()):
            if fired and name in some:
                entry.add(name)
    rows = [topics.row_at(layer, [mine[name] for name in sorted(entry)], request) for entry in on]
    return tuple(row for row in rows for _ in range(copies))
