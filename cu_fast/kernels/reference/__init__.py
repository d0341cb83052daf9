"""The operators in plain PyTorch: the specification, the fallback, and the oracle of every test.

Written to be read next to the operator contract in ``docs/contract.md``, not to be fast. It runs on any device,
and like every implementation it never builds the [T, C] matrix: codes are visited in tiles, and a list of the best k is
kept. Signatures are the operators' schemas (``operators.py``), so the int8 plane that kernels scan is an argument here
too, and ignored.

T tokens, D model width, E code width, C codes, k codes kept per token, U masks in a table; R latents, at most M of
them changed by a mask.

Unlike the native kernels, PyTorch follows the process's denormal setting: under ``torch.set_flush_denormal(True)`` what
``masked_decode`` and ``delete_latents`` add up may differ here. Scores and selections do not.

These functions are for eager PyTorch, which rounds every step. A compiler may fuse a product and a sum, or divide less
exactly: ``torch.ops.cu_fast_reference`` (``operators.py``) has the same functions as operators that none looks into.
"""

from cu_fast.kernels.reference.codebook import (
    NO_SCAN,
    codebook_bottleneck,
    codebook_quantize,
    is_deleted,
    is_missing,
    masked_decode,
    sae_encode,
    sae_encode_topk,
)
from cu_fast.kernels.reference.fixed import (
    ALIGN,
    DIGITS,
    LARGEST,
    MOST_WIDTH,
    cosine_factor,
    digits_of,
    fix_rows,
    integer_dot,
    integers_of,
    l2_bias,
    scores_of,
)
from cu_fast.kernels.reference.latents import MAX_LATENTS, code_changes, delete_latents
from cu_fast.kernels.reference.packing import pack_digits, pack_scan
from cu_fast.kernels.reference.scales import LANES, LAYER_NORM_EPS, root, sum16, token_scales

__all__ = [
    "ALIGN",
    "DIGITS",
    "LANES",
    "LARGEST",
    "LAYER_NORM_EPS",
    "MAX_LATENTS",
    "MOST_WIDTH",
    "NO_SCAN",
    "code_changes",
    "codebook_bottleneck",
    "codebook_quantize",
    "cosine_factor",
    "delete_latents",
    "digits_of",
    "fix_rows",
    "integer_dot",
    "integers_of",
    "is_deleted",
    "is_missing",
    "l2_bias",
    "masked_decode",
    "pack_digits",
    "pack_scan",
    "root",
    "sae_encode",
    "sae_encode_topk",
    "scores_of",
    "sum16",
    "token_scales",
]
