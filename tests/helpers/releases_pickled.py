"""As releases.py, for the families whose releases are pickles: each as it is released, and as safetensors of the same keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from releases import C, D, K, Release, best, numbers, write
from torch import Tensor

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
MATRICES = ("W_enc", "b_enc", "W_dec")
CLASSES = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"),
    "JumpReluAutoEncoder": (*MATRICES, "b_dec", "threshold"),
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": (*MATRICES, "b_dec"),
}


def dictionary_learning(
    root: Path, kind="AutoEncoder", d=D, c=C, suffix=".safetensors", threshold=1.3, k: int | None = K, **trainer
) -> Release:
    folder = root / "resid_post_layer_5" / "trainer_0"
    wide = ("bias", "decoder.bias", "decoder_bias", "b_dec")
    matrices = {"encoder.weight": (c, d), "decoder.weight": (d, c), "W_enc": (d, c), "W_dec": (c, d)}
    raw = numbers(20, **{key: matrices.get(key, (d,) if key in wide else (c,)) for key in CLASSES[kind]})
    if "TopK" in kind:
        raw |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    if "Matryoshka" in kind:
        raw["group_sizes"] = torch.tensor([c // 4, c - c // 4])
    said = {"dict_class": kind, "activation_dim": d, "dict_size": c, "layer": 5, "lm_name": "EleutherAI/pythia-70m"}
    said |= {"submodule_name": "resid_post_layer_5"} | ({} if k is None else {"k": k}) | trainer
    write(folder / f"ae{suffix}", raw, {"trainer": said, "buffer": {"ctx_len": 128}}, "config.json")
    p = {key: tensor.double() for key, tensor in raw.items()}
    W = p["W_enc"] if "W_enc" in p else p["encoder.weight"].T
    V = p["W_dec"] if "W_dec" in p else p["decoder.weight"].T
    bias = next(p[key] for key in wide if key in p)
    b = p.get("b_enc", p.get("encoder.bias"))

    def encode(x: Tensor) -> Tensor:
        if kind in ("AutoEncoder", "AutoEncoderNew"):
            return ((x - bias if kind == "AutoEncoder" else x) @ W + b).relu()
        if kind == "JumpReluAutoEncoder":
            pre = x @ W + b
            return (pre * (pre > p["threshold"])).relu()
        u = (x - bias) @ W
        if kind == "GatedAutoEncoder":
            return (u + p["gate_bias"] > 0).double() * (p["r_mag"].exp() * u + p["mag_bias"]).relu()
        post = (u + b).relu()
        return best(post, K) if kind == "AutoEncoderTopK" else post * (post > p["threshold"])

    return Release(folder, encode, lambda a, x: a @ V + bias)


def qwen_scope(root: Path, d=D, c=C, suffix=".safetensors", name=f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}") -> Release:
    folder = root / name
    raw = numbers(21, W_enc=(c, d), W_dec=(d, c), b_enc=(c,), b_dec=(d,))
    write(folder / f"layer3.sae{suffix}", raw)
    p = {key: tensor.double() for key, tensor in raw.items()}
    return Release(
        folder,
        lambda x: best(x @ p["W_enc"].T + p["b_enc"], K),
        lambda a, x: a @ p["W_dec"].T + p["b_dec"],
    )


def openai(root: Path, d=D, c=C, suffix=".safetensors", activation="TopK", **values) -> Release:
    folder = root / ("resid_post_mlp_v5_32k" if activation == "TopK" else "resid_delta_mlp_v4") / "autoencoders"
    keys = {"pre_bias": (d,), "encoder.weight": (c, d), "latent_bias": (c,), "decoder.weight": (d, c)}
    raw = numbers(22, **keys) | {"stats_last_nonzero": torch.zeros(c, dtype=torch.int64)}
    said = {"activation": activation} | values
    if activation == "TopK":
        said["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"} | values.get("activation_state_dict", {})
    if suffix == ".safetensors":
        write(folder / "8.safetensors", raw, said, "config.json")
    else:
        write(folder / f"8{suffix}", raw | said)
    p = {key: tensor.double() for key, tensor in raw.items()}

    def norm(x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        if activation != "TopK":
            return x, 1.0, 0.0
        mu = x.mean(-1, keepdim=True)
        x = x - mu
        std = x.std(-1, keepdim=True)
        return x / (std + 1e-5), std, mu

    def encode(x: Tensor) -> Tensor:
        pre = (norm(x)[0] - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"]
        return best(pre, K) if activation == "TopK" else pre.relu()

    def decode(a: Tensor, x: Tensor) -> Tensor:
        _, std, mu = norm(x)
        return (a @ p["decoder.weight"].T + p["pre_bias"]) * std + mu

    return Release(folder, encode, decode)


def goodfire(root: Path, d=D, c=C, suffix=".safetensors", linear="_linear") -> Release:
    name = "Llama-3.1-8B-Instruct-SAE-l19" if linear else "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    enc, dec = f"encoder{linear}", f"decoder{linear}"
    shapes = {f"{enc}.weight": (c, d), f"{enc}.bias": (c,), f"{dec}.weight": (d, c), f"{dec}.bias": (d,)}
    raw = numbers(23, **shapes)
    write(root / name / f"{name}{suffix}", raw)
    p = {key: tensor.double() for key, tensor in raw.items()}
    return Release(
        root / name,
        lambda x: (x @ p[f"{enc}.weight"].T + p[f"{enc}.bias"]).relu(),
        lambda a, x: a @ p[f"{dec}.weight"].T + p[f"{dec}.bias"],
    )


# name -> (family, how it is written); each takes suffix=
PICKLED: dict[str, tuple[str, Callable[..., Release]]] = {
    **{kind: ("dictionary_learning", partial(dictionary_learning, kind=kind)) for kind in CLASSES},
    "AutoEncoderTopK, k in the file": (
        "dictionary_learning",
        partial(dictionary_learning, kind="AutoEncoderTopK", k=None),
    ),
    "Qwen-Scope": ("qwen_scope", qwen_scope),
    "OpenAI": ("openai", openai),
    "OpenAI, ReLU": ("openai", partial(openai, activation="ReLU")),
    "Goodfire": ("goodfire", goodfire),
    "Goodfire, plain names": ("goodfire", partial(goodfire, linear="")),
}
