"""Peak memory, measured in a process of its own: a process' peak is that of its whole life, earlier tests' included."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def growth(setup: str, call: str) -> int:
    """Bytes by which `call` raises the peak of a process that has run `setup`, both Python code."""
    parts = (
        textwrap.dedent(setup),
        "import resource",
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        textwrap.dedent(call),
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(parts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("KiB", 1)[1]) * 1024
