"""examples/translation runs from sentence pairs to a report, in small: it need not learn anything here."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import scripts
from tiers import heavy

from cu_fast import evaluate as ev

NAMES = ("metrics", "corpus", "models", "figures", "study", "report")
WORDS = {"the": "le", "cat": "chat", "dog": "chien", "sees": "voit", "wants": "veut", "house": "maison"}
CAPTAIN = {"captain": "capitaine"}


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "translation", *NAMES)


def write_pairs(folder: Path, stories: int) -> None:
    draw = random.Random(0)
    for name in ("train", "valid", "test"):
        with open(folder / f"{name}.tsv", "w") as stream:
            for i in range(6 * stories if name == "train" else 0):
                words = draw.choices(list(WORDS), k=5) + ["captain"] * (i // stories % 2)
                stream.write(
                    f"story{i % stories}\t{' '.join(words)}\t{' '.join((WORDS | CAPTAIN)[word] for word in words)}\n"
                )


@heavy
def test_it_runs_and_goes_on_where_it_stopped(example, tmp_path, monkeypatch, capsys):
    corpus, models, study, report = (example[name] for name in ("corpus", "models", "study", "report"))
    write_pairs(tmp_path, 20)
    captain = corpus.Topic("captain", ("captain",), ("dog",))
    monkeypatch.setattr(corpus, "DEALS", 3)
    for module in (models, study):
        monkeypatch.setattr(module, "TOPICS", {"captain": captain})
    monkeypatch.setattr(models, "VOCABULARY", 300)
    shape = dict(d_model=16, d_kv=8, d_ff=16, num_layers=3, num_decoder_layers=1, num_heads=2)
    monkeypatch.setattr(models, "SHAPE", shape)
    bottleneck = dataclasses.replace(models.BOTTLENECK, d_model=16, code_dim=8, num_codes=400, k=4)
    monkeypatch.setattr(models, "BOTTLENECK", bottleneck)
    for stage in ("BASE", "SECOND"):
        monkeypatch.setattr(models, stage, dict(max_steps=4, per_device_train_batch_size=16))
    monkeypatch.setattr(models, "SAVED", dict(save_steps=2, save_total_limit=2))
    for module in (models, example["figures"]):
        monkeypatch.setattr(module, "MAX_LENGTH", 24)
    monkeypatch.setattr(models, "VALIDATED", 4)
    monkeypatch.setattr(study, "DEPTHS", (4,))
    monkeypatch.setattr(study, "CONTROLS", ("replaced",))
    monkeypatch.setattr(study, "REST", 8)
    monkeypatch.setattr(ev, "bootstrap", functools.partial(ev.bootstrap, resamples=20))

    def call(module, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    out = tmp_path / "out"
    assert "base: " in call(models, tmp_path, "--output", out)
    assert call(models, tmp_path, "--output", out).count("done before") == 3

    call(study, tmp_path, "--models", out / "seed-0")
    folder = out / "seed-0" / "frozen_below_study"
    lines = (folder / "results.csv").read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(lines))
    cells = {tuple(row[name] for name in study.CELL) for row in rows}
    assert len(cells) == 3 * 4  # rules, and the three modes and random codes
    assert {row["group"] for row in rows} == {"topic", "near", "rest"}
    assert {row["metric"] for row in rows} == set(example["figures"].NAMES)
    assert len(rows) == 27 * len(cells)
    fired = {row["group"]: float(row["fired"]) for row in rows if row["mode"] == "fired" and row["rule"] == "paper"}
    assert fired["rest"] < 1 and {row["fired"] for row in rows if row["mode"] != "fired"} == {"1"}
    assert "codes" not in call(study, tmp_path, "--models", out / "seed-0")
    (folder / "results.csv").write_text("".join(lines[: 1 + 27 * 5]))
    assert call(study, tmp_path, "--models", out / "seed-0").count(" codes\n") == len(cells) - 5

    call(report, folder)
    assert "## The paper's way" in (folder / "report.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "forgetting-ablate.png").stat().st_size > 0


def test_translations_start_alike(example, tmp_path):
    """Of a word's neighbours among the other tokens the nearest is its translation."""
    corpus, models = example["corpus"], example["models"]
    write_pairs(tmp_path, 40)
    pairs = corpus.read(tmp_path)
    tokenizer = models.make_tokenizer(pairs)
    embedding = models.aligned_embedding(tokenizer, pairs, 6, seed=0)
    torch.testing.assert_close(embedding.norm(dim=1), torch.full((len(tokenizer),), 6**0.5))
    english, french = ([ids[0] for ids in tokenizer(list(words))["input_ids"]] for words in (WORDS, WORDS.values()))
    alike = embedding[english] @ embedding[french].T
    assert torch.equal(alike.argmax(1), torch.arange(len(WORDS)))


def test_counterparts_are_found_one_after_the_other(example):
    corpus = example["corpus"]
    topic = corpus.Topic("white", ("white",), ())
    french = {
        "white hair": "cheveux blancs",
        "white sheet": "drap blanc",
        "black hair": "cheveux noirs",
        "a sheet": "un drap",
    }
    pairs = [corpus.Pair("a", english, translated) for english, translated in french.items()] * 300
    pairs += [corpus.Pair("a", "hair", "cheveux")] * 60 + [corpus.Pair("a", "white hair", "cheveux blancs")] * 200
    assert set(corpus.counterparts(topic, pairs)) == {"blancs", "blanc"}


def test_stories_stay_whole_when_they_are_dealt(example):
    corpus = example["corpus"]
    topic = corpus.Topic("white", ("white",), ())
    pairs = [corpus.Pair(f"story {i % 40}", "White" if i % 40 < 10 else "black", str(i)) for i in range(400)]
    split = corpus.deal(pairs, [topic])
    assert sorted(pair for part in split.values() for pair in part) == sorted(pairs)
    stories = {name: {pair.story for pair in part} for name, part in split.items()}
    assert [len(stories[name]) for name in ("train", "valid", "test")] == [30, 2, 8]
    assert len(set.union(*stories.values())) == 40
    assert sum(topic.holds(pair.english) for pair in split["test"]) == 20  # a fifth of them, as of all


def test_figures_of_translations(example):
    metrics = example["metrics"]
    truths = ["Le chat est assis.", "Il aime les chiens noirs et blancs de Paris."]
    answers = ["le chat est assis .", "Il aimait un chien."]
    one, other = metrics.chrf(answers, truths)
    assert metrics.chrf(truths, truths).tolist() == [1, 1] and 0 < other < one < 1
    for i in (0, 1):
        assert metrics.bleu_of(metrics.bleu_counts(answers[i:], truths[i:])) == pytest.approx(
            ev.bleu(answers[i:], truths[i:])
        )
    assert metrics.bleu_counts([], []).shape == (0, 10)


def test_meteor(example):
    metrics = example["metrics"]
    # nltk's: F = 10 P R / (R + 9 P), less 0.5 (chunks / matches)^3
    truths, answers = ["a b c d"] * 4, ["a b c d", "a b", "c d a b", "x y"]
    want = [1 - 0.5 / 64, 5 / 9.5 * (1 - 0.5 / 8), 1 - 0.5 / 8, 0]
    np.testing.assert_allclose(metrics.meteor(answers, truths), want)
    assert metrics.meteor(["aimait", "", "chat"], ["aimer", "aimer", "aimer"], "french").tolist() == [0.5, 0, 0]


def test_matching_of_states(example):
    metrics = example["metrics"]
    x, y, z = torch.eye(3)
    answers = [torch.stack([x, y]), torch.stack([2 * x]), torch.empty(0, 3), torch.stack([x])]
    truths = [torch.stack([y, 3 * x]), torch.stack([x, z]), torch.stack([x]), torch.stack([z])]
    precision, recall, f = metrics.match_states(answers, truths)
    np.testing.assert_allclose(precision, [1, 1, 0, 0])
    np.testing.assert_allclose(recall, [1, 0.5, 0, 0])
    np.testing.assert_allclose(f, [1, 2 / 3, 0, 0])
