"""A tiny Llama with every kind of splice, and masks "a" and "b"."""

from __future__ import annotations

from tiny_models import add_masks, attach_to, build
from tiny_saes import firing, hidden, make_sae, mask_of

from cu_fast import attach

LAYERS = ("model.layers.0", "model.layers.1")


def with_codebooks(given, **changes):
    """At two layers."""
    attachment = attach_to(build("llama"), *LAYERS, **changes)
    add_masks(attachment, given)
    return attachment


def with_autoencoder(given, kind="threshold", elsewhere=False):
    """At one layer, or read in front of an MLP and changed behind it."""
    sae = make_sae(kind)
    reads, writes = ("model.layers.1.mlp:in", "model.layers.1.mlp") if elsewhere else (LAYERS[1], LAYERS[1])
    attachment = attach(build("llama"), {f"{reads} -> {writes}" if elsewhere else writes: sae}, splice="delta")
    module, _, side = reads.partition(":")
    latents = firing(sae, hidden("llama", module, given, side or "out"))
    for i, name in enumerate("ab"):
        attachment.add_mask(mask_of(sae, sorted(latents[i : i + 8 : 2]), name))
    return attachment


KINDS = {
    "replace": with_codebooks,
    "codebook-that-keeps": lambda given: with_codebooks(given, splice="delta"),
    "autoencoder": with_autoencoder,
    "autoencoder-at-two-places": lambda given: with_autoencoder(given, elsewhere=True),
    "top-k-autoencoder": lambda given: with_autoencoder(given, "topk"),
}
