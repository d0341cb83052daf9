"""The operators in plain PyTorch: the specification, the fallback, and the oracle of every test.

Written to be read next to the operator contract in ``docs/contract.md``, not to be fast. It runs on any device,
and like every implementation it never builds the [T, C] matrix: codes are visited in tiles, and a list of the best k is
kept. Signatures are the operators' schemas (``operators.py``), so the int8 plane that kernels scan is an argument here
too, and ignored.

T tokens, D model width, E code width, C codes, k codes kept per token, U masks in a table; R latents, at most M of
them changed by a mask.

Unlike the native kernels, PyTorch follows the process's denormal setting: under ``torch.set_flush_denormal(True)`` tiny
products differ here.
"""

from cu_fast.kernels.reference.canonical import (
    LANES,
    LAYER_NORM_EPS,
    canonical_dot,
    inverse_norm,
    root,
    squared_norm,
    token_scales,
)
from cu_fast.kernels.reference.codebook import (
    NO_SCAN,
    codebook_bottleneck,
    codebook_quantize,
    is_deleted,
    masked_decode,
    sae_encode,
    sae_encode_topk,
)
from cu_fast.kernels.reference.latents import MAX_LATENTS, delete_latents
from cu_fast.kernels.reference.packing import pack_scan

__all__ = [
    "LANES",
    "LAYER_NORM_EPS",
    "MAX_LATENTS",
    "NO_SCAN",
    "canonical_dot",
    "codebook_bottleneck",
    "codebook_quantize",
    "delete_latents",
    "inverse_norm",
    "is_deleted",
    "masked_decode",
    "pack_scan",
    "root",
    "sae_encode",
    "sae_encode_topk",
    "squared_norm",
    "token_scales",
]
