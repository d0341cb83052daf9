"""Gemma Scope 2 (google/gemma-scope-2-*): .../layer_{L}_width_{W}_l0_{small,medium,big}/params.safetensors, config.json.

w_enc [Din, C], w_dec [C, Dout], b_enc [C], b_dec [Dout], threshold [C]; for some transcoders affine_skip_connection
[Din, Dout]. JumpReLU, whatever the training was. config.json may be missing.

    w = w_enc^T, b = b_enc, theta = threshold, v = w_dec

b_dec is not subtracted from x. It is kept where there is no skip connection beside it. A transcoder
says two sites. Cross-layer transcoders (w_dec [C, layers, Dout]) write in many places, and are refused.
"""

from __future__ import annotations

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, folded, refuse_scaling, text

NAME = "gemma_scope_2"
FILE, CONFIG = "params.safetensors", None
SAID = "config.json"
SHAPES = {"w_enc": "Din C", "w_dec": "C Dout", "b_enc": "C", "b_dec": "Dout", "threshold": "C"}
KEYS = (tuple(SHAPES),)


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    said = source.folder / SAID
    config = source.config(SAID) if said.is_file() else {}
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        raise ValueError(f"{said}: 'architecture' is {architecture!r}; it should be 'jump_relu'")
    site, site_out = text(said, config, "hf_hook_point_in"), text(said, config, "hf_hook_point_out")
    optional = {"affine_skip_connection": "Din Dout", "scaling_factor": "C"}
    tensors, entry = source.tensors(SHAPES, optional)
    refuse_scaling(source.path, tensors, "scaling_factor")
    return SAE(
        enc=folded(tensors["w_enc"].T),
        bias=tensors["b_enc"].float(),
        theta=tensors["threshold"].float(),
        dec=folded(tensors["w_dec"]),
        site=site,
        site_out=None if site_out == site else site_out,
        family=NAME,
        b_dec=None if "affine_skip_connection" in tensors else folded(tensors["b_dec"][None])[0],
        provenance=Provenance(dtype=entry.dtype, model=text(said, config, "model_name")),
    )
