"""The training half of ``cu_fast.nn.bottleneck.CodebookBottleneck``."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.nn.autograd import gather_sum
from cu_fast.nn.splice import Splice

SEED_ROWS = 20_000  # tokens whose singular vectors an encoder starts at


class TrainingPath(Splice):
    """The differentiable forward, the losses, and how codes start and start again.

    Uses attributes of the bottleneck: config, impl, scan, autoencoder, codebook, rms, rms_steps.

    Attributes:
        losses: name -> scalar, the terms of the last training forward, without their factors.
        token_mask: bool [...], the shape of x without D: which positions are tokens. The others, padding, are left
            out of selection and losses. None, or another shape than the batch's: all are tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_z: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self.token_mask: Tensor | None = None

    def _forward_training(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.config.d_model).float()
        real = None
        if self.token_mask is not None and self.token_mask.shape == x.shape[:-1]:
            real = self.token_mask.flatten().nonzero()[:, 0]
            whole, flat = flat, flat[real]
        if self.config.normalize:
            self._update_rms(flat.detach())
        x_scaled = flat / self.rms
        z = x_scaled if self.autoencoder is None else self.autoencoder.encode(x_scaled)
        ids, weights = self._select_training(z)
        q, used = self._sums(ids, weights)
        # Straight-through: the value is that of q; z receives the gradient of q, and so do the codes that sum to it.
        through = used + (z - z.detach())
        y = through if self.autoencoder is None else self.autoencoder.decode(through)
        x_scale, z_scale = _variance(x_scaled), _variance(z)
        self.losses = {
            "reconstruction": (y - x_scaled.detach()).square().mean() / x_scale,
            "commitment": (z - q.detach()).square().mean() / z_scale,
            "codebook": (q - z.detach()).square().mean() / z_scale,
            # codes.abs().mean(), without a tensor as large as the codes.
            "l1": torch.linalg.vector_norm(self.codebook.codes, 1, dim=1).mean() / self.config.code_dim,
        }
        y = y * self.rms
        if real is not None:
            y = whole.index_copy(0, real, y)
        return y.to(x.dtype).reshape(x.shape)

    def _select_training(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The exact selection of evaluation: z [T, E] -> ids int32 [T, k] and differentiable weights [T, k]."""
        book = self.codebook
        self._last_z = z.detach()
        ids = ops.codebook_quantize(self._last_z, book.pack(self.scan), k=self.config.k, impl=self.impl).ids
        kept = ids >= 0
        book.counts.scatter_add_(0, ids.clamp(min=0).flatten().long(), kept.flatten().long())
        weights = kept.to(z.dtype)
        if self.config.weight == "mean":
            weights = weights / self.config.k
        elif self.config.weight == "score":
            weights = weights * torch.relu(book.similarities(z, ids, self.impl))
        return ids, weights

    def _sums(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Two sums of each token's codes, [T, E]: of all, and of those that code dropout leaves."""
        codes = self.codebook.codes
        if not self.config.code_dropout:
            q = gather_sum(ids, weights, codes, self.impl)
            return q, q
        alive = torch.rand(len(codes), device=codes.device) >= self.config.code_dropout
        # One call for both sums: the gradient of the codes is as large as the codes, and so is made once.
        weights = torch.cat([weights, weights * alive[ids.clamp(min=0)]])
        return gather_sum(ids.repeat(2, 1), weights, codes, self.impl).chunk(2)

    @torch.no_grad()
    def _update_rms(self, x: Tensor) -> None:
        # A plain mean over the first hundred steps, an exponential one after that.
        self.rms_steps += 1
        momentum = (1.0 / self.rms_steps).clamp(min=0.01)
        self.rms.copy_(torch.lerp(self.rms.square(), x.square().mean(), momentum.float()).sqrt().clamp(min=1e-6))

    def auxiliary_loss(self) -> Tensor:
        """The weighted sum of ``losses`` of the last training forward: a scalar to add to the task's loss.

        Reconstruction is a squared error relative to x's variance, commitment and codebook to z's.

        Raises:
            RuntimeError: no training forward has run.
        """
        if not self.losses:
            raise RuntimeError("no auxiliary loss yet; run a forward pass in training mode first")
        weights = {name: getattr(self.config, f"{name}_weight") for name in self.losses}
        # A term of weight 0 is left out: the gradient of l1 is as large as the codes.
        terms = (weights[name] * loss for name, loss in self.losses.items() if weights[name])
        return sum(terms, self.losses["l1"].new_zeros(()))

    def usage(self) -> dict[str, float]:
        """:meth:`Codebook.usage` of the codebook."""
        return self.codebook.usage()

    @torch.no_grad()
    def seed_codes(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the scale, the encoder and the codes from data, in place.

        An encoder narrower than the model starts at the sample's first right singular vectors, and the decoder at
        their transpose. Each code becomes the z of a random token, divided by k where k codes are summed.

        Args:
            x: [..., D], a sample of the layer's output.
            generator: on the CPU, for the draws; None = torch's global one.
        """
        flat = x.detach().reshape(-1, self.config.d_model).float()
        if self.config.normalize:
            self._update_rms(flat)
        z, sae = flat / self.rms, self.autoencoder
        if sae is not None:
            if self.config.code_dim < self.config.d_model:
                rows = torch.randperm(len(z), generator=generator)[:SEED_ROWS].to(z.device)
                axes = torch.linalg.svd(z[rows], full_matrices=False).Vh[: self.config.code_dim]
                sae.W_enc[: len(axes)] = axes  # fewer rows than code_dim give fewer axes
                sae.W_dec.copy_(sae.W_enc.T)
            z = sae.encode(z)
        rows = torch.randint(len(z), (self.config.num_codes,), generator=generator).to(z.device)
        share = self.config.k if self.config.weight == "one" else 1
        self.codebook.codes.copy_(z[rows] / share)

    def reseed_dead(self, generator: torch.Generator | None = None) -> int:
        """Move the codes not kept since the last call onto tokens of the last training batch, and count anew.

        Args:
            generator: on the CPU, for the draws; None = torch's global one.

        Returns:
            How many codes were moved.

        Raises:
            RuntimeError: no training forward has run.
        """
        if self._last_z is None:
            raise RuntimeError("no tokens to seed from yet; run a forward pass in training mode first")
        moved = self.codebook.reseed_dead(self._last_z, generator)
        self.codebook.reset_usage()
        return moved


def _variance(x: Tensor) -> Tensor:
    """Mean squared distance from the mean row, without a gradient: what an error is measured against."""
    x = x.detach()
    return (x - x.mean(0)).square().mean().clamp(min=1e-12)
