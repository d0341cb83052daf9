"""Deletions for those prompts alone that speak of a topic.

A mask strong enough to leave nothing of a topic also costs other topics, and on a prompt that does not touch the topic
it is of no use. The codes tell such prompts apart: a prompt that speaks of the topic keeps many of the mask's codes,
another prompt hardly any. So a weak mask may hold for every prompt, and a strong one only where it fires:

    level = level_for(attachment, tokenizer, prompts_without_the_topic, attachment.masks["strong"])
    topics = topics_of(attachment, tokenizer, prompts, {"strong": level}, always={"weak"})
    with attachment.unlearn(topics):
        model.generate(**tokenizer(prompts, ...))

Where the topic is a word, give ``figure="max"``, the token that fires most, in both calls. A gate decides by the
prompt: a topic that the model comes to speak of only while it answers is deleted by ``always`` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.masks import Mask
from cu_fast.ops.checks import check_choice
from cu_fast.unlearn.count import reader_of

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer
    from cu_fast.nn import CodebookBottleneck

Figure = Literal["mean", "max"]


@torch.inference_mode()
def fired(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    masks: Iterable[Mask],
    *,
    figure: Figure = "mean",
    batch_size: int = 32,
) -> np.ndarray:
    """How many of a token's k kept codes masks would delete, over the tokens of each text.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: prompts, as the model sees them.
        masks: of one topic, as ``attachment.masks[name]`` holds them; the counts of several layers are added.
        figure: "mean" of the text's tokens, for topics that a whole text speaks of; "max", the token that fires most,
            for topics that are a word.
        batch_size: texts per forward pass.

    Returns:
        Codes per token, float64, one number per text. A text without tokens has inf: every gate deletes for it.

    Raises:
        ValueError: an unknown figure.
    """
    check_choice("figure", figure, get_args(Figure))
    of_codebook = {mask.codebook_sha256: mask for mask in masks}
    found, order = np.full(len(texts), np.inf), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    hits = torch.empty(0)

    def observe(x: Tensor, bottleneck: CodebookBottleneck) -> None:
        mask = of_codebook.get(bottleneck.codebook_sha256())
        if mask is not None:
            ids = bottleneck.select(x).ids.cpu()
            deleted = reference.is_deleted(ids, mask.bits[None], torch.zeros(len(ids), dtype=torch.int32))
            hits.add_(deleted.sum(1).reshape(hits.shape))

    reader = reader_of(attachment.model)
    with attachment.unlearn(None), attachment.observe(observe):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer([texts[i] for i in batch], return_tensors="pt", padding=True)
            attention = inputs["attention_mask"]
            hits, tokens = torch.zeros(attention.shape, dtype=torch.float64), attention.sum(1)
            if attention.any():
                reader(**{name: inputs[name].to(attachment.model.device) for name in ("input_ids", "attention_mask")})
                hits *= attention
                value = hits.sum(1) / tokens if figure == "mean" else hits.max(1).values
                found[batch] = torch.where(tokens > 0, value, torch.inf).numpy()
    return found


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
        ValueError: no texts, an unknown figure, a share out of range, or a level that no text can exceed: with it the
            mask would never hold.
    """
    if not 0 <= max_share < 1:
        raise ValueError(f"max_share is {max_share}; it should be a share, at least 0 and below 1")
    if not texts:
        raise ValueError("texts is empty; give prompts that do not speak of the topic")
    masks = list(masks)
    found = fired(attachment, tokenizer, texts, masks, figure=figure)
    level = float(np.quantile(found, 1 - max_share, method="higher"))
    of_codebook = {b.codebook_sha256(): b.config.k for b in attachment.bottlenecks.values()}
    if level >= (most := sum(of_codebook.get(mask.codebook_sha256, 0) for mask in masks)):
        raise ValueError(
            f"the level is {level:g}, and no text fires more than {most} codes per token; give a narrower mask, a "
            f"larger max_share than {max_share}, or another figure than {figure!r}"
        )
    return level


def topics_of(
    attachment: Attachment,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    gates: Mapping[str, float],
    always: Collection[str] = (),
    *,
    figure: Figure = "mean",
) -> list[set[str] | None]:
    """What to delete for each prompt: the topics of ``always``, and those of gates whose masks fire.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        prompts: as the model sees them.
        gates: name of a mask -> the level, in codes per token, of :func:`fired` above which it deletes.
        always: names of masks that delete for every prompt.
        figure: of the levels: "mean" or "max".

    Returns:
        The argument of ``attachment.unlearn``: per prompt a set of names, None = nothing.

    Raises:
        ValueError: a topic that the attachment has no mask for, an unknown figure, or a level that is not a number.
    """
    for name, level in gates.items():
        if np.isnan(level):
            raise ValueError(f"gates[{name!r}] is nan; it should be a number of codes per token, as level_for gives")
    if unknown := sorted({*gates, *always} - set(attachment.masks)):
        raise ValueError(f"no mask is named {unknown[0]!r}; known are {', '.join(attachment.masks) or 'none'}")
    topics = [set(always) for _ in prompts]
    for name, level in gates.items():
        for i in np.flatnonzero(fired(attachment, tokenizer, prompts, attachment.masks[name], figure=figure) > level):
            topics[i].add(name)
    return [names or None for names in topics]
