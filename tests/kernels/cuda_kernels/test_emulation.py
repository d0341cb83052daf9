"""The CUDA emulation (csrc/emulation) against what each intrinsic is specified to do, and what it must refuse."""

from __future__ import annotations

import signal
import subprocess
import sys
from fractions import Fraction

import emulation
import numpy as np
import pytest
from tiers import heavy

pytestmark = emulation.needed
SEEDS = range(20)
POISON = 0x7FA5


@pytest.fixture(scope="module")
def machine():
    return emulation.load_selftest()


@pytest.fixture(params=[0, 1, 2, 3])
def seeded(machine, request):
    machine.set_seed(request.param)
    return machine, np.random.default_rng(request.param)


def test_positions(machine):
    out = machine.positions(3, 2)
    y, x, thread = np.meshgrid(range(2), range(3), range(64), indexing="ij")
    wanted = np.stack([thread, thread % 32, thread // 32, x, y, np.full_like(x, 3), np.full_like(x, 2)], -1)
    assert np.array_equal(out, wanted.reshape(6, 64, 7))


def test_order_is_random_between_barriers(machine):
    def order(seed):
        machine.set_seed(seed)
        return machine.order(6)

    orders = np.stack([order(seed) for seed in SEEDS])
    for out in orders:  # each thread twice; no lane's second visit before the last first visit of its warp
        assert np.array_equal(np.sort(out), np.repeat(np.arange(6 * 256), 2))
        visits = {warp: out[out // 32 == warp] for warp in range(6 * 8)}
        assert all(len(set(visit[:32])) == 32 for visit in visits.values())
    assert len({out.tobytes() for out in orders}) == len(SEEDS)
    assert max(orders[:, 0] // 256) > 3, "blocks start in their order: at most 4 are resident"
    assert len(set(orders[:, 0] % 256 // 32)) > 2, "the first warp is always the same"
    assert len(set(orders[:, 0] % 32)) > 5, "the first lane is always the same"
    assert np.array_equal(order(3), orders[3]), "a seed gives its order again"
    assert not np.array_equal(machine.order(6), orders[3]), "the next launch has another order"
    one_by_one = [np.array_equal(np.sort(out[:512]), np.repeat(np.unique(out[:512]), 2)) for out in orders]
    assert any(one_by_one) and not all(one_by_one), "some seeds keep one block resident, others several"
    # Once a warp's lanes come together it runs ahead of others under some seeds, and in turn with them under others.
    changes = [np.count_nonzero(np.diff(out // 32)) for out in orders]
    assert min(changes) < 200 < 1000 < max(changes)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint64"])
def test_shuffles(seeded, dtype):
    machine, random = seeded
    shuffle = getattr(machine, f"shuffle_{dtype}")
    x = np.frombuffer(random.bytes(128 * 8), np.uint64).astype(dtype)[:128]
    lane, warp = np.arange(128) % 32, np.arange(128) // 32 * 32
    anywhere = random.integers(-40, 40, 128, dtype=np.int32)
    assert np.array_equal(shuffle(x, anywhere, False), x[warp + anywhere % 32])
    masks = random.integers(0, 32, 128, dtype=np.int32)  # each lane its own
    assert np.array_equal(shuffle(x, masks, True), x[warp + (lane ^ masks)])


def test_votes(seeded):
    machine, random = seeded
    x = (random.random((40, 96)) < random.choice([0, 0.01, 0.5, 1], (40, 1))).astype(np.uint32)
    out = machine.votes(x)
    warps = x.reshape(40, 3, 32).astype(np.uint64)
    ballots = (warps << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    assert np.array_equal(out[:, 0], np.repeat(ballots, 32, axis=1))
    assert np.array_equal(out[:, 1], np.repeat(warps.any(-1), 32, axis=1))
    given = (x + np.arange(96, dtype=np.uint32)).reshape(40, 3, 32)
    assert np.array_equal(out[:, 2], np.roll(given, -1, axis=2).reshape(40, 96))


def test_arithmetic(machine):
    random = np.random.default_rng(0)
    a, b = (np.frombuffer(random.bytes(4 * 20_000), np.float32) for _ in range(2))
    with np.errstate(all="ignore"):
        product = a * b
        wanted = np.stack([product, a + b, product + b])
    assert np.array_equal(machine.arithmetic(a, b), wanted, equal_nan=True)
    x = random.integers(0, 2**32, 128, dtype=np.uint32)
    x[:2] = 0, 2**32 - 1
    assert machine.count_bits(x).tolist() == [int(value).bit_count() for value in x]


def test_atomics(seeded):
    machine, random = seeded
    x = random.integers(-(2**31), 2**31, (5, 96), dtype=np.int32)
    total, bits, wide, before, bits_before = machine.atomics(x)
    assert total == int(x.astype(np.int64).sum() + 2**31) % 2**32 - 2**31
    assert bits == np.bitwise_or.reduce(x.view(np.uint32), axis=None)
    assert wide == int(x.astype(np.int64).sum()) << 20
    # Each took what another left: the values before, and the total, are the values after, and zero.
    after = (before.astype(np.int64) + x + 2**31) % 2**32 - 2**31
    assert sorted([*before.ravel(), total]) == sorted([*after.ravel(), 0])
    assert np.array_equal(bits_before | np.uint32(bits), np.full_like(bits_before, bits))
    assert (bits_before == 0).any()


def fragments(a, b, d):
    """Registers as the PTX ISA gives them for mma.m16n8k32 with 8-bit factors, element by element."""
    registers_a, registers_b, registers_d = np.zeros((32, 16), "u1"), np.zeros((32, 8), "u1"), np.zeros((32, 4), "i4")
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(16):
            row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
            column = in_group * 4 + (i & 3) + (0 if i < 8 else 16)
            registers_a[lane, i] = a[row, column]
        for i in range(8):
            registers_b[lane, i] = b.view("u1")[in_group * 4 + (i & 3) + (0 if i < 4 else 16), group]
        for i in range(4):
            registers_d[lane, i] = d[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
    return registers_a.view("<u4"), registers_b.view("<u4"), registers_d


@pytest.mark.parametrize("kind", ["random", "extremes", "wrap"])
@pytest.mark.parametrize("is_signed", [False, True])
def test_multiply_bytes(seeded, kind, is_signed):
    machine, random = seeded
    a = random.integers(0, 256, (16, 32), dtype=np.uint8)
    b = random.integers(-128, 128, (32, 8), dtype=np.int8)
    d = random.integers(-(2**20), 2**20, (16, 8), dtype=np.int32)
    if kind != "random":
        a = random.choice(np.array([128, 127] if is_signed else [0, 255], np.uint8), (16, 32))
        b = random.choice(np.array([-128, 127], np.int8), (32, 8))
    if kind == "wrap":
        d = random.choice(np.array([-(2**31), 2**31 - 1], np.int32), (16, 8))
    wide_a = a.view(np.int8 if is_signed else np.uint8).astype(np.int64)
    wanted = d.astype(np.int64) + 3 * (wide_a @ b.astype(np.int64))
    wrapped = ((wanted + 2**31) % 2**32 - 2**31).astype(np.int32)
    assert (kind == "wrap") == bool((wrapped != wanted).any())
    registers_a, registers_b, registers_d = fragments(a, b, d)
    if is_signed and kind == "wrap":
        with pytest.raises(RuntimeError, match="multiply_signed with a sum beyond int32"):
            machine.multiply_bytes(registers_a, registers_b, registers_d, 3, True)
        return
    out = machine.multiply_bytes(registers_a, registers_b, registers_d, 3, is_signed)
    assert np.array_equal(out, fragments(a, b, wrapped)[2])


@pytest.mark.parametrize("count", [2, 4])
def test_load_matrices(seeded, count):
    """As the PTX ISA gives ldmatrix, m8n8 of b16; of 16 rows of 32 bytes it makes the first factor of a product."""
    machine, random = seeded
    source = random.integers(0, 2**32, (32, 4), dtype=np.uint32)
    rows = random.permutation(32).astype(np.int32)
    out = machine.load_matrices(source, rows, count)
    lane = np.arange(32)
    for i in range(4):
        assert np.array_equal(out[:, i], source[rows[8 * i + lane // 4], lane % 4] if i < count else 0 * out[:, i])
    if count == 4:
        a = random.integers(0, 256, (16, 32), dtype=np.uint8)
        rows = (lane % 16 * 2 + lane // 16).astype(np.int32)
        registers = fragments(a, np.zeros((32, 8), np.int8), np.zeros((16, 8), np.int32))[0]
        assert np.array_equal(machine.load_matrices(a.reshape(32, 16).view("<u4"), rows, 4), registers)


def test_integers(machine):
    random = np.random.default_rng(0)
    x = random.integers(-(2**62), 2**62, 128) >> random.integers(0, 62, 128)
    x[:8] = 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**54 + 2**30, 2**54 + 2**30 + 1, 2**54 + 3 * 2**30, 0, -1
    a, b = random.integers(0, 2**32, (2, 128), dtype=np.uint32)
    a[0], b[0], b[1] = 0x80808080, 0x80808080, 0x7F7F7F7F
    rounded, sums = machine.integers(x, a, b)
    assert rounded.tolist() == [exactly_rounded(int(value)) for value in x]
    wide = (part.view(np.int8).reshape(128, 4).astype(np.int64) for part in (a, b))
    assert np.array_equal(sums, np.arange(128) + np.multiply(*wide).sum(1))


def exactly_rounded(x):
    """An integer as the nearest fp32 number, ties to even: Python's own rounding of a fraction."""
    drop = max(abs(x).bit_length() - 24, 0)
    return float(round(Fraction(x, 2**drop)) * 2**drop)


def test_a_missing_barrier_gives_a_wrong_answer(machine):
    right = (np.arange(256) + 32) % 256

    def is_right(seed, barrier):
        machine.set_seed(seed)
        return np.array_equal(machine.neighbours(barrier), right)

    assert all(is_right(seed, True) for seed in SEEDS)
    assert not any(is_right(seed, False) for seed in SEEDS)


@pytest.mark.parametrize("wait", [-1, 0, 1, 2])
@pytest.mark.parametrize("valid", [True, False])
def test_copies_land_when_waited_for(seeded, wait, valid):
    machine, random = seeded
    source = random.integers(0, 2**32, (3, 64, 4), dtype=np.uint32)
    landed = 0 if wait < 0 else 3 - wait
    wanted = source.copy()
    if not valid:
        wanted[:, ::2] = 0  # odd threads' copies are valid all the same
    wanted[landed:] = POISON << 16 | POISON
    assert np.array_equal(machine.copies(source, wait, valid), wanted)


def test_load_streaming(machine):
    source = np.random.default_rng(0).integers(0, 2**32, (64, 4), dtype=np.uint32)
    assert np.array_equal(machine.load_streaming(source), source)


def test_shared_memory_is_poisoned_for_every_block(seeded):
    machine, _ = seeded
    out = machine.fresh(9)
    assert (out == POISON).all()
    assert np.isnan(out.view(np.float16)).all() and np.isnan(out.view(np.float32)).all()
    assert np.isnan((out.astype(np.uint32) << 16).view(np.float32)).all(), "as bfloat16"


def test_resident_blocks_do_not_share_memory(machine):
    most = []
    for seed in SEEDS:
        machine.set_seed(seed)
        addresses, together, wrong = machine.residents(9)
        assert wrong == 0
        assert (addresses == addresses[:, :1]).all(), "one object for the block"
        assert (addresses % 16 == 0).all()
        small, wide = addresses[:, 0].T
        assert ((small + 3 <= wide) | (wide + 72 <= small)).all(), "two types, two objects"
        most.append(together)
    assert set(most) == {1, 2, 3, 4}


MISUSES = {
    "exit before barrier": r"waits for ever at sync_block.*1 of the block's 64 threads have ended.* thread 37",
    "shuffle against barrier": r"thread 37 .*waits for ever at shuffle.*lanes 0xffffffdf wait at sync_block",
    "exit before shuffle": r"waits for ever at shuffle.*lanes 0x20 have ended",
    "different collectives": r"is at (ballot|any_lane) in .*, this one at (ballot|any_lane)",
    "different places": r"is at sync_warp in selftest_misuse.h:\d+, this one at sync_warp in selftest_misuse.h:\d+",
    "different barriers": r"is at sync_block in .*, this one at sync_block in ",
    "load misaligned": r"thread 37 .*load_streaming from a misaligned address.*multiple of 16",
    "load shared": r"thread 37 .*load_streaming from shared memory",
    "copy from misaligned": r"thread 37 .*copy_async from a misaligned address.*multiple of 16",
    "copy to misaligned": r"thread 37 .*copy_async to a misaligned address.*multiple of 16",
    "copy outside": r"thread 37 .*copy_async to an address outside of the block's shared memory",
    "copy beyond": r"thread 37 .*copy_async to an address outside of the block's shared memory",
    "copy not waited for": r"thread 37 .*ended and had not waited for copy_async",
    "copy not closed": r"thread 37 .*ended and had not waited for copy_async .nor closed its group",
    "copy source written": r"thread 37 .*copy_async from memory that was written before",
    "matrix misaligned": r"thread 37 .*load_matrices from a misaligned address.*multiple of 16",
    "matrix outside": r"thread 37 .*load_matrices from an address outside of the block's shared memory",
    "signed overflow": r"multiply_signed with a sum beyond int32",
    "shared limit": r"thread 37 .*wants 50240 bytes of shared memory.*a block has 49152",
    "shared overrun": r"block \(1, 2\): wrote outside of its objects in shared memory",
    "shared underrun": r"block \(1, 2\): wrote outside of its objects in shared memory",
    "xor range": r"thread 37 .*shuffle_xor with 32, must be in \[0, 32\)",
    "stack guard": r"thread 37 .*overflowed its stack",
    "throw": r"thread 37 .*threw: a reason",
    "nested launch": r"thread 37 .*a kernel cannot launch a kernel",
    "not started": r"ended and had not called start_kernel",
    "late start": r"had not called start_kernel in selftest_misuse.h",
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse(seeded, name):
    machine, _ = seeded
    with pytest.raises(RuntimeError, match=MISUSES[name]) as raised:
        machine.misuse(name)
    message = str(raised.value)
    assert "threads; " in message and "launch 1 since seed" in message
    if "start" not in name:
        assert "block (1, 2)" in message and "grid 3 x 4" in message and "misuse_kernel" in message
    machine.misuse("nothing")  # and the machine goes on
    assert np.array_equal(machine.neighbours(True), (np.arange(256) + 32) % 256)


def test_launch_shapes(machine):
    for threads in (0, 16, 33, 1056, -32):
        with pytest.raises(RuntimeError, match=f"a block of {threads} threads, must be a multiple of 32 up to 1024"):
            machine.empty(1, 1, threads)
    for x, y in ((0, 1), (1, 0), (1, 65536), (2**31, 1)):
        with pytest.raises(RuntimeError, match=f"a grid of {x} x {y} blocks"):
            machine.empty(x, y, 32)
    machine.empty(2, 3, 1024)


def test_multiprocessors(machine):
    assert machine.multiprocessors() == 3
    machine.set_multiprocessors(5)
    assert machine.multiprocessors() == 5
    machine.set_multiprocessors(3)


def run(code):
    return f"import emulation\nmachine = emulation.load_selftest()\n{code}"


def test_below_a_stack_is_a_page_without_access(machine):
    done = subprocess.run([sys.executable, "-c", run("machine.misuse('below stack')")], capture_output=True)
    assert done.returncode == -signal.SIGSEGV


@heavy
@emulation.needs_address_sanitizer
def test_address_sanitizer():
    code = """
import numpy
for seed in range(4):
    machine.set_seed(seed)
    machine.order(4), machine.neighbours(True), machine.fresh(3), machine.residents(5)
    machine.copies(numpy.zeros((3, 64, 4), numpy.uint32), 0, True)
    for name in ("throw", "exit before barrier", "different collectives", "nothing"):
        try:
            machine.misuse(name)
        except RuntimeError:
            pass
print("clean", flush=True)
machine.misuse("shared overrun")
"""
    done = emulation.run_under_address_sanitizer(run(code))
    assert done.stdout.splitlines() == ["clean"], done.stderr
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr and "misuse_kernel" in done.stderr
