"""What is computed once per codebook, for every later selection from it."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cu_fast.kernels import reference
from cu_fast.ops.checks import check_choice, check_device, check_matrix, check_vector, refuse_grad, shape
from cu_fast.ops.choice import auto_kernels, plain, resolve

Similarity = Literal["cosine", "dot", "l2"]
Scan = Literal["auto", "int8", "none"]
SIMILARITIES, SCANS = get_args(Similarity), get_args(Scan)

# scan="auto" takes the int8 plane from this many codes on, and between these widths: see choose_scan.
SCAN_CODES = 512
SCAN_WIDTHS = (32, 32768)


class ScanPlane(NamedTuple):
    """Codes in int8 for the certified scan of the kernels, with what bounds its error (``csrc/core/scan.h``).

    About C * E bytes.

    Attributes:
        plane: uint8 [ceil(C/64), ceil(E/4), 64, 4], the quantized codes.
        terms: fp32 [ceil(C/64), 196], scale and error bounds of each code, and the largest of each 64 codes.
        mean: fp32 [E], subtracted from every code before it is rounded; 0 = not centred.
    """

    plane: Tensor
    terms: Tensor
    mean: Tensor


class PackedCodes(NamedTuple):
    """Rows of weights with what is computed once for them: a codebook, or an encoder. Made by :func:`pack_codes`.

    About 3 C E bytes, and C E more with a scan. Shares no memory with what it was made of.

    Attributes:
        digits: int8 [C, 3, W], the rows as integers of 24 bits, in digits; W is E, padded to a multiple of 64.
        factor: fp32 [C], what a row's integer product is multiplied with; NaN for a row with NaN or Inf.
        bias: fp32 [C], added to each score; for "l2" it is -0.5 ||c||^2. None = 0.
        width: E.
        similarity: "cosine", "dot" or "l2".
        scan: the int8 plane, or None = every code is scored. The results do not depend on it.
    """

    digits: Tensor
    factor: Tensor
    bias: Tensor | None
    width: int
    similarity: Similarity
    scan: ScanPlane | None = None

    def to(self, device: torch.device | str) -> PackedCodes:
        """The same on a device."""
        moved = (None if part is None else part.to(device) for part in self[:3])
        scan = None if self.scan is None else ScanPlane(*(part.to(device) for part in self.scan))
        return PackedCodes(*moved, self.width, self.similarity, scan)


def pack_codes(
    codes: Tensor, similarity: Similarity = "cosine", bias: Tensor | None = None, scan: Scan = "auto"
) -> PackedCodes:
    """Do the work of a codebook, or of an encoder's weights, once: integers, norms, and the int8 plane of the scan.

    Pack again after changing the codes.

    Args:
        codes: [C, E], fp32, bf16 or fp16; of an encoder W_enc [E, D], with similarity "dot".
        similarity: "cosine" scores z.c / ||c|| (||z|| does not change the order, so it is left out);
            "dot" z.c; "l2" z.c - 0.5 ||c||^2, which orders like -||z - c||.
        bias: [C], added to each score, or None; of an encoder b_enc. Not with "l2", whose norm term takes its place.
        scan: "int8" adds the plane that the kernels scan instead of the codes, several times faster and just
            as exact; "none" leaves it out; "auto" decides by :func:`choose_scan`. A dense encoder has no use for it.

    Returns:
        PackedCodes, on the device of codes.

    Raises:
        ValueError: an argument with a wrong shape, device or value.
        TypeError: an argument with a wrong dtype.
        RuntimeError: codes or bias requires grad, or scan is "int8" and no kernels can run on the device.
    """
    check_matrix("codes", codes)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("scan", scan, SCANS)
    C, E = codes.shape
    if C == 0 or E == 0:
        raise ValueError(f"codes has shape {shape(codes)}; it should hold at least one code of width >= 1")
    if C > 2**31 - 1:
        raise ValueError(f"codes has {C} rows; ids are int32, so at most 2^31 - 1 are possible")
    if E > reference.MOST_WIDTH:
        raise ValueError(f"codes are {E} wide; at most {reference.MOST_WIDTH} are possible: sums of digits are int32")
    check_vector("bias", bias, C, "C", codes.device)
    refuse_grad("pack_codes", codes=codes, bias=bias)
    if similarity == "l2" and bias is not None:
        raise ValueError("bias is given with similarity 'l2', whose own term takes its place; pass bias=None")
    pack = torch.ops.cu_fast.pack_digits if _packs_natively(codes.device) else plain("pack_digits")
    digits, step, squares = pack(codes)
    factor = plain("cosine_factor")(step, squares) if similarity == "cosine" else step
    if similarity == "l2":
        bias = plain("l2_bias")(step, squares)
    elif bias is not None:
        bias = bias.to(torch.float32, copy=True).contiguous()
    return PackedCodes(digits, factor, bias, E, similarity, _pack_scan(digits, factor, E, scan))


def check_packed(name: str, packed: PackedCodes, rows_name: str, rows: Tensor, as_wide: bool = True) -> int:
    """Raises for what :func:`pack_codes` did not make, or what does not go with the rows that are scored.

    Args:
        name: the argument's.
        packed: its value.
        rows_name: of the rows that are scored.
        rows: [T, E].
        as_wide: whether rows have the codes' width; False where an encoder comes between.

    Returns:
        How many codes there are.

    Raises:
        TypeError: not packed, or rows of a wrong dtype.
        ValueError: rows of another shape or device.
    """
    if not isinstance(packed, PackedCodes):
        raise TypeError(f"{name} is {type(packed).__name__}; it should be packed: pass what pack_codes makes of it")
    check_matrix(rows_name, rows, width=packed.width if as_wide else None, of=f"the codes in {name}")
    check_device(name, packed.factor, rows_name, rows)
    return packed.factor.shape[0]  # len() calls Python


def choose_scan(C: int, E: int) -> Literal["int8", "none"]:
    """What scan="auto" means for C codes of width E.

    The error bound of an int8 score grows with sqrt(E) relative to the spread of the scores, so that most of very wide
    codes would be scored twice. For narrow or few codes the scan saves too few products to pay for itself.
    """
    return "int8" if C >= SCAN_CODES and SCAN_WIDTHS[0] <= E <= SCAN_WIDTHS[1] else "none"


def selection_plan(T: int, packed: PackedCodes, k: int) -> str:
    """How the native kernels would select on the device of the codes: scan or not, and how the work is cut.

    On a GPU also what the plan was decided by: predicted microseconds of both ways, and expected candidates.

    Args:
        T: tokens.
        packed: from :func:`pack_codes`.
        k: codes kept per token.

    Returns:
        A text for people; results never depend on the plan. On a CPU it is for the threads that torch has now.

    Raises:
        RuntimeError: the native kernels cannot run.
    """
    C, E = len(packed.factor), packed.width
    device, scan = packed.factor.device, packed.scan is not None
    impl = resolve("cuda" if device.type == "cuda" else "cpu", device)
    if impl == "cuda":
        card = torch.cuda.get_device_properties(device)
        return torch.ops.cu_fast.cuda_selection_plan(
            T, C, E, k, scan, card.multi_processor_count, card.major, card.minor
        )
    return torch.ops.cu_fast.selection_plan(T, C, E, k, torch.get_num_threads(), scan)


def _packs_natively(device: torch.device) -> bool:
    return device.type == "cpu" and resolve("auto", device) == "cpu"


def _pack_scan(digits: Tensor, factor: Tensor, E: int, scan: Scan) -> ScanPlane | None:
    if scan == "none" or (scan == "auto" and choose_scan(digits.shape[0], E) == "none"):
        return None
    device = digits.device
    if _packs_natively(device):
        return ScanPlane(*torch.ops.cu_fast.pack_scan(digits, factor, E))
    impl, reason = auto_kernels(device)
    if impl in ("cuda", "triton"):
        return ScanPlane(*plain("pack_scan")(digits, factor, E))
    if scan == "int8":
        raise RuntimeError(f"scan='int8' needs kernels for {device} tensors: {reason or 'there are none'}")
    return None
