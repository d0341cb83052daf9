"""How the certified scan is asked for: choices, planes that do not fit, other tensors, reports, plans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import call, plane_of
from hurtful import normal
from test_scan import GROUP, same, select

from cu_fast import BottleneckConfig, ops
from cu_fast.kernels import native
from cu_fast.nn import CodebookBottleneck

pytestmark = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")


class TestCalling:
    def test_unknown_scan(self):
        with pytest.raises(ValueError, match="scan is 'int4'; it should be 'auto', 'int8' or 'none'"):
            ops.pack_codes(normal(600, 40), scan="int4")

    @pytest.mark.parametrize(
        "C, E, want",
        [(512, 32, "int8"), (511, 32, "none"), (512, 31, "none"), (512, 32768, "int8"), (512, 32769, "none")],
    )
    def test_auto(self, C, E, want):
        assert ops.choose_scan(C, E) == want
        codes = torch.ones(1, 1).expand(C, E) if E > 40 else normal(C, E)
        if E <= 40:
            assert (ops.pack_codes(codes).scan is not None) == (want == "int8")

    def test_explicit_choices(self):
        assert ops.pack_codes(normal(600, 40), scan="none").scan is None
        assert ops.pack_codes(normal(3, 2), scan="int8").scan is not None

    def test_no_silent_fallback(self):
        with pytest.raises(RuntimeError, match="scan='int8' needs kernels for meta tensors: there are none"):
            ops.pack_codes(torch.ones(600, 40, device="meta"), scan="int8")

    def test_size(self):
        C, E = 4096, 256
        terms = C // GROUP * (3 * GROUP + 4) * 4  # 12 bytes per code
        assert sum(part.nbytes for part in ops.pack_codes(normal(C, E)).scan) == C * E + terms + 4 * E

    def test_digits_and_plane_lie_in_huge_pages(self):
        """In a process of its own: what lies where others were freed has pages that were touched before."""
        enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if not enabled.exists() or "[never]" in enabled.read_text():
            pytest.skip("this system has no transparent huge pages, or they are off")
        done = subprocess.run(
            [sys.executable, "-c", """
import re, torch
from pathlib import Path
from cu_fast.kernels import native
def huge():
    return int(re.search(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1]) // 2048
codes, counts = torch.ones(12_000, 512), [huge()]
digits, step, _ = torch.ops.cu_fast.pack_digits(codes)
counts.append(huge())
plane, *_ = torch.ops.cu_fast.pack_scan(digits, step, 512)
counts.append(huge())
print(*torch.tensor(counts).diff().tolist())
"""],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        digits, plane = map(int, done.stdout.split())
        # 18 and 6 MB. Free memory may be in pieces too small for some of them.
        assert 1 <= digits <= 9 and 1 <= plane <= 3

    def test_too_wide(self):
        wide = torch.zeros(1, 65_536)
        with pytest.raises(RuntimeError, match=r"cu_fast: .*codes are 65536 wide, must be at most 65535"):
            call("pack_digits", codes=wide)
        with pytest.raises(RuntimeError, match=r"cu_fast: .*digits is of rows of 65536 entries, must be at most 65535"):
            select(wide, wide)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda p, t, m: (None, t, m), "scan_plane, scan_terms and scan_mean must be given together"),
            (lambda p, t, m: (p, None, m), "scan_plane, scan_terms and scan_mean must be given together"),
            (lambda p, t, m: (p, t, None), "scan_plane, scan_terms and scan_mean must be given together"),
            (
                lambda p, t, m: (p[:1], t, m),
                r"scan_plane must have shape .* = \[2, 3, 64, 4\], got Byte \[1, 3, 64, 4\]",
            ),
            (lambda p, t, m: (p[:, :2], t, m), r"scan_plane must have shape .* = \[2, 3, 64, 4\]"),
            (lambda p, t, m: (p.char(), t, m), "scan_plane must be Byte, got Char"),
            (lambda p, t, m: (p, t[:, :195], m), r"scan_terms must have shape .* = \[2, 196\], got Float \[2, 195\]"),
            (lambda p, t, m: (p, t[:1], m), r"scan_terms must have shape .* = \[2, 196\]"),
            (lambda p, t, m: (p, t.double(), m), "scan_terms must be Float, got Double"),
            (lambda p, t, m: (p, t, m[:9]), r"scan_mean must have shape \[E\] = \[10\], got Float \[9\]"),
            (lambda p, t, m: (p, t, m.half()), "scan_mean must be Float, got Half"),
        ],
    )
    def test_wrong_planes_are_named(self, change, message):
        codes = normal(100, 10)
        plane = change(*plane_of(codes))
        with pytest.raises(RuntimeError, match=f"cu_fast: .*{message}"):
            select(normal(3, 10), codes, scan=plane)
        with pytest.raises(RuntimeError, match=f"cu_fast: .*{message}"):
            call("sae_encode_topk", x=normal(3, 10), W_enc=codes, k=4, scan=plane)

    def test_strided_planes(self):
        codes = normal(600, 40)
        spread = tuple(torch.stack([t, t], -1)[..., 0] for t in plane_of(codes))
        assert same(select(normal(5, 40), codes, scan=spread), select(normal(5, 40), codes))

    def test_meta(self):
        packed = ops.pack_codes(torch.ones(600, 40, device="meta"))
        assert packed.scan is None and packed.factor.shape == (600,)
        assert ops.codebook_quantize(torch.ones(5, 40, device="meta"), packed, k=3).ids.shape == (5, 3)
        made, real = plane_of(torch.ones(600, 41, device="meta")), plane_of(torch.ones(600, 41))
        assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in real]

    def test_compiled(self):
        def pack_and_select(codes, z):
            packed = ops.pack_codes(codes, scan="int8")
            return packed.scan, ops.codebook_quantize(z, packed, k=5)[:2]

        codes, z = normal(600, 40), normal(7, 40)
        want = pack_and_select(codes, z)
        got = torch.compile(pack_and_select, fullgraph=True, backend="aot_eager")(codes, z)
        assert all(torch.equal(a, b) for one, other in zip(got, want) for a, b in zip(one, other))

    def test_a_bottleneck_reports_it(self):
        for codes, want in ((512, "int8"), (511, "none")):
            config = BottleneckConfig(d_model=32, code_dim=32, num_codes=codes, k=4, activation="none")
            made = CodebookBottleneck(config).eval()
            made.fold()
            assert made.receipt()["scan"] == want
            made.impl = "reference"
            assert made.receipt()["scan"] == "none"
            made.impl, made.scan = "auto", "none"
            made.fold()
            assert made.receipt()["scan"] == "none" and made.folded.codes.scan is None


@pytest.mark.parametrize(
    ("T", "k", "threads", "scan", "plan"),
    [
        (1, 8, 1, True, "int8 scan: 1 x 4 tokens, 1 x 25024 codes, 1 threads"),
        (1, 8, 2, True, "int8 scan: 1 x 4 tokens, 2 x 12544 codes, 2 threads"),
        (512, 8, 2, True, "int8 scan: 2 x 256 tokens, 1 x 25024 codes, 2 threads"),
        (512, 8, 2, False, "every code scored: 4 x 128 tokens, 1 x 25024 codes, 2 threads"),
        (64, 1025, 2, True, "every code scored: 2 x 32 tokens, 1 x 25024 codes, 2 threads"),
    ],
)
def test_the_plan_can_be_printed(T, k, threads, scan, plan):
    """Few tokens share the codes among threads, many share the tokens."""
    assert torch.ops.cu_fast.selection_plan(T, 25_000, 512, k, threads, scan) == plan


def test_the_plan_of_packed_codes():
    packed = ops.pack_codes(torch.ones(600, 64))
    assert ops.selection_plan(5, packed, 4).startswith("int8 scan: 1 x 8 tokens")
    assert ops.selection_plan(5, packed._replace(scan=None), 4).startswith("every code scored")
