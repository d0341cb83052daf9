"""Gemma Scope 2 (google/gemma-scope-2-*): .../layer_{L}_width_{W}_l0_{small,medium,big}/params.safetensors, config.json.

w_enc [Din, C], w_dec [C, Dout], b_enc [C], b_dec [Dout], threshold [C]; for some transcoders affine_skip_connection
[Din, Dout]. JumpReLU, whatever the training was. config.json may be missing.

    w = w_enc^T, b = b_enc, theta = threshold, v = w_dec

b_dec is not subtracted from x; b_dec and the skip connection are the same with and without a deleted latent. A transcoder
says two sites. Cross-layer transcoders (w_dec [C, layers, Dout]) write in many places, and are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from cu_fast.files import read_json
from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import folded, read_tensors, refuse_scaling, text

NAME = "gemma_scope_2"
FILE, CONFIG = "params.safetensors", "config.json"
SHAPES = {"w_enc": "Din C", "w_dec": "C Dout", "b_enc": "C", "b_dec": "Dout", "threshold": "C"}
WANTS = f"{FILE} with {', '.join(SHAPES)}"


def recognises(files: Collection[str], keys: Mapping[str, Collection[str]]) -> bool:
    """Whether a folder is one of this family.

    Args:
        files: names of its files.
        keys: of its files of tensors: name -> keys.
    """
    return set(SHAPES) <= set(keys.get(FILE, ()))


def read(folder: Path) -> SAE:
    """The autoencoder of a folder of this family.

    Args:
        folder: its absolute path.

    Raises:
        ValueError: see :func:`cu_fast.sae.load_sae`.
    """
    path, said = folder / FILE, folder / CONFIG
    config = read_json(said) if said.is_file() else {}
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        raise ValueError(f"{said}: 'architecture' is {architecture!r}; it should be 'jump_relu'")
    site, site_out = text(said, config, "hf_hook_point_in"), text(said, config, "hf_hook_point_out")
    optional = {"affine_skip_connection": "Din Dout", "scaling_factor": "C"}
    tensors, entry = read_tensors(path, SHAPES, optional)
    refuse_scaling(path, tensors, "scaling_factor")
    return SAE(
        enc=folded(tensors["w_enc"].T),
        bias=tensors["b_enc"].float(),
        theta=tensors["threshold"].float(),
        dec=folded(tensors["w_dec"]),
        site=site,
        site_out=None if site_out == site else site_out,
        family=NAME,
        provenance=Provenance(dtype=entry.dtype, model=text(said, config, "model_name")),
    )
