"""The selection with Triton: which kernels are started, and its memory. Kernels: fixed.py, select.py, scan.py; plan: launch.py.

    every code scored   fix_rows -> score_codes -> finish                            few tokens, or no plane
    certified scan      fix_rows -> scan_rows -> scan_codes (sample) -> scan_threshold -> scan_codes -> narrow
                        -> score_candidates -> prove -> score_codes (rows that the scan could not do) -> finish

Tokens go through in chunks, so the memory of a selection does not grow with them. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cu_fast.kernels.triton import launch
from cu_fast.kernels.triton import scan as scan_kernels
from cu_fast.kernels.triton import select as select_kernels
from cu_fast.kernels.triton.fixed import Rows
from cu_fast.kernels.triton.launch import choose, rows_contiguous, start, vector


class Scores(NamedTuple):
    """The operands of score(t, j), of rows z - pre: fixed.py.

    Attributes:
        z: [T, E], rows contiguous.
        pre: fp32 [E], or None = 0.
        digits: int8 [C, 3, W], contiguous.
        factor: fp32 [C].
        bias: fp32 [C], or None = 0.
    """

    z: Tensor
    pre: Tensor | None
    digits: Tensor
    factor: Tensor
    bias: Tensor | None


def codebook_quantize(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.codebook_quantize``: scores fp32 [T, k], ids int32 [T, k], hits int32 [T] or [0]."""
    scores = Scores(rows_contiguous(a.z), None, a.digits.contiguous(), vector(a.factor), vector(a.bias))
    hits = torch.empty(a.z.shape[0] if a.return_hits else 0, dtype=torch.int32, device=a.z.device)
    best, ids = select(scores, a, hits if a.return_hits else None, relu=False)
    return best, ids, hits


def select(scores: Scores, a: Any, hits: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Scores fp32 [T, k] and ids int32 [T, k] of the k best codes.

    Args:
        scores: the operands.
        a: an operator's arguments by name, of which k, the mask and the scan plane are used.
        hits: int32 [T], written to; None = not counted.
        relu: the scores that are returned are relu(score).
    """
    z, k = scores.z, a.k
    (T, E), (C, _, W), device = z.shape, scores.digits.shape, z.device
    plane = None if a.scan_plane is None else (a.scan_plane, a.scan_terms, a.scan_mean)
    best, ids = z.new_empty((T, k), dtype=torch.float32), z.new_empty((T, k), dtype=torch.int32)
    if T == 0:
        return best, ids
    mask_table, mask_row = a.mask_table, a.mask_row
    if mask_table is not None:
        mask_table, mask_row = mask_table.contiguous(), mask_row.contiguous()
    with launch.on_device(z):
        arch = launch.arch_of(device)
        plan = launch.plan(T, E, C, k, plane is not None, launch.multiprocessors_of(device), arch)
        tile = choose("score_codes", arch, plan.chunk, E, C, k)
        places = plan.parts * tile.block("K") or C
        work = Work(plan, W, places, device, counts_hits=hits is not None and mask_table is not None)
        for first in range(0, T, plan.chunk):
            some = slice(first, min(first + plan.chunk, T))
            job = Job(
                scores._replace(z=z[some]), k, mask_table, None if mask_table is None else mask_row[some],
                best[some], ids[some], None if hits is None else hits[some], relu, arch,
            )  # fmt: skip
            work.rows.fix(job.scores.z, scores.pre, job.choose("fix_rows"))
            if plan.scans:
                scan(job, plan, work, plane)
            every_code(job, plan, work, tile)
    return best, ids


class Job(NamedTuple):
    """A chunk of a selection: the arguments of :func:`select`, cut to the chunk's tokens, and its results."""

    scores: Scores
    k: int
    mask_table: Tensor | None
    mask_row: Tensor | None
    best: Tensor
    ids: Tensor
    hits: Tensor | None
    relu: bool
    arch: str

    def choose(self, kernel: str) -> launch.Config:
        """The tiles of a kernel for this chunk."""
        z, _, digits, _, _ = self.scores
        return choose(kernel, self.arch, *z.shape, digits.shape[0], self.k)

    def operands(self, rows: Rows) -> dict[str, Any]:
        """The operands, as the kernels' arguments name them."""
        _, _, digits, factor, bias = self.scores
        return {
            "row_digits": rows.digits, "units": rows.units, "digits": digits, "factor": factor, "bias": bias,
            "W": digits.shape[2],
        }  # fmt: skip


class Work:
    """The memory of a selection, for a chunk. Each array's shape: select.py, scan.py.

    Args:
        plan: how the selection is cut.
        W: bytes of a digit.
        places: keys per token that score_codes leaves.
        device: of the memory.
        counts_hits: deleted codes are kept too.
    """

    def __init__(self, plan: launch.Plan, W: int, places: int, device: torch.device, counts_hits: bool) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        chunk = plan.chunk
        self.places, self.stride = places, max(places, plan.candidates if plan.scans else 0)
        self.kept = new(chunk, self.stride, dtype=torch.int64)
        self.deleted = new(chunk, self.stride, dtype=torch.int64) if counts_hits else None
        self.poison = new(chunk)
        self.rows = Rows(chunk, W, device)
        self.exact = self.chosen_count = None
        if not plan.scans:
            return
        fp32 = torch.float32
        self.terms = new(3, chunk, dtype=fp32)
        self.exact, self.count, self.chosen_count = (new(chunk) for _ in range(3))
        self.tau = new(chunk, dtype=fp32)
        self.found, self.chosen = (new(chunk, plan.candidates) for _ in range(2))
        self.lower, self.upper = (new(chunk, plan.candidates, dtype=fp32) for _ in range(2))


def every_code(job: Job, plan: launch.Plan, work: Work, tile: launch.Config) -> None:
    """score_codes, for all rows or, after a scan, for those that it could not do; then finish."""
    T, C = job.scores.z.shape[0], job.scores.digits.shape[0]
    U = 0 if job.mask_table is None else job.mask_table.shape[0]
    start(
        select_kernels.score_codes, -(-T // tile.block("T")) * plan.parts, tile, **job.operands(work.rows),
        mask_table=job.mask_table, mask_row=job.mask_row, words=-(-C // 32), U=U, wanted=work.exact, poison=work.poison,
        kept=work.kept, deleted=work.deleted, T=T, C=C, parts=plan.parts, part_codes=plan.part_codes,
        stride=work.stride,
    )  # fmt: skip
    start(
        select_kernels.finish, T, job.choose("finish"), kept=work.kept, deleted=work.deleted, poison=work.poison,
        exact=work.exact, chosen=work.chosen_count, scores=job.best, ids=job.ids, hits=job.hits, k=job.k,
        places=work.places, stride=work.stride, relu=job.relu,
    )  # fmt: skip


def scan(job: Job, plan: launch.Plan, work: Work, plane: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keys of the codes that may be among the k best, and which rows have to be scored against every code."""
    z, _, digits, factor, bias = job.scores
    (T, E), (C, _, W) = z.shape, digits.shape
    plane, plane_terms, mean = plane
    U = 0 if job.mask_table is None else job.mask_table.shape[0]
    start(
        scan_kernels.scan_rows, T, job.choose("scan_rows"), row_digits=work.rows.digits, units=work.rows.units, mean=mean,
        mask_row=job.mask_row, U=U, terms=work.terms, poison=work.poison, count=work.count, E=E, W=W, chunk=plan.chunk,
    )  # fmt: skip
    tile = job.choose("scan_codes")
    tiles = -(-C // tile.block("C"))
    sampled = -(-plan.sample_codes // tile.block("C"))
    maxima = torch.empty(T, sampled * tile.block("C") // 4, dtype=torch.float32, device=z.device)
    for sample, visited in ((True, sampled), (False, tiles)):
        if not sample:
            start(
                scan_kernels.scan_threshold, T, job.choose("scan_threshold"), maxima=maxima, poison=work.poison,
                tau=work.tau, n=maxima.shape[1], rank=launch.guess_rank(job.k, min(4 * maxima.shape[1], C), C),
            )  # fmt: skip
        start(
            scan_kernels.scan_codes, -(-T // tile.block("T")) * visited, tile, row_digits=work.rows.digits,
            units=work.rows.units, terms=work.terms, poison=work.poison, plane=plane.view(torch.int8),
            plane_terms=plane_terms, factor=factor, bias=bias, mask_table=job.mask_table, mask_row=job.mask_row,
            words=-(-C // 32), maxima=maxima if sample else None, tau=None if sample else work.tau, count=work.count,
            ids=work.found, lower=work.lower, upper=work.upper, T=T, C=C, plane_width=-(-E // 4) * 4, W=W,
            chunk=plan.chunk, capacity=plan.candidates, tiles=tiles, visited=visited,
            COUNTS_HITS=work.deleted is not None, SAMPLE=sample,
        )  # fmt: skip
    start(
        scan_kernels.narrow, T, job.choose("narrow"), count=work.count, poison=work.poison, exact=work.exact,
        ids=work.found, lower=work.lower, upper=work.upper, chosen=work.chosen, chosen_count=work.chosen_count,
        k=job.k, capacity=plan.candidates,
    )  # fmt: skip
    start(
        scan_kernels.score_candidates, T * plan.score_parts, job.choose("score_candidates"), **job.operands(work.rows),
        chosen=work.chosen, chosen_count=work.chosen_count, kept=work.kept, deleted=work.deleted,
        capacity=plan.candidates, parts=plan.score_parts, stride=work.stride,
    )  # fmt: skip
    start(
        scan_kernels.prove, T, job.choose("narrow"), kept=work.kept, chosen_count=work.chosen_count, poison=work.poison,
        tau=work.tau, exact=work.exact, k=job.k, stride=work.stride,
    )  # fmt: skip
