"""Tiny autoencoders for the models of tiny_models.py, and what deleting their latents is, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from tiny_models import D, build
from torch import Tensor

from cu_fast import SAE, Mask

LATENTS, BEST = 48, 6
STRENGTH = 4.0  # of a mask that does not say


def make_sae(kind: str = "threshold", *, seed: int = 5, d_in: int = D, d_out: int | None = None, **changes) -> SAE:
    """Random weights; about half of the latents fire at a token, or BEST of kind "topk"."""
    generator = torch.Generator().manual_seed(seed)
    enc = 0.3 * torch.randn(LATENTS, d_in, generator=generator)
    dec = 0.3 * torch.randn(LATENTS, d_out or d_in, generator=generator)
    bias = 0.1 * torch.randn(LATENTS, generator=generator)
    theta = torch.zeros(LATENTS) if kind == "topk" else 0.1 * torch.rand(LATENTS, generator=generator)
    return SAE(enc, bias, theta, dec, **{"kind": kind, "k": BEST if kind == "topk" else None, **changes})


def activations(sae: SAE, x: Tensor) -> Tensor:
    """[..., C]."""
    pre = x.float() @ sae.enc.T + sae.bias
    fires = (pre > sae.theta) & (pre > 0)
    if sae.kind == "topk":
        fires &= pre >= pre.topk(sae.k, dim=-1).values[..., -1:]
    return torch.where(fires, pre, 0.0)


def without(sae: SAE, x: Tensor, strengths: Mapping[int, float], residual: Tensor | None = None) -> Tensor:
    """The residual (None = x) less strength times what each of some latents wrote: latent -> strength."""
    a, kept = activations(sae, x), (x if residual is None else residual)
    taken = sum(strength * a[..., i, None] * sae.dec[i] for i, strength in strengths.items())
    return (kept.float() - taken).to(kept.dtype)


def firing(sae: SAE, x: Tensor) -> list[int]:
    """Latents by how many tokens they fire at, most first; those that fire nowhere are left out."""
    counts = (activations(sae, x) > 0).flatten(0, -2).sum(0)
    return [i for i in counts.argsort(descending=True).tolist() if counts[i]]


def mask_of(sae: SAE, ids: Iterable[int], topic: str, **changes) -> Mask:
    return Mask.from_ids(ids, sae=sae, topic=topic, **changes)


def hidden(name: str, module: str, given: Mapping[str, Tensor], side: str = "out") -> Tensor:
    """What leaves a module of the family's model, or what it is given."""
    model, seen = build(name), []

    def look(layer, args, kwargs, output=None):
        found = output if side == "out" else (args or list(kwargs.values()))
        seen.append(found if isinstance(found, Tensor) else found[0])

    layer = model.get_submodule(module)
    register = layer.register_forward_hook if side == "out" else layer.register_forward_pre_hook
    register(look, with_kwargs=True)
    with torch.no_grad():
        model(**given)
    return seen[0]
