"""Counting, finding and gates for the latents of a released autoencoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cu_fast
from cu_fast import unlearn
from cu_fast.unlearn import count_codes, find_mask, reading

LAYER = "model.layers.1"
ANNA = ["Anna writes books .", "Anna reads red poems .", "the cat sat on Anna ."]
OTHERS = ["Bruno writes books .", "the dog ran under the tree .", "a green bird sings ."]


def activations(attachment, tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """Per text fp32 [S, C], each read alone."""
    (splice,), seen = attachment.bottlenecks.values(), []
    with (
        torch.no_grad(),
        attachment.unlearn(None),
        attachment.observe(lambda x, _: seen.append(splice.sae.activations(x[0]))),
    ):
        for text in texts:
            attachment.model(**tokenizer(text, return_tensors="pt"))
    return seen


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_counts_are_what_fires_after_the_first_position(latents, tokenizer, kind):
    attachment = latents(kind)
    found = activations(attachment, tokenizer, ANNA)
    for skip, skip_first in ((1, None), (0, 0), (2, 2)):
        got = count_codes(
            attachment, tokenizer, ANNA, layer=LAYER, squares=True, skip_first=skip_first, batch_size=1, progress=False
        )
        whole = torch.cat([a[skip:] for a in found])
        assert torch.equal(got.counts, (whole > 0).sum(0)) and got.tokens == len(whole)
        np.testing.assert_allclose(got.squares.numpy(), whole.double().square().sum(0).numpy(), rtol=1e-12)
        assert 0 < int(got.counts.sum()) < got.counts.numel() * got.tokens / 2


def test_padding_moves_no_first_position(latents, tokenizer):
    """Left padding: the first token of each text is left out, not the first place of the batch."""
    assert tokenizer.padding_side == "left"
    seen = []
    with reading.reading(latents("threshold"), tokenizer, [LAYER], lambda *found: seen.append(found)) as read:
        read(["Anna sings", "the cat sat on the mat", "Anna"])
    ((_, x, valid, tokens),) = seen
    assert valid.int().tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1], [0] * 6] and len(x) == 6
    assert tokenizer.decode(tokens[valid]) == "sings cat sat on the mat"


def test_no_more_than_a_tile_is_looked_at(latents, tokenizer, monkeypatch):
    attachment = latents("threshold")
    (splice,), sizes, active = attachment.bottlenecks.values(), [], type(attachment.bottlenecks[LAYER]).active
    whole = count_codes(attachment, tokenizer, ANNA, layer=LAYER, progress=False)
    monkeypatch.setattr(reading, "TILE", 3 * splice.num_codes)
    monkeypatch.setattr(
        type(splice), "active", lambda self, x, depth=None: sizes.append(len(x)) or active(self, x, depth)
    )
    tiled = count_codes(attachment, tokenizer, ANNA, layer=LAYER, progress=False)
    assert max(sizes) == 3 and sum(sizes) == whole.tokens
    assert torch.equal(whole.counts, tiled.counts) and torch.equal(whole.contexts, tiled.contexts)


def test_a_token_with_nan_fires_nothing(latents):
    (splice,) = latents("threshold").bottlenecks.values()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[1, 5] = float("nan")
    ((_, ids),) = reading.kept_codes(splice, x)
    assert (ids[1] == -1).all() and (ids[[0, 2]] >= 0).any(1).all()


def test_depths(latents, tokenizer):
    with pytest.raises(ValueError, match=r"depth is 8; layer 'model.layers.1' has latents with a threshold"):
        count_codes(latents("threshold"), tokenizer, ANNA, layer=LAYER, depth=8)
    with pytest.raises(ValueError, match=r"depth is 4; it should be an int, at least 5, at most 120"):
        find_mask(latents("topk"), tokenizer, ANNA, OTHERS, topic="Anna", depth=4)
    deeper = [count_codes(latents("topk"), tokenizer, ANNA, layer=LAYER, depth=d, progress=False) for d in (None, 5, 9)]
    assert torch.equal(deeper[0].counts, deeper[1].counts)
    assert (deeper[2].counts >= deeper[1].counts).all() and deeper[2].counts.sum() > deeper[1].counts.sum()


def test_counts_of_other_codes_are_refused(latents, tokenizer):
    """They would name codes that have nothing to do with the topic, and the mask would hold on the new ones."""
    attachment = latents("topk")
    given = dict(topic="Anna", progress=False)

    def counted(**options):
        return count_codes(attachment, tokenizer, ANNA, layer=LAYER, progress=False, **options)

    before, deeper, texts = (
        counted(),
        counted(depth=9),
        unlearn.count_texts(attachment, tokenizer, ANNA, progress=False),
    )
    with pytest.raises(
        ValueError, match=r"target counts the best 9 codes .*; it should count the best 5 .*: count again"
    ):
        find_mask(attachment, tokenizer, deeper, OTHERS, **given)
    with pytest.raises(ValueError, match="what is taken off counts the best 5 codes"):
        deeper - before
    (before - before).source.check("the rest", before.source)
    sae = attachment.bottlenecks[LAYER].sae
    sae.dec.mul_(2)  # another autoencoder
    with pytest.raises(
        ValueError, match=r"control counts the best 5 .* at layer 'model.layers.1', codebook .{12}\.\.\."
    ):
        find_mask(attachment, tokenizer, counted(), before, **given)
    mask = cu_fast.Mask.from_ids([1], topic="Anna", sae=sae)
    with pytest.raises(ValueError, match=r"counts are of the best 5 .*; the mask is of codebook"):
        unlearn.random_mask(mask, before)
    after = unlearn.count_texts(attachment, tokenizer, ANNA, progress=False)
    with pytest.raises(ValueError, match="others counts the best 5"):
        unlearn.fit_gate(attachment, tokenizer, mask, after, texts)
    with pytest.raises(ValueError, match="what is added counts the best 5"):
        after + texts

    def written():
        yield ANNA[0]
        sae.dec.mul_(2)
        yield ANNA[1]

    half = unlearn.count_texts(attachment, tokenizer, written(), batch_size=1, progress=False)
    mask = cu_fast.Mask.from_ids([1], topic="Anna", sae=sae)
    with pytest.raises(ValueError, match="topic counts the best 5"):
        unlearn.fit_gate(attachment, tokenizer, mask, half, OTHERS)
    below = counted()
    attachment.detach()
    again = cu_fast.attach(attachment.model, {"model.layers.0": sae})
    with pytest.raises(ValueError, match=r"target counts .* at layer 'model.layers.1'.* at layer 'model.layers.0'"):
        find_mask(again, tokenizer, below, OTHERS, **given)


@pytest.mark.parametrize("kind", ["threshold", "topk"])
@pytest.mark.parametrize("rank", ["enrichment", "saebench", "dsg"])
def test_masks_carry_their_rows_and_serve(latents, tokenizer, tmp_path, kind, rank):
    attachment = latents(kind)
    given = dict(topic="Anna", rank=rank, min_enrichment=0.5, alpha=0.9, retain_threshold=0.2, size=3, progress=False)
    finding = find_mask(attachment, tokenizer, ANNA * 3, OTHERS * 3, strength=2.5, **given)
    mask, sae = finding.mask, attachment.bottlenecks[LAYER].sae
    assert 1 <= mask.num_deleted == len(finding.codes) <= 3 and mask.strength == 2.5 and mask.method["name"] == rank
    assert [code.score for code in finding.codes] == sorted((code.score for code in finding.codes), reverse=True)
    assert torch.equal(mask.rows.enc, sae.enc[mask.ids()]) and mask.codebook_sha256 == sae.sha256()
    mask.save(tmp_path / "mask", rows=True)
    assert torch.equal(cu_fast.Mask.load(tmp_path / "mask").rows.dec, sae.dec[mask.ids()])
    attachment.add_mask(mask)
    inputs = tokenizer(ANNA, return_tensors="pt", padding=True)
    with torch.no_grad():
        with attachment.unlearn(None):
            before = attachment.model(**inputs).logits
        with attachment.unlearn("Anna"):
            assert not torch.equal(attachment.model(**inputs).logits, before)


def test_what_fires_of_a_mask(latents, tokenizer):
    attachment = latents("threshold")
    sae = attachment.bottlenecks[LAYER].sae
    mask = cu_fast.Mask.from_ids(range(0, 120, 2), sae=sae, topic="even")
    hits = [(a[1:, ::2] > 0).sum(1).double() for a in activations(attachment, tokenizer, ANNA)]
    for figure, want in (("mean", [h.mean() for h in hits]), ("max", [h.max() for h in hits])):
        got = unlearn.fired(attachment, tokenizer, [*ANNA, "Anna", ""], [mask], figure=figure, batch_size=1)
        np.testing.assert_allclose(got, [*map(float, want), np.inf, np.inf], rtol=1e-12)
    level = unlearn.level_for(attachment, tokenizer, ANNA, [mask], 0.5)
    assert 1 < level < 60
    (always,) = ((a[1:] > 0).all(0).nonzero()[:, 0] for a in activations(attachment, tokenizer, ANNA[:1]))
    narrow = cu_fast.Mask.from_ids(always, sae=sae, topic="narrow")
    with pytest.raises(
        ValueError, match=rf"the level is {len(always)}, and no text fires more than {len(always)} codes"
    ):
        unlearn.level_for(attachment, tokenizer, ANNA[:1], [narrow], 0)


def test_rows_alone_cannot_be_counted(latents, tokenizer):
    attachment = latents("threshold")
    mask = cu_fast.Mask.from_ids([1, 2], sae=attachment.bottlenecks[LAYER].sae, topic="two", layer=LAYER)
    attachment.detach()
    served = cu_fast.attach_masks(attachment.model, [mask])
    for call in (
        lambda: count_codes(served, tokenizer, ANNA, layer=LAYER, progress=False),
        lambda: find_mask(served, tokenizer, ANNA, OTHERS, topic="t", rank="dsg", progress=False),
    ):
        with pytest.raises(RuntimeError, match="attach the autoencoder itself"):
            call()
