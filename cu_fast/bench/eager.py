"""PyTorch code that does the same jobs, as a careful user writes it. Part of ``cu_fast.bench``.

No copy that can be avoided, in-place masking, cosine as a product with codes that were normalised before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cu_fast.bench.cells import CLAMP, Inputs
from cu_fast.bench.job import Builder, Job, Skip, require_memory
from cu_fast.bench.truth import Answer


def normalised(codes: Tensor) -> Tensor:
    """Codes of norm 1; F.normalize would leave those shorter than 1e-12 short."""
    return codes / codes.norm(dim=1, keepdim=True).clamp(min=1e-38)


def select(z: Tensor, codes: Tensor, bias: Tensor | None, deleted: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The usual way: all scores, -inf where deleted, topk. Returns scores and ids, [T, k]."""
    scores = F.linear(z, codes, bias)
    if deleted is not None:
        scores.masked_fill_(deleted, -torch.inf)
    return torch.topk(scores, k)


def select_latents(
    x: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor, deleted: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    values, ids = select(x - b_pre, W_enc, b_enc, deleted, k)
    return torch.relu(values), ids


def encode(x: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return torch.relu(F.linear(x - b_pre, W_enc, b_enc))


def decode(ids: Tensor, weights: Tensor | None, table: Tensor, deleted: Tensor | None) -> Tensor:
    return F.embedding_bag(ids, table, mode="sum", per_sample_weights=_ablated(ids, weights, table, deleted))


def gather_decode(ids: Tensor, weights: Tensor | None, table: Tensor, deleted: Tensor | None) -> Tensor:
    return torch.einsum("tk,tkd->td", _ablated(ids, weights, table, deleted), table[ids])


def _ablated(ids: Tensor, weights: Tensor | None, table: Tensor, deleted: Tensor | None) -> Tensor | None:
    if deleted is None:
        return weights
    kept = ~(deleted[0][ids] if len(deleted) == 1 else deleted.gather(1, ids))
    return kept.to(table.dtype) if weights is None else weights * kept


def through_bottleneck(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, codes: Tensor, table: Tensor, b_dec: Tensor, deleted: Tensor | None, k: int
) -> Tensor:
    """What a CodebookBottleneck computes: encode, the k most similar codes, the sum of their rows. x [..., D]."""
    flat = x.reshape(-1, x.shape[-1])
    ids = select(torch.relu(F.linear(flat, W_enc, b_enc)), codes, None, None, k)[1]
    return (decode(ids, None, table, deleted) + b_dec).reshape(x.shape)


def bottleneck_weights(module: Any, dtype: torch.dtype) -> list[Tensor]:
    """W_enc, b_enc, codes, table and b_dec of ``through_bottleneck``, folded as in the module itself."""
    sae, rms, codes = module.autoencoder, module.rms, module.codebook.codes.detach().float()
    W_enc = sae.W_enc.detach().float() / rms
    b_enc = sae.b_enc.detach().float() - sae.W_enc.detach().float() @ sae.b_pre.detach().float()
    W_dec, b_dec = sae.W_dec.detach().float() * rms, sae.b_dec.detach().float() * rms
    return [tensor.to(dtype) for tensor in (W_enc, b_enc, normalised(codes), codes @ W_dec.T, b_dec)]


def delete(x: Tensor, enc: Tensor, bias: Tensor, theta: Tensor, dec: Tensor) -> Tensor:
    """Latents that fire become CLAMP: those alone that the mask changes are given. x [T, D], enc and dec [k, D]."""
    pre = F.linear(x, enc, bias)
    return torch.addmm(x, torch.where(pre > theta, CLAMP - pre, 0.0), dec)


def delete_by_mask(x: Tensor, tokens: list[Tensor], latents: list[list[Tensor]]) -> Tensor:
    """The same, mask by mask: the tokens that hold it, and its latents."""
    y = torch.empty_like(x)
    for some, rows in zip(tokens, latents):
        y[some] = delete(x[some], *rows)
    return y


def gather_delete(x: Tensor, mask_row: Tensor, enc: Tensor, bias: Tensor, theta: Tensor, dec: Tensor) -> Tensor:
    """The same, for each token of its mask's latents: enc and dec [U, k, D], bias and theta [U, k]."""
    pre = torch.einsum("td,tkd->tk", x, enc[mask_row]) + bias[mask_row]
    return x + torch.einsum("tk,tkd->td", torch.where(pre > theta[mask_row], CLAMP - pre, 0.0), dec[mask_row])


def tokens_by_mask(mask_row: Tensor) -> list[tuple[int, Tensor]]:
    """Each mask that a token holds, with its tokens."""
    return [(mask, (mask_row == mask).nonzero()[:, 0]) for mask in mask_row.unique().tolist()]


def _deletion(inputs: Inputs, dtype: torch.dtype, wrap: Callable, gather: bool) -> Job:
    """What each mask needs is put together before: users know it when the request begins."""
    cell = inputs.cell
    copies = 1 + len(inputs.latents) + (cell.T if gather else 0)
    require_memory(
        inputs.memory, 2 * dtype.itemsize * copies * cell.k * cell.E, "rows [T, k, D] of encoder and decoder"
    )
    x, parts = inputs.x.to(dtype), (inputs.codes, inputs.bias, inputs.theta, inputs.dec)
    if gather:
        if len(inputs.latents) == 1:
            raise Skip("all tokens hold one mask: there is nothing to gather")
        mask_row, rows = inputs.mask_row.long(), [part[inputs.latents.long()].to(dtype) for part in parts]
        run = wrap(gather_delete)
        return Job(lambda: run(x, mask_row, *rows), _values)
    held = tokens_by_mask(inputs.mask_row)
    latents = [[part[inputs.latents[mask].long()].to(dtype) for part in parts] for mask, _ in held]
    if len(held) == 1:
        run = wrap(delete)
        return Job(lambda: run(x, *latents[0]), _values)
    run, tokens = wrap(delete_by_mask), [some for _, some in held]
    return Job(lambda: run(x, tokens, latents), _values, note="mask by mask")


def eager(dtype: torch.dtype, compiled: bool = False, gather: bool = False, mode: str | None = None) -> Builder:
    """PyTorch code in one dtype; ``gather``: decode by gather and einsum; ``mode``: torch.compile's."""

    def build(inputs: Inputs) -> Job:
        cell, deleted = inputs.cell, inputs.deleted

        def wrap(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False, mode=mode) if compiled else function

        if cell.op == "delete_latents":
            return _deletion(inputs, dtype, wrap, gather)
        scores = 0 if cell.op in ("sae_encode", "masked_decode") else cell.T * cell.C
        copies = 2 if cell.op == "bottleneck" else 1
        require_memory(
            inputs.memory, 4 * copies * cell.C * cell.E + 2 * dtype.itemsize * scores, "codes, and scores [T, C],"
        )

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        k, x = cell.k, cast(inputs.x)
        if cell.op == "codebook_quantize":
            codes, run = normalised(inputs.codes.float()).to(dtype), wrap(select)
            return Job(lambda: run(x, codes, None, deleted, k), _ids_of_topk)
        codes, bias, b_pre = cast(inputs.codes), cast(inputs.bias), cast(inputs.b_pre)
        if cell.op == "sae_encode_topk":
            run = wrap(select_latents)
            return Job(lambda: run(x, b_pre, codes, bias, deleted, k), _ids_of_topk)
        if cell.op == "sae_encode":
            run = wrap(encode)
            return Job(lambda: run(x, b_pre, codes, bias), _values)
        if cell.op == "masked_decode":
            ids, weights, run = inputs.ids.long(), cast(inputs.weights), wrap(gather_decode if gather else decode)
            if gather:
                require_memory(inputs.memory, 2 * dtype.itemsize * cell.T * cell.k * cell.E, "gathered rows [T, k, D]")
            return Job(lambda: run(ids, weights, codes, deleted), _values)
        W_enc, b_enc, unit, table, b_dec = bottleneck_weights(inputs.bottleneck, dtype)
        run = wrap(through_bottleneck)

        def answer(y: Tensor) -> Answer:
            return Answer(select(torch.relu(F.linear(x, W_enc, b_enc)), unit, None, None, k)[1], y)

        return Job(lambda: run(x, W_enc, b_enc, unit, table, b_dec, deleted, k), answer)

    return build


def dense(dtype: torch.dtype) -> Builder:
    """Decode as a product of dense activations [T, C], which exist already, with the table."""

    def build(inputs: Inputs) -> Job:
        cell = inputs.cell
        needed = (4 + dtype.itemsize) * cell.T * cell.C + dtype.itemsize * cell.C * cell.E
        require_memory(inputs.memory, needed, "dense activations [T, C]")
        ids, weights = inputs.ids.long(), inputs.weights.float()
        activations = torch.zeros(cell.T, cell.C, device=ids.device).scatter_add_(1, ids, weights).to(dtype)
        if inputs.deleted is not None:
            activations.masked_fill_(inputs.deleted, 0)
        columns = inputs.codes.to(dtype).T
        return Job(lambda: F.linear(activations, columns), _values, note="activations ready, masked")

    return build


def product(inputs: Inputs) -> Job:
    """All scores in bf16, by the library's matrix product, and nothing else: what a selection is measured against."""
    cell = inputs.cell
    require_memory(inputs.memory, 2 * cell.C * cell.E + 2 * cell.T * cell.C, "codes, and scores [T, C],")
    x, codes = inputs.x.bfloat16(), inputs.codes.bfloat16()
    return Job(lambda: F.linear(x, codes), note="scores [T, C] only: nothing is selected")


def _values(output: Tensor) -> Answer:
    return Answer(values=output)


def _ids_of_topk(output: tuple[Tensor, Tensor]) -> Answer:
    return Answer(output[1])
