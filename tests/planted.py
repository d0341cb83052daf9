"""Plants bugs in a copy of the repository, one at a time, and says which of them the tests see: `make planted`.

    python tests/planted.py [NAME ...] [--list] [--tree PATH]

A bug is seen if the tests that planted_bugs.py names for it fail, and missed if they pass; that these tests pass without
it is for `make test` to say. Exit status 1 unless every bug was seen.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planted_bugs import BUGS, Bug

ROOT = Path(__file__).parents[1]
LIBRARY = "cu_fast/_C.abi3.so"


def copy_of(tree: Path, to: Path) -> Path:
    """The files that git knows or would take, and what was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=tree, capture_output=True, check=True
    )
    for name in {*listed.stdout.decode().split("\0"), LIBRARY} - {""}:
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name)
    shutil.copytree(tree / "build", to / "build", dirs_exist_ok=True)
    return to


def run(command: list[str], tree: Path, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(tree), str(tree / "tests/helpers")])  # before an installed cu_fast
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    environment.pop("CU_FAST_TEST_ALL", None)
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def build(tree: Path) -> None:
    done = run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, CU_FAST_BUILD="require", CU_FAST_CUDA="0"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def verdict(bug: Bug, tree: Path) -> str:
    """ "seen" and by which test, "missed", or what went wrong instead."""
    if bug.tests[0].endswith(".py") and "triton_" in Path(bug.tests[0]).name:
        done = run([sys.executable, *bug.tests], tree, TRITON_INTERPRET="1")
        found = [json.loads(line).get("failure") for line in done.stdout.splitlines()]
        return f"broken: {done.stderr[-500:]}" if not found else "seen" if any(found) else "missed"
    done = run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *bug.tests], tree)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return f"seen by {failed[0]}"
    return "missed" if done.returncode == 0 else f"broken: {(done.stdout + done.stderr)[-500:]}"


def plant(bug: Bug, tree: Path) -> tuple[str, float]:
    """The verdict on a bug, and its seconds; the tree is as before then."""
    begin, path = time.monotonic(), tree / bug.file
    text = path.read_text()
    if text.count(bug.old) != 1:
        return f"broken: {bug.old!r} is {text.count(bug.old)} times in {bug.file}", 0.0
    path.write_text(text.replace(bug.old, bug.new))
    native = bug.file.startswith("csrc/")
    try:
        if native:
            build(tree)
        return verdict(bug, tree), time.monotonic() - begin
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of bugs, or parts of them; all by default")
    parser.add_argument("--list", action="store_true", help="print the bugs and end")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the repository; by default this one")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if not options.names or any(name in bug.name for name in options.names)]
    if options.list:
        print("\n".join(f"{bug.name}: {bug.file}" for bug in bugs))
        return 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cu_fast-planted-") as folder:
        # One copy for bugs of kernels, which is built anew, and two for the others; two at work, one for each core.
        native = [bug for bug in bugs if bug.file.startswith("csrc/")]
        plain = [bug for bug in bugs if bug not in native]
        trees = [copy_of(options.tree.resolve(), Path(folder, name)) for name in ("native", "plain", "more")]

        def work(tree: Path, some: list[Bug]) -> list[str]:
            found = []
            for bug in some:
                said, seconds = plant(bug, tree)
                print(f"{bug.name}: {said.splitlines()[0]}, {seconds:.0f} s", flush=True)
                found.append(said)
            return found

        with ThreadPoolExecutor(2) as pool:
            shares = (trees[0], native), (trees[1], plain[::2]), (trees[2], plain[1::2])
            found = [said for each in pool.map(lambda share: work(*share), shares) for said in each]
    seen = sum(said.startswith("seen") for said in found)
    print("\n".join(said for said in found if said.startswith("broken")))
    print(f"{seen} of {len(bugs)} seen, {time.monotonic() - begin:.0f} s")
    return 0 if seen == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
