"""How often each code of a layer is kept by a token, over a corpus that streams."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cu_fast.nn import Splice
from cu_fast.unlearn.reading import Source, batches_of, kept_codes, only_layer, reading

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer
    from cu_fast.sae import SAE


@dataclasses.dataclass
class CodeCounts:
    """How often each code was among the ``depth`` best of a token; of latents with a threshold, how often it fired.

    Attributes:
        counts: int64 [C].
        tokens: how many were looked at.
        contexts: int32 [C, examples, 2 window + 1], per code windows of token ids around the first places where it was
            among the k best, or fired; -1 = beyond the text, or no such place.
        squares: fp64 [C], the sum of the squares of each latent's activations; None = not counted.
        source: layer, codebook and depth, which :func:`find_mask` compares with its own; None = not known, and not compared.
    """

    counts: Tensor
    tokens: int
    contexts: Tensor
    squares: Tensor | None = None
    source: Source | None = None

    def __sub__(self, other: CodeCounts) -> CodeCounts:
        """The counts of a corpus without a part of it, ``other``; no contexts and no squares. ValueError: of other codes."""
        if self.source is not None:
            self.source.check("what is taken off", other.source)
        counts, tokens = self.counts - other.counts, self.tokens - other.tokens
        return CodeCounts(counts, tokens, self.contexts[:, :0], source=self.source)


@torch.no_grad()
def count_codes(
    attachment: Attachment,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    layer: str | None,
    depth: int | None = None,
    name: str = "texts",
    squares: bool = False,
    skip_first: int | None = None,
    examples: int = 3,
    window: int = 5,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = True,
) -> CodeCounts:
    """Run texts through the model, unmasked, and count what each token keeps at a layer.

    Where ``torch.distributed`` is initialised every process calls this with the same texts, computes its share of the
    batches, and has the result of one process that computed all, to the last bit. Where the model itself is split over
    the processes, each computes all.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        texts: iterated once.
        layer: name of the layer whose codes are counted; None = the only one that has a splice.
        depth: codes counted per token, k <= depth <= C; None = those that it keeps. Of latents with a threshold all that
            fire are counted, and it should be None.
        name: of the texts, for the progress bar and messages.
        squares: also add up the squares of a sparse autoencoder's activations.
        skip_first: positions at the start of each text that are not counted; None = those that the layer's masks leave
            alone.
        examples: contexts kept per code, the first that are seen, by the first process; 0 = none.
        window: tokens of a context on each side.
        batch_size: texts per forward pass.
        max_length: tokens that a text is cut to.
        progress: show a progress bar, on a terminal.

    Returns:
        CodeCounts, on the CPU.

    Raises:
        ValueError: there are no texts, or they hold no token that counts; an unknown layer; a number out of range;
            squares of a codebook, whose codes have no activations.
        TypeError: texts is one text, or holds anything but texts.
        RuntimeError: the masks brought their rows, and there is no autoencoder.
    """
    layer = only_layer(attachment, layer)
    splice = attachment.bottlenecks[layer]
    C = splice.num_codes
    check_depth(splice, layer, depth)
    for number, value, least in (
        ("skip_first", 0 if skip_first is None else skip_first, 0),
        ("examples", examples, 0),
        ("window", window, 0),
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 1),
    ):
        _check_number(number, value, least)
    sae = sae_of(splice, layer) if squares else None
    counts = CodeCounts(
        torch.zeros(C, dtype=torch.int64), 0, torch.full((C, examples, 2 * window + 1), -1, dtype=torch.int32),
        torch.zeros(C, dtype=torch.float64) if squares else None, Source.of(attachment, layer, depth),
    )  # fmt: skip
    seen = torch.zeros(C, dtype=torch.int64)
    of_batch = torch.zeros(C, dtype=torch.float64)

    def visit(_: str, x: Tensor, valid: Tensor, tokens: Tensor) -> None:
        windows = _windows(tokens, valid, window) if examples else tokens
        done = 0
        for part, found in kept_codes(splice, x, depth, C if squares else None):
            ids = found.cpu().long()
            counts.counts.add_(torch.bincount(ids[ids >= 0], minlength=C))
            counts.tokens += len(ids)
            if squares:
                of_batch.add_(_squares(sae.to(part.device), part).cpu())
            if examples:
                _keep_contexts(counts.contexts, seen, ids[:, : splice.k], windows[done : done + len(ids)])
            done += len(ids)

    rank, world = _share(attachment.model)
    bar = tqdm(batches_of(texts, batch_size), desc=f"count {name}", unit="batch", disable=None if progress else True)
    with reading(attachment, tokenizer, [layer], visit, skip_first=skip_first, max_length=max_length) as read:
        turn = 0
        for batch in bar:
            if turn == rank:
                read(batch)
            turn = (turn + 1) % world
            if squares and turn == 0:
                _add_in_order(counts.squares, of_batch, world, attachment.model)
        if squares and turn:
            _add_in_order(counts.squares, of_batch, world, attachment.model)
    if world > 1:
        _add_shares(counts, attachment.model)
    if counts.tokens == 0:
        raise ValueError(f"{name} holds no text; give at least one that is not empty")
    return counts


def check_depth(splice: Splice, layer: str, depth: int | None) -> None:
    """Raises ValueError for a depth that a layer does not have."""
    if depth is None:
        return
    if splice.k is None:
        raise ValueError(
            f"depth is {depth!r}; layer {layer!r} has latents with a threshold, of which all that fire count: give None"
        )
    _check_number("depth", depth, splice.k, splice.num_codes)


def sae_of(splice: Splice, layer: str) -> SAE:
    """The autoencoder of a layer. Raises ValueError where it has a codebook, RuntimeError where only rows are here."""
    if not splice.has_latents:
        raise ValueError(
            f"layer {layer!r} has a codebook, whose codes have no activations; squares and rank 'dsg' are for a sparse "
            f"autoencoder: take rank 'enrichment' or 'saebench'"
        )
    if splice.sae is None:
        raise RuntimeError(f"layer {layer!r} has rows of masks alone; attach the autoencoder itself to count latents")
    return splice.sae


def _check_number(name: str, value: int, least: int, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; it should be an int, at least {least}, at most {most}")


def _squares(sae: SAE, x: Tensor) -> Tensor:
    """fp64 [C]: per latent the sum of its squared activations; tokens with NaN or Inf add nothing."""
    return sae.activations(x).nan_to_num(nan=0.0).double().square().sum(0)


def _windows(tokens: Tensor, valid: Tensor, window: int) -> Tensor:
    """The tokens around each position that counts.

    Args:
        tokens: int64 [B, S].
        valid: bool [B, S], which positions count.
        window: tokens on each side.

    Returns:
        int32 [T, 2 window + 1]; -1 = no token, or one that does not count.
    """
    padded = nn.functional.pad(torch.where(valid, tokens, -1), (window, window), value=-1)
    return padded.unfold(1, 2 * window + 1, 1)[valid].int()


def _keep_contexts(contexts: Tensor, seen: Tensor, ids: Tensor, windows: Tensor) -> None:
    """Keep the contexts of codes that have fewer than ``examples`` of them, in place.

    Args:
        contexts: int32 [C, examples, 2 window + 1].
        seen: int64 [C], how many each code has.
        ids: int64 [T, n], the codes that each token keeps, -1 = none.
        windows: int32 [T, 2 window + 1].
    """
    examples = contexts.shape[1]
    fresh = seen[ids.clamp(min=0)] < examples
    for position, slot in (fresh & (ids >= 0)).nonzero().tolist():
        code = int(ids[position, slot])
        if seen[code] < examples:
            contexts[code, seen[code]] = windows[position]
            seen[code] += 1


# -- several processes ---------------------------------------------------------------------------------------------


def _share(model: nn.Module) -> tuple[int, int]:
    """Which batches this process computes: its number, and of how many."""
    dist = torch.distributed
    split = (getattr(model, "_tp_size", None) or 1) > 1 or any(hasattr(p, "device_mesh") for p in model.parameters())
    if split or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _device(model: nn.Module) -> torch.device:
    """Where tensors have to be that processes exchange."""
    return torch.device(model.device if "nccl" in torch.distributed.get_backend() else "cpu")


def _add_in_order(total: Tensor, of_batch: Tensor, world: int, model: nn.Module) -> None:
    """Add the sums of one batch per process in the order of the batches, as one process does; clears them."""
    parts = [of_batch]
    if world > 1:
        mine = of_batch.to(_device(model))
        parts = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(parts, mine)
    for part in parts:
        total.add_(part.cpu())
    of_batch.zero_()


def _add_shares(counts: CodeCounts, model: nn.Module) -> None:
    """Add up the counts of all processes, in place; the contexts are the first one's."""
    numbers = torch.cat([counts.counts, torch.tensor([counts.tokens])]).to(_device(model))
    torch.distributed.all_reduce(numbers)
    contexts = counts.contexts.to(_device(model))
    torch.distributed.broadcast(contexts, 0)
    counts.counts, counts.tokens, counts.contexts = numbers[:-1].cpu(), int(numbers[-1]), contexts.cpu()
