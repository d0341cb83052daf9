"""Goodfire ({model}-SAE-l{L}.pt or .pth), and qresearch's of DeepSeek-R1, which are laid out alike.

encoder_linear.weight [C, D], encoder_linear.bias [C], decoder_linear.weight [D, C], decoder_linear.bias [D]; qresearch: the
same without "_linear". ReLU.

    w = encoder weight, b = encoder bias, v = decoder weight^T, b_dec = decoder bias

Nothing is subtracted from x, which is the output of model.layers.{L}. The file has to keep its name: without it, four tensors
called encoder and decoder could be of any activation.
"""

from __future__ import annotations

import re

import torch

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, folded

NAME = "goodfire"
FILE, CONFIG = "*SAE-l[0-9]*.*", None
PARTS = {"encoder{}.weight": "C D", "encoder{}.bias": "C", "decoder{}.weight": "D C", "decoder{}.bias": "D"}
KEYS = tuple(tuple(key.format(linear) for key in PARTS) for linear in ("_linear", ""))
PLACE = re.compile(r"(.*?)-?SAE-l(\d+)")


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    keys = next(keys for keys in KEYS if set(keys) <= set(source.entries))
    tensors, entry = source.tensors(dict(zip(keys, PARTS.values())))
    enc, bias, dec, b_dec = (tensors[key] for key in keys)
    model, layer = PLACE.match(source.path.name).groups()
    return SAE(
        enc=folded(enc),
        bias=bias.float(),
        theta=torch.zeros(len(enc)),
        dec=folded(dec.T),
        site=f"model.layers.{layer}",
        family=NAME,
        provenance=Provenance(dtype=entry.dtype, model=model or None),
        b_dec=folded(b_dec[None])[0],
    )
