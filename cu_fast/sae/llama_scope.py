"""Llama Scope (fnlp/Llama3_1-8B-Base-LX*): hyperparams.json and checkpoints/final.safetensors, bf16.

encoder.weight [C, D], encoder.bias [C], decoder.weight [D, C], decoder.bias [D]. JumpReLU with one threshold. By the loader of
those that released it (OpenMOSS, Language-Model-SAEs, December 2024), with
s_in, s_out = sqrt(D) / dataset_average_activation_norm and n = ||decoder column|| s_in / s_out:

    w = encoder.weight n, b = encoder.bias n / s_in, theta = jump_relu_threshold, v = decoder column s_in / s_out / n

n = 1 unless sparsity_include_decoder_norm. SAELens leaves n out, which is the same where the decoder's columns are of length 1.
Refused: a norm_activation other than "dataset-wise", apply_decoder_bias_to_pre_encoder, activations other than JumpReLU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from cu_fast.files import read_json
from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import flag, folded, integer, lengths, read_tensors, text

NAME = "llama_scope"
FILE, CONFIG = "checkpoints/final.safetensors", "hyperparams.json"
SHAPES = {"encoder.weight": "C D", "encoder.bias": "C", "decoder.weight": "D C", "decoder.bias": "D"}
WANTS = f"{CONFIG}, {FILE} with {', '.join(SHAPES)}"


def recognises(files: Collection[str], keys: Mapping[str, Collection[str]]) -> bool:
    """Whether a folder is one of this family.

    Args:
        files: names of its files.
        keys: of its files of tensors: name -> keys.
    """
    return CONFIG in files and set(SHAPES) <= set(keys.get(FILE, ()))


def read(folder: Path) -> SAE:
    """The autoencoder of a folder of this family.

    Args:
        folder: its absolute path.

    Raises:
        ValueError: see :func:`cu_fast.sae.load_sae`.
    """
    path, said = folder / FILE, folder / CONFIG
    config = read_json(said)
    for key, wanted in (("norm_activation", "dataset-wise"), ("act_fn", "jumprelu")):
        if (value := config.get(key, wanted)) != wanted:
            raise ValueError(f"{said}: {key!r} is {value!r}; it should be {wanted!r}")
    if flag(said, config, "apply_decoder_bias_to_pre_encoder", False):
        raise ValueError(f"{said}: 'apply_decoder_bias_to_pre_encoder' is true; it should be false")
    D, C = integer(said, config, "d_model"), integer(said, config, "d_sae")
    norms = config.get("dataset_average_activation_norm")
    norms = norms if isinstance(norms, dict) else {}
    s_in, s_out = (
        math.sqrt(D) / _positive(said, norms, f"dataset_average_activation_norm.{end}") for end in ("in", "out")
    )
    threshold = _positive(said, config, "jump_relu_threshold")
    tensors, entry = read_tensors(path, SHAPES, {}, {"C": C, "D": D})
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
        provenance=Provenance(dtype=entry.dtype),
    )


def _positive(said: Path, config: Mapping[str, Any], name: str) -> float:
    """A positive number, by the last part of its name."""
    value = config.get(name.split(".")[-1])
    if type(value) not in (int, float) or not value > 0:
        raise ValueError(f"{said}: {name!r} is {value!r}; it should be a positive number")
    return float(value)
