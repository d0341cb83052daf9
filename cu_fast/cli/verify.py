"""Proof, on the user's own machine, that selections are exact, that masks bite, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cu_fast import ops
from cu_fast.hf import Attachment
from cu_fast.hf.checkpoint import load_model
from cu_fast.masks import Mask
from cu_fast.nn import CodebookBottleneck, Splice

TOKENS = 257


def verify(folder: str | Path) -> list[dict[str, Any]]:
    """Run every check on the model in a folder.

    Returns, for each check: check (what it is), passed, and figure (what was compared, or the error).
    """
    model, tokenizer, attachment = load_model(folder)
    checks = []
    for name, check in _checks(model, tokenizer, attachment):
        try:
            figure, passed = check(), True
        except Exception as error:  # a check that cannot run has failed, whatever the reason
            figure, passed = f"{type(error).__name__}: {error}", False
        checks.append({"check": name, "passed": passed, "figure": figure})
    return checks


def _checks(model, tokenizer, attachment: Attachment) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "implementations agree bit for bit", _implementations_agree
    for layer, bottleneck in attachment.bottlenecks.items():
        yield f"{layer}: a token's result does not depend on its batch", lambda b=bottleneck: _batch_invariant(b)
        yield f"{layer}: deleted codes never come out, others are untouched", lambda b=bottleneck: _masks_bite(b)
    for name, masks in attachment.masks.items():
        yield f"mask {name!r} belongs to its codebook", lambda m=masks: _mask_fits(attachment, m)
    yield "an unknown mask is refused", lambda: _refuses_unknown(attachment)
    yield "detach gives the model back bit for bit", lambda: _detaches(model, tokenizer, attachment)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _implementations_agree() -> str:
    impls = [name for name, reason in ops.available_impls().items() if reason is None]
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for similarity in ("cosine", "dot", "l2"):
        for E, C, k in ((64, 1000, 8), (33, 301, 17), (192, 4097, 64)):
            z = torch.randn(TOKENS, E, generator=generator)
            codes = torch.randn(C, E, generator=generator)
            codes[C // 2 :] = codes[: C - C // 2].clone()  # ties
            z[3, 1], z[5] = torch.nan, 0.0
            table = torch.randint(-(2**31), 2**31, (2, (C + 31) // 32), generator=generator).int()
            row = torch.randint(-1, 2, (TOKENS,), generator=generator, dtype=torch.int32)
            results = []
            for impl in impls:
                device = "cuda" if impl in ("cuda", "triton") else "cpu"
                packed = ops.pack_codes(codes.to(device), similarity)
                arguments = dict(k=k, mask_table=table.to(device), mask_row=row.to(device), return_hits=True, impl=impl)
                result = ops.codebook_quantize(z.to(device), packed, **arguments)
                results.append(ops.Selection(*(part.cpu() for part in result)))
            for result in results[1:]:
                _require(torch.equal(result.ids, results[0].ids), f"ids differ at E={E} C={C} k={k} {similarity}")
                same = torch.equal(result.scores.view(torch.int32), results[0].scores.view(torch.int32))
                nan = results[0].scores.isnan()
                same = same or torch.equal(result.scores[~nan], results[0].scores[~nan])
                _require(same and torch.equal(result.hits, results[0].hits), f"scores or hits differ at {similarity}")
                compared += result.ids.numel()
    return f"{' = '.join(impls)}: {compared} selections" if len(impls) > 1 else "only 'reference' is available"


def _activations(splice: Splice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = splice.rms.item() if isinstance(splice, CodebookBottleneck) else 1.0
    return scale * torch.randn(TOKENS, splice.d_in, generator=generator)


def _batch_invariant(splice: Splice) -> str:
    x = _activations(splice)
    mask = Mask.from_ids(_some_codes(splice, x), num_codes=splice.num_codes, codebook_sha256="", topic="verify")
    masks = _table(splice, mask)
    residual = {} if splice.d_in == splice.d_out else {"residual": torch.zeros(TOKENS, splice.d_out)}
    row = torch.zeros(TOKENS, dtype=torch.int32)

    def alone(t: int, *given: Any) -> torch.Tensor:
        one = slice(t, t + 1)
        return splice(x[one], *given, **{name: value[one] for name, value in residual.items()})

    for together, apart in (
        (splice(x, **residual), [alone(t) for t in range(TOKENS)]),
        (splice(x, masks, row, **residual), [alone(t, masks, row[t : t + 1]) for t in range(TOKENS)]),
    ):
        _require(torch.equal(together, torch.cat(apart)), "a token alone and in a batch gives different bits")
    return f"{TOKENS} tokens alone = in one batch"


def _some_codes(splice: Splice, x: torch.Tensor) -> torch.Tensor:
    kept = splice.active(x[::2])
    return torch.unique(kept[kept >= 0])[::2]


def _table(splice: Splice, mask: Mask) -> torch.Tensor | ops.LatentMasks:
    table = splice.new_table("cpu")
    table.write(0, splice.row_of([mask]))
    return table.tensors[0] if splice.splice == "replace" else ops.LatentMasks(*table.tensors)


def _masks_bite(splice: Splice) -> str:
    x = _activations(splice)
    kept = splice.active(x)
    deleted = _some_codes(splice, x)
    mask = Mask.from_ids(deleted, num_codes=splice.num_codes, codebook_sha256="", topic="verify")
    masks = _table(splice, mask)
    row = (torch.arange(TOKENS, dtype=torch.int32) % 2) - 1  # every other token has the mask
    residual = {} if splice.d_in == splice.d_out else {"residual": torch.zeros(TOKENS, splice.d_out)}
    plain, mode = splice(x, **residual), splice.mask_mode
    try:
        modes = ("ablate", "reselect") if splice.splice == "replace" else ("ablate",)
        for splice.mask_mode in modes:
            splice.reset_receipt()
            masked = splice(x, masks, row, **residual)
            free = row < 0
            _require(torch.equal(masked[free], plain[free]), "a token without a mask changed")
            touched = torch.isin(kept, deleted.int()).any(1) & ~free
            changed = (masked != plain).any(1)
            _require(torch.equal(changed, touched), "the tokens that changed are not those whose codes were deleted")
            hits = int(torch.isin(kept[~free], deleted.int()).sum())
            _require(splice.receipt()["hits"] == hits, "the receipt's hits are not the deletions that bit")
    finally:
        splice.mask_mode = mode
        splice.reset_receipt()
    return f"{len(deleted)} codes deleted for {int((~free).sum())} tokens: {hits} deletions bit, {' and '.join(modes)}"


def _mask_fits(attachment: Attachment, masks) -> str:
    hashes = {bottleneck.codebook_sha256() for bottleneck in attachment.bottlenecks.values()}
    _require(all(mask.codebook_sha256 in hashes for mask in masks), "made for another codebook")
    return ", ".join(f"{mask.num_deleted} of {mask.num_codes} codes, {mask.digest[:12]}" for mask in masks)


def _refuses_unknown(attachment: Attachment) -> str:
    try:
        with attachment.unlearn("no such topic"):
            pass
    except ValueError as error:
        return str(error)[:60]
    raise AssertionError("unlearn() took a name that does not exist")


@torch.no_grad()
def _detaches(model, tokenizer, attachment: Attachment) -> str:
    encoded = tokenizer("the quick brown fox", return_tensors="pt")
    runner = model.get_encoder() if model.config.is_encoder_decoder else model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mine = {n for layer, b in attachment.bottlenecks.items() for n in state if any(v is b for v in _owners(model, n))}
    attachment.detach()
    after = model.state_dict()
    _require(set(after) == set(state) - mine, "the state dict's keys are not the model's own")
    _require(all(torch.equal(after[name], state[name]) for name in after), "a weight changed")
    runner(**encoded)
    return f"{len(after)} tensors"


def _owners(model, name: str):
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
