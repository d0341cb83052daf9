"""OpenAI's (sparse_autoencoder): .../{location}_v5_32k/autoencoders/{L}.pt for layers of GPT-2 small.

pre_bias [D], encoder.weight [C, D], latent_bias [C], decoder.weight [D, C], stats_last_nonzero; and beside the tensors
"activation" with "activation_state_dict". A safetensors file cannot hold these two: config.json beside it has to.

    w = encoder.weight, b = latent_bias - w . pre_bias, v = decoder.weight^T, b_dec = pre_bias
    ReLU (v1, v4)    x as it is
    TopK (v5)        k of activation_state_dict; of the layer norm of x, in which the mean has no part: w - mean(w), after b

Refused: other activations, a TopK of other than ReLU, tied decoders.
"""

from __future__ import annotations

import re

import torch

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, at_most, chosen, folded, integer, part, product

NAME = "openai"
FILE, CONFIG = "[0-9]*.*", None
SAID = "config.json"
SHAPES = {"encoder.weight": "C D", "pre_bias": "D", "latent_bias": "C", "decoder.weight": "D C"}
KEYS = (tuple(SHAPES),)
PLACE = re.compile(r"([^/]+)/autoencoders/(\d+)\.\w+$")


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    said, values = source.path, source.values()
    if source.state is None:
        said = source.folder / SAID
        if not said.is_file():
            raise ValueError(
                f'{source.path}: {said} is missing; it should say "activation": "ReLU", or "activation": "TopK" and '
                f'"activation_state_dict": {{"k": 32}}, as the file did that the tensors are from'
            )
        values = source.config(SAID)
    ranks = chosen(said, values, "activation", "ReLU", ("ReLU", "TopK")) == "TopK"
    tensors, entry = source.tensors(SHAPES, others=["stats_last_nonzero"])
    (C, _), k = entry.shape, None
    if ranks:
        inner = part(said, values, "activation_state_dict")
        chosen(said, inner, "postact_fn", "ReLU", ["ReLU"])
        k = at_most(said, integer(said, inner, "k"), C)
    w = tensors["encoder.weight"]
    place = PLACE.search(source.path.as_posix())
    return SAE(
        enc=folded(w, centred=ranks),
        bias=(tensors["latent_bias"].double() - product(w, tensors["pre_bias"])).float(),
        theta=torch.zeros(C),
        dec=folded(tensors["decoder.weight"].T),
        kind="topk" if ranks else "threshold",
        k=k,
        scale="layer_norm" if ranks else "none",
        site=place and "/".join(place.groups()),
        family=NAME,
        provenance=Provenance(l0=None if k is None else float(k), dtype=entry.dtype),
        b_dec=folded(tensors["pre_bias"][None])[0],
    )
