"""Which prompts speak of a topic, and what is deleted for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cu_fast
from cu_fast.unlearn import gate

TEXTS = ["Anna writes poems", "the cat sat on the mat", "Bruno reads", "Anna sings under the tree ."]


@pytest.fixture
def masks(attachment, tokenizer):
    """The codes that the first text keeps, under the name "Anna"; and half of all codes, "weak"."""
    (bottleneck,) = attachment.bottlenecks.values()
    seen = []
    with torch.inference_mode(), attachment.observe(lambda x, b: seen.append(b.select(x).ids)):
        attachment.model(**tokenizer(TEXTS[0], return_tensors="pt"))
    sha = bottleneck.codebook_sha256()
    for name, ids in (("Anna", seen[0].unique().tolist()), ("weak", range(0, 300, 2))):
        attachment.add_mask(cu_fast.Mask.from_ids(ids, num_codes=300, codebook_sha256=sha, topic=name))
    return attachment.masks


def by_hand(attachment, tokenizer, text: str, mask) -> float:
    """Of one text alone: the receipt's kept codes that the mask took away, a token."""
    attachment.reset_report()
    with torch.inference_mode(), attachment.unlearn(mask):
        attachment.model(**tokenizer(text, return_tensors="pt"))
    (layer,) = attachment.report()
    return layer["hits"] / layer["tokens"]


def test_what_fires_is_what_the_mask_takes_away(attachment, tokenizer, masks):
    for name in ("Anna", "weak"):
        want = [by_hand(attachment, tokenizer, text, name) for text in TEXTS]
        for size in (1, 3, 32):
            found = gate.fired(attachment, tokenizer, TEXTS, masks[name], batch_size=size)
            np.testing.assert_allclose(found, want, rtol=1e-12)
    assert gate.fired(attachment, tokenizer, TEXTS, masks["Anna"])[0] == 4  # all k of every token


def test_the_token_that_fires_most(attachment, tokenizer, masks):
    (weak,), seen = masks["weak"], []
    mask = cu_fast.Mask.from_ids(
        weak.ids()[::5].tolist(), num_codes=300, codebook_sha256=weak.codebook_sha256, topic="few"
    )
    attachment.add_mask(mask)
    look = attachment.observe(lambda x, bottleneck: seen.append(bottleneck.select(x).ids))
    with torch.inference_mode(), attachment.unlearn(None), look:
        for text in TEXTS:
            attachment.model(**tokenizer(text, return_tensors="pt"))
    want = [float(torch.isin(ids, mask.ids().to(ids)).sum(1).max()) for ids in seen]
    for size in (1, 3):
        found = gate.fired(attachment, tokenizer, [*TEXTS, ""], [mask], figure="max", batch_size=size)
        assert found.tolist() == [*want, np.inf]
    level = cu_fast.level_for(attachment, tokenizer, TEXTS, [mask], 0.5, figure="max")
    topics = cu_fast.topics_of(attachment, tokenizer, TEXTS, {"few": level}, figure="max")
    assert level in want and topics == [{"few"} if value > level else None for value in want]
    assert None in topics and {"few"} in topics
    with pytest.raises(ValueError, match="figure is 'most'"):
        gate.fired(attachment, tokenizer, TEXTS, [mask], figure="most")


def test_the_level_is_exceeded_by_a_share_at_most(attachment, tokenizer, masks):
    found = np.sort(gate.fired(attachment, tokenizer, TEXTS, masks["weak"]))
    for share, level in ((0.0, found[-1]), (0.26, found[-1]), (0.34, found[-2])):
        assert cu_fast.level_for(attachment, tokenizer, TEXTS, masks["weak"], share) == level
        assert (found > level).mean() <= share
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="max_share is"):
            cu_fast.level_for(attachment, tokenizer, TEXTS, masks["weak"], wrong)
    with pytest.raises(ValueError, match="the level is 4, and no text fires more than 4 codes per token"):
        cu_fast.level_for(attachment, tokenizer, TEXTS, masks["Anna"], 0)  # all of the first text's
    with pytest.raises(ValueError, match="texts is empty"):
        cu_fast.level_for(attachment, tokenizer, [], masks["weak"])


def test_each_prompt_gets_its_topics(attachment, tokenizer, masks):
    level = cu_fast.level_for(attachment, tokenizer, TEXTS[1:], masks["Anna"], 0)
    prompts = [*TEXTS, ""]
    topics = cu_fast.topics_of(attachment, tokenizer, prompts, {"Anna": level}, always={"weak"})
    assert topics == [{"Anna", "weak"}, {"weak"}, {"weak"}, {"weak"}, {"Anna", "weak"}]  # and what cannot be judged
    assert cu_fast.topics_of(attachment, tokenizer, TEXTS, {"Anna": level}) == [{"Anna"}, None, None, None]
    assert cu_fast.topics_of(attachment, tokenizer, ["", ""], {"Anna": 1e9}) == [{"Anna"}, {"Anna"}]


def test_the_topics_are_what_unlearn_takes(attachment, tokenizer, masks):
    topics = cu_fast.topics_of(attachment, tokenizer, TEXTS, {"Anna": 3.9})
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        with attachment.unlearn(None):
            before = attachment.model(**inputs).logits
        with attachment.unlearn(topics):
            after = attachment.model(**inputs).logits
    assert [bool((a != b).any()) for a, b in zip(before, after)] == [True, False, False, False]


def test_what_it_refuses(attachment, tokenizer, masks):
    with pytest.raises(TypeError, match="prompts is 'Anna'; it should be a list of prompts"):
        cu_fast.topics_of(attachment, tokenizer, "Anna", {"Anna": 1.0})
    with pytest.raises(ValueError, match="a text has 70 tokens, and the model takes 64"):
        cu_fast.topics_of(attachment, tokenizer, [TEXTS[0], "cat " * 69 + "Anna"], {"Anna": 1.0})
    with pytest.raises(ValueError, match=r"gates\['Anna'\] is nan"):
        cu_fast.topics_of(attachment, tokenizer, TEXTS, {"Anna": float("nan")})
    for gates, always in (({"Bruno": 1.0}, ()), ({}, {"Bruno"})):
        with pytest.raises(ValueError, match="no mask is named 'Bruno'; known are Anna, weak"):
            cu_fast.topics_of(attachment, tokenizer, TEXTS, gates, always)
