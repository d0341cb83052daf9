"""How often each code of a layer is among the best of a token, over a corpus that streams."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cu_fast.ops.checks import check_choice

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer
    from cu_fast.nn import CodebookBottleneck


class _Counted(Exception):
    """Ends a forward pass at the layer whose codes are counted: the layers above are not needed."""


@dataclasses.dataclass
class CodeCounts:
    """How often each code was among the ``depth`` best of a token.

    Attributes:
        counts: int64 [C].
        tokens: how many were looked at.
        contexts: int32 [C, examples, 2 window + 1], per code windows of token ids around the first places where it was
            among the k best; -1 = beyond the text, or no such place.
    """

    counts: Tensor
    tokens: int
    contexts: Tensor

    def __sub__(self, other: CodeCounts) -> CodeCounts:
        """The counts of a corpus without a part of it, ``other``; no contexts."""
        return CodeCounts(self.counts - other.counts, self.tokens - other.tokens, self.contexts[:, :0])


@torch.no_grad()
def count_codes(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    layer: str | None,
    depth: int,
    name: str = "texts",
    examples: int = 3,
    window: int = 5,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> CodeCounts:
    """Run texts through the model, unmasked, and count at each token the ``depth`` best codes of a layer.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: iterated once.
        layer: name of the layer whose codes are counted; None = the only one that has a bottleneck.
        depth: codes counted per token, k <= depth <= C.
        name: of the texts, for the progress bar and messages.
        examples: contexts kept per code, the first that are seen; 0 = none.
        window: tokens of a context on each side.
        batch_size: texts per forward pass.
        max_length: tokens that a text is cut to.
        progress: show a progress bar, on a terminal.

    Returns:
        CodeCounts, on the CPU.

    Raises:
        ValueError: there are no texts, or they hold no token; an unknown layer; a number out of range.
        TypeError: texts is one text, or holds anything but texts.
    """
    layer = only_layer(attachment, layer)
    model, bottleneck = attachment.model, attachment.bottlenecks[layer]
    k, C = bottleneck.config.k, bottleneck.config.num_codes
    for number, value, least, most in (
        ("depth", depth, k, C),
        ("examples", examples, 0, math.inf),
        ("window", window, 0, math.inf),
        ("batch_size", batch_size, 1, math.inf),
        ("max_length", max_length, 1, math.inf),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{number} is {value!r}; it should be an int, at least {least}, at most {most}")
    counts = CodeCounts(
        torch.zeros(C, dtype=torch.int64), 0, torch.full((C, examples, 2 * window + 1), -1, dtype=torch.int32)
    )
    seen = torch.zeros(C, dtype=torch.int64)

    def observe(x: Tensor, observed: CodebookBottleneck) -> None:
        if observed is not bottleneck:
            return  # that of an earlier layer, which has to run first
        valid = attention.flatten().bool()
        ids = bottleneck.select(x, depth).ids[valid.to(x.device)].cpu().long()
        counts.counts += torch.bincount(ids[ids >= 0], minlength=C)
        counts.tokens += len(ids)
        if examples:
            _keep_contexts(counts.contexts, seen, ids[:, :k], tokens, valid, window)
        raise _Counted

    reader = reader_of(model)
    training = model.training
    model.eval()
    try:
        with attachment.unlearn(None), attachment.observe(observe):
            for batch in tqdm(
                _batches(texts, batch_size), desc=f"count {name}", unit="batch", disable=None if progress else True
            ):
                encoded = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
                tokens, attention = encoded["input_ids"], encoded["attention_mask"]
                if tokens.numel() == 0:  # every text of the batch is empty
                    continue
                with contextlib.suppress(_Counted):
                    reader(input_ids=tokens.to(model.device), attention_mask=attention.to(model.device))
    finally:
        model.train(training)
    if counts.tokens == 0:
        raise ValueError(f"{name} holds no text; give at least one that is not empty")
    return counts


def reader_of(model: nn.Module) -> nn.Module:
    """The part of a model that reads texts: an encoder-decoder's encoder, else the whole model.

    The encoder is run alone because what a decoder would answer is not part of the texts.
    """
    return model.get_encoder() if model.config.is_encoder_decoder else model


def only_layer(attachment: Attachment, layer: str | None) -> str:
    layers = list(attachment.bottlenecks)
    if layer is None and len(layers) == 1:
        return layers[0]
    check_choice("layer", layer, layers)
    return layer


def _keep_contexts(contexts: Tensor, seen: Tensor, ids: Tensor, tokens: Tensor, valid: Tensor, window: int) -> None:
    """Keep the contexts of codes that have fewer than ``examples`` of them, in place.

    Args:
        contexts: int32 [C, examples, 2 window + 1].
        seen: int64 [C], how many each code has.
        ids: int64 [T, k], the codes of the valid positions.
        tokens: token ids [B, S] of the batch.
        valid: bool [B S], which positions hold a token.
        window: tokens on each side.
    """
    examples = contexts.shape[1]
    padded = torch.nn.functional.pad(torch.where(valid.reshape(tokens.shape), tokens, -1), (window, window), value=-1)
    windows = padded.unfold(1, 2 * window + 1, 1).reshape(-1, 2 * window + 1)[valid]
    fresh = seen[ids.clamp(min=0)] < examples
    for position, slot in (fresh & (ids >= 0)).nonzero().tolist():
        code = int(ids[position, slot])
        if seen[code] < examples:
            contexts[code, seen[code]] = windows[position].int()
            seen[code] += 1


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
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
