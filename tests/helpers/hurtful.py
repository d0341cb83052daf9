"""Inputs made to hurt, shared by the operator tests: ragged, strided, tied, huge, denormal, faulty, all deleted."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
except ImportError:  # a GPU machine may lack it, and the tests there do without
    st = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (
    "gaussian", "tied", "equal", "clustered", "huge", "denormal", "faulty", "zeros",
    "outliers", "clusters20", "mean", "mixed",
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, width: int, kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, width] of the given kind; rows of "faulty" hold a NaN or an Inf here and there."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g)
    if kind == "tied":
        x = torch.randint(-1, 2, (rows, width), generator=g).float()
        x[rows // 2 :] = x[: rows - rows // 2].clone()
    elif kind == "equal":
        x = x[:1].expand(rows, width).clone()
    elif kind == "clustered":
        x = x[:1] + 1e-4 * x
    elif kind == "huge":
        x = x * (3e38 if dtype != torch.float16 else 6e4) / 4
    elif kind == "denormal":
        x = x * (1e-42 if dtype != torch.float16 else 1e-7)
    elif kind == "faulty":
        holes = torch.rand(rows, width, generator=g)
        x[holes < 0.1 / max(width, 1)] = torch.nan
        x[holes > 1 - 0.1 / max(width, 1)] = torch.inf
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "outliers":
        columns = torch.randperm(width, generator=g)[: max(1, min(4, width // 8))]
        x[:, columns] *= 10 ** (1.5 + 1.5 * torch.rand(len(columns), generator=g))
    elif kind == "clusters20":
        centres = torch.randn(20, width, generator=g)
        x = centres[torch.randint(0, 20, (rows,), generator=g)] + 1e-4 * x
    elif kind == "mean":
        x = x + 4 * torch.randn(1, width, generator=g)
    elif kind == "mixed":
        x = mixed(x, dtype, g)
    return x.to(dtype)


def mixed(x: Tensor, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Normal rows beside rows 1e30 times larger and smaller, zero, near the type's limits, or with NaN or Inf."""
    half = dtype == torch.float16
    what = torch.randint(0, 12, (x.shape[0],), generator=g)
    for number, factor in enumerate((1e3, 1e-3, 1.5e4, 1e-7, 0) if half else (1e30, 1e-30, 1e38, 1e-42, 0)):
        x[what == number] *= factor
    x[what == 5, :1], x[what == 6, -1:] = torch.nan, torch.inf
    return x


def strided(x: Tensor, how: str) -> Tensor:
    """The same values behind another memory layout."""
    if how == "rows":
        return torch.stack([x, torch.full_like(x, 7)], 1)[:, 0]
    if how == "columns":
        return torch.stack([x, torch.full_like(x, 7)], 2)[:, :, 0]
    if how == "transposed":
        return x.T.contiguous().T
    return x


def masks(T: int, C: int, share: float, seed: int, U: int = 3) -> tuple[Tensor, Tensor]:
    """A table of U masks that delete about the given share (1: everything), and a row for each token, -1 included."""
    g = torch.Generator().manual_seed(seed)
    words = (C + 31) // 32
    bits = torch.rand(U, words, 32, generator=g) < share
    table = (bits.long() << torch.arange(32)).sum(2)
    table = torch.where(table >= 2**31, table - 2**32, table).int()
    return table, torch.randint(-1, U, (T,), generator=g, dtype=torch.int32)


LAYOUTS = ("plain", "rows", "columns", "transposed")
SHARES = (None, 0.0, 0.01, 0.5, 0.97, 1.0)
if st is not None:
    layouts = st.sampled_from(LAYOUTS)
    dtypes = st.sampled_from(DTYPES)
    kinds = st.sampled_from(KINDS)
    seeds = st.integers(0, 2**31)
    shares = st.sampled_from(SHARES)


def equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal, with NaN equal to NaN: the same values in the same places, shape and dtype included."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
