"""Texts run through a model, unmasked, and what their tokens keep at some of its layers.

Positions that hold no token are left out, and so are the first ones where masks leave those alone. A module that runs
several times in a forward is read the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cu_fast.masks import LatentRows, Mask
from cu_fast.nn import Splice
from cu_fast.ops.checks import check_choice
from cu_fast.sae import SAE

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer

TILE = 2**22  # places of codes that are looked at together: 16 MiB of int32

# layer, what its splice reads at the T tokens that count [T, D], which those are bool [B, S], token ids int64 [B, S]
Visit = Callable[[str, Tensor, Tensor, Tensor], None]


class Source(NamedTuple):
    """What codes were counted of.

    Attributes:
        layer: the layer's name.
        codebook_sha256: of its codebook, or of its autoencoder.
        depth: codes per token; None = all latents that fire.
    """

    layer: str
    codebook_sha256: str
    depth: int | None

    @classmethod
    def of(cls, attachment: Attachment, layer: str, depth: int | None = None) -> Source:
        """A layer as it is now. depth: None = what a token keeps."""
        splice = attachment.bottlenecks[layer]
        return cls(layer, splice.codebook_sha256(), splice.k if depth is None else depth)

    def check(self, name: str, of: Source | None) -> None:
        """Raises ValueError where counts of this name are of something else; None = that is not known."""
        if of not in (None, self):
            raise ValueError(f"{name} counts {of}; it should count {self}: count again")

    def __str__(self) -> str:
        depth = "all latents that fire" if self.depth is None else f"the best {self.depth} codes of a token"
        return f"{depth} at layer {self.layer!r}, codebook {self.codebook_sha256[:12]}..."


class _AllRead(Exception):
    """Ends a forward at the last layer that is read: the layers above are not needed."""


@contextlib.contextmanager
def reading(
    attachment: Attachment,
    tokenizer: Tokenizer,
    layers: Collection[str],
    visit: Visit,
    *,
    skip_first: int | None = None,
    max_length: int | None = None,
) -> Iterator[Callable[[list[str]], None]]:
    """Read batches of texts while the context is open.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        layers: names of those that are read.
        visit: called once per batch and layer; the tensors are the model's, in the order of the batch.
        skip_first: first positions of each text that are left out; None = those that the layer's masks leave alone.
        max_length: tokens that a text is cut to; None = none is cut.

    Returns:
        A function of a batch of texts. A batch without tokens is not visited.

    Raises:
        ValueError: from the function, none of the layers runs where texts are read, or a text that is not cut is longer
            than the model takes.
    """
    model, seen = attachment.model, set()
    wanted = {id(attachment.bottlenecks[layer]): layer for layer in layers}
    skip = {layer: skipped(attachment, layer) if skip_first is None else skip_first for layer in layers}
    tokens = attention = torch.empty(0)

    def observe(x: Tensor, splice: Splice) -> None:
        layer = wanted.get(id(splice))
        if layer is None or layer in seen:
            return
        seen.add(layer)
        valid = attention.bool() & (attention.cumsum(1) > skip[layer])
        visit(layer, x.reshape(-1, x.shape[-1])[valid.flatten().to(x.device)], valid, tokens)
        if len(seen) == len(wanted):
            raise _AllRead

    def read(texts: list[str]) -> None:
        nonlocal tokens, attention
        cut = dict(truncation=False) if max_length is None else dict(truncation=True, max_length=max_length)
        encoded = tokenizer(texts, return_tensors="pt", padding=True, **cut)
        tokens, attention = encoded["input_ids"], encoded["attention_mask"]
        if max_length is None and tokens.shape[1] > (most := _most_tokens(model, tokenizer)):
            raise ValueError(
                f"a text has {tokens.shape[1]} tokens, and the model takes {most}; nothing is cut here, since what is cut "
                f"would not be judged: give parts of it, each of at most {most} tokens"
            )
        if not attention.any():  # every text of the batch is empty
            return
        seen.clear()
        with contextlib.suppress(_AllRead):
            reader(input_ids=tokens.to(model.device), attention_mask=attention.to(model.device))
        if not seen:
            raise ValueError(
                f"layer {', '.join(map(repr, layers))} does not run where texts are read: of an encoder-decoder that is "
                f"the encoder alone"
            )

    reader = reader_of(model)
    training = model.training
    if any(module.training for module in model.modules()):
        model.eval()
    try:
        with attachment.unlearn(None), attachment.observe(observe):
            yield read
    finally:
        if training:
            model.train()


def _most_tokens(model: nn.Module, tokenizer: Tokenizer) -> int:
    """How many tokens of a text a model takes, as its config and its tokenizer say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(most for most in (positions, tokenizer.model_max_length) if most is not None)


def kept_codes(
    splice: Splice | FewLatents, x: Tensor, depth: int | None = None, tile: int | None = None
) -> Iterator[tuple]:
    """What tokens keep, in tiles: no matrix of tokens and codes is made beyond one.

    Args:
        splice: of the layer.
        x: [T, D], what it reads.
        depth: how many of the best codes are looked at; None = those that each token keeps.
        tile: codes per token that a tile is made for; None = as many as a token may keep.

    Returns:
        An iterator over tiles of t tokens: their x [t, D], and int32 [t, n], -1 where a token keeps fewer.
    """
    most = tile or depth or splice.k or splice.num_codes
    for part in x.split(max(1, TILE // most)) if len(x) else ():
        ids = splice.active(part, depth)
        if splice.k is None:  # of a token with NaN or Inf nothing is known
            ids = torch.where(part.isfinite().all(1)[:, None], ids, -1)
        yield part, ids


class FewLatents:
    """Some latents of an autoencoder that is not at hand, by their rows: what :func:`kept_codes` needs of a splice.

    Args:
        parts: ids int [R] and the rows of those latents; a latent may be in several.
    """

    k = None

    def __init__(self, parts: Sequence[tuple[Tensor, LatentRows]]) -> None:
        every, first = np.unique(np.concatenate([ids.numpy() for ids, _ in parts]), return_index=True)
        rows = (torch.cat(kind)[first] for kind in zip(*(rows.rows() for _, rows in parts)))
        self.num_codes = len(every)
        self._sae = SAE(*rows, **parts[0][1].settings())
        self._ids = torch.from_numpy(every.astype(np.int32))

    def active(self, x: Tensor, depth: None = None) -> Tensor:
        """As the whole autoencoder's ``active``, of these latents alone, with -1 at the places of those that do not fire."""
        return torch.where(self._sae.to(x.device).activations(x) > 0, self._ids.to(x.device), -1)


def layers_of(attachment: Attachment, masks: Iterable[Mask]) -> Mapping[str, Mask]:
    """The layers that masks are for.

    Raises:
        ValueError: a mask of another codebook, or of one that several layers have and its layer is none of them.
    """
    found, codebooks = {}, {name: splice.codebook_sha256() for name, splice in attachment.bottlenecks.items()}
    for mask in masks:
        names = [name for name, sha256 in codebooks.items() if sha256 == mask.codebook_sha256]
        if len(names) > 1:
            names = [name for name in names if name == mask.layer]
        if len(names) != 1:
            raise ValueError(
                f"mask {mask.topic!r} was made for another codebook (sha256 {mask.codebook_sha256[:12]}...), or for a "
                f"layer other than {', '.join(codebooks)}; find it again on this model"
            )
        found[names[0]] = mask
    return found


def skipped(attachment: Attachment, layer: str) -> int:
    """How many positions at the start of each sequence the masks of a layer leave alone."""
    return next(swapped.skip_first for swapped in attachment._layers if swapped.name == layer)


def reader_of(model: nn.Module) -> nn.Module:
    """The part of a model that reads texts: an encoder-decoder's encoder, else the whole model.

    The encoder is run alone because what a decoder would answer is not part of the texts.
    """
    return model.get_encoder() if model.config.is_encoder_decoder else model


def only_layer(attachment: Attachment, layer: str | None) -> str:
    """The layer of a name; None = the only one. Raises ValueError for an unknown name, or None where there are several."""
    layers = list(attachment.bottlenecks)
    if layer is None and len(layers) == 1:
        return layers[0]
    check_choice("layer", layer, layers)
    return layer


def batches_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Texts in batches. Raises TypeError for one text, or anything but texts."""
    if isinstance(texts, (str, Mapping)):
        raise TypeError(f"texts is a {type(texts).__name__}; it should be an iterable of strings")
    batch: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts holds {text!r}, a {type(text).__name__}; it should be an iterable of strings")
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
