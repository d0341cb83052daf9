"""Who may import whom: cli -> {train, unlearn, verify, demo} -> hf -> nn -> ops -> {native, reference, triton}. Never upward, never sideways."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import cu_fast

PACKAGE = Path(cu_fast.__file__).parent
MAY_IMPORT = {
    "__init__": set(),
    "_fakes": set(),
    "_native": {"_fakes"},
    "reference": set(),
    "_checks": set(),
    "_impl": {"_native", "reference", "triton"},
    "ops": {"_checks", "_impl", "_native", "reference"},
    "_storage": set(),
    "masks": {"_storage"},
    "config": set(),
    "_autograd": {"_checks", "_impl", "ops", "triton"},
    "_nn_training": {"_autograd", "ops"},
    "nn": {"_autograd", "_nn_training", "config", "ops", "reference"},
    "_topics": {"masks", "nn"},
    "_active": {"_topics"},
    "_files": {"_checks", "_storage", "config", "masks", "nn"},
    "_batching": {"_active", "_hooks", "_topics"},
    "_context": {"_active", "_topics"},
    "_hooks": {"_active"},
    "_sites": {"_hooks"},
    "hf": {"_active", "_batching", "_context", "_files", "_hooks", "_sites", "_topics", "config", "masks", "nn"},
    "checkpoint": {"_files", "_storage", "hf"},
    "unlearn": {"masks"},
    "gate": {"masks", "reference"},
    "_rows": set(),
    "evaluate": {"_rows"},
    "strength": {"evaluate", "masks"},
    "_resume": {"config"},
    "train": {"_resume", "_rows", "config", "hf"},
    "verify": {"checkpoint", "hf", "masks", "ops"},
    "demo": {"checkpoint", "hf", "masks", "unlearn"},
    "_bench_data": {"config", "masks", "nn"},
    "_bench_truth": {"_bench_data", "ops"},
    "_bench_machine": {"_bench_data", "_native"},
    "_bench_clock": {"_bench_data", "_providers"},
    "_bench_gpu": {"_bench_data", "_native", "_providers"},
    "_bench_gpu_rivals": {"_bench_data", "_bench_rivals", "_bench_truth", "_providers"},
    "_providers": {"_bench_data", "_bench_truth", "ops"},
    "_bench_rivals": {"_bench_data", "_bench_truth", "_providers"},
    "_bench_models": {"_bench_data", "_providers", "config", "hf"},
    "_bench_plan": {"_bench_data", "_bench_gpu_rivals", "_bench_models", "_bench_rivals", "_providers"},
    "_bench_report": set(),
    "bench": {
        "_bench_clock",
        "_bench_data",
        "_bench_gpu",
        "_bench_machine",
        "_bench_models",
        "_bench_plan",
        "_bench_report",
        "_bench_truth",
        "_providers",
    },
    "_tune_grid": {"_bench_data", "triton"},
    "tune": {"_bench_data", "_bench_gpu", "_bench_machine", "_providers", "_tune_grid", "bench", "ops", "triton"},
    "_cli_tables": set(),
    "cli": {
        "_cli_tables",
        "_native",
        "bench",
        "checkpoint",
        "config",
        "demo",
        "evaluate",
        "ops",
        "train",
        "tune",
        "unlearn",
        "verify",
    },
}


def imported(path: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cu_fast":
            names.update([node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names])
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name} imports relatively; the arrows are read from absolute imports")
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("cu_fast."))
    return names - {"__version__"}


def test_every_import_follows_the_arrows():
    modules = {path.stem: imported(path) for path in PACKAGE.glob("*.py")}
    assert set(modules) == set(MAY_IMPORT), "a module without a place in the architecture"
    wrong = {name: sorted(names - MAY_IMPORT[name]) for name, names in modules.items()}
    assert not any(wrong.values()), wrong


def test_the_triton_kernels_know_nobody():
    wrong = {path.name: imported(path) - {"triton"} for path in PACKAGE.glob("triton/*.py")}
    assert wrong.pop("__init__.py") == {"_fakes"}
    assert wrong and not any(wrong.values()), wrong


def test_only_hf_knows_transformers_models():
    knows = {path.stem for path in PACKAGE.glob("*.py") if "transformers.models" in path.read_text()}
    assert knows <= {"hf"}


def test_torch_headers_stop_at_the_host_files():
    csrc = PACKAGE.parent / "csrc"
    for path in [
        *csrc.glob("core/*"),
        *csrc.glob("cpu/*-inl.h"),
        *csrc.glob("cpu/*_avx*.cpp"),
        *csrc.glob("cpu/*_scalar.cpp"),
        *csrc.glob("cuda/*.cu"),
        *(path for path in csrc.glob("cuda/*.h") if path.name != "host.h"),
    ]:
        assert "torch/" not in path.read_text(), f"{path} includes a torch header"


def test_importing_the_package_is_light():
    code = "import sys, cu_fast; print(*sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
