"""The native library itself: how it is built and loaded, and that nothing about the machine changes a bit."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hurtful
import pytest
import torch
from calls import call, every_operator
from tiers import TEST_ALL, heavies
from tiles import LEVELS, environment

from cu_fast.kernels import native, reference
from cu_fast.kernels.operators import OPERATORS

# Only a library that was never built is an excuse; one that does not load fails every test.
needs_native = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")
UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}  # the value of FE_UPWARD
OPS = torch.ops.cu_fast


def tensors(given):
    """What the operators return for their arguments, by their names."""
    results = {op: call(op, **one) for op, one in given.items()}
    return {op: list(made) if isinstance(made, (tuple, list)) else [made] for op, made in results.items()}


def digest() -> str:
    """A hash of what the operators return for a small battery of inputs. NaN is NaN, whatever its payload."""
    shapes = [
        (1, 512, 2000, 8), (3, 33, 77, 77), (70, 64, 300, 5), (9, 5, 1, 1), (130, 48, 1100, 20), (8, 7, 40, 3),
        (270, 70, 513, 9),
    ]  # fmt: skip
    # As many kinds as cases of a shape, one more: every kind meets every other choice.
    kinds = itertools.cycle([*hurtful.KINDS, "gaussian"])
    layouts = itertools.cycle(["plain", "rows", "columns", "transposed", "plain"])
    hasher = hashlib.sha256()
    cases = itertools.product(shapes, hurtful.DTYPES, (False, True), (False, True))
    for seed, (shape, dtype, mask, scan) in enumerate(cases):
        how = dict(kind=next(kinds), dtype=dtype, layout=next(layouts), mask=mask, scan=scan, seed=seed)
        if not TEST_ALL and seed % 3:
            continue  # of each shape a third: each dtype, with and without masks and planes
        for made in tensors(every_operator(*shape, **how)).values():
            for tensor in made:
                hasher.update(torch.where(tensor.isnan(), torch.nan, tensor.float()).numpy().tobytes())
    return hasher.hexdigest()


def sums_are_right(T: int) -> bool:
    """Whether T rows at a time have the reference's scores where digits and sums reach their limits."""
    L = reference.LARGEST
    # The words of 12 bits and the digits of 8 at their ends, of either sign.
    worst = [L, 2040 * 4096 - 2048, 2040 * 4096 - 2176, 127 * 65536 - 128 * 257, 2047, 2048, 128, 127, 1, 0]
    signed = torch.tensor([s * p for p in worst for s in (1, -1)])[:, None]
    rows = torch.tensor(worst).roll(-T)[:, None].float()  # which of them share a tile depends on T
    pairs = [(rows.repeat(1, W), signed.expand(-1, W)) for W in (192, 577)]
    pairs += [(rows[:4].repeat(1, reference.MOST_WIDTH), signed[:8].expand(-1, reference.MOST_WIDTH))]
    for x, _ in pairs:
        x[:, :1] = L  # so that a row's unit is 1
    # Above the middle of two floats; not once it was rounded to a double.
    middle = torch.tensor([[2**22] * 2**14 + [2**17, 1]])
    pairs += [(middle.float(), torch.cat([middle, -middle]))]
    for x, p in pairs:
        given = dict(W_digits=reference.digits_of(p.int()), W_factor=torch.ones(len(p)))
        for some in x.repeat(-(-T // len(x)), 1).split(T):
            if not torch.equal(call("sae_encode", x=some, **given), call("sae_encode", on=reference, x=some, **given)):
                return False
    return True


def quotients_at_a_half() -> torch.Tensor:
    """Rows of weights that are (n + 1/2) steps, of steps whose inverse is no fp32 and no fp64 number."""
    steps = torch.arange(3.0, 256, 2)[:, None]
    w = (torch.arange(-300, 300) + 0.5) * steps
    return torch.cat([steps * reference.LARGEST, w], 1)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python code beside this file, with this file and torch imported, in a process of its own."""
    imports = (
        "import test_native, torch\nfrom calls import call, plane_of\nfrom cu_fast.kernels import native, reference\n"
    )
    return subprocess.run(
        [sys.executable, "-c", imports + code],
        cwd=Path(__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> str:
    return digest()


# What is asked of each level, in one process: the page behind the plane may end it, so that comes last.
AT_LEVEL = """
import ctypes, json, mmap, sys
w = test_native.quotients_at_a_half()
quotients = all(map(torch.equal, call("pack_digits", codes=w), call("pack_digits", on=reference, codes=w)))
sums = [test_native.sums_are_right(T) for T in (1, 3, 9, 14)]
found = dict(level=native.simd_level(), digest=test_native.digest(), sums=sums, quotients=quotients)
# 100 columns are no whole number of tiles, or of vectors.
codes, z = torch.randn(130, 100), torch.randn(9, 100)
plane = plane_of(codes)
size = plane[0].numel()
pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
if sys.platform == "linux":
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
edge = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages - size).view(plane[0].shape)
edge.copy_(plane[0])
got = call("codebook_quantize", z=z, codes=codes, k=3, scan=(edge, *plane[1:]))
want = call("codebook_quantize", on=reference, z=z, codes=codes, k=3)
print(json.dumps(found | dict(edge=torch.equal(got[1], want[1]))))
"""


@pytest.fixture(scope="module", params=LEVELS)
def at_level(request) -> dict:
    """What a process of its own found whose kernels use an instruction set."""
    level = request.param
    done = run(AT_LEVEL, **environment(level))
    if done.returncode and f"CU_FAST_SIMD is {level}, which this machine lacks" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    found = json.loads(done.stdout)
    assert found["level"] == level
    return found


def opcheck(op: str, given: dict) -> None:
    torch.library.opcheck(getattr(OPS, op).default, (), given)


@needs_native
class TestOperators:
    @pytest.mark.parametrize("op", OPERATORS)
    @pytest.mark.parametrize("mask", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, *heavies(torch.bfloat16, torch.float16)])
    def test_opcheck(self, op, mask, dtype):
        opcheck(op, every_operator(5, 20, 50, 4, dtype=dtype, mask=mask, layout="rows")[op])

    @pytest.mark.parametrize("op", ["codebook_quantize", "sae_encode_topk", "codebook_bottleneck"])
    def test_opcheck_without_a_plane(self, op):
        opcheck(op, every_operator(5, 20, 50, 4, scan=False)[op])

    @pytest.mark.parametrize("mask", [False, True])
    def test_opcheck_without_tokens(self, mask):
        for op, given in every_operator(0, 20, 50, 4, mask=mask).items():
            opcheck(op, given)

    @pytest.mark.parametrize("T", [2, 9])  # codes read in place, codes widened first
    def test_offsets_pass_31_bits(self, T):
        # Rows 2^23 elements apart, the memory between them untouched: the last 44 lie beyond 2^31 elements.
        memory = torch.empty(300 * 2**23, dtype=torch.bfloat16)
        codes = memory.as_strided((300, 16), (2**23, 1))
        codes.copy_(torch.randn(300, 16))
        z, near = torch.randn(T, 16), codes.contiguous()
        got = call("codebook_quantize", z=z, codes=codes, k=300)
        assert all(map(torch.equal, got, call("codebook_quantize", on=reference, z=z, codes=near, k=300)))
        y = call("masked_decode", ids=got[1], weights=got[0], table=codes)
        assert torch.equal(y, call("masked_decode", on=reference, ids=got[1], weights=got[0], table=near))

    def test_expanded_rows(self):
        z, codes = (hurtful.normal(1, 32, seed=seed).expand(rows, -1) for seed, rows in enumerate((6, 40)))
        got = call("codebook_quantize", z=z, codes=codes, k=5)
        assert all(map(torch.equal, got, call("codebook_quantize", on=reference, z=z, codes=codes, k=5)))
        assert got[1][0].tolist() == [0, 1, 2, 3, 4]


@needs_native
class TestChecks:
    """What a caller of torch.ops.cu_fast is told; cu_fast.ops says the same earlier."""

    z, codes = torch.zeros(3, 4), torch.zeros(40, 4)
    table, row = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    ids = torch.zeros(3, 2, dtype=torch.int32)

    def quantize(self, **changes):
        call("codebook_quantize", **{"z": self.z, "codes": self.codes, "k": 2, **changes})

    def decode(self, **changes):
        call("masked_decode", **{"ids": self.ids, "table": self.codes, **changes})

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(z=torch.zeros(4)), r"z must have shape \[T, E\] = \[any, any\], got Float \[4\]"),
            (dict(z=torch.zeros(3, 4).int()), r"z must be Float, BFloat16 or Half, got Int \[3, 4\]"),
            (dict(codes=torch.zeros(40, 65)), r"digits must have shape .* = \[any, 3, 64\], got Char \[40, 3, 128\]"),
            (dict(digits=torch.zeros(40, 3, 64).int()), r"digits must be Char, got Int"),
            (dict(factor=torch.zeros(39)), r"factor must have shape \[C\] = \[40\], got Float \[39\]"),
            (dict(factor=torch.zeros(40).double()), r"factor must be Float, got Double"),
            (dict(bias=torch.zeros(41)), r"bias must have shape \[C\] = \[40\], got Float \[41\]"),
            (dict(k=0), r"k is 0, must be in \[1, C\] = \[1, 40\]"),
            (dict(k=41), r"k is 41, must be in \[1, C\] = \[1, 40\]"),
            (dict(mask_table=table), "must be given together, got only mask_table"),
            (dict(mask_row=row), "must be given together, got only mask_row"),
            (dict(mask_table=table[:, :1], mask_row=row), r"mask_table must have shape .* = \[any, 2\]"),
            (dict(mask_table=table.long(), mask_row=row), "mask_table must be Int, got Long"),
            (dict(mask_table=table, mask_row=row[:2]), r"mask_row must have shape \[T\] = \[3\]"),
            (dict(mask_table=table, mask_row=row.long()), "mask_row must be Int, got Long"),
            (dict(mask_table=table, mask_row=row + 2), r"mask_row\[0\] is 2, must be in \[-1, 2\)"),
            (dict(mask_table=table, mask_row=row - torch.tensor([0, 0, 2])), "mask_row must be Int"),
            (dict(mask_table=table, mask_row=torch.tensor([0, -1, -2]).int()), r"mask_row\[2\] is -2, must be in"),
        ],
    )
    def test_codebook_quantize(self, changes, message):
        with pytest.raises(RuntimeError, match=f"cu_fast: .*{message}"):
            self.quantize(**changes)

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(ids=ids.long()), "ids must be Int, got Long"),
            (dict(ids=ids[:, :0]), "ids must have at least one column"),
            (dict(ids=torch.tensor([[0, -1], [7, 40], [0, 0]]).int()), r"ids\[1, 1\] is 40, must be in \[-1, 40\)"),
            (dict(ids=ids - 2), r"ids\[0, 0\] is -2"),
            (dict(weights=torch.zeros(3, 3)), r"weights must have shape \[T, k\] = \[3, 2\]"),
            (dict(table=torch.zeros(40)), r"table must have shape \[C, D\]"),
            (dict(bias=torch.zeros(5)), r"bias must have shape \[D\] = \[4\]"),
            (dict(residual=torch.zeros(3, 5)), r"residual must have shape \[T, D\] = \[3, 4\]"),
            (dict(residual=torch.zeros(3, 4).int()), "residual must be Float"),
            (dict(mask_table=table, mask_row=row + 5), r"mask_row\[0\] is 5"),
        ],
    )
    def test_masked_decode(self, changes, message):
        with pytest.raises(RuntimeError, match=f"cu_fast: .*{message}"):
            self.decode(**changes)

    def test_sae_encode(self):
        with pytest.raises(
            RuntimeError, match=r"W_digits must have shape .* = \[any, 3, 64\], got Char \[40, 3, 128\]"
        ):
            call("sae_encode", x=self.z, W_enc=torch.zeros(40, 65))
        with pytest.raises(RuntimeError, match=r"b_pre must have shape \[D\] = \[4\], got Float \[3\]"):
            call("sae_encode_topk", x=self.z, W_enc=self.codes, b_pre=torch.zeros(3), k=2)
        with pytest.raises(RuntimeError, match=r"b_enc must have shape \[E\] = \[40\], got Float \[4\]"):
            call("sae_encode", x=self.z, W_enc=self.codes, b_enc=torch.zeros(4))


@needs_native
class TestSameBits:
    """Instruction set, threads and the process's floating-point mode change nothing."""

    def test_simd_levels(self, at_level, expected):
        assert at_level["digest"] == expected

    def test_sums_at_their_limits(self, at_level):
        assert at_level["sums"] == [True] * 4

    @pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
    def test_nothing_behind_the_plane_is_read(self, at_level):
        assert at_level["edge"]

    def test_quotients_at_a_half(self, at_level):
        w = quotients_at_a_half()
        step = call("pack_digits", on=reference, codes=w)[1]
        exact = (step.double() * reference.LARGEST >= w[:, 0].double()) & (step % 1 == 0)
        assert exact.sum() > 20
        assert at_level["quotients"]

    @pytest.mark.parametrize("threads", [2, 5])
    @pytest.mark.parametrize("T", [1, 200])
    def test_threads(self, threads, T):
        # Large enough that tokens, and for a single one codes, are split.
        given = every_operator(T, 128, 4000, 40, seed=T)
        before = torch.get_num_threads()
        results = []
        for n in (1, threads):
            torch.set_num_threads(n)
            results.append(tensors(given))
        torch.set_num_threads(before)
        one, many = results
        assert all(torch.equal(a, b) for op in given for a, b in zip(one[op], many[op]))

    def test_flush_denormal(self):
        # Scores next to the smallest that there are, codes with denormal entries, and a decoder all of whose products and
        # sums are denormal. Compared as bits: flushed, they would equal zero.
        done = run("""
z, codes = torch.randn(70, 64) * 1e-38, torch.randn(5000, 64)
rows, mixed = torch.randn(9, 64), torch.randn(5000, 64)
mixed[:2500, :], rows[:, 1:] = torch.tensor([1e-11] + [1e-41] * 63), 1e-4
ids, weights = torch.randint(0, 5000, (70, 4)).int(), torch.randn(70, 4) * 1e-41
def results():
    scores, chosen, _ = call("codebook_quantize", z=z, codes=codes, k=9)
    # Large enough to be scanned, with codes whose last entries are denormal, and products that are.
    plane = plane_of(mixed)
    scanned = call("codebook_quantize", z=rows, codes=mixed, k=9, scan=plane)[:2]
    dense = call("sae_encode", x=z, W_enc=codes, relu=True)
    y = call("masked_decode", ids=ids, weights=weights, table=codes)
    # The reference sets no mode, and its scores need none.
    plain = call("codebook_quantize", on=reference, z=z, codes=codes, k=9)[:2]
    assert torch.equal(plain[0], scores) and torch.equal(plain[1], chosen)
    return [t.view(torch.int32) for t in (scores, chosen, dense, y, *scanned, *plane[1:])]
want = results()
assert all(t.count_nonzero() > t.numel() // 3 for t in want[:4])
tiny = torch.tensor(1e-40)
assert torch.set_flush_denormal(True) and (tiny * 1).view(torch.int32) == 0
got = results()
assert (tiny * 1).view(torch.int32) == 0, "the mode was not restored"
assert [torch.equal(a, b) for a, b in zip(got, want)] == [True] * len(want)
""")
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in UPWARD, reason="the value of FE_UPWARD")
    def test_rounding_mode(self):
        upward = UPWARD[platform.machine()]
        libm = ctypes.CDLL("libm.so.6")
        given = every_operator(9, 64, 300, 5)
        want = tensors(given)
        torch.set_num_threads(1)
        libm.fesetround(upward)
        try:
            got = tensors(given)
            # Of x87, which fegetround reads, and of SSE, which torch computes with.
            assert libm.fegetround() == upward and torch.ones(1) + 1e-9 > 1, "the mode was not restored"
        finally:
            libm.fesetround(0)
        assert all(torch.equal(a, b) for op in given for a, b in zip(got[op], want[op]))


class TestLoading:
    @needs_native
    def test_level_is_known(self):
        assert native.failure() is None
        assert native.simd_level() in LEVELS

    @needs_native
    @pytest.mark.parametrize("level", ["sse", "AVX2"])
    def test_unknown_level_is_an_error_at_the_first_call(self, level):
        first = "call('sae_encode', x=torch.ones(2, 4), W_enc=torch.ones(3, 4))"
        done = run(f"print('loaded', native.available())\n{first}", CU_FAST_SIMD=level)
        assert done.stdout.split() == ["loaded", "True"]
        assert f"CU_FAST_SIMD is '{level}', must be scalar, avx2, avx512, amx or neon" in done.stderr

    @needs_native
    def test_empty_level_is_no_choice(self):
        assert run("print(native.simd_level())", CU_FAST_SIMD="").stdout.split() == [native.simd_level()]

    def test_missing_library(self, tmp_path):
        assert re.search(r"was not built; install a C\+\+20 compiler", native.load(tmp_path / "_C.abi3.so"))

    def test_broken_library(self, tmp_path):
        broken = tmp_path / "_C.abi3.so"
        broken.write_bytes(b"not a library")
        assert re.search(r"_C.abi3.so cannot be loaded into torch .*: .*", native.load(broken))

    def test_without_the_library(self, tmp_path):
        # A copy of the package as it is where nothing could be compiled.
        package = tmp_path / "cu_fast"
        package.mkdir()
        for room in ("kernels", "ops"):
            shutil.copytree(native.LIBRARY.with_name(room), package / room)
        (package / "__init__.py").touch()
        code = (
            "import torch\nfrom cu_fast import ops\nfrom cu_fast.kernels import native\nassert not native.available()\n"
            "print(native.failure())\n"
            "print(ops.sae_encode(torch.ones(1, 4), ops.pack_codes(torch.ones(1, 4), 'dot')).item())\n"
            "try: native.simd_level()\nexcept RuntimeError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        reason, score, error = done.stdout.splitlines()
        assert "was not built" in reason and error == reason and score == "4.0"


class TestCudaFailure:
    """Why the CUDA kernels cannot be used, for each reason."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        """Makes this process look like one with a GPU, as far as cuda_failure() looks."""

        def pretend(capability=(9, 0), built="80;90a;PTX 90", driver=""):
            monkeypatch.setattr(native, "_failure", None)
            monkeypatch.setattr(native, "cuda_build", lambda: built)
            monkeypatch.setattr(OPS, "cuda_driver_failure", lambda: driver, raising=False)
            monkeypatch.setattr(torch.version, "cuda", "13.0")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"number {device}")

        return pretend

    def test_none(self, gpu):
        gpu()
        assert native.cuda_failure() is None

    def test_no_library(self, gpu, monkeypatch):
        gpu()
        monkeypatch.setattr(native, "_failure", "it is missing")
        assert native.cuda_failure() == "it is missing"

    def test_library_without_cuda(self, gpu):
        gpu(built="")
        assert re.search(r"_C.abi3.so was built without CUDA; .* CU_FAST_CUDA=1", native.cuda_failure())

    def test_torch_without_cuda(self, gpu, monkeypatch):
        gpu()
        monkeypatch.setattr(torch.version, "cuda", None)
        assert native.cuda_failure().startswith(f"torch {torch.__version__} was built without CUDA; install")

    def test_torch_for_amd(self, gpu, monkeypatch):
        gpu()
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert native.cuda_failure() == (
            f"torch {torch.__version__} was built for AMD GPUs, the CUDA kernels are for NVIDIA's"
        )

    def test_no_gpu(self, gpu, monkeypatch):
        gpu()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reason = native.cuda_failure()
        assert reason.startswith("torch.cuda.is_available() is False; check with nvidia-smi")
        assert reason.endswith("its driver is new enough for torch's CUDA 13.0")

    def test_old_driver(self, gpu):
        gpu(driver="it is old")
        assert native.cuda_failure() == "it is old"

    @needs_native
    @pytest.mark.skipif(native.cuda_build() == "" or torch.cuda.is_available(), reason="needs CUDA and no driver")
    def test_no_driver(self):
        assert OPS.cuda_driver_failure().startswith("the NVIDIA driver is older than CUDA ")

    def test_old_gpu(self, gpu):
        gpu((7, 5))
        assert native.cuda_failure(1).startswith(
            "the GPU number 1 has compute capability 7.5, the CUDA kernels need 8.0"
        )

    def test_gpu_that_was_not_built_for(self, gpu):
        gpu((8, 9), built="90a")
        assert native.cuda_failure().endswith("was built for 90a; install cu-fast again with CU_FAST_ARCHS='90a;89'")

    @pytest.mark.parametrize(
        "arch, runs, does_not",
        [
            ("80", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
            ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
            ("90a", [(9, 0)], [(8, 9), (10, 0)]),
            ("100f", [(10, 0), (10, 3)], [(12, 0)]),
            ("PTX 90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ],
    )
    def test_what_runs_where(self, arch, runs, does_not):
        assert all(native._runs(arch, *gpu) for gpu in runs)
        assert not any(native._runs(arch, *gpu) for gpu in does_not)

    def test_importing_leaves_cuda_alone(self):
        assert run("print(torch.cuda.is_initialized())").stdout.split() == ["False"]

    @needs_native
    def test_this_library(self):
        assert native.cuda_build() == OPS.cuda_build()
        if not torch.cuda.is_available():
            assert native.cuda_failure() is not None
