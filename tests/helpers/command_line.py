"""The command line in this process, and texts for it."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from cu_fast.cli.app import app

ANNA = ["Anna writes books .", "Anna reads red poems .", "the cat sat on Anna ."] * 8
OTHERS = ["Bruno writes books .", "the dog ran under the tree .", "a green bird sings ."] * 8


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def misused(*arguments, choices):
    """Exit code 2, and a message that holds the option, where there is one, what it was and exactly these choices."""
    *_, option, value = arguments
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output or repr(result.exception)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert not option.startswith("--") or f"Invalid value for '{option}'" in said, said
    wrong = next(name for name in value.split(",") if name not in choices)
    listed = said.partition(f"{wrong!r} is not one of ")[2]
    assert re.findall(r"'([^']+)'", listed.partition(", or ")[0]) == list(choices), said
