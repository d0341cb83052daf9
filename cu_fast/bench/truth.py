"""Whether an answer is right: against fp64, on a sample of rows. Part of ``cu_fast.bench``.

Two scores count as tied where they differ by no more than their own rounding in fp32. Each may be wrong by

    8 u ||z|| ||c_j|| s_j  +  8 u |b_j|  +  what underflows,

with u = 2^-24, s_j the factor that the score is multiplied by (1 / ||c_j|| for cosine) and b_j the bias. That is no
worst-case bound, which grows with E and would hide the errors of bf16, but several times what sums of fp32 products
reach in any usual order: about 0.5 u for independent terms, 2 u for terms of one sign. A bf16 product is wrong by
some hundred u. A row's tolerance is the largest of its codes', and two scores are compared with twice of it.

What a bottleneck decodes may be wrong by the roundings of a sum of k, and by 4 u max|row| per row of its folded table, which is a
product itself.

Of ``delete_latents`` a latent of the mask may fire or not where its score is within the tolerance of its threshold. What is
written may be wrong by as much as the scores that it is made of, by the roundings of a sum of k, and by 8 u ||a|| ||dec_d||
with a the activations of all latents and dec_d a column of the decoder: a dense hook subtracts two such sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cu_fast.bench.cells import CLAMP, DTYPES, Inputs
from cu_fast.ops import Deletion, Selection

SAMPLE = 64  # rows at most, so that no [T, C] exists for a large T
CHUNK = 4096  # codes widened to fp64 at a time
U = 2.0**-24
UNDERFLOW = 2.0**-149  # an ulp of the smallest fp32 number, for each product of a sum
FACTOR = 8


class Answer(NamedTuple):
    """What a provider says: ids int [T, k] (-1 = none), values [T, n], or both; each is judged where it is given."""

    ids: Tensor | None = None
    values: Tensor | None = None


class Truth:
    """The right answer to a cell's inputs on the CPU, computed once and compared with each provider's."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.op = inputs, inputs.cell.op
        self.rows = torch.linspace(0, inputs.cell.T - 1, min(SAMPLE, inputs.cell.T)).round().long()
        self.x = inputs.x[self.rows].double()
        if inputs.b_pre is not None:
            self.x -= inputs.b_pre.double()
        if self.op == "bottleneck":
            sae = inputs.bottleneck.autoencoder
            self.x = torch.relu((self.x - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double())
        if self.op != "masked_decode":
            self.scores, self.tolerance = self._scores()

    def match(self, answer: Answer) -> float:
        """The share of the sampled rows that the answer has right."""
        right = torch.ones(len(self.rows), dtype=torch.bool)
        ids = answer.ids.cpu()[self.rows].long() if answer.ids is not None else None
        if ids is not None:
            right &= self._ids_match(ids)
        if answer.values is not None:
            right &= self._values_match(answer.values.cpu()[self.rows].double(), ids)
        return float(right.double().mean())

    def _scores(self) -> tuple[Tensor, Tensor]:
        """Scores fp64 [rows, C], deleted ones -inf, and a tolerance for each row, [rows, 1]."""
        inputs, x_norm = self.inputs, self.x.norm(dim=1, keepdim=True)
        scores, tolerance = [], torch.zeros_like(x_norm)
        for start in range(0, inputs.codes.shape[0], CHUNK):
            codes = inputs.codes[start : start + CHUNK].double()
            score, norm = self.x @ codes.T, codes.norm(dim=1)
            slack = FACTOR * U * x_norm * norm + UNDERFLOW * codes.shape[1]
            if self.op in ("codebook_quantize", "bottleneck"):
                # The norm's own squares underflow too, which bends the factor by as much.
                bent = UNDERFLOW * codes.shape[1] * score.abs() / norm.square().clamp(min=1e-300)
                score, slack = (value / norm.clamp(min=1e-300) for value in (score, slack + bent))
            if inputs.bias is not None:
                bias = inputs.bias[start : start + CHUNK].double()
                score, slack = score + bias, slack + FACTOR * U * bias.abs()
            scores.append(score)
            tolerance = torch.maximum(tolerance, slack.amax(1, keepdim=True))
        scores = torch.cat(scores, 1)
        if inputs.deleted is not None and self.op != "bottleneck":  # whose masks act on the decoder's weights
            scores.masked_fill_(inputs.deleted[inputs.mask_row[self.rows].long()], -torch.inf)
        return scores, tolerance

    def _ids_match(self, ids: Tensor) -> Tensor:
        """Rows whose ids are k best codes, where tied ones may stand for one another. In any order."""
        C = self.scores.shape[1]
        wanted = self.scores.isfinite().sum(1).clamp(max=ids.shape[1])
        known = (ids >= 0) & (ids < C)
        score = self.scores.gather(1, ids.clamp(0, C - 1))
        best = self.scores.topk(ids.shape[1], dim=1).values
        last = best.gather(1, (wanted - 1).clamp(min=0)[:, None])
        chosen = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(1, ids.clamp(0, C - 1), known)
        counts = known.sum(1) == wanted
        distinct = chosen.sum(1) == wanted
        good_enough = (~known | (score >= last - 2 * self.tolerance)).all(1)
        none_missed = (chosen | (self.scores <= last + 2 * self.tolerance)).all(1)
        return counts & distinct & good_enough & none_missed

    def _values_match(self, values: Tensor, ids: Tensor | None) -> Tensor:
        """Rows whose values are right; for a decoder, those of the provider's own ids."""
        inputs = self.inputs
        if self.op == "sae_encode":
            truth, slack = torch.relu(self.scores), self.tolerance
        elif self.op == "delete_latents":
            truth, slack = self._deletion()
        else:
            ids = inputs.ids[self.rows].long() if ids is None else ids
            weights = torch.ones(ids.shape) if inputs.weights is None else inputs.weights[self.rows]
            weights = (weights * (ids >= 0)).double() * ~inputs.is_deleted(self.rows, ids.clamp(min=0))
            truth, slack, folded = (
                torch.zeros_like(values),
                torch.zeros_like(values),
                torch.zeros(len(values), 1).double(),
            )
            for i in range(ids.shape[1]):
                part = weights[:, i, None] * inputs.codes[ids[:, i].clamp(min=0)].double()
                truth, slack = truth + part, slack + part.abs()
                if self.op == "bottleneck":  # whose table is made of scores
                    folded += weights[:, i, None] * part.abs().amax(1, keepdim=True)
            # k roundings of the sum, the weights' own and the last one; underflow as above.
            slack = (ids.shape[1] + 2) * U * slack + UNDERFLOW * ids.shape[1] + FACTOR / 2 * U * folded
            slack += torch.finfo(DTYPES[inputs.cell.dtype]).eps * truth.abs()
        return ((values - truth).abs() <= slack).all(1)

    def _deletion(self) -> tuple[Tensor, Tensor]:
        """What should be written, and by how much it may be wrong, fp64 [rows, D]."""
        inputs, scores = self.inputs, self.scores
        theta = inputs.theta.double().clamp(min=0)
        held = inputs.latents[inputs.mask_row[self.rows].long()].long()
        pre, level = scores.gather(1, held), theta[held]
        change = torch.where(pre > level, CLAMP - pre, 0.0)
        # A change is wrong by as much as its score, and by all of it where the latent may fire or not.
        wrong = torch.where(pre > level, self.tolerance, 0.0)
        wrong = torch.where((pre - level).abs() <= self.tolerance, (CLAMP - pre).abs() + self.tolerance, wrong)
        wrong += (held.shape[1] + 2) * U * change.abs()
        truth, slack = self.x.clone(), torch.zeros_like(self.x)
        for i in range(held.shape[1]):
            dec = inputs.dec[held[:, i]].double()
            truth, slack = truth + change[:, i, None] * dec, slack + wrong[:, i, None] * dec.abs()
        active = torch.where(scores > theta, scores, 0.0).norm(dim=1, keepdim=True)
        fires = (wrong > 0).any(1, keepdim=True)
        slack += torch.where(fires, FACTOR * U * active * inputs.dec.float().norm(dim=0).double(), 0.0)
        return truth, slack + torch.where(fires, torch.finfo(DTYPES[inputs.cell.dtype]).eps * truth.abs(), 0.0)


def share_identical(output: Tensor | Selection | Deletion, reference: Tensor | Selection | Deletion) -> float:
    """The share of the reference's rows, the first of the output's, that are equal bit for bit, in all that it holds."""
    parts = [(output, reference)] if isinstance(output, Tensor) else zip(output, reference)
    same = [(_bits(a[: len(b)].to(b.device)) == _bits(b)).reshape(len(b), -1).all(1) for a, b in parts if b is not None]
    return float(torch.stack(same).all(0).double().mean())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
