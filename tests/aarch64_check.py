"""Builds the wheel for aarch64 on another machine, and tests it under qemu-user, level by level.

    python tests/aarch64_check.py torch==2.13.0

The argument is the torch to build for and to run with. Needs, by the names of Debian's packages, g++-aarch64-linux-gnu,
qemu-user-static and, the first time, debootstrap, which wants to be root; what is not there is named, and nothing is
checked. build/aarch64 is kept: `root` is a Debian of that machine, `site` has torch and pytest. What it shows is that results
are exact; time under qemu means nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from wheel_check import check, check_file, check_portable

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build/aarch64"
SYSTEM, SITE, WHEELS, PACKAGE = HOME / "root", HOME / "site", HOME / "dist", HOME / "package"
TORCH_LIBRARIES = SITE / "torch/lib"
GNU = "aarch64-linux-gnu-"
QEMU = "qemu-aarch64-static"
# With the dot product and without. Neither has SVE, with which torch would need a vector length that it knows.
WITH, WITHOUT = "neoverse-n1", "cortex-a72"
NEEDED = "filelock fsspec hypothesis jinja2 networkx numpy pytest sympy typing_extensions".split()
TESTS = [
    ROOT / f"tests/kernels/test_{name}.py"
    for name in "sae_encode masked_decode delete_latents codebook_quantize codebook_bottleneck scan native".split()
]
CHOSEN = (
    "cpu_equals_reference or TestNoSlackIsLeftOver or TestHurtfulInputs or batch or flush_denormal or rounding_mode"
)

# Run by the other machine's Python. The sums' limits: test_native.py's own test starts a process per level.
INSIDE = """
import sys
import test_native
from cu_fast.kernels import native
assert native.failure() is None, native.failure()
assert all(map(test_native.sums_are_right, (1, 9)))
print(native.simd_level())
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    check(done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done.stdout


def tool(name: str) -> str:
    """The cross compiler's tool; a distribution may install only some with a version in their name."""
    found = [shutil.which(f"{GNU}{name}{suffix}") for suffix in ("", "-15", "-14", "-13", "-12")]
    return next(filter(None, found), "")


def missing() -> list[str]:
    wanted = {"g++-aarch64-linux-gnu": tool("g++"), "qemu-user-static": shutil.which(QEMU)}
    if not SYSTEM.exists():
        wanted["debootstrap, and root to run it"] = os.geteuid() == 0 and shutil.which("debootstrap")
    return [name for name, found in wanted.items() if not found]


def make_system() -> None:
    """Its packages, unpacked and not installed: that would run them. Of this machine's release, as the compiler's libraries."""
    unfinished = HOME / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    packages = "--include=python3,libstdc++6"
    run("debootstrap", "--foreign", "--arch=arm64", "--variant=minbase", packages, release, unfinished)
    for package in sorted(unfinished.glob("var/cache/apt/archives/*.deb")):
        run("dpkg-deb", "-x", package, unfinished)
    # torch asks the kernel for the processor, and crashes on an answer from another machine. qemu looks here first.
    for name, text in {
        "proc/cpuinfo": "processor : 0\nFeatures : fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm asimddp\n"
        "CPU implementer : 0x41\nCPU architecture: 8\nCPU variant : 0x3\nCPU part : 0xd0c\nCPU revision : 1\n\n",
        "sys/devices/system/cpu/possible": "0\n",
        "sys/devices/system/cpu/present": "0\n",
        "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000413fd0c1\n",
    }.items():
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_text(text)
    unfinished.rename(SYSTEM)


def system_python() -> Path:
    return max(SYSTEM.glob("usr/bin/python3.[0-9]*[0-9]"), key=lambda path: int(path.name.partition(".")[2]))


def install(torch: str) -> None:
    """torch without what it asks for: on PyPI that is gigabytes of NVIDIA's libraries."""
    unfinished = HOME / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 17)]
    version = system_python().name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", unfinished, *platforms]
    pip += ["--only-binary=:all:", f"--python-version={version}"]
    run(*pip, "--no-deps", torch)
    run(*pip, *NEEDED)
    unfinished.rename(SITE)
    stand_in(sorted(TORCH_LIBRARIES.glob("*.so*")))


def stand_in(libraries: list[Path]) -> None:
    """One library in place of all that torch's need and that are not there, if any. Each function says: no device (100)."""
    needed: set[str] = set()
    has: set[str] = set()
    wants: dict[str, str] = {}
    system = [*SYSTEM.glob("usr/lib/aarch64-linux-gnu/*.so*"), *SYSTEM.glob("usr/lib/*.so*")]
    for library in libraries:
        needed |= {*re.findall(r"\(NEEDED\).*\[(.+)\]", run(f"{GNU}readelf", "-Wd", library))}
    absent = sorted(needed - {path.name for path in [*libraries, *system]})
    if not absent:
        return
    for library in [*libraries, *(path for path in system if path.name in needed)]:
        symbols = run(f"{GNU}readelf", "-W", "--dyn-syms", library)
        for bind, at, name, version in re.findall(r" (GLOBAL|WEAK|UNIQUE) +DEFAULT +(\S+) (\w+)(?:@@?(\S+))?", symbols):
            if at != "UND":
                has.add(name)
            elif bind == "GLOBAL" and not name.startswith(("Py", "_Py")):
                wants[name] = version or "NONE"
    names = sorted(wants.keys() - has)
    versions = sorted({wants[name] for name in names})
    script, source = HOME / "absent.map", HOME / "absent.s"
    script.write_text(
        "".join(f"{v} {{ {'; '.join(name for name in names if wants[name] == v)}; }};\n" for v in versions)
    )
    labels = "".join(f".globl {name}\n.type {name}, @function\n{name}:\n" for name in names)
    source.write_text(f'.section .note.GNU-stack, "", @progbits\n.text\n{labels}mov w0, #100\nret\n')
    flags = ["-shared", "-nostdlib", f"-Wl,--version-script,{script}"]
    run(tool("g++"), *flags, source, "-o", TORCH_LIBRARIES / absent[0])
    for name in absent[1:]:
        (TORCH_LIBRARIES / name).symlink_to(absent[0])


def write_python(cpu: str) -> Path:
    """A command that is that machine's Python under qemu. As sys.executable too, for tests that start processes."""
    python = HOME / f"python-{cpu}"
    path = f"{SITE}:{PACKAGE}:{ROOT / 'tests/helpers'}:{ROOT / 'tests/kernels'}"
    python.write_text(
        f'#!/bin/sh\nexec {QEMU} -cpu {cpu} -L {SYSTEM} -0 "$0" -E PYTHONHOME={SYSTEM}/usr '
        f'-E PYTHONPATH="{path}:$PYTHONPATH" {system_python()} -B "$@"\n'
    )
    python.chmod(0o755)
    return python


def build() -> None:
    for folder in (WHEELS, PACKAGE):
        shutil.rmtree(folder, ignore_errors=True)
    headers = HOME / "headers"  # torch alone: what else is in SITE is not for this Python
    headers.mkdir(exist_ok=True)
    (headers / "torch").unlink(missing_ok=True)
    (headers / "torch").symlink_to(SITE / "torch")
    shared = f"{tool('g++')} -shared"
    environment = os.environ | {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64", "PYTHONPATH": str(headers), "CC": tool("g++"), "CXX": tool("g++"),
        "LDSHARED": shared, "LDCXXSHARED": shared, "CU_FAST_BUILD": "require", "CU_FAST_CUDA": "0", "CU_FAST_PORTABLE": "1",
    }  # fmt: skip
    folders = ["--bdist-dir", HOME / "bdist", "--dist-dir", WHEELS]
    run(sys.executable, "setup.py", "-q", "bdist_wheel", *folders, cwd=ROOT, env=environment)
    (wheel,) = WHEELS.iterdir()
    check_file(wheel)
    check_portable(wheel, HOME / "portable", "aarch64")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(PACKAGE)


def check_machine_code() -> None:
    """What tests/test_build.py asks of x86-64."""
    text = run(f"{GNU}objdump", "-dC", "--no-show-raw-insn", PACKAGE / "cu_fast/_C.abi3.so")
    functions = re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", text, re.MULTILINE)
    hot = 0
    for name, body in functions:
        check(not re.search(r"\sf(n?m(add|sub)|ml[as])\s", body), f"{name} fuses a multiplication and an addition")
        check("\tsdot\t" not in body or "cu_fast::neon::" in name, f"{name} needs the dot product, outside its level")
        if re.search(r"neon::.*(byte_dots<|Pair::dots\()", name):
            loop = body[body.index("\tsdot\t") : body.rindex("\tsdot\t")]
            check("[sp" not in loop, f"{name} has too few registers")
            hot += 1
    check(hot >= 5, f"found {hot} functions with dot products")


def check_results() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    python, old = write_python(WITH), write_python(WITHOUT)
    ask = "from cu_fast.kernels import native; print(native.simd_level())"
    best = [run(one, "-c", ask, env=environment | {"CU_FAST_SIMD": ""}, cwd=HOME).split() for one in (python, old)]
    check(best == [["neon"], ["scalar"]], f"chose {best} on {WITH} and on {WITHOUT}")
    refused = subprocess.run(
        [old, "-c", ask], env=environment | {"CU_FAST_SIMD": "neon"}, cwd=HOME, capture_output=True, text=True
    )
    check("CU_FAST_SIMD is neon, which this machine lacks; it has scalar" in refused.stderr, refused.stderr)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", ROOT / "pyproject.toml"]
    for level in ("neon", "scalar"):
        chosen = environment | {"CU_FAST_SIMD": level}
        check(run(python, "-c", INSIDE, env=chosen, cwd=HOME).split() == [level], f"CU_FAST_SIMD={level} did not")
        print(f"{level}: {run(*pytest, '-k', CHOSEN, *TESTS, env=chosen, cwd=HOME).splitlines()[-1]}", flush=True)


def main() -> None:
    check(len(sys.argv) == 2, "usage: python tests/aarch64_check.py torch==2.13.0")
    if lacks := missing():
        return print(f"aarch64 check skipped: this machine lacks {', '.join(lacks)}")
    HOME.mkdir(parents=True, exist_ok=True)
    if not SYSTEM.exists():
        make_system()
    if not SITE.exists():
        install(sys.argv[1])
    build()
    check_machine_code()
    check_results()
    print("exact on aarch64, at every level")


if __name__ == "__main__":
    main()
