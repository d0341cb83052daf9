"""EleutherAI's sparsify: <module>/sae.safetensors and cfg.json; the folder's name is the module that it was made for.

encoder.weight [C, D], encoder.bias [C], W_dec [C, D], b_dec [D]. TopK. cfg.json: k, d_in, num_latents (0: d_in times
expansion_factor).

    w = encoder.weight, b = encoder.bias - w . b_dec, v = W_dec

Refused: activation "groupmax", signed latents, transcoders (transcode, W_skip).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from cu_fast.files import read_json
from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import flag, folded, integer, product, read_tensors

NAME = "sparsify"
FILE, CONFIG = "sae.safetensors", "cfg.json"
SHAPES = {"encoder.weight": "C D", "encoder.bias": "C", "W_dec": "C D", "b_dec": "D"}
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
    if (activation := config.get("activation", "topk")) != "topk":
        raise ValueError(f"{said}: 'activation' is {activation!r}; it should be 'topk': no other is read yet")
    for key in ("signed", "transcode", "skip_connection"):
        if flag(said, config, key, False):
            raise ValueError(f"{said}: {key!r} is true; it should be false: such autoencoders are not read yet")
    D = integer(said, config, "d_in")
    if config.get("num_latents", 0) == 0:
        C = D * integer(said, config, "expansion_factor")
    else:
        C = integer(said, config, "num_latents")
    tensors, entry = read_tensors(path, SHAPES, sizes={"C": C, "D": D})
    w = tensors["encoder.weight"]
    if (k := integer(said, config, "k")) > C:
        raise ValueError(f"{said}: 'k' is {k}; it should be at most C = {C}")
    bias = (tensors["encoder.bias"].double() - product(w, tensors["b_dec"])).float()
    return SAE(
        enc=folded(w),
        bias=bias,
        theta=bias.new_zeros(C),
        dec=folded(tensors["W_dec"]),
        kind="topk",
        k=k,
        site=folder.name,
        family=NAME,
        provenance=Provenance(l0=float(k), dtype=entry.dtype),
    )
