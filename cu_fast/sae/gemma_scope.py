"""Gemma Scope (google/gemma-scope-{2b,9b,27b}-*): .../layer_{L}/width_{W}/average_l0_{N}/params.npz, fp32.

W_enc [D, C], W_dec [C, D], b_enc [C], b_dec [D], threshold [C]; old files: w_enc, w_dec. JumpReLU.

    w = W_enc^T, b = b_enc, theta = threshold, v = W_dec, b_dec = b_dec

b_dec is not subtracted from x. Those under embedding/ read and write the embedding before Gemma's factor sqrt(D), which is in
the output of transformers' embedding layer: w = W_enc^T / sqrt(D), v and b_dec times sqrt(D). Their file looks like any other, so the
folders around it have to be the release's. They also say what is known of the site and of L0.
"""

from __future__ import annotations

import math
import re

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, folded, refuse_scaling

NAME = "gemma_scope"
FILE, CONFIG = "params.npz", None
KEYS = (("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"))
PLACE = re.compile(r"(?:(gemma-scope-[\w-]+)/(?:.*/)?)?(?<![^/])(layer_\d+|embedding)/width_\w+/average_l0_(\d+)$")


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    path = source.path
    place = PLACE.search(source.folder.as_posix())
    if place is None:
        raise ValueError(
            f"{path} is not in layer_.../width_.../average_l0_... or embedding/width_.../average_l0_...; keep the "
            f"release's folders around it: the file does not say that it is of the embedding, which is scaled otherwise"
        )
    repository, layer, l0 = place.groups()
    W_enc, W_dec = ("w_enc", "w_dec") if "w_enc" in source.entries else ("W_enc", "W_dec")
    wanted = {W_enc: "D C", W_dec: "C D", "b_enc": "C", "b_dec": "D", "threshold": "C"}
    tensors, entry = source.tensors(wanted, optional={"scaling_factor": "C"})
    refuse_scaling(path, tensors, "scaling_factor")
    factor = math.sqrt(entry.shape[0]) if layer == "embedding" else 1.0
    return SAE(
        enc=folded(tensors[W_enc].T, 1 / factor),
        bias=tensors["b_enc"].float(),
        theta=tensors["threshold"].float(),
        dec=folded(tensors[W_dec], factor),
        site="/".join(filter(None, (repository, layer))),
        family=NAME,
        b_dec=folded(tensors["b_dec"][None], factor)[0],
        provenance=Provenance(l0=float(l0), dtype=entry.dtype),
    )
