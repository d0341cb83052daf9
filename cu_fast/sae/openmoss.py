"""OpenMOSS since Llama-Scope-R1-Distill (Language-Model-SAEs, llamascopium): sae_weights.safetensors and config.json.

R1-Distill: encoder.weight [C, D], encoder.bias [C], decoder.weight [D, C], decoder.bias [D], log_jumprelu_threshold [C].
Later: W_E [D, C], b_E [C], W_D [C, D], b_D [D], activation_function.log_jumprelu_threshold [C]. Both:
dataset_average_activation_norm.{site} []. With n = ||decoder row||, or 1 unless sparsity_include_decoder_norm, and
s_in, s_out = sqrt(D) / dataset_average_activation_norm where norm_activation is "dataset-wise", else 1:

    w = encoder row, b = encoder bias / s_in, v = decoder row s_in / s_out, b_dec = decoder bias / s_out
    jumprelu   theta = exp(log_jumprelu_threshold) / (s_in n)
    relu       theta = 0
    topk       w, b times n, v / n, k = top_k
    norm_activation "token-wise"   norm = sqrt(D); of what reads and writes at one place alone

The activations are in units of the stream, those of the library in units of scaled inputs: s_in times as large. Its
standardize_parameters_of_dataset_norm scales the decoder, and by its norm the threshold, by 1 / s_out; the rule here is that of
its training and of its forward before that call. Refused: norms of a batch, batchtopk (the batch decides), gated linear
encoders, and what is no "sae" (crosscoders, cross-layer transcoders and others).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cu_fast.sae.form import SAE, Provenance
from cu_fast.sae.released import Source, at_most, chosen, flag, folded, integer, lengths, number, text

NAME = "openmoss"
FILE, CONFIG = "sae_weights.safetensors", "config.json"
R1 = {"encoder.weight": "C D", "encoder.bias": "C", "decoder.weight": "D C"}
LATER = {"W_E": "D C", "b_E": "C", "W_D": "C D"}
KEYS = ((*R1, "log_jumprelu_threshold"), tuple(LATER))
NORM = "dataset_average_activation_norm"


def read(source: Source) -> SAE:
    """The autoencoder of a file of this family; ValueError for what no rule is known for."""
    said, config = source.folder / CONFIG, source.config(CONFIG)
    chosen(said, config, "sae_type", "sae", ["sae"])
    later = "W_E" in source.entries
    act = chosen(said, config, "act_fn", "relu" if later else "jumprelu", ("relu", "jumprelu", "topk"))
    allowed = ("dataset-wise", "inference", "token-wise")
    norm = chosen(said, config, "norm_activation", "dataset-wise", allowed)
    for key in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if flag(said, config, key, False):
            raise ValueError(f"{said}: {key!r} is true; it should be false: no rule is known for it")
    sites = [text(said, config, key) for key in ("hook_point_in", "hook_point_out")]
    site, site_out = sites
    if norm == "token-wise" and site != site_out:
        raise ValueError(
            f"{said}: 'norm_activation' is 'token-wise'; of a transcoder it should be another: the norm of what is written "
            f"would have to be known"
        )
    D = integer(said, config, "d_model")
    C = int(D * number(said, config, "expansion_factor"))  # a fraction is allowed, and cut off
    wanted = {**LATER} if later else {**R1}
    bias_key, prefix = ("b_D", "activation_function.") if later else ("decoder.bias", "")
    norms = {f"{NORM}.{site}": "" for site in sites}
    if norm == "dataset-wise":
        wanted |= norms
    if act == "jumprelu":
        wanted[f"{prefix}log_jumprelu_threshold"] = "C"
    # The library writes norms even where it has none: then they are whatever lay in memory.
    unread = () if norm == "dataset-wise" else norms
    tensors, entry = source.tensors(wanted, {bias_key: "D"}, {"C": C, "D": D}, others=unread)

    s_in = s_out = 1.0
    if norm == "dataset-wise":
        s_in, s_out = (
            math.sqrt(D) / number(source.path, {key: tensors[key].item()}, key)
            for key in (f"{NORM}.{s}" for s in sites)
        )
    W, dec = (tensors["W_E"].T, tensors["W_D"]) if later else (tensors["encoder.weight"], tensors["decoder.weight"].T)
    bias = tensors["b_E" if later else "encoder.bias"].double() / s_in
    n = torch.ones(C, dtype=torch.float64)
    if flag(said, config, "sparsity_include_decoder_norm", True):
        n = lengths(dec)
    theta = torch.zeros(C, dtype=torch.float64)
    factor: Tensor | float = 1.0
    out: Tensor | float = s_in / s_out
    if act == "jumprelu":
        threshold = tensors[f"{prefix}log_jumprelu_threshold"].double().exp() / s_in
        # Of a zero row n times anything stays below the threshold: it never fires.
        theta = torch.where(n > 0, threshold / n, math.inf).clamp(max=torch.finfo(torch.float32).max)
    k = None
    if act == "topk":
        k = at_most(said, integer(said, config, "top_k"), C)
        factor, bias, out = n, bias * n, torch.where(n > 0, s_in / s_out / n, 0.0)
    b_dec = tensors.get(bias_key, torch.zeros(D)).double() / s_out
    return SAE(
        enc=folded(W, factor),
        bias=bias.float(),
        theta=theta.float(),
        dec=folded(dec, out),
        kind="threshold" if k is None else "topk",
        k=k,
        scale="constant_norm" if norm == "token-wise" else "none",
        norm=math.sqrt(D) if norm == "token-wise" else 1.0,
        site=site,
        site_out=None if site_out == site else site_out,
        family=NAME,
        provenance=Provenance(l0=None if k is None else float(k), dtype=entry.dtype),
        b_dec=b_dec.float(),
    )
