"""How the native library is built: what setup.py makes of its environment variables, and what it does when that fails."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
import wheel_check

from cu_fast.kernels import native

needs_native = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 instruction sets")
HOT = r"avx\w+::(\(anonymous namespace\)::)?(multiply<|Pair::dots\(|byte_dots<|outlier_dots\()"
SETUP = Path(__file__).parents[1] / "setup.py"


def build_fails(tmp_path, **environment: str) -> str:
    """What a build that stops before it compiles anything says."""
    done = subprocess.run(
        [sys.executable, SETUP, "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path], cwd=SETUP.parent,
        env={**os.environ, "CU_FAST_BUILD": "", "CU_FAST_CUDA": "", **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and not list(tmp_path.rglob("*.so")), done.stdout
    return done.stderr


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, str]]:
    """Each function of the library and its disassembly."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-dC", "--no-show-raw-insn", native.LIBRARY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2]))


@x86
def test_a_source_distribution_is_whole(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(SETUP))
    (extension,) = given["ext_modules"]
    needed = [path.relative_to(SETUP.parent) for path in SETUP.parent.glob("csrc/**/*.*")]
    needed = {str(path) for path in needed if path.suffix == ".h" or "emulation" not in path.parts}
    assert needed | {"sources.py", "older_libraries.py"} == {*extension.sources, *extension.depends}


class TestCudaBuild:
    """What setup.py is told about CUDA."""

    @pytest.fixture
    def setup_py(self, monkeypatch):
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
        return runpy.run_path(str(SETUP))

    @pytest.mark.parametrize(
        "text, archs",
        [
            ("80", ["80"]),
            ("80;90+PTX", ["80", "90", "PTX 90"]),
            (" 90a ; PTX 90;90a", ["90a", "PTX 90"]),
            ("100f;PTX 120", ["100f", "PTX 120"]),
        ],
    )
    def test_archs(self, setup_py, text, archs):
        assert setup_py["parse_archs"](text) == archs

    def test_default_archs_run_everywhere(self, setup_py):
        archs = setup_py["parse_archs"](setup_py["ARCHS"])
        assert ";".join(archs) == setup_py["ARCHS"]
        for gpu in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)):
            assert any(native._runs(arch, *gpu) for arch in archs), gpu

    @pytest.mark.parametrize(
        "text, message",
        [
            ("80;sm_90", "'sm_90' must be like 80, 90a, PTX 90 or 90+PTX"),
            ("80;", "'' must be like"),
            ("80;75", "'75' is older than 80, compute capability 8.0"),
            ("90a+PTX", "'90a+PTX' would be PTX for one GPU; write 90a;PTX 90"),
            ("80+PTX", "'80+PTX' would be PTX older than 90"),
            ("PTX 80", "'PTX 80' would be PTX older than 90"),
        ],
    )
    def test_archs_that_mean_nothing(self, setup_py, text, message):
        with pytest.raises(SystemExit, match=re.escape(f"error: CU_FAST_ARCHS is '{text}': {message}")):
            setup_py["parse_archs"](text)

    def test_unknown_setting(self, tmp_path):
        assert "error: CU_FAST_CUDA is 'yes', must be auto, 0 or 1" in build_fails(tmp_path, CU_FAST_CUDA="yes")

    def test_asked_for_without_nvcc(self, tmp_path):
        message = build_fails(tmp_path, CU_FAST_CUDA="1", CUDA_HOME="", PATH=str(tmp_path))
        assert "error: CU_FAST_CUDA is 1, but there is no nvcc, neither in $CUDA_HOME/bin nor on PATH" in message

    def test_asked_for_with_a_broken_nvcc(self, tmp_path):
        broken = tmp_path / "bin/nvcc"
        broken.parent.mkdir()
        broken.write_text("#!/bin/sh\necho no licence; exit 3\n")
        broken.chmod(0o755)
        message = build_fails(tmp_path, CU_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
        assert f"error: CU_FAST_CUDA is 1, but {broken} failed with 3: no licence" in message

    @pytest.mark.skipif(native.cuda_build() == "" or torch.cuda.is_available(), reason="needs CUDA and no driver")
    def test_the_driver_that_is_needed(self):
        assert re.search(r"CUDA (12, .* R525|13, .* R580) or newer", torch.ops.cu_fast.cuda_driver_failure())

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
    def test_arch_that_nvcc_does_not_know(self, tmp_path):
        message = build_fails(tmp_path, CU_FAST_ARCHS="80;999")
        assert re.search(r"error: CU_FAST_ARCHS is '80;999': .*nvcc does not know 999, it knows .*, 80, ", message)


READELF = """
  LOAD           0x2ecd10 0x00000000002ecd10 0x00000000002ecd10 0x001cd8 0x003d20 RW  0x1000
  GNU_STACK      0x000000 0x0000000000000000 0x0000000000000000 0x000000 0x000000 RW  0x10
 0x0000000000000001 (NEEDED)             Shared library: [libtorch_cpu.so]
 0x0000000000000001 (NEEDED)             Shared library: [libstdc++.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [ld-linux-x86-64.so.2]
     0: 0000000000000000     0 NOTYPE  LOCAL  DEFAULT  UND
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND pthread_create@GLIBC_2.2.5 (2)
     2: 0000000000000000     0 NOTYPE  GLOBAL DEFAULT  UND aoti_torch_get_dim
     3: 0000000000000000     0 NOTYPE  WEAK   DEFAULT  UND __gmon_start__
     4: 0000000000021710     5 FUNC    WEAK   DEFAULT   11 _ZNSt19bad_optional_accessD1Ev
  0x0010:   Name: GLIBCXX_3.4.21  Flags: none  Version: 4
  0x0020:   Name: CXXABI_1.3.9  Flags: none  Version: 7
  0x0040:   Name: GLIBC_2.2.5  Flags: none  Version: 2
  0x0050:   Name: GCC_3.0  Flags: none  Version: 14
"""
WHEEL = "cu_fast-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"


class TestPortable:
    """Whether a wheel runs where it says, and what CU_FAST_PORTABLE=1 does for that."""

    def test_nothing_is_wrong(self):
        assert wheel_check.portability_problems(WHEEL, READELF, "x86_64") == []

    @pytest.mark.parametrize(
        "before, after, problem",
        [
            ("GLIBC_2.2.5  F", "GLIBC_2.34  F", "it needs symbols of GLIBC_2.34"),
            ("GLIBC_2.2.5  F", "GLIBC_2.29  F", "it needs symbols of GLIBC_2.29"),
            ("GLIBC_2.2.5  F", "GLIBC_ABI_DT_RELR  F", "it needs symbols of GLIBC_ABI_DT_RELR"),
            ("GLIBCXX_3.4.21", "GLIBCXX_3.4.26", "it needs symbols of GLIBCXX_3.4.26"),
            ("CXXABI_1.3.9", "CXXABI_1.3.13", "it needs symbols of CXXABI_1.3.13"),
            ("libc.so.6", "libcudart.so.12", "it needs libcudart.so.12"),
            ("libstdc++.so.6", "libc++.so.1", "it needs libc++.so.1"),
            ("aoti_torch_get_dim", "_ZNSt13runtime_errorC1EPKc", "it needs _ZNSt13runtime_errorC1EPKc, of no version"),
            ("RW  0x10\n", "RWE 0x10\n", "its stack is executable"),
            (READELF, "", "readelf did not say what is needed"),
        ],
    )
    def test_library_that_is_wrong(self, before, after, problem):
        assert before in READELF
        assert wheel_check.portability_problems(WHEEL, READELF.replace(before, after), "x86_64") == [problem]

    @pytest.mark.parametrize("tag", ["linux_x86_64", "manylinux_2_34_x86_64", "manylinux_2_28_aarch64"])
    def test_wrong_tag(self, tag):
        wheel = WHEEL.replace("manylinux_2_28_x86_64", tag)
        (found,) = wheel_check.portability_problems(wheel, READELF, "x86_64")
        assert found.startswith(f"{wheel} must have the tag manylinux_2_28_x86_64")

    def test_a_setting_that_means_nothing(self, tmp_path):
        assert "error: CU_FAST_PORTABLE is 'yes', must be 0 or 1" in build_fails(tmp_path, CU_FAST_PORTABLE="yes")

    @x86
    def test_what_is_newer_is_not_asked_for(self, tmp_path, monkeypatch):
        if platform.libc_ver()[0] != "glibc" or shutil.which("g++") is None or shutil.which("readelf") is None:
            pytest.skip("needs glibc, g++ and readelf")
        monkeypatch.syspath_prepend(SETUP.parent)
        import older_libraries

        source, library = tmp_path / "newer.cpp", tmp_path / "newer.so"
        # log has a version of glibc 2.29, pthread_key_create of 2.34, the stream of GLIBCXX_3.4.26; atexit has none.
        source.write_text(
            "#include <pthread.h>\n#include <cmath>\n#include <cstdlib>\n#include <memory>\n#include <sstream>\n"
            "#include <stdexcept>\n"
            "thread_local int seen = 0;\n"
            'extern "C" double answer(double x) {\n'
            "  pthread_key_t key;\n"
            "  std::ostringstream text;\n"
            "  text << std::log(std::exp(x)) + 0 * (atexit([] {}) + pthread_key_create(&key, nullptr)) + seen++;\n"
            "  auto shared = std::make_shared<std::string>(text.str());\n"
            "  try { throw std::runtime_error(*shared); } catch (const std::exception& e) { return atof(e.what()); }\n"
            "}\n"
        )
        monkeypatch.setenv("CU_FAST_PORTABLE", "1")
        flags = older_libraries.link_flags(["g++", "-shared"], tmp_path)
        subprocess.run(
            ["g++", "-std=c++20", "-shared", "-fPIC", source, *flags, "-lpthread", "-o", library], check=True
        )
        command = ["readelf", "-W", "--dynamic", "--version-info", "--dyn-syms", "--program-headers", library]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert wheel_check.portability_problems(WHEEL, text, "x86_64") == []
        answer = ctypes.CDLL(str(library)).answer
        answer.argtypes, answer.restype = [ctypes.c_double], ctypes.c_double
        assert answer(2.0) == 2.0
        # What is neither there nor in libstdc++.a is an error here, not where it would be loaded: glibc 2.35 brought it.
        source.write_text('extern "C" double fmaximum(double, double);\ndouble two() { return fmaximum(1, 2); }\n')
        command = ["g++", "-shared", "-fPIC", source, *flags, "-o", library]
        assert "undefined reference to `fmaximum'" in subprocess.run(command, capture_output=True, text=True).stderr


def loops_of(body: str) -> list[str]:
    """Instructions from the target of a conditional jump back to that jump, of each; not those that hold another."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", body, re.MULTILINE)]
    jumps = [(at, int(to[1], 16)) for at, text in lines if (to := re.match(r"j(?!mp)\w+\s+([0-9a-f]+) <", text))]
    back = [(to, at) for at, to in jumps if lines[0][0] <= to < at]
    inner = [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]
    return ["\n".join(text for at, text in lines if a <= at <= b) for a, b in inner]


@needs_native
@x86
class TestBuild:
    """Facts about the machine code, read from the library itself."""

    def test_only_the_stable_abi_is_needed(self):
        if shutil.which("nm") is None:
            pytest.skip("nm is not installed")
        symbols = subprocess.run(
            ["nm", "-DCu", native.LIBRARY], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        needed = [line.split()[-1] for line in symbols if line.strip()]
        assert any(name.startswith("aoti_torch_") for name in needed)
        unstable = [name for name in needed if re.match(r"(at|c10|torch)::|_?Py", name)]
        assert unstable == []

    def test_nothing_is_fused(self, functions):
        fused = [name for name, body in functions if re.search(r"\sv?fn?m(add|sub)", body)]
        assert fused == []

    def test_wide_registers_stay_in_their_level(self, functions):
        assert any("%zmm" in body for name, body in functions)
        for name, body in functions:
            if not re.search("cu_fast::(avx512|amx)::", name):
                assert "%zmm" not in body, name
                if "cu_fast::avx2::" not in name:
                    assert "%ymm" not in body, name

    def test_hot_loops_do_not_spill(self, functions):
        hot = [(name, body) for name, body in functions if re.search(HOT, name)]
        found = {re.search(HOT, name).group() for name, _ in hot}
        assert len(found) == 4 + 3, found  # with AVX2 Pair::dots is part of its caller
        assert len({name.split("(")[0] for name, _ in hot}) >= 9
        for name, body in hot:
            loops = loops_of(body)
            assert loops, name
            for loop in loops:
                assert not re.search(r"v?mov([au]p[sd]|dq[au]\d*)\s.*\(%r[bs]p", loop), name
