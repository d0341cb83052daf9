"""examples/tofu runs from raw data to its tables, in small: it need not learn anything here."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import scripts
from tiers import heavy

from cu_fast.evaluate import AnswerScores

NAMES = ("metrics", "tofu", "models", "methods", "study", "persistence", "report")


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "tofu", *NAMES)


def write_tofu(folder: Path) -> None:
    def entry(author: int, i: int) -> dict:
        return {
            "question": f"What did Author{author} write in year {i}?",
            "paraphrased_question": f"In year {i}, what was Author{author}'s work?",
            "answer": f"Author{author} wrote book {author * i}.",
            "paraphrased_answer": f"Book {author * i} was by Author{author}.",
            "perturbed_answer": [f"Book {author * i + n} was by Author{author}." for n in (1, 2)],
        }

    sets = {
        "retain90": range(2, 5), "forget10": range(2), "forget05": range(2), "forget01": range(1), "real_authors": [8],
        "world_facts": [9], "retain": [2],
    }  # fmt: skip
    for name, authors in sets.items():
        lines = [json.dumps(entry(author, i)) for author in authors for i in range(20)]
        for file in (name, f"{name}_perturbed"):
            (folder / f"{file}.jsonl").write_text("\n".join(lines))


@heavy
def test_it_runs_and_goes_on_where_it_stopped(example, tmp_path, monkeypatch, capsys):
    tofu, models, methods, study, persistence, report = (example[name] for name in NAMES[1:])
    write_tofu(tmp_path)
    monkeypatch.setattr(models, "WIDTH", 32)
    monkeypatch.setattr(
        models, "BOTTLENECK", dataclasses.replace(models.BOTTLENECK, d_model=32, code_dim=16, num_codes=512, k=8)
    )
    for name in ("BASE_EPOCHS", "BOTTLENECK_EPOCHS"):
        monkeypatch.setattr(models, name, 1)
    monkeypatch.setattr(tofu, "NEW_TOKENS", 4)
    monkeypatch.setattr(study, "DEPTHS", (8,))
    rule = {"min_enrichment": 0.5, "alpha": 1.0, "correction": "none"}
    monkeypatch.setattr(study, "RULES", {name: rule for name in study.RULES})
    monkeypatch.setattr(study, "MAX_LOSSES", (0.9,))
    monkeypatch.setattr(
        study, "within_loss", lambda *_: lambda masks: 0
    )  # a model that knows nothing has nothing to lose
    monkeypatch.setattr(study, "VALIDATION", 4)
    monkeypatch.setattr(study, "TRAININGS", {1e-3: (1, 2)})
    monkeypatch.setattr(persistence, "within_loss", lambda *_: lambda masks: 0)
    for name, small in (
        ("TRIES", 1),
        ("LENGTHS", (0.1,)),
        ("RELEARN_EPOCHS", (1,)),
        ("DEPTH", 8),
        ("PROBE_ROWS", 4),
        ("IN_SEQUENCE", (2,)),
    ):
        monkeypatch.setattr(persistence, name, small)

    def call(module, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    runs = tmp_path / "runs"
    made = (tmp_path, "--output", runs, "--models", "full,retain99")
    assert "full base: " in call(models, *made)
    assert call(models, *made).count("done before") == 4

    measured = (tmp_path, "--models", runs, "--output", runs / "results.csv")
    call(study, *measured)
    lines = (runs / "results.csv").read_text().splitlines(keepends=True)
    with (runs / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    kinds = ["retrained", "none", *["codeunlearn"] * 5, "random", "retrained", "none"]
    assert [row["method"] for row in rows] == [*kinds, *(m for m in methods.METHODS for _ in (1, 2))]
    assert all(0 <= float(row["utility"]) <= 1 and 0 <= float(row["forget_quality"]) <= 1 for row in rows)
    assert float(rows[0]["forget_quality"]) == float(rows[8]["forget_quality"]) == 1  # a gold model, and itself
    trained = rows[10:]
    assert [int(row["backward"]) for row in trained] == [20, 40, 40, 80, 40, 80]
    assert len({row["forget_probability"] for row in trained}) == len(trained)

    (runs / "results.csv").write_text("".join(lines[:5]))  # cut off: measured again, and the same
    call(study, *measured)
    with (runs / "results.csv").open() as stream:
        again = list(csv.DictReader(stream))
    for row, other in zip(rows, again, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}

    call(
        persistence,
        tmp_path,
        "--models",
        runs,
        "--output",
        runs / "persistence.csv",
        "--methods",
        "none,codeunlearn,npo",
    )
    with (runs / "persistence.csv").open() as stream:
        found = {(row["method"], row["test"], row["figure"]): float(row["value"]) for row in csv.DictReader(stream)}
    tests = {(method, test) for method, test, _ in found}
    assert len(tests) == 3 * 7 + 3
    assert found["codeunlearn", "undone", "differing"] == 0 < found["codeunlearn", "undone", "moved by all masks"]
    call(report, runs / "results.csv", runs / "persistence.csv")
    text = (runs / "report.md").read_text()
    assert "| codeunlearn |" in text and "### 4 bits" in text
    if importlib.util.find_spec("matplotlib"):
        assert (runs / "plane.png").stat().st_size > 1000


def scores(*log_probs: float, tokens: float = 1.0) -> AnswerScores:
    n = len(log_probs)
    return AnswerScores(np.array(log_probs), np.full(n, tokens), np.zeros(n), np.zeros(n))


def test_truth_ratio(example):
    metrics = example["metrics"]
    right = scores(-2.0, -8.0, tokens=2)
    wrong = scores(-4.0, -6.0, -4.0, -4.0, tokens=2)
    want = [(np.exp(-2) + np.exp(-3)) / 2 / np.exp(-1), np.exp(-2) / np.exp(-4)]
    np.testing.assert_allclose(metrics.truth_ratio(right, wrong), want)


def test_figures_of_sets(example):
    metrics = example["metrics"]
    assert metrics.model_utility([0.5, 1.0]) == pytest.approx(2 / 3) and metrics.model_utility([0.0, 1.0]) == 0
    spread = np.linspace(0, 1, 40)
    assert metrics.forget_quality(spread, spread) == 1 and metrics.forget_quality(spread, spread + 0.6) < 1e-6
    assert metrics.membership_auc(scores(-1, -2), scores(-3, -4, -5)) == 1
    assert metrics.membership_auc(scores(-1, -4), scores(-2, -3)) == 0.5
    assert metrics.membership_auc(scores(-9, -9), scores(-3)) == 0
