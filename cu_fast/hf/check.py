"""Does an autoencoder fit the place that it was put at? Figures of texts, and an error where it does not.

A wrong layer, a wrong convention of a format or another model than the release's makes latents fire far more or far less
often than the release says. Deletions would then quietly do nothing, or too much.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cu_fast.hf.hooks import first_argument, with_first
from cu_fast.hf.positions import first_tokens
from cu_fast.hf.sites import SEQUENCES
from cu_fast.nn import Splice
from cu_fast.sae import SAESplice

if TYPE_CHECKING:
    from cu_fast.hf.attachment import Attachment
    from cu_fast.hf.checkpoint import Tokenizer
    from cu_fast.hf.topics import Layer

FACTOR = 2.0  # between the measured and the stated L0: texts differ, by a third or so
LEAST_EXPLAINED = (
    0.2  # share of the variance; of latents that are ranked L0 is k at any place, so that it tells nothing
)


@torch.no_grad()
def check(
    attachment: Attachment, tokenizer: Tokenizer, texts: Iterable[str], *, batch_size: int = 8, max_length: int = 512
) -> list[dict[str, Any]]:
    """See ``Attachment.check``."""
    model, layers = attachment.model, attachment._layers
    figures = [_Figures(layer) for layer in layers]
    seen: dict[int, Tensor] = {}
    of_splice = {id(layer.bottleneck): i for i, layer in enumerate(layers)}

    def observe(x: Tensor, splice: Splice) -> None:
        seen[of_splice[id(splice)]] = x.detach()

    losses = torch.zeros(1 + len(layers), dtype=torch.float64)
    predicted = 0
    with attachment.unlearn(None), attachment.observe(observe):
        for batch in _batches(texts, batch_size):
            inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            if inputs["input_ids"].shape[1] < 2:
                continue
            for which in range(len(losses)):
                with contextlib.ExitStack() as stack:
                    for i, layer in enumerate(layers):
                        change = figures[i].look if which == 0 else figures[i].replace if which == i + 1 else None
                        if change is not None:
                            kept = inputs["attention_mask"].bool()
                            first = first_tokens(inputs, SEQUENCES, 0, layer.skip_first) if layer.skip_first else None
                            kept = kept if first is None else kept & ~first
                            stack.enter_context(_changing(model, layer, seen, i, kept, change))
                    logits = model(**inputs).logits
                labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)[:, 1:]
                losses[which] += (
                    F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="sum")
                    .double()
                    .cpu()
                )
            predicted += int((labels != -100).sum())
    if predicted == 0:
        raise ValueError("texts holds no text of two tokens or more; give at least one")
    loss, *replaced = (losses / predicted).tolist()
    rows = [one.row(loss, other) for one, other in zip(figures, replaced)]
    for layer, row in zip(layers, rows):
        stated = row["stated_l0"]
        if stated is not None and not stated / FACTOR <= row["l0"] <= stated * FACTOR:
            raise ValueError(
                f"layer {layer.name!r}: {row['l0']:.1f} latents fire per token, and the release says {stated:g}. The "
                f"autoencoder is at another place than it was made for, or for another model, or its file is read by the "
                f"wrong rules; compare its site with the layer"
            )
        explained = row["explained_variance"]
        if explained is not None and explained < LEAST_EXPLAINED:
            raise ValueError(
                f"layer {layer.name!r}: the reconstruction explains {explained:.2f} of the variance, and should explain "
                f"{LEAST_EXPLAINED} at least. The codes are at another place than they were made for, or for another "
                f"model; compare the autoencoder's site with the layer"
            )
    return rows


class _Figures:
    """Sums over tokens, for one layer."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.splice = layer, layer.bottleneck
        self.tokens = self.fired = 0
        self.counts = torch.zeros(self.splice.num_codes, dtype=torch.int64)
        self.total = torch.zeros(self.splice.d_out, dtype=torch.float64)
        self.square = self.error = 0.0

    def look(self, x: Tensor, target: Tensor) -> None:
        """Count; x and target are those of the tokens that count, [T, d_in] and [T, d_out]."""
        ids = self.splice.active(x)
        ids = ids[ids >= 0].long().cpu()
        self.tokens, self.fired = self.tokens + len(x), self.fired + len(ids)
        self.counts += torch.bincount(ids, minlength=len(self.counts))
        target = target.double().cpu()
        self.total += target.sum(0)
        self.square += float(target.square().sum())
        if (made := self.splice.reconstruct(x)) is not None:
            self.error += float((target - made.double().cpu()).square().sum())

    def replace(self, x: Tensor, target: Tensor) -> Tensor | None:
        """What the splice makes of x in place of the target, where it can."""
        made = self.splice.reconstruct(x)
        return None if made is None else made.to(target.dtype)

    def row(self, loss: float, replaced: float) -> dict[str, Any]:
        sae = self.splice.sae if isinstance(self.splice, SAESplice) else None
        known = sae is None or sae.b_dec is not None
        variance = self.square - float((self.total.square() / self.tokens).sum())
        return {
            "layer": self.layer.name,
            "tokens": self.tokens,
            "l0": self.fired / self.tokens,
            "stated_l0": None if sae is None else sae.provenance.l0,
            "dead_share": float((self.counts == 0).double().mean()),
            "explained_variance": 1 - self.error / variance if known else None,
            "loss": loss,
            "loss_replaced": replaced if known else None,
        }


@contextlib.contextmanager
def _changing(
    model: nn.Module, layer: Layer, seen: dict[int, Tensor], index: int, kept: Tensor,
    change: Callable[[Tensor, Tensor], Tensor | None],
) -> Iterator[None]:  # fmt: skip
    """While the context is open, tokens that leave a layer's place become what ``change`` returns, unless it is None."""
    module = model.get_submodule(layer.writes.module)

    def changed(target: Tensor) -> Tensor:
        x = seen[index]
        tokens = kept.reshape(-1).to(x.device)
        if x.shape[:-1].numel() != len(tokens):
            raise RuntimeError(
                f"layer {layer.name!r} has {list(x.shape)} for {list(kept.shape)} tokens; it cannot be checked"
            )
        flat = target.reshape(-1, target.shape[-1])
        made = change(x.reshape(-1, x.shape[-1])[tokens], flat[tokens])
        if made is None:
            return target
        return flat.index_put((tokens.nonzero()[:, 0],), made).reshape(target.shape)

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return with_first(output, changed(output if isinstance(output, Tensor) else output[0]))

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        name, x = first_argument(module, args, kwargs, layer.writes)
        return (args, {**kwargs, name: changed(x)}) if name else ((changed(x), *args[1:]), kwargs)

    if layer.writes.side == "out":
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise TypeError("texts is one text; it should be an iterable of texts")
    texts = iter(texts)
    while batch := list(itertools.islice(texts, size)):
        yield batch
