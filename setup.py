"""Builds the native library, cu_fast/_C.abi3.so. All metadata is in pyproject.toml.

One library serves every Python >= 3.10 and torch >= 2.11: it uses the LibTorch stable ABI only. The build step needs
torch's headers and finds those of the environment that is installed into; nothing here imports torch.

Environment variables:
    CU_FAST_BUILD  unset: without a compiler or torch, the package installs with its PyTorch reference only.
                   "require": a library that cannot be built is an error.
    CXX, CXXFLAGS  the compiler and extra flags, as always.
    MAX_JOBS       compiler processes at a time; the number of CPUs if unset.
"""

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

# Every source, by the instruction set that it may use. The files of a level open a target region themselves
# (csrc/cpu/simd.h), so all are compiled with the same flags: a flag for a whole file would let the linker pick
# that file's copy of an inline function for machines that cannot run it.
BASELINE = [
    "csrc/ops.cpp",
    "csrc/cpu/simd.cpp",
    "csrc/cpu/pack_scan.cpp",
    "csrc/cpu/codebook_quantize.cpp",
    "csrc/cpu/codebook_quantize_scalar.cpp",
    "csrc/cpu/sae_encode.cpp",
    "csrc/cpu/sae_encode_scalar.cpp",
    "csrc/cpu/masked_decode.cpp",
    "csrc/cpu/masked_decode_scalar.cpp",
    "csrc/cpu/codebook_bottleneck.cpp",
    "csrc/cpu/peak.cpp",
    "csrc/cpu/peak_scalar.cpp",
]
AVX2 = [
    "csrc/cpu/codebook_quantize_avx2.cpp",
    "csrc/cpu/sae_encode_avx2.cpp",
    "csrc/cpu/masked_decode_avx2.cpp",
    "csrc/cpu/peak_avx2.cpp",
]
AVX512 = [
    "csrc/cpu/codebook_quantize_avx512.cpp",
    "csrc/cpu/sae_encode_avx512.cpp",
    "csrc/cpu/masked_decode_avx512.cpp",
    "csrc/cpu/peak_avx512.cpp",
]

FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",  # scores are defined numbers: a fused multiply-add would change them
    "-fvisibility=hidden",
    "-g0",
    "-Wno-uninitialized",  # g++ 12 warns of its own AVX-512 header
    "-DPy_LIMITED_API=0x030A0000",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]

ROOT = Path(__file__).parent


def sources() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return BASELINE + (AVX2 + AVX512 if x86 else [])


def torch_directory() -> Path:
    # An isolated build hides the environment from sys.path, but pip runs it with the environment's Python.
    for place in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        if (Path(place) / "torch/include/torch/csrc/stable").is_dir():
            return Path(place) / "torch"
    raise RuntimeError("torch >= 2.11 is not installed in this environment")


class BuildNative(build_ext):
    """Compiles the sources side by side; a failure is reported, and fatal only if CU_FAST_BUILD=require."""

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        if not self.force and not newer_group(extension.sources + extension.depends, str(library)):
            return
        try:
            self.build_library(extension, library)
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

    def build_library(self, extension, library):
        torch = torch_directory()

        def compile_one(source):
            return self.compiler.compile(
                [source], self.build_temp, include_dirs=["csrc", str(torch / "include")], extra_postargs=FLAGS
            )

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            objects = [compiled for (compiled,) in pool.map(compile_one, extension.sources)]
        self.compiler.link_shared_object(
            objects, str(library), libraries=["torch_cpu"], library_dirs=[str(torch / "lib")], target_lang="c++"
        )


setup(
    ext_modules=[
        Extension(
            "cu_fast._C",
            sources(),
            depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))],
            language="c++",
            py_limited_api=True,
            optional=os.environ.get("CU_FAST_BUILD") != "require",
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
