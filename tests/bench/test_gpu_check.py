"""benchmarks/gpu_check.py and gpu_cells.py without a GPU: steps that fail, hang or no longer fit, and what is left."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiers import heavy

from cu_fast import bench
from cu_fast.bench.providers import PROVIDERS
from cu_fast.kernels import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """The script's names, and where its output goes; no GPU, whatever this machine has."""
    names = runpy.run_path(str(BENCHMARKS / "gpu_check.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CU_FAST_ARCHS", raising=False)
    (tmp_path / "bin").mkdir()
    return SimpleNamespace(**names, output=tmp_path / "out", bin=tmp_path / "bin")


def python(check, name, code, seconds=60.0, **options):
    return check.Step(name, [sys.executable, "-c", code], seconds, **options)


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def results(run):
    return [(result.name, result.status) for result in run.results]


def test_what_fails_is_reported_and_the_rest_still_runs(check):
    run = check.Run(check.output, 60, "a GPU")
    chosen = [
        python(check, "good", "print('fine')", log="shared.log"),
        python(check, "bad", "import sys; print('why'); sys.exit(7)", log="shared.log"),
        check.Step("absent", ["no-such-program"], 5),
        python(check, "last", "pass"),
    ]
    assert run.all(chosen) == check.FAILED
    assert results(run) == [("good", "passed"), ("bad", "failed"), ("absent", "failed"), ("last", "passed")]
    summary = (check.output / "summary.txt").read_text()
    assert summary.startswith("a GPU\n") and "exit status 7" in summary and "No such file" in summary
    log = (check.output / "shared.log").read_text()
    assert log.index("== good") < log.index("fine") < log.index("== bad") < log.index("why")
    assert (
        run.all([python(check, "good", "pass", log="shared.log")])
        and "why" not in (check.output / "shared.log").read_text()
    )  # of this run, not of the last


def test_what_hangs_is_ended_with_all_that_it_started(check, monkeypatch):
    monkeypatch.setitem(check.stop.__globals__, "GRACE", 0.5)
    stubborn = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']);"
        "print(os.getpid(), child.pid, flush=True); time.sleep(99)"
    )
    run = check.Run(check.output, 60, "")
    assert run.all([python(check, "hangs", stubborn, 2.0), python(check, "next", "pass")]) == check.FAILED
    assert results(run) == [("hangs", "timed out"), ("next", "passed")] and run.results[0].why == "after 2 s"
    pids = (check.output / "hangs.log").read_text().splitlines()[-1].split()
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, f"{alive} still run"
        time.sleep(0.05)


def running(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_no_longer_fits_is_not_run_and_later_steps_keep_their_share(check, monkeypatch):
    now, given = [0.0], {}

    def process(run, step, command, seconds):
        given[step.name] = seconds, command[-2:]
        now[0] += 52
        return "passed", ""

    monkeypatch.setattr(check.Run, "process", process)
    run = check.Run(check.output, 100, "", clock=lambda: now[0])
    status = run.all(
        [
            python(check, "first", "", 90, least=10),
            python(check, "second", "", 90, least=45),
            python(check, "third", "", 90, least=5, takes_budget=True),
        ]
    )
    assert status == check.INCOMPLETE
    assert results(run) == [("first", "passed"), ("second", "not run"), ("third", "passed")]
    assert given["first"][0] == 100 - 45 - 5 and given["third"] == (48, ["--budget", "43"])
    assert "43 s are left for it, 45 are needed" in (check.output / "summary.txt").read_text()


def test_without_a_build_nothing_runs_on_the_gpu(check):
    run = check.Run(check.output, 60, "")
    chosen = [python(check, "build", "raise SystemExit(1)", on_gpu=False), python(check, "tests", "pass")]
    assert run.all(chosen) == check.FAILED and results(run) == [("build", "failed"), ("tests", "not run")]
    assert "the build did not pass" in run.summary()


def test_a_tool_that_is_missing_is_no_failure_and_no_pass(check):
    run = check.Run(check.output, 60, "")
    assert run.all([python(check, "memcheck", "pass", needs="compute-sanitizer")]) == check.INCOMPLETE
    assert "compute-sanitizer is not on PATH" in run.summary()


def test_a_step_finds_the_repository_and_its_environment(check):
    code = (
        "import os, cu_fast; assert os.environ['MARK'] == '1' and os.getcwd() == os.environ['PYTHONPATH'].split(':')[0]"
    )
    run = check.Run(check.output, 60, "")
    assert run.all([python(check, "one", code, environment={"MARK": "1"})]) == check.PASSED, run.summary()


def test_the_summary_is_written_after_each_step(check):
    look = f"print(open({str(check.output / 'summary.txt')!r}).read())"
    check.Run(check.output, 60, "").all([python(check, "first", "pass"), python(check, "second", look)])
    seen = (check.output / "second.log").read_text()
    assert "first      passed" in seen and "second     " not in seen.split("==")[-1].split("\n", 1)[1]


# -- main --------------------------------------------------------------------------------------------------------


def main(check, monkeypatch, *arguments, steps=None):
    if steps is not None:
        monkeypatch.setitem(check.main.__globals__, "steps", steps)
    return check.main(["--output", str(check.output), *arguments])


def test_no_gpu_is_said_at_once(check, monkeypatch, capsys):
    assert main(check, monkeypatch) == check.NO_GPU
    assert capsys.readouterr().err.startswith("not run: no GPU") and not check.output.exists()
    program(check.bin / "nvidia-smi", "echo 'NVIDIA-SMI has failed' && exit 9")
    assert main(check, monkeypatch, "--only", "tests,build") == check.NO_GPU


def test_what_needs_no_gpu_runs_without_one(check, monkeypatch, capsys):
    archs = []

    def steps(output, arch):
        archs.append(arch)
        return [python(check, "build", "print('built')", on_gpu=False), python(check, "tests", "pass")]

    assert main(check, monkeypatch, "--only", "build", steps=steps) == check.PASSED
    assert archs == ["90a"] and "build      passed" in capsys.readouterr().out
    assert "built" in (check.output / "build.log").read_text()
    monkeypatch.setenv("CU_FAST_ARCHS", "80;120")
    assert main(check, monkeypatch, "--only", "build", steps=steps) == check.PASSED and archs[1] == "80;120"


@pytest.mark.parametrize("capability, arch", [("9.0", "90a"), ("8.6", "86"), ("12.0", "120")])
def test_the_build_is_for_the_gpu_that_is_there(check, monkeypatch, capability, arch):
    program(check.bin / "nvidia-smi", f"echo 'NVIDIA Test, {capability}, 580.1, 81559 MiB, 1980 MHz'")
    seen = []
    main(check, monkeypatch, steps=lambda output, arch: seen.append(arch) or [python(check, "tests", "pass")])
    assert seen == [arch]
    heading = (check.output / "summary.txt").read_text().splitlines()[0]
    assert heading.startswith(f"NVIDIA Test, compute capability {capability}, ")


def test_an_unknown_step_is_named(check, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        main(check, monkeypatch, "--only", "build,bogus")
    assert exit.value.code == 2
    assert "'bogus' is no step; steps are machine, build, tests, older-scan, triton, mem" in capsys.readouterr().err


def test_the_steps_call_files_that_exist_within_the_budget(check):
    known = check.steps(check.output, "90a")
    names = ["machine", "build", "tests", "older-scan", "triton", *check.TOOLS, "benchmark"]
    assert [step.name for step in known] == names
    named = [part for step in known for part in step.command if part.endswith(".py")]
    assert named and all((check.ROOT / name).is_file() for name in named)
    assert sum(step.least for step in known) < 480 / 2
    assert len({step.log_name for step in known}) + 2 <= 8  # summary and figures beside them: few files to carry home


@heavy
def test_each_word_of_the_triton_step_chooses_tests(check):
    (step,) = (step for step in check.steps(check.output, "90a") if step.name == "triton")
    assert step.environment == {"CU_FAST_TEST_GPU_ON": "cuda", "CU_FAST_TEST_GPU_IMPL": "triton"}
    done = subprocess.run([*step.command, "--collect-only"], cwd=check.ROOT, capture_output=True, text=True)
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert {line.split("::")[0] for line in chosen} == {part for part in step.command if part.endswith(".py")}
    words = check.TRITON.split(" or ")
    assert [word for word in words if not any(word in line for line in chosen)] == []


def test_the_machine_is_described_where_tools_are_missing(check):
    (machine,) = (step for step in check.steps(check.output, "90a") if step.name == "machine")
    run = check.Run(check.output, 60, "")
    assert run.all([machine]) == check.PASSED, (check.output / "machine.log").read_text()
    log = (check.output / "machine.log").read_text()
    assert "torch     2." in log and "uncommitted" not in log.split("commit")[0]


def test_ending_the_script_ends_its_step(check, tmp_path):
    code = (
        f"import runpy, signal, sys; names = runpy.run_path({str(BENCHMARKS / 'gpu_check.py')!r});"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1));"
        f"names['Run'](__import__('pathlib').Path({str(check.output)!r}), 60, '').all([names['Step']('slow', [sys.executable, '-c',"
        "'import os, time; print(os.getpid(), flush=True); time.sleep(99)'], 60)])"
    )
    script = subprocess.Popen([sys.executable, "-c", code])
    log = check.output / "slow.log"
    deadline = time.monotonic() + 20
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    script.wait(20)
    assert not running(log.read_text().split()[-1])


# -- what is predicted -------------------------------------------------------------------------------------------


@pytest.fixture
def roofline():
    if native.failure() is not None:
        pytest.skip("the native library was not built")
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "roofline.py")))


def test_the_predictions_are_those_in_the_documentation(roofline):
    text = (BENCHMARKS.parent / "docs/gpu.md").read_text()
    assert roofline.table() in text, "put what benchmarks/roofline.py prints into docs/gpu.md"
    first = roofline.table("A100")
    assert first != roofline.table() and first.count("**") == 2 * len(roofline.CASES)


def test_rates_are_those_that_plans_are_made_with(roofline):
    """The plan's own prediction, which the native library makes of the same header, by the kernels' costs."""
    entries = 2048 * 65_536
    for card in roofline.CARDS:
        rates = roofline.rates_of(card)
        made = roofline.plan(4, 2048, 65_536, 64, card)
        exact = roofline.scored_exactly(4, 2048, 65_536, rates)
        start = roofline.constant("kExactStart", "select.h")
        assert made.predicted[1] == pytest.approx(start + exact.microseconds(rates), abs=0.06)
        made = roofline.plan(2048, 2048, 65_536, 64, card)
        scan = roofline.scanned(2048, 2048, 65_536, made, card)
        scored = roofline.candidates_scored(2048, 2048, 65_536, 64, rates)
        whole = 2 * roofline.constant("kScanStart", "select.h") + (scan._replace(after=0)).microseconds(rates)
        assert made.scans and made.chunk == 1024 and made.sample == 1 / 16
        # The plan expects about as many candidates as were counted.
        assert made.predicted[0] == pytest.approx(whole + scored.microseconds(rates), rel=0.05)
    assert roofline.rates_of("H100").memory == pytest.approx(0.9 * 3.35e6)
    assert roofline.rates_of("H100").many_products == pytest.approx(0.6 * 989e6)
    assert scan.memory == 2 * entries * 17 / 16


def test_a_prediction_by_hand(roofline):
    entries = 2048 * 65_536
    made = roofline.plan(256, 2048, 65_536, 64, "H100")
    scan = roofline.scanned(256, 2048, 65_536, made, "H100")
    # Four tiles of 64 tokens, each beside 256 tiles of codes and 16 of the sample.
    assert scan.cache == pytest.approx(4 * (entries + 256 * 64 * 2 * 2048) * 17 / 16)
    assert scan.after == pytest.approx(4 * 272 * roofline.EPILOGUE_CYCLES / (132 * 1755))
    assert scan.microseconds(roofline.rates_of("H100")) == pytest.approx(scan.cache / 5.5e6 + scan.after)
    kernels, launches = roofline.predict("bottleneck, D = 768", 1, 768, 10_000, 8)
    assert launches == 5 and list(kernels) == ["fix_rows", "sae_encode", "select_exact", "chain", "finish_decode"]
    assert not roofline.plan(1, 512, 25_000, 8, "H100").scans
    encode = roofline.scored_exactly(2048, 4096, 4096, roofline.rates_of("H100"))
    assert encode.arithmetic == pytest.approx(9 * 2048 * 4096**2 / (0.6 * 989e6))
    assert encode.cache == pytest.approx((16 + 32) * 3 * 4096**2)


@pytest.mark.parametrize("E, C, k", [(2048, 65_536, 64), (512, 25_000, 8)])
def test_counted_candidates_are_near_the_expected(roofline, E, C, k):
    text = torch.ops.cu_fast.cuda_selection_plan(2048, C, E, k, True, 132, 9, 0)
    expected = [float(n) for n in re.search(r"([\d.]+) candidates .* ([\d.]+) of them scored", text).groups()]
    assert [round(a / b) for a, b in zip(expected, roofline.COUNTED[E, C, k])] == [1, 1]


# -- the cells ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "gpu_cells.py")))


def test_the_plans_are_sound_and_the_first_is_the_most_telling(cells):
    plans = cells.plans()
    assert all(plan.device == "cuda" for plan in plans) and len(set(plans)) == len(plans)
    first = plans[0].cells()
    assert {(cell.T, cell.mask) for cell in first} == {(1, "none"), (16, "none"), (1, "50%"), (16, "50%")}
    assert {(cell.E, cell.C, cell.k, cell.dtype) for cell in first} == {(2048, 65_536, 64, "bf16")}
    assert {"faiss_gpu", "flashinfer_bf16"} <= set(plans[0].providers)
    assert all("cu_fast" in plan.providers for plan in plans), "a ratio needs this package in the cell"
    compiling = [any("compile" in name or "triton" in name for name in plan.providers) for plan in plans]
    assert not any(compiling[:4]), "what compiles takes the time of the others"
    assert {plan.op for plan in plans if "cu_fast_triton" in plan.providers} == set(PROVIDERS["cuda"])


def row(**changes):
    return dict.fromkeys(bench.COLUMNS, "") | {
        "kernel_name": "codebook_quantize", "kernel_provider": "cu_fast", "x_value": 1, "y_value_50": 1.0,
        "status": "ok", "match": 1.0, "identical": 1.0, "ratio": 1.0,
        "extra_benchmark_config_str": '{"E": 1, "C": 2, "k": 1, "dtype": "bf16", "mask": "none", "data": "gaussian", "cache": "cold", "seed": 0}',
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"match": 0.5}, "right in 0.5"),
        ({"identical": 0.5}, "identical to the CPU's in 0.5"),
        ({"status": "failed", "note": "what happened"}, "failed: what happened"),
        ({"note": "scan int8; launched eagerly, not captured: x"}, "launched eagerly"),
        ({"kernel_provider": "torch_bf16", "match": 0.5}, None),
    ],
)
def test_wrong_answers_of_this_package_are_faults(cells, changes, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "run", lambda plan, path: [row(**changes)])
    faults = cells.measure(cells.plans()[:1], tmp_path / "rows.csv", time.monotonic() + 60)
    assert len(faults) == (words is not None) and all(words in fault for fault in faults)
    assert "codebook_quantize" in capsys.readouterr().out


def test_measuring_stops_when_the_time_is_used(cells, monkeypatch, capsys, tmp_path):
    runs = []
    monkeypatch.setattr(bench, "run", lambda plan, path: runs.append(plan) or [row()])
    assert cells.measure(cells.plans(), tmp_path / "rows.csv", time.monotonic() - 1) == [] and not runs
    assert f"not run, the time is used: {len(cells.plans())} of {len(cells.plans())} parts" in capsys.readouterr().out


def test_the_figures_of_a_card_have_its_name(cells, monkeypatch, tmp_path):
    paths = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(bench, "run", lambda plan, path: paths.append(path) or [row(match=0.0)])
    assert cells.main(["--output", str(tmp_path), "--budget", "60"]) == 1
    assert set(paths) == {tmp_path / "nvidia-h100-80gb-hbm3.csv"}
    assert os.listdir(tmp_path) == []
