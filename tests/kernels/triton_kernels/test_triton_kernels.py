"""The Triton kernels: their answers under Triton's interpreter, their machine code compiled ahead of time; no GPU.

Interpreter and compiler cannot share a process, so each runs in its own: triton_interpreted.py, triton_exact.py,
triton_gradients.py, triton_operators.py, triton_compiled.py.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import background
import pytest
import torch
import triton_exact
import triton_gradients
import triton_interpreted
import triton_operators
from tiers import TEST_ALL, heavy

from cu_fast.kernels import triton as kernels
from cu_fast.kernels.triton import launch

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; pip install triton")
# `make test` compiles for two targets, the main configurations of each kernel; `make test-all` for all targets, for these
# two with every configuration.
FIRST = ("sm_90", "gfx942")
# Whose products and sums are defined.
SCORES = {
    "fix_rows", *launch.SCORING, "gather_sum", "dot_slots", "sum_pieces", "sum_codes", "scale_tokens", "add_latents",
    "dose_latents",
}  # fmt: skip
# What the tiles were chosen with. Older ones (torch 2.11 brings 3.6) spill a little, and on sm_100 use older matrix units.
TUNED_FOR = (3, 9)
OLDER = HAS_TRITON and kernels.version(importlib.metadata.version("triton")) < TUNED_FOR


def script(name: str, *arguments: str) -> background.Task:
    environment = {
        "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(HERE.parents[2] / "build/triton"),
        "TRITON_INTERPRET": "0" if name == "triton_compiled.py" else "1",
    }  # fmt: skip
    return background.Task(name, (sys.executable, str(HERE / name), *arguments), tuple(environment.items()))


INTERPRETED, EXACT, GRADIENTS, REGISTERED = map(
    script, ("triton_interpreted.py", "triton_exact.py", "triton_gradients.py", "triton_operators.py")
)
COMPILED = {
    arch: script("triton_compiled.py", arch, *(["every"] if TEST_ALL and arch in FIRST else []))
    for arch in launch.SHARED_MEMORY
}


def cases_of(module: types.ModuleType) -> list:
    return [pytest.param(name, marks=[heavy] if name in module.HEAVY else []) for name in module.CASES]


def passed(task: background.Task, case: str) -> None:
    *lines, _ = map(json.loads, task.output().splitlines())
    failures = {line["case"]: line["failure"] for line in lines}
    assert failures[case] is None, failures[case]


@needs_triton
@pytest.mark.background(INTERPRETED)
@pytest.mark.parametrize("name", cases_of(triton_interpreted))
def test_equals_the_reference(name):
    passed(INTERPRETED, name)


@needs_triton
@pytest.mark.background(EXACT)
@pytest.mark.parametrize("name", cases_of(triton_exact))
def test_scores_are_exact(name):
    passed(EXACT, name)


@needs_triton
@pytest.mark.background(GRADIENTS)
@pytest.mark.parametrize("name", cases_of(triton_gradients))
def test_gradients(name):
    passed(GRADIENTS, name)


@needs_triton
@pytest.mark.background(REGISTERED)
@pytest.mark.parametrize("name", cases_of(triton_operators))
def test_is_an_operator_that_can_be_compiled(name):
    passed(REGISTERED, name)


def statements(path: Path) -> Iterator[str]:
    """FILE:LINE of each statement of a file's kernels."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(one) for one in function.decorator_list
        ):
            for node in ast.walk(function):
                if isinstance(node, ast.stmt) and node is not function:
                    yield f"{path.name}:{node.lineno}"


@needs_triton
@pytest.mark.background(INTERPRETED)
@pytest.mark.background(EXACT)
@pytest.mark.background(GRADIENTS)
def test_every_statement_of_the_kernels_was_run():
    seen = {
        one
        for task in (INTERPRETED, EXACT, GRADIENTS)
        for one in json.loads(task.output().splitlines()[-1])["statements"]
    }
    wanted = {one for path in Path(kernels.__file__).parent.glob("*.py") for one in statements(path)}
    assert len(wanted) > 400
    assert sorted(wanted - seen) == []


def compiled(arch: str) -> list[dict]:
    return list(map(json.loads, COMPILED[arch].output().splitlines()))


@needs_triton
@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[pytest.mark.background(task), *([] if arch in FIRST else [heavy])])
        for arch, task in COMPILED.items()
    ],
)
class TestCompiled:
    def test_fits_and_does_not_spill(self, arch):
        for kernel in compiled(arch):
            assert kernel["shared"] <= launch.SHARED_MEMORY[arch], kernel
            most = 16 if "('BLOCK_K', 256)" in kernel["config"] else 0
            assert kernel["spills"] <= (128 if OLDER else most), kernel  # bytes of the stack, and instructions

    def test_scores_are_not_fused_and_keep_denormals(self, arch):
        if arch in ("sm_100", "sm_120") and kernels.version(importlib.metadata.version("triton")) < (3, 7):
            pytest.skip("this Triton fuses there, and cu_fast.kernels.triton.failure() says so")
        scoring = [kernel for kernel in compiled(arch) if kernel["kernel"] in SCORES]
        assert {kernel["kernel"] for kernel in scoring} == SCORES
        for kernel in scoring:
            assert kernel["products"] > 0, kernel
            assert kernel["flushes"] == 0, kernel
            # A division is a sequence of fused steps. Scales of scale_tokens divide; one launch of it has none.
            assert kernel["division"] or kernel["fused"] == 0, kernel
        assert any(kernel["kernel"] == "scale_tokens" and not kernel["division"] for kernel in scoring)

    def test_integer_sums_are_rounded_once(self, arch):
        scoring = [kernel for kernel in compiled(arch) if kernel["kernel"] in launch.SCORING]
        assert all(kernel["from_integers"] == [["i64", "float"]] for kernel in scoring), scoring

    def test_bytes_go_through_the_matrix_units(self, arch):
        units = {"sm_80": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "sm_120": "IMMA", "gfx942": "v_mfma_i32"}
        if OLDER:
            units["sm_100"] = ("IMMA", "UTCIMMA")
        scans = [kernel for kernel in compiled(arch) if kernel["kernel"] == "scan_codes"]
        assert {kernel["sample"] for kernel in scans} == {False, True}
        encodes = [kernel for kernel in compiled(arch) if kernel["kernel"] == "encode_tile" and kernel["tokens"] >= 64]
        for kernel in scans + encodes:
            assert any(name.startswith(units[arch]) for name in kernel["byte_products"]), kernel
        for kernel in compiled(arch):
            assert kernel["kernel"] not in launch.SCORING or kernel["byte_products"], kernel

    def test_divisions_and_roots_are_rounded(self, arch):
        means = [kernel for kernel in compiled(arch) if kernel["mean"]]
        assert means and all(kernel["division"] == ["div.rn.f32"] for kernel in means), means
        roots = [kernel for kernel in compiled(arch) if kernel["kernel"] == "scan_rows"]
        scales = [kernel for kernel in compiled(arch) if kernel["kernel"] == "scale_tokens" and kernel["root"]]
        doses = [kernel for kernel in compiled(arch) if kernel["kernel"] == "dose_latents"]
        for some in (roots, scales, doses):
            assert some and all(kernel["root"] == ["sqrt.rn.f32"] for kernel in some), some
        assert all(kernel["division"] == ["div.rn.f32"] for kernel in scales + doses), scales + doses


@heavy
@needs_triton
def test_every_configuration_was_compiled():
    seen = {(kernel["kernel"], kernel["config"]) for arch in launch.SHARED_MEMORY for kernel in compiled(arch)}
    missing = {(kernel, name) for kernel, name, row in launch.configurations() if (kernel, repr(row)) not in seen}
    assert not missing


def test_choices_are_configurations_that_ship():
    shipped = {(kernel, row) for kernel, _, row in launch.configurations()}
    shapes = itertools.product(
        (1, 2, 4, 5, 16, 17, 64, 10_000), (8, 512, 4096), (64, 25_000), (1, 16, 17, 64, 256, 257)
    )
    archs = (*launch.SHARED_MEMORY, "sm_86", "sm_89", "sm_103", "sm_121", "gfx90a", "gfx1201")
    for (T, E, C, k), arch, kernel in itertools.product(shapes, archs, launch.TABLE):
        assert (kernel, launch.choose(kernel, arch, T, E, C, k)) in shipped


def test_families():
    families = {name: launch.family(name) for name in ("sm_75", "sm_89", "sm_90", "sm_103", "sm_121", "gfx950")}
    assert list(families.values()) == ["sm_80", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]


@pytest.mark.parametrize("T", [1, 4, 100, 5000])
@pytest.mark.parametrize("k", [1, 100, 300])
@pytest.mark.parametrize("C", [300, 25_000, 10_000_000])
@pytest.mark.parametrize("has_plane", [False, True])
def test_plans(T, k, C, has_plane):
    plan = launch.plan(T, 512, C, k, has_plane, 132, "sm_90")
    assert plan.parts * plan.part_codes >= C > (plan.parts - 1) * plan.part_codes, "no part is empty, none is missing"
    assert 1 <= plan.chunk <= T and plan.score_parts >= 1
    assert not plan.scans or (has_plane and k <= launch.MAX_SCAN_K and 8 * k <= C)
    keep = launch.choose("score_codes", "sm_90", plan.chunk, 512, C, k).block("K")
    assert keep >= k or (keep == 0 and not plan.scans)
    keys = plan.chunk * (plan.parts * keep or C)
    assert keys <= max(32 * T * k, 2**22, C) * 16, "no [T, C] keys"
    assert plan.chunk == 1 or 3 * 512 * plan.chunk <= 2**25, "no digits of all tokens"


def test_the_scan_is_for_many_products():
    def scans(T, C, has_plane=True, k=8):
        return launch.plan(T, 512, C, k, has_plane, 132, "sm_90").scans

    assert not scans(1, 2_000) and scans(512, 25_000) and scans(4096, 25_000) and scans(1, 1_000_000)
    assert not scans(512, 25_000, has_plane=False) and not scans(512, 25_000, k=300) and not scans(4096, 60)


def test_says_why_it_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if HAS_TRITON:
        assert "no CPU kernels" in kernels.failure(cpu)
        assert "no kernels for meta" in kernels.failure(torch.device("meta"))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in kernels.failure(cpu) and "pip install triton" in kernels.failure(cpu)


@pytest.mark.parametrize("triton, capability, reason", [
    ("3.5.1", (9, 0), "need 3.6"), ("3.6.0", (9, 0), None), ("3.6.0", (7, 5), "need 8.0"),
    ("3.6.0", (10, 0), "other scores"), ("3.6.0", (12, 0), "other scores"), ("3.7.0", (10, 0), None),
])  # fmt: skip
def test_versions_and_gpus(monkeypatch, triton, capability, reason):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in (("is_available", True), ("get_device_capability", capability), ("get_device_name", "a GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    said = kernels.failure(torch.device("cuda"))
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize("text, number", [("3.9.0", (3, 9)), ("3.10.0+git1234", (3, 10)), ("4.0", (4, 0))])
def test_versions(text, number):
    assert kernels.version(text) == number


def test_importing_it_does_not_import_triton():
    code = "import sys; import cu_fast.kernels.triton; print('triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
