"""A folder is a layer. Imports go down this list of rooms, never up; torch stops at the host files; imports are light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import cu_fast

PACKAGE = Path(cu_fast.__file__).parent
# From the lowest to the highest: a room may import those before it, and nothing else.
ROOMS = [
    "kernels",
    "files",
    "masks",
    "ops",
    "nn",
    "sae",
    "hf",
    "rows",
    "evaluate",
    "unlearn",
    "train",
    "bench",
    "vllm",
    "cli",
]


def imported(path: Path) -> set[str]:
    """What a file imports, wherever in the file: of this package the rooms, of others the package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path} imports relatively; rooms are read from absolute imports")
        if isinstance(node, ast.ImportFrom) and node.module == "cu_fast":
            names.update(cu_fast._HOME.get(alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    assert "cu_fast" not in names, f"{path} imports cu_fast itself; import the room"
    return {name.removeprefix("cu_fast.").split(".")[0] for name in names}


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_down_the_rooms():
    assert {room_of(path) for path in FILES} == set(ROOMS)
    for path in FILES:
        below = ROOMS[: ROOMS.index(room_of(path)) + 1]
        assert not imported(path) & set(ROOMS) - set(below), path


def test_few_rooms_know_transformers():
    knows = {room_of(path) for path in FILES if "transformers" in imported(path)}
    assert knows == {"hf", "train", "cli"}


CSRC = PACKAGE.parent / "csrc"


def included(path: Path) -> set[Path]:
    """The project's own headers that a C++ file reaches, whichever way."""
    reached, todo = set(), [path]
    while todo:
        names = re.findall(r'^#include "(.+)"', todo.pop().read_text(), flags=re.MULTILINE)
        new = {CSRC / name for name in names} - reached
        reached |= new
        todo += new
    return reached


def test_torch_headers_stop_at_the_host_files():
    # Beside these only the emulation's own operators, which no library holds.
    allowed = {"ops.cpp", "arguments.h", "check.h", "registration.h", "cpu/parallel.h"}
    files = [path for path in CSRC.rglob("*.*") if not path.is_relative_to(CSRC / "emulation")]
    assert len(files) > 50
    knows = {path.relative_to(CSRC).as_posix() for path in files if "torch/" in path.read_text()}
    wrong = sorted(name for name in knows - allowed if not name.startswith("host/"))
    assert not wrong, f"{wrong} include a torch header"


def test_kernels_know_no_torch():
    kernels = ["core/*", "cpu/*-inl.h", "cpu/*_avx*.cpp", "cpu/*_scalar.cpp", "cuda/*"]
    for path in [path for pattern in kernels for path in CSRC.glob(pattern)]:
        for file in {path, *included(path)}:
            assert "torch/" not in file.read_text(), f"{path} reaches a torch header through {file}"


def test_importing_the_package_is_light():
    code = "import sys, cu_fast; print(*sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
