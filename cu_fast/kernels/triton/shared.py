"""What the Triton kernels share: sums over one row, the total order as one integer, which codes are deleted.

    dot(x, j) = 16 partial sums; partial l adds x[e] c[e] for e = l, l + 16, ... in order;
                then a tree: l with l + 8, l + 4, l + 2, l + 1

The product is rounded, then the sum: every kernel is compiled with enable_fp_fusion=False. The tree is made of splits,
whose order is written down here, and not of tl.sum, whose order is Triton's choice. Norms of tokens are such sums, and
the dots of training; scores are not (fixed.py).

    key = [ score as a signed number that grows with it : 32 | 2^31 - 1 - id : 32 ], int64

A better code has the larger key: higher score, then smaller id. Scores in keys are finite, and never -0.0. Keys below
EMPTY + 2^32 mark empty places; they need not be equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))
FIRST_KEY = tl.constexpr(-(2**63) + 2**32)  # the key of every code is larger
FLT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= FLT_MAX


@triton.jit
def widened(pointers, inside):
    """Entries of any dtype as fp32, zeros outside."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tree_sum(partial, N: tl.constexpr):
    """[N, 16] -> [N]: l with l + 8, then l + 4, l + 2, l + 1."""
    low, high = tl.split(tl.permute(tl.reshape(partial, (N, 2, 8)), (0, 2, 1)))
    low, high = tl.split(tl.permute(tl.reshape(low + high, (N, 2, 4)), (0, 2, 1)))
    low, high = tl.split(tl.permute(tl.reshape(low + high, (N, 2, 2)), (0, 2, 1)))
    low, high = tl.split(low + high)
    return low + high


@triton.jit
def dots16(row, codes, code_stride, j, has_j, E, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr):
    """Dots [BLOCK_C] of a row and codes j [BLOCK_C]."""
    lane = tl.arange(0, 16)[None, :]
    code_rows = codes + j.to(tl.int64)[:, None] * code_stride
    partial = tl.zeros([BLOCK_C, 16], tl.float32)
    for first in range(0, E, 16 * UNROLL):
        for step in tl.static_range(UNROLL):
            e = first + step * 16 + lane
            partial += widened(row + e, e < E) * widened(code_rows + e, has_j[:, None] & (e < E))
    return tree_sum(partial, BLOCK_C)


@triton.jit
def ordered(x):
    """fp32 as int32 that grows with it: no NaN, no -0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(x):
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(scores, j, has_j):
    """Keys of codes j [BLOCK_C] from their scores [BLOCK_T, BLOCK_C]; EMPTY where a score is not finite."""
    keys = (ordered(scores).to(tl.int64) << 32) | (0x7FFFFFFF - j).to(tl.int64)[None, :]
    return tl.where(has_j[None, :] & is_finite(scores), keys, EMPTY)


@triton.jit
def score_of(key):
    return from_ordered((key >> 32).to(tl.int32))


@triton.jit
def id_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def mask_rows(mask_row, t, has_t, U):
    """The mask table's row for tokens t, -1 where nothing is deleted, and whether the table has that row."""
    row, exists = tl.where(has_t, -1, -1), has_t
    if mask_row is not None:
        given = tl.load(mask_row + t, mask=has_t, other=-1)
        exists = (given >= -1) & (given < U)
        row = tl.where(exists, given, -1)
    return row, exists


@triton.jit
def is_deleted(mask_table, words, row, j, wanted):
    """Whether codes j are deleted by rows of the table; False where `wanted` is. row, j and wanted broadcast."""
    word = tl.load(mask_table + row.to(tl.int64) * words + j // 32, mask=wanted & (row >= 0), other=0)
    return ((word >> (j % 32)) & 1) != 0


@triton.jit
def rounded_bf16(x):
    """fp32 to the bits of bf16, int16: to nearest, ties to even. Written out: Triton's interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, near).to(tl.int16)
