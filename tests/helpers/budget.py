"""What the tests cost: CPU-seconds of pytest's workers and of the processes that they start, per folder and per file.

`make test` passes --budget tests/budget.csv. A folder that costs a quarter more than its line there fails the run. The
lines hold for a machine on which `reference_work` takes the seconds of the line "reference_work"; on another machine
they are multiplied by the ratio of the two. CPU-seconds and not wall time: other work on the machine hardly changes them.
"""

from __future__ import annotations

import collections
import csv
import os
import resource
import time
from pathlib import Path

import background
import pytest

ALLOWED = 1.25
COLLECTING = "collecting"  # imports and collection, of all workers
SLOWEST = 10  # files that are printed
ROOT = Path(__file__).parents[2]


def spent() -> float:
    """CPU-seconds of this process and of its children, without what background.py accounts for itself."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used) - background.waited_for()


def reference_work() -> float:
    """CPU-seconds of a fixed piece of work, the least of five: how fast this machine runs Python."""

    def once() -> float:
        begin = time.process_time()
        counts = collections.Counter(str(i * i)[-3:] for i in range(200_000))
        sorted(counts, key=counts.get)
        return time.process_time() - begin

    return min(once() for _ in range(5))


def read(path: Path) -> dict[str, float]:
    with path.open(newline="") as lines:
        return {line["folder"]: float(line["cpu_s"]) for line in csv.DictReader(lines)}


def folder_of(file: str) -> str:
    """tests/hf/test_hf.py and tests/kernels/cuda_kernels/test_emulation.py: hf and kernels; a file of tests itself: tests."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else parts[0]


class Budget:
    """A pytest plugin. Workers measure; the process that prints the summary adds up."""

    def __init__(self, path: str | None) -> None:
        self.path = path and Path(path)
        self.files: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.last = 0.0

    # -- in the process that runs tests ------------------------------------------------------------------------------

    def pytest_collection_finish(self, session) -> None:
        self.last = self.collecting = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "teardown":
            now = spent()
            report.user_properties.append(("cpu_s", now - self.last))
            self.last = now
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[COLLECTING] = self.collecting
        elif self.path and session.testscollected:
            self.sum_up(session)

    # -- in the process that prints ----------------------------------------------------------------------------------

    def pytest_testnodedown(self, node, error) -> None:
        self.files[COLLECTING] += getattr(node, "workeroutput", {}).get(COLLECTING, 0.0)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "teardown":
            self.files[report.nodeid.split("::")[0]] += dict(report.user_properties).get("cpu_s", 0.0)
        if report.skipped and not hasattr(report, "wasxfail"):
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def sum_up(self, session) -> None:
        """Compare with the budget: a folder that is over fails the run."""
        for file, seconds in background.costs():
            self.files[file] += seconds
        limits = read(self.path)
        self.scale = reference_work() / limits.pop("reference_work")
        self.folders: collections.Counter[str] = collections.Counter()
        for file, seconds in self.files.items():
            self.folders[COLLECTING if file == COLLECTING else folder_of(file)] += seconds
        self.limits = {folder: limits.get(folder, 0.0) * self.scale for folder in {*limits, *self.folders}}
        self.over = sorted(f for f, limit in self.limits.items() if self.folders[f] > ALLOWED * limit)
        if self.over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        line = terminalreporter.write_line
        if self.reasons:
            terminalreporter.section("skipped, by reason", sep="-")
            for reason, number in sorted(self.reasons.items(), key=lambda pair: -pair[1]):
                line(f"{number:5} {' '.join(reason.split())[:112]}")
        if not hasattr(self, "folders"):
            return
        terminalreporter.section("CPU-seconds", sep="-")
        for file, seconds in self.files.most_common(SLOWEST):
            line(f"{seconds:8.1f} {file}")
        line("")
        line(
            f"{sum(self.folders.values()):8.1f} in all; of {os.path.relpath(self.path, ROOT)}, times {self.scale:.2f}:"
        )
        for folder in sorted(self.limits, key=lambda name: -self.folders[name]):
            line(f"{self.folders[folder]:8.1f} of {self.limits[folder]:6.1f} {folder}")
        for folder in self.over:
            line(
                f"{folder} took {self.folders[folder]:.0f} CPU-seconds, its budget is {self.limits[folder]:.0f} and a "
                f"quarter: make its tests cheaper, or mark what is heavy (tests/helpers/tiers.py), or raise the line of "
                f"{self.path} and say why",
                red=True,
            )
