"""`cu-fast sae`: what it writes and says, and one message where it cannot."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run
from releases import C, D, K, sparsify
from releases_pickled import qwen_scope

from cu_fast.cli.sae import app
from cu_fast.sae import load_sae


def test_a_pickle_is_converted_and_shown(tmp_path):
    source, target = qwen_scope(tmp_path, suffix=".pt").folder / "layer3.sae.pt", tmp_path / "written"
    converted = run("sae", "convert", source, target, "--json")
    assert converted.exit_code == 0, converted.output
    facts = json.loads(converted.stdout)
    assert facts.pop("family") == "qwen_scope"
    assert facts == {
        "kind": "topk",
        "C": C,
        "Din": D,
        "Dout": D,
        "k": K,
        "scale": "none",
        "site": "model.layers.3",
        "site_out": None,
        "model": "Qwen/Qwen3-1.7B-Base",
        "l0": K,
        "dtype": "F32",
        "b_dec": True,
        "sha256": load_sae(target).sha256(),
    }
    shown = run("sae", "show", target, "--json")
    assert json.loads(shown.stdout) == facts | {"family": "sae_lens"}
    table = run("sae", "show", target)
    assert table.exit_code == 0
    for name, value in facts.items():
        assert name in table.stdout and (name == "l0" or str(value) in table.stdout)


def test_k_is_an_option(tmp_path):
    source = qwen_scope(tmp_path, suffix=".pt", name="copied").folder
    unknown = run("sae", "convert", source, tmp_path / "written")
    assert (unknown.exit_code, unknown.stdout) == (
        1,
        "",
    ) and "k is not known; it should be said, as --k" in unknown.stderr
    assert run("sae", "convert", source, tmp_path / "written", "--k", 5).exit_code == 0
    assert load_sae(tmp_path / "written").k == 5


def test_what_a_user_can_mend_is_one_line(tmp_path):
    folder = sparsify(tmp_path).folder
    torch.save({"weight": torch.zeros(2)}, tmp_path / "ae.pt")
    for arguments, words in (
        (("show", tmp_path / "none"), "is no folder"),
        (("show", tmp_path), "ae.pt may be pickled, and is not read: run `cu-fast sae convert`"),
        (("convert", folder, folder), "which holds the release itself"),
        (("convert", tmp_path / "ae.pt", tmp_path / "written"), "No family that is known has these"),
    ):
        done = run("sae", *arguments)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["convert", "show"])
def test_help_says_what_arguments_are(command):
    assert {c.callback.__name__ for c in app.registered_commands} == {"convert", "show"}
    done = run("sae", command, "--help")
    assert done.exit_code == 0 and "release" in done.stdout and "--json" in done.stdout
