"""EleutherAI's sparsify: <module>/sae.safetensors and cfg.json; the folder's name is the module that it was made for.

encoder.weight [C, D], encoder.bias [C], W_dec [C, D], b_dec [D]. TopK. cfg.json: k, d_in, num_latents (0: d_in times
expansion_factor).

    w = encoder.weight, b = encoder.bias - w . b_dec, v = W_dec, b_dec = b_dec

A transcoder (transcode) reads the module's input, subtracts nothing, and writes to its output; with skip_connection it also
adds W_skip x, W_skip [D, D], and b_dec is not kept. Refused: activation "groupmax", signed latents.
"""

from __future__ import annotations

import torch

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, at_most, flag, folded, integer, product

NAME = "sparsify"
FILE, CONFIG = "sae.safetensors", "cfg.json"
SHAPES = {"encoder.weight": "C D", "encoder.bias": "C", "W_dec": "C D", "b_dec": "D"}
KEYS = (tuple(SHAPES),)


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    said, config = source.folder / CONFIG, source.config(CONFIG)
    if (activation := config.get("activation", "topk")) != "topk":
        raise ValueError(f"{said}: 'activation' is {activation!r}; it should be 'topk': no other is read")
    if flag(said, config, "signed", False):
        raise ValueError(f"{said}: 'signed' is true; it should be false: negative latents have no place in the form")
    transcoder, skips = (flag(said, config, key, False) for key in ("transcode", "skip_connection"))
    D = integer(said, config, "d_in")
    if config.get("num_latents", 0) == 0:
        C = D * integer(said, config, "expansion_factor")
    else:
        C = integer(said, config, "num_latents")
    tensors, entry = source.tensors(SHAPES | ({"W_skip": "D D"} if skips else {}), sizes={"C": C, "D": D})
    w, k = tensors["encoder.weight"], at_most(said, integer(said, config, "k"), C)
    bias = tensors["encoder.bias"].double()
    if not transcoder:
        bias = bias - product(w, tensors["b_dec"])
    module = source.folder.name
    return SAE(
        enc=folded(w),
        bias=bias.float(),
        theta=torch.zeros(C),
        dec=folded(tensors["W_dec"]),
        kind="topk",
        k=k,
        site=f"{module}.input" if transcoder else module,
        site_out=f"{module}.output" if transcoder else None,
        family=NAME,
        provenance=Provenance(l0=float(k), dtype=entry.dtype),
        b_dec=None if skips else folded(tensors["b_dec"][None])[0],
    )
