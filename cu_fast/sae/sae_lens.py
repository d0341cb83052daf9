"""SAELens' own files: cfg.json and sae_weights.safetensors.

W_enc [D, C], W_dec [C, D], b_dec [D]; b_enc [C]; jumprelu: threshold [C]; gated: b_gate, b_mag, r_mag [C] for b_enc.
"W" is W_enc^T, "sub" is b_dec where apply_b_dec_to_input, else 0:

    standard, jumprelu, topk     w = W, b = b_enc - W . sub, v = W_dec
    topk with rescale_acts_by_decoder_norm   n = ||W_dec||: w n, b n, v / n
    gated                        e = exp(r_mag): w = e W, b = b_mag - e (W . sub), theta = max(0, b_mag - e b_gate)
    layer_norm of x              w - mean(w), after b: sub is subtracted from what is normalized already
    constant_norm_rescale of x   norm = sqrt(D)
    center_writing_weights       of the model that it was made for: it saw x - mean(x), so w - mean(w), after b

Before SAELens 6 a topk said architecture "standard" and activation_fn_str "topk", and the site was at the top level.
Refused: expected_average_only_in (the files do not hold its factor), tanh-relu, scaling factors other than 1, transcoders and
the architectures that are not named here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cu_fast.files import read_json
from cu_fast.sae.form import SAE, Provenance, Scale
from cu_fast.sae.released import flag, folded, integer, lengths, product, read_tensors, refuse_scaling, text

NAME = "sae_lens"
FILE, CONFIG = "sae_weights.safetensors", "cfg.json"
COMMON = {"W_enc": "D C", "W_dec": "C D", "b_dec": "D"}
OWN = {
    "standard": {"b_enc": "C"},
    "jumprelu": {"b_enc": "C", "threshold": "C"},
    "topk": {"b_enc": "C"},
    "gated": {"b_gate": "C", "b_mag": "C", "r_mag": "C"},
}
SCALES: dict[str, Scale] = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
FACTORS = {"scaling_factor": "C", "finetuning_scaling_factor": "C"}
WANTS = f"{CONFIG}, {FILE} with {', '.join(COMMON)}"


def recognises(files: Collection[str], keys: Mapping[str, Collection[str]]) -> bool:
    """Whether a folder is one of this family.

    Args:
        files: names of its files.
        keys: of its files of tensors: name -> keys.
    """
    return CONFIG in files and set(COMMON) <= set(keys.get(FILE, ()))


def read(folder: Path) -> SAE:
    """The autoencoder of a folder of this family.

    Args:
        folder: its absolute path.

    Raises:
        ValueError: see :func:`cu_fast.sae.load_sae`.
    """
    path, said = folder / FILE, folder / CONFIG
    config = read_json(said)
    architecture, k = _architecture(said, config)
    scale = _scale(said, config)
    D, C = integer(said, config, "d_in"), integer(said, config, "d_sae")
    tensors, entry = read_tensors(path, {**COMMON, **OWN[architecture]}, FACTORS, {"D": D, "C": C})
    refuse_scaling(path, tensors, *FACTORS)
    if k is not None and k > C:
        raise ValueError(f"{said}: 'k' is {k}; it should be at most C = {C}")

    W, dec = tensors["W_enc"].T, tensors["W_dec"]
    factor = torch.ones(C, dtype=torch.float64)
    theta = torch.zeros(C, dtype=torch.float64)
    inverse: Tensor | float = 1.0
    sub = torch.zeros(C, dtype=torch.float64)
    if flag(said, config, "apply_b_dec_to_input", True):
        sub = product(W, tensors["b_dec"])
    if architecture == "gated":
        factor, b_mag = tensors["r_mag"].double().exp(), tensors["b_mag"].double()
        bias = b_mag - factor * sub
        theta = (b_mag - factor * tensors["b_gate"].double()).clamp(min=0)
    else:
        bias = tensors["b_enc"].double() - sub
        if architecture == "jumprelu":
            theta = tensors["threshold"].double()
    if flag(said, config, "rescale_acts_by_decoder_norm", False):
        if architecture != "topk":
            raise ValueError(f"{said}: 'rescale_acts_by_decoder_norm' is true; for {architecture!r} it should be false")
        factor = lengths(dec)
        bias = bias * factor
        inverse = torch.where(factor > 0, 1 / factor, 0.0)  # of a zero row pre is 0: it never fires
    metadata = _part(said, config, "metadata") or config
    model = _part(said, metadata, "model_from_pretrained_kwargs")
    return SAE(
        enc=folded(W, factor, scale == "layer_norm" or flag(said, model, "center_writing_weights", False)),
        bias=bias.float(),
        theta=theta.float(),
        dec=folded(dec, inverse),
        kind="topk" if architecture == "topk" else "threshold",
        k=k,
        scale=scale,
        norm=math.sqrt(D) if scale == "constant_norm" else 1.0,
        site=text(said, metadata, "hook_name") or text(said, metadata, "hook_point"),
        family=NAME,
        provenance=Provenance(
            l0=None if k is None else float(k), dtype=entry.dtype, model=text(said, metadata, "model_name")
        ),
    )


def _part(said: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside a configuration; empty where it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{said}: {key!r} is {value!r}; it should be an object")
    return value or {}


def _architecture(said: Path, config: Mapping[str, Any]) -> tuple[str, int | None]:
    """(architecture, k): a topk is called so, however old the file."""
    architecture = text(said, config, "architecture") or "standard"
    key = "activation_fn" if "activation_fn" in config else "activation_fn_str"
    activation = text(said, config, key) or ("topk" if architecture == "topk" else "relu")
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in OWN:
        raise ValueError(f"{said}: 'architecture' is {architecture!r}; it should be one of {', '.join(OWN)}")
    # A topk may name its inner activation, which is relu.
    if activation != "relu" and (activation, architecture) != ("topk", "topk"):
        raise ValueError(f"{said}: {key!r} is {activation!r}; for architecture {architecture!r} it should be 'relu'")
    if architecture != "topk":
        return architecture, None
    given = config if "k" in config else _part(said, config, "activation_fn_kwargs")
    return architecture, integer(said, given, "k")


def _scale(said: Path, config: Mapping[str, Any]) -> Scale:
    value = config.get("normalize_activations")
    if value is None or isinstance(value, bool):  # old files: whether the average norm was divided by
        value = "expected_average_only_in" if value else "none"
    if value == "expected_average_only_in":
        raise ValueError(
            f"{said}: 'normalize_activations' is {value!r}, whose factor the files do not hold; it should be folded into "
            f"the weights (and the setting be 'none'), or be one of {', '.join(SCALES)}"
        )
    if not isinstance(value, str) or value not in SCALES:
        raise ValueError(f"{said}: 'normalize_activations' is {value!r}; it should be one of {', '.join(SCALES)}")
    return SCALES[value]
