"""SAELens' own files, which `cu_fast.sae.save_sae` writes too: cfg.json and sae_weights.safetensors.

W_enc [D, C], W_dec [C, Dout], b_dec [Dout]; b_enc [C]; jumprelu: threshold [C]; gated: b_gate, b_mag, r_mag [C] for b_enc;
skip transcoders: W_skip [Dout, D]. "W" is W_enc^T, "sub" is b_dec where apply_b_dec_to_input, else 0:

    standard, jumprelu, topk     w = W, b = b_enc - W . sub, v = W_dec
    topk with rescale_acts_by_decoder_norm   n = ||W_dec||: w n, b n, v / n
    gated                        e = exp(r_mag): w = e W, b = b_mag - e (W . sub), theta = max(0, b_mag - e b_gate)
    layer_norm of x              w - mean(w), after b: sub is subtracted from what is normalized already
    constant_norm_rescale of x   norm = sqrt(D)
    center_writing_weights       of the model that it was made for: it saw x - mean(x), so w - mean(w), after b; what it
                                 reconstructs then has no mean, and b_dec is not known (but under layer_norm)
    transcoders                  as standard or jumprelu, without sub; hook_name_out is where they write

Before SAELens 6 a topk said architecture "standard" and activation_fn_str "topk", and the site was at the top level.
Refused: expected_average_only_in (the files do not hold its factor), tanh-relu, scaling factors other than 1, transcoders of
normalized inputs (their output is not scaled back, which the form cannot say), and architectures that are not named here.

What this package writes says in metadata, under "cu_fast", what SAELens has no key for: "centred", the rows of W_enc are
centred already, and are taken as they are; "b_dec" false, it is not known, and zeros stand for it; "l0". A topk that writes to
another place than it reads has the architecture "topk_transcoder", which SAELens does not have and refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cu_fast.sae.form import SAE, Provenance, Scale
from cu_fast.sae.released import (
    Source,
    at_most,
    flag,
    folded,
    gated,
    integer,
    lengths,
    number,
    part,
    product,
    refuse_scaling,
    text,
)

NAME = "sae_lens"
FILE, CONFIG = "sae_weights.safetensors", "cfg.json"
COMMON = {"W_enc": "D C", "W_dec": "C Dout", "b_dec": "Dout"}
KEYS = (tuple(COMMON),)
SKIP = {"W_skip": "Dout D"}
OWN = {
    "standard": {"b_enc": "C"},
    "jumprelu": {"b_enc": "C", "threshold": "C"},
    "topk": {"b_enc": "C"},
    "gated": {"b_gate": "C", "b_mag": "C", "r_mag": "C"},
}
# architecture -> (what it is but for the place that it writes to, what its file holds besides)
TRANSCODERS = {
    "transcoder": ("standard", {}),
    "skip_transcoder": ("standard", SKIP),
    "jumprelu_transcoder": ("jumprelu", {}),
    "jumprelu_skip_transcoder": ("jumprelu", SKIP),
    "topk_transcoder": ("topk", {}),
}
SCALES: dict[str, Scale] = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
FACTORS = {"scaling_factor": "C", "finetuning_scaling_factor": "C"}
WRITTEN_AS = "6.0.0"  # since when its files look so; without a version SAELens takes them for older ones


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    path, said, config = source.path, source.folder / CONFIG, source.config(CONFIG)
    architecture, k = _architecture(said, config)
    transcoder = architecture in TRANSCODERS
    architecture, more = TRANSCODERS.get(architecture, (architecture, {}))
    scale, subtracts = _scale(said, config), flag(said, config, "apply_b_dec_to_input", not transcoder)
    if transcoder and (scale != "none" or subtracts):
        raise ValueError(
            f"{said}: a transcoder's 'normalize_activations' should be 'none' and its 'apply_b_dec_to_input' false; they are "
            f"{config.get('normalize_activations')!r} and {subtracts!r}"
        )
    D, C = integer(said, config, "d_in"), integer(said, config, "d_sae")
    sizes = {"D": D, "C": C, "Dout": integer(said, config, "d_out") if transcoder else D}
    tensors, entry = source.tensors({**COMMON, **OWN[architecture], **more}, FACTORS, sizes)
    refuse_scaling(path, tensors, *FACTORS)
    metadata = part(said, config, "metadata") or config
    model, own = part(said, metadata, "model_from_pretrained_kwargs"), part(said, metadata, "cu_fast")
    centred, as_it_is = flag(said, model, "center_writing_weights", False), flag(said, own, "centred", False)
    if centred and scale == "constant_norm":
        raise ValueError(
            f"{said}: 'normalize_activations' is 'constant_norm_rescale' and 'center_writing_weights' is true; no rule is "
            f"known for both: the norm would be that of x without its mean"
        )

    W, dec = tensors["W_enc"].T, tensors["W_dec"]
    factor = torch.ones(C, dtype=torch.float64)
    theta = torch.zeros(C, dtype=torch.float64)
    inverse: Tensor | float = 1.0
    sub = product(W, tensors["b_dec"]) if subtracts else torch.zeros(C, dtype=torch.float64)
    if architecture == "gated":
        factor, bias, theta = gated(sub, tensors["b_gate"], tensors["b_mag"], tensors["r_mag"])
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
    known = flag(said, own, "b_dec", not centred or scale == "layer_norm") and not more
    site = text(said, metadata, "hook_name") or text(said, metadata, "hook_point")
    site_out = text(said, metadata, "hook_name_out") if transcoder else None
    return SAE(
        enc=folded(W, factor, (centred or scale == "layer_norm") and not as_it_is),
        bias=bias.float(),
        theta=theta.float(),
        dec=folded(dec, inverse),
        kind="topk" if architecture == "topk" else "threshold",
        k=None if k is None else at_most(said, k, C),
        scale=scale,
        norm=math.sqrt(D) if scale == "constant_norm" else 1.0,
        site=site,
        site_out=None if site_out == site else site_out,
        family=NAME,
        provenance=Provenance(
            l0=number(said, own, "l0") if "l0" in own else None if k is None else float(k),
            dtype=entry.dtype,
            model=text(said, metadata, "model_name"),
        ),
        b_dec=folded(tensors["b_dec"][None])[0] if known else None,
    )


def written(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An autoencoder in these files: (cfg.json, the tensors of sae_weights.safetensors, fp32).

    Raises:
        ValueError: SAELens would compute something else of it: a norm other than sqrt(Din), or a token scale where it writes
            to another place than it reads.
    """
    transcoder = sae.site_out is not None or sae.d_out != sae.d_in
    if transcoder and sae.scale != "none":
        raise ValueError(
            f"scale is {sae.scale!r}; for one that writes to another place than it reads (site_out = {sae.site_out!r}) "
            f"SAELens' format knows 'none' alone. Keep the release's own files"
        )
    if sae.scale == "constant_norm" and sae.norm != math.sqrt(sae.d_in):
        raise ValueError(
            f"norm is {sae.norm!r}; SAELens' format knows sqrt(Din) = {math.sqrt(sae.d_in)!r} alone. Keep the release's own "
            f"files"
        )
    architecture = ("topk" if sae.kind == "topk" else "jumprelu") + ("_transcoder" if transcoder else "")
    said = sae.provenance
    own = {"centred": True, "b_dec": sae.b_dec is not None} | ({} if said.l0 is None else {"l0": said.l0})
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.num_latents,
        **({"d_out": sae.d_out} if transcoder else {}),
        **({} if sae.k is None else {"k": sae.k, "rescale_acts_by_decoder_norm": False}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": next(theirs for theirs, ours in SCALES.items() if ours == sae.scale),
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": WRITTEN_AS,
            "hook_name": sae.site,
            **({"hook_name_out": sae.site_out} if transcoder else {}),
            "model_name": said.model,
            "cu_fast": own,
        },
    }
    b_dec = torch.zeros(sae.d_out) if sae.b_dec is None else sae.b_dec
    tensors = {"W_enc": sae.enc.T, "W_dec": sae.dec, "b_enc": sae.bias, "b_dec": b_dec}
    if sae.kind == "threshold":
        tensors["threshold"] = sae.theta
    return config, {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _architecture(said: Path, config: Mapping[str, Any]) -> tuple[str, int | None]:
    """(architecture, k): a topk is called so, however old the file."""
    architecture = text(said, config, "architecture") or "standard"
    key = "activation_fn" if "activation_fn" in config else "activation_fn_str"
    activation = text(said, config, key) or "relu"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in OWN and architecture not in TRANSCODERS:
        known = ", ".join((*OWN, *TRANSCODERS))
        raise ValueError(f"{said}: 'architecture' is {architecture!r}; it should be one of {known}")
    ranks = architecture.startswith("topk")
    # A topk may name its inner activation, which is relu.
    if activation != "relu" and not (activation == "topk" and ranks):
        raise ValueError(f"{said}: {key!r} is {activation!r}; for architecture {architecture!r} it should be 'relu'")
    if not ranks:
        return architecture, None
    given = config if "k" in config else part(said, config, "activation_fn_kwargs")
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
