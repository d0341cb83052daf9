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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# The folder of a run's outputs. conftest.py makes it before pytest's workers start, and removes it.
FOLDER = "CU_FAST_TEST_OUTPUTS"
_processes: list[subprocess.Popen] = []
_seconds: list[float] = []  # of CPU, of those that ended
_stopped = threading.Event()


class Task(NamedTuple):
    """A command with variables added to the environment. Tasks are the same if all three are."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def output(self, file: str | None = None) -> str:
        """What it wrote to stdout. Runs it unless it has run or is running; AssertionError if it failed.

        file: the tests that its CPU-seconds are counted for; None = those that run now.
        """
        kept = Path(os.environ[FOLDER]) / hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        with open(kept.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                assert not _stopped.is_set(), f"{self.name} was stopped"
                code, out, errors = self._run(kept, file or os.environ["PYTEST_CURRENT_TEST"].split("::")[0])
                assert not _stopped.is_set(), f"{self.name} was stopped"
                kept.write_text(out if code == 0 else f"failed\n{errors[-6000:]}")
        output = kept.read_text()
        assert not output.startswith("failed\n"), f"{self.name}: {output}"
        return output

    def _run(self, kept: Path, file: str) -> tuple[int, str, str]:
        """Its exit status, stdout and stderr; what it cost is written beside its output."""
        with open(kept.with_suffix(".out"), "w+") as out, open(kept.with_suffix(".err"), "w+") as errors:
            process = subprocess.Popen(self.command, env=os.environ | dict(self.environment), stdout=out, stderr=errors)
            _processes.append(process)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            _seconds.append(used.ru_utime + used.ru_stime)
            kept.with_suffix(".cpu").write_text(f"{file}\n{_seconds[-1]}")
            for stream in (out, errors):
                stream.seek(0)
            return process.returncode, out.read(), errors.read()


def start(tasks: Mapping[Task, str]) -> None:
    """Runs tasks side by side and returns at once. Each has the file of tests that it is for."""
    pool = ThreadPoolExecutor(os.cpu_count())
    for task, file in tasks.items():
        pool.submit(task.output, file)
    pool.shutdown(wait=False)


def stop() -> None:
    """Ends what this process has started: no test waits for it any more."""
    _stopped.set()
    for process in _processes:
        process.kill()


def waited_for() -> float:
    """CPU-seconds of the tasks that this process has waited for, which its own count of its children's holds too."""
    return sum(_seconds)


def costs() -> Iterator[tuple[str, float]]:
    """A file of tests and CPU-seconds, for each task that ran in this test run, in whichever process."""
    for path in Path(os.environ[FOLDER]).glob("*.cpu"):
        file, seconds = path.read_text().splitlines()
        yield file, float(seconds)
