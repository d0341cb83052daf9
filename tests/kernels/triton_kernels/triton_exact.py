"""Fixed point and exact sums as Triton kernels, as triton_interpreted.py has the operators: TRITON_INTERPRET=1 python tests/kernels/triton_kernels/triton_exact.py"""

from __future__ import annotations

import hurtful
import torch
from triton_harness import bf16, by_reference, by_triton, fp16, fp32, on, report, same

from cu_fast.kernels import reference


def rows_of(kind: str, dtype: torch.dtype, E: int) -> torch.Tensor:
    """What is hard to put into fixed point: "ties" are halves between integers, "edges" next to where the shift changes."""
    if kind == "ties":
        x = torch.arange(E, dtype=fp32).expand(3, E) * torch.tensor([[1.0], [-1.0], [3.0]]) + 0.5
        x[:, 0] = 2.0**22 - 0.5  # rows are in units of a half, or of a whole
        return torch.cat([x, 2 * x, x / 2**30])
    if kind == "edges":
        most = torch.tensor(float(reference.LARGEST)) * 2.0 ** torch.arange(-140, 104, 9)
        beyond = torch.nextafter(most, torch.tensor(torch.inf))
        sizes = torch.cat([most, beyond, 2.0 ** torch.arange(-148.0, 128.0, 11), torch.tensor([torch.finfo(fp32).max])])
        x = hurtful.matrix(len(sizes), E, "gaussian", fp32, 1).clamp(-1, 1) * sizes[:, None]
        x[:, E // 2] = -sizes
        return x
    return hurtful.matrix(24, E, kind, dtype, 1)


FIXED = [
    ("mixed", fp32, 1500, True, "plain"), ("mixed", bf16, 65, False, "rows"), ("mixed", fp16, 64, True, "rows"),
    ("ties", fp32, 40, False, "plain"), ("edges", fp32, 7, False, "rows"), ("faulty", bf16, 3, True, "plain"),
    ("zeros", fp16, 1, False, "plain"), ("denormal", fp32, 63, False, "plain"), ("huge", fp32, 64, False, "plain"),
]  # fmt: skip


def fixed_rows(kind: str, dtype: torch.dtype, E: int, has_pre: bool, layout: str) -> None:
    """Digits and units of rows, whatever they hold; and nothing behind them is written to."""
    from cu_fast.kernels.triton import launch
    from cu_fast.kernels.triton.fixed import Rows

    x, pre = rows_of(kind, dtype, E), hurtful.matrix(1, E, "gaussian", fp32, 2)[0] if has_pre else None
    q, unit = reference.fix_rows(x.float() if pre is None else x.float() - pre)
    digits = reference.digits_of(q)
    rows = Rows(len(x) + 1, digits.shape[2], on(x).device)
    rows.digits[-1] = 77
    rows.fix(on(hurtful.strided(x, layout)), on(pre), launch.choose("fix_rows", "sm_80", 24, E, 1, 1))
    same([rows.digits[:-1]], [digits])
    assert (rows.digits[-1] == 77).all()
    some = (q != 0).any(1) | unit.isnan()  # of a row of zeros it does not matter
    same([rows.units.cpu()[:-1][some]], [unit[some]])
    assert some.any() or kind in ("zeros", "denormal")


def encode_exactly(E: int) -> None:
    """Rows of every size, beside NaN and Inf; weights of every size, and faulty ones."""
    x = torch.cat([rows_of("mixed", fp32, E)[:16], rows_of("outliers", fp32, E)[:4], rows_of("edges", fp32, E)[::6]])
    W_enc = torch.cat([hurtful.matrix(20, E, "mixed", fp32, 2), hurtful.matrix(7, E, "outliers", fp32, 3)])
    b_enc = hurtful.matrix(1, 27, "gaussian", fp32, 4)[0]
    b_enc[::3], b_enc[1::3] = 0, 1.5 * 2.0**-126 * b_enc[1::3].sign()  # alone, it is cut
    given = dict(x=x, W_enc=W_enc, b_enc=b_enc)
    same([by_triton("sae_encode", **given)], [by_reference("sae_encode", **given)])


def encode_integers(q: torch.Tensor, p: torch.Tensor) -> None:
    """Rows and weights that are integers: their scores are the sums, rounded to fp32."""
    assert (q.abs().amax(1) >= 2**22).all(), "a unit is not 1"
    W_digits, ones = reference.digits_of(p.int()), torch.ones(len(p))
    got = by_triton("sae_encode", x=q.float(), W_digits=W_digits, W_factor=ones)
    same([got], [reference.integer_dot(q.int(), p.int()).float()])


def encode_extreme_digits(T: int, E: int) -> None:
    """Every digit as large as it may be, at the largest width too: no sum of products may leave 32 bits."""
    most, low = reference.LARGEST, 127 * 2**16 - 128 * 2**8 - 128  # digits 127, 127, 127 and 127, -128, -128
    rows = torch.tensor([most, -most, low, -low])[:, None].expand(4, E).clone()
    rows[2:, ::2] *= -1
    encode_integers(rows.repeat(5, 1)[:T], rows)


def encode_rounded_once() -> None:
    """Sums just above the middle of two numbers of fp32, which fp64 rounds to the middle."""
    q = torch.full((17, 1027), 2**22)
    p = torch.full((2, 1027), 2**22)
    q[:, -3:], p[:, -3:] = torch.tensor([2**15, 1, 0]), torch.tensor([2**15, 1, 0])
    p[1] *= -1
    total = reference.integer_dot(q.int(), p.int())
    assert (total.float() != total.double().float()).all()
    encode_integers(q, p)


CASES = {
    **{
        f"fixed: {kind}, {dtype}".replace("torch.", ""): (fixed_rows, kind, dtype, *rest)
        for kind, dtype, *rest in FIXED
    },
    **{f"sae_encode: exact, width {E}": (encode_exactly, E) for E in (1, 3, 63, 64, 65, 512, 4100)},
    **{f"sae_encode: extreme digits, width {E}": (encode_extreme_digits, T, E) for T, E in ((20, 5), (1, 65_535))},
    "sae_encode: rounded once": (encode_rounded_once,),
}


HEAVY = {"sae_encode: exact, width 4100", "sae_encode: extreme digits, width 65535"}


if __name__ == "__main__":
    report(CASES, HEAVY)
