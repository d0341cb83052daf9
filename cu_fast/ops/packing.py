"""What is computed once per codebook, for every later selection from it."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.ops.checks import check_choice, check_matrix, check_vector, refuse_grad, shape
from cu_fast.ops.choice import auto_kernels, resolve

Similarity = Literal["cosine", "dot", "l2"]
Scan = Literal["auto", "int8", "fp32"]
SIMILARITIES, SCANS = get_args(Similarity), get_args(Scan)

# scan="auto" takes the int8 plane from this many codes on, and between these widths: see choose_scan.
SCAN_CODES = 512
SCAN_WIDTHS = (32, 32768)


class ScanPlane(NamedTuple):
    """Codes in int8 for the certified scan of the kernels, with what bounds its error (``csrc/core/scan.h``).

    About C * E bytes: a quarter of fp32 codes.

    Attributes:
        plane: uint8 [ceil(C/64), ceil(E/4), 64, 4], the quantized codes.
        terms: fp32 [ceil(C/64), 196], scale and error bounds of each code, and the largest of each 64 codes.
        mean: fp32 [E], subtracted from every code before it is rounded; 0 = not centred.
    """

    plane: Tensor
    terms: Tensor
    mean: Tensor


class PackedCodes(NamedTuple):
    """A codebook with what is computed once for it. Made by :func:`pack_codes`; shares memory with its input.

    Attributes:
        codes: [C, E], fp32, bf16 or fp16.
        similarity: "cosine", "dot" or "l2".
        inv_norm: fp32 [C], 1 / ||c|| for "cosine"; else None.
        bias: fp32 [C], added to each score; for "l2" it is -0.5 ||c||^2. None = 0.
        scan: the int8 plane, or None = every code is scored as it is. The results do not depend on it.
    """

    codes: Tensor
    similarity: Similarity
    inv_norm: Tensor | None
    bias: Tensor | None
    scan: ScanPlane | None = None


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
        PackedCodes, on the device of codes.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: codes or bias requires grad, or scan is "int8" and no kernels can run on the device.
    """
    check_matrix("codes", codes)
    check_choice("similarity", similarity, SIMILARITIES)
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


def choose_scan(C: int, E: int) -> Literal["int8", "fp32"]:
    """What scan="auto" means for C codes of width E.

    The error bound of an int8 score grows with sqrt(E) relative to the spread of the scores, so that most of very wide
    codes would be scored twice. For narrow or few codes the scan saves too few products to pay for itself.
    """
    return "int8" if C >= SCAN_CODES and SCAN_WIDTHS[0] <= E <= SCAN_WIDTHS[1] else "fp32"


def selection_plan(T: int, packed: PackedCodes, k: int) -> str:
    """How the native kernels would select on the device of the codes: scan or not, and how the work is cut.

    Args:
        T: tokens.
        packed: from :func:`pack_codes`.
        k: codes kept per token.

    Returns:
        A text for people; results never depend on the plan. On a CPU it is for the threads that torch has now.

    Raises:
        RuntimeError: the native kernels cannot run.
    """
    C, E = packed.codes.shape
    device, scan = packed.codes.device, packed.scan is not None
    impl = resolve("cuda" if device.type == "cuda" else "cpu", device)
    if impl == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        code_bytes = packed.codes.element_size()
        return torch.ops.cu_fast.cuda_selection_plan(T, C, E, k, code_bytes, scan, multiprocessors)
    return torch.ops.cu_fast.selection_plan(T, C, E, k, torch.get_num_threads(), scan)


def _pack_scan(codes: Tensor, inv_norm: Tensor | None, scan: Scan) -> ScanPlane | None:
    check_choice("scan", scan, SCANS)
    if scan == "fp32" or (scan == "auto" and choose_scan(*codes.shape) == "fp32"):
        return None
    impl, reason = auto_kernels(codes.device)
    if impl == "cpu" and codes.device.type == "cpu":
        return ScanPlane(*torch.ops.cu_fast.pack_scan(codes, inv_norm))
    if impl in ("cuda", "triton"):
        return ScanPlane(*reference.pack_scan(codes, inv_norm))
    if scan == "int8":
        raise RuntimeError(f"scan='int8' needs kernels for {codes.device} tensors: {reason or 'there are none'}")
    return None
