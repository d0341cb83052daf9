"""Scripts and builds of tens of seconds. Each runs once per test run, in a process of its own, from the first moment on.

COMPILED = background.Task("triton_compiled.py", (sys.executable, script, "sm_90"))

@pytest.mark.background(COMPILED)      conftest.py starts what the collected tests are marked with
def test_it():
    COMPILED.output()                  waits, whichever pytest worker has started it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# The folder of a run's outputs. conftest.py makes it before pytest's workers start, and removes it.
FOLDER = "CU_FAST_TEST_OUTPUTS"
_processes: list[subprocess.Popen] = []
_stopped = threading.Event()


class Task(NamedTuple):
    """A command with variables added to the environment. Tasks are the same if all three are."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def output(self) -> str:
        """What it wrote to stdout. Runs it unless it has run or is running; AssertionError if it failed."""
        kept = Path(os.environ[FOLDER]) / hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        with open(kept.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                assert not _stopped.is_set(), f"{self.name} was stopped"
                process = subprocess.Popen(
                    self.command, env=os.environ | dict(self.environment), stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
                _processes.append(process)
                out, errors = process.communicate()
                assert not _stopped.is_set(), f"{self.name} was stopped"
                kept.write_text(out if process.returncode == 0 else f"failed\n{errors[-6000:]}")
        output = kept.read_text()
        assert not output.startswith("failed\n"), f"{self.name}: {output}"
        return output


def start(tasks: Iterable[Task]) -> None:
    """Runs tasks side by side and returns at once."""
    pool = ThreadPoolExecutor(os.cpu_count())
    for task in tasks:
        pool.submit(task.output)
    pool.shutdown(wait=False)


def stop() -> None:
    """Ends what this process has started: no test waits for it any more."""
    _stopped.set()
    for process in _processes:
        process.kill()
