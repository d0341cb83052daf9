"""Qwen-Scope (Qwen/SAE-Res-{model}-W{width}K-L0_{k}): layer{L}.sae.pt, one file per layer.

W_enc [C, D], W_dec [D, C], b_enc [C], b_dec [D]: each the other way round than SAELens has it. TopK; k is in the release's name
alone, so its folder has to be called so, or the caller says k.

    w = W_enc, b = b_enc, v = W_dec^T, b_dec = b_dec

b_dec is not subtracted from x, which is the output of model.layers.{L}.
"""

from __future__ import annotations

import re

import torch

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, at_most, folded

NAME = "qwen_scope"
FILE, CONFIG = "layer[0-9]*.sae.*", None
SHAPES = {"W_enc": "C D", "W_dec": "D C", "b_enc": "C", "b_dec": "D"}
KEYS = (tuple(SHAPES),)
RELEASE = re.compile(r"SAE-Res-([^/]+)-W\d+K-L0_(\d+)")


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    path = source.path
    model, named = (RELEASE.findall(path.as_posix()) or [(None, None)])[-1]
    if named is None and source.k is None:
        raise ValueError(
            f"{path}: k is not known; it should be said, as --k or k=, or be in the name of a folder around it, as "
            f"SAE-Res-...-W32K-L0_50 says 50"
        )
    if None not in (named, source.k) and int(named) != source.k:
        raise ValueError(f"{path}: k is {source.k}; the release's name says {named}: give that, or none")
    tensors, entry = source.tensors(SHAPES)
    C = entry.shape[0]
    k = at_most(path, int(named) if source.k is None else source.k, C)
    return SAE(
        enc=folded(tensors["W_enc"]),
        bias=tensors["b_enc"].float(),
        theta=torch.zeros(C),
        dec=folded(tensors["W_dec"].T),
        kind="topk",
        k=k,
        site=f"model.layers.{re.findall('[0-9]+', path.name)[0]}",
        family=NAME,
        provenance=Provenance(l0=float(k), dtype=entry.dtype, model=model and f"Qwen/{model}"),
        b_dec=folded(tensors["b_dec"][None])[0],
    )
