"""What the native library is made of: its files, the flags that its results depend on, and the GPUs it is built for.

setup.py builds it, and tests/helpers/emulation.py builds the same kernels for the CPU: a new file in csrc/ is in both.
"""

import json
import re
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def found(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


# The files of an instruction set open a target region themselves (csrc/cpu/simd.h), so all are compiled with the same
# flags: a flag for a whole file would let the linker pick that file's copy of an inline function for machines that
# cannot run it. The machine is the one that is built for: _PYTHON_HOST_PLATFORM names another than this.
LEVELS = {"x86_64": ["avx2", "avx512", "amx"], "amd64": ["avx2", "avx512", "amx"], "aarch64": ["neon"]}
MACHINE = sysconfig.get_platform().rpartition("-")[2].lower()
OTHERS = {level for levels in LEVELS.values() for level in levels}.difference(LEVELS.get(MACHINE, []))
HOST = found("csrc/ops.cpp", "csrc/host/*.cpp")
CPU = [source for source in found("csrc/cpu/*.cpp") if Path(source).stem.rpartition("_")[2] not in OTHERS]
ELSEWHERE = [source for source in found("csrc/cpu/*.cpp") if source not in CPU]  # in a source distribution all the same
# Only with CUDA: kernels and what starts them, compiled without torch. What takes longest comes first.
SLOW = ("csrc/cuda/scan_codes.cu", "csrc/cuda/scan_codes_sm90.cu", "csrc/cuda/codebook_quantize.cu")
CUDA = sorted(found("csrc/cuda/*.cu"), key=lambda source: SLOW.index(source) if source in SLOW else len(SLOW))
EMULATION = found("csrc/emulation/*.cpp")
HEADERS = found("csrc/**/*.h")

# Of every C++ file, emulated or not.
FLAGS = [
    "-std=c++20",
    "-ffp-contract=off",  # scores are defined numbers: a fused multiply-add would change them
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def write_compile_commands(includes: list[str], flags: list[str]) -> None:
    """For clangd and its like. It reads kernels as the emulation compiles them: as C++, without a CUDA toolkit."""
    emulated = [*FLAGS, "-DCU_FAST_EMULATED", f"-I{sysconfig.get_path('include')}", "-xc++"]
    commands = [
        {"directory": str(ROOT), "file": file, "arguments": ["c++", *[f"-I{i}" for i in includes], *how, "-c", file]}
        for how, files in ((flags, CPU + HOST), (emulated, CUDA + EMULATION))
        for file in files
    ]
    (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=1) + "\n")


# "80" is machine code for compute capability 8.0, "PTX 90" is PTX of 9.0, "90+PTX" is both. Machine code runs on the
# same major version from its minor version on (8.0 on 8.9, 10.0 on 10.3, 12.0 on 12.1), that of 90a on 9.0 alone. PTX
# is compiled by the driver for what has no machine code: 11.0, and GPUs yet to come. It is not PTX of 8.0, because
# csrc/cuda/launch.h lets kernels overlap on a GPU of 9.0 or newer, and only code of 9.0 or newer waits for its turn.
ARCHS = "80;86;89;90a;100;120;PTX 90"
OLDEST, OLDEST_PTX = 80, 90


def parse_archs(text: str) -> list[str]:
    """The entries of CU_FAST_ARCHS: "80;90+PTX" becomes ["80", "90", "PTX 90"]."""
    archs = []
    for entry in text.split(";"):
        match = re.fullmatch(r"\s*(PTX )?(\d+)([af]?)(\+PTX)?\s*", entry)
        only_ptx, number, suffix, and_ptx = match.groups() if match else (None, "0", "", None)
        problem = None
        if not match or (only_ptx and and_ptx):
            problem = "must be like 80, 90a, PTX 90 or 90+PTX"
        elif int(number) < OLDEST:
            problem = f"is older than {OLDEST}, compute capability 8.0, which the kernels need"
        elif (only_ptx or and_ptx) and suffix:
            problem = f"would be PTX for one GPU; write {number}{suffix};PTX {number}"
        elif (only_ptx or and_ptx) and int(number) < OLDEST_PTX:
            problem = f"would be PTX older than {OLDEST_PTX}, which must not run on newer GPUs; write PTX {OLDEST_PTX}"
        if problem:
            raise SystemExit(f"error: CU_FAST_ARCHS is {text!r}: {entry!r} {problem}. The default is {ARCHS!r}")
        archs += [] if only_ptx else [number + suffix]
        archs += [f"PTX {number}"] if only_ptx or and_ptx else []
    return list(dict.fromkeys(archs))
