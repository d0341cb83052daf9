"""Which codes a rank chooses, against plain loops over the counts; and that a neighbour is a control of its own."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from scipy import stats

from cu_fast.unlearn import CodeCounts, count_codes, find_mask
from cu_fast.unlearn.rank import Evidence, by_enrichment

C, LAYER = 120, "model.layers.1"


def drawn(seed: int, tokens: int, rate: float) -> CodeCounts:
    """Counts and squares at random; some latents never fire."""
    draw = np.random.default_rng(seed)
    counts = draw.binomial(tokens, rate * draw.random(C) ** 2)
    counts[draw.random(C) < 0.1] = 0
    squares = counts * draw.random(C) * 10 ** draw.uniform(-1, 1, C)
    return CodeCounts(torch.from_numpy(counts), tokens, torch.empty(C, 0, 11), torch.from_numpy(squares))


TARGET, CONTROL, NEAR, FAR = drawn(1, 1000, 0.3), drawn(2, 3000, 0.1), drawn(3, 400, 0.2), drawn(4, 40, 0.1)


def found(attachment, tokenizer, neighbours=None, **given):
    finding = find_mask(
        attachment, tokenizer, TARGET, CONTROL, topic="t", neighbours=neighbours, progress=False, **given
    )
    assert sorted(code.code for code in finding.codes) == finding.mask.ids().tolist()
    return finding


def by_hand(target: CodeCounts, control: CodeCounts, bound: float, alpha: float) -> tuple[list[float], set[int]]:
    """R per code, and the codes with R above the bound and q below alpha: one table at a time, q by its definition."""
    R, p = [], []
    for a, b in zip(target.counts.tolist(), control.counts.tolist()):
        R.append(np.log2((a + 0.5) / (target.tokens + 1) / ((b + 0.5) / (control.tokens + 1))))
        table = np.array([[a, b], [target.tokens - a, control.tokens - b]])
        if a + b == 0:
            p.append(None)
        elif stats.contingency.expected_freq(table).min() < 5:
            p.append(stats.fisher_exact(table, alternative="greater").pvalue)
        else:
            p.append(stats.chi2_contingency(table, correction=False).pvalue)
    known = sorted((value, j) for j, value in enumerate(p) if value is not None)
    q, least = {}, 1.0
    for place in range(len(known), 0, -1):
        least = min(least, known[place - 1][0] * len(known) / place)
        q[known[place - 1][1]] = least
    return R, {j for j in q if R[j] > bound and q[j] < alpha}


def test_a_code_has_to_be_enriched_against_each_neighbour(latents, tokenizer):
    attachment, bound = latents("threshold"), 1.0
    controls = {"control": CONTROL, "near": NEAR, "far": FAR}
    figures = {name: by_hand(TARGET, counts, bound, 0.05) for name, counts in controls.items()}
    alone = found(attachment, tokenizer, min_enrichment=bound)
    assert set(alone.mask.ids().tolist()) == figures["control"][1]
    both = found(attachment, tokenizer, {"near": NEAR, "far": FAR}, min_enrichment=bound)
    want = set.intersection(*(chosen for _, chosen in figures.values()))
    assert set(both.mask.ids().tolist()) == want and 0 < len(want) < len(figures["control"][1])
    # The bound of R and the test are asked of each: some codes pass one of them against a neighbour and not the other.
    R = {name: np.array(values) for name, (values, _) in figures.items()}
    enriched = {j for j in figures["control"][1] if min(R[name][j] for name in controls) > bound}
    assert want < enriched
    for code in both.codes:
        least = min(controls, key=lambda name: R[name][code.code])
        assert code.against == least and code.enrichment == pytest.approx(R[least][code.code]) == code.score
    assert {code.against for code in both.codes} >= {"near", "control"}
    assert both.mask.method["neighbours"] == {"near": 400, "far": 40} and "neighbours" not in alone.mask.method


def test_a_mask_may_grow_beyond_what_every_control_allows(latents, tokenizer):
    """The significant codes are offered first, whatever their p: against one control it may be larger than another's."""
    offered = []
    given = dict(min_enrichment=0.5, neighbours={"near": NEAR}, choose=lambda masks: offered.extend(masks) or 0)
    first = found(latents("threshold"), tokenizer, **given).mask
    significant = found(latents("threshold"), tokenizer, {"near": NEAR}, min_enrichment=0.5).mask
    assert torch.equal(first.bits, significant.bits) and len(offered) > 1
    assert all((small - large).num_deleted == 0 for small, large in itertools.pairwise(offered))


def test_significant_codes_come_first_whatever_their_p():
    """Of two controls one corrects p more than the other, so that a code with a smaller p may have a larger q."""
    p, q, R = (np.array(figure) for figure in ([0.04, 0.03, 0.01, 0.0], [0.045, 0.2, 0.02, 0.0], [3.0, 3.0, 3.0, 1.0]))
    ids, significant = by_enrichment(Evidence(R, p, q, ["control"] * 4, R), 2.0, 0.05)
    assert ids.tolist() == [2, 0, 1] and significant == 2


def test_a_size_takes_the_most_enriched(latents, tokenizer):
    attachment = latents("threshold")
    whole = found(attachment, tokenizer, min_enrichment=1.0)
    some = found(attachment, tokenizer, min_enrichment=1.0, size=5)
    assert [code.code for code in some.codes] == [code.code for code in whole.codes][:5]


@pytest.mark.parametrize("neighbours", [None, {"near": NEAR}])
@pytest.mark.parametrize("size", [None, 4])
def test_saebench(latents, tokenizer, neighbours, size):
    rows = []
    for j in range(C):
        kept = [CONTROL, *(neighbours or {}).values()]
        if all(int(counts.counts[j]) / counts.tokens < 0.03 for counts in kept) and TARGET.counts[j] > 0:
            rows.append((-int(TARGET.counts[j]), j))
    want = [j for _, j in sorted(rows)][: size or 20]
    finding = found(latents("topk"), tokenizer, neighbours, rank="saebench", retain_threshold=0.03, size=size)
    assert [code.code for code in finding.codes] == want and len(want) == (size or 20) < len(rows)
    assert finding.codes[0].score == int(TARGET.counts[want[0]]) / TARGET.tokens


@pytest.mark.parametrize("neighbours", [None, {"near": NEAR}])
@pytest.mark.parametrize("size", [None, 4])
def test_dsg(latents, tokenizer, neighbours, size):
    ratios = []
    for j in range(C):
        of = [float(c.squares[j]) / c.tokens for c in (CONTROL, *(neighbours or {}).values())]
        ratios.append(min(float(TARGET.squares[j]) / TARGET.tokens / max(value, 1e-12) for value in of))
    place = 0.7 * (C - 1)  # of the percentile, between two ratios
    below, above = sorted(ratios)[int(place)], sorted(ratios)[int(place) + 1]
    bound = below + (above - below) * (place - int(place))
    rows = sorted((-float(TARGET.squares[j]), j) for j in range(C) if ratios[j] >= bound)
    want = [j for _, j in rows][: size or 20]
    finding = found(latents("topk"), tokenizer, neighbours, rank="dsg", percentile=70, size=size)
    assert [code.code for code in finding.codes] == want and len(want) == (size or 20) < len(rows)
    assert finding.codes[0].score == pytest.approx(float(TARGET.squares[want[0]]) / TARGET.tokens)


def test_a_codebook_has_shares_and_no_activations(attachment, tokenizer):
    given = dict(topic="Anna", progress=False)
    texts = ["Anna writes books ."], ["Bruno reads poems ."]
    with pytest.raises(ValueError, match=r"'model\.layers\.1' has a codebook, whose codes have no activations"):
        find_mask(attachment, tokenizer, *texts, rank="dsg", **given)
    with pytest.raises(ValueError, match="has a codebook"):
        count_codes(attachment, tokenizer, texts[0], layer=None, squares=True, progress=False)
    finding = find_mask(attachment, tokenizer, *texts, rank="saebench", retain_threshold=0.3, size=2, **given)
    assert finding.mask.num_deleted == 2 and finding.mask.rows is None


def test_nothing_passes(latents, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "cu_fast"):
        finding = found(latents("topk"), tokenizer, rank="saebench", retain_threshold=1e-9, neighbours={"same": TARGET})
    assert finding.mask.num_deleted == 0 and "no code has a share below 1e-09 in the control" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(rank="best"), "rank is 'best'"),
        (dict(size=0), "size is 0"),
        (dict(retain_threshold=0), "retain_threshold is 0"),
        (dict(percentile=101), "percentile is 101"),
        (dict(neighbours={"control": NEAR}), "neighbours has the name 'control'"),
        (dict(neighbours={"near": []}), "near holds no text"),
        (dict(neighbours={"near": CodeCounts(NEAR.counts[:9], 9, NEAR.contexts)}), "near counts 9 codes"),
        (dict(rank="dsg", neighbours={"near": CodeCounts(NEAR.counts, 9, NEAR.contexts)}), "near is counted without squares"),
        (dict(rank="saebench", choose=len), "choose is given, and rank is 'saebench'"),
        (dict(size=3, choose=len), "choose is given, and rank is 'enrichment' with size 3"),
        (dict(strength=-1.0), "strength is -1.0"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(latents, tokenizer, change, words):
    with pytest.raises(ValueError, match=words):
        found(latents("topk"), tokenizer, **change)
