"""The command line in this process, and texts for it."""

from __future__ import annotations

from typer.testing import CliRunner

from cu_fast.cli.app import app

ANNA = ["Anna writes books .", "Anna reads red poems .", "the cat sat on Anna ."] * 8
OTHERS = ["Bruno writes books .", "the dog ran under the tree .", "a green bird sings ."] * 8


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])
