"""Figures of a splice at its place, against plain PyTorch; and the error where it does not belong there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_models import D, attach_to, build
from tiny_saes import LATENTS, activations, hidden, make_sae

import cu_fast
from cu_fast.sae import Provenance

LAYER = "model.layers.1"
TEXTS = ["the cat sat on the mat", "a dog", "birds fly over the green hill in spring"]


class Words:
    """A tokenizer of bytes, padding on the left."""

    def __call__(self, texts, **_):
        rows = [[1 + byte % 60 for byte in text.encode()][:24] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def reconstruct(sae, x):
    return activations(sae, x) @ sae.dec + sae.b_dec


def expected(sae, model_name="llama"):
    given = Words()(TEXTS)
    x = hidden(model_name, LAYER, given)
    real = given["attention_mask"].bool()
    first = given["attention_mask"].cumsum(1) == 1
    counts = real & ~first
    tokens, made = x[counts], reconstruct(sae, x[counts])
    labels = torch.where(real, given["input_ids"], -100)[:, 1:]

    def loss(model):
        with torch.no_grad():
            found = model(**given).logits[:, :-1]
        return float(F.cross_entropy(found.transpose(1, 2), labels, ignore_index=-100))

    replaced = build(model_name)

    def after(module, args, output):
        y = output if isinstance(output, torch.Tensor) else output[0]
        y = torch.where(counts[..., None], reconstruct(sae, y), y)
        return y if isinstance(output, torch.Tensor) else (y, *output[1:])

    replaced.get_submodule(LAYER).register_forward_hook(after)
    fired = activations(sae, tokens) > 0
    return {
        "tokens": int(counts.sum()),
        "l0": float(fired.sum(1).float().mean()),
        "dead_share": float((~fired.any(0)).float().mean()),
        "explained_variance": float(1 - (tokens - made).square().sum() / (tokens - tokens.mean(0)).square().sum()),
        "loss": loss(build(model_name)),
        "loss_replaced": loss(replaced),
    }


def fitting_sae(**changes):
    """An autoencoder that explains much: a basis and its negative, no bias."""
    eye = torch.eye(D)
    enc = torch.cat([eye, -eye])[:LATENTS]
    return cu_fast.SAE(
        enc, torch.zeros(len(enc)), torch.zeros(len(enc)), enc.clone(), b_dec=torch.full((D,), 0.01), **changes
    )


def test_the_figures_are_those_of_plain_pytorch():
    sae = fitting_sae()
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    (row,) = attachment.check(Words(), TEXTS, batch_size=3)
    wanted = expected(sae)
    assert row["layer"] == LAYER and row["stated_l0"] is None
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-4), name
    assert row["loss_replaced"] != row["loss"] and 0.2 < row["explained_variance"] < 1
    # In batches of other sizes the sums are the same.
    (again,) = attachment.check(Words(), iter(TEXTS), batch_size=1)
    assert again["tokens"] == row["tokens"] and again["l0"] == row["l0"]


def test_a_codebook_has_figures_too():
    attachment = attach_to(build("llama"), LAYER, splice="delta")
    (bottleneck,) = attachment.bottlenecks.values()
    with torch.no_grad():
        bottleneck.seed_codes(hidden("llama", LAYER, Words()(TEXTS)).reshape(-1, D))
    bottleneck.eval()
    try:
        (row,) = attachment.check(Words(), TEXTS)
    except ValueError as error:
        assert "of the variance" in str(error)
    else:
        assert row["l0"] == bottleneck.k and row["loss"] > 0


def test_a_wrong_place_is_an_error():
    sae = dataclasses.replace(fitting_sae(), provenance=Provenance(l0=3.0))
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    with pytest.raises(ValueError, match=r"latents fire per token, and the release says 3\. The autoencoder is at"):
        attachment.check(Words(), TEXTS)
    attachment.detach()
    ranked = dataclasses.replace(make_sae("topk"), b_dec=torch.full((D,), 3.0))
    attachment = cu_fast.attach(build("llama"), {LAYER: ranked})
    with pytest.raises(ValueError, match=r"explains -\d+\.\d\d of the variance, and should explain 0\.2"):
        attachment.check(Words(), TEXTS)
    attachment.detach()
    attachment = cu_fast.attach(build("llama"), {LAYER: make_sae("topk")})  # its biases are not known
    (row,) = attachment.check(Words(), TEXTS)
    assert row["explained_variance"] is None and row["loss_replaced"] is None
    with pytest.raises(ValueError, match="texts holds no text of two tokens"):
        attachment.check(Words(), [])
    with pytest.raises(TypeError, match="texts is one text"):
        attachment.check(Words(), "a text")
