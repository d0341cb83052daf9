"""examples/forgetting/restor.py corrupts a model, unlearns, and asks again, in small; the figures say what they should."""

from __future__ import annotations

import csv

import pytest
import tiny_training
import torch
from scripts import scripts
from test_smollm2_example import write_topics
from tiers import heavy
from tiny_training import WORDS

import cu_fast


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "forgetting", "restor", "methods", "topics")


def test_a_wrong_answer_is_another_questions(example):
    Item, topics = example["topics"].Item, example["topics"].TOPICS

    def items(topic: str, answers: list[str]) -> list:
        return [Item(topic, i, f"q {topic} {i}", f"p {topic} {i}", answer) for i, answer in enumerate(answers)]

    some = items(topics[0], [" a", " b", " a", " c", " d", " e", " f"]) + items(topics[1], [" x", " y", " x"])
    some += items("general", [" g", " h"])
    known = [item.answer != " d" for item in some]
    facts, others = example["restor"].corrupted_facts(some, known)
    # Even numbers that are known; of the second topic all of those have one answer, so none is wrong there.
    assert [(fact.item.number, fact.item.answer, fact.wrong.answer) for fact in facts] == [
        (0, " a", " f"), (2, " a", " f"), (6, " f", " a"),
    ]  # fmt: skip
    assert all(fact.wrong.prefix == fact.item.prefix and fact.item.group == topics[0] for fact in facts)
    assert [item.answer for item in others] == [" b", " c", " e", " x", " y", " x", " g", " h"]
    texts = example["restor"].corrupting_texts(facts)
    assert len(texts) == 3 * len(example["restor"].TEXTS) and all(f"p {topics[0]} 0 f" in text for text in texts[:5])


@heavy
def test_it_corrupts_unlearns_and_asks(example, tmp_path, monkeypatch, capsys):
    restor = example["restor"]
    write_topics(tmp_path / "topics")
    answers = iter(WORDS * 4)
    lines = [line if line[0] == "#" else f"{line.rsplit('|', 1)[0]}| {next(answers)}" for line in
             (tmp_path / "topics" / "items.txt").read_text().splitlines()]  # fmt: skip
    (tmp_path / "topics" / "items.txt").write_text("\n".join(lines))
    for part in ("valid", "test"):
        (tmp_path / f"{part}.txt").write_text(" ".join(WORDS * 20))
    tokenizer = tiny_training.word_tokenizer()
    tiny_training.tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    basis = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = cu_fast.SAE(basis, torch.zeros(64), torch.full((64,), 0.01), basis.clone(), b_dec=torch.zeros(32))
    cu_fast.sae.save_sae(sae, tmp_path / "sae")
    for name, value in {
        "LAYER": "model.layers.1", "KNOWN": 0.0, "EPOCHS": 20, "BATCH": 4, "MORE_EPOCHS": 1, "RATE": 5e-3, "ENRICHMENTS": (0.2,),
        "STRENGTHS": (4.0,), "LEARNING_RATE": 1e-2, "UNLEARN_EPOCHS": (1, 3), "SCALES": (1.0,), "CONTROL_WINDOWS": 6, "TEST_WINDOWS": 2,
        "TEXTS": ("{}", "on the mat {}"),
    }.items():  # fmt: skip
        monkeypatch.setattr(restor, name, value)
    monkeypatch.setattr(restor.windows, "__defaults__", (20,))
    where = [str(tmp_path / name) for name in ("model", "topics", "", "sae")]
    restor.main([*where, "--output", str(tmp_path / "out")])
    with open(tmp_path / "out" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    table = {row["method"]: {name: float(row[name]) for name in restor.COLUMNS[3:10]} for row in rows}
    assert list(table) == [
        "clean",
        "corrupted",
        "delta",
        "delta, gated",
        "random codes",
        *example["methods"].METHODS,
        "task vector",
    ]
    assert len(rows) == 6 + 2 * len(example["methods"].METHODS)
    clean, corrupted = table["clean"], table["corrupted"]
    assert clean["facts"] == 8 and clean["others"] == 1 and clean["wikitext"] == 0
    assert corrupted["wrong"] > 2 * clean["wrong"] and corrupted["wikitext"] > 0
    for method in ("delta", "gradient_ascent", "task vector"):
        assert table[method]["wrong"] < corrupted["wrong"], method
    # Whether a gate that was learned on so tiny a model fires for a question depends on the processor's last bits.
    assert table["delta, gated"]["wrong"] <= corrupted["wrong"]
    assert table["random codes"]["wrong"] != table["delta"]["wrong"]
    assert table["delta"]["wikitext"] != table["delta, gated"]["wikitext"] == corrupted["wikitext"]
    assert all(0 <= row[name] <= 1 for row in table.values() for name in ("wrong", "right", "forgotten", "restored"))
    capsys.readouterr()
    restor.main([*where, "--output", str(tmp_path / "out")])
    assert "wrong" not in capsys.readouterr().out, "all was asked before"


def test_restored_means_that_the_right_answer_is_given_again(example, tmp_path, monkeypatch):
    """Of five facts: known again, both answers likely, forgotten but not known, two still wrong."""
    restor = example["restor"]
    study = restor.Restor.__new__(restor.Restor)
    Item = example["topics"].Item
    study.facts = [
        restor.Fact(Item("solar", i, "q", "p", "right"), Item("solar", i, "q", "p", "wrong")) for i in range(5)
    ]
    study.others, study.windows, study.tokenizer, study.rows, study.machine = [], [], None, [], {}
    study.before, study.losses, study.path = torch.tensor([0.5]), torch.zeros(1), tmp_path / "results.csv"
    study.options = type("Options", (), {"seed": 0})
    likely = {"right": [0.9, 0.4, 0.05, 0.0, 0.02], "wrong": [0.0, 0.6, 0.01, 0.9, 0.8]}
    monkeypatch.setattr(
        restor, "answer_probabilities",
        lambda _, __, items: torch.tensor(likely[items[0].answer] if items else [0.25]),
    )  # fmt: skip
    monkeypatch.setattr(restor, "text_losses", lambda *_: torch.tensor([0.125]))
    study.add(None, "any")
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert float(row["restored"]) == 0.2 and float(row["forgotten"]) == 0.4
    assert float(row["others"]) == 0.5 and float(row["wikitext"]) == 0.125 and row["facts"] == "5"


def test_a_task_vector_is_subtracted(example, tmp_path):
    """From the corrupted model, as often as the scale says, of what further training added."""
    restor, asked = example["restor"], {}
    layers = {"corrupted": 3.0, "further": 3.5}

    class Study:
        def has(self, method: str, setting: str) -> bool:
            return setting == "scale 0.5"

        def trained(self, base: str, name: str, epochs: int) -> str:
            assert base == "corrupted" and epochs == restor.MORE_EPOCHS
            return name

        def load(self, name: str, dtype: torch.dtype) -> torch.nn.Linear:
            layer = torch.nn.Linear(2, 2)
            for weight in layer.parameters():
                torch.nn.init.constant_(weight, layers[name])
            return layer

        def add(self, model: torch.nn.Linear, method: str, setting: str, seconds: float) -> None:
            asked[setting] = {value for weight in model.parameters() for value in weight.flatten().tolist()}

    restor.task_vector(Study(), "corrupted")
    assert asked == {"scale 1": {2.5}, "scale 2": {2.0}}
