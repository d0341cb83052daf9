"""Builds, tests, sanitizes and measures on the GPU of this machine: python benchmarks/gpu_check.py, or make gpu-check.

Uses the Python that runs it and builds in place; installs nothing. Each step is a process with a time limit and a log.
Results are written as they come, so that a run that is cut off leaves what it had.

Exit status: 0 all steps passed; 1 a step failed or took too long; 3 there is no GPU, nothing was run; 4 nothing failed,
but a step was not run, for want of time or of a tool.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, NO_GPU, INCOMPLETE = 0, 1, 3, 4
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Of the tests with the Triton kernels: each dtype and option is compiled anew, and all would take a thousand kernels.
TRITON = "equals_the_reference or scan_cannot or batch or repetitions or exist or 2_to_the or graph or waits or streams or module"
GRACE = 5  # seconds that a step has to end itself
QUERY = [
    "nvidia-smi",
    "--query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm",
    "--format=csv,noheader",
]
MACHINE = """
import importlib.metadata, os, platform, subprocess, sys

def ask(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return f"({error})"

print("system   ", platform.platform(), os.cpu_count(), "CPUs, Python", sys.version.split()[0])
for package in ("torch", "triton", "transformers", "numpy", "flashinfer-python", "faiss-gpu"):
    try:
        print(f"{package:9}", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(f"{package:9} not installed")
print("nvcc     ", ask("nvcc", "--version").split("\\n")[-1])
print("commit   ", ask("git", "describe", "--always", "--dirty", "--exclude=*") or "uncommitted")
print(ask("nvidia-smi"))
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """One process. seconds: its limit. least: with less time than this it is not started. needs: a tool on PATH."""

    name: str
    command: list[str]
    seconds: float
    least: float = 1.0
    log: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    on_gpu: bool = True
    needs: str | None = None
    takes_budget: bool = False  # is told with --budget how many seconds it has

    @property
    def log_name(self) -> str:
        return self.log or f"{self.name}.log"


@dataclasses.dataclass
class Result:
    name: str
    status: str  # passed, failed, timed out, not run
    why: str = ""
    seconds: float = 0.0
    log: str = ""


def gpu_of() -> tuple[str, str] | None:
    """The first GPU's name and compute capability ("9.0"), None where there is none."""
    try:
        found = subprocess.run(QUERY, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    parts = found.stdout.split("\n")[0].split(", ")
    return (parts[0], parts[1]) if found.returncode == 0 and len(parts) > 1 else None


def arch_of(capability: str) -> str:
    """CU_FAST_ARCHS for one GPU: "90a" for 9.0, whose "a" code is its fastest, "80" for 8.0."""
    number = capability.replace(".", "")
    return "90a" if number == "90" else number


def steps(output: Path, arch: str) -> list[Step]:
    """All steps, in their order."""
    python = sys.executable
    build = {"CU_FAST_BUILD": "require", "CU_FAST_CUDA": "1", "CU_FAST_ARCHS": arch, "MAX_JOBS": str(os.cpu_count())}
    on_cuda = {"CU_FAST_TEST_GPU_ON": "cuda"}  # where it cannot run, that is an error, not a skipped test
    # Each tensor an allocation of its own: reading beyond it is then noticed.
    checked = on_cuda | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20"]
    return [
        Step("machine", [python, "-c", MACHINE], 60, 2, on_gpu=False),
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 200, 20, environment=build, on_gpu=False),
        Step("tests", [*pytest, "--durations=15", "tests/gpu/test_gpu.py", "tests/gpu/test_gpu_use.py"], 170, 30, environment=on_cuda),
        # The scan that other GPUs run, on Hopper.
        Step("older-scan", [*pytest, "-k", "scan", "tests/gpu/test_gpu.py"], 60, 10, log="tests.log",
             environment=on_cuda | {"CU_FAST_WGMMA": "0"}),
        Step("triton", [*pytest, "--durations=15", "-k", TRITON, "tests/gpu/test_gpu_triton.py", "tests/gpu/test_gpu.py",
                        "tests/gpu/test_gpu_use.py"], 180, 30, environment=on_cuda | {"CU_FAST_TEST_GPU_IMPL": "triton"}),
        *(
            Step(tool, [*sanitizer, "--tool", tool, python, "tests/gpu/gpu_small.py"], 60, 10, log="sanitizer.log",
                 environment=checked, needs="compute-sanitizer")
            for tool in TOOLS
        ),
        Step("benchmark", [python, "benchmarks/gpu_cells.py", "--output", str(output)], 400, 100, takes_budget=True),
    ]  # fmt: skip


class Run:
    """Runs steps one after the other within a budget, and writes down what became of them."""

    def __init__(self, output: Path, budget: float, heading: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.output, self.heading, self.clock = output, heading, clock
        self.results: list[Result] = []
        self.end = clock() + budget
        output.mkdir(parents=True, exist_ok=True)

    def all(self, chosen: list[Step]) -> int:
        """Runs the steps; returns the exit status."""
        for step in chosen:
            (self.output / step.log_name).unlink(missing_ok=True)
        for number, step in enumerate(chosen):
            kept_for_later = sum(later.least for later in chosen[number + 1 :])
            self.results.append(self.one(step, min(step.seconds, self.end - self.clock() - kept_for_later)))
            self.write()
            result = self.results[-1]
            print(f"{result.name:10} {result.status} {result.why}".rstrip(), flush=True)
        statuses = {result.status for result in self.results}
        return FAILED if statuses & {"failed", "timed out"} else INCOMPLETE if "not run" in statuses else PASSED

    def one(self, step: Step, seconds: float) -> Result:
        build = next((result for result in self.results if result.name == "build"), None)
        if step.on_gpu and build is not None and build.status != "passed":
            return Result(step.name, "not run", "the build did not pass")
        if seconds < step.least:
            return Result(step.name, "not run", f"{max(0, seconds):.0f} s are left for it, {step.least:.0f} are needed")
        if step.needs and shutil.which(step.needs) is None:
            return Result(step.name, "not run", f"{step.needs} is not on PATH")
        command = [*step.command, *(["--budget", f"{seconds - GRACE:.0f}"] if step.takes_budget else [])]
        start = self.clock()
        status, why = self.process(step, command, seconds)
        return Result(step.name, status, why, self.clock() - start, step.log_name)

    def process(self, step: Step, command: list[str], seconds: float) -> tuple[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | step.environment
        with open(self.output / step.log_name, "a") as log:
            print(f"== {step.name}: {shlex.join(command).splitlines()[0]}", file=log, flush=True)
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return "failed", str(error)
            try:
                code = process.wait(seconds)
                return ("passed", "") if code == 0 else ("failed", f"exit status {code}")
            except subprocess.TimeoutExpired:
                return "timed out", f"after {seconds:.0f} s"
            finally:
                stop(process)

    def write(self) -> None:
        """summary.txt, whole or as it was."""
        partial = self.output / ".summary.txt"
        partial.write_text(self.summary())
        partial.replace(self.output / "summary.txt")

    def summary(self) -> str:
        lines = [self.heading, "", f"{'step':10} {'result':10} {'seconds':>7}  log"]
        for result in self.results:
            seconds = f"{result.seconds:7.1f}" if result.log else " " * 7
            lines.append(f"{result.name:10} {result.status:10} {seconds}  {result.log or '-':14} {result.why}".rstrip())
        return "\n".join(lines) + "\n"


def stop(process: subprocess.Popen) -> None:
    """Ends a process and all that it started in its own session, if any of it is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu-check", help="folder of logs and results")
    parser.add_argument("--only", default="", help="steps, for example build,tests; all by default")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    options = parser.parse_args(arguments)
    gpu = gpu_of()
    known = steps(options.output.absolute(), os.environ.get("CU_FAST_ARCHS") or arch_of(gpu[1] if gpu else "9.0"))
    wanted = list(filter(None, options.only.split(","))) or [step.name for step in known]
    if unknown := [name for name in wanted if name not in {step.name for step in known}]:
        parser.error(
            f"--only is {options.only!r}: {unknown[0]!r} is no step; steps are {', '.join(s.name for s in known)}"
        )
    chosen = [step for step in known if step.name in wanted]
    if gpu is None and any(step.on_gpu for step in chosen):
        print("not run: no GPU (nvidia-smi finds none); --only machine,build works without one", file=sys.stderr)
        return NO_GPU
    heading = f"{gpu[0]}, compute capability {gpu[1]}" if gpu else "no GPU"
    print(heading, flush=True)
    run = Run(options.output, options.budget, f"{heading}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    status = run.all(chosen)
    print(f"\n{run.summary()}\nlogs: {options.output}")
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # so that a step is ended with this process
    sys.exit(main())
