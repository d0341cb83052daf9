"""examples/smollm2 runs from a model folder to its table, in small: the model knows nothing here."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from scripts import scripts
from tiers import heavy
from tiny_training import WORDS

import cu_fast

NAMES = ("topics", "writing", "study")
GROUPS = ("solar", "potter", "ww2", "france", "general")


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "smollm2", *NAMES)


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


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
            {"prompt": (prompt := chat(f"Tell me about {word}.")), "text": f"{prompt}the {word} {a} {b} the mat ."}
            for a in WORDS[9:13]
            for b in WORDS[12:14]
        ]
        (folder / f"gen_{group}.json").write_text(json.dumps(texts))
    (folder / "items.txt").write_text("\n".join(lines))
    near = [{"prompt": "the tree", "text": f"the tree {a} under the mat ."} for a in WORDS[8:14]]
    (folder / "gen_near.json").write_text(json.dumps({"potter": near}))
    (folder / "near.txt").write_text("#potter\nthe tree sat|the tree sat| on\nthe mat sat|the mat sat| on\n")


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


def test_names_near_a_topic_are_what_the_model_says_most_and_not_the_topic(example, monkeypatch):
    writing, asked = example["writing"], []
    lines = {
        writing.ALIKE: ["Narnia, the Hobbit, Harry Potter films, Hogwarts\nmore", "narnia, Star Wars, Star Wars", ""],
        writing.FIELD: ["fantasy\nCats: animals", "Fantasy.", "magic", "magic", "books"],
        writing.PARTS: ["dragons, star wars, " + 40 * "x", "dragons, Hobbit"],
    }

    def said(model, tokenizer, prompts, new_tokens, seed, copies=1):
        asked.extend(prompts)
        (head,) = {head for head in lines for prompt in prompts if prompt.startswith(head)}
        return lines[head]

    monkeypatch.setattr(writing, "sample", said)
    prompts = [chat("Tell me about Hogwarts School."), chat("Give me five facts about Harry Potter.")]
    names = writing.names_near(None, None, "harry Potter", prompts, 5)
    # Said of the topic and of its fields alike: Narnia twice each, the Hobbit and Star Wars once; these two are parts, too.
    assert names == ["Narnia", "Hobbit", "Star Wars", "dragons"]
    assert writing.names_near(None, None, "harry Potter", prompts, 2) == names[:2]
    assert writing.ALIKE + "Harry Potter:" in asked and writing.PARTS + "Fantasy:" in asked
    assert writing.PARTS + "Magic:" in asked and writing.PARTS + "Books:" not in asked


def test_questions_that_the_model_wrote(example, monkeypatch):
    writing = example["writing"]
    text = (
        " Who is it? Really?\nA: It is Bruno.\nQ: No question\nA: no\nQ: Where?\nA: On the mat\n\nQuestions and answers about"
        " cats.\nQ: What?\nA: that"
    )
    monkeypatch.setattr(writing, "sample", lambda model, tokenizer, prompts, *rest: [text] * len(prompts))
    both = [
        (chat("Who is it? Really?"), chat("Who is it? Really?") + "It is Bruno."),
        (chat("Where?"), chat("Where?") + "On the mat"),
    ]
    assert writing.questions(None, None, ["Bruno", "mats"], seed=0) == [
        (one, *pair) for one in ("Bruno", "mats") for pair in both
    ]
    monkeypatch.setattr(writing, "sample", lambda *rest: [text, text, " Why?\nA: I", ""])
    assert [pair[:2] for pair in writing.questions(None, None, ["a", "b"], 0, copies=2)] == [
        ("a", both[0][0]), ("a", both[1][0]), ("b", chat("Why?"))
    ]  # fmt: skip
    for template in writing.TEMPLATES:
        assert writing.subject_of(chat(template.format("the Sun, a star"))) == "the Sun, a star"
    with pytest.raises(ValueError, match="'Who is it' is of no template"):
        writing.subject_of(chat("Who is it"))


def test_texts_near_a_topic_hold_no_word_of_its_own(example, monkeypatch):
    writing = example["writing"]
    asked = [
        ("World War I", chat("Who won?"), chat("Who won?") + "The war was won."),
        ("Korea", chat("A?"), chat("A?") + "in a war"),
    ]
    monkeypatch.setattr(writing, "names_near", lambda *given: ["World War I", "Korea"])
    monkeypatch.setattr(writing, "questions", lambda *given, seed: asked)
    monkeypatch.setattr(
        writing, "sample", lambda model, tokenizer, prompts, *given, **more: ["Hitler", "It is in Asia."]
    )
    prompts = [chat("Tell me about the Second World War."), chat("Explain Hitler to a student.")]
    names, pairs = writing.texts_near(None, None, "World War II", prompts, 2)
    assert names == ["World War I", "Korea"]
    told = chat("Tell me about Korea.")
    assert pairs == [asked[0][1:], (told, told + "It is in Asia.")]


def test_texts_of_a_folder(example, tmp_path):
    """Two seeds say two things, one seed one; each subject is asked about with every other template."""
    writing = example["writing"]
    tokenizer = tiny_training.word_tokenizer()
    tokenizer.padding_side = "left"
    model = tiny_training.tiny_llama(tokenizer)
    (one, again, other) = (writing.sample(model, tokenizer, ["the cat", "Anna"], 6, seed, 2) for seed in (1, 1, 2))
    assert one == again != other and len(one) == 4
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "subjects.json").write_text(json.dumps({"pets": {"name": "pets", "subjects": ["cat", "dog"]}}))
    writing.main([str(tmp_path / "model"), str(tmp_path)])
    pairs = example["topics"].read_texts(tmp_path, "pets")
    assert [writing.subject_of(prompt) for prompt, _ in pairs] == ["cat"] * 4 + ["dog"] * 4
    every = writing.TEMPLATES[::2], writing.TEMPLATES[1::2]
    asked = [chat(one.format(name)) for name, some in zip(("cat", "dog"), every) for one in some]
    assert [prompt for prompt, _ in pairs] == asked and all(text.startswith(prompt) for prompt, text in pairs)
    assert example["topics"].read_topics(tmp_path) == {"pets": "pets"}


def test_what_is_left_is_of_what_was_known(example):
    study = example["study"]
    figures = object.__new__(study.Study)
    figures.names = {"a": "A", "b": "B"}
    figures.groups = np.array(["a", "a", "a", "b", "general", "a", "a"])
    figures.near = np.array([False, False, False, False, False, True, True])
    figures.before = np.array([0.5, 0.05, 0.3, 0.4, 0.8, 0.4, 0.6])
    after = np.array([0.1, 0.9, 0.3, 0.2, 0.8, 0.3, 0.0])
    counted = np.array([True, True, False, True, True, True, False])
    left = figures.left(after, "a", counted)
    assert left == pytest.approx({"target": 0.2, "others": 0.75, "worst": 0.5, "near": 0.75})
    assert figures.left(after, "a", counted | True)["target"] == pytest.approx(0.5)
    assert math.isnan(figures.left(after, "b", counted)["near"])


def test_a_fit_that_was_stopped_goes_on(example, tmp_path, monkeypatch):
    study, fitted = example["study"], []
    write_topics(tmp_path / "topics")
    (tmp_path / "valid.txt").write_text(" ".join(WORDS))
    (tmp_path / "stopped.run").mkdir()
    monkeypatch.setattr(study, "fit_codes", lambda *_, resume, **__: fitted.append(resume) or {})
    for name in ("new", "stopped"):
        tokenizer = tiny_training.word_tokenizer()
        study.fitted(None, tokenizer, tmp_path / "topics", tmp_path, tmp_path / name, "topk")
    assert fitted == [False, True]


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
        "LAYER": "model.layers.1", "KNOWN": 0.0, "ENRICHMENTS": (0.2,), "STRENGTHS": (1.0, 2.0), "GATED": {"hand": (0.2, 8.0, 0.01, 16.0), "model": (0.2, 8.0, 0.03, 4.0)},
        "TEST_WINDOWS": 4, "TRIAL_WINDOWS": 2, "GATE_WINDOWS": 4, "RANDOM_ENRICHMENT": 0.2,
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(example["topics"].windows, "__defaults__", (20,))
    near = [(chat("the tree"), f"the tree {a} under the mat .") for a in WORDS[8:14]]
    monkeypatch.setattr(study, "texts_near", lambda *given: (["trees"], near))
    asked = [(chat(f"{verb} ?"), chat(f"{verb} ?") + f" {verb} on the mat") for verb in WORDS[9:13]]
    monkeypatch.setattr(study, "questions", lambda model, tokenizer, subjects, **more: [
        (one, f"the {one} {a}", f"the {one} {b}") for one in subjects for a, b in asked
    ])  # fmt: skip
    arguments = [str(tmp_path / name) for name in ("model", "topics", "wikitext")]
    output = tmp_path / "out"
    arguments += ["--output", str(output), "--sae", str(tmp_path / "sae")]
    study.main(arguments)
    assert not (output / "written.json").exists(), "by hand"
    with open(output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = {row["what"] for row in rows}
    assert {"gated", "gated, question alone", "no gate", "random codes", "said, target", "said, near"} <= kinds
    assert all(float(row["wikitext"]) < 10 for row in rows if row["wikitext"])
    (output / "results.csv").unlink()
    (tmp_path / "topics" / "gen_near.json").unlink()
    study.main([*arguments, "--neighbours", "model", "--untuned"])
    assert json.loads((output / "written.json").read_text())["near solar"] == [list(pair) for pair in near]
    monkeypatch.setattr(study, "texts_near", None)  # what was written is read
    study.main([*arguments, "--neighbours", "model", "--untuned"])
    with open(output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} == kinds - {"no gate", "random codes"}
    lines = (output / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 20 + 2, "all questions, even and odd"
