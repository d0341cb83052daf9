"""Installs the wheel that `make wheel` made into a new environment, away from the sources, and tests it there.

    python tests/wheel_check.py torch==2.13.0

The argument is the torch to install. With CU_FAST_BUILD=require a wheel without CUDA is an error. CU_FAST_PORTABLE=0: the
wheel is for this machine alone.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 60 * 2**20  # bytes
# What every system of this platform has: https://peps.python.org/pep-0600, auditwheel's policy. Beside it torch's libraries.
PLATFORM = "manylinux_2_28"
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
SYSTEM = r"lib(c|m|pthread|dl|rt|gcc_s|stdc\+\+|torch|torch_cpu|c10)\.so[.\d]*|ld-linux-(x86-64|aarch64)\.so\.\d"
VERSION = r"Name: (\S+) +Flags:"
TORCH = r"aoti_torch_\w+|torch_\w+|_ITM_(de)?registerTMCloneTable|__gmon_start__"
EMULATOR = "cu_fast_emulates_tiles"  # weak: a test's emulator defines it, nothing else does
# What `import cu_fast` and its operators need; all of transformers is not.
NEEDED = ["numpy"]
TESTS = [
    ROOT / f"tests/kernels/test_{name}.py"
    for name in ("codebook_quantize", "sae_encode", "masked_decode", "codebook_bottleneck")
]

# Run by the new environment's Python: what a user sees, line by line.
INSIDE = """
import pathlib, sys
import torch
import cu_fast
from cu_fast.kernels import native, reference

home = pathlib.Path(cu_fast.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"cu_fast came from {home}, not from the wheel"
assert native.failure() is None, native.failure()
torch.manual_seed(0)
z, codes, bias = torch.randn(70, 64), torch.randn(1000, 64), torch.randn(1000)
table, row = torch.randint(-(2**31), 2**31, (2, 32), dtype=torch.int32), torch.arange(70, dtype=torch.int32) % 3 - 1
digits, step, _ = torch.ops.cu_fast.pack_digits(codes)
given = {"z": z, "digits": digits, "factor": step, "bias": bias, "k": 8, "mask_table": table, "mask_row": row}
for scan in (3 * [None], torch.ops.cu_fast.pack_scan(digits, step, 64)):
    plane = dict(zip(("scan_plane", "scan_terms", "scan_mean"), scan))
    got, want = (
        library.codebook_quantize(**given, **plane, return_hits=True) for library in (torch.ops.cu_fast, reference)
    )
    assert all(map(torch.equal, got, want)), "codebook_quantize differs from the reference"
print(native.simd_level())
print(native.cuda_build())
print(native.cuda_failure())
assert not torch.cuda.is_initialized() or torch.cuda.is_available()
"""


def check(ok: object, message: str) -> None:
    if not ok:
        sys.exit(f"wheel check: {message}")


def check_file(wheel: Path) -> None:
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 2**20:.1f} MiB")
    check(size <= MOST, f"{wheel.name} has {size} bytes, at most {MOST}; build for fewer GPUs (CU_FAST_ARCHS)")
    check("-cp310-abi3-" in wheel.name, f"{wheel.name} must have the tag cp310-abi3")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        check(names.count("cu_fast/_C.abi3.so") == 1, "there is no cu_fast/_C.abi3.so in it")
        strange = [name for name in names if not re.match(r"cu_fast(-[^/]*\.dist-info)?/", name)]
        check(not strange, f"what is this doing in it: {strange}")
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        needs = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    torch = [need.replace(" ", "") for need in needs if re.match(r"torch\b", need)]
    check(torch == ["torch>=2.11"], f"it must require torch>=2.11, whatever is newer, and requires {torch}")


def portability_problems(wheel: str, text: str, machine: str) -> list[str]:
    """Why a wheel does not run on every system of its platform. text: what readelf says of its library."""
    problems = []
    if not wheel.endswith(f"-{PLATFORM}_{machine}.whl"):
        problems.append(f"{wheel} must have the tag {PLATFORM}_{machine}; it was built with CU_FAST_PORTABLE=0")
    libraries = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", text)
    versions = re.findall(VERSION, text)
    symbols = re.findall(r" UND (\w\S*)", text)
    stack = re.findall(r"^ +GNU_STACK +(?:0x\w+ +)+(\w+)", text, re.MULTILINE)
    if not (libraries and versions and symbols and len(stack) == 1):
        return [*problems, "readelf did not say what is needed"]
    problems += [f"it needs {name}" for name in libraries if not re.fullmatch(SYSTEM, name)]
    for version in dict.fromkeys(versions):
        name, _, number = version.partition("_")
        numbers = tuple(map(int, number.split("."))) if re.fullmatch(r"\d+(\.\d+)*", number) else None
        if numbers is None or numbers > NEWEST.get(name, ()):
            problems.append(f"it needs symbols of {version}")
    # A system's symbol has a version: without one it would come from whatever library of torch's holds a copy.
    problems += [
        f"it needs {name}, of no version" for name in symbols if not re.fullmatch(rf"{TORCH}|{EMULATOR}|\S+@\S+", name)
    ]
    if "E" in stack[0]:
        problems.append("its stack is executable")
    return problems


def check_portable(wheel: Path, folder: Path, machine: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("cu_fast/_C.abi3.so", folder)
    command = ["readelf", "-W", "--dynamic", "--version-info", "--dyn-syms", "--program-headers", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    problems = portability_problems(wheel.name, text, machine)
    check(not problems, "\n".join(problems))
    print(f"it needs symbols of {', '.join(sorted({*re.findall(VERSION, text)}))}: within {PLATFORM}_{machine}")


def check_installed(wheel: Path, torch: str, folder: Path) -> tuple[Path, str]:
    """Returns the installed library and what it says that it was built for."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, torch, *NEEDED], cwd=folder, check=True)
    subprocess.run([*pip, "--no-deps", wheel], cwd=folder, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, "-c", INSIDE], cwd=folder, env=environment, capture_output=True, text=True)
    check(done.returncode == 0, f"the installed package does not work:\n{done.stdout}{done.stderr}")
    simd, built, failure = done.stdout.splitlines()
    print(f"CPU kernels: {simd}\nCUDA kernels for: {built or 'none'}\nCUDA kernels here: {failure}")
    subprocess.run([*pip, "pytest", "hypothesis"], cwd=folder, check=True)
    # Without conftest.py, which needs transformers. From here the sources are not on the path.
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", ROOT / "pyproject.toml"]
    done = subprocess.run([*pytest, *TESTS], cwd=folder, env=environment, capture_output=True, text=True)
    check(done.returncode == 0, f"the operators' tests fail on the installed package:\n{done.stdout[-6000:]}")
    print(f"the operators' tests on it: {done.stdout.splitlines()[-1]}")
    (library,) = folder.glob("venv/lib/python*/site-packages/cu_fast/_C.abi3.so")
    return library, built


def check_machine_code(library: Path, built: str) -> None:
    if not built:
        check(os.environ.get("CU_FAST_BUILD") != "require", "it was built without CUDA; install nvcc")
        return
    sys.path[:0] = [str(ROOT / "tests/kernels"), str(ROOT / "tests/helpers")]
    from test_machine_code import dump

    holds = re.findall(r"\.sm_(\d+[af]?)\.cubin", dump("--list-elf", library))
    holds += [f"PTX {arch}" for arch in re.findall(r"\.sm_(\d+)\.ptx", dump("--list-ptx", library))]
    check(
        {*holds} == {*built.split(";")}, f"the library says that it was built for {built}, and holds {sorted({*holds})}"
    )
    if not os.environ.get("CU_FAST_ARCHS"):
        missing = {"80", "86", "89", "90a", "100", "120", "PTX 90"} - {*holds}
        check(not missing, f"the library holds nothing for {sorted(missing)}; a newer nvcc knows them")


def main() -> None:
    check(len(sys.argv) == 2, "usage: python tests/wheel_check.py torch==2.13.0")
    wheels = list((ROOT / "dist").glob("cu_fast-*.whl"))
    check(
        len(wheels) == 1, f"dist must hold one wheel, holds {[wheel.name for wheel in wheels]}: rm -r dist; make wheel"
    )
    check_file(wheels[0])
    with tempfile.TemporaryDirectory() as folder:
        if os.environ.get("CU_FAST_PORTABLE") != "0":
            check_portable(wheels[0], Path(folder), platform.machine())
        check_machine_code(*check_installed(wheels[0], sys.argv[1], Path(folder)))
    print("the wheel is good")


if __name__ == "__main__":
    main()
