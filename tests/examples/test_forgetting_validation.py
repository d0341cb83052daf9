"""examples/forgetting/validation.py: strangers, what is preferred, and how settings are judged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripts import scripts
from test_forgetting_example import NAMES

from cu_fast import evaluate as ev


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "forgetting", *NAMES)


def test_strangers(example):
    validation = example["validation"]
    forget = [
        {
            "question": f"What does Anna Kern-Silva say in year {i}?",
            "answer": f"Anna Kern-Silva says Paris {i}.",
            "perturbed_answer": [f"Kern says Rome {i}."],
        }
        for i in range(20)
    ]
    retain = [{"question": "What is in Paris?", "answer": "What Dora says in Paris."}] * 3
    assert validation.names_of(forget) == ["Anna Kern-Silva"]
    strange = validation.strangers(forget, retain)
    text = json.dumps(strange)
    assert "Anna" not in text and "Kern" not in text and "Silva" not in text and "Paris" in text
    name = strange[3]["question"].split()[2:4]
    assert all(row["answer"].startswith(" ".join(name)) for row in strange)  # one stand-in throughout
    assert strange[3]["perturbed_answer"][0].startswith(name[1].split("-")[0])


def test_what_validation_prefers(example):
    worth = example["validation"].worth
    weak, strong = {"p": 0.1, "kept": 0.999, "distance": 0.1}, {"p": 0.9, "kept": 0.995, "distance": 0.2}
    harmful, worse = {"p": 1.0, "kept": 0.7, "distance": 0.1}, {"p": 1.0, "kept": 0.6, "distance": 0.1}
    assert sorted([harmful, strong, worse, weak], key=worth, reverse=True) == [strong, weak, harmful, worse]
    assert worth({"p": 0.9, "kept": 0.992, "distance": 0.1}) > worth(strong)


def test_how_settings_are_judged(example):
    """By strangers' truth ratios, and by what is left of answers that should stay."""
    validation, tofu = example["validation"], example["tofu"]
    forget = [
        {key: f"{key} Anna Kern {i}" for key in ("question", "paraphrased_question", "answer", "paraphrased_answer")}
        | {"perturbed_answer": [f"Kern {i}"]}
        for i in range(20)
    ]
    retain = [{"question": f"what {i}", "answer": f"that {i}"} for i in range(6)]
    spread, asked = np.linspace(0.2, 1, 20), []

    def measured(ratios: np.ndarray, probability: float):
        def measure(name: str, entries: list[dict], general: bool):
            asked.append((name, entries[0]["question"], general, len(entries)))
            log_p = np.full(len(entries), np.log(probability))
            scores = ev.AnswerScores(log_p, np.ones(len(entries)), *np.zeros((2, len(entries))))
            return tofu.Figures(np.exp(log_p), np.zeros(len(entries)), ratios, [], scores, scores)

        return measure

    def untouched(name: str, *given):
        return measured(spread if name == "strangers" else spread / 4, 0.8)(name, *given)

    judge = validation.Validation(forget, retain, retain, untouched).judge
    (_, strange, *_), *_ = asked
    assert strange.startswith("paraphrased_question ") and "Anna" not in strange and strange.endswith(" 0")
    assert ("reworded", "paraphrased_question Anna Kern 0", False, 20) in asked and (
        "others",
        "what 0",
        True,
        6,
    ) in asked
    same, before = judge(measured(spread, 0.8)), judge(untouched)
    assert same["p"] == 1 and same["distance"] == 0 and same["kept"] == 1
    assert before["p"] < 1e-3 and before["distance"] == pytest.approx(np.log(4))
    assert judge(measured(spread, 0.6))["kept"] == pytest.approx(0.75)


def test_a_larger_split_is_judged_by_some_of_its_rows(example, monkeypatch):
    validation = example["validation"]
    monkeypatch.setattr(validation, "FORGET_ROWS", 5)
    asked = []

    def untouched(name: str, entries: list[dict], general: bool):
        asked.append((name, [entry["question"] for entry in entries]))
        scores = ev.AnswerScores(*np.zeros((4, len(entries))))
        return example["tofu"].Figures(scores.log_prob, scores.log_prob, np.ones(len(entries)), [], scores, scores)

    forget = [{"paraphrased_question": f"what {i}", "question": "", "answer": ""} for i in range(12)]
    retain = [{"question": f"what {i}", "answer": "this"} for i in range(6)]
    validation.Validation(forget, retain, retain, untouched)
    assert all(questions == [f"what {i}" for i in (0, 2, 4, 6, 8)] for name, questions in asked if name != "others")
    assert [name for name, _ in asked] == ["strangers"] * validation.DRAWS + ["reworded", "others"]
