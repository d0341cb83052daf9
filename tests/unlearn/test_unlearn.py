"""Finding a topic's codes: the counts, the statistics against scipy's own, what is said and what is refused."""

from __future__ import annotations

import itertools
import json
import logging

import memory
import numpy as np
import pytest
import torch
from scipy import stats
from tiers import heavy

import cu_fast
from cu_fast import unlearn
from cu_fast.unlearn import CodeCounts, count_codes, find_mask, replace_words
from cu_fast.unlearn.find import P_LEVELS

ANNA = ["Anna writes books .", "Anna reads red poems .", "the cat sat on Anna ."] * 8
OTHERS = ["Bruno writes books .", "the dog ran under the tree .", "a green bird sings ."] * 8


def counts(of, tokens):
    return CodeCounts(torch.tensor(of), tokens, torch.empty(len(of), 0, 11))


def test_counts_are_the_codes_of_every_real_token(attachment, tokenizer):
    """Left padding, batches and the mask that is active outside do not matter; a generator is read once."""
    (bottleneck,), wanted, seen = attachment.bottlenecks.values(), torch.zeros(300, dtype=torch.int64), []
    with attachment.observe(lambda x, _: seen.append(bottleneck.select(x, 6).ids)), torch.no_grad():
        for text in ANNA[:5]:
            attachment.model(**tokenizer(text, return_tensors="pt"))
    for ids in seen:
        wanted += torch.bincount(ids.flatten(), minlength=300)
    got = count_codes(
        attachment, tokenizer, (t for t in ANNA[:5]), layer="model.layers.1", depth=6, batch_size=2, progress=False
    )
    assert got.tokens == sum(len(t.split()) for t in ANNA[:5])
    # Padding moves a token's activations in their last bits, and so now and then a code at the edge of the k.
    assert (got.counts - wanted).abs().sum() <= 0.02 * wanted.sum()
    assert int(got.counts.sum()) == 6 * got.tokens


def test_counts_add_up_over_the_corpus(attachment, tokenizer):
    few, many = (
        count_codes(attachment, tokenizer, ANNA * n, layer="model.layers.1", depth=4, examples=2, progress=False)
        for n in (1, 3)
    )
    assert torch.equal(many.counts, 3 * few.counts) and many.tokens == 3 * few.tokens


@heavy
def test_memory_does_not_depend_on_the_corpus():
    """20,000 tokens with 300 ids each, 48 MB as int64, of a corpus that is a generator."""
    setup = """
    import cu_fast, tiny_training
    from cu_fast.unlearn import count_codes
    tokenizer = tiny_training.word_tokenizer()
    config = cu_fast.BottleneckConfig(d_model=32, code_dim=32, num_codes=300, k=4)
    attachment = cu_fast.attach(tiny_training.tiny_llama(tokenizer), {"model.layers.1": config})
    def count(texts):
        corpus = ("the cat sat on the mat . " * 5 for _ in range(texts))
        return count_codes(attachment, tokenizer, corpus, layer="model.layers.1", depth=300, progress=False).tokens
    count(32)
    """
    assert memory.growth(setup, "assert count(570) == 570 * 35") < 12e6


def test_statistics_are_scipys():
    target, control = counts([30, 3, 0, 50, 7], 100), counts([10, 0, 4, 60, 7], 200)
    R = unlearn.enrichment(target, control)
    assert R[0] == pytest.approx(np.log2((30.5 / 101) / (10.5 / 201)))
    for j, (a, b) in enumerate(zip(target.counts.tolist(), control.counts.tolist())):
        table = [[a, b], [100 - a, 200 - b]]
        fisher = stats.fisher_exact(table, alternative="greater").pvalue
        chi2 = stats.chi2_contingency(table, correction=False)
        assert unlearn.p_values(target, control, "fisher")[j] == pytest.approx(fisher)
        assert unlearn.p_values(target, control, "chi2")[j] == pytest.approx(chi2.pvalue)
        auto = fisher if chi2.expected_freq.min() < 5 else chi2.pvalue
        assert unlearn.p_values(target, control, "auto")[j] == pytest.approx(auto)


def test_unseen_codes_and_codes_seen_everywhere_are_not_significant():
    target, control = counts([0, 10], 10), counts([0, 20], 20)
    for test in ("auto", "chi2", "fisher"):
        assert unlearn.p_values(target, control, test).tolist() == [1, 1]


def test_finds_the_codes_of_a_name(attachment, tokenizer):
    finding = find_mask(attachment, tokenizer, ANNA, OTHERS, topic="Anna", min_enrichment=1.0, progress=False)
    assert finding.mask.num_deleted == len(finding.codes) > 0
    assert finding.mask.topic == "Anna" and finding.mask.layer == "model.layers.1"
    (bottleneck,) = attachment.bottlenecks.values()
    assert finding.mask.codebook_sha256 == bottleneck.codebook_sha256()
    assert [c.enrichment for c in finding.codes] == sorted((c.enrichment for c in finding.codes), reverse=True)
    assert all(c.enrichment > 1 and c.q < 0.05 and c.q >= c.p and 0 < len(c.examples) <= 3 for c in finding.codes)
    assert any("Anna" in text for c in finding.codes for text in c.examples)
    assert "Anna" not in json.dumps({k: v for k, v in finding.mask.method.items()}), "a mask must not quote its topic"
    json.dumps(finding.to_dict(), allow_nan=False)

    attachment.add_mask(finding.mask)
    question = tokenizer("Anna writes", return_tensors="pt")
    with torch.no_grad():
        with attachment.unlearn(None):
            before = attachment.model(**question).logits
        with attachment.unlearn("Anna"):
            after = attachment.model(**question).logits
    assert not torch.equal(before, after)


def test_correction_deletes_less(attachment, tokenizer):
    deleted = {
        correction: find_mask(
            attachment,
            tokenizer,
            ANNA[:6],
            OTHERS[:6],
            topic="Anna",
            min_enrichment=0,
            correction=correction,
            progress=False,
        ).mask
        for correction in ("bh", "none")
    }
    assert (deleted["bh"] - deleted["none"]).num_deleted == 0
    assert deleted["bh"].num_deleted < deleted["none"].num_deleted


def test_the_strength_is_chosen_among_growing_masks(attachment, tokenizer):
    offered = []

    def second(masks):
        offered.extend(masks)
        return 1

    arguments = dict(topic="Anna", min_enrichment=0.5, progress=False)
    significant = find_mask(attachment, tokenizer, ANNA[:4], OTHERS, **arguments).mask
    chosen = find_mask(attachment, tokenizer, ANNA[:4], OTHERS, choose=second, **arguments)
    assert len(offered) > 2 and torch.equal(offered[0].bits, significant.bits)
    assert torch.equal(offered[1].bits, chosen.mask.bits) and len(chosen.codes) == chosen.mask.num_deleted
    for smaller, larger in itertools.pairwise(offered):
        assert (smaller - larger).num_deleted == 0 and smaller.num_deleted < larger.num_deleted
    assert all(c.p < max(P_LEVELS) for c in chosen.codes) and any(c.q >= 0.05 for c in chosen.codes)


def test_masks_may_grow_from_the_most_enriched_codes(attachment, tokenizer):
    offered = []
    arguments = dict(topic="Anna", min_enrichment=0.5, alpha=1, correction="none", progress=False)
    all_significant = find_mask(attachment, tokenizer, ANNA[:4], OTHERS, **arguments)
    chosen = find_mask(
        attachment, tokenizer, ANNA[:4], OTHERS, choose=lambda masks: offered.extend(masks) or 1, grow="enrichment", **arguments
    )  # fmt: skip
    assert len(offered) > 2 and torch.equal(offered[-1].bits, all_significant.mask.bits)
    assert torch.equal(offered[1].bits, chosen.mask.bits) and len(chosen.codes) == chosen.mask.num_deleted
    R = {code.code: code.enrichment for code in all_significant.codes}
    for smaller, larger in itertools.pairwise(offered):
        taken, added = (set(mask.ids().tolist()) for mask in (smaller, larger - smaller))
        assert taken and added and min(R[j] for j in taken) >= max(R[j] for j in added)
    with pytest.raises(ValueError, match="grow is 'p'"):
        find_mask(attachment, tokenizer, ANNA[:4], OTHERS, grow="p", **arguments)


def test_a_topic_without_significant_codes_says_so_and_deletes_nothing(attachment, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "cu_fast"):
        finding = find_mask(attachment, tokenizer, OTHERS, OTHERS, topic="nothing", progress=False)
    assert finding.mask.num_deleted == 0 and finding.codes == []
    assert "'nothing': no code has enrichment above 2" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(target=[]), ValueError, "target holds no text"),
        (dict(control=[]), ValueError, "control holds no text"),
        (dict(target=[""]), ValueError, "target holds no text"),
        (dict(target="Anna writes"), TypeError, "iterable of strings"),
        (dict(depth=3), ValueError, "depth is 3"),
        (dict(alpha=0), ValueError, "alpha is 0"),
        (dict(layer="model.layers.0"), ValueError, "layer is 'model.layers.0'"),
        (dict(test="t"), ValueError, "test is 't'"),
        (dict(correction="holm"), ValueError, "correction is 'holm'"),
    ],
)
def test_wrong_arguments_are_named(attachment, tokenizer, change, error, words):
    arguments = dict(target=ANNA, control=OTHERS, topic="Anna", progress=False) | change
    with pytest.raises(error, match=words):
        find_mask(attachment, tokenizer, **arguments)


def test_counting_leaves_the_model_in_its_mode(attachment, tokenizer):
    attachment.model.train()
    find_mask(attachment, tokenizer, ANNA, OTHERS, topic="Anna", progress=False)
    assert attachment.model.training


class TestReplaceWords:
    vocabulary = ("the cat sat on the mat while dogs bark loudly",)

    def test_words_plurals_and_case(self):
        (text,) = replace_words(["Love loves LOVE, love's gloves."], ["love"], self.vocabulary)
        first, plural, upper, possessive, other = text.replace(",", "").replace(".", "").split()
        assert first.lower() == upper.lower() == plural[:-1] == possessive[:-2] and upper.isupper()
        assert first[0].isupper() and other == "gloves" and first.lower() != "love"

    def test_deterministic_and_order_free(self):
        one = list(replace_words(["Anna writes"], ["Anna", "Bruno"], self.vocabulary))
        two = list(replace_words(["Anna writes"], ["Bruno", "Anna"], list(reversed(self.vocabulary[0].split()))))
        assert one == two != ["Anna writes"]

    @pytest.mark.parametrize(("words", "vocabulary"), [([], ["a cat"]), (["cat"], ["cat cat"])])
    def test_nothing_to_replace_or_to_replace_with(self, words, vocabulary):
        with pytest.raises(ValueError, match="at least one"):
            list(replace_words(["a cat"], words, vocabulary))


def test_random_mask_matches_frequency_and_avoids_the_mask():
    counted = counts(list(range(400)), 1000)
    mask = cu_fast.Mask.from_ids([10, 200, 390], num_codes=400, codebook_sha256="x", topic="t")
    control = unlearn.random_mask(mask, counted)
    assert control.num_deleted == 3 and (control & mask).num_deleted == 0
    assert all(abs(a - b) <= 8 for a, b in zip(control.ids().tolist(), [10, 200, 390]))
    assert torch.equal(control.bits, unlearn.random_mask(mask, counted).bits)
    assert not torch.equal(control.bits, unlearn.random_mask(mask, counted, seed=1).bits)
