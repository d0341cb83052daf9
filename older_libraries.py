"""Links against older system libraries than this machine's: CU_FAST_PORTABLE=1, for a wheel that others install.

A library asks for the symbols' versions that it was linked with, the newest that the linker saw: linked on glibc 2.36 it
does not load on 2.28. So the linker is shown stand-ins, made of this machine's libraries: each symbol in its newest
version that manylinux_2_28 has. What came later is linked in from libstdc++.a; what is not there either is an error.
Code is compiled as always, so results and speed are those of a library that was linked without this.

glibc 2.34 took libpthread, libdl and librt into libc. A symbol is looked up by its version, not in one library, and torch,
which this library needs, needs those three.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

from sources import MACHINE

LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
PLATFORM = f"manylinux_2_28_{MACHINE}"  # RHEL 8 and its kin; what PyPI's torch is built for
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
LIBRARIES = {"shared": "libc.so.6", "m": "libm.so.6", "stdc++": "libstdc++.so.6", "loader": LOADERS.get(MACHINE)}
KINDS = {"FUNC": (".text", "function"), "IFUNC": (".text", "function"), "TLS": ('.tbss, "awT", @nobits', "tls_object")}
# glibc 2.32 tells libstdc++ by it whether a process has one thread: here never.
OWN = """.hidden __libc_single_threaded
.globl __libc_single_threaded
.bss
__libc_single_threaded: .zero 1
.section .note.GNU-stack, "", @progbits
"""


def platform_tag() -> str:
    """PLATFORM if CU_FAST_PORTABLE is 1, else "". A setting that means nothing, or cannot be followed here, ends the build."""
    setting = os.environ.get("CU_FAST_PORTABLE") or "0"
    if setting not in ("0", "1"):
        raise SystemExit(f"error: CU_FAST_PORTABLE is {setting!r}, must be 0 or 1 (0 if unset)")
    if setting == "1" and (MACHINE not in LOADERS or platform.libc_ver()[0] != "glibc"):
        raise SystemExit("error: CU_FAST_PORTABLE is 1, which is for Linux with glibc on x86-64 or aarch64 alone")
    return PLATFORM if setting == "1" else ""


def allowed(version: str) -> tuple[int, ...]:
    """The numbers of a version such as GLIBC_2.14; () if the platform may lack it."""
    match = re.fullmatch(r"([A-Z]+)_(\d+(?:\.\d+)*)", version)
    numbers = tuple(map(int, match[2].split("."))) if match else ()
    return numbers if numbers and numbers <= NEWEST.get(match[1], ()) else ()


def link_flags(linker: list[str], folder: Path) -> list[str]:
    """Makes the stand-ins in folder/older; [] if not asked for. The flags come behind the objects and before torch's
    libraries: those hold, and show, copies of what is newer in libstdc++, which the next torch need not have."""
    if not platform_tag():
        return []
    folder = folder / "older"

    def run(*command: object) -> str:
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.strip()

    folder.mkdir(parents=True, exist_ok=True)
    for name, file in LIBRARIES.items():
        listed = run("readelf", "-W", "--dyn-syms", run(*linker, f"-print-file-name={file}"))
        newest: dict[str, tuple[tuple[int, ...], str, str]] = {}
        for kind, symbol, version in re.findall(r" ([A-Z]+) +\w+ +DEFAULT +\d+ (\w+)@@?(\S+)$", listed, re.MULTILINE):
            if numbers := allowed(version):
                newest[symbol] = max(newest.get(symbol, ((), "", "")), (numbers, version, kind))
        lines, versions = ['.section .note.GNU-stack, "", @progbits\n'], ""
        for symbol, (_, _, kind) in newest.items():
            section, what = KINDS.get(kind, (".data", "object"))
            lines.append(f".section {section}\n.type {symbol}, @{what}\n.globl {symbol}\n{symbol}:\n")
        for version in sorted({version for _, version, _ in newest.values()}):
            versions += f"{version} {{ {'; '.join(symbol for symbol in newest if newest[symbol][1] == version)}; }};\n"
        (folder / f"{name}.s").write_text("".join(lines))
        (folder / f"{name}.map").write_text(versions)
        run(*linker, "-nostdlib", f"-Wl,-soname,{file},--version-script,{folder}/{name}.map", f"{folder}/{name}.s",
            "-o", f"{folder}/lib{name}.so")  # fmt: skip
    (folder / "own.s").write_text(OWN)
    unshared = run(*linker, "-print-file-name=libc_nonshared.a")  # such as atexit
    (folder / "libc.so").write_text(f'GROUP("{folder}/libshared.so" "{unshared}" AS_NEEDED("{folder}/libloader.so"))\n')
    return [f"{folder}/own.s", f"-L{folder}", "-lstdc++", "-l:libstdc++.a", "-Wl,--exclude-libs,libstdc++.a,-z,defs"]
