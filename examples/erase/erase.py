"""Rows in clusters from which any row can be deleted, exactly, in constant time: quantised k-means (see README.md).

    c_j       = phase + step round((s_j / n_j - phase) / step)     s_j, n_j: sum and number of cluster j's rows
    cluster_i = codebook_quantize(x_i, c, k=1)                     the nearest c_j; again and again, until c stays
    chosen_j  = of cluster j the row nearest to c_j

The lattice that centres are rounded to has a random phase, drawn once. A mean of n rows moves by 1 / n of a row when one is
deleted, so the rounded one rarely moves. Where none does, in any round, the whole run without the row would have gone the
same way; that is checked, not hoped for. All numbers are integers, and a selection's bits do not depend on the other rows,
so what is left is what a run without the row gives, bit for bit.

    rows       int64 [N, D]          zeros where deleted
    centres    int64 [R + 1, C, D]   before each of R rounds, and after the last
    assigned   int64 [R, N]          the cluster of each row in each round; -1 where deleted
    sums       int64 [R, C, D]       of each round's clusters
    counts     int64 [R, C]
    following  int64 [N + C]         a ring per cluster of the last round, nearest row first; N + j is where ring j begins,
    preceding  int64 [N + C]         and ends; -1 where deleted
"""

from __future__ import annotations

import numpy as np
import torch

from cu_fast.ops import codebook_quantize, pack_codes

UNIT = 2**20  # rows are rounded to so many parts of 1, and cut off at 8: exact in fp32, and in the sums of 2^35 rows
LIMIT = 8 * UNIT - 1


def to_integers(x: torch.Tensor) -> np.ndarray:
    """Rows [N, D] of numbers of size 1 or so, each rounded by itself: int64 [N, D]."""
    return (x.double() * UNIT).round().clamp(-LIMIT, LIMIT).long().numpy()


class Clusters:
    """C clusters of rows, and a chosen row of each.

    What it holds is a function of the rows that are left, their numbers and the seed, of nothing else.

    Args:
        rows: int64 [N, D], from :func:`to_integers`; copied.
        num_clusters: C, at least 1.
        step: of the lattice, in the rows' units: 1 = UNIT.
        seed: of the lattice's phase, and of which rows the run begins at. Never look at it to choose what to delete: that
            a recomputation is rare is promised for rows that do not depend on it.
        rounds: at most so many.
        left: bool [N], rows that are there; None = all.

    Raises:
        ValueError: fewer rows than clusters.
    """

    STATE = ("rows", "left", "centres", "assigned", "sums", "counts", "following", "preceding")

    def __init__(
        self,
        rows: np.ndarray,
        num_clusters: int,
        step: float,
        seed: int,
        rounds: int = 10,
        left: np.ndarray | None = None,
    ) -> None:
        self.num_clusters, self.step, self.seed, self.rounds = num_clusters, round(step * UNIT), seed, rounds
        self.left = np.ones(len(rows), bool) if left is None else left.copy()
        self.rows = np.where(self.left[:, None], rows, 0)
        draw = np.random.default_rng(seed)
        self._phase = draw.integers(0, self.step, rows.shape[1])
        self._rank = draw.random(len(rows))  # each row's own: that of the others does not change when one is deleted
        self._run()

    @property
    def chosen(self) -> np.ndarray:
        """The row of each cluster that is nearest to its centre: int64 [C]; -1 of a cluster without rows."""
        first = self.following[len(self.rows) :]
        return np.where(first < len(self.rows), first, -1)

    def delete(self, row: int) -> bool:
        """Delete a row, exactly.

        Args:
            row: its number.

        Returns:
            Whether the centres stayed, so that the time did not depend on N. Otherwise all was computed again.

        Raises:
            KeyError: it is not there.
            ValueError: fewer rows than clusters would be left.
        """
        if not (0 <= row < len(self.rows) and self.left[row]):
            raise KeyError(f"row is {row}, which is not there; it should be one of those left")
        rounds = np.arange(len(self.sums))
        own = self.assigned[:, row]
        sums, counts = self.sums[rounds, own] - self.rows[row], self.counts[rounds, own] - 1
        stays = (
            row not in self._starts
            and bool((counts > 0).all())
            and np.array_equal(self._rounded(sums, counts), self.centres[rounds + 1, own])
        )
        self.left[row], self.rows[row] = False, 0
        if not stays:
            self._run()
            return False
        self.sums[rounds, own], self.counts[rounds, own], self.assigned[:, row] = sums, counts, -1
        before, after = self.preceding[row], self.following[row]
        self.following[before], self.preceding[after] = after, before
        self.following[row] = self.preceding[row] = -1
        return True

    def recomputed(self) -> Clusters:
        """The same from nothing but the rows that are left."""
        return Clusters(self.rows, self.num_clusters, self.step / UNIT, self.seed, self.rounds, self.left)

    def equals(self, other: Clusters) -> bool:
        """Whether every number of both is the same."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in self.STATE)

    def _rounded(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Means of clusters with rows, on the lattice: floor(x + 1/2) in integers. sums [..., D], counts [...]."""
        counts = counts[..., None]
        return self._phase + self.step * (
            (2 * (sums - counts * self._phase) + counts * self.step) // (2 * counts * self.step)
        )

    def _run(self) -> None:
        (there,) = self.left.nonzero()
        C, N = self.num_clusters, len(self.rows)
        if len(there) < C:
            raise ValueError(f"{len(there)} rows are left; there should be at least one for each of {C} clusters")
        rows = self.rows[there]
        starts = there[np.argsort(self._rank[there], kind="stable")[:C]]
        self._starts = frozenset(starts.tolist())
        centres = [self._rounded(self.rows[starts], np.ones(C, np.int64))]
        assigned, all_sums, all_counts = [], [], []
        values = torch.from_numpy(rows)
        z = values.float()
        for _ in range(self.rounds):
            packed = pack_codes(torch.from_numpy(centres[-1]).float(), "l2")
            ids = codebook_quantize(z, packed, k=1).ids[:, 0]
            counts = ids.bincount(minlength=C).numpy()
            sums = torch.zeros(C, rows.shape[1], dtype=torch.int64).index_add_(0, ids, values).numpy()
            means = self._rounded(sums, np.maximum(counts, 1))
            centres.append(np.where(counts[:, None] > 0, means, centres[-1]))
            of_all = np.full(N, -1)
            of_all[there] = ids = ids.numpy()
            assigned.append(of_all), all_sums.append(sums), all_counts.append(counts)
            if np.array_equal(centres[-1], centres[-2]):
                break
        self.centres, self.assigned = np.stack(centres), np.stack(assigned)
        self.sums, self.counts = np.stack(all_sums), np.stack(all_counts)
        distance = ((rows - self.centres[-1][ids]) ** 2).sum(1)
        nearest = np.lexsort((there, distance))
        self.following, self.preceding = np.full(N + C, -1), np.full(N + C, -1)
        for j in range(C):
            ring = np.append(N + j, there[nearest[ids[nearest] == j]])
            self.following[ring], self.preceding[ring] = np.roll(ring, -1), np.roll(ring, 1)
