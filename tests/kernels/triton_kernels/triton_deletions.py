"""Cases of delete_latents, which triton_interpreted.py runs."""

from __future__ import annotations

from typing import NamedTuple

import deletions
import torch
from triton_harness import bf16, by_reference, by_triton, fp16, fp32, on, same


class Delete(NamedTuple):
    """Tokens of which something has to fire, unless `fires` says otherwise; the rest: deletions.deletion."""

    T: int
    Din: int
    Dout: int
    R: int
    U: int = 3
    M: int = 5
    scale: int = 0
    kind: str = "gaussian"
    dtype: torch.dtype = fp32
    residual: torch.dtype | None = fp32
    latent_kind: str = "gaussian"
    idle: bool = True
    floor: bool = False
    faults: bool = False
    layout: str = "plain"
    seed: int = 0
    fires: bool = True
    tuning: dict | None = None


DELETIONS = {
    "one token": Delete(1, 40, 40, 20, U=1, M=9, residual=None, seed=1),
    "one entry, one latent": Delete(9, 1, 1, 1, M=1, residual=None),
    "layer norm": Delete(9, 33, 40, 20, scale=1, dtype=bf16, residual=bf16),
    "layer norm, one entry": Delete(5, 1, 3, 20, scale=1, fires=False),
    "constant norm": Delete(9, 33, 40, 20, scale=2, dtype=fp16, residual=fp16),
    "norms of hurtful rows": Delete(24, 20, 17, 20, scale=2, kind="mixed"),
    "layer norm of hurtful rows": Delete(24, 20, 17, 20, scale=1, kind="mixed", dtype=bf16, residual=None),
    "no idle values": Delete(9, 40, 15, 20, idle=False),
    "floor": Delete(14, 40, 15, 20, M=20, floor=True),
    "floor, ties": Delete(14, 17, 15, 30, M=30, kind="tied", latent_kind="tied", floor=True),
    "long lists": Delete(5, 33, 15, 150, M=140, floor=True, scale=2),
    "wide": Delete(3, 140, 1030, 20, dtype=bf16, residual=None),
    "wide, fp16": Delete(3, 140, 1030, 20, residual=fp16),
    "NaN and Inf": Delete(20, 33, 40, 20, kind="faulty", residual=None),
    "latents with NaN and Inf": Delete(20, 33, 40, 20, latent_kind="faulty"),
    "huge": Delete(9, 2, 40, 20, kind="huge"),
    "huge, layer norm": Delete(9, 33, 40, 20, kind="huge", scale=1, fires=False),  # squares are infinite
    "denormal": Delete(9, 33, 40, 20, kind="denormal", residual=None, scale=2),
    "zeros": Delete(9, 33, 40, 20, kind="zeros", scale=2, residual=None),
    "faults": Delete(30, 33, 40, 20, faults=True),
    "rows apart": Delete(7, 33, 40, 20, layout="rows"),
    "columns apart": Delete(7, 33, 40, 20, dtype=bf16, residual=bf16, layout="columns"),
    "some tokens at a time": Delete(9, 33, 40, 20, scale=1, floor=True, tuning={"keys": 150}),
    "no latents in the masks": Delete(5, 33, 40, 20, M=0, fires=False),
    "no masks in the table": Delete(5, 33, 40, 20, U=0, fires=False),
    "no tokens": Delete(0, 33, 40, 20, fires=False),
}


def deletion(case: Delete) -> None:
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(**(case.tuning or {}))
    *described, fires, _ = case
    given = deletions.deletion(**dict(zip(Delete._fields, described)))
    want = by_reference("delete_latents", **given)
    got = tuple(result.cpu() for result in by_triton("delete_latents", **given))
    same(got, want)
    assert deletions.keeps_bits(*got, given)
    assert (want[1] > 0).any() == fires, f"{want[1]} latents fired"
    assert want[2].isnan().any() or not case.faults


def infinite(value: float, scale: int, with_an_empty_list: bool) -> None:
    """A token with Inf is NaN wherever it has a mask; one that its factor makes infinite, where its mask lists a latent."""
    given = deletions.deletion(8, 4, 5, 9, U=2, scale=scale)
    given["x"][::2] = value
    given["mask_latents"][1], given["mask_row"] = -1, torch.tensor([0, 0, 1, 1, -1, -1, 0, 1], dtype=torch.int32)
    want = by_reference("delete_latents", **given)
    same(by_triton("delete_latents", **given), want)
    assert want[2].isnan().tolist() == [True, False, with_an_empty_list, False, False, False, True, False]


def deletion_through_ops(kind: str, scale: str) -> None:
    """impl="triton" of the public operator; the rank of "topk" is Triton's too."""
    from cu_fast import ops

    given = deletions.deletion(12, 40, 33, 50, M=20, dtype=bf16, residual=bf16)
    results = []
    for impl, at in (("triton", on(given)), ("reference", given)):
        enc, k = ops.pack_codes(at["enc"], "dot", at["bias"]), 9 if kind == "topk" else None
        latents = ops.Latents(enc, at["theta"], at["dec"], kind=kind, k=k, scale=scale)
        masks = ops.LatentMasks(at["mask_latents"], at["mask_change"])
        results.append(ops.delete_latents(at["x"], latents, masks, at["mask_row"], residual=at["residual"], impl=impl))
    same(*results)
    assert results[1].hits.any()


CASES = {
    **{f"delete_latents: {name}": (deletion, case) for name, case in DELETIONS.items()},
    "delete_latents: Inf": (infinite, torch.inf, 0, True),
    "delete_latents: Inf, layer norm": (infinite, torch.inf, 1, True),
    "delete_latents: Inf, constant norm": (infinite, torch.inf, 2, True),
    "delete_latents: scaled beyond fp32": (infinite, 1e36, 1, False),  # its standard deviation is 0
    "delete_latents: impl": (deletion_through_ops, "threshold", "layer_norm"),
    "delete_latents: impl, topk": (deletion_through_ops, "topk", "constant_norm"),
}
