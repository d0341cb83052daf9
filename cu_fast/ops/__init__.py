"""The three operators: contract, host checks, and choice of implementation.

    sae_encode         z   = act((x - b_pre) W_enc^T + b_enc)               x [T, D] -> z [T, E]
    codebook_quantize  ids = the k best codes by score(z, j), not deleted    z [T, E] -> scores, ids [T, k]
    masked_decode      y   = reduce_i(w_i table[ids_i]) + bias + residual    ids [T, k] -> y [T, D]

T tokens, D model width, E code width, C codes, k codes kept a token, U masks in a table. Scores are defined
numbers and selection is a total order (score descending, then id ascending), so every implementation returns
the same bits: see ``docs/contract.md``. Inputs are fp32, bf16 or fp16; a last dimension that is not
contiguous is copied; outputs never alias inputs, and inputs are never written to.

A mask is ``mask_table``, int32 [U, ceil(C/32)] (bit j % 32 of word j // 32 set = code j deleted), with
``mask_row``, int32 [T]: the row that holds for each token, -1 = nothing deleted. Give both or neither.

``impl`` is "reference" (plain PyTorch), "cpu" or "cuda" (the native library's kernels), "triton", or "auto": the kernels
for the device, on a GPU "cuda" before "triton", and "reference" where none can run. An explicit choice never falls back.
On a GPU nothing waits for the device, so values in tensors are not looked at before a kernel runs: a mask_row that is no
row of the table, or an id beyond it, makes the token's row NaN instead of raising. All operators are for inference: an
input that requires grad raises; ``cu_fast.nn`` holds the training path.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.ops.checks import (
    INTS,
    check_device,
    check_k,
    check_mask,
    check_matrix,
    check_values,
    check_vector,
    refuse_grad,
    shape,
)
from cu_fast.ops.choice import available_impls as available_impls
from cu_fast.ops.choice import choose, kernels
from cu_fast.ops.choice import resolve as resolve

Similarity = Literal["cosine", "dot", "l2"]
Scan = Literal["auto", "int8", "fp32"]
SCAN_CODES = 512
SCAN_WIDTHS = (32, 32768)


class ScanPlane(NamedTuple):
    """Codes in int8 for the certified scan of the kernels, with what bounds its error (``csrc/core/scan.h``).

    plane uint8 [ceil(C/64), ceil(E/4), 64, 4]; terms fp32 [ceil(C/64), 196]; mean fp32 [E], 0: not centred.
    About C * E bytes: a quarter of fp32 codes.
    """

    plane: Tensor
    terms: Tensor
    mean: Tensor


class PackedCodes(NamedTuple):
    """A codebook with what is computed once for it. Made by :func:`pack_codes`; shares memory with its input.

    codes [C, E]; inv_norm fp32 [C] (cosine) or None; bias fp32 [C] or None (for l2: -0.5 ||c||^2); scan: the int8
    plane, or None where every code is scored as it is. Results are the same with and without it.
    """

    codes: Tensor
    similarity: str
    inv_norm: Tensor | None
    bias: Tensor | None
    scan: ScanPlane | None = None


class Selection(NamedTuple):
    """What a selection returns: scores fp32 [T, k] and ids int32 [T, k], best first; hits int32 [T] or None.

    Where fewer than k codes are left the slot holds id -1 and score 0. A row with NaN or Inf holds id -1 and
    score NaN, which :func:`masked_decode` turns into a NaN row.
    """

    scores: Tensor
    ids: Tensor
    hits: Tensor | None


def pack_codes(
    codes: Tensor, similarity: Similarity = "cosine", bias: Tensor | None = None, scan: Scan = "auto"
) -> PackedCodes:
    """Do a codebook's work once: inverse norms (cosine) or -0.5 ||c||^2 (l2), and the int8 plane of the scan.

    Args:
        codes: [C, E], fp32, bf16 or fp16. Kept, not copied, when contiguous: pack again after changing it.
        similarity: "cosine" scores z.c / ||c|| (||z|| does not change the order, so it is left out);
            "dot" z.c; "l2" z.c - 0.5 ||c||^2, which orders like -||z - c||.
        bias: [C], added to each score, or None. Not with "l2", whose norm term takes its place.
        scan: "int8" adds the plane that the kernels scan instead of the codes, several times faster and just
            as exact; "fp32" leaves it out; "auto" decides by :func:`choose_scan`.

    Returns:
        PackedCodes.

    Raises:
        ValueError, TypeError: an argument with a wrong shape, dtype or value, named in the message.
    """
    check_matrix("codes", codes)
    if similarity not in ("cosine", "dot", "l2"):
        raise ValueError(f"similarity is {similarity!r}; it should be 'cosine', 'dot' or 'l2'")
    if codes.shape[0] == 0 or codes.shape[1] == 0:
        raise ValueError(f"codes has shape {shape(codes)}; it should hold at least one code of width >= 1")
    if codes.shape[0] > 2**31 - 1:
        raise ValueError(f"codes has {codes.shape[0]} rows; ids are int32, so at most 2^31 - 1 are possible")
    check_vector("bias", bias, codes.shape[0], "C", codes.device)
    refuse_grad("pack_codes", codes=codes, bias=bias)
    if similarity == "l2" and bias is not None:
        raise ValueError("bias is given with similarity 'l2', whose own term takes its place; pass bias=None")
    codes = codes.contiguous()
    inv_norm = reference.inverse_norm(codes) if similarity == "cosine" else None
    if similarity == "l2":
        bias = -0.5 * reference.squared_norm(codes)
    elif bias is not None:
        bias = bias.float().contiguous()
    return PackedCodes(codes, similarity, inv_norm, bias, _pack_scan(codes, inv_norm, scan))


def choose_scan(C: int, E: int) -> str:
    """What scan="auto" means for [C, E] codes: "int8" or "fp32".

    The bound on an int8 score grows with sqrt(E) against the scores' spread, so that for very wide codes most
    would be scored twice; and narrow ones have no products to save.
    """
    return "int8" if C >= SCAN_CODES and SCAN_WIDTHS[0] <= E <= SCAN_WIDTHS[1] else "fp32"


def selection_plan(T: int, packed: PackedCodes, k: int) -> str:
    """How the native kernels would select for T tokens where the codes are: scan or not, and how the work is cut.

    On a CPU with the threads that torch has now. A text for people; results never depend on it. Raises RuntimeError
    where the native kernels cannot run.
    """
    C, E = packed.codes.shape
    device, scan = packed.codes.device, packed.scan is not None
    impl = resolve("cuda" if device.type == "cuda" else "cpu", device)
    if impl == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        code_bytes = packed.codes.element_size()
        return torch.ops.cu_fast.cuda_selection_plan(T, C, E, k, code_bytes, scan, multiprocessors)
    return torch.ops.cu_fast.selection_plan(T, C, E, k, torch.get_num_threads(), scan)


def _pack_scan(codes: Tensor, inv_norm: Tensor | None, scan: str) -> ScanPlane | None:
    if scan not in ("auto", "int8", "fp32"):
        raise ValueError(f"scan is {scan!r}; it should be 'auto', 'int8' or 'fp32'")
    if scan == "fp32" or (scan == "auto" and choose_scan(*codes.shape) == "fp32"):
        return None
    impl, reason = kernels(codes.device)
    if impl == "cpu" and codes.device.type == "cpu":
        return ScanPlane(*torch.ops.cu_fast.pack_scan(codes, inv_norm))
    if impl in ("cuda", "triton"):
        return ScanPlane(*reference.pack_scan(codes, inv_norm))
    if scan == "int8":
        raise RuntimeError(f"scan='int8' needs kernels for {codes.device} tensors: {reason or 'there are none'}")
    return None


def codebook_quantize(
    z: Tensor,
    packed: PackedCodes,
    *,
    k: int,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    return_hits: bool = False,
    impl: str = "auto",
) -> Selection:
    """The k best codes of every row of z that are not deleted (contract, sections 2 to 4: mode "reselect").

    Args:
        z: [T, E].
        packed: from :func:`pack_codes`.
        k: codes kept a token, 1 <= k <= C.
        mask_table, mask_row: see the module's docstring. A deleted code cannot come out.
        return_hits: also count, for each token, the deleted codes that would have been among its k.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        Selection(scores fp32 [T, k], ids int32 [T, k], hits int32 [T] or None).

    Raises:
        ValueError, TypeError: an argument with a wrong shape, dtype, device or value.
        RuntimeError: z or the codes require grad, or the implementation asked for is not available.
    """
    C, E = packed.codes.shape
    check_matrix("z", z, width=E, of="packed.codes")
    check_k(k, C)
    check_device("packed.codes", packed.codes, "z", z)
    check_mask(mask_table, mask_row, z.shape[0], C, z.device)
    refuse_grad("codebook_quantize", z=z, codes=packed.codes)
    op, scan = choose("codebook_quantize", impl, z.device), packed.scan or reference.NO_SCAN
    scores, ids, hits = op(z, packed.codes, packed.inv_norm, packed.bias, k, mask_table, mask_row, return_hits, *scan)
    return Selection(scores, ids, hits if return_hits else None)


def sae_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    *,
    activation: Literal["relu", "none"] = "relu",
    k: int | None = None,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    scan: ScanPlane | None = None,
    impl: str = "auto",
) -> Tensor | Selection:
    """A sparse autoencoder's encoder: dense, or with ``k`` the TopK-SAE's fused selection (arXiv 2406.04093).

    Args:
        x: [T, D].
        W_enc: [E, D]; with k its rows are the codes, so E is C.
        b_enc: [E] or None (= 0).
        b_pre: [D], subtracted from x first, or None (= 0).
        activation: "relu" or "none".
        k: None for dense z; else the latents kept a token, 1 <= k <= E.
        mask_table, mask_row: only with k; see the module's docstring.
        scan: only with k: ``pack_codes(W_enc, "dot").scan``, or None. The results do not depend on it.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        Without k: z, fp32 [T, E]. Every entry is a canonical dot product, so that what is selected from it does
        not depend on machine or batch; a row with NaN or Inf in x - b_pre is NaN.
        With k: Selection; ordered by the pre-activation, its scores are activation(score), the decode weights.

    Raises:
        ValueError, TypeError: an argument with a wrong shape, dtype, device or value.
        RuntimeError: an input requires grad, or the implementation asked for is not available.
    """
    check_matrix("W_enc", W_enc)
    E, D = W_enc.shape
    check_matrix("x", x, width=D, of="W_enc")
    check_device("W_enc", W_enc, "x", x)
    check_vector("b_enc", b_enc, E, "W_enc's rows", x.device)
    check_vector("b_pre", b_pre, D, "D", x.device)
    if activation not in ("relu", "none"):
        raise ValueError(f"activation is {activation!r}; it should be 'relu' or 'none'")
    refuse_grad("sae_encode", x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre)
    relu = activation == "relu"
    if k is None:
        if mask_table is not None or mask_row is not None:
            raise ValueError("mask_table and mask_row need k: a dense encode selects nothing to mask")
        if scan is not None:
            raise ValueError("scan needs k: a dense encode selects nothing")
        return choose("sae_encode", impl, x.device)(x, W_enc, b_enc, b_pre, relu)
    check_k(k, E)
    check_mask(mask_table, mask_row, x.shape[0], E, x.device)
    op, plane = choose("sae_encode_topk", impl, x.device), scan or reference.NO_SCAN
    return Selection(*op(x, W_enc, b_enc, b_pre, k, mask_table, mask_row, relu, *plane), None)


def masked_decode(
    ids: Tensor,
    weights: Tensor | None,
    table: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    *,
    reduce: Literal["sum", "mean"] = "sum",
    impl: str = "auto",
) -> Tensor:
    """Gather and sum: y = reduce_i(w_i table[ids_i]) + bias + residual (contract, section 4: mode "ablate").

    Sums run over i in order, in fp32, multiply, then add; then bias, then residual; one rounding at the end.

    Args:
        ids: int32 or int64 [T, k], -1 <= id < C; -1 adds nothing.
        weights: [T, k], or None (= 1). NaN beside id -1 makes the row NaN (see :class:`Selection`).
        table: [C, D].
        bias: [D] or None. residual: [T, D] or None.
        mask_table, mask_row: see the module's docstring. A deleted code's weight becomes 0.
        reduce: "sum", or "mean", which divides by k whatever was deleted.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        y [T, D] in table's dtype.

    Raises:
        ValueError, TypeError: an argument with a wrong shape, dtype, device or value.
        RuntimeError: an input requires grad, or the implementation asked for is not available.
    """
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
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; it should be 'sum' or 'mean'")
    refuse_grad("masked_decode", weights=weights, table=table, bias=bias, residual=residual)
    op = choose("masked_decode", impl, table.device)
    check_values("ids", ids, C)
    return op(ids.int(), weights, table, bias, residual, mask_table, mask_row, reduce == "mean")


def codebook_bottleneck(
    x: Tensor,
    encoder: tuple[Tensor, Tensor | None, Tensor | None] | None,
    packed: PackedCodes,
    table: Tensor,
    b_dec: Tensor | None = None,
    mask_table: Tensor | None = None,
    mask_row: Tensor | None = None,
    *,
    k: int,
    activation: Literal["relu", "none"] = "relu",
    mask_mode: Literal["ablate", "reselect"] = "ablate",
    weight: Literal["one", "mean", "score"] = "one",
    receipt: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The three operators in one call: sae_encode, codebook_quantize, masked_decode. For latency at small T.

    Args:
        x: [T, D].
        encoder: (W_enc [E, D], b_enc [E] or None, b_pre [D] or None), or None: x is z, and D is E.
        packed: from :func:`pack_codes`.
        table: [C, D], what a code adds to y: its decoded row.
        b_dec: [D] or None.
        mask_table, mask_row: see the module's docstring. With mask_mode "reselect" a deleted code is not selected;
            with "ablate" it is, and adds nothing.
        k: codes kept a token.
        weight: of a selected code: 1, 1 / k ("mean"), or relu(score).
        receipt: int64 [2], added to in place: T, and the codes that the mask took from these tokens; or None.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        y [T, D] in table's dtype.

    Raises:
        ValueError, TypeError: an argument with a wrong shape, dtype, device or value.
        RuntimeError: an input requires grad, or the implementation asked for is not available.
    """
    C, E = packed.codes.shape
    W_enc, b_enc, b_pre = encoder or (None, None, None)
    if W_enc is None:
        check_matrix("x", x, width=E, of="packed.codes")
    else:
        check_matrix("W_enc", W_enc)
        check_matrix("x", x, width=W_enc.shape[1], of="W_enc")
        if W_enc.shape[0] != E:
            raise ValueError(f"W_enc has shape {shape(W_enc)}; it should have {E} rows, the width of packed.codes")
        check_device("W_enc", W_enc, "x", x)
        check_vector("b_enc", b_enc, E, "E", x.device)
        check_vector("b_pre", b_pre, W_enc.shape[1], "D", x.device)
    check_matrix("table", table)
    if table.shape[0] != C:
        raise ValueError(f"table has shape {shape(table)}; it should have {C} rows, one a code")
    check_vector("b_dec", b_dec, table.shape[1], "D", x.device)
    check_device("packed.codes", packed.codes, "x", x)
    check_device("table", table, "x", x)
    check_k(k, C)
    check_mask(mask_table, mask_row, x.shape[0], C, x.device)
    for name, value, choices in (
        ("activation", activation, ("relu", "none")),
        ("mask_mode", mask_mode, ("ablate", "reselect")),
        ("weight", weight, ("one", "mean", "score")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(map(repr, choices))}")
    if receipt is not None and (receipt.dtype != torch.int64 or shape(receipt) != [2] or receipt.stride(0) != 1):
        raise ValueError(f"receipt is {receipt.dtype} {shape(receipt)}; it should be int64 [2], contiguous")
    refuse_grad("codebook_bottleneck", x=x, W_enc=W_enc, codes=packed.codes, table=table)
    op, scan = choose("codebook_bottleneck", impl, x.device), packed.scan or reference.NO_SCAN
    return op(
        x, W_enc, b_enc, b_pre, activation == "relu", packed.codes, packed.inv_norm, packed.bias, k, mask_table, mask_row,
        mask_mode == "reselect", *scan, table, b_dec, weight == "score", weight == "mean", receipt,
    )  # fmt: skip
