"""The kernels on a GPU: every operator against the CPU, bit for bit. Skipped without one; see docs/gpu.md.

The CUDA kernels, the Triton kernels, or, as a rehearsal, the CPU's: gpu_examples.py.
"""

from __future__ import annotations

import gpu_examples as gpu
import hurtful
import pytest
import torch
from gpu_examples import DEVICE, DRY, IMPL, identical, on

from cu_fast import ops

pytestmark = pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))
on_a_gpu = pytest.mark.skipif(DRY, reason="the CPU looks at the values and raises")

EACH = 8  # examples of a test: so that a failure names few
SHARED = {"similarity": "cosine", "bias": None, "mask": (None, None), "hits": False}


def agree(run, example, work):
    """The GPU's answer is the CPU's."""
    assert identical(run(**on(example), impl=IMPL), run(**example, impl=gpu.oracle(work)))


# -- many small hurtful examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(0, 240, EACH))
def test_codebook_quantize(seed):
    for one in range(seed, seed + EACH):
        agree(gpu.select, gpu.selection(one), 0)


@pytest.mark.parametrize("seed", range(500, 540, EACH // 2))
def test_codebook_quantize_by_the_scan(seed):
    for one in range(seed, seed + EACH // 2):
        agree(gpu.select, gpu.selection(one, scanned=True), 1e9)


@pytest.mark.parametrize("seed", range(1000, 1120, EACH))
def test_sae_encode(seed):
    for one in range(seed, seed + EACH):
        agree(gpu.encode, gpu.encoding(one), 0)


@pytest.mark.parametrize("seed", range(2000, 2160, EACH))
def test_masked_decode(seed):
    for one in range(seed, seed + EACH):
        agree(ops.masked_decode, gpu.decoding(one), 0)


@pytest.mark.parametrize("seed", range(3000, 3200, EACH))
def test_codebook_bottleneck(seed):
    for one in range(seed, seed + EACH):
        agree(gpu.through, gpu.passage(one), 0)


@pytest.mark.parametrize("kind", hurtful.KINDS)
def test_packing_gives_the_norms_of_the_cpu(kind):
    codes = hurtful.matrix(300, 65, kind, torch.float32, 5)
    for similarity in gpu.SIMILARITIES:
        got, want = (ops.pack_codes(c, similarity, scan="none") for c in (on(codes), codes))
        assert identical(got[:3], want[:3])


@pytest.mark.parametrize("dtype", hurtful.DTYPES)
def test_memory_that_is_not_aligned(dtype):
    """Rows start at any address, so that nothing may be read 16 bytes at a time."""

    def shifted(rows, width, seed):
        flat = hurtful.matrix(1, rows * width + 1, "gaussian", dtype, seed)[0]
        return flat[1:].view(rows, width), on(flat)[1:].view(rows, width)

    (z, z_there), (codes, codes_there), (table, table_there) = (
        shifted(20, 64, 1),
        shifted(600, 64, 2),
        shifted(600, 64, 3),
    )
    for scan in ("int8", "none"):
        want = gpu.select(z, codes, k=9, scan=scan, **SHARED, impl="cpu")
        got = gpu.select(z_there, codes_there, k=9, scan=scan, **SHARED, impl=IMPL)
        assert identical(got, want)
    weights = torch.rand(20, 9)
    want = ops.masked_decode(want.ids, weights, table, impl="cpu")
    assert identical(ops.masked_decode(got.ids, on(weights), table_there, impl=IMPL), want)


@pytest.mark.parametrize("T", [0, 1])
def test_no_tokens_and_a_single_code(T):
    example = gpu.selection(0) | {
        "z": torch.ones(T, 4),
        "codes": torch.ones(1, 4),
        "bias": None,
        "mask": (None, None),
        "k": 1,
    }
    agree(gpu.select, example, 0)
    agree(gpu.encode, dict(x=torch.ones(T, 4), W_enc=torch.ones(3, 4), b_enc=None, b_pre=None, activation="relu", k=None,
                           mask=(None, None), scan=None), 0)  # fmt: skip


# -- real sizes ----------------------------------------------------------------------------------------------------

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
REAL = [
    # T, E, C, k, dtype, kind of z, kind of codes, share deleted
    (1, 768, 10_000, 8, fp32, "gaussian", "gaussian", None),
    (1, 2048, 65_536, 64, bf16, "gaussian", "gaussian", 0.5),
    (16, 2048, 65_536, 64, bf16, "outliers", "gaussian", None),
    (300, 2048, 65_536, 128, bf16, "gaussian", "mean", 0.01),
    (2048, 512, 25_000, 8, fp32, "gaussian", "gaussian", 0.5),
    (4096, 512, 25_000, 64, fp16, "gaussian", "gaussian", None),
    (64, 4096, 16_384, 64, fp32, "outliers", "outliers", 0.97),
    (7, 4096, 16_384, 128, bf16, "mixed", "mixed", 0.5),
    (130, 1024, 30_001, 600, fp32, "gaussian", "gaussian", 0.5),
    (40, 96, 5000, 2000, fp32, "gaussian", "tied", 0.5),
    (2000, 32, 60_000, 16, fp32, "gaussian", "gaussian", 0.5),
]


@pytest.mark.parametrize("T, E, C, k, dtype, kind, code_kind, share", REAL)
def test_real_sizes(T, E, C, k, dtype, kind, code_kind, share):
    z, codes = hurtful.matrix(T, E, kind, dtype, 1), hurtful.matrix(C, E, code_kind, dtype, 2)
    mask = (None, None) if share is None else hurtful.masks(T, C, share, 3)
    example = SHARED | dict(z=z, codes=codes, k=k, mask=mask, hits=share is not None)
    want = gpu.select(**example, scan="none" if T < 20 else "int8", impl="cpu")
    there = on(example)
    for scan in ("int8", "none"):
        assert identical(gpu.select(**there, scan=scan, impl=IMPL), want), scan


@pytest.mark.parametrize("T, D, E", [(1, 768, 3072), (33, 4096, 2048), (4096, 512, 1024)])
def test_real_sizes_of_the_encoder(T, D, E):
    x, W_enc = hurtful.matrix(T, D, "gaussian", bf16, 1), hurtful.matrix(E, D, "gaussian", bf16, 2)
    vectors = {
        "b_enc": hurtful.matrix(1, E, "gaussian", bf16, 3)[0],
        "b_pre": hurtful.matrix(1, D, "gaussian", bf16, 4)[0],
    }
    example = dict(x=x, W_enc=W_enc, **vectors, activation="relu", k=None, mask=(None, None), scan=None)
    agree(gpu.encode, example, 1e9)


@pytest.mark.parametrize("T", [1, 64, 4096])
def test_real_sizes_of_the_decoder(T):
    g = torch.Generator().manual_seed(0)
    ids, weights = torch.randint(-1, 25_000, (T, 64), generator=g, dtype=torch.int32), torch.rand(T, 64, generator=g)
    mask = hurtful.masks(T, 25_000, 0.5, 1)
    agree(ops.masked_decode, dict(ids=ids, weights=weights, table=hurtful.matrix(25_000, 768, "gaussian", bf16, 2),
                                  mask_table=mask[0], mask_row=mask[1]), 1e9)  # fmt: skip


@pytest.mark.parametrize("mask_mode", ["ablate", "reselect"])
@pytest.mark.parametrize("T", [1, 5, 300])
def test_real_sizes_of_the_bottleneck(T, mask_mode):
    D, C = 768, 10_000
    example = gpu.passage(0) | {
        "x": hurtful.matrix(T, D, "gaussian", bf16, 1), "W_enc": hurtful.matrix(D, D, "gaussian", bf16, 2),
        "b_enc": None, "b_pre": None, "b_dec": None, "codes": hurtful.matrix(C, D, "gaussian", bf16, 3),
        "table": hurtful.matrix(C, D, "gaussian", bf16, 4), "mask": hurtful.masks(T, C, 0.5, 5), "k": 8,
        "mask_mode": mask_mode, "weight": "score", "scan": "int8",
    }  # fmt: skip
    agree(gpu.through, example, 1e9)


# -- what a scan cannot do -----------------------------------------------------------------------------------------

HARD = {
    "equal codes": ("gaussian", "equal"),  # more candidates than there are places: all codes tie
    "20 clusters": ("gaussian", "clusters20"),
    "rows between clusters": ("clusters20", "clusters20"),
    "outliers": ("outliers", "outliers"),
    "faulty rows": ("faulty", "gaussian"),
    "rows of every size": ("mixed", "gaussian"),
    "codes of every size": ("gaussian", "mixed"),
    "huge": ("huge", "huge"),
    "denormal": ("denormal", "denormal"),
}


@pytest.mark.parametrize("T", [160, 600, 1100])
@pytest.mark.parametrize("name", HARD)
def test_what_the_scan_cannot_do_is_done_exactly(name, T):
    kind, code_kind = HARD[name]
    C = gpu.codes_that_scan(T, 256, 64, 10_000)
    z, codes = hurtful.matrix(T, 256, kind, fp32, 1), hurtful.matrix(C, 256, code_kind, fp32, 2)
    for k, share in ((8, None), (64, 0.5)):
        mask = (None, None) if share is None else hurtful.masks(T, C, share, 3)
        example = SHARED | dict(z=z, codes=codes, k=k, mask=mask, hits=share is not None, scan="int8")
        agree(gpu.select, example, 1e9)


@on_a_gpu
@pytest.mark.parametrize("T", [5, 300])
@pytest.mark.parametrize("scan", ["int8", "none"])
def test_a_mask_row_or_an_id_that_does_not_exist_makes_the_row_nan(T, scan):
    E, C = (64, 30_000) if T == 5 else (256, gpu.codes_that_scan(T, 256, 8, 30_000))
    example = on(gpu.passage(0) | {"x": torch.randn(T, E), "W_enc": None, "codes": torch.randn(C, E), "k": 8,
                                   "table": torch.randn(C, 32), "b_dec": None, "weight": "one", "scan": scan})  # fmt: skip
    table, row = hurtful.masks(T, C, 0.1, 1)
    row[1], row[3], row[4] = 3, -2, 2**31 - 1
    wrong = torch.zeros(T, dtype=torch.bool)
    wrong[[1, 3, 4]] = True
    mask = on((table, row))
    packed = ops.pack_codes(example["codes"], scan=scan)
    free = ops.codebook_quantize(example["x"], packed, k=8, impl=IMPL)
    got = ops.codebook_quantize(example["x"], packed, k=8, mask_table=mask[0], mask_row=mask[1], impl=IMPL)
    assert bool(got.scores.cpu()[wrong].isnan().all()) and bool((got.ids.cpu()[wrong] == -1).all())
    assert not bool(got.scores.cpu()[~wrong].isnan().any())
    decoded = ops.masked_decode(free.ids, None, example["table"], None, None, *mask, impl=IMPL)
    for mask_mode in ("ablate", "reselect"):
        y = gpu.through(**example | {"mask": mask, "mask_mode": mask_mode}, impl=IMPL)[0]
        for rows in (y, decoded):
            assert torch.equal(rows.cpu().isnan().all(1), wrong) and torch.equal(rows.cpu().isnan().any(1), wrong)
    ids = free.ids.clone()
    ids[0, 3], ids[2, 0] = C, 2**31 - 1
    rows = ops.masked_decode(ids, None, example["table"], impl=IMPL).cpu().isnan().all(1)
    assert rows.nonzero()[:, 0].tolist() == [0, 2]


# -- the same bits, always -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", ["int8", "none"])
def test_a_row_does_not_depend_on_its_batch(scan):
    C = gpu.codes_that_scan(260, 256, 20, 30_000)
    codes, z = hurtful.matrix(C, 256, "gaussian", bf16, 1), hurtful.matrix(520, 256, "gaussian", bf16, 2)
    table, row = hurtful.masks(520, C, 0.5, 3)
    z, codes, table, row = on((z, codes, table, row))
    packed = ops.pack_codes(codes, scan=scan)

    def run(rows):
        masks = {"mask_table": table, "mask_row": row[rows]}
        return ops.codebook_quantize(z[rows], packed, k=20, **masks, return_hits=True, impl=IMPL)

    together = run(torch.arange(520, device=DEVICE))
    order = torch.randperm(520, generator=torch.Generator().manual_seed(4))
    for size in (1, 3, 16, 17, 65, 260):
        for rows in order[: min(520, 12 * size)].to(DEVICE).split(size):
            assert identical(run(rows), tuple(part[rows] for part in together)), size


@pytest.mark.parametrize("T", [1, 16, 70, 300])
def test_a_hundred_repetitions_give_the_same_bits(T):
    C = gpu.codes_that_scan(T, 256, 30, 20_000) if T > 16 else 20_000
    codes, z = hurtful.matrix(C, 256, "clusters20", fp32, 1), hurtful.matrix(T, 256, "gaussian", fp32, 2)
    example = on(SHARED | dict(z=z, codes=codes, k=30, mask=hurtful.masks(T, C, 0.3, 3), hits=True))
    packed = ops.pack_codes(example["codes"], scan="int8")
    table, row = example["mask"]
    options = dict(k=30, mask_table=table, mask_row=row, return_hits=True, impl=IMPL)
    first = ops.codebook_quantize(example["z"], packed, **options)
    differs = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(2 if DRY else 100):
        for a, b in zip(ops.codebook_quantize(example["z"], packed, **options), first):
            differs |= (a != b).any()
    assert not differs


# -- offsets beyond 2^31 -------------------------------------------------------------------------------------------


def scaled(large, small):
    """A size for the GPU, and one for the dry run."""
    return small if DRY else large


@pytest.mark.parametrize("scan", ["none", "int8"])
def test_more_than_2_to_the_31_entries_of_codes(scan):
    """Both halves alone, whose offsets are small, give the answer of the whole."""
    C, E, k = scaled(560_000, 2000), 4096, 16
    g = torch.Generator(DEVICE).manual_seed(1)
    codes = torch.empty(C, E, dtype=fp16, device=DEVICE)
    for part in codes.split(50_000):
        part.normal_(generator=g)
    z = torch.randn(20, E, generator=g, device=DEVICE)
    z[3] = codes[C - 1].float()  # the best of its row lies at the end
    table, row = (part.to(DEVICE) for part in hurtful.masks(20, C, 0.3, 2))

    def run(codes, table):
        packed = ops.pack_codes(codes, "dot", scan=scan)
        found = ops.codebook_quantize(z, packed, k=k, mask_table=table, mask_row=row, impl=IMPL)
        return found.scores.cpu(), found.ids.cpu().long()

    assert DRY or C * E > 2**31
    half = C // 2 // 32 * 32
    scores, ids = run(codes, table)
    (low, low_ids), (high, high_ids) = (
        run(codes[:half], table[:, : half // 32].contiguous()),
        run(codes[half:], table[:, half // 32 :].contiguous()),
    )
    all_scores, all_ids = torch.cat([low, high], 1), torch.cat([low_ids, high_ids + half], 1)
    order = torch.sort(all_scores, dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(scores, all_scores.gather(1, order)) and torch.equal(ids, all_ids.gather(1, order))
    deleted = bool(table[row[3], (C - 1) // 32].item() >> (C - 1) % 32 & 1) and row[3] >= 0
    assert deleted or ids[3, 0] == C - 1


@pytest.mark.parametrize("scan", ["none", "int8"])
def test_more_than_2_to_the_31_scores(scan):
    T, C, E = scaled(66_000, 600), scaled(33_000, 600), 32
    z, codes = hurtful.matrix(T, E, "gaussian", fp32, 1), hurtful.matrix(C, E, "gaussian", fp32, 2)
    table, row = hurtful.masks(T, C, 0.3, 3)
    rows = torch.cat([torch.arange(40), torch.arange(T - 200, T)])
    example = SHARED | dict(z=z, codes=codes, k=5, mask=(table, row), hits=True)
    want = gpu.select(**example | dict(z=z[rows], mask=(table, row[rows])), scan="int8", impl="cpu")
    got = gpu.select(**on(example), scan=scan, impl=IMPL)
    assert identical(tuple(part.cpu()[rows] for part in got), want)


def test_more_than_2_to_the_31_entries_of_an_output():
    T, E, D = scaled(70_000, 500), scaled(32_768, 300), 16
    x, W_enc = hurtful.matrix(T, D, "gaussian", bf16, 1), hurtful.matrix(E, D, "gaussian", bf16, 2)
    packed = ops.pack_codes(W_enc, "dot")
    got = ops.sae_encode(on(x), packed.to(DEVICE), impl=IMPL)[-100:].cpu()
    assert identical(got, ops.sae_encode(x[-100:], packed, impl="cpu"))

    T, D = scaled(550_000, 500), 4096
    ids = torch.randint(0, 100, (T, 4), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    table = hurtful.matrix(100, D, "gaussian", bf16, 4)
    got = ops.masked_decode(on(ids), None, on(table), impl=IMPL)[-100:].cpu()
    assert identical(got, ops.masked_decode(ids[-100:], None, table, impl="cpu"))


def test_more_tokens_than_a_grid_is_tall():
    T, E = scaled(1_200_000, 3000), 16
    x, W_enc = hurtful.matrix(T, E, "gaussian", bf16, 1), hurtful.matrix(40, E, "gaussian", bf16, 2)
    rows = slice(T - 3000, T)
    packed = ops.pack_codes(W_enc, "dot")
    want = ops.sae_encode(x[rows], packed, k=3, impl="cpu")
    got = ops.sae_encode(on(x), packed.to(DEVICE), k=3, impl=IMPL)
    assert identical((got.scores[rows], got.ids[rows]), want[:2])
    dense = ops.sae_encode(on(x), packed.to(DEVICE), impl=IMPL)[rows]
    assert identical(dense, ops.sae_encode(x[rows], packed, impl="cpu"))
