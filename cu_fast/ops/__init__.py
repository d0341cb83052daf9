"""The operators: contract, host checks, and choice of implementation.

    sae_encode         z   = act((x - b_pre) W_enc^T + b_enc)               x [T, D] -> z [T, E]
    codebook_quantize  ids = the k best codes by score(z, j), not deleted    z [T, E] -> scores, ids [T, k]
    masked_decode      y   = reduce_i(w_i table[ids_i]) + bias + residual    ids [T, k] -> y [T, D]
    delete_latents     y   = x + sigma sum_i (new_i - a_i) dec_i             x [T, D] -> y [T, D]

T tokens, D model width, E code width, C codes, k codes kept per token, U masks in a table. Scores are defined
numbers and selection is a total order (score descending, then id ascending), so every implementation returns
the same bits: see ``docs/contract.md``. Inputs are fp32, bf16 or fp16; a last dimension that is not
contiguous is copied; outputs never alias inputs, and inputs are never written to (but for a ``receipt``).

A mask is ``mask_table``, int32 [U, ceil(C/32)] (bit j % 32 of word j // 32 set = code j deleted), with
``mask_row``, int32 [T]: per token the row of the table that holds, -1 = nothing deleted. Give both or neither.

``impl`` is "reference" (plain PyTorch), "cpu" or "cuda" (the native library's kernels), "triton", or "auto": the kernels
for the device, on a GPU "cuda" before "triton", and "reference" where none can run. An explicit choice never falls back.
On a GPU nothing waits for the device, so values in tensors are not checked before a kernel runs: a mask_row that is no
row of the table, or an id beyond the last code, makes the token's row NaN instead of raising. All operators are for
inference: an input that requires grad raises; ``cu_fast.nn`` holds the training path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cu_fast.kernels import reference
from cu_fast.ops.arguments import check_bottleneck, check_quantize
from cu_fast.ops.checks import (
    INTS,
    check_choice,
    check_device,
    check_k,
    check_mask,
    check_matrix,
    check_values,
    check_vector,
    refuse_grad,
    shape,
)
from cu_fast.ops.choice import Impl, available_impls, choose, resolve
from cu_fast.ops.latents import (
    LATENT_KINDS,
    TOKEN_SCALES,
    Deletion,
    LatentKind,
    LatentMasks,
    Latents,
    TokenScale,
    delete_latents,
)
from cu_fast.ops.packing import (
    SIMILARITIES,
    PackedCodes,
    Scan,
    ScanPlane,
    Similarity,
    check_packed,
    choose_scan,
    pack_codes,
    selection_plan,
)

__all__ = [
    "ACTIVATIONS",
    "LATENT_KINDS",
    "MASK_MODES",
    "REDUCES",
    "SIMILARITIES",
    "TOKEN_SCALES",
    "WEIGHTS",
    "Activation",
    "Deletion",
    "Impl",
    "LatentKind",
    "LatentMasks",
    "Latents",
    "MaskMode",
    "PackedCodes",
    "Reduce",
    "Scan",
    "ScanPlane",
    "Selection",
    "Similarity",
    "TokenScale",
    "Weight",
    "available_impls",
    "choose_scan",
    "codebook_bottleneck",
    "codebook_quantize",
    "delete_latents",
    "masked_decode",
    "pack_codes",
    "resolve",
    "sae_encode",
    "selection_plan",
]

Activation = Literal["relu", "none"]
MaskMode = Literal["ablate", "reselect"]
Weight = Literal["one", "mean", "score"]
Reduce = Literal["sum", "mean"]
# Read once: the checks run in every call, and torch.compile traces them.
ACTIVATIONS, MASK_MODES, WEIGHTS, REDUCES = map(get_args, (Activation, MaskMode, Weight, Reduce))


class Selection(NamedTuple):
    """What a selection returns, best first.

    Where fewer than k codes are left the slot holds id -1 and score 0. A row with NaN or Inf holds id -1 and
    score NaN, which :func:`masked_decode` turns into a NaN row.

    Attributes:
        scores: fp32 [T, k].
        ids: int32 [T, k].
        hits: int32 [T], how many deleted codes would have been among the token's k; None = not counted.
    """

    scores: Tensor
    ids: Tensor
    hits: Tensor | None


def codebook_quantize(
    z: Tensor,
    packed: PackedCodes,
    *,
    k: int,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    return_hits: bool = False,
    impl: Impl = "auto",
) -> Selection:
    """The k best codes of every row of z that are not deleted (contract, sections 2 to 4: mode "reselect").

    Args:
        z: [T, E], fp32, bf16 or fp16.
        packed: from :func:`pack_codes`.
        k: codes kept per token, 1 <= k <= C.
        mask_table: int32 [U, ceil(C/32)], or None = nothing deleted; see the module's docstring.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        return_hits: also count, per token, the deleted codes that would have been among its k.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        Selection(scores fp32 [T, k], ids int32 [T, k], hits int32 [T], None without return_hits). No id is a deleted
        code's.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: z requires grad, or the implementation asked for cannot run.
    """
    op = _native("codebook_quantize", impl, z, mask_table, mask_row)
    checks_itself = op is not None and type(k) is int and _packed_for(packed, z)
    if not checks_itself:
        check_quantize(z, packed, k, mask_table, mask_row)
        op = choose("codebook_quantize", impl, z.device)
    scan = packed.scan or reference.NO_SCAN
    try:
        scores, ids, hits = op(
            z, packed.digits, packed.factor, packed.bias, k, mask_table, mask_row, return_hits, *scan
        )
        return Selection(scores, ids, hits if return_hits else None)
    except RuntimeError as error:
        if not checks_itself:
            raise
        refused = error
    check_quantize(z, packed, k, mask_table, mask_row)
    raise refused


def sae_encode(
    x: Tensor,
    W_enc: PackedCodes,
    b_pre: Tensor | None = None,
    *,
    activation: Activation = "relu",
    k: int | None = None,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | Selection:
    """A sparse autoencoder's encoder: dense, or with ``k`` the TopK-SAE's fused selection (arXiv 2406.04093).

    Args:
        x: [T, D], fp32, bf16 or fp16.
        W_enc: W_enc [E, D] with b_enc, from ``pack_codes(W_enc, "dot", b_enc)``. With k its rows are the codes, so C is E;
            without, ``scan="none"`` saves memory.
        b_pre: [D], subtracted from x first, or None = 0.
        activation: "relu" or "none".
        k: latents kept per token, 1 <= k <= E; None = all, a dense z.
        mask_table: only with k: int32 [U, ceil(E/32)], or None = nothing deleted; see the module's docstring.
        mask_row: only with k: int32 [T], -1 = nothing deleted; None where mask_table is.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        Without k: z, fp32 [T, E]. Every entry is a score, so that a selection from it does not
        depend on machine or batch; a row with NaN or Inf in x - b_pre is NaN.
        With k: Selection, ordered by the pre-activation; its scores are activation(score), the decode weights.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: an input requires grad, or the implementation asked for cannot run.
    """
    E = check_packed("W_enc", W_enc, "x", x)
    check_vector("b_pre", b_pre, W_enc.width, "D", x.device)
    check_choice("activation", activation, ACTIVATIONS)
    refuse_grad("sae_encode", x=x, b_pre=b_pre)
    encoder = W_enc.digits, W_enc.factor, W_enc.bias, b_pre
    relu = activation == "relu"
    if k is None:
        if mask_table is not None or mask_row is not None:
            raise ValueError("mask_table and mask_row need k: a dense encode selects nothing to mask")
        return choose("sae_encode", impl, x.device)(x, *encoder, relu)
    check_k(k, E)
    check_mask(mask_table, mask_row, x.shape[0], E, x.device)
    op, plane = choose("sae_encode_topk", impl, x.device), W_enc.scan or reference.NO_SCAN
    return Selection(*op(x, *encoder, k, mask_table, mask_row, relu, *plane), None)


def masked_decode(
    ids: Tensor,
    weights: Tensor | None,
    table: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    *,
    reduce: Reduce = "sum",
    impl: Impl = "auto",
) -> Tensor:
    """Gather and sum: y = reduce_i(w_i table[ids_i]) + bias + residual (contract, section 4: mode "ablate").

    Sums run over i in order, in fp32, multiply, then add; then bias, then residual; one rounding at the end.

    Args:
        ids: int32 or int64 [T, k], -1 <= id < C; -1 adds nothing.
        weights: [T, k], or None = 1. NaN beside id -1 makes the row NaN (see :class:`Selection`).
        table: [C, D], fp32, bf16 or fp16.
        bias: [D], or None = 0.
        residual: [T, D], or None = 0.
        mask_table: int32 [U, ceil(C/32)], or None = nothing deleted; see the module's docstring.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        reduce: "sum", or "mean", which divides by k however many codes are deleted.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        y, [T, D] in table's dtype. The weight of a deleted code counts as 0.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: an input requires grad, or the implementation asked for cannot run.
    """
    given = ids, weights, table, bias, residual, mask_table, mask_row
    op = _native("masked_decode", impl, *given)
    checks_itself = op is not None and ids.dtype is torch.int32 and reduce in REDUCES
    if not checks_itself:
        _check_decode(*given, reduce)
        op = choose("masked_decode", impl, table.device)
        given = ids.int(), *given[1:]
    try:
        return op(*given, reduce == "mean")
    except RuntimeError as error:
        if not checks_itself:
            raise
        refused = error
    _check_decode(*given, reduce)
    raise refused


def _check_decode(
    ids: Tensor,
    weights: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask_table: Tensor | None,
    mask_row: Tensor | None,
    reduce: Reduce,
) -> None:
    check_matrix("table", table)
    C, D = table.shape
    if ids.dtype not in INTS or ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids is {ids.dtype} {shape(ids)}; it should be int32 or int64 [T, k] with k >= 1")
    T = ids.shape[0]
    check_device("ids", ids, "table", table)
    for name, tensor, wanted in (("weights", weights, tuple(ids.shape)), ("residual", residual, (T, D))):
        if tensor is not None:
            check_matrix(name, tensor)
            check_device(name, tensor, "table", table)
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} has shape {shape(tensor)}; it should be {list(wanted)}")
    check_vector("bias", bias, D, "D", table.device)
    check_mask(mask_table, mask_row, T, C, table.device)
    check_choice("reduce", reduce, REDUCES)
    refuse_grad("masked_decode", weights=weights, table=table, bias=bias, residual=residual)
    check_values("ids", ids, C)


def codebook_bottleneck(
    x: Tensor,
    encoder: tuple[PackedCodes, Tensor | None] | None,
    packed: PackedCodes,
    table: Tensor,
    b_dec: Tensor | None = None,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    *,
    k: int,
    activation: Activation = "relu",
    mask_mode: MaskMode = "ablate",
    weight: Weight = "one",
    receipt: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The three operators in one call: sae_encode, codebook_quantize, masked_decode. For latency at small T.

    Args:
        x: [T, D], fp32, bf16 or fp16.
        encoder: (W_enc [E, D] with b_enc, packed as for :func:`sae_encode`; b_pre [D] or None = 0); None = x is z, and E
            is D.
        packed: from :func:`pack_codes`.
        table: [C, D], the decoded row of each code, which it adds to y.
        b_dec: [D], or None = 0.
        mask_table: int32 [U, ceil(C/32)], or None = nothing deleted; see the module's docstring.
        mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.
        k: codes kept per token, 1 <= k <= C.
        activation: of the encoder: "relu" or "none".
        mask_mode: "reselect" = a deleted code is not selected; "ablate" = it is selected, and adds nothing.
        weight: of a selected code: "one" = 1, "mean" = 1 / k, "score" = relu(score).
        receipt: int64 [2], added to in place: T, and the codes that the mask took away; None = not counted.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        y, [T, D] in table's dtype.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: an input requires grad, or the implementation asked for cannot run.
    """
    W_enc, b_pre = encoder or (None, None)
    op = _native("codebook_bottleneck", impl, x, table, b_dec, b_pre, mask_table, mask_row, receipt)
    checks_itself = (
        op is not None
        and type(k) is int
        and (_packed_for(packed, x) if W_enc is None else _packed_for(W_enc, x) and _packed_for(packed, W_enc.factor))
        and activation in ACTIVATIONS
        and mask_mode in MASK_MODES
        and weight in WEIGHTS
    )
    given = x, W_enc, b_pre, packed, table, b_dec, mask_table, mask_row, k, activation, mask_mode, weight, receipt
    if not checks_itself:
        check_bottleneck(*given)
        op = choose("codebook_bottleneck", impl, x.device)
    encode = (None, None, None, None) if W_enc is None else (W_enc.digits, W_enc.factor, W_enc.bias, b_pre)
    scan = packed.scan or reference.NO_SCAN
    try:
        return op(
            x, *encode, activation == "relu", packed.digits, packed.factor, packed.bias, k, mask_table, mask_row,
            mask_mode == "reselect", *scan, table, b_dec, weight == "score", weight == "mean", receipt,
        )  # fmt: skip
    except RuntimeError as error:
        if not checks_itself:
            raise
        refused = error
    check_bottleneck(*given)
    raise refused


# The native operators check shapes, dtypes and values too, for those that call them directly. So on a CPU, where reading
# a tensor's attributes from Python takes as long as a small kernel, they check first, and the checks here run where one
# refuses, to say why.


def _native(name: str, impl: Impl, first: Tensor, *others: Tensor | None) -> Callable[..., Any] | None:
    """The native operator for a CPU, where it would refuse by itself what the checks of shapes, dtypes and values do.

    None where another implementation runs, and where what it does not look at is not certain: a tensor that is none, or
    a subclass's, is elsewhere, or requires a gradient.
    """
    if torch.compiler.is_compiling() or first is None:
        return None
    grad = torch.is_grad_enabled()
    for tensor in (first, *others):
        if tensor is not None and (type(tensor) not in _PLAIN or not tensor.is_cpu or (grad and tensor.requires_grad)):
            return None
    op = choose(name, impl, _CPU)
    return op if op is getattr(torch.ops.cu_fast, name, None) else None


_CPU, _PLAIN = torch.device("cpu"), (Tensor, nn.Parameter)


def _packed_for(packed: Any, rows: Tensor) -> bool:
    """Whether rows on the CPU are as wide as codes that are packed there; of packed rows their factor [E] stands for [T, E]."""
    return type(packed) is PackedCodes and packed.factor.is_cpu and rows.shape[-1:] == (packed.width,)
