"""Builds and loads the CUDA kernels for the CPU (csrc/emulation): the operators of torch.ops.cu_fast_emulated.

import emulation
pytestmark = emulation.needed            # skips where there is no compiler or no ninja
ops = emulation.load()                   # torch.ops.cu_fast_emulated, built when the sources have changed
ops.set_seed(3)                          # the random order of threads
emulation.run_under_address_sanitizer([__file__])   # a subprocess in which load() finds ASan's build

Undefined behaviour ends the process, pytest's worker too; what it was is printed where pytest -s leaves stderr alone.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import background
import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("_emulated", "_selftest", "_selftest_hopper")
FOLDERS = {"undefined": "build/emulation", "address": "build/emulation-address"}
SANITIZERS = {
    "undefined": "-fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow",
    "address": "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow"
    " -fno-omit-frame-pointer -g1",
}
FLAGS = "-fPIC -DCU_FAST_EMULATED -Icsrc"
# Kernels run for long. What starts them does not, and optimising it would be half of the build.
OPTIMISED, HARDLY_OPTIMISED = "-O2", "-O0"
# The variant that load() takes unless told; a subprocess under the address sanitizer finds "address" here.
VARIANT = "CU_FAST_EMULATION_SANITIZER"


def _ninja() -> str | None:
    if found := shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent)):
        return found
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return None


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _in_background(sanitize: str) -> pytest.MarkDecorator:
    code = f"import emulation\nfor library in emulation.LIBRARIES: emulation.build(library, {sanitize!r})"
    return pytest.mark.background(background.Task(f"the {sanitize} build", (sys.executable, "-c", code)))


needed = [
    pytest.mark.skipif(
        not (shutil.which(_compiler().split()[0]) and _ninja()), reason="the emulation needs g++ and ninja"
    ),
    _in_background(os.environ.get(VARIANT) or "undefined"),
]
needs_address_sanitizer = _in_background("address")


def _sources():
    """The module sources.py at the top, which setup.py reads too."""
    spec = importlib.util.spec_from_file_location("sources", ROOT / "sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # without importing it
    return Path(next(iter(spec.submodule_search_locations)))


def _build_file(sanitize: str) -> str:
    """The operators, with the LibTorch stable ABI only; and the emulation's own tests, without torch."""
    folder, torch, sources = FOLDERS[sanitize], _package("torch"), _sources()
    alone = {
        "csrc/emulation/ops.cpp": "_emulated",
        "csrc/emulation/selection.cpp": "_emulated",
        "csrc/emulation/selftest.cpp": "_selftest",
        "csrc/emulation/selftest_hopper.cpp": "_selftest_hopper",
    }
    flags = f"{' '.join(sources.FLAGS)} {FLAGS} {SANITIZERS[sanitize]}"
    python = f"-isystem {sysconfig.get_path('include')} -isystem {_package('pybind11') / 'include'}"
    lines = [
        f"builddir = {folder}",
        "rule compile",
        f"  command = {_compiler()} {flags} $optimise $include -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_compiler()} -shared {SANITIZERS[sanitize]} $in -o $out $libraries",
    ]
    libraries: dict[str, list[str]] = {library: [] for library in LIBRARIES}
    for source in sources.EMULATION + sources.HOST + sources.CUDA:
        made = f"{folder}/{source.removeprefix('csrc/').replace('/', '_')}.o"
        include = python if alone.get(source, "").startswith("_selftest") else f"-isystem {torch / 'include'}"
        optimise = HARDLY_OPTIMISED if source in sources.HOST or source in alone else OPTIMISED
        lines += [f"build {made}: compile {source}", f"  include = {include}", f"  optimise = {optimise}"]
        everywhere = source in sources.EMULATION and source not in alone
        for library in libraries if everywhere else [alone.get(source, "_emulated")]:
            libraries[library].append(made)
    for library, objects in libraries.items():
        lines.append(f"build {folder}/{library}.so: link {' '.join(objects)}")
        if library == "_emulated":
            lines.append(f"  libraries = -L{torch / 'lib'} -ltorch_cpu -Wl,--no-undefined")
    return "\n".join(lines) + "\n"


def build(library: str = "_emulated", sanitize: str = "undefined") -> Path:
    """The library's path, after compiling what has changed. A lock keeps other processes out meanwhile."""
    folder = ROOT / FOLDERS[sanitize]
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{library}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_file = folder / "build.ninja"
        if (text := _build_file(sanitize)) != (build_file.read_text() if build_file.exists() else None):
            build_file.write_text(text)
        command = [_ninja(), "-f", str(build_file.relative_to(ROOT)), str(made.relative_to(ROOT))]
        # A compiler must not run under the address sanitizer too.
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return made


def _variant(sanitize: str | None) -> str:
    return sanitize or os.environ.get(VARIANT) or "undefined"


@functools.cache
def load(sanitize: str | None = None):
    """torch.ops.cu_fast_emulated; 'address' only where libasan is loaded (run_under_address_sanitizer)."""
    import torch

    torch.ops.load_library(build("_emulated", _variant(sanitize)))
    return torch.ops.cu_fast_emulated


@functools.cache
def load_selftest(sanitize: str | None = None, name: str = "_selftest"):
    """The module of small kernels in csrc/emulation/selftest.cpp, or selftest_hopper.cpp."""
    spec = importlib.util.spec_from_file_location(name, build(name, _variant(sanitize)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_under_address_sanitizer(
    what: str | list[str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python code (a str) or pytest with these arguments (a list) in a process with libasan."""
    # libstdc++ too: libasan looks for __cxa_throw when it starts, and Python does not bring it.
    libraries = [
        subprocess.run(
            [*_compiler().split(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    command = ["-c", what] if isinstance(what, str) else ["-m", "pytest", "-q", "-p", "no:cacheprovider", *what]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        VARIANT: "address",
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory until the end on purpose; a handler of ours must not hide pytest's.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:abort_on_error=0",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
