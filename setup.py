"""Builds the native library, cu_fast/_C.abi3.so. All metadata is in pyproject.toml.

One library serves every Python >= 3.10 and torch >= 2.11: it uses the LibTorch stable ABI only. The build step needs
torch's headers and finds those of the environment that is installed into; nothing here imports torch.

Environment variables:
    CU_FAST_BUILD  unset: without a compiler or torch, the package installs with its PyTorch reference only.
                   "require": a library that cannot be built is an error.
    CU_FAST_CUDA   "auto" or unset: the CUDA kernels are built too if there is an nvcc ($CUDA_HOME/bin, then PATH),
                   and are left out, with a warning, if not or if it fails. "1": either is an error. "0": left out.
    CU_FAST_ARCHS  the GPUs to build for; ARCHS in sources.py if unset, which also explains the notation.
    CU_FAST_PORTABLE  "1": the library and the wheel are for other machines too (older_libraries.py).
    CXX, CXXFLAGS  the compiler and extra flags, as always. nvcc reads its own NVCC_CCBIN and NVCC_APPEND_FLAGS.
    MAX_JOBS       compiler processes at a time; the number of CPUs if unset.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look here

import sources  # noqa: E402
from older_libraries import link_flags, platform_tag  # noqa: E402
from sources import ARCHS, parse_archs  # noqa: E402

# -Wno-uninitialized: g++ 12 warns of its own AVX-512 header.
CXX_FLAGS = [*sources.FLAGS, "-O3", "-g0", "-Wno-uninitialized", "-DPy_LIMITED_API=0x030A0000"]

NVCC_FLAGS = [
    "-O3", "-std=c++20", "-fmad=false",  # what -ffp-contract=off is to C++
    "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all",
]  # fmt: skip


class Cuda:
    """An nvcc, what it is to compile for, and the flags that follow."""

    def __init__(self, nvcc: str):
        self.nvcc = nvcc
        asked = os.environ.get("CU_FAST_ARCHS")
        self.archs = parse_archs(asked or ARCHS)
        self.version = self.ask("--version")
        known = re.findall(r"sm_(\d+)", self.ask("--list-gpu-code"))
        unknown = [arch for arch in self.archs if re.search(r"\d+", arch).group() not in known]
        if unknown and asked:
            raise SystemExit(
                f"error: CU_FAST_ARCHS is {asked!r}: {nvcc} does not know {unknown[0]}, it knows {', '.join(known)}"
            )
        self.archs = [arch for arch in self.archs if arch not in unknown]  # an older nvcc: PTX serves those GPUs
        # Where its headers and libraries are, nvcc knows best: it may be a script, or lie in a distribution's folders.
        layout = self.ask("--dryrun", "-c", "csrc/none.cu")
        self.includes, self.libraries = (
            [flag for value in re.findall(rf"^#\$ {name}=(.*)$", layout, re.MULTILINE) for flag in shlex.split(value)]
            for name in ("INCLUDES", "LIBRARIES")
        )
        self.built = ";".join(self.archs)
        self.cxx_flags = ["-DCU_FAST_CUDA", f'-DCU_FAST_CUDA_BUILD="{self.built}"', *self.includes]
        # torch as needed libraries, used or not: the stream of a device is a weak symbol, which a CPU torch lacks.
        # cudart is in the library, so that no CUDA library has to be found; it opens the driver when first called.
        self.link_flags = [
            "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed",
            *self.libraries, "-lcudart_static", "-lrt", "-lpthread", "-ldl",
        ]  # fmt: skip

    def ask(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{self.nvcc} failed with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout + done.stderr

    def compile(self, source: str) -> str:
        """The object of a .cu file, kept in build/cuda until the file, what it includes or a flag changes."""
        codes = [re.sub(r"^(\d+)", r"sm_\1", arch.replace("PTX ", "compute_")) for arch in self.archs]
        targets = [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in codes]
        command = [*NVCC_FLAGS, *targets, "-Icsrc"]
        environment = [os.environ.get(f"NVCC_{name}", "") for name in ("CCBIN", "PREPEND_FLAGS", "APPEND_FLAGS")]
        key = hashlib.sha256(repr([self.nvcc, self.version, command, environment]).encode()).hexdigest()[:12]
        made = ROOT / "build/cuda" / f"{Path(source).stem}-{key}.o"
        needs = made.with_suffix(".d")
        if needs.exists() and not newer_group(needs.read_text().replace("\\\n", " ").split()[2:], str(made), "newer"):
            return str(made)
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}.o")
        command += ["-MD", "-MF", str(needs), "-c", source, "-o", str(unfinished)]
        print(shlex.join([self.nvcc, *command]), self.ask(*command), sep="\n", end="", flush=True)
        unfinished.replace(made)
        return str(made)


def cuda_setting() -> str:
    """CU_FAST_CUDA. A setting that means nothing ends the build: no fallback catches SystemExit."""
    setting = os.environ.get("CU_FAST_CUDA") or "auto"
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"error: CU_FAST_CUDA is {setting!r}, must be auto, 0 or 1 (auto if unset)")
    return setting


def find_cuda() -> Cuda | None:
    """The nvcc to use; None if CUDA is to be left out. An error says why there is none."""
    if cuda_setting() == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None:
        raise CompileError("there is no nvcc, neither in $CUDA_HOME/bin nor on PATH; install the CUDA toolkit")
    return Cuda(nvcc)


def torch_directory() -> Path:
    # An isolated build hides the environment from sys.path, but pip runs it with the environment's Python.
    for place in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        if (Path(place) / "torch/include/torch/csrc/stable").is_dir():
            return Path(place) / "torch"
    raise RuntimeError("torch >= 2.11 is not installed in this environment")


class BuildNative(build_ext):
    """Compiles the sources side by side; a failure is reported, and fatal only where the environment says so."""

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        try:
            cuda = find_cuda()
        except (OSError, CompileError) as error:
            if cuda_setting() == "1":
                raise SystemExit(f"error: CU_FAST_CUDA is 1, but {error}") from error
            self.warn(f"the CUDA kernels are left out: {error}")
            cuda = None
        try:
            self.build_with_or_without(cuda, extension, library)
        except Exception as error:
            for old in (library, ROOT / "cu_fast" / library.name):  # never run older code than the sources
                old.unlink(missing_ok=True)
            if not extension.optional:
                raise
            self.warn(
                f"the native library was not built ({error}).\n"
                "cu_fast will run on its PyTorch reference: exact, but slow. To build the library, install torch >= 2.11\n"
                "and a C++20 compiler (g++ >= 12 or clang), then install cu-fast again."
            )

    def build_with_or_without(self, cuda, extension, library):
        try:
            self.build_library(cuda, extension, library)
        except Exception as error:
            if cuda is None or not extension.optional:
                raise
            self.build_library(None, extension, library)
            self.warn(
                f"the CUDA kernels are left out: {error}\nSet CU_FAST_CUDA=1 to make that an error, 0 to not try."
            )

    def build_library(self, cuda, extension, library):
        torch = torch_directory()
        includes = ["csrc", str(torch / "include")]
        flags = CXX_FLAGS + (cuda.cxx_flags if cuda else [])
        sources.write_compile_commands(includes, flags)
        # Kept until a source or what it is compiled with changes: an editable install and a wheel compile once.
        how = [
            flags, (torch / "version.py").read_text(), cuda and [cuda.nvcc, cuda.version, cuda.archs], self.compiler.compiler_so,
            self.compiler.linker_so, *map(os.environ.get, ("CXX", "CXXFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS")),
        ]  # fmt: skip
        made = ROOT / "build" / hashlib.sha256(repr(how).encode()).hexdigest()[:12] / f"_C{platform_tag()}.so"
        if self.force or newer_group(extension.sources + extension.depends, str(made)):
            self.compile_and_link(cuda, torch, includes, flags, made)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # not written into: a process may have mapped it
        shutil.copy(made, library)

    def compile_and_link(self, cuda, torch, includes, flags, made):
        def compile_one(source):
            if source.endswith(".cu"):
                return cuda.compile(source)
            kept = made.parent / f"{source}.o"
            if self.force or newer_group([source, *sources.HEADERS], str(kept), "newer"):
                how = {"include_dirs": includes, "extra_postargs": flags}
                (compiled,) = self.compiler.compile([source], self.build_temp, **how)
                kept.parent.mkdir(parents=True, exist_ok=True)
                Path(compiled).replace(kept)
            return str(kept)

        chosen = (sources.CUDA if cuda else []) + sources.CPU + sources.HOST  # nvcc takes longest, so it starts first
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            objects = list(pool.map(compile_one, chosen))
        unfinished = made.with_suffix(f".{os.getpid()}.so")
        self.compiler.link_shared_object(
            objects + link_flags(self.compiler.linker_so_cxx, made.parent), str(unfinished), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")],
            extra_postargs=cuda.link_flags if cuda else [], target_lang="c++",
        )  # fmt: skip
        unfinished.replace(made)


setup(
    ext_modules=[
        Extension(
            "cu_fast._C",
            sources.CPU + sources.HOST + sources.CUDA,
            depends=[*sources.HEADERS, *sources.ELSEWHERE, "sources.py", "older_libraries.py"],
            language="c++",
            py_limited_api=True,
            optional=os.environ.get("CU_FAST_BUILD") != "require" and os.environ.get("CU_FAST_CUDA") != "1",
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310", "plat_name": platform_tag() or None}},
)
