"""The twins of Hopper's intrinsics (csrc/emulation/hopper.h) against what each is specified to do and must refuse; and
the kernels that use them against those that do not."""

from __future__ import annotations

import re

import emulation
import hurtful
import numpy as np
import pytest
import torch
from calls import call, cosine, plane_of, spread
from test_cuda_kernels import kernels
from tiers import heavies

from cu_fast.kernels import reference

pytestmark = emulation.needed
SEEDS = range(24)


@pytest.fixture(scope="module")
def machine():
    return emulation.load_selftest(name="_selftest_hopper")


def registers_of_a(a):
    """Of [64, 32] bytes, as the PTX ISA gives them for wgmma.m64nNk32 with 8-bit factors, element by element."""
    registers = np.zeros((128, 16), np.uint8)
    for thread in range(128):
        warp, group, in_group = thread // 32, thread % 32 >> 2, thread % 4
        for i in range(16):
            row = 16 * warp + group + (0 if 0 <= i < 4 or 8 <= i < 12 else 8)
            registers[thread, i] = a[row, in_group * 4 + (i & 3) + (0 if i < 8 else 16)]
    return registers.view(np.uint32)


def matrix_of_d(registers):
    """[64, 128] from [128, 64] registers, [64, 64] from [128, 32]."""
    d = np.zeros((64, 2 * registers.shape[1]), np.int32)
    for thread in range(128):
        warp, group, in_group = thread // 32, thread % 32 >> 2, thread % 4
        for i in range(registers.shape[1]):
            d[16 * warp + group + 8 * (i >> 1 & 1), 8 * (i >> 2) + in_group * 2 + (i & 1)] = registers[thread, i]
    return d


def place_tile(memory, b, begin, along_k, along_columns):
    """[N, 32] signed bytes into shared memory, K-major without swizzle: core matrices of 8 columns by 16 bytes."""
    for column in range(len(b)):
        for k in range(32):
            at = begin + column // 8 * along_columns + k // 16 * along_k + column % 8 * 16 + k % 16
            memory[at] = b[column, k].view(np.uint8)


def wrapped(x):
    """int64 modulo 2^32, as int32."""
    return x.astype(np.uint64).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "first, second, along_k, along_columns",
    [(0, 256, 128, 512), (256, 0, 128, 512), (16, 4096 + 16, 2048, 128), (1024, 13 * 1024, 144, 320)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_multiply(machine, seed, groups, first, second, along_k, along_columns, signed):
    """u8 s8 of 128 columns, sums modulo 2^32; s8 s8 of 64, sums that fit, into one of two sets of accumulators."""
    machine.set_seed(seed)
    random = np.random.default_rng(seed)
    a = random.integers(0, 256, (2, groups, 64, 32), np.uint8)
    b = random.integers(-128, 128, (2, 64 if signed else 128, 32), np.int8)
    a[0, 0, :2], b[0, :2] = 128 if signed else 255, -128  # the largest sums
    largest = 2**31 - 2 * 32 * 2**14 if signed else 2**31
    d = random.integers(-largest, largest, (4, groups * 128, 64), np.int32)
    memory = random.integers(0, 256, machine.BYTES, np.uint8)
    place_tile(memory, b[0], first, along_k, along_columns)
    place_tile(memory, b[1], second, along_k, along_columns)
    registers = np.concatenate([registers_of_a(m) for m in a.reshape(-1, 64, 32)]).reshape(2, groups * 128, 4)
    out = d.copy()
    machine.multiply(signed, registers, memory, first, second, along_k, along_columns, out)
    if signed:  # [4, threads, 8, 2, 4]: set 1 is multiplied into, set 0 stays
        sets, before = (x.reshape(4, -1, 8, 2, 4) for x in (out, d))
        assert np.array_equal(sets[0], before[0]) and np.array_equal(sets[3, ..., 0, :], before[3, ..., 0, :])
        assert all(np.array_equal(sets[i, ..., 0, :], before[0, ..., 0, :]) for i in (1, 2))
        out, d = (x[..., 1, :].reshape(4, -1, 32) for x in (sets, before))
        a = a.view(np.int8)
    for group in range(groups):
        mine = slice(128 * group, 128 * group + 128)
        a0, a1 = a[:, group].astype(np.int64)
        b0, b1 = b.astype(np.int64)
        before, other = matrix_of_d(d[0, mine]), matrix_of_d(d[3, mine])
        assert np.array_equal(matrix_of_d(out[0, mine]), before), "nothing may be seen before wait_multiplies"
        assert np.array_equal(matrix_of_d(out[1, mine]), wrapped(before + a0 @ b0.T))
        assert np.array_equal(matrix_of_d(out[2, mine]), wrapped(before + a0 @ b0.T + a1 @ b1.T))
        assert np.array_equal(matrix_of_d(out[3, mine]), wrapped(other + a1 @ b0.T))


@pytest.mark.parametrize("seed", SEEDS)
def test_ring(machine, seed):
    machine.set_seed(seed)
    pieces = np.random.default_rng(seed).integers(0, 256, (11, 48), np.uint8)
    for early in (False, True):
        out = machine.ring(pieces, 96, early)
        assert np.array_equal(out, np.broadcast_to(pieces[:, None], out.shape))


def test_landing(machine):
    given = np.arange(32, dtype=np.uint8)
    for seed in SEEDS:
        machine.set_seed(seed)
        before, after = machine.landing(given)
        assert np.array_equal(before[:32].view(np.uint16), np.full(16, 0x7FA5)), "poison until it lands"
        assert np.array_equal(before[32:], np.ones(16)) and np.array_equal(after, [*given, *before[32:]])


REFUSED = {
    "not initialised": "thread 37 .*an arrival of a barrier (that was not initialised|whose maker has not)",
    "not fenced": "of a barrier whose maker has not called fence_barrier_init",
    "initialised twice": "thread 0 .*barrier_init of a barrier that was initialised before",
    "barrier outside": "thread 37 .*barrier_init outside of the block's shared memory",
    "no arrivals": "thread 37 .*barrier_init for 0 arrivals",
    "written over": "thread 37 .*of a barrier that was written over",
    "too many arrivals": "thread 37 .*one more arrival than the barrier's phase has",
    "no expect": r"thread 37 .*waits for ever at barrier_wait .*deadlock: phase 0 lacks 1 of 1 arrivals and -64 bytes",
    "expect too much": "thread 37 .*waits for ever at barrier_wait .*deadlock: phase 0 lacks 0 of 1 arrivals and 16 b",
    "expect too little": "thread 37 .*waits for ever at barrier_wait .*deadlock: phase 0 lacks 0 of 1 .* -16 bytes",
    "wrong parity": "shared memory changed while|the block ended and had not waited for copy_bulk",
    "parity 2": "thread 37 .*barrier_wait for parity 2",
    "from misaligned": "thread 37 .*copy_bulk from a misaligned address",
    "to misaligned": "thread 37 .*copy_bulk to a misaligned address",
    "15 bytes": "thread 37 .*copy_bulk of 15 bytes, must be a multiple of 16",
    "from shared": "thread 37 .*copy_bulk from shared memory, must be global",
    "to outside": "thread 37 .*copy_bulk to outside of the block's shared memory",
    "copies overlap": "thread 37 .*copy_bulk to where another one is on its way",
    "not waited for": "the block ended and had not waited for copy_bulk",
    "no multiply fence": "multiply_tile, the first of its group, without fence_multiplies",
    "swizzle": "multiply_tile with a swizzle",
    "tile outside": "multiply_tile reads outside of the block's shared memory",
    "lanes differ": "multiply_tile with another descriptor than its warpgroup's",
    "warps differ": "multiply_tile with another descriptor than its warpgroup's",
    "a warp less": "a warp of the group ended without this multiply_tile",
    "places differ": "multiply_tile, while another warp of the group is at that in",
    "not ended": "ended and had not waited for multiply_tile",
    "not committed": "ended and had not waited for multiply_tile",
    "a changed": r"registers changed while this multiply_tile read them \(a of lane 5\)",
    "d changed": r"registers changed while this multiply_tile wrote them \(d of lane 5\)",
    "b changed": "shared memory changed while this multiply_tile read it",
    "b on its way": "shared memory changed while this multiply_tile read it",
    "described by 8": "describe_tile: must be multiples of 16",
    "writes not fenced": "multiply_tile reads what copy_async wrote, without fence_writes in between",
    "fenced before": "multiply_tile reads what copy_async wrote, without fence_writes in between",
    "signed overflow": "multiply_signed_tile with a sum beyond int32",
    "dynamic beyond": "thread 37 .*wants 1040 bytes of dynamic shared memory, launched with 1024",
    "static beyond": "thread 37 .*wants 11296 bytes of shared memory for 2 objects; a block has 11264",
}
# Whether these are seen is a matter of when the copy lands, or which thread comes first.
SOMETIMES = {"not initialised", "wrong parity", "b on its way", "not waited for"}


def test_every_misuse_is_listed(machine):
    assert set(machine.MISUSES) == {"nothing", *REFUSED}


@pytest.mark.parametrize("name", ["nothing", *REFUSED])
def test_misuse(machine, name):
    seen = 0
    for seed in SEEDS:
        machine.set_seed(seed)
        if name == "nothing":
            machine.misuse(name)
            continue
        try:
            machine.misuse(name)
        except RuntimeError as error:
            assert re.search(REFUSED[name], str(error)), str(error)
            seen += 1
    if name != "nothing":
        assert seen == len(SEEDS) or (name in SOMETIMES and seen)
    machine.set_seed(0)
    machine.misuse("nothing")  # nothing of it is left


def test_a_warpgroup_is_whole(machine):
    with pytest.raises(RuntimeError, match="multiply_tile by a warp that has no whole warpgroup"):
        machine.few_warps()


# -- the scan -------------------------------------------------------------------------------------------------------

PLACES = 300  # kCandidates of the emulation


def problem(seed, T, E, C):
    g = torch.Generator().manual_seed(seed)
    z, codes = torch.randn(T, E, generator=g), torch.randn(C, E, generator=g)
    factor = cosine(codes)
    bias = torch.randn(C, generator=g) if seed % 2 else None
    return dict(z=z, codes=codes, factor=factor, bias=bias, scan=plane_of(codes, factor, on=reference))


CASES = [  # seed, T, E, C, k, multiprocessors
    (0, 33, 1, 300, 5, 3),
    (1, 72, 31, 257, 3, 1),
    (5, 64, 300, 513, 7, 2),
    (7, 65, 257, 400, 4, 40),
    (8, 69, 256, 700, 20, 1),
    *heavies(
        (2, 34, 33, 900, 12, 2),
        (3, 72, 70, 700, 9, 3),
        (4, 63, 129, 1000, 12, 1),
        (6, 72, 333, 1111, 20, 1),
        (9, 70, 257, 600, 20, 1),
        (10, 72, 130, 1200, 40, 2),
    ),
]


@pytest.mark.parametrize("seed, T, E, C, k, multiprocessors", CASES)
def test_a_scan_leaves_the_same(seed, T, E, C, k, multiprocessors):
    """Every bound, bit by bit: both kernels add the same integers."""
    emulated = emulation.load()
    emulated.set_multiprocessors(multiprocessors)
    given = problem(seed, T, E, C)
    for mask, counts_hits in (((None, None), False), (hurtful.masks(T, C, 0.3, seed), True)):
        every = spread(**given, pre=None, k=k, mask=mask, counts_hits=counts_hits)
        states = []
        for chosen in (False, True, True):
            emulated.set_seed(seed + len(states))
            emulated.set_wgmma(chosen)
            kernels()
            states.append(emulated.scan_state(**every))
            # Tokens stay if there is shared memory for them, of 8 steps, and a block has several tiles of 4 groups.
            ran, blocks = kernels(), max(1, multiprocessors // ((T + 63) // 64))
            for sample, groups in (("false", (C + 63) // 64), ("true", states[-1][6].shape[1])):
                stay = E <= 256 and groups > 4 * blocks
                assert (f"scan_codes_sm90<{sample}, {str(stay).lower()}>" in ran) == chosen
        count, tau, ids, lower, upper, _, maxima = states[0][:7]
        assert (count >= k).all() and (count <= PLACES).any()
        for other in states[1:]:
            assert torch.equal(other[0], count) and torch.equal(other[1], tau) and torch.equal(other[6], maxima)
            for t in (count <= PLACES).nonzero().flatten().tolist():
                n = count[t]
                ours, theirs = ids[t, :n].argsort(), other[2][t, :n].argsort()
                for ours_of, theirs_of in zip((ids, lower, upper), other[2:5], strict=True):
                    assert torch.equal(ours_of[t, ours], theirs_of[t, theirs])


@pytest.mark.parametrize("seed, T, E, C, k, multiprocessors", [*CASES, (11, 150, 45, 300, 8, 3)])
def test_codebook_quantize(seed, T, E, C, k, multiprocessors):
    emulated = emulation.load()
    emulated.set_multiprocessors(multiprocessors)
    given = dict(**problem(seed, T, E, C), k=k, mask=hurtful.masks(T, C, 0.3, seed), return_hits=True)
    wanted = call("codebook_quantize", on=reference, **given)
    for chosen in (False, True):
        emulated.set_seed(seed)
        emulated.set_wgmma(chosen)
        assert all(map(hurtful.equal, call("codebook_quantize", on=emulated, **given), wanted))


# -- exact scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", hurtful.DTYPES)
@pytest.mark.parametrize(
    "T, D, E",  # a tile is 128 tokens and 64 codes; a stage is 64 entries, and the sixth is where the first was
    [(65, 1, 64), (127, 63, 1), (128, 64, 65), (129, 65, 63), (136, 449, 70), (137, 320, 128), (280, 150, 40)],
)
def test_sae_encode(T, D, E, dtype):
    seed = T + D
    layout = hurtful.LAYOUTS[(seed + dtype.itemsize) % len(hurtful.LAYOUTS)]
    given = dict(
        x=hurtful.strided(hurtful.matrix(T, D, "faulty" if seed % 2 else "gaussian", dtype, seed), layout),
        W_enc=hurtful.strided(hurtful.matrix(E, D, "gaussian", dtype, seed + 1), layout),
        b_enc=hurtful.matrix(1, E, "gaussian", dtype, seed + 2)[0] if T % 3 else None,
        b_pre=hurtful.matrix(1, D, "gaussian", dtype, seed + 3)[0] if E % 2 else None,
        relu=D % 2 == 0,
    )
    wanted = call("sae_encode", on=reference, **given)
    emulated = emulation.load()
    emulated.set_wgmma(True)
    emulated.launched()
    for again in range(3):
        emulated.set_seed(seed + again)
        assert hurtful.equal(call("sae_encode", on=emulated, **given), wanted)
    assert "TensorTile" not in emulated.launched()


@pytest.mark.parametrize("T, E, C, k", [(65, 64, 64, 5), (128, 33, 300, 12), (136, 400, 65, 20), (150, 70, 129, 9)])
def test_every_code_scored(T, E, C, k):
    emulated = emulation.load()
    given = problem(T, T, E, C) | dict(k=k, scan=None, mask=hurtful.masks(T, C, 0.3, T), return_hits=True)
    given["z"][[3, T - 1], E // 2] = torch.nan
    wanted = call("codebook_quantize", on=reference, **given)
    for chosen in (False, True, True):
        for multiprocessors in (1, 40):
            emulated.set_seed(T + chosen)
            emulated.set_multiprocessors(multiprocessors)
            emulated.set_wgmma(chosen)
            emulated.launched()
            assert all(map(hurtful.equal, call("codebook_quantize", on=emulated, **given), wanted))
            assert ("WarpgroupTile" in emulated.launched()) == chosen
