"""Gemma Scope (google/gemma-scope-{2b,9b,27b}-*): .../layer_{L}/width_{W}/average_l0_{N}/params.npz, fp32.

W_enc [D, C], W_dec [C, D], b_enc [C], b_dec [D], threshold [C]; old files: w_enc, w_dec. JumpReLU.

    w = W_enc^T, b = b_enc, theta = threshold, v = W_dec

b_dec is not subtracted from x. Those under embedding/ read and write the embedding before Gemma's factor sqrt(D), which is in
the output of transformers' embedding layer: w = W_enc^T / sqrt(D), v = W_dec sqrt(D). Their file looks like any other, so the
folders around it have to be the release's. They also say what is known of the site and of L0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import entries, folded, read_tensors, refuse_scaling

NAME = "gemma_scope"
FILE = "params.npz"
WANTS = f"{FILE} with W_enc, W_dec, b_enc, b_dec, threshold, in layer_.../width_.../average_l0_..."
PLACE = re.compile(r"(?:(gemma-scope-[\w-]+)/(?:.*/)?)?(?<![^/])(layer_\d+|embedding)/width_\w+/average_l0_(\d+)$")


def recognises(files: Collection[str], keys: Mapping[str, Collection[str]]) -> bool:
    """Whether a folder is one of this family.

    Args:
        files: names of its files.
        keys: of its files of tensors: name -> keys.
    """
    found = {key.lower() for key in keys.get(FILE, ())}
    return {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} <= found


def read(folder: Path) -> SAE:
    """The autoencoder of a folder of this family.

    Args:
        folder: its absolute path.

    Raises:
        ValueError: see :func:`cu_fast.sae.load_sae`.
    """
    path = folder / FILE
    place = PLACE.search(folder.as_posix())
    if place is None:
        raise ValueError(
            f"{path} is not in layer_.../width_.../average_l0_... or embedding/width_.../average_l0_...; keep the "
            f"release's folders around it: the file does not say that it is of the embedding, which is scaled otherwise"
        )
    repository, layer, l0 = place.groups()
    W_enc, W_dec = ("w_enc", "w_dec") if "w_enc" in entries(path) else ("W_enc", "W_dec")
    wanted = {W_enc: "D C", W_dec: "C D", "b_enc": "C", "b_dec": "D", "threshold": "C"}
    tensors, entry = read_tensors(path, wanted, optional={"scaling_factor": "C"})
    refuse_scaling(path, tensors, "scaling_factor")
    factor = math.sqrt(entry.shape[0]) if layer == "embedding" else 1.0
    return SAE(
        enc=folded(tensors[W_enc].T, 1 / factor),
        bias=tensors["b_enc"].float(),
        theta=tensors["threshold"].float(),
        dec=folded(tensors[W_dec], factor),
        site="/".join(filter(None, (repository, layer))),
        family=NAME,
        provenance=Provenance(l0=float(l0), dtype=entry.dtype),
    )
