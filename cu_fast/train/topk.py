"""A TopK sparse autoencoder, trained on rows (arXiv 2406.04093). Part of ``cu_fast.train.fit``.

    n = (x - mean) / scale          mean, scale: constants, from a sample
    pre = n W_enc^T + b_enc         [tile, C], in bf16 where the trainer says so: the one dense product of a step
    y = sum of relu(pre_i) W_dec_i over the k largest, + b_dec
    loss = |y - n|^2 / D + 1/32 |e - e'|^2 / |e|^2       e = n - y; e' is made of the dead latents that fit n best

Everything behind the selection touches k rows per token, forward and backward: sums of rows, and dot products with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cu_fast.nn.autograd import gather_dot, gather_sum, scatter_sum
from cu_fast.sae import SAE, Provenance
from cu_fast.train.module import Fit, processes

TILE = 512  # rows whose pre-activations are in memory at once
AUX_SHARE = 1 / 32  # of the loss of the dead latents
AUX_TIMES = 2  # k of the dead latents, in k
DOT_TILE = 16  # tokens whose rows are gathered for dot products: k rows each, which stay in the cache


class TopK(Fit):
    """The autoencoder in training: x [n, D] -> its loss.

    Args:
        width: D.
        num_codes: C, its latents.
        k: latents kept per row.
        dead_after: rows after which a latent that none of them kept is dead.
    """

    def __init__(self, width: int, num_codes: int, k: int, dead_after: int) -> None:
        super().__init__(num_codes, dead_after)
        self.k = k
        self.W_enc = nn.Parameter(torch.zeros(num_codes, width))
        self.b_enc = nn.Parameter(torch.zeros(num_codes))
        self.W_dec = nn.Parameter(torch.zeros(num_codes, width))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def start(self, rows: Tensor, generator: torch.Generator) -> None:
        """Start from data: the mean and scale of rows, and a latent in the direction of each of the first C.

        The encoder starts as the decoder, shortened so that the k latents that a row keeps, which are alike at first, do
        not add up to more than the row.

        Args:
            rows: [n, D], at least C, in random order.
            generator: not used: the rows are drawn.
        """
        x = rows.float()
        self.mean.copy_(x.mean(0))
        self.scale.copy_((x - self.mean).square().mean().sqrt().clamp(min=1e-12))
        n = self._normed(rows)
        self.W_dec.copy_(F.normalize(n[: len(self.W_dec)], dim=1))
        self.W_enc.copy_(self.W_dec)
        some = n[-2048:]
        values, ids, _ = self._select(some, None)
        y = gather_sum(ids, values.relu(), self.W_dec)
        self.W_enc *= (y * some).sum() / y.square().sum().clamp(min=1e-12)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """The loss of rows [n, D], a scalar, by the name "loss"."""
        n, dtype = self._normed(rows), _dtype_of_products(rows.device)
        dead = (self.idle >= self.dead_after).nonzero()[:, 0]
        values, ids, of_dead = self._select(n, dead if len(dead) else None)
        acts = _Scores.apply(values, ids, n, self.W_enc, self.b_enc).relu()
        y = _Sums.apply(ids, acts, self.W_dec, dtype) + self.b_dec
        error = (n - y).detach()
        fired = torch.zeros_like(self.idle, dtype=torch.bool)
        fired[ids[acts > 0].long()] = True
        (energy,) = self.saw(fired, len(rows), error.square().mean())
        loss = (y - n).square().mean()
        if of_dead is not None:
            values, ids = of_dead
            acts = _Scores.apply(values, ids, n, self.W_enc, self.b_enc).relu()
            rest = _Sums.apply(ids, acts, self.W_dec, dtype) - error
            loss = loss + AUX_SHARE * rest.square().mean() / (energy / processes()).clamp(min=1e-12)
        return {"loss": loss}

    @torch.no_grad()
    def before_step(self) -> None:
        """The decoder's rows have length 1: what its gradient would add to the length is taken out."""
        g, W = self.W_dec.grad, self.W_dec
        g -= (g * W).sum(1, keepdim=True) * W

    @torch.no_grad()
    def after_step(self) -> None:
        """Sets the decoder's rows back to length 1."""
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Fit.reconstruct`."""
        values, ids, _ = self._select(self._normed(rows), None)
        acts = values.relu()
        y = gather_sum(ids, acts, self.W_dec) + self.b_dec
        return y * self.scale + self.mean, (acts > 0).sum(1)

    @torch.no_grad()
    def to_sae(self, site: str, model: str | None) -> SAE:
        """The trained autoencoder on plain inputs: mean and scale are folded into the biases and activations.

        scale * pre is linear in x, and k largest and relu do not depend on a positive factor: so the encoder and the
        decoder stay as they are, decoder rows of length 1, and the activations are in x's own scale.

        Args:
            site: the layer's name.
            model: that it was made for; None = not stated.
        """
        enc = self.W_enc.detach().float().cpu()
        bias = self.scale.double().cpu() * self.b_enc.double().cpu() - enc.double() @ self.mean.double().cpu()
        return SAE(
            enc=enc,
            bias=bias.float(),
            theta=torch.zeros(len(enc)),
            dec=F.normalize(self.W_dec.detach().float().cpu(), dim=1),
            kind="topk",
            k=self.k,
            site=site,
            provenance=Provenance(l0=float(self.k), dtype="F32", model=model),
            b_dec=(self.scale * self.b_dec + self.mean).detach().float().cpu(),
        )

    def _normed(self, rows: Tensor) -> Tensor:
        return (rows.float() - self.mean) / self.scale

    @torch.no_grad()
    def _select(self, n: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The k largest pre-activations of every row and their latents, and the same among dead latents.

        Args:
            n: fp32 [n, D].
            dead: int64 [m], or None.

        Returns:
            fp32 [n, k], int32 [n, k], and None or a pair of the same of width min(AUX_TIMES k, m).
        """
        dtype = _dtype_of_products(n.device)
        W, b = self.W_enc.detach().to(dtype), self.b_enc.detach().to(dtype)
        best, best_dead = [], []
        with torch.autocast(n.device.type, enabled=False):
            for tile in n.to(dtype).split(TILE):
                pre = torch.addmm(b, tile, W.T)
                best.append(pre.topk(self.k, dim=1))
                if dead is not None:
                    best_dead.append(pre[:, dead].topk(min(AUX_TIMES * self.k, len(dead)), dim=1))
        of_dead = None
        if dead is not None:
            ids = dead[torch.cat([found.indices for found in best_dead])]
            of_dead = torch.cat([found.values for found in best_dead]).float(), ids.int()
        values, ids = (torch.cat(parts) for parts in zip(*best))
        return values.float(), ids.int(), of_dead


class _Scores(torch.autograd.Function):
    """Pre-activations that were computed already, with their gradients to encoder and bias: k rows per token."""

    @staticmethod
    def forward(ctx, values: Tensor, ids: Tensor, n: Tensor, W: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(ids, n)
        ctx.codes = len(W)
        return values.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple:
        ids, n = ctx.saved_tensors
        of_b = torch.zeros(ctx.codes, device=g.device).index_add_(0, ids.flatten(), g.flatten())
        return None, None, None, scatter_sum(ids, g, n, ctx.codes), of_b


class _Sums(torch.autograd.Function):
    """``gather_sum`` whose gradient to the weights is computed in the dtype of the products."""

    @staticmethod
    def forward(ctx, ids: Tensor, acts: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids, acts, W)
        ctx.dtype = dtype
        return gather_sum(ids, acts, W)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple:
        ids, acts, W = ctx.saved_tensors
        return None, _dots(ids, g, W, ctx.dtype), scatter_sum(ids, acts, g, len(W)), None


def _dots(ids: Tensor, g: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    """g[t] . W[ids[t, i]], fp32 [n, k]. In bf16 on a CPU as small products of rows that stay in its cache."""
    if g.device.type != "cpu" or dtype == torch.float32:
        return gather_dot(ids, g, W)
    W, g = W.to(dtype), g.to(dtype)
    parts = [torch.bmm(W[some], of[..., None])[..., 0] for some, of in zip(ids.split(DOT_TILE), g.split(DOT_TILE))]
    return torch.cat(parts).float()


def _dtype_of_products(device: torch.device) -> torch.dtype:
    """What autocast asks for, as the trainer's bf16 sets it; else fp32."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32
