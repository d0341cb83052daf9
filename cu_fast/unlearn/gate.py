"""Deletions for those prompts alone that speak of a topic.

A mask strong enough to leave nothing of a topic also costs other topics, and on a prompt that does not touch the topic
it is of no use. The codes tell such prompts apart: a prompt that speaks of the topic keeps many of the mask's codes,
another prompt hardly any. So a weak mask may hold for every prompt, and a strong one only where it fires:

    level = level_for(attachment, tokenizer, prompts_without_the_topic, attachment.masks["strong"])
    topics = topics_of(attachment, tokenizer, prompts, {"strong": level}, always={"weak"})
    with attachment.unlearn(topics):
        model.generate(**tokenizer(prompts, ...))

Where the topic is a word, give ``figure="max"``, the token that fires most, in both calls. A gate that was learned
(``learn.py``) also looks at codes that are not deleted, and so tells a topic from its neighbours; the mask carries it:

    attachment.add_mask(fit_gate(attachment, tokenizer, mask, topic_texts, other_texts, {"near": near_texts}))
    topics = topics_of(attachment, tokenizer, prompts, {"topic"})

A gate here decides by the prompt: a topic that the model comes to speak of only while it answers is deleted by
``always`` alone. First positions that masks leave alone count for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.masks import Mask
from cu_fast.nn import Splice
from cu_fast.ops.checks import check_choice
from cu_fast.unlearn.reading import FewLatents, kept_codes, layers_of, reading

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer

Figure = Literal["mean", "max"]


def fired(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    masks: Iterable[Mask],
    *,
    figure: Figure = "mean",
    batch_size: int = 32,
) -> np.ndarray:
    """How many of the codes that a token keeps masks would delete, over the tokens of each text.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: prompts, as the model sees them.
        masks: of one topic, as ``attachment.masks[name]`` holds them; the counts of several layers are added.
        figure: "mean" of the text's tokens, for topics that a whole text speaks of; "max", the token that fires most,
            for topics that are a word.
        batch_size: texts per forward pass.

    Returns:
        Codes per token, float64, one number per text. A text without tokens that count has inf: every gate deletes for it.

    Raises:
        ValueError: an unknown figure, a mask of another codebook, or for layers that do not run where prompts are read.
    """
    check_choice("figure", figure, get_args(Figure))
    return _read(attachment, tokenizer, texts, {"": masks}, {}, figure, batch_size)[0][""]


def gate_values(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    masks: Iterable[Mask],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """The values of learned gates, :meth:`cu_fast.masks.Gate.value`.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: prompts, as the model sees them.
        masks: M masks, each with a gate.
        batch_size: texts per forward pass.

    Returns:
        float64 [texts, M]; a mask is used where its column is above ``mask.gate.level``. A text without tokens that count
        has inf.

    Raises:
        ValueError: a mask without a gate, or of another codebook, or for a layer that does not run where prompts are read.
    """
    masks = list(masks)
    for mask in masks:
        _check_gate(mask.topic, [mask])
    named = {str(i): [mask] for i, mask in enumerate(masks)}
    values = _read(attachment, tokenizer, texts, {}, named, "mean", batch_size)[1]
    return np.concatenate([values[name] for name in named], 1) if named else np.zeros((len(texts), 0))


def level_for(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    masks: Iterable[Mask],
    max_share: float = 0.01,
    *,
    figure: Figure = "mean",
) -> float:
    """The level that :func:`fired` exceeds on at most a share of texts that do not speak of the topic.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: prompts that do not speak of the topic, as the model sees them.
        masks: of the topic, as ``attachment.masks[name]`` holds them.
        max_share: of the texts, at least 0 and below 1: 0.01 = 1 %.
        figure: as for :func:`fired`: "mean" or "max".

    Returns:
        Codes per token.

    Raises:
        ValueError: no texts, an unknown figure, a share out of range, a mask of another codebook, or a level that no text
            can exceed: with it the mask would never hold.
    """
    check_share("max_share", max_share)
    if not texts:
        raise ValueError("texts is empty; give prompts that do not speak of the topic")
    masks = list(masks)
    found = fired(attachment, tokenizer, texts, masks, figure=figure)
    level = float(np.quantile(found, 1 - max_share, method="higher"))
    # A token keeps k codes; of latents with a threshold, all that a mask deletes may fire.
    most = sum(
        min(mask.num_deleted, attachment.bottlenecks[layer].k or mask.num_deleted)
        for layer, mask in layers_of(attachment, masks).items()
    )
    if level >= most:
        raise ValueError(
            f"the level is {level:g}, and no text fires more than {most} codes per token; give a narrower mask, a "
            f"larger max_share than {max_share}, or another figure than {figure!r}"
        )
    return level


def topics_of(
    attachment: Attachment,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    gates: Mapping[str, float | None] | Collection[str],
    always: Collection[str] = (),
    *,
    figure: Figure = "mean",
) -> list[set[str] | None]:
    """What to delete for each prompt: the topics of ``always``, and those of gates whose masks fire.

    The prompts are read once, whatever the number of gates.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        prompts: as the model sees them.
        gates: name of a mask -> the level, in codes per token, of :func:`fired` above which it deletes; None = the gate
            that its mask carries. Or names alone, of masks that carry one. A name with masks for several layers deletes
            where the gate of any of them does.
        always: names of masks that delete for every prompt.
        figure: of the levels: "mean" or "max".

    Returns:
        The argument of ``attachment.unlearn``: per prompt a set of names, None = nothing.

    Raises:
        ValueError: a topic that the attachment has no mask for, an unknown figure, a level that is not a number, a
            name whose masks carry no gate, or a prompt that is longer than the model takes.
        TypeError: gates is one name, or prompts is one prompt.
        RuntimeError: the autoencoder is not at hand, and neither are the gate's rows.
    """
    if isinstance(gates, str):
        raise TypeError(f"gates is {gates!r}; it should be a set of names, or name -> level")
    if isinstance(prompts, str):
        raise TypeError(f"prompts is {prompts!r}; it should be a list of prompts")
    check_choice("figure", figure, get_args(Figure))
    levels = dict(gates) if isinstance(gates, Mapping) else dict.fromkeys(gates)
    for name, level in levels.items():
        if level is not None and np.isnan(level):
            raise ValueError(f"gates[{name!r}] is nan; it should be a number of codes per token, as level_for gives")
    if unknown := sorted({*levels, *always} - set(attachment.masks)):
        raise ValueError(f"no mask is named {unknown[0]!r}; known are {', '.join(attachment.masks) or 'none'}")
    plain = {name: attachment.masks[name] for name, level in levels.items() if level is not None}
    learned = {name: attachment.masks[name] for name, level in levels.items() if level is None}
    for name, masks in learned.items():
        _check_gate(name, masks)
    learned = {name: [mask for mask in masks if mask.gate is not None] for name, masks in learned.items()}
    found, values = _read(attachment, tokenizer, prompts, plain, learned, figure, 32)
    topics = [set(always) for _ in prompts]
    for name, level in levels.items():
        if level is None:
            fires = (values[name] > [mask.gate.level for mask in learned[name]]).any(1)
        else:
            fires = found[name] > level
        for i in np.flatnonzero(fires):
            topics[i].add(name)
    return [names or None for names in topics]


def check_share(name: str, share: float) -> None:
    """Raises ValueError for what is no share of texts."""
    if not 0 <= share < 1:
        raise ValueError(f"{name} is {share}; it should be a share, at least 0 and below 1")


def _check_gate(name: str, masks: Iterable[Mask]) -> None:
    if all(mask.gate is None for mask in masks):
        raise ValueError(f"mask {name!r} carries no learned gate; make it one with fit_gate, or give a level for it")


@torch.inference_mode()
def _read(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    plain: Mapping[str, Iterable[Mask]],
    learned: Mapping[str, Iterable[Mask]],
    figure: Figure,
    batch_size: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read texts once.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: N of them.
        plain: name -> masks whose codes are counted.
        learned: name -> masks whose gates are, M of them.
        figure: of plain ones.
        batch_size: texts per forward pass.

    Returns:
        name -> float64 [N] for plain ones, and name -> float64 [N, M] for learned ones.
    """
    plain = {name: layers_of(attachment, masks) for name, masks in plain.items()}
    learned = {name: layers_of(attachment, masks) for name, masks in learned.items()}
    found = {name: np.full(len(texts), np.inf) for name in plain}
    values = {name: np.full((len(texts), len(masks)), np.inf) for name, masks in learned.items()}
    layers = {layer for masks in (*plain.values(), *learned.values()) for layer in masks}
    if not layers:
        return found, values
    readers = {layer: _reader(attachment, layer, plain.values(), learned.values()) for layer in layers}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    hits: dict[str, Tensor] = {}  # name -> fp64 [B, S], deleted codes per token
    counted: dict[str, Tensor] = {}  # layer -> bool [B, S], which tokens count
    counts: dict[tuple[str, str], Tensor] = {}  # name and layer -> int64 [B, K, n + 1], of a gate

    def visit(layer: str, x: Tensor, valid: Tensor, _: Tensor) -> None:
        counted[layer] = valid
        B, S = valid.shape
        sequence = torch.arange(B)[:, None].expand(B, S)[valid]
        position = (valid.long().cumsum(1) - 1)[valid]
        deleted: dict[str, list[Tensor]] = {name: [] for name, masks in plain.items() if layer in masks}
        done = 0
        for _, kept in kept_codes(readers[layer], x):
            ids = kept.cpu()
            for name, parts in deleted.items():
                bits = plain[name][layer].bits[None]
                parts.append(reference.is_deleted(ids, bits, torch.zeros(len(ids), dtype=torch.int32)).sum(1))
            for name, masks in learned.items():
                if layer in masks:
                    gate, part = masks[layer].gate, slice(done, done + len(ids))
                    more = gate.count(ids, sequence[part], position[part], B, gate.num_blocks(S))
                    counts[name, layer] = counts.get((name, layer), 0) + more
            done += len(ids)
        for name, parts in deleted.items():
            if done:
                hits.setdefault(name, torch.zeros(B, S, dtype=torch.float64))[valid] += torch.cat(parts).double()

    with reading(attachment, tokenizer, layers, visit) as read:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            hits.clear(), counted.clear(), counts.clear()
            read([texts[i] for i in batch])
            if not counted:  # no token
                continue
            for name, masks in plain.items():
                known = [counted[layer] for layer in masks if layer in counted]
                _check_read(name, masks, known)
                tokens = torch.stack(known).any(0).sum(1)
                if name in hits:
                    of_text = hits[name].sum(1) / tokens if figure == "mean" else hits[name].max(1).values
                    found[name][batch] = torch.where(tokens > 0, of_text, torch.inf).numpy()
            for name, masks in learned.items():
                for column, (layer, mask) in enumerate(masks.items()):
                    _check_read(name, [layer], [layer] if layer in counted else [])
                    if (name, layer) in counts:
                        values[name][batch, column] = mask.gate.value(counts[name, layer]).numpy()
    return found, values


def _reader(
    attachment: Attachment,
    layer: str,
    plain: Iterable[Mapping[str, Mask]],
    learned: Iterable[Mapping[str, Mask]],
) -> Splice | FewLatents:
    """What says which codes a layer's tokens keep: its splice, or the rows that masks and gates brought."""
    splice = attachment.bottlenecks[layer]
    if not splice.has_latents or splice.sae is not None:
        return splice
    parts = [(masks[layer].ids(), masks[layer].rows) for masks in plain if layer in masks]
    parts += [(masks[layer].gate.codes, masks[layer].gate.rows) for masks in learned if layer in masks]
    if any(rows is None for _, rows in parts):
        raise RuntimeError(
            f"only rows of masks are at layer {layer!r}, and a gate there has none of its own; save its mask with "
            f"rows=True where the autoencoder is at hand, or attach the autoencoder itself"
        )
    return FewLatents(parts)


def _check_read(name: str, layers: Iterable[str], read: Collection) -> None:
    if not read:
        raise ValueError(
            f"mask {name!r} is for layer {', '.join(layers)}, which does not run where prompts are read: of an "
            f"encoder-decoder that is the encoder alone"
        )
