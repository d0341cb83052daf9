"""That every CUDA kernel has run, and that none of them reads or writes beyond a tensor. Run on a CPU by the emulation."""

from __future__ import annotations

import csv
import re

import deletions
import emulation
import hurtful
import pytest
import torch
from calls import call, cosine, every_operator
from hurtful import normal
from test_cuda_kernels import bottleneck, deleted, emulated, kernels, plane_of, pytestmark, same, select
from tiers import heavy

from cu_fast.kernels import reference
from cu_fast.kernels.triton import HOME

__all__ = ["pytestmark"]
with (emulation.ROOT / "tests/machine_code.csv").open(newline="") as file:
    SHIPPED = {line["kernel"].replace("> >", ">>") for line in csv.DictReader(file)}


def test_every_kernel_ships():
    sources = "".join(path.read_text() for path in (emulation.ROOT / "csrc/cuda").glob("*.cu"))
    written = set(re.findall(r"CU_FAST_KERNEL\([^)]*\)\s*(\w+)\(", sources))
    assert written == {name.split("<")[0] for name in SHIPPED}, "make machine-code writes tests/machine_code.csv"


def test_every_kernel_that_ships_has_run():
    kernels()
    codes = normal(300, 40, seed=1)
    for name, given in every_operator(3, 40, 300, 4, scan=False).items():
        if name in HOME:  # packing has no kernel: it is the reference, on a GPU
            emulated(name, **given)
    for T, wgmma in ((1, True), (3, True), (30, True), (70, False), (70, True)):
        emulated("sae_encode", x=normal(T, 24), W_enc=normal(40, 24), relu=True, wgmma=wgmma)
        select(normal(T, 40), codes, wgmma=wgmma)
        deleted(deletions.deletion(T, 24, 40, 9))
    for T, wgmma in ((4, True), (8, True), (32, True), (40, False), (73, True)):
        select(normal(T, 40), codes, scan=plane_of(codes), wgmma=wgmma)
    for k, multiprocessors in ((20, 1), (4, 40)):  # blocks of several tiles, in the sample too; of one
        select(normal(72, 40), codes, k=k, scan=plane_of(codes), wgmma=True, multiprocessors=multiprocessors)
    assert kernels() == SHIPPED and len(SHIPPED) > 20


def at_the_end(x: torch.Tensor) -> torch.Tensor:
    """The same rows, aligned for wide loads, though no wide load fits their ends; the last ends with its memory."""
    stride = (x.shape[1] + 7) // 8 * 8
    memory = torch.full(((len(x) - 1) * stride + x.shape[1],), 7.0, dtype=x.dtype)
    return memory.as_strided(x.shape, (stride, 1)).copy_(x)


layouts = pytest.mark.parametrize("layout", [lambda x: x, at_the_end], ids=["plain", "aligned"])


class TestEnds:
    """Shapes that end where their memory ends, and are no multiple of anything. The address sanitizer sees each byte."""

    @pytest.mark.parametrize("dtype", hurtful.DTYPES)
    @pytest.mark.parametrize("T, E, D", [(1, 1, 39), (3, 31, 37), (5, 33, 38), (17, 67, 39), (70, 67, 65)])
    @layouts
    def test_encode(self, layout, T, E, D, dtype):
        x, W_enc = layout(normal(T, D).to(dtype)), layout(normal(E, D, seed=1).to(dtype))
        given = dict(x=x, W_enc=W_enc, b_enc=normal(E), b_pre=normal(D), relu=True)
        assert torch.equal(emulated("sae_encode", **given), call("sae_encode", on=reference, **given))

    @pytest.mark.parametrize("scans", [False, True])
    @pytest.mark.parametrize("dtype", hurtful.DTYPES)
    @pytest.mark.parametrize("T, E, C, k", [(1, 1, 9, 1), (3, 35, 65, 8), (17, 5, 129, 13), (73, 67, 257, 15)])
    @layouts
    def test_select(self, layout, T, E, C, k, dtype, scans):
        z, codes, mask = (
            layout(normal(T, E).to(dtype)),
            layout(normal(C, E, seed=1).to(dtype)),
            hurtful.masks(T, C, 0.3, 2),
        )
        z[0, -1] = 300.0
        factor, bias = cosine(codes), normal(C)
        scaled, plain = (plane_of(codes, factor), plane_of(codes)) if scans else (None, None)
        given = dict(z=z, codes=codes, factor=factor, bias=bias, k=k, mask=mask, scan=scaled)
        assert same(select(**given), call("codebook_quantize", on=reference, **given, return_hits=True))
        x = layout(normal(T, E).to(dtype))
        given = dict(x=x, W_enc=codes, b_enc=bias, b_pre=normal(E), k=k, mask=mask, relu=True, scan=plain)
        assert same(emulated("sae_encode_topk", **given), call("sae_encode_topk", on=reference, **given))

    @pytest.mark.parametrize("dtype", hurtful.DTYPES)
    @pytest.mark.parametrize("T, D, C, k", [(1, 1, 1, 1), (3, 15, 33, 5), (2, 515, 65, 129)])
    @layouts
    def test_decode(self, layout, T, D, C, k, dtype):
        ids = torch.randint(-1, C, (T, k), generator=torch.Generator().manual_seed(1)).int()
        ids[-1, -1] = C - 1
        table, residual = layout(normal(C, D).to(dtype)), layout(normal(T, D, seed=1).to(dtype))
        given = dict(ids=ids, weights=normal(T, k), table=table, bias=normal(D), residual=residual, mean=True)
        given["mask"] = hurtful.masks(T, C, 0.3, 2)
        assert hurtful.equal(emulated("masked_decode", **given), call("masked_decode", on=reference, **given))
        ids[0, 0], ids[-1, 0] = C, -2
        y = emulated("masked_decode", ids=ids, table=table, residual=residual, mean=True)
        assert y[[0, -1]].isnan().all()

    @pytest.mark.parametrize("dtype", hurtful.DTYPES)
    @pytest.mark.parametrize("T, Din, Dout, R", [(1, 1, 1, 1), (3, 39, 38, 9), (9, 37, 39, 9)])
    @layouts
    def test_delete(self, layout, T, Din, Dout, R, dtype):
        for M, scale in ((0, 1), (1, 0), (7, 1), (R, 2)):
            given = deletions.deletion(T, Din, Dout, R, M=M, scale=scale, dtype=dtype, residual=dtype, floor=True)
            given |= {name: layout(given[name]) for name in ("x", "residual", "enc", "dec")}
            given["mask_latents"][:, :1], given["mask_latents"][:, 1:2] = R - 1, -1  # the last row of enc and of dec
            deleted(given)

    @pytest.mark.parametrize("scans", [False, True])
    @pytest.mark.parametrize("reselect", [False, True])
    @pytest.mark.parametrize("T, k", [(3, 4), (19, 13)])
    def test_bottleneck(self, T, k, reselect, scans):
        x, W_enc, codes, table = normal(T, 37), normal(35, 37, seed=1), normal(129, 35, seed=2), normal(129, 37, seed=3)
        (masks, row), receipts = hurtful.masks(T, 129, 0.3, 2), torch.zeros(2, 2, dtype=torch.int64)
        row[0] = 7  # does not exist
        given = dict(
            x=x, W_enc=W_enc, b_enc=normal(35), b_pre=normal(37), relu=True, codes=codes, bias=normal(129), k=k,
            reselect=reselect, scan=plane_of(codes) if scans else None, table=table, b_dec=normal(37),
            score_weights=True, mean=True,
        )  # fmt: skip
        got = bottleneck(**given, mask=(masks, row), receipt=receipts[0])
        exists = masks, row.clamp(max=2)
        want = call("codebook_bottleneck", on=reference, **given, mask=exists, receipt=receipts[1])
        assert got[0].isnan().all() and torch.equal(got[1:], want[1:])


@heavy
@emulation.needs_address_sanitizer
def test_nothing_is_read_or_written_beyond_a_tensor():
    done = emulation.run_under_address_sanitizer([__file__, "-s", "-k", "TestEnds"])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]
