"""Registers, memory and instructions of every CUDA kernel, read from the library: no GPU is needed.

machine_code.csv has a row for each kernel. Of each architecture's column, `registers stack local shared` is the most
that the kernel may use (bytes; stack and local memory are spills). By hand: `has` and `never`, instructions that must
and must not be there. LDG.128 stands for LDG.E.NA.128.CONSTANT too: any modifiers between and behind. IMMA@sm_80 is asked
of sm_80 only. FFMA>30 in `never` allows 30: a division and a square root are sequences of them.

`tail_sm_90a` is `instructions cycles`, at most, of what a scan of the codes does behind its last wait for a product or a
copy, which is what it does with the sums. Cycles are those that one warp stalls if it goes through that code once, top to
bottom: what the instructions themselves say, without what they wait for in memory.

    make machine-code

writes what the library uses now; `has` and `never` stay. Another nvcc may use other registers than the one it was
last written with.
"""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from tiers import heavy

from cu_fast.kernels import native

TABLE = Path(__file__).parents[1] / "machine_code.csv"
NEVER = "FFMA FFMA2 LDL STL"  # a new row's: nothing is fused, nothing is spilled
STATIC_SHARED = 48 * 1024
RESERVED_SHARED = 1024  # by the system, counted from compute capability 9.0 on
# Instructions are read for one architecture of each generation: most of the time goes into this.
DISASSEMBLED = ("sm_80", "sm_90a", "sm_120")
TAILS = ("sm_80", "sm_90a")


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int
    shared: int


class Tail(NamedTuple):
    instructions: int
    cycles: int


class Row(NamedTuple):
    has: list[str]
    never: list[str]
    limits: dict[str, Usage]  # by architecture
    tails: dict[str, Tail]  # likewise, of some


def cuobjdump() -> str | None:
    """The program, from PATH or from the package nvidia-cuda-cuobjdump, which has no entry there."""
    installed = [Path(place) / "nvidia/cu13/bin/cuobjdump" for place in sys.path]
    return shutil.which("cuobjdump") or next((str(path) for path in installed if path.exists()), None)


def dump(*arguments: str | Path) -> str:
    # cuobjdump starts nvdisasm, which lies beside it.
    path = os.pathsep.join([str(Path(cuobjdump()).parent), os.environ["PATH"]])
    command = [cuobjdump(), *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=600
    ).stdout


@functools.cache
def readable(mangled: str) -> str:
    """scan_codes<64, true>: without namespaces, return type and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name).replace("> >", ">>")
    if name.endswith(")"):
        depth = 0
        for i in range(len(name) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(name[i], 0)
            if depth == 0:
                return name[:i]
    return name


def by_kernel(text: str, function: str) -> dict[tuple[str, str], str]:
    """What cuobjdump writes about each kernel, by its name and architecture. function: the line that starts one."""
    found, mangled_as = {}, {}
    for part in re.split(r"^(?=arch = )", text, flags=re.MULTILINE)[1:]:
        arch = re.match(r"arch = (\w+)", part).group(1)
        pieces = re.split(function, part.split("Fatbin")[0], flags=re.MULTILINE)
        for mangled, body in zip(pieces[1::2], pieces[2::2]):
            name = readable(mangled)
            assert mangled_as.setdefault(name, mangled) == mangled, f"two kernels are called {name}; rename one"
            found[name, arch] = body
    return found


def usage(text: str) -> dict[tuple[str, str], Usage]:
    """Of each kernel and architecture, from `cuobjdump -res-usage`."""
    return {
        key: Usage(*(int(re.search(rf"\b{name}:(\d+)", body).group(1)) for name in ("REG", "STACK", "LOCAL", "SHARED")))
        for key, body in by_kernel(text, r"^ *Function (\w+):").items()
    }


def instructions(text: str) -> dict[tuple[str, str], Counter[str]]:
    """How often each is there, from `cuobjdump -sass`."""
    return {
        key: Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, flags=re.MULTILINE))
        for key, body in by_kernel(text, r"^\s*Function : (\w+)").items()
    }


# An instruction is 128 bits, its lower half on the first of two lines. Bits 105 to 108 are the cycles until the next.
INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*).*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)


def tails(text: str) -> dict[tuple[str, str], Tail]:
    """Of each scan of the codes that waits for anything, from `cuobjdump -sass`."""
    found = {}
    for key, body in by_kernel(text, r"^\s*Function : (\w+)").items():
        code = [(opcode, int(high, 16) >> 41 & 15) for opcode, high in INSTRUCTION.findall(body) if opcode != "NOP"]
        waits = [i for i, (opcode, _) in enumerate(code) if "DEPBAR" in opcode.split(".")]
        if waits and key[0].startswith("scan_codes"):
            stalls = [stall for _, stall in code[waits[-1] + 1 :]]
            found[key] = Tail(len(stalls), sum(stalls))
    return found


def count(word: str, opcodes: Counter[str]) -> int:
    base, *modifiers = word.split(".")
    return sum(
        n for opcode, n in opcodes.items() if opcode.split(".")[0] == base and {*modifiers} <= {*opcode.split(".")}
    )


def read_table(path: Path) -> dict[str, Row]:
    with path.open(newline="") as file:
        return {
            line["kernel"]: Row(
                line["has"].split(),
                line["never"].split(),
                {arch: Usage(*map(int, line[arch].split())) for arch in line if arch.startswith("sm_")},
                {
                    column.removeprefix("tail_"): Tail(*map(int, line[column].split()))
                    for column in line
                    if column.startswith("tail_") and line[column]
                },
            )
            for line in csv.DictReader(file)
        }


def write_table(
    path: Path, table: dict[str, Row], found: dict[tuple[str, str], Usage], ends: dict[tuple[str, str], Tail]
) -> None:
    archs = sorted({arch for _, arch in found}, key=lambda arch: int(re.search(r"\d+", arch).group()))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "has", "never", *archs, *(f"tail_{arch}" for arch in TAILS)])
        for kernel in sorted({name for name, _ in found}):
            row = table.get(kernel, Row([], NEVER.split(), {}, {}))
            cells = [" ".join(map(str, found[kernel, arch])) for arch in archs]
            cells += [" ".join(map(str, ends.get((kernel, arch), ()))) for arch in TAILS]
            writer.writerow([kernel, " ".join(row.has), " ".join(row.never), *cells])


def usage_problems(table: dict[str, Row], found: dict[tuple[str, str], Usage]) -> list[str]:
    kernels = {name for name, _ in found}
    problems = [f"{name} is in the library, not in the table" for name in sorted(kernels - {*table})]
    problems += [f"{name} is in the table, not in the library" for name in sorted({*table} - kernels)]
    for (name, arch), used in found.items():
        limits = table[name].limits.get(arch) if name in table else None
        if name in table and limits is None:
            problems.append(f"{name} has no column for {arch} in the table")
        for what, is_now, most in zip(Usage._fields, used, limits or ()):
            if is_now > most:
                problems.append(f"{name} on {arch}: {what} {is_now}, at most {most}")
        static = STATIC_SHARED + (RESERVED_SHARED if int(re.search(r"\d+", arch).group()) >= 90 else 0)
        if used.shared > static:
            problems.append(f"{name} on {arch}: shared {used.shared}, static memory ends at {static}")
        if (used.stack or used.local) and name in table and {"LDL", "STL"} <= {*table[name].never}:
            problems.append(f"{name} on {arch}: stack {used.stack}, local {used.local}, but never LDL STL")
    return problems


def instruction_problems(table: dict[str, Row], found: dict[tuple[str, str], Counter[str]]) -> list[str]:
    problems = []
    for (name, arch), opcodes in found.items():
        row = table.get(name, Row([], [], {}, {}))
        for word, _, only in (has.partition("@") for has in row.has):
            if only in ("", arch) and not count(word, opcodes):
                problems.append(f"{name} on {arch} has no {word}")
        for word, _, most in (never.partition(">") for never in row.never):
            if (n := count(word, opcodes)) > int(most or 0):
                problems.append(f"{name} on {arch} has {n} {word}, at most {most or 0}")
    return problems


def tail_problems(table: dict[str, Row], found: dict[tuple[str, str], Tail]) -> list[str]:
    problems = []
    for (name, arch), tail in found.items():
        most = table[name].tails.get(arch) if name in table else None
        if most is None:
            problems.append(f"{name} on {arch}: no tail in the table")
            continue
        for what, is_now, limit in zip(Tail._fields, tail, most):
            if is_now > limit:
                problems.append(f"{name} on {arch}: {is_now} {what} behind the last wait, at most {limit}")
    return problems


def code_archs() -> set[str]:
    """The architectures that the library says it has machine code for."""
    return {f"sm_{arch}" for arch in native.cuda_build().split(";") if arch and not arch.startswith("PTX")}


@pytest.fixture(scope="module")
def committed() -> dict[str, Row]:
    """The table, where there is a library to hold against it."""
    missing = [
        reason
        for reason, is_missing in [
            ("the native library was built without CUDA", not code_archs()),
            ("there is no cuobjdump; install cu-fast[test]", cuobjdump() is None),
            ("there is no c++filt; install binutils", shutil.which("c++filt") is None),
        ]
        if is_missing
    ]
    if missing and os.environ.get("CU_FAST_BUILD") == "require":
        pytest.fail("; ".join(missing))
    if missing:
        pytest.skip("; ".join(missing))
    return read_table(TABLE)


class TestLibrary:
    def test_usage(self, committed):
        found = usage(dump("-res-usage", native.LIBRARY))
        assert {arch for _, arch in found} == code_archs()
        problems = usage_problems(committed, found)
        assert not problems, "\n".join(problems)

    @pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=[] if arch == "sm_90a" else heavy) for arch in DISASSEMBLED]
    )
    def test_instructions(self, committed, arch):
        if arch not in code_archs():
            pytest.skip(f"the library was built without {arch}")
        text = dump("-sass", "-arch", arch, native.LIBRARY)
        found = instructions(text)
        assert {name for name, _ in found} == {*committed}
        # Read to the end: a kernel leaves, or, where it is not for this architecture, traps.
        assert all("EXIT" in opcodes or "BPT.TRAP" in opcodes for opcodes in found.values())
        problems = instruction_problems(committed, found)
        if arch in TAILS:
            ends = tails(text)
            assert {name for name, _ in ends} == {name for name, row in committed.items() if arch in row.tails}
            problems += tail_problems(committed, ends)
        assert not problems, "\n".join(problems)


USAGE = """
Fatbin elf code:
================
arch = sm_80
compressed

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7cu_fast12_GLOBAL__N_14scanILi64ELb0EEEvNS0_1PE:
  REG:45 STACK:0 SHARED:4096 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7cu_fast4packENS_1PE:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
compressed

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7cu_fast12_GLOBAL__N_14scanILi64ELb0EEEvNS0_1PE:
  REG:40 STACK:0 SHARED:4096 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7cu_fast4packENS_1PE:
  REG:18 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
compressed
"""
SASS = """
Fatbin elf code:
================
arch = sm_80
compressed

	code for sm_80
		Function : _ZN7cu_fast12_GLOBAL__N_14scanILi64ELb0EEEvNS0_1PE
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x00000a0000017a02 */
                                                                       /* 0x000fe40000000f00 */
        /*0010*/             @!P0  LDG.E.NA.128.CONSTANT R4, [R2.64] ; /* 0x0000000402047981 */
        /*0020*/                   IMMA.16832.U8.S8 R4, R4.ROW, R8.COL, R4 ; /* 0x0000000804047237 */
        /*0030*/                   EXIT ;                              /* 0x000000000000794d */
		..........

		Function : _ZN7cu_fast4packENS_1PE
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
        /*0000*/                   FMUL R1, R2, R3 ;                   /* 0x0000000302017220 */
        /*0010*/              @P0  EXIT ;                              /* 0x000000000000794d */
"""
# From a library: stalls of 4, 5, 2, 13, 1 and 0.
WAITING = """
Fatbin elf code:
================
arch = sm_80

		Function : _ZN7cu_fast12_GLOBAL__N_110scan_codesILi64ELb0EEEvNS0_1PE
        /*4c50*/                   LDGDEPBAR ;                         /* 0x00000000000079af */
                                                                       /* 0x000e280000000000 */
        /*4c60*/                   DEPBAR.LE SB0, 0x0 ;                /* 0x000080000000791a */
                                                                       /* 0x000fc80000000000 */
        /*4c70*/              @!P3 BRA 0x1c0b0 ;                       /* 0x0000000400ec7947 */
                                                                       /* 0x000fea0003800000 */
        /*4c80*/                   IADD3 R12, P1, R18, UR6, RZ ;       /* 0x00000006120c7c10 */
                                                                       /* 0x000fe4000ff3e0ff */
        /*4c90*/                   ISETP.GE.AND.EX P0, PT, R13, R15, PT, P0 ;   /* 0x0000000f0d00720c */
                                                                       /* 0x000fda0003f06300 */
        /*4ca0*/                   IMAD R0, R9, R14.reuse, RZ ;        /* 0x0000000e09007224 */
                                                                       /* 0x0c0fe200078e02ff */
        /*4cb0*/                   NOP ;                               /* 0x0000000000007918 */
                                                                       /* 0x000fc00000000000 */
"""
SCAN = "scan<64, false>"


class TestReading:
    """That the checks above see what they are to see, on a dump of two kernels."""

    @pytest.fixture(autouse=True)
    def needs(self):
        if shutil.which("c++filt") is None:
            pytest.skip("c++filt is not installed")

    @pytest.fixture
    def table(self, tmp_path):
        path = tmp_path / "table.csv"
        table = {
            SCAN: Row(["IMMA", "LDG.128"], NEVER.split(), {}, {}),
            "pack": Row([], [*NEVER.split(), "IMMA"], {}, {}),
        }
        write_table(path, table, usage(USAGE), {})
        return read_table(path)

    def test_what_is_read(self, table):
        assert list(table) == ["pack", SCAN]
        assert table[SCAN].limits == {"sm_80": Usage(45, 0, 0, 4096), "sm_90a": Usage(40, 0, 0, 4096)}
        assert instructions(SASS)[SCAN, "sm_80"] == Counter(
            ["MOV", "LDG.E.NA.128.CONSTANT", "IMMA.16832.U8.S8", "EXIT"]
        )

    def test_nothing_is_wrong(self, table):
        assert usage_problems(table, usage(USAGE)) + instruction_problems(table, instructions(SASS)) == []
        assert usage_problems(table, usage(USAGE.replace("REG:45", "REG:44"))) == []

    @pytest.mark.parametrize(
        "before, after, problem",
        [
            ("REG:45", "REG:46", f"{SCAN} on sm_80: registers 46, at most 45"),
            ("REG:18 STACK:0", "REG:18 STACK:16", "pack on sm_90a: stack 16, at most 0"),
            ("SHARED:4096 LOCAL:0", "SHARED:4096 LOCAL:8", f"{SCAN} on sm_80: local 8, at most 0"),
            ("SHARED:4096", "SHARED:49153", f"{SCAN} on sm_80: shared 49153, static memory ends at 49152"),
            ("SHARED:4096", "SHARED:50177", f"{SCAN} on sm_90a: shared 50177, static memory ends at 50176"),
            ("4pack", "5pack2", "pack2 is in the library, not in the table"),
            ("4pack", "5pack2", "pack is in the table, not in the library"),
            ("arch = sm_90a", "arch = sm_100", "pack has no column for sm_100 in the table"),
        ],
    )
    def test_usage_that_is_wrong(self, table, before, after, problem):
        assert before in USAGE
        assert problem in usage_problems(table, usage(USAGE.replace(before, after)))

    def test_spills_that_were_written_to_the_table(self, tmp_path):
        spilled = usage(USAGE.replace("STACK:0", "STACK:16"))
        write_table(tmp_path / "table.csv", {}, spilled, {})
        problems = usage_problems(read_table(tmp_path / "table.csv"), spilled)
        assert f"{SCAN} on sm_80: stack 16, local 0, but never LDL STL" in problems

    @pytest.mark.parametrize(
        "before, after, problem",
        [
            ("IMMA.16832.U8.S8", "IMAD", f"{SCAN} on sm_80 has no IMMA"),
            (".128", ".64", f"{SCAN} on sm_80 has no LDG.128"),
            ("FMUL", "@!UP0 FFMA.FTZ", "pack on sm_80 has 1 FFMA, at most 0"),
            ("MOV R1", "STL.64 [R1]", f"{SCAN} on sm_80 has 1 STL, at most 0"),
        ],
    )
    def test_instructions_that_are_wrong(self, table, before, after, problem):
        assert before in SASS
        assert instruction_problems(table, instructions(SASS.replace(before, after))) == [problem]

    def test_what_one_architecture_must_have(self):
        row = Row(["IGMMA@sm_90a", "EXIT@sm_80"], [], {}, {})
        opcodes = Counter(["IMMA"])
        assert instruction_problems({"a": row}, {("a", "sm_90a"): opcodes}) == ["a on sm_90a has no IGMMA"]
        assert instruction_problems({"a": row}, {("a", "sm_80"): opcodes}) == ["a on sm_80 has no EXIT"]

    def test_some_are_allowed(self):
        table = {"pack": Row([], ["FMUL>1"], {}, {})}
        assert instruction_problems(table, instructions(SASS)) == []
        two = SASS.replace("@P0  EXIT", "@P0  FMUL.FTZ")
        assert instruction_problems(table, instructions(two)) == ["pack on sm_80 has 2 FMUL, at most 1"]

    @pytest.mark.parametrize(
        "most, problems",
        [
            (Tail(4, 21), []),
            (Tail(3, 21), ["scan_codes<64, false> on sm_80: 4 instructions behind the last wait, at most 3"]),
            (Tail(4, 20), ["scan_codes<64, false> on sm_80: 21 cycles behind the last wait, at most 20"]),
            (None, ["scan_codes<64, false> on sm_80: no tail in the table"]),
        ],
    )
    def test_tails(self, tmp_path, most, problems):
        used = usage(USAGE.replace("4scanI", "10scan_codesI"))
        kernel, ends = "scan_codes<64, false>", tails(WAITING)
        assert ends == {(kernel, "sm_80"): Tail(4, 5 + 2 + 13 + 1)}
        write_table(tmp_path / "table.csv", {}, used, {(kernel, "sm_80"): most} if most else {})
        table = read_table(tmp_path / "table.csv")
        assert table[kernel].tails == ({"sm_80": most} if most else {}) and not table["pack"].tails
        assert tail_problems(table, ends) == problems

    def test_names(self):
        assert readable("_ZN7cu_fast4packENS_1PE") == "pack"
        assert readable("_ZN7cu_fast4packILNS_4KindE1ENS_4HalfEEEvPFvNS_1PEE") == "pack<(Kind)1, Half>"
        assert readable("_ZN7cu_fast4packINS_4TileILi4EEEEEvi") == "pack<Tile<4>>"

    def test_two_kernels_of_one_name(self):
        with pytest.raises(AssertionError, match="two kernels are called pack; rename one"):
            usage(USAGE.replace("_ZN7cu_fast12_GLOBAL__N_14scanILi64ELb0EEEvNS0_1PE", "_ZN7another4packEi"))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"] or not code_archs() or cuobjdump() is None:
        sys.exit("usage: test_machine_code.py --write, with a library that has CUDA, and cuobjdump (cu-fast[test])")
    ends = {key: tail for arch in TAILS for key, tail in tails(dump("-sass", "-arch", arch, native.LIBRARY)).items()}
    write_table(TABLE, read_table(TABLE) if TABLE.exists() else {}, usage(dump("-res-usage", native.LIBRARY)), ends)
