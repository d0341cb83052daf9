"""dictionary_learning (saprmarks): .../trainer_N/ae.pt and config.json, whose "trainer" says the dict_class.

encoder.weight [C, D], encoder.bias [C], decoder.weight [D, C]; or W_enc [D, C], b_enc [C], W_dec [C, D]. w is a row of the
encoder, v what it decodes to:

    AutoEncoder                             bias [D]: b = encoder.bias - w . bias, b_dec = bias
    AutoEncoderNew                          decoder.bias [D]: b = encoder.bias, b_dec = decoder.bias
    JumpReluAutoEncoder                     b_dec [D], threshold [C]: b = b_enc, theta = threshold; b_dec is not subtracted
    AutoEncoderTopK                         b_dec [D], k: b = encoder.bias - w . b_dec, and the k best of a token
    BatchTopKSAE, MatryoshkaBatchTopKSAE    b_dec [D], threshold []: b = b_enc - w . b_dec, theta = threshold
    GatedAutoEncoder                        decoder_bias [D], gate_bias, mag_bias, r_mag [C], no encoder.bias. e = exp(r_mag),
                                            s = W . decoder_bias: w = e W, b = mag_bias - e s,
                                            theta = max(0, mag_bias - e gate_bias), b_dec = decoder_bias

A normalization of the training is in the weights already. A threshold of a BatchTopK below 0 was never set, and is refused: in
training it was the batch that decided. A TopK's threshold is not read, and neither are group_sizes. Decoders are taken as they
are; the library's own loaders may scale them to length 1, which changes no output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, at_most, folded, gated, part, product, text

NAME = "dictionary_learning"
FILE, CONFIG = "ae.*", "config.json"
LINEAR = {"encoder.weight": "C D", "encoder.bias": "C", "decoder.weight": "D C"}
MATRICES = {"W_enc": "D C", "b_enc": "C", "W_dec": "C D"}
WANTED = {
    "AutoEncoder": {**LINEAR, "bias": "D"},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": "D"},
    "GatedAutoEncoder": {
        "encoder.weight": "C D",
        "decoder.weight": "D C",
        "decoder_bias": "D",
        "gate_bias": "C",
        "mag_bias": "C",
        "r_mag": "C",
    },
    "JumpReluAutoEncoder": {**MATRICES, "b_dec": "D", "threshold": "C"},
    "AutoEncoderTopK": {**LINEAR, "b_dec": "D"},
    "BatchTopKSAE": {**LINEAR, "b_dec": "D", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**MATRICES, "b_dec": "D", "threshold": ""},
}
KEYS = tuple(map(tuple, WANTED.values()))
OTHERS = ("k", "threshold", "group_sizes")  # buffers of the TopK classes


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    said = source.folder / CONFIG
    trainer = part(said, source.config(CONFIG), "trainer")
    kind = text(said, trainer, "dict_class")
    if kind not in WANTED:
        raise ValueError(f"{said}: 'trainer.dict_class' is {kind!r}; it should be one of {', '.join(WANTED)}")
    ranks, batch = kind == "AutoEncoderTopK", kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    tensors, entry = source.tensors(WANTED[kind], others=OTHERS if ranks or batch else ())
    W = tensors["W_enc"].T if "W_enc" in tensors else tensors["encoder.weight"]
    V = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T
    b_dec = next(tensors[key] for key in ("b_dec", "bias", "decoder_bias", "decoder.bias") if key in tensors)
    subtracts = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    sub = product(W, b_dec) if subtracts else torch.zeros(len(W), dtype=torch.float64)
    factor: Tensor | float = 1.0
    theta = torch.zeros(len(W), dtype=torch.float64)
    if kind == "GatedAutoEncoder":
        factor, bias, theta = gated(sub, tensors["gate_bias"], tensors["mag_bias"], tensors["r_mag"])
    else:
        bias = tensors["b_enc" if "b_enc" in tensors else "encoder.bias"].double() - sub
    if kind == "JumpReluAutoEncoder":
        theta = tensors["threshold"].double()
    if batch:
        if (threshold := tensors["threshold"].double()) < 0:
            raise ValueError(
                f"{source.path}: tensor 'threshold' is {float(threshold):g}; it should not be negative: it was never set, "
                f"because the checkpoint is from early in the training. Take a later one"
            )
        theta = threshold.expand(len(W))
    k = _k(source, trainer, tensors) if ranks or batch else None
    return SAE(
        enc=folded(W, factor),
        bias=bias.float(),
        theta=theta.float(),
        dec=folded(V),
        kind="topk" if ranks else "threshold",
        k=at_most(said, k, len(W)) if ranks else None,
        site=text(said, trainer, "submodule_name"),
        family=NAME,
        provenance=Provenance(
            l0=None if k is None else float(k), dtype=entry.dtype, model=text(said, trainer, "lm_name")
        ),
        b_dec=folded(b_dec[None])[0],
    )


def _k(source: Source, trainer: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """What the file and config.json say of k; ValueError where neither does, or they differ."""
    values = [trainer["k"]] if trainer.get("k") is not None else []
    if "k" in tensors:
        values.append(tensors["k"].item() if tensors["k"].numel() == 1 else tensors["k"].tolist())
    if not values or any(type(value) is not int or value < 1 or value != values[0] for value in values):
        raise ValueError(
            f"{source.path}: k is {' and '.join(map(repr, values)) or None} in {CONFIG} and the file; it should be one "
            f"positive integer"
        )
    return values[0]
