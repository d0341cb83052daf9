"""Learned gates: they separate, keep to their share, serve as they were judged, and refuse what they cannot learn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import cu_fast
from cu_fast import unlearn
from cu_fast.masks import Gate
from cu_fast.unlearn import fit_gate, gate_values, learn, topics_of

LAYER = "model.layers.1"
VERBS, THINGS = (
    ("writes", "reads", "sings on", "sat under"),
    ("books .", "red poems .", "the mat .", "a tree .", "green books ."),
)
TAILS = [f"{verb} {thing}" for verb, thing in itertools.product(VERBS, THINGS)]
# The topic is Anna; Bruno is her neighbour, of whom the same is said, and the others are animals.
ANNA, BRUNO = ([f"the {name} {tail}" for tail in TAILS] for name in ("Anna", "Bruno"))
OTHERS = [f"the {animal} {tail}" for animal, tail in itertools.product(("cat", "dog", "bird"), TAILS)]


@pytest.fixture(params=["threshold", "topk", "codebook"])
def served(request, tokenizer):
    return (
        request.getfixturevalue("attachment")
        if request.param == "codebook"
        else request.getfixturevalue("latents")(request.param)
    )


def some_mask(attachment, topic="Anna", ids=range(10)):
    splice = attachment.bottlenecks[LAYER]
    if splice.has_latents:
        return cu_fast.Mask.from_ids(ids, sae=splice.sae, topic=topic, layer=LAYER)
    return cu_fast.Mask.from_ids(ids, num_codes=300, codebook_sha256=splice.codebook_sha256(), topic=topic, layer=LAYER)


def root(share):
    """As the contract of a gate has it: the share, then its root, rounded to fp32."""
    return float(np.sqrt(np.float32(share)))


def shares(values, level):
    return float((values > level).mean())


def test_it_tells_a_topic_from_others_and_from_its_neighbours(served, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a version of scikit-learn that renamed an argument says so
        mask = fit_gate(served, tokenizer, some_mask(served), ANNA, OTHERS, {"Bruno": BRUNO}, progress=False)
    record = mask.method["gate"]
    assert record["texts"] == {"topic": 20, "others": 60, "Bruno": 20} and record["fires"]["topic"] >= 0.9
    assert record["fires"]["others"] <= 0.01 and record["fires"]["Bruno"] <= 0.01 and mask.gate.level >= 0
    values = {
        name: gate_values(served, tokenizer, texts, [mask])[:, 0]
        for name, texts in (("a", ANNA), ("b", BRUNO), ("o", OTHERS))
    }
    assert shares(values["a"], mask.gate.level) >= 0.9
    assert shares(values["b"], mask.gate.level) <= 0.15 and shares(values["o"], mask.gate.level) <= 0.05
    json.dumps(dict(mask.method))
    again = fit_gate(served, tokenizer, some_mask(served), ANNA, OTHERS, {"Bruno": BRUNO}, progress=False)
    assert again.digest == mask.digest
    assert torch.equal(mask.bits, some_mask(served).bits)
    assert (mask.rows is not None) == served.bottlenecks[LAYER].has_latents


def test_neighbours_texts_keep_the_gate_from_them(latents, tokenizer):
    """By how much a neighbour's texts lie below the level, in units of how far the topic's lie above it."""
    attachment = latents("threshold")
    below = []
    for neighbours in (None, {"Bruno": BRUNO}):
        mask = fit_gate(attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, neighbours, progress=False)
        near, own = (gate_values(attachment, tokenizer, texts, [mask])[:, 0].mean() for texts in (BRUNO, ANNA))
        below.append((mask.gate.level - near) / (own - mask.gate.level))
    assert below[1] > below[0] + 0.2


def test_values_are_those_of_the_texts_alone(served, tokenizer):
    """By hand: each text read alone, its codes counted by a loop."""
    mask = fit_gate(served, tokenizer, some_mask(served), ANNA, OTHERS, progress=False)
    (splice,), seen = served.bottlenecks.values(), []
    with torch.no_grad(), served.unlearn(None), served.observe(lambda x, _: seen.append(splice.active(x[0, skip:]))):
        skip = 1 if splice.splice == "delta" else 0
        for text in ANNA[:4]:
            served.model(**tokenizer(text, return_tensors="pt"))
    want = []
    for ids in seen:
        value = mask.gate.bias
        for code, weight in zip(mask.gate.codes.tolist(), mask.gate.weights.tolist()):
            value += weight * root(sum(code in row for row in ids.tolist()) / len(ids))
        want.append(value)
    got = gate_values(served, tokenizer, [*ANNA[:4], ""], [mask], batch_size=1)
    np.testing.assert_allclose(got[:4, 0], want, rtol=1e-9, atol=1e-12)
    assert got.shape == (5, 1) and got[4, 0] == np.inf


def test_the_level_is_of_held_out_texts_alone(latents, tokenizer, monkeypatch):
    attachment, given = latents("threshold"), []
    fit, judge = learn._fit, learn._level
    monkeypatch.setattr(learn, "_fit", lambda texts, *rest: given.append(texts) or fit(texts, *rest))
    monkeypatch.setattr(learn, "_level", lambda gate, texts, share: given.append(texts) or judge(gate, texts, share))
    mask = fit_gate(
        attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, {"Bruno": BRUNO}, held_out=0.3, max_share=0.2, progress=False
    )  # fmt: skip
    whole = {"topic": ANNA, "others": OTHERS, "Bruno": BRUNO}
    for fitting, judging in zip(given[::2], given[1::2]):
        for name, texts in whole.items():
            assert len(judging[name].tokens) == round(0.3 * len(texts))
            every = learn.count_texts(attachment, tokenizer, texts, progress=False).counts.toarray()
            parts = np.concatenate([fitting[name].counts.toarray(), judging[name].counts.toarray()])
            assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, every.tolist())), "each text is in one half"
    for name in ("others", "Bruno"):
        values = given[-1][name].values(mask.gate)
        assert shares(values, mask.gate.level) <= 0.2


def test_counts_of_texts_make_the_gate_of_the_texts(served, tokenizer):
    given = {"topic": ANNA, "others": OTHERS, "Bruno": BRUNO}
    counts = {name: learn.count_texts(served, tokenizer, texts, progress=False) for name, texts in given.items()}
    arguments = served, tokenizer, some_mask(served)
    want = fit_gate(*arguments, ANNA, OTHERS, {"Bruno": BRUNO}, progress=False)
    got = fit_gate(*arguments, counts["topic"], counts["others"], {"Bruno": counts["Bruno"]}, progress=False)
    assert got.digest == want.digest and got.method == want.method
    np.testing.assert_array_equal(counts["Bruno"].values(got.gate), gate_values(served, tokenizer, BRUNO, [got])[:, 0])
    light = fit_gate(*arguments, ANNA, OTHERS, {"Bruno": BRUNO}, neighbour_weight=0.01, progress=False)
    assert light.digest != want.digest and light.method["gate"]["neighbour_weight"] == 0.01
    parts = learn.count_texts(served, tokenizer, OTHERS[:7], layer=LAYER, batch_size=3, progress=False)
    parts += learn.count_texts(served, tokenizer, OTHERS[7:], progress=False)
    assert (parts.counts != counts["others"].counts).nnz == 0 and (parts.tokens == counts["others"].tokens).all()
    less = dataclasses.replace(parts, counts=parts.counts[:, :-1])
    with pytest.raises(ValueError, match=r"others counts .* so count again"):
        fit_gate(*arguments, ANNA, less)


def test_counts_of_windows_are_those_of_their_tokens(served, tokenizer):
    """By hand: each text read alone, its codes counted by a loop over windows of six tokens."""
    texts = [" ".join(ANNA[:n]) for n in (3, 1, 2)] + ["", BRUNO[0]]
    (splice,), seen = served.bottlenecks.values(), []
    skip = 1 if splice.splice == "delta" else 0
    with torch.no_grad(), served.unlearn(None), served.observe(lambda x, _: seen.append(splice.active(x[0, skip:]))):
        for text in filter(None, texts):
            served.model(**tokenizer(text, return_tensors="pt"))
    counts, tokens, of = [], [], []
    for number, ids in enumerate(seen):
        for start in range(0, max(1, len(ids) - 3), 3):
            part = ids[start : start + 6]
            counts.append(torch.bincount(part[part >= 0].long(), minlength=splice.num_codes).tolist())
            tokens.append(len(part)), of.append(number)
    found = learn.count_texts(served, tokenizer, texts, window=6, batch_size=2, progress=False)
    assert len(found) == 4 and len(tokens) > 8
    assert found.tokens.tolist() == tokens and found.texts.tolist() == of
    np.testing.assert_array_equal(found.counts.toarray(), counts)
    some = found.part(np.array([0, 2]))
    assert some.texts.tolist() == [min(number, 1) for number in of if number in (0, 2)]
    again = some + found.part(np.array([1, 3]))
    assert sorted(again.tokens) == sorted(tokens) and len(again) == 4
    with pytest.raises(ValueError, match="windows of 6 and None tokens cannot be added"):
        found + learn.count_texts(served, tokenizer, texts, progress=False)


def test_a_window_finds_a_topic_in_other_text(served, tokenizer):
    """What other text around leaves of the distance between the topic's texts and others, as the gate measures it."""
    served.model.config.max_position_embeddings = 512
    long = [" ".join(OTHERS[i : i + 24]) for i in range(20)]
    hidden = [" ".join([*OTHERS[i : i + 12], ANNA[i], *OTHERS[i + 12 : i + 23]]) for i in range(20)]
    left = []
    for window in (None, 6):
        mask = fit_gate(served, tokenizer, some_mask(served), ANNA, [*OTHERS, *long], window=window, progress=False)
        assert mask.gate.window == mask.method["gate"]["window"] == window
        values = gate_values(served, tokenizer, [*ANNA, *hidden, *long], [mask])[:, 0]
        counts = learn.count_texts(served, tokenizer, [*ANNA, *hidden, *long], window=window, progress=False)
        np.testing.assert_array_equal(counts.values(mask.gate), values)
        assert shares(values[40:], mask.gate.level) == 0
        topic, among, others = values.reshape(3, 20).mean(1)
        left.append((among - others) / (topic - others))
    assert left[0] < 0.3 and left[1] > 2 * left[0], left
    counts = learn.count_texts(served, tokenizer, ANNA, window=6, progress=False)
    with pytest.raises(ValueError, match="topic counts windows of 6 tokens; window is 8, so count again"):
        fit_gate(served, tokenizer, some_mask(served), counts, OTHERS, window=8)


def test_each_text_weighs_as_much_as_another():
    """A text of three equal windows is what it is as one."""
    draw = np.random.default_rng(0)
    once, thrice = {}, {}
    for name, rate in (("topic", 0.3), ("others", 0.2)):
        tokens = draw.integers(5, 30, 40)
        counts = draw.binomial(tokens[:, None], rate * draw.random(8), (40, 8))
        once[name] = learn.TextCounts(learn.sparse.csr_array(counts), tokens)
        repeats = np.where(np.arange(40) % 2, 3, 1)
        rows = np.repeat(np.arange(40), repeats)
        thrice[name] = learn.TextCounts(learn.sparse.csr_array(counts[rows]), tokens[rows], rows, 8)
    one, other = (learn._fit(fitting, "l2", 512, 16.0, 0) for fitting in (once, thrice))
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-3)


def test_the_share_decides_the_level():
    gate = Gate(torch.tensor([0], dtype=torch.int32), torch.ones(1), 0.0, 0.0)
    texts = learn.TextCounts(learn.sparse.csr_array(np.arange(10)[:, None] ** 2), np.full(10, 1))
    far = learn.TextCounts(learn.sparse.csr_array(np.zeros((4, 1), dtype=np.int64)), np.full(4, 1))
    for share, level in ((0.0, 9), (0.1, 9), (0.12, 8), (0.3, 7), (0.35, 6)):
        found = learn._level(gate, {"topic": texts, "others": far, "near": texts}, share)
        assert found == level and shares(texts.values(gate), found) <= share
    below = dataclasses.replace(gate, bias=-5.0)
    assert learn._level(below, {"topic": texts, "others": far}, 0.0) == 0.0, "not below where the regression is even"


def test_the_weights_are_those_of_a_balanced_regression():
    """Against scikit-learn on the dense roots of shares: half of the weight on each side, a neighbour's text counts as sixteen."""
    draw = np.random.default_rng(0)
    rates = {"topic": 0.3, "others": 0.2, "Bruno": 0.25}
    fitting = {}
    for N, (name, rate) in zip((30, 50, 10), rates.items()):
        tokens = draw.integers(5, 30, N)
        fitting[name] = learn.TextCounts(
            learn.sparse.csr_array(draw.binomial(tokens[:, None], rate * draw.random(8), (N, 8))), tokens
        )
    roots = np.sqrt(np.concatenate([texts.counts.toarray() / texts.tokens[:, None] for texts in fitting.values()]))
    weights = np.array([45 / 30] * 30 + [45 / 210] * 50 + [16 * 45 / 210] * 10)
    want = LogisticRegression(C=10.0, max_iter=3000).fit(8 * roots, [1] * 30 + [0] * 60, sample_weight=weights)
    gate = learn._fit(fitting, "l2", 512, 16.0, 0)
    assert gate.codes.tolist() == list(range(8))
    np.testing.assert_allclose(gate.weights.numpy(), 8 * want.coef_[0], rtol=1e-3, atol=1e-3)
    values = np.concatenate([texts.values(gate) for texts in fitting.values()])
    np.testing.assert_allclose(values, want.decision_function(8 * roots), atol=1e-3)


def test_few_codes_where_they_cost_nothing(latents, tokenizer):
    attachment = latents("threshold")
    arguments = (attachment, tokenizer, some_mask(attachment), ANNA, OTHERS)
    few = fit_gate(*arguments, max_codes=7, progress=False)
    assert 1 <= len(few.gate.codes) <= 7
    easy = fit_gate(*arguments, progress=False)
    assert easy.method["gate"]["penalty"] == "l1" and len(easy.gate.codes) < 30


def test_the_dense_one_where_the_sparse_one_catches_less(latents, tokenizer, monkeypatch):
    attachment = latents("threshold")
    monkeypatch.setitem(learn.STRENGTH, "l1", 1e-3)  # no code has a weight
    mask = fit_gate(attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, progress=False)
    assert mask.method["gate"]["penalty"] == "l2"


def test_topics_by_learned_gates_and_levels_in_one_pass(latents, tokenizer):
    attachment = latents("threshold")
    for topic, texts, rest in (("Anna", ANNA, BRUNO), ("Bruno", BRUNO, ANNA)):
        mask = fit_gate(
            attachment, tokenizer, some_mask(attachment, topic), texts, OTHERS, {"rest": rest}, progress=False
        )
        attachment.add_mask(mask)
    attachment.add_mask(some_mask(attachment, "plain", range(0, 120, 2)))
    prompts = [ANNA[3], BRUNO[5], OTHERS[7], ""]
    values = {
        name: gate_values(attachment, tokenizer, prompts, attachment.masks[name])[:, 0] for name in ("Anna", "Bruno")
    }
    passes = []
    hook = attachment.model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    learned = topics_of(attachment, tokenizer, prompts, ["Anna", "Bruno"])
    assert learned == topics_of(attachment, tokenizer, prompts, {"Anna": None, "Bruno": None})
    assert len(passes) == 2, "one forward each, whatever the number of gates"
    want = [{n for n in values if values[n][i] > attachment.masks[n][0].gate.level} or None for i in range(4)]
    assert learned == want == [{"Anna"}, {"Bruno"}, None, {"Anna", "Bruno"}]
    level = unlearn.level_for(attachment, tokenizer, OTHERS, attachment.masks["plain"], 0.5)
    mixed = topics_of(attachment, tokenizer, prompts, {"Anna": None, "plain": level}, always={"Bruno"})
    fired = unlearn.fired(attachment, tokenizer, prompts, attachment.masks["plain"])
    assert mixed == [
        {"Bruno"} | ({"Anna"} if values["Anna"][i] > attachment.masks["Anna"][0].gate.level else set())
        | ({"plain"} if fired[i] > level else set()) for i in range(4)
    ]  # fmt: skip
    hook.remove()
    with pytest.raises(ValueError, match="mask 'plain' carries no learned gate; make it one with fit_gate"):
        topics_of(attachment, tokenizer, prompts, ["Anna", "plain"])
    with pytest.raises(TypeError, match="gates is 'Anna'"):
        topics_of(attachment, tokenizer, prompts, "Anna")
    with pytest.raises(ValueError, match="mask 'plain' carries no learned gate"):
        gate_values(attachment, tokenizer, prompts, attachment.masks["plain"])


def test_a_name_with_masks_for_two_layers(model, tokenizer, make_sae):
    """A codebook that replaces, whose masks reach the first position, below an autoencoder, whose masks do not."""
    config = cu_fast.BottleneckConfig(d_model=32, code_dim=32, num_codes=300, k=4, activation="none")
    attachment = cu_fast.attach(model, {"model.layers.0": config, LAYER: make_sae("threshold")})
    low, high = attachment.bottlenecks.values()
    codes = range(0, 300, 3)
    below = cu_fast.Mask.from_ids(codes, num_codes=300, codebook_sha256=low.codebook_sha256(), topic="two")
    above = cu_fast.Mask.from_ids(range(0, 120, 2), sae=high.sae, topic="two")
    seen = {low: [], high: []}
    with torch.no_grad(), attachment.unlearn(None), attachment.observe(lambda x, splice: seen[splice].append(x[0])):
        for text in ANNA[:3]:
            attachment.model(**tokenizer(text, return_tensors="pt"))
    want = []
    for x, y in zip(*seen.values()):
        hits = torch.isin(low.active(x), torch.tensor(codes).int()).sum(1)
        hits[1:] += (high.sae.activations(y)[1:, ::2] > 0).sum(1)
        want.append(float(hits.double().mean()))
    got = unlearn.fired(attachment, tokenizer, ANNA[:3], [below, above], batch_size=1)
    np.testing.assert_allclose(got, want, rtol=1e-12)

    never, half = (Gate(torch.tensor([2], dtype=torch.int32), torch.ones(1), 0.0, level) for level in (2.0, 0.5))
    share = [root(float((high.sae.activations(y)[1:, 2] > 0).double().mean())) for y in seen[high]]
    attachment.add_mask([below.with_gate(never), above.with_gate(half)])
    values = gate_values(attachment, tokenizer, ANNA[:3], attachment.masks["two"], batch_size=1)
    assert values[:, 1].tolist() == share and (values[:, 0] <= 1).all() and len(set(share)) > 1
    topics = topics_of(attachment, tokenizer, ANNA[:3], {"two"})
    assert topics == [{"two"} if value > 0.5 else None for value in share]


def test_serving_needs_no_scikit_learn(latents, tokenizer, monkeypatch, tmp_path):
    attachment = latents("threshold")
    fit_gate(attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, progress=False).save(tmp_path / "m")
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    attachment.load_mask(tmp_path / "m")
    assert topics_of(attachment, tokenizer, [ANNA[0], OTHERS[0]], {"Anna"}) == [{"Anna"}, None]

    def never():
        raise AssertionError("read")
        yield

    with pytest.raises(ImportError, match=r'needs scikit-learn: pip install "cu-fast\[gates\]"'):
        fit_gate(attachment, tokenizer, some_mask(attachment), never(), never())


def test_rows_serve_the_gate_without_the_autoencoder(latents, tokenizer, tmp_path):
    attachment = latents("threshold")
    mask = fit_gate(attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, progress=False)
    plain = some_mask(attachment, "plain", range(5, 120, 2))
    prompts = [*ANNA[:3], *OTHERS[:3], ""]
    want = (
        gate_values(attachment, tokenizer, prompts, [mask]),
        unlearn.fired(attachment, tokenizer, prompts, [plain]),
        topics_of(_with(attachment, mask, plain), tokenizer, prompts, {"Anna": None, "plain": 5.0}),
    )
    for one in (mask, plain):
        one.save(tmp_path / one.topic, rows=True)
    mask.save(tmp_path / "bare")
    attachment.detach()
    served = cu_fast.attach_masks(attachment.model, [tmp_path / "Anna", tmp_path / "plain"])
    read = served.masks["Anna"][0]
    assert read.digest == mask.digest and torch.equal(read.gate.rows.enc, mask.gate.rows.enc)
    np.testing.assert_array_equal(gate_values(served, tokenizer, prompts, [read]), want[0])
    np.testing.assert_array_equal(unlearn.fired(served, tokenizer, prompts, served.masks["plain"]), want[1])
    assert topics_of(served, tokenizer, prompts, {"Anna": None, "plain": 5.0}) == want[2] != [None] * 7
    bare = cu_fast.Mask.load(tmp_path / "bare")
    assert bare.digest == mask.digest and bare.gate.rows is None
    with pytest.raises(RuntimeError, match="a gate there has none of its own; save its mask with rows=True"):
        gate_values(served, tokenizer, prompts, [bare])


def _with(attachment, *masks):
    for mask in masks:
        attachment.add_mask(mask)
    return attachment


def test_texts_without_tokens_are_left_out(latents, tokenizer):
    attachment = latents("threshold")
    given = dict(progress=False, batch_size=3)
    plain = fit_gate(attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, **given)
    with_empty = fit_gate(attachment, tokenizer, some_mask(attachment), [*ANNA, "", "Anna"], OTHERS, **given)
    assert with_empty.digest == plain.digest


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(topic=["Anna sings"]), ValueError, "topic holds 1 texts with tokens that count"),
        (dict(others=["", ""]), ValueError, "others holds 0 texts"),
        (dict(neighbours={"near": ["", "Anna"]}), ValueError, "near holds 0 texts"),
        (dict(neighbours={"topic": BRUNO}), ValueError, "neighbours has the name 'topic'"),
        (dict(topic="Anna sings"), TypeError, "texts is a str"),
        (dict(others=OTHERS[:2] + [5]), TypeError, "texts holds 5"),
        (dict(max_share=1.0), ValueError, "max_share is 1.0"),
        (dict(held_out=1.0), ValueError, "held_out is 1.0"),
        (dict(max_codes=0), ValueError, "max_codes is 0"),
        (dict(neighbour_weight=0.0), ValueError, "neighbour_weight is 0.0"),
        (dict(window=5), ValueError, "window is 5; it should be an even number of tokens"),
        (dict(topic=ANNA, others=ANNA), ValueError, "no held-out text of the topic exceeds the level"),
    ],
)
def test_what_it_refuses(latents, tokenizer, change, error, words):
    attachment = latents("threshold")
    arguments = dict(topic=ANNA, others=OTHERS, max_share=0.0, progress=False) | change
    with pytest.raises(error, match=words):
        fit_gate(attachment, tokenizer, some_mask(attachment), **arguments)


def test_a_mask_of_another_codebook_is_refused(latents, tokenizer):
    other = cu_fast.Mask.from_ids([1], num_codes=120, codebook_sha256="a" * 64, topic="other")
    for call in (
        lambda a: fit_gate(a, tokenizer, other, ANNA, OTHERS),
        lambda a: unlearn.fired(a, tokenizer, ANNA, [other]),
        lambda a: unlearn.level_for(a, tokenizer, ANNA, [other]),
    ):
        with pytest.raises(ValueError, match="mask 'other' was made for another codebook"):
            call(latents("threshold"))


def test_tiles_change_nothing(latents, tokenizer, monkeypatch):
    attachment = latents("threshold")
    mask = fit_gate(attachment, tokenizer, some_mask(attachment), ANNA, OTHERS, progress=False)

    def figures():
        counts = learn.count_texts(attachment, tokenizer, ANNA, progress=False).counts.toarray()
        values = gate_values(attachment, tokenizer, [*ANNA, *OTHERS], [mask])
        return counts, values, unlearn.fired(attachment, tokenizer, ANNA, [mask], figure="max")

    whole = figures()
    monkeypatch.setattr(unlearn.reading, "TILE", 7 * 120)
    for one, tiled in zip(whole, figures()):
        np.testing.assert_array_equal(one, tiled)
