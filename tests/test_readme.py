"""The README's ten lines run, its commands exist, and its tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cu_fast
from cu_fast import cli, ops

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(capsys):
    (first, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    assert "'hits'" in capsys.readouterr().out


def test_the_second_example_runs_after_the_first(attachment, tokenizer):
    (_, second) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"attachment": attachment, "tokenizer": tokenizer}
    texts = {"target_texts": ["Anna writes books ."] * 9, "control_texts": ["the dog ran on the mat ."] * 9}
    modules = {"cu_fast": cu_fast, "torch": torch, "model": attachment.model, "prompts": ["Anna writes", "the dog ran"]}
    exec(compile(second, "README.md", "exec"), ran := names | texts | modules)
    assert attachment.masks["topic"][0].num_deleted > 0
    assert ran["topics"] == [{"topic"}, None]


def test_every_command_is_in_the_table_and_every_row_is_a_command():
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert commands == set(re.findall(r"^\| `cu-fast (\w+)", README, re.MULTILINE))


@pytest.mark.parametrize("row", re.findall(r"^\| `cu-fast ([^`]+)` \|", README, re.MULTILINE))
def test_the_options_of_a_row_exist(row):
    command, *rest = row.split()
    offered = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert all(option in offered for option in rest if option.startswith("--"))


def test_every_operator_is_in_the_table():
    for name in re.findall(r"^\| `(\w+)\(", README, re.MULTILINE):
        assert callable(getattr(ops, name))


def test_the_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
