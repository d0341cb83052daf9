"""Tiny autoencoders with random weights, in the files of each family, and what each family computes, in fp64.

The formulas are those of the libraries that the releases belong to, on the tensors as they lie in the files. Families that
are released as pickles: releases_pickled.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, C, K = 24, 40, 6


class Release(NamedTuple):
    """A folder and its formulas: x fp64 [T, D] -> activations fp64 [T, C]; (activations, x) -> output fp64 [T, Dout].

    unit: the package's activations over those of the library; skips: what is added whatever fires is more than a bias.
    """

    folder: Path
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    unit: Tensor | float = 1.0
    skips: bool = False


def numbers(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Normal numbers, of standard deviation 0.3, by name; thresholds are positive."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return {name: tensor.abs() if name == "threshold" else tensor for name, tensor in made.items()}


def write(path: Path, tensors: dict[str, Tensor], config: dict | None = None, name: str = "cfg.json") -> None:
    """A file of tensors, by its suffix npz, pt, pth or safetensors, and a configuration beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{key: tensor.numpy() for key, tensor in tensors.items()})
    elif path.suffix in (".pt", ".pth"):
        torch.save(tensors, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    if config is not None:
        (path.parent / name).write_text(json.dumps(config))


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    return torch.relu(pre) * (pre > threshold)


def best(pre: Tensor, k: int) -> Tensor:
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def gemma_scope(root: Path, d=D, c=C, dtype=torch.float32, place="layer_3", old=False) -> Release:
    folder = root / "gemma-scope-2b-pt-res" / place / "width_16k" / "average_l0_71"
    raw = numbers(1, W_enc=(d, c), W_dec=(c, d), b_enc=(c,), b_dec=(d,), threshold=(c,))
    raw = {key: tensor.to(dtype) for key, tensor in raw.items()}
    write(folder / "params.npz", {("w" + key[1:] if old and key[0] == "W" else key): raw[key] for key in raw})
    p = {key: tensor.double() for key, tensor in raw.items()}
    scale = (
        d**0.5 if place == "embedding" else 1.0
    )  # of the stream that transformers has, to the one that it was made for
    return Release(
        folder,
        lambda x: jump(x / scale @ p["W_enc"] + p["b_enc"], p["threshold"]),
        lambda a, x: (a @ p["W_dec"] + p["b_dec"]) * scale,
    )


def gemma_scope_2(root: Path, d=D, c=C, d_out: int | None = None, config=True) -> Release:
    folder, out = root / "layer_5_width_16k_l0_small", d_out or d
    raw = numbers(2, w_enc=(d, c), w_dec=(c, out), b_enc=(c,), b_dec=(out,), threshold=(c,))
    if d_out:
        raw |= numbers(3, affine_skip_connection=(d, out))
    sites = {"hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": "model.layers.5.output"}
    if d_out:
        sites["hf_hook_point_in"] = "model.layers.5.pre_feedforward_layernorm.output"
    said = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", **sites} if config else None
    write(folder / "params.safetensors", raw, said, "config.json")
    p = {key: tensor.double() for key, tensor in raw.items()}
    skip = p.get("affine_skip_connection", torch.zeros(d, out, dtype=torch.float64))
    return Release(
        folder,
        lambda x: jump(x @ p["w_enc"] + p["b_enc"], p["threshold"]),
        lambda a, x: a @ p["w_dec"] + p["b_dec"] + x @ skip,
        skips=d_out is not None,
    )


def llama_scope(root: Path, d=D, c=C, norms=(10.8, 14.1), **config) -> Release:
    folder, where = root / "Llama3_1-8B-Base-L15R-8x", "blocks.15.hook_resid_post"
    raw = numbers(6, **{"encoder.weight": (c, d), "encoder.bias": (c,), "decoder.weight": (d, c), "decoder.bias": (d,)})
    raw = {key: tensor.bfloat16() for key, tensor in raw.items()}
    write(folder / "checkpoints" / "final.safetensors", raw)
    said = {"d_model": d, "d_sae": c, "jump_relu_threshold": 0.355, "hook_point_in": where, "hook_point_out": where}
    said |= {"dataset_average_activation_norm": {"in": norms[0], "out": norms[1]}, "norm_activation": "dataset-wise"}
    said |= {"sparsity_include_decoder_norm": True} | config
    (folder / "hyperparams.json").write_text(json.dumps(said))
    p = {key: tensor.double() for key, tensor in raw.items()}
    s_in, s_out = (d**0.5 / norm for norm in norms)
    # As its loader does, step by step: first weights that read and write unscaled streams, then a unit decoder.
    bias, decoder, encoder = p["encoder.bias"] / s_in, p["decoder.weight"] * s_in / s_out, p["encoder.weight"]
    if said["sparsity_include_decoder_norm"]:
        length = decoder.norm(dim=0)
        encoder, bias, decoder = encoder * length[:, None], bias * length, decoder / length
    return Release(
        folder,
        lambda x: jump(x @ encoder.T + bias, torch.tensor(0.355)),
        lambda a, x: a @ decoder.T + p["decoder.bias"] / s_out,
    )


def openmoss(root: Path, d=D, c=C, later=True, act="jumprelu", norms=(10.8, 14.1), bias=True, **config) -> Release:
    folder, sites = root / "L5R", ("blocks.5.hook_mlp_in", "blocks.5.hook_mlp_out")
    names = ("W_E", "b_E", "W_D", "b_D", "activation_function.log_jumprelu_threshold")
    if not later:
        names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "log_jumprelu_threshold")
    said = {
        "sae_type": "sae",
        "d_model": d,
        "expansion_factor": c / d,
        "act_fn": act,
        "norm_activation": "dataset-wise",
    }
    said |= {"hook_point_in": sites[0], "hook_point_out": sites[1], "sparsity_include_decoder_norm": True, "top_k": K}
    said |= {"use_decoder_bias": bias} | config
    parts = numbers(7, W=(d, c), b=(c,), V=(c, d), out=(d,), log=(c,))
    W, b, V, out, log = parts.values()
    raw = {names[0]: W if later else W.T, names[1]: b, names[2]: V if later else V.T}
    raw |= ({names[3]: out} if bias else {}) | ({names[4]: log} if act == "jumprelu" else {})
    for key, norm in zip(("hook_point_in", "hook_point_out"), norms):
        raw[f"dataset_average_activation_norm.{said[key]}"] = torch.tensor(norm)
    write(folder / "sae_weights.safetensors", raw, said, "config.json")
    W, b, V, out, log = (tensor.double() for tensor in parts.values())
    kind = said["norm_activation"]
    n = V.norm(dim=1) if said["sparsity_include_decoder_norm"] else torch.ones(c).double()
    s_in, s_out = ((d**0.5 / float(torch.tensor(norm))) if kind == "dataset-wise" else 1.0 for norm in norms)

    def factors(x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        token = d**0.5 / x.norm(dim=-1, keepdim=True)
        return (token, token) if kind == "token-wise" else (s_in, s_out)

    def encode(x: Tensor) -> Tensor:  # what the library's forward sees is scaled before it
        pre = (x * factors(x)[0] @ W + b) * n
        return {"jumprelu": lambda: jump(pre, log.exp()), "topk": lambda: best(pre, K), "relu": lambda: pre.relu()}[
            act
        ]() / n

    return Release(
        folder,
        encode,
        lambda a, x: (a @ V + (out if bias else 0)) / factors(x)[1],
        unit=(n if act == "topk" else 1.0) / s_in,
    )


def mwhanna(root: Path, d=D, c=C, d_out=D - 4, threshold=False, skip=False, dtype=torch.float32) -> Release:
    folder = root / "qwen3-4b-transcoders"
    raw = numbers(8, W_enc=(c, d), W_dec=(c, d_out), b_enc=(c,), b_dec=(d_out,))
    raw |= numbers(9, W_skip=(d_out, d)) if skip else {}
    raw |= {"activation_function.threshold": numbers(10, threshold=(c,))["threshold"]} if threshold else {}
    raw = {key: tensor.to(dtype) for key, tensor in raw.items()}
    write(folder / "layer_3.safetensors", raw)
    (folder / "config.yaml").write_text(
        'model_name: "Qwen/Qwen3-4B"\nmodel_kind: transcoder_set\nfeature_input_hook: mlp.hook_in  # what is read\n'
        "feature_output_hook: hook_mlp_out\ntranscoders:\n  - layer_3.safetensors\n"
    )
    p = {key: tensor.double() for key, tensor in raw.items()}
    theta = p.get("activation_function.threshold", torch.zeros(c))
    return Release(
        folder,
        lambda x: (pre := x @ p["W_enc"].T + p["b_enc"]) * (pre > theta),
        lambda a, x: a @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if skip else 0),
        skips=skip,
    )


def sparsify(root: Path, d=D, c=C, dtype=torch.float32, **config) -> Release:
    folder = root / "layers.3.mlp"
    raw = numbers(4, **{"encoder.weight": (c, d), "encoder.bias": (c,), "W_dec": (c, d), "b_dec": (d,)})
    skip = config.get("skip_connection", False)
    raw |= numbers(3, W_skip=(d, d)) if skip else {}
    sub = 0.0 if config.get("transcode") else 1.0
    raw = {key: tensor.to(dtype) for key, tensor in raw.items()}
    said = {"activation": "topk", "k": K, "d_in": d, "num_latents": c, "expansion_factor": 32, "signed": False}
    write(folder / "sae.safetensors", raw, said | config)
    p = {key: tensor.double() for key, tensor in raw.items()}
    return Release(
        folder,
        lambda x: best(torch.relu((x - sub * p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]), K),
        lambda a, x: a @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].mT if skip else 0),
        skips=skip,
    )


def sae_lens_transcoder(root: Path, architecture="transcoder", d=D, c=C, d_out=D - 4, **config) -> Release:
    folder, skip, jumps = root / "transcoder", "skip" in architecture, "jumprelu" in architecture
    raw = numbers(12, W_enc=(d, c), W_dec=(c, d_out), b_enc=(c,), b_dec=(d_out,))
    raw |= numbers(13, W_skip=(d_out, d)) if skip else {}
    raw |= numbers(14, threshold=(c,)) if jumps else {}
    metadata = {
        "sae_lens_version": "6.5.0",
        "hook_name": "blocks.8.hook_mlp_in",
        "hook_name_out": "blocks.8.hook_mlp_out",
    }
    said = {"architecture": architecture, "d_in": d, "d_sae": c, "d_out": d_out, "normalize_activations": "none"}
    said |= {"apply_b_dec_to_input": False, "metadata": metadata} | config
    write(folder / "sae_weights.safetensors", raw, said)
    p = {key: tensor.double() for key, tensor in raw.items()}
    return Release(
        folder,
        lambda x: jump(x @ p["W_enc"] + p["b_enc"], p["threshold"] if jumps else torch.zeros(c)),
        lambda a, x: a @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if skip else 0),
        skips=skip,
    )


def sae_lens(root: Path, architecture="standard", d=D, c=C, dtype=torch.float32, ones=False, **config) -> Release:
    folder = root / "blocks.8.hook_resid_post"
    own = {"jumprelu": ["b_enc", "threshold"], "gated": ["b_gate", "b_mag", "r_mag"]}.get(architecture, ["b_enc"])
    raw = numbers(5, W_enc=(d, c), W_dec=(c, d), b_dec=(d,), **{key: (c,) for key in own})
    raw = {key: tensor.to(dtype) for key, tensor in raw.items()}
    if ones:
        raw["scaling_factor"] = torch.ones(c, dtype=dtype)
    metadata = {"hook_name": folder.name, "model_name": "gpt2-small", "model_from_pretrained_kwargs": {}}
    metadata["sae_lens_version"] = "6.0.0"  # SAELens has older rules for what says no version
    said = {"architecture": architecture, "d_in": d, "d_sae": c, "normalize_activations": "none", "metadata": metadata}
    said |= {"apply_b_dec_to_input": True} | ({"k": K} if architecture == "topk" else {}) | config
    write(folder / "sae_weights.safetensors", raw, said)
    p = {key: tensor.double() for key, tensor in raw.items()}
    norm = said["normalize_activations"]
    old_topk = said.get("activation_fn_str") == "topk"
    centred = said["metadata"].get("model_from_pretrained_kwargs", {}).get("center_writing_weights")
    lengths = p["W_dec"].norm(dim=1) if said.get("rescale_acts_by_decoder_norm") else torch.ones(c).double()

    def scaled(x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        if centred:
            x = x - x.mean(-1, keepdim=True)
        if norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), std, mean
        if norm == "constant_norm_rescale":
            coefficient = d**0.5 / x.norm(dim=-1, keepdim=True)
            return x * coefficient, 1 / coefficient, 0.0
        return x, 1.0, 0.0

    def encode(x: Tensor) -> Tensor:
        x = scaled(x)[0]
        if said["apply_b_dec_to_input"]:
            x = x - p["b_dec"]
        pre = x @ p["W_enc"]
        if architecture == "gated":
            on = (pre + p["b_gate"] > 0).double()
            return on * torch.relu(pre * p["r_mag"].exp() + p["b_mag"])
        pre = pre + p["b_enc"]
        if architecture == "topk" or old_topk:
            return best(pre * lengths, K)
        return jump(pre, p["threshold"]) if architecture == "jumprelu" else torch.relu(pre)

    def decode(a: Tensor, x: Tensor) -> Tensor:
        _, back, mean = scaled(x)
        if centred and norm == "layer_norm":  # an estimate of the centred stream; the raw one has its mean on top
            mean = mean + x.mean(-1, keepdim=True)
        return (a / lengths @ p["W_dec"] + p["b_dec"]) * back + mean

    # Of a centred model the mean is lost before the autoencoder: its bias alone is not what is added to a raw stream.
    return Release(folder, encode, decode, skips=bool(centred) and norm != "layer_norm")


HALF, CENTRED = torch.float16, {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
OLD_TOPK = {
    "metadata": {},
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K},
    "hook_name": "blocks.8.hook_resid_post",
}
# name -> (family, how it is written)
RELEASES: dict[str, tuple[str, Callable[..., Release]]] = {
    "Gemma Scope": ("gemma_scope", gemma_scope),
    "Gemma Scope, fp16": ("gemma_scope", partial(gemma_scope, dtype=HALF)),
    "Gemma Scope, embedding": ("gemma_scope", partial(gemma_scope, place="embedding")),
    "Gemma Scope, old names": ("gemma_scope", partial(gemma_scope, old=True)),
    "Gemma Scope 2": ("gemma_scope_2", gemma_scope_2),
    "Gemma Scope 2, no config": ("gemma_scope_2", partial(gemma_scope_2, config=False)),
    "Gemma Scope 2, transcoder": ("gemma_scope_2", partial(gemma_scope_2, d_out=D - 4)),
    "Llama Scope": ("llama_scope", llama_scope),
    "Llama Scope, decoder as it is": ("llama_scope", partial(llama_scope, sparsity_include_decoder_norm=False)),
    "OpenMOSS": ("openmoss", openmoss),
    "OpenMOSS, R1": ("openmoss", partial(openmoss, later=False)),
    "OpenMOSS, R1, decoder as it is": ("openmoss", partial(openmoss, later=False, sparsity_include_decoder_norm=False)),
    "OpenMOSS, relu": ("openmoss", partial(openmoss, act="relu", bias=False)),
    "OpenMOSS, topk": ("openmoss", partial(openmoss, act="topk")),
    "OpenMOSS, topk, inference": ("openmoss", partial(openmoss, act="topk", norm_activation="inference")),
    "OpenMOSS, token": (
        "openmoss",
        partial(openmoss, norm_activation="token-wise", hook_point_in="blocks.5.hook_mlp_out"),
    ),
    "mwhanna": ("mwhanna", mwhanna),
    "mwhanna, threshold": ("mwhanna", partial(mwhanna, threshold=True, dtype=torch.bfloat16)),
    "mwhanna, skip": ("mwhanna", partial(mwhanna, skip=True)),
    "sparsify": ("sparsify", sparsify),
    "sparsify, transcoder": ("sparsify", partial(sparsify, transcode=True)),
    "sparsify, skip transcoder": ("sparsify", partial(sparsify, transcode=True, skip_connection=True)),
    "sparsify, bf16": ("sparsify", partial(sparsify, dtype=torch.bfloat16)),
    "standard": ("sae_lens", sae_lens),
    "standard, no b_dec": ("sae_lens", partial(sae_lens, apply_b_dec_to_input=False)),
    "standard, ones": ("sae_lens", partial(sae_lens, ones=True)),
    "standard, centred model": ("sae_lens", partial(sae_lens, **CENTRED)),
    "standard, layer norm": ("sae_lens", partial(sae_lens, normalize_activations="layer_norm")),
    "standard, constant norm": ("sae_lens", partial(sae_lens, normalize_activations="constant_norm_rescale")),
    "jumprelu": ("sae_lens", partial(sae_lens, architecture="jumprelu")),
    "jumprelu, bf16": (
        "sae_lens",
        partial(sae_lens, architecture="jumprelu", dtype=torch.bfloat16, apply_b_dec_to_input=False),
    ),
    "gated": ("sae_lens", partial(sae_lens, architecture="gated")),
    "gated, layer norm": ("sae_lens", partial(sae_lens, architecture="gated", normalize_activations="layer_norm")),
    "topk": ("sae_lens", partial(sae_lens, architecture="topk", dtype=torch.bfloat16)),
    "topk, decoder norm": ("sae_lens", partial(sae_lens, architecture="topk", rescale_acts_by_decoder_norm=True)),
    "topk, layer norm": ("sae_lens", partial(sae_lens, architecture="topk", normalize_activations="layer_norm")),
    "topk, constant norm": (
        "sae_lens",
        partial(sae_lens, architecture="topk", normalize_activations="constant_norm_rescale"),
    ),
    "topk, old": ("sae_lens", partial(sae_lens, **OLD_TOPK)),
    "layer norm, centred model": ("sae_lens", partial(sae_lens, **CENTRED, normalize_activations="layer_norm")),
    "transcoder": ("sae_lens", sae_lens_transcoder),
    "skip transcoder": ("sae_lens", partial(sae_lens_transcoder, architecture="skip_transcoder")),
    "jumprelu transcoder": ("sae_lens", partial(sae_lens_transcoder, architecture="jumprelu_transcoder")),
    "jumprelu skip transcoder": ("sae_lens", partial(sae_lens_transcoder, architecture="jumprelu_skip_transcoder")),
}
