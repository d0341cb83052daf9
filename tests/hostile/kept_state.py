"""A Llama with a splice that keeps the hidden state, and the plain computation of what it should do."""

from __future__ import annotations

import torch
from tiny_models import C, K, attach_to, build, inputs, logits, mask_for
from tiny_saes import firing, hidden, make_sae, mask_of, without

import cu_fast

LAYER = "model.layers.1"
PAIR = f"{LAYER}.mlp:in -> {LAYER}.mlp"
GIVEN = inputs("llama")
KINDS = ("threshold", "topk", "codebook")


def small():
    """Two layers: compiling takes its time."""
    model = build("llama")
    model.config.num_hidden_layers, model.model.layers = 2, model.model.layers[:2]
    return model


class Kept:
    """A Llama with a splice that keeps the hidden state, masks "a" and "b", and the plain computation."""

    def __init__(self, kind: str, place: str = LAYER, **options) -> None:
        self.kind, self.model = kind, small()
        reads, _, writes = place.partition(" -> ")
        self.reads, self.writes = reads, writes or reads
        x = hidden("llama", reads.removesuffix(":in"), GIVEN, "in" if reads.endswith(":in") else "out")
        if kind == "codebook":
            self.attachment = attach_to(
                self.model, place, attach_options={"splice": "delta", **options}, normalize=False
            )
            (self.splice,) = self.attachment.bottlenecks.values()
            ids = self.splice.select(x).ids.flatten().unique().tolist()
            self.ids = {"a": ids[::2], "b": ids[1::2]}
            masks = [mask_for(self.splice, some, name) for name, some in self.ids.items()]
        else:
            self.sae = make_sae(kind)
            self.attachment = cu_fast.attach(self.model, {place: self.sae}, **options)
            (self.splice,) = self.attachment.bottlenecks.values()
            ids = firing(self.sae, x)[:8]
            self.ids = {"a": ids[::2], "b": ids[1::2]}
            masks = [mask_of(self.sae, some, name) for name, some in self.ids.items()]
        for mask in masks:
            self.attachment.add_mask(mask)

    def taken(self, x, names, residual=None):
        """What leaves the place when these masks are held, in plain PyTorch."""
        ids = [i for name in names for i in self.ids[name]]
        if self.kind != "codebook":
            return without(self.sae, x, dict.fromkeys(ids, 4.0), residual)
        coder, codes = self.splice.autoencoder, self.splice.codebook.codes
        z = x @ coder.W_enc.T + coder.b_enc
        kept = (z @ (codes / codes.norm(dim=1, keepdim=True)).T).topk(K).indices
        gone = codes * torch.isin(torch.arange(C), torch.tensor(ids))[:, None]
        return (x if residual is None else residual) - 2 * (gone[kept].sum(-2) @ coder.W_dec.T)

    def by_hand(self, entries, given=GIVEN, skip=1):
        """Logits of a plain model in which each sequence loses what its entry's masks take."""
        model, read = small(), {}

        def change(module, args, kwargs, out=None):
            kept = out if isinstance(out, torch.Tensor) else out[0]
            x, residual = (read["x"], kept) if self.reads != self.writes else (kept, None)
            y = torch.stack([
                self.taken(x[i], names, None if residual is None else residual[i]) for i, names in enumerate(entries)
            ])  # fmt: skip
            y[:, :skip] = kept[:, :skip]
            return y if isinstance(out, torch.Tensor) else (y, *out[1:])

        if self.reads != self.writes:
            model.get_submodule(self.reads.removesuffix(":in")).register_forward_pre_hook(
                lambda m, args: read.update(x=args[0])
            )
        model.get_submodule(self.writes).register_forward_hook(change, with_kwargs=True)
        return logits(model, given)
