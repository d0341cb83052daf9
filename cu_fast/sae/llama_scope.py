"""Llama Scope (fnlp/Llama3_1-8B-Base-LX*): hyperparams.json and checkpoints/final.safetensors, bf16.

encoder.weight [C, D], encoder.bias [C], decoder.weight [D, C], decoder.bias [D]. JumpReLU with one threshold. By the loader of
those that released it (OpenMOSS, Language-Model-SAEs, December 2024), with
s_in, s_out = sqrt(D) / dataset_average_activation_norm and n = ||decoder column|| s_in / s_out:

    w = encoder.weight n, b = encoder.bias n / s_in, theta = jump_relu_threshold, v = decoder column s_in / s_out / n
    b_dec = decoder.bias / s_out

n = 1 unless sparsity_include_decoder_norm. SAELens leaves n out, which is the same where the decoder's columns are of length 1.
Refused: a norm_activation other than "dataset-wise", apply_decoder_bias_to_pre_encoder, activations other than JumpReLU.
"""

from __future__ import annotations

import math

import torch

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, chosen, flag, folded, integer, lengths, number, part, text

NAME = "llama_scope"
FILE, CONFIG = "checkpoints/final.safetensors", "hyperparams.json"
SHAPES = {"encoder.weight": "C D", "encoder.bias": "C", "decoder.weight": "D C", "decoder.bias": "D"}
KEYS = (tuple(SHAPES),)


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    said, config = source.folder / CONFIG, source.config(CONFIG)
    for key, wanted in (("norm_activation", "dataset-wise"), ("act_fn", "jumprelu")):
        chosen(said, config, key, wanted, [wanted])
    if flag(said, config, "apply_decoder_bias_to_pre_encoder", False):
        raise ValueError(f"{said}: 'apply_decoder_bias_to_pre_encoder' is true; it should be false")
    D, C = integer(said, config, "d_model"), integer(said, config, "d_sae")
    norms = part(said, config, name := "dataset_average_activation_norm")
    s_in, s_out = (math.sqrt(D) / number(said, norms, end, f"{name}.{end}") for end in ("in", "out"))
    threshold = number(said, config, "jump_relu_threshold")
    tensors, entry = source.tensors(SHAPES, {}, {"C": C, "D": D})
    w, v = tensors["encoder.weight"], tensors["decoder.weight"].T
    n = torch.ones(C, dtype=torch.float64)
    if flag(said, config, "sparsity_include_decoder_norm", True):
        n = lengths(v) * (s_in / s_out)
    site, site_out = text(said, config, "hook_point_in"), text(said, config, "hook_point_out")
    return SAE(
        enc=folded(w, n),
        bias=(tensors["encoder.bias"].double() * n / s_in).float(),
        theta=torch.full((C,), threshold),
        dec=folded(v, torch.where(n > 0, s_in / s_out / n, 0.0)),
        site=site,
        site_out=None if site_out == site else site_out,
        family=NAME,
        b_dec=(tensors["decoder.bias"].double() / s_out).float(),
        provenance=Provenance(dtype=entry.dtype),
    )
