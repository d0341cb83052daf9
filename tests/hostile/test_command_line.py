"""The command line given what it should not be given: one line that says what is wrong, and nothing half done."""

from __future__ import annotations

import json

import pytest
from command_line import ANNA, OTHERS, misused, run
from typer.testing import CliRunner

from cu_fast import unlearn as finding
from cu_fast.cli.app import app
from cu_fast.hf.checkpoint import load_model
from cu_fast.masks import Mask

MARKUP = "[/bold] [red]x[/green] \\"


def refused(*arguments, words):
    """Exit code 1, one line, which holds these words."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output or repr(result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    line = result.stderr.splitlines()[-1]  # after transformers' progress bars
    assert line.startswith("error: ") and words in line and result.stderr.count("error: ") == 1, result.stderr


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "anna.txt").write_text("\n".join(ANNA))
    (tmp_path / "others.txt").write_text("\n".join(OTHERS))
    return "--target", tmp_path / "anna.txt", "--control", tmp_path / "others.txt"


@pytest.fixture
def damaged(tmp_path):
    contents = {
        "binary.txt": b"\xff\xfe\x00\x81",
        "broken.jsonl": b'"a text"\n{"text": \n',
        "deep.jsonl": b"[" * 100_000,
        "numbers.jsonl": b'"a text"\n\n17\n',
        "keys.jsonl": b'{"question": "a"}\n',
        "types.jsonl": b'{"prompt": "a", "completion": 3}\n',
        "empty.txt": b"\n \n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "directory").mkdir()
    return tmp_path


def test_a_topic_of_markup_is_printed_as_it_is_and_saved(folder, texts, tmp_path):
    given = (*texts, "--topic", MARKUP, "--min-enrichment", 1, "--output", tmp_path / "mask [/b]")
    result = run("unlearn", folder, *given)
    assert result.exit_code == 0, result.output or repr(result.exception)
    assert "[/bold] [red]x[/green]" in result.stdout and Mask.load(tmp_path / "mask [/b]").topic == MARKUP


def test_a_terminal_without_the_topics_characters_still_says_that_it_was_saved(folder, texts, tmp_path):
    given = ["unlearn", folder, *texts, "--topic", "Ägypten →", "--min-enrichment", 1, "--output", tmp_path / "mask"]
    result = CliRunner(charset="ascii").invoke(app, [str(argument) for argument in given])
    assert result.exit_code == 0 and "mask saved" in result.stdout, repr(result.exception)


def test_nothing_is_saved_where_the_evidence_cannot_be_shown(folder, texts, tmp_path, monkeypatch):
    def fail(_):
        raise ValueError("no table")

    monkeypatch.setattr("cu_fast.cli.models.evidence_table", fail)
    refused("unlearn", folder, *texts, "--topic", "t", "--min-enrichment", 1, "--output", tmp_path / "mask",
            words="no table")  # fmt: skip
    assert not (tmp_path / "mask").exists()


@pytest.mark.parametrize("words", ["", "Anna,", " , "])
def test_an_empty_word_is_refused(folder, texts, words):
    refused("unlearn", folder, *texts[:2], "--words", words, "--topic", "t", words="words is ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--min-enrichment", "nan"), "min_enrichment is nan"),
        (("--min-enrichment", "inf"), "min_enrichment is inf"),
        (("--alpha", "nan"), "alpha is nan"),
        (("--alpha", 0), "alpha is 0"),
        (("--depth", 3), "depth is 3"),
        (("--depth", 301), "depth is 301"),
        (("--layer", "model.layers.0"), "layer is 'model.layers.0'"),
        (("--topic", ""), "topic is ''"),
    ],
)
def test_a_setting_out_of_range_is_refused(folder, texts, given, words):
    refused("unlearn", folder, *texts, *(() if given[0] == "--topic" else ("--topic", "t")), *given, words=words)


def test_an_empty_mask_name_is_not_the_working_directory(folder, tmp_path, monkeypatch):
    _, _, attachment = load_model(folder)
    (mask,) = attachment.masks["even codes / ü"]
    mask.save(tmp_path / "here" / "some mask")
    monkeypatch.chdir(tmp_path / "here")
    refused("generate", folder, "--prompt", "Anna", "--without", "", words="mask ''")
    result = run("generate", folder, "--prompt", "Anna", "--without", "some mask", "--json")
    assert result.exit_code == 1 and "already" in result.stderr  # the folder's mask: its topic is known


def test_a_directory_without_a_mask_is_an_unknown_mask(folder, damaged):
    refused("generate", folder, "--prompt", "Anna", "--without", damaged / "directory", words="there is no mask")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.txt", "none.txt"),
        ("directory", "directory"),
        ("binary.txt", "binary.txt is no text file"),
        ("broken.jsonl", "broken.jsonl, line 2 is not valid JSON"),
        ("deep.jsonl", "deep.jsonl, line 1 is not valid JSON"),
        ("numbers.jsonl", "numbers.jsonl, line 3 is '17'; it should be a JSON string"),
        ("empty.txt", "target holds no text"),
    ],
)
def test_a_file_that_holds_no_texts_is_named(folder, damaged, texts, name, words):
    refused("unlearn", folder, "--target", damaged / name, *texts[2:], "--topic", "t", words=words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.txt", "none.txt"),
        ("directory", "directory"),
        ("binary.txt", "binary.txt is no text file"),
        ("broken.jsonl", "broken.jsonl, line 1 is '\"a text\"'; it should be a JSON object"),
        ("keys.jsonl", "['question']"),
        ("types.jsonl", "types.jsonl, line 1: completion is 3"),
        ("empty.txt", "is empty"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_file_that_holds_no_rows_is_named(folder, damaged, command, name, words):
    given = {
        "train": (folder, damaged / name, "--output", damaged / "out", "--layer", "model.layers.1", "--codes", 64),
        "eval": (folder, f"set={damaged / name}"),
    }
    refused(command, *given[command], words=words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--layer", "model.layers.9"), "model.layers.9"),
        (("--k", 0), "k is 0"),
        (("--k", 99), "k is 99"),
        (("--codes", -1), "num_codes is -1"),
        (("--epochs", 0), "epochs is 0"),
        (("--epochs", "nan"), "epochs is nan"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--learning-rate", "nan"), "learning_rate is nan"),
        (("--codebook-learning-rate", -1), "codebook_learning_rate is -1"),
        (("--prompt-weight", "inf"), "prompt_weight is inf"),
        (("--output", __file__), "is a file"),
        (("--resume",), "no checkpoint"),
    ],
)
def test_a_wrong_training_setting_is_refused_before_training(folder, tmp_path, given, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the cat sat"}))
    usual = ("--output", tmp_path / "out", "--layer", "model.layers.1", "--codes", 64, "--k", 4)
    refused("train", folder, tmp_path / "rows.jsonl", *usual, *given, words=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "choices"),
    [
        (("--activation", "gelu"), ["relu", "none"]),
        (("--activation", "ReLU"), ["relu", "none"]),
        (("--recipe", "both"), ["joint", "frozen_below"]),
        (("--recipe", ""), ["joint", "frozen_below"]),
    ],
)
def test_a_wrong_choice_is_a_usage_error_before_training(folder, tmp_path, given, choices):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the cat sat"}))
    usual = ("--output", tmp_path / "out", "--layer", "model.layers.1", "--codes", 64, "--k", 4)
    misused("train", folder, tmp_path / "rows.jsonl", *usual, *given, choices=choices)
    assert not (tmp_path / "out").exists()


def test_sets_of_one_name_and_masks_without_one_are_refused(folder, tmp_path):
    (tmp_path / "a").write_text(json.dumps({"prompt": "Anna", "completion": "sings"}))
    refused("eval", folder, f"a={tmp_path / 'a'}", f"a={tmp_path / 'a'}", words="two sets 'a'")
    refused("eval", folder, f"a={tmp_path / 'a'}", "--without", "", words="mask ''")


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("verify",), ("eval", "a=b")])
def test_a_model_that_is_none_is_named(tmp_path, command):
    (tmp_path / "b").write_text("{}")
    sets = [f"a={tmp_path / 'b'}"] if command[0] == "eval" else command[1:]
    for model in (tmp_path, tmp_path / "b", tmp_path / "nowhere", ""):
        refused(command[0], model, *sets, words="no model folder")


def test_counting_checks_what_it_is_given(attachment, tokenizer):
    given = dict(layer="model.layers.1", depth=4)
    for change, error, words in (
        (dict(layer="model.layers.9"), ValueError, "layer is 'model.layers.9'"),
        (dict(depth=0), ValueError, "depth is 0"),
        (dict(depth=4.0), ValueError, "depth is 4.0"),
        (dict(batch_size=0), ValueError, "batch_size is 0"),
        (dict(max_length=0), ValueError, "max_length is 0"),
        (dict(texts="Anna sings"), TypeError, "texts is a str"),
        (dict(texts=["Anna", None]), TypeError, "texts holds None"),
    ):
        with pytest.raises(error, match=words):
            finding.count_codes(attachment, tokenizer, **{"texts": ANNA, **given, **change})


def test_finding_checks_what_it_is_given_before_it_counts(attachment, tokenizer):
    def never():
        raise AssertionError("counted")
        yield

    for change, words in (
        (dict(test="t"), "test is 't'"),
        (dict(correction="holm"), "correction is 'holm'"),
        (dict(grow="all"), "grow is 'all'"),
        (dict(min_enrichment=float("nan")), "min_enrichment is nan"),
        (dict(topic=None), "topic is None"),
    ):
        with pytest.raises(ValueError, match=words):
            finding.find_mask(attachment, tokenizer, never(), never(), **{"topic": "t", **change})
    counted = finding.count_codes(attachment, tokenizer, ANNA, layer="model.layers.1", depth=4)
    fewer = finding.CodeCounts(counted.counts[:9], counted.tokens, counted.contexts[:9])
    with pytest.raises(ValueError, match="control counts 9 codes"):
        finding.find_mask(attachment, tokenizer, counted, fewer, topic="t")


def test_one_string_is_no_list_of_words():
    with pytest.raises(TypeError, match="words is 'Anna'"):
        finding.replace_words(ANNA, "Anna", ANNA)
