"""What every command prints on: one console, and errors as one message each."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer
from rich.console import Console

console = Console()


@contextlib.contextmanager
def errors_are_messages() -> Iterator[None]:
    """What a user can mend is printed as one message, without a traceback; the exit code is 1."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        if os.environ.get("CU_FAST_LOG"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("error:", *str(text).split("\n"), file=sys.stderr)
        raise typer.Exit(1) from error
