"""Transcoders as circuit-tracer reads them (mwhanna/qwen3-*-transcoders): layer_{L}.safetensors, one per layer; config.yaml.

W_enc [C, D], W_dec [C, Dout], b_enc [C], b_dec [Dout]; for some W_skip [Dout, D], activation_function.threshold [C].

    w = W_enc, b = b_enc, theta = threshold or 0, v = W_dec, b_dec = b_dec

Nothing is subtracted from x. b_dec is kept where there is no W_skip. Where they read and write is in config.yaml beside them,
as feature_input_hook and feature_output_hook; without it the sites are not known. A threshold below 0 would let negative
activations through, which the form does not have: it is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, folded

NAME = "mwhanna"
FILE, CONFIG = "layer_[0-9]*.safetensors", None
SAID = "config.yaml"
SHAPES = {"W_enc": "C D", "W_dec": "C Dout", "b_enc": "C", "b_dec": "Dout"}
KEYS = (tuple(SHAPES),)
THRESHOLD = "activation_function.threshold"
YAML_LIMIT = 2**20  # characters


def read(source: Source) -> SAE:
    """The transcoder of a file of this family; ValueError for what no rule is known for."""
    tensors, entry = source.tensors(SHAPES, {"W_skip": "Dout D", THRESHOLD: "C"})
    theta = tensors.get(THRESHOLD, torch.zeros(entry.shape[0])).float()
    if (theta < 0).any():
        raise ValueError(f"{source.path}: tensor {THRESHOLD!r} holds {theta.min():.6g}; it should not be negative")
    said = _settings(source.folder / SAID)
    layer = re.findall("[0-9]+", source.path.name)[0]
    site, site_out = (
        f"blocks.{layer}.{said[key]}" if key in said else None for key in ("feature_input_hook", "feature_output_hook")
    )
    return SAE(
        enc=folded(tensors["W_enc"]),
        bias=tensors["b_enc"].float(),
        theta=theta,
        dec=folded(tensors["W_dec"]),
        site=site,
        site_out=None if site_out == site else site_out,
        family=NAME,
        provenance=Provenance(dtype=entry.dtype, model=said.get("model_name")),
        b_dec=None if "W_skip" in tensors else folded(tensors["b_dec"][None])[0],
    )


def _settings(path: Path) -> dict[str, str]:
    """The plain texts at the top level of a YAML file, which is all that is asked of it; {} where there is no file."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as stream:
        text = stream.read(YAML_LIMIT)
    return dict(re.findall(r"""^(\w+):[ \t]*["']?([\w./-]+)["']?[ \t]*(?:#.*)?$""", text, re.MULTILINE))
