"""The command line as a user meets it: every command end to end on a tiny model, exit codes, and messages."""

from __future__ import annotations

import csv
import json

import pytest
from command_line import ANNA, OTHERS, run
from tiny_saes import make_sae

import cu_fast
from cu_fast import nn
from cu_fast.masks import Mask


def fails(*arguments, words):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "error: " in result.stderr and words in result.stderr, result.stderr
    assert "Traceback" not in result.output


def test_env_as_json_names_what_runs():
    result = run("env", "--json")
    facts = json.loads(result.stdout)
    assert (
        result.exit_code == 0
        and facts["impl on cpu"] == "cpu"
        and facts["simd"] in ("scalar", "avx2", "avx512", "neon")
    )
    assert "impl on cpu" in run("env").stdout


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "anna.txt").write_text("\n".join(ANNA))
    (tmp_path / "others.jsonl").write_text("\n".join(map(json.dumps, OTHERS)))
    return {"target": tmp_path / "anna.txt", "control": tmp_path / "others.jsonl"}


def test_unlearn_saves_a_mask_that_generate_uses(folder, texts):
    found = run("unlearn", folder, "--target", texts["target"], "--control", texts["control"], "--topic", "Anna",
                "--min-enrichment", 1, "--json")  # fmt: skip
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    assert figures["mask"]["num_deleted"] == len(figures["codes"]) > 0

    result = run("generate", folder, "--prompt", "Anna writes", "--without", "Anna", "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"][0]
    assert report["tokens"] == 5 and report["hits"] > 0
    both = run("generate", folder, "--prompt", "Anna", "--without", "Anna", "--without", "even codes / ü")
    assert both.exit_code == 0 and both.stdout.strip() != ""


def test_eval_measures_with_and_without_a_mask(folder, tmp_path):
    rows = [{"prompt": "Anna writes", "completion": "red poems ."}, {"prompt": "the cat", "completion": "sat ."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b").write_text(json.dumps(rows[1]) + "\n\n")
    sets, mask, output = (
        (f"forgotten={tmp_path / 'a.jsonl'}", f"kept={tmp_path / 'b'}"),
        "even codes / ü",
        tmp_path / "out",
    )
    result = run("eval", folder, *sets, "--without", mask, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert [(r["set"], r["mask"], r["rows"]) for r in results] == [
        ("forgotten", "", 2), ("forgotten", mask, 2), ("kept", "", 1), ("kept", mask, 1)
    ]  # fmt: skip
    assert results[0]["probability"] != results[1]["probability"]
    assert json.loads((output / "results.json").read_text()) == results
    with (output / "results.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["probability"]) for row in table] == [r["probability"] for r in results]
    assert f"| kept | {mask} | 1 |" in (output / "report.md").read_text()
    assert "truth: red poems" in run("eval", folder, sets[0]).stdout

    fails("eval", folder, "a.jsonl", words="'a.jsonl' is no set; it should be NAME=FILE")
    fails("eval", folder, sets[0], "--without", "odd", words="there is no mask 'odd'")
    fails("eval", folder, f"a={tmp_path / 'none.jsonl'}", words="none.jsonl")
    (tmp_path / "empty").write_text("")
    fails("eval", folder, f"a={tmp_path / 'empty'}", words="rows is empty")


def test_unlearn_with_words_instead_of_a_control(folder, texts, tmp_path):
    result = run("unlearn", folder, "--target", texts["target"], "--words", "Anna", "--topic", "Anna",
                 "--min-enrichment", 1, "--output", tmp_path / "mask")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Mask.load(tmp_path / "mask").num_deleted > 0 and "where it fired" in result.stdout


def test_a_topic_without_codes_is_a_failure_that_writes_nothing(folder, texts, tmp_path):
    result = run("unlearn", folder, "--target", texts["target"], "--control", texts["target"], "--topic", "none",
                 "--output", tmp_path / "mask")  # fmt: skip
    assert result.exit_code == 1 and not (tmp_path / "mask").exists()


def test_train_makes_a_folder_that_the_other_commands_take(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in ANNA + OTHERS))
    result = run("train", folder, data, "--output", tmp_path / "out", "--layer", "model.layers.1", "--codes", 64,
                 "--k", 4, "--activation", "none", "--epochs", 1, "--recipe", "frozen_below")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert run("generate", tmp_path / "out" / "model", "--prompt", "the cat").exit_code == 0


def test_verify_passes_on_a_sound_model_and_fails_on_a_broken_one(folder, monkeypatch):
    result = run("verify", folder, "--json")
    checks = json.loads(result.stdout)["checks"]
    assert result.exit_code == 0 and all(check["passed"] for check in checks) and len(checks) >= 6, checks

    from cu_fast.kernels.reference import codebook

    monkeypatch.setattr(codebook, "is_deleted", lambda ids, table, row: ids > ids)
    result = run("verify", folder, "--json")
    failed = [check["check"] for check in json.loads(result.stdout)["checks"] if not check["passed"]]
    assert result.exit_code == 1 and failed


@pytest.mark.parametrize("kind", ["codebook", "threshold", "topk"])
def test_verify_knows_splices_that_keep_the_hidden_state(model, tokenizer, tmp_path, monkeypatch, kind):
    if kind == "codebook":
        splice = cu_fast.BottleneckConfig(d_model=32, code_dim=16, num_codes=64, k=4, splice="delta")
    else:
        splice = make_sae(kind)
    attachment = cu_fast.attach(model, {"model.layers.1": splice})
    (made,) = attachment.bottlenecks.values()
    attachment.add_mask(
        Mask.from_ids([3, 5], num_codes=made.num_codes, codebook_sha256=made.codebook_sha256(), topic="t")
    )
    cu_fast.save_model(attachment, tokenizer, tmp_path / "model")
    result = run("verify", tmp_path / "model", "--json")
    checks = json.loads(result.stdout)["checks"]
    assert result.exit_code == 0 and all(check["passed"] for check in checks), checks
    monkeypatch.setattr(type(made), "row_of", lambda self, masks: nn.Splice.row_of(self, ()))
    result = run("verify", tmp_path / "model", "--json")
    assert result.exit_code == 1


def test_what_a_user_can_mend_is_one_line(folder, texts, tmp_path):
    fails("generate", tmp_path / "none", "--prompt", "a", words="no model folder")
    fails("generate", folder, "--prompt", "a", "--without", "even", words="there are: even codes / ü")
    fails("unlearn", folder, "--target", texts["target"], "--topic", "t", words="--control")
    fails(
        "unlearn",
        folder,
        "--target",
        tmp_path / "no.txt",
        "--control",
        tmp_path / "no.txt",
        "--topic",
        "t",
        words="no.txt",
    )
    (tmp_path / "empty.txt").write_text("")
    fails(
        "unlearn",
        folder,
        "--target",
        tmp_path / "empty.txt",
        "--control",
        texts["control"],
        "--topic",
        "t",
        words="target holds no text",
    )
    fails("train", folder, texts["control"], "--output", tmp_path / "o", "--layer", "model.layers.9", words="object")


def test_wrong_usage_has_its_own_exit_code():
    assert run("generate").exit_code == 2
