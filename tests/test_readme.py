"""The README's ten lines run, its commands exist, and its tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers.generation import ContinuousBatchingConfig
from typer.testing import CliRunner

import cu_fast
from cu_fast import ops
from cu_fast.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(capsys):
    (first, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    assert "'hits'" in capsys.readouterr().out


def test_the_other_examples_run_after_it(attachment, tokenizer):
    (_, second, third) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"attachment": attachment, "tokenizer": tokenizer}
    texts = {"target_texts": ["Anna writes books ."] * 9, "control_texts": ["the dog ran on the mat ."] * 9}
    modules = {"cu_fast": cu_fast, "torch": torch, "model": attachment.model, "prompts": ["Anna writes", "the dog ran"]}
    exec(compile(second, "README.md", "exec"), ran := names | texts | modules)
    assert attachment.masks["topic"][0].num_deleted > 0
    assert ran["topics"] == [{"topic"}, None]
    attachment.model.set_attn_implementation("eager")
    # Left to itself it takes most of the memory for its keys and values.
    ran["batching"] = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64)
    attachment.model.generation_config.max_new_tokens = 4
    ran["prompt_ids"] = [[5, 6, 7], [8, 9]]
    exec(compile(third, "README.md", "exec"), ran)
    assert len(ran["outputs"]) == 2 and not any(output.error for output in ran["outputs"].values())


def test_every_command_is_in_the_table_and_every_row_is_a_command():
    commands = {command.name or command.callback.__name__ for command in app.app.registered_commands}
    assert commands == set(re.findall(r"^\| `cu-fast (\w+)", README, re.MULTILINE))


@pytest.mark.parametrize("row", re.findall(r"^\| `cu-fast ([^`]+)` \|", README, re.MULTILINE))
def test_the_options_of_a_row_exist(row):
    command, *rest = row.split()
    offered = CliRunner().invoke(app.app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert all(option in offered for option in rest if option.startswith("--"))


def test_every_operator_is_in_the_table():
    for name in re.findall(r"^\| `(\w+)\(", README, re.MULTILINE):
        assert callable(getattr(ops, name))


def test_the_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
