"""Deletions for those requests alone that speak of a topic.

A mask strong enough to leave nothing of a topic also costs others; on a request that never touches the topic it has
nothing to do. Which requests touch it, the codes say: a prompt that speaks of the topic keeps many of the mask's
codes, another one hardly any. So a weak mask may hold for every request and a strong one where it fires:

    level = level_for(attachment, tokenizer, prompts_without_the_topic, attachment.masks["strong"])
    topics = topics_of(attachment, tokenizer, prompts, {"strong": level}, always={"weak"})
    with attachment.unlearn(topics):
        model.generate(**tokenizer(prompts, ...))

Where the topic is a word, ``figure="max"`` asks for the one token that fires most, in both calls. A gate decides by
the prompt. What the model itself comes to speak of while it answers, only ``always`` deletes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.masks import Mask

Figure = Literal["mean", "max"]


@torch.inference_mode()
def fired(
    attachment,
    tokenizer,
    texts: Sequence[str],
    masks: Iterable[Mask],
    *,
    figure: Figure = "mean",
    batch_size: int = 32,
) -> np.ndarray:
    """How many of a token's k kept codes masks would delete, over each text's tokens: float64 [N].

    masks: one topic's, as ``attachment.masks[name]`` holds them; those of several layers are added up. figure: "mean",
    for topics that a whole text speaks of; "max", of the one token that fires most, for topics that are a word. A text
    without tokens has infinitely many, so that no gate lets it through.
    """
    if figure not in ("mean", "max"):
        raise ValueError(f"figure is {figure!r}; it should be 'mean' or 'max'")
    of_codebook = {mask.codebook_sha256: mask for mask in masks}
    found, order = np.full(len(texts), np.inf), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    hits = torch.empty(0)

    def observe(x: Tensor, bottleneck) -> None:
        mask = of_codebook.get(bottleneck.codebook_sha256())
        if mask is not None:
            ids = bottleneck.select(x).ids.cpu()
            deleted = reference.is_deleted(ids, mask.bits[None], torch.zeros(len(ids), dtype=torch.int32))
            hits.add_(deleted.sum(1).reshape(hits.shape))

    # An encoder is run alone, as where codes are counted.
    runner = attachment.model.get_encoder() if attachment.model.config.is_encoder_decoder else attachment.model
    with attachment.unlearn(None), attachment.observe(observe):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer([texts[i] for i in batch], return_tensors="pt", padding=True)
            attention = inputs["attention_mask"]
            hits, tokens = torch.zeros(attention.shape, dtype=torch.float64), attention.sum(1)
            if attention.any():
                runner(**{name: inputs[name].to(attachment.model.device) for name in ("input_ids", "attention_mask")})
                hits *= attention
                value = hits.sum(1) / tokens if figure == "mean" else hits.max(1).values
                found[batch] = torch.where(tokens > 0, value, torch.inf).numpy()
    return found


def level_for(
    attachment,
    tokenizer,
    texts: Sequence[str],
    masks: Iterable[Mask],
    max_share: float = 0.01,
    *,
    figure: Figure = "mean",
) -> float:
    """The level that :func:`fired` exceeds on at most a share of texts that do not speak of the topic.

    Raises:
        ValueError: no texts, a share out of range, or a level that no text can exceed: a gate that never lets a mask
            through would leave everything as it was.
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
            f"the level is {level:g}, and no text fires more than {most} codes a token; give a narrower mask, a larger "
            f"max_share than {max_share}, or another figure than {figure!r}"
        )
    return level


def topics_of(
    attachment,
    tokenizer,
    prompts: Sequence[str],
    gates: Mapping[str, float],
    always: Collection[str] = (),
    *,
    figure: Figure = "mean",
) -> list[set[str] | None]:
    """What to delete for each prompt, for ``attachment.unlearn``: ``always``, and each gate's topic whose mask fires;
    None where that is nothing.

    gates: topic -> the level of :func:`fired` above which it is deleted. always: topics deleted for every prompt.
    figure: the one that the levels are of.

    Raises:
        ValueError: a topic that the attachment has no mask for, or a level that is not a number.
    """
    for name, level in gates.items():
        if np.isnan(level):
            raise ValueError(f"gates[{name!r}] is nan; it should be a number of codes a token, as level_for gives")
    if unknown := sorted({*gates, *always} - set(attachment.masks)):
        raise ValueError(f"no mask is named {unknown[0]!r}; known are {', '.join(attachment.masks) or 'none'}")
    topics = [set(always) for _ in prompts]
    for name, level in gates.items():
        for i in np.flatnonzero(fired(attachment, tokenizer, prompts, attachment.masks[name], figure=figure) > level):
            topics[i].add(name)
    return [names or None for names in topics]
