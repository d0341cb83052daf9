"""The plane of the certified scan and the bound that it proves: rebuilt in fp64, and never exceeded."""

from __future__ import annotations

import math
import sys

import hurtful
import pytest
import torch
from calls import call, cosine, plane_of
from hurtful import normal
from test_scan import GROUP, INF, NAN, check
from tiers import heavies

from cu_fast.kernels import native, reference

pytestmark = pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library was not built")


PACKERS = {"native": torch.ops.cu_fast, "pytorch": reference}  # the second makes the planes of GPUs
packer = torch.ops.cu_fast


# -- the plane -------------------------------------------------------------------------------------------------


class Unpacked:
    """A plane read back in fp64: bytes q [C, E], and its terms by name, each [C]. What it holds are the codes' integers."""

    def __init__(self, codes, factor=None):
        digits, step, _ = reference.pack_digits(codes)
        self.C, self.E = codes.shape
        self.codes = reference.integers_of(digits, self.E).double()
        self.inv = (step if factor is None else factor).double()
        self.plane, self.terms, mean = plane_of(codes, factor, on=packer)
        self.mean = mean.double()
        groups = (self.C + GROUP - 1) // GROUP
        assert self.plane.shape == (groups, (self.E + 3) // 4, GROUP, 4) and self.plane.dtype == torch.uint8
        assert self.terms.shape == (groups, 3 * GROUP + 4) and self.terms.dtype == torch.float32
        assert mean.shape == (self.E,) and mean.dtype == torch.float32
        self.all_q = self.plane.permute(0, 2, 1, 3).reshape(groups * GROUP, -1).double() - 128
        self.q = self.all_q[: self.C, : self.E]
        per_code = self.terms[:, : 3 * GROUP].double().reshape(groups, 3, GROUP)
        self.scale, self.residual, self.size = per_code.transpose(0, 1).reshape(3, -1)
        self.largest = dict(zip(("scale", "residual", "size", "magnitude"), self.terms[:, 3 * GROUP :].double().T))
        self.bounded = self.residual[: self.C].isfinite()
        # Where the factor is 0 the step cannot be told from the scale, and nothing depends on it.
        self.d = self.codes - self.mean
        self.step = (self.d.abs().amax(1) / 127).clamp(min=1)
        norms = self.codes.norm(dim=1) + self.mean.norm() + 2 * self.step * self.q.norm(dim=1)
        self.magnitude = norms * self.inv.abs()

    def group_max(self, values):
        padded = torch.zeros(self.terms.shape[0] * GROUP).double()
        padded[: self.C] = values
        return padded.reshape(-1, GROUP).amax(1)


def bounds_tightly(bound, value):
    return bool(((bound >= value) & (bound <= value * (1 + 1e-5) + 1e-44)).all())


PLANES = {
    "gaussian": lambda C, E: normal(C, E),
    "bf16": lambda C, E: normal(C, E).bfloat16(),
    "fp16": lambda C, E: normal(C, E).half(),
    "mean": lambda C, E: normal(C, E) + 4 * normal(1, E, seed=9),
    "outliers": lambda C, E: hurtful.matrix(C, E, "outliers", torch.float32, 3),
    "mixed": lambda C, E: hurtful.matrix(C, E, "mixed", torch.float32, 4),
    "zeros": lambda C, E: torch.zeros(C, E),
    "equal": lambda C, E: normal(1, E).expand(C, E).contiguous(),
    "denormal": lambda C, E: normal(C, E) * 1e-42,
}


class TestPlane:
    @pytest.fixture(params=PACKERS, autouse=True)
    def packer(self, request, monkeypatch):
        monkeypatch.setattr(sys.modules[__name__], "packer", PACKERS[request.param])

    @pytest.mark.parametrize("norms", ["none", "cosine", "signed"])
    @pytest.mark.parametrize("kind", PLANES)
    @pytest.mark.parametrize("C, E", [(200, 33), (64, 64), (5, 1)])
    def test_bounds_hold_and_are_tight(self, C, E, kind, norms):
        codes = PLANES[kind](C, E)
        factor = {"none": None, "cosine": cosine(codes), "signed": normal(C, seed=5) * 2**-20}[norms]
        p = Unpacked(codes, factor)
        use, inv = p.bounded, p.inv.abs()
        step = p.step[use]
        assert p.q[use].abs().le(127).all()
        torch.testing.assert_close(p.scale[:C][use], step * p.inv[use], rtol=2**-22, atol=1e-44)
        residual = (p.d[use] - step[:, None] * p.q[use]).norm(dim=1) * inv[use]
        size = (step[:, None] * p.q[use]).norm(dim=1) * inv[use]
        # What fp64 leaves of a difference that cancels is no more than this.
        assert (p.residual[:C][use] >= residual * (1 - 1e-7)).all()
        assert (p.residual[:C][use] <= residual * (1 + 1e-5) + 1e-12 * size + 1e-44).all()
        assert bounds_tightly(p.size[:C][use], size * (1 - 1e-9))
        # Rounded to nearest: what bounds the error of outliers by half a step.
        assert ((p.d[use] - step[:, None] * p.q[use]).abs() <= step[:, None] * 0.5000001).all()
        zero = torch.zeros(C).double()
        assert torch.equal(p.largest["scale"], p.group_max(p.scale[:C].abs()))
        assert torch.equal(p.largest["residual"], p.group_max(p.residual[:C]))
        assert torch.equal(p.largest["size"], p.group_max(p.size[:C]))
        assert bounds_tightly(p.largest["magnitude"], p.group_max(torch.where(use, p.magnitude, zero)) * (1 - 1e-9))

    @pytest.mark.parametrize("C, E", [(1, 1), (64, 4), (65, 7), (130, 18)])
    def test_layout_and_padding(self, C, E):
        codes = normal(C, E) * 10
        plane = plane_of(codes, on=packer)[0]
        p = Unpacked(codes)
        want = (p.d / p.step[:, None]).round()  # a lone code is its own mean: nothing is left
        for j in (0, C // 2, C - 1):
            for e in (0, E // 2, E - 1):
                assert plane[j // GROUP, e // 4, j % GROUP, e % 4] == want[j, e] + 128
        assert (p.all_q[C:] == 0).all() and (p.all_q[:, E:] == 0).all()
        assert (torch.stack([p.scale, p.residual, p.size])[:, C:] == 0).all()

    @pytest.mark.parametrize("share, centred", [(0.0, False), (0.09, False), (0.11, True), (0.9, True)])
    def test_centred_where_the_mean_takes_a_tenth(self, share, centred):
        p = normal(500, 24).double()
        p -= p.mean(0)
        mean = normal(24, seed=1).double()
        mean *= (share / (1 - share) * p.square().sum(1).mean()).sqrt() / mean.norm()
        p = ((p + mean) * 1e5).round().int()
        factor = torch.ones(500) * 2.0**-20
        broken = torch.cat([p, torch.full((3, 24), 8_000_000, dtype=torch.int32)])
        faulty = torch.cat([factor, torch.tensor([NAN, INF, 2.0**41])])
        for given, factors in ((p, factor), (broken, faulty)):  # codes without a bound have no say
            packed_mean = packer.pack_scan(reference.digits_of(given), factors, 24)[2]
            want = p.double().mean(0).float() if centred else torch.zeros(24)
            torch.testing.assert_close(packed_mean, want, rtol=1e-6, atol=0)

    def test_codes_without_a_bound(self):
        with_bound = torch.tensor([0.0, 1.0, 2.0**-123, 2.0**40])
        without = torch.tensor([NAN, INF, 2.0**-123 * 0.999, 2.0**40 * 1.001])
        factor = torch.cat([with_bound, -with_bound, without, -without]).repeat(3)
        bounded = (torch.arange(len(factor)) % 16) < 8
        p = torch.zeros(len(factor), 3, dtype=torch.int32)
        p[:16, 1], p[16:32, 1] = reference.LARGEST, -reference.LARGEST  # so that there is no mean
        plane, terms, mean = packer.pack_scan(reference.digits_of(p), factor, 3)
        assert not mean.any() and terms[0, 3 * GROUP + 1] == INF
        scale, residual, size = terms[0, : 3 * GROUP].reshape(3, GROUP)[:, : len(factor)]
        assert torch.equal(residual.isfinite(), bounded) and not residual.isnan().any()
        assert not scale[~bounded].any() and not size[~bounded].any()
        assert (plane[0, 0, : len(factor)][~bounded] == 128).all()

    def test_codes_next_to_their_mean(self):
        """A step is 1 at least: below fp32's range there is no scale."""
        p = torch.tensor([[reference.LARGEST, 1000], [reference.LARGEST, 1003]], dtype=torch.int32)
        plane, terms, mean = packer.pack_scan(reference.digits_of(p), torch.full((2,), 2.0**-123), 2)
        assert mean.tolist() == [reference.LARGEST, 1001.5] and (terms[0, :2] == 2.0**-123).all()
        assert (plane[0, 0, :2, :2].int() - 128).tolist() == [[0, -2], [0, 2]]

    @pytest.mark.parametrize("shift", [0, 3])
    def test_does_not_depend_on_the_threads(self, shift):
        codes, before = normal(9000, 40) + shift, torch.get_num_threads()
        planes = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            planes.append(plane_of(codes, on=packer))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in planes[1:] for a, b in zip(planes[0], other))
        assert (planes[0][2] != 0).all() == (shift != 0)

    def test_codes_are_not_written_to(self):
        codes = normal(100, 10)
        digits, factor, _ = reference.pack_digits(codes)
        before = codes.clone(), digits.clone(), factor.clone()
        packer.pack_digits(codes)
        packer.pack_scan(digits, factor, 10)
        assert all(map(torch.equal, (codes, digits, factor), before))

    def test_strided_codes(self):
        codes = normal(100, 10)
        for layout in ("rows", "columns", "transposed"):
            made = (packer.pack_digits(some) for some in (hurtful.strided(codes, layout), codes))
            assert all(map(torch.equal, *made))

    @pytest.mark.parametrize("dtype", hurtful.DTYPES)
    @pytest.mark.parametrize("kind", hurtful.KINDS)
    @pytest.mark.parametrize("C, E", [(70, 33), (64, 64), (3, 1), (5, 130)])
    def test_digits_are_the_definition(self, C, E, kind, dtype):
        codes = hurtful.matrix(C, E, kind, dtype, 3)
        digits, step, squares = packer.pack_digits(codes)
        assert digits.shape == (C, 3, (E + 63) // 64 * 64) and not digits[:, :, E:].any()
        p = reference.integers_of(digits, E)
        assert torch.equal(digits, reference.digits_of(p)) and p.abs().max() <= reference.LARGEST
        w = codes.double()
        faulty, most = ~w.isfinite().all(1), w.abs().amax(1)
        assert torch.equal(step.isnan(), faulty) and not p[faulty].any()
        used = ~faulty & (most >= 2.0**-100)
        assert not p[~used].any() and not step[~used & ~faulty].any()
        assert torch.equal(p[used], (w[used] / step[used, None].double()).round().int())
        below = torch.nextafter(step[used], torch.zeros(())).double()
        assert (step[used].double() * reference.LARGEST >= most[used]).all() and (
            below * reference.LARGEST < most[used]
        ).all()
        exact = [sum(entry * entry for entry in row) for row in p.tolist()]
        assert squares.tolist() == torch.tensor(exact).float().tolist()


# -- the certificate -------------------------------------------------------------------------------------------


def emulated(z, codes, factor, bias, byte_range):
    """approx and its bound by core/scan.h, in fp64 and without a line of the kernel: [T, C] each.

    byte_range: of a CPU's rows of one byte; None = a GPU's, of two digits, without outliers.
    """
    q, unit = reference.fix_rows(z)
    p, q, unit = Unpacked(codes, factor), q.double(), unit.double()[:, None]
    clip = q.abs().amax(1, keepdim=True)
    for _ in range(7):
        fits = (q.abs() > clip / 2).sum(1, keepdim=True) <= max(4, p.E // 64)
        clip = torch.where(fits, clip / 2, clip)
    step = torch.full_like(clip, 256.0) if byte_range is None else (clip / byte_range).clamp(min=1)
    whole = (q / step).round()
    out = whole.abs() > (byte_range or INF)
    if byte_range is not None:
        high = torch.where(out, (whole / (2 * byte_range)).round(), 0.0)
        assert (whole - 2 * byte_range * high).abs().max() <= byte_range and high.abs().max() <= 64
    approx = unit * (step * p.scale[: p.C] * (whole @ p.q.T) + (q @ p.mean)[:, None] * p.inv)
    norm, norm_in = q.norm(dim=1)[:, None], torch.where(out, 0.0, q).norm(dim=1)[:, None]
    miss = (q - step * whole).norm(dim=1)[:, None].clamp(min=1)
    l1_out = torch.where(out, q.abs(), 0.0).sum(1)[:, None]
    magnitude = p.largest["magnitude"].repeat_interleave(GROUP)[: p.C]
    bound = norm_in * p.residual[: p.C] + miss * p.size[: p.C] + l1_out * p.scale[: p.C].abs() / 2
    bound = unit * (bound + 2**-19 * norm * magnitude) + 2**-120
    if bias is not None:
        approx, bound = approx + bias.double(), bound + 2**-19 * bias.abs().max().double()
    return approx, bound


class TestCertificate:
    @pytest.mark.parametrize("byte_range", [64, 127, None])
    @pytest.mark.parametrize("norms", ["none", "cosine", "biased"])
    @pytest.mark.parametrize("z_kind", ["gaussian", "outliers", "row outliers", "mean", "equal"])
    @pytest.mark.parametrize("code_kind", ["gaussian", "outliers", "mean", "clusters20"])
    def test_bound_holds_and_is_not_vacuous(self, z_kind, code_kind, norms, byte_range):
        T, C, E = 24, 150, 200
        z = hurtful.matrix(T, E, z_kind.replace("row outliers", "gaussian"), torch.float32, 1)
        if z_kind == "row outliers":  # elsewhere in each row
            z = z * torch.where(normal(T, E, seed=8) > 2.4, 300.0, 1.0)
        codes = hurtful.matrix(C, E, code_kind, torch.float32, 2)
        factor = None if norms == "none" else cosine(codes)
        bias = normal(C, seed=3) * 1e4 if norms == "biased" else None
        score = call("sae_encode", on=reference, x=z, W_enc=codes, W_factor=factor, b_enc=bias)
        approx, bound = emulated(z, codes, factor, bias, byte_range)
        error = (approx - score.double()).abs()
        assert (error <= bound).all()
        p = Unpacked(codes, factor)
        largest = z.norm(dim=1)[:, None].double() * p.codes.norm(dim=1) * p.inv
        if code_kind != "outliers":
            assert (bound <= 0.04 * largest + 2e-6 * 4e4 * 10).all()
        if norms != "biased":  # whose rounding is allowed for, but hardly happens
            assert error.max() > 0.02 * bound.max()


# A selection between two rivals whose scores differ by next to nothing, where the scan is off by nearly all that its
# bound allows, and in the wrong direction for each: a bound smaller by a tenth would lose the better one.


def rivals(z, first, second, off, order, rows, C=2048):
    """Checks that the better of two codes comes out, each of whose scores the scan misses by `off`, for every copy of z.

    Bias makes rivals of them, and puts the others, which are zero, so little below that the scan soon knows well what
    a code has to reach.
    """
    places = {"better first": (3, 1400), "better last": (1400, 3), "same group": (1400, 1401)}[order]
    scores = call("sae_encode", on=reference, x=z[None], W_enc=torch.stack([first, second]))[0]
    codes, bias = torch.zeros(C, len(z)), (scores[0] - 0.1 * off).repeat(C)
    codes[places[0]], codes[places[1]] = first, second
    bias[places[0]], bias[places[1]] = 0.0, scores[0] - scores[1] - 0.01 * off
    got = check(z.repeat(rows, 1), codes, bias=bias, k=1)
    assert got[1].tolist() == [[places[0]]] * rows


@pytest.mark.parametrize("order", ["better first", "better last", "same group"])
@pytest.mark.parametrize("byte_range", [64, 127])  # of a row's bytes: one of them is this machine's
@pytest.mark.parametrize("rows", [1, 9])  # matrix tiles take no fewer than 8
class TestNoSlackIsLeftOver:
    E = 256

    def signs(self, seed=0):
        return normal(self.E, seed=seed).sign()

    def test_residual_of_the_codes(self, order, byte_range, rows):
        # The row points where both codes were rounded from: <z, d - step q> is all of ||z|| ||d - step q||.
        z, q = self.signs(), torch.randint(-100, 101, (2, self.E), generator=torch.Generator().manual_seed(1)).float()
        q[:, 0] = 127 * z[0]
        off = 0.49 * z
        off[0] = 0
        rivals(z, (q[0] + off) / 127, (q[1] - off) / 127, float(z @ off) / 127, order, rows)

    def test_rounding_of_the_row(self, order, byte_range, rows):
        # Codes of one magnitude are exact; the row is half a unit off, in their direction.
        code = self.signs()
        bytes_of_z = torch.randint(-byte_range + 1, byte_range, (self.E,), generator=torch.Generator().manual_seed(2))
        z = bytes_of_z.float() + 0.49 * code
        z[0] = byte_range
        rivals(z, code, -code, 0.49 * self.E, order, rows)

    def test_rounding_beside_an_outlier(self, order, byte_range, rows):
        # All but one entry are less than half of the unit that the outlier leaves them, whether a row's bytes are one or two.
        code = self.signs()
        z = 127 * code
        z[0] = 2**22
        rivals(z, code, -code, 127.0 * (self.E - 1), order, rows)

    def test_outliers(self, order, byte_range, rows):
        # Few entries, 128 times the others, and there both codes are half a step off.
        z = self.signs()
        z[1:5] *= 128
        q = torch.randint(-100, 101, (2, self.E), generator=torch.Generator().manual_seed(3)).float()
        q[:, 0] = 127
        q[0, 1:5], q[1, 1:5] = -100 * z[1:5].sign(), 100 * z[1:5].sign()  # the worst signs for a wrong sum of theirs
        off = torch.zeros(self.E)
        off[1:5] = 0.49 * z[1:5].sign()
        rivals(z, (q[0] + off) / 127, (q[1] - off) / 127, float(z @ off) / 127, order, rows)


@pytest.mark.parametrize(
    "E, C, k, bytes, digits",  # with the safe threshold, the k-th lower bound in the sample: 3 to 10 times as many
    [
        (512, 25_000, 8, 220, 150),
        *heavies(
            (512, 25_000, 64, 600, 400),
            (4096, 16_384, 64, 3000, 800),
            (2048, 65_536, 64, 2500, 1000),
        ),
    ],
)
def test_candidates_of_the_guess(E, C, k, bytes, digits):
    """Codes per row whose upper bound reaches the guess that the scan starts from, which is none too high."""
    z, codes = normal(16, E), normal(C, E, seed=1)
    groups = C // GROUP
    # A sixteenth of the codes: on a CPU at most 2,048. On a GPU, which takes digits, at most 8,192, or 16 k, and then the
    # largest of every four.
    on_gpu = math.ceil(max(min(C / 16, 8192), 16 * k) / GROUP)
    for byte_range, samples, of, most in ((127, min(math.ceil(groups / 16), 32), 1, bytes), (None, on_gpu, 4, digits)):
        sampled = (torch.arange(samples) * groups // samples)[:, None] * GROUP + torch.arange(GROUP)
        expected = k * samples / groups
        rank = math.ceil(expected + 3 * math.sqrt(expected) + 1)
        approx, bound = emulated(z, codes, cosine(codes), None, byte_range)
        guess = approx[:, sampled.flatten()].reshape(16, -1, of).amax(2).topk(rank).values[:, -1:]
        assert (approx.topk(k).values[:, -1:] >= guess).all()
        assert (approx + bound >= guess).sum(1).double().mean() <= most
