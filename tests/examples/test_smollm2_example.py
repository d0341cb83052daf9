"""examples/smollm2 runs from a model folder to its table, in small: the model knows nothing here."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import tiny_training
import torch
from scripts import scripts
from tiers import heavy
from tiny_training import WORDS

import cu_fast

NAMES = ("topics", "study")
GROUPS = ("solar", "potter", "ww2", "france", "general")


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "smollm2", *NAMES)


def write_topics(folder: Path) -> None:
    folder.mkdir()
    subjects = dict(zip(GROUPS, ("cat", "dog", "bird", "Anna", "Bruno")))
    lines = []
    for group, word in subjects.items():
        lines += [
            f"#{group}",
            *(f"the {word} {verb}|the {word} {verb}| on" for verb in ("sat", "ran", "sings", "reads")),
        ]
        texts = [
            {"prompt": f"the {word}", "text": f"the {word} {a} {b} the mat ."}
            for a in WORDS[9:13]
            for b in WORDS[12:14]
        ]
        (folder / f"gen_{group}.json").write_text(json.dumps(texts))
    (folder / "items.txt").write_text("\n".join(lines))
    (folder / "near.txt").write_text("#potter\nthe tree sat|the tree sat| on\nthe mat sat|the mat sat| on\n")
    near = [{"prompt": "the tree", "text": f"the tree {a} under the mat ."} for a in WORDS[8:14]]
    (folder / "gen_near.json").write_text(json.dumps({"potter": near}))


def test_figures_of_items(example, tmp_path):
    topics = example["topics"]
    write_topics(tmp_path / "topics")
    items = topics.read_items(tmp_path / "topics" / "items.txt")
    assert [item.number for item in items if item.group == "ww2"] == [0, 1, 2, 3] and len(items) == 20
    assert topics.share_said(items[:4], ["on", "it sat ON the mat", "off", "none"]) == 0.75  # "on", in any word
    tokenizer = tiny_training.word_tokenizer()
    model = tiny_training.tiny_llama(tokenizer)
    found = topics.answer_probabilities(model, tokenizer, items[:5], batch_size=2)
    for item, value in zip(items, found.tolist()):
        head = tokenizer(item.prompt + item.prefix, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = model(head).logits[0, -1].double().softmax(-1)
        assert math.isclose(value, float(said[tokenizer("on")["input_ids"][0]]), rel_tol=1e-4)
    rows = [list(range(3, 13)), list(range(8, 18))]
    losses = topics.text_losses(model, rows, batch_size=1)
    assert torch.allclose(losses, topics.text_losses(model, rows), rtol=1e-5) and len(losses) == 2


@heavy
def test_it_runs(example, tmp_path, monkeypatch):
    study = example["study"]
    write_topics(tmp_path / "topics")
    wikitext = tmp_path / "wikitext"
    wikitext.mkdir()
    for part in ("valid", "test"):
        (wikitext / f"{part}.txt").write_text(" ".join(WORDS * 40))
    tokenizer = tiny_training.word_tokenizer()
    tiny_training.tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    basis = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = cu_fast.SAE(basis, torch.zeros(64), torch.full((64,), 0.01), basis.clone(), b_dec=torch.zeros(32))
    cu_fast.sae.save_sae(sae, tmp_path / "sae")
    for name, value in {
        "LAYER": "model.layers.1", "KNOWN": 0.0, "ENRICHMENTS": (0.2,), "STRENGTHS": (1.0, 2.0), "GATED_ENRICHMENT": 0.2,
        "TEST_WINDOWS": 4, "TRIAL_WINDOWS": 2, "GATE_WINDOWS": 4, "RANDOM_ENRICHMENT": 0.2,
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(example["topics"].windows, "__defaults__", (20,))
    arguments = [str(tmp_path / name) for name in ("model", "topics", "wikitext")]
    study.main([*arguments, "--output", str(tmp_path / "out"), "--sae", str(tmp_path / "sae")])
    with open(tmp_path / "out" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = {row["what"] for row in rows}
    assert {"gated", "gated, question alone", "no gate", "random codes", "said, target", "said, near"} <= kinds
    assert all(float(row["wikitext"]) < 10 for row in rows if row["wikitext"])
