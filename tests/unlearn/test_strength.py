"""The rule for strength: the strongest of masks that grow, within a loss that the user states."""

from __future__ import annotations

import numpy as np
import pytest

import cu_fast
from cu_fast.evaluate import AnswerScores
from cu_fast.unlearn import strength

ROWS = [{"prompt": "the cat", "completion": "sat"}] * 4


@pytest.fixture
def masks(attachment):
    (bottleneck,) = attachment.bottlenecks.values()
    sha = bottleneck.codebook_sha256()
    return [cu_fast.Mask.from_ids(range(10 * n), num_codes=300, codebook_sha256=sha, topic="t") for n in range(1, 9)]


@pytest.fixture
def passes(attachment, monkeypatch):
    """Each deleted code costs 0.1 % of an answer's probability, and nearly twice of what is kept of it; what is deleted at each pass over the rows."""
    seen = []

    def scores(model, tokenizer, rows):
        assert model is attachment.model and rows is ROWS
        deleted = [masks[0].num_deleted for name, masks in attachment.masks.items() if "trial" in name]
        seen.append(sum(deleted))
        share = np.full(4, 0.8 * (1 - seen[-1] / 1000))
        return AnswerScores(1000 * np.log(share), np.full(4, 1e3), 1000 * share**2, np.zeros(4))

    monkeypatch.setattr(strength, "score_answers", scores)
    return seen


@pytest.mark.parametrize(("max_loss", "index"), [(0.01, 0), (0.0399, 2), (0.0401, 3), (0.0701, 6), (0.5, 7)])
def test_the_strongest_within_the_loss(attachment, tokenizer, masks, passes, max_loss, index):
    assert strength.within_loss(attachment, tokenizer, ROWS, max_loss + 1e-9)(masks) == index
    assert passes[0] == 0 and len(passes) <= 5
    assert not attachment.masks


def test_a_stricter_figure_takes_a_weaker_mask(attachment, tokenizer, masks, passes):
    assert strength.within_loss(attachment, tokenizer, ROWS, 0.0401)(masks) == 3
    assert strength.within_loss(attachment, tokenizer, ROWS, 0.0401, figure="kept_share")(masks) == 1


def test_even_the_weakest_costs_more(attachment, tokenizer, masks, passes):
    with pytest.raises(ValueError, match=r"max_loss is 0.005; the weakest mask of 't' \(10 codes\) costs 0.01;"):
        strength.within_loss(attachment, tokenizer, ROWS, 0.005)(masks)
    assert not attachment.masks


def test_what_it_refuses(attachment, tokenizer, masks, monkeypatch):
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="max_loss is"):
            strength.within_loss(attachment, tokenizer, ROWS, wrong)
    with pytest.raises(ValueError, match="figure is 'rouge'"):
        strength.within_loss(attachment, tokenizer, ROWS, figure="rouge")
    unknown = AnswerScores(np.full(4, -1e6), np.ones(4), np.zeros(4), np.zeros(4))
    monkeypatch.setattr(strength, "score_answers", lambda *_: unknown)
    with pytest.raises(ValueError, match="does not know"):
        strength.within_loss(attachment, tokenizer, ROWS)(masks)


def test_with_the_bundled_model():
    """A real author, by the rule: the loss on others is within it, and what is forgotten is forgotten."""
    from cu_fast import evaluate
    from cu_fast.cli import demo

    bundle = demo.load_bundle()
    author, rest = bundle.authors[5], [row for a in bundle.authors[6:] for row in a.rows]
    pairs = [
        [{"prompt": demo.prompt(r["question"]), "completion": demo.completion(r["answer"])} for r in rows]
        for rows in (author.rows, rest[::40])
    ]
    choose = strength.within_loss(bundle.attachment, bundle.tokenizer, pairs[1], 0.01)
    with bundle.attachment.unlearn(None):
        whole = evaluate.score_answers(bundle.model, bundle.tokenizer, pairs[1]).probability.mean()
    texts = [demo.text(row) for row in rest[::5]]
    finding = cu_fast.find_mask(
        bundle.attachment, bundle.tokenizer, author.texts, texts, topic="rule", depth=16, choose=choose,
        grow="enrichment", progress=False,
    )  # fmt: skip
    bundle.attachment.add_mask(finding.mask)
    with bundle.attachment.unlearn("rule"):
        gone, kept = (evaluate.score_answers(bundle.model, bundle.tokenizer, rows) for rows in pairs)
    assert kept.probability.mean() >= 0.99 * whole and gone.kept_share.mean() <= 0.3
