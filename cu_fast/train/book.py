"""A codebook bottleneck, trained on rows. Part of ``cu_fast.train.fit``."""

from __future__ import annotations

import torch
from torch import Tensor

from cu_fast.nn import BottleneckConfig, CodebookBottleneck
from cu_fast.train.module import Fit, processes, sum_over_processes


class Book(Fit):
    """A :class:`CodebookBottleneck` whose loss is its own auxiliary loss: x [n, D] -> loss.

    Args:
        config: of the bottleneck.
        dead_after: rows after which a code that none of them kept is dead.
    """

    def __init__(self, config: BottleneckConfig, dead_after: int) -> None:
        super().__init__(config.num_codes, dead_after)
        self.bottleneck = CodebookBottleneck(config)

    @torch.no_grad()
    def start(self, rows: Tensor, generator: torch.Generator) -> None:
        """Start from data: scale, biases, encoder and codes.

        Args:
            rows: [n, D], a sample.
            generator: on the CPU, for the draws.
        """
        x = rows.float()
        mean, rms = x.mean(0), x.square().mean().sqrt().clamp(min=1e-6)
        autoencoder = self.bottleneck.autoencoder
        autoencoder.b_pre.copy_(mean / rms)
        autoencoder.b_dec.copy_(mean / rms)
        self.bottleneck.seed_codes(x, generator)
        self.bottleneck.rms_steps += 100  # the sample is worth many batches: from here on the scale moves slowly

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """The loss of rows [n, D], a scalar, by the name "loss"."""
        counts = self.bottleneck.codebook.counts
        before = counts.clone()
        self.bottleneck(rows.float())
        self.saw(counts > before, len(rows))
        return {"loss": self.bottleneck.auxiliary_loss()}

    @torch.no_grad()
    def after_step(self) -> None:
        """The scale follows the batches of all processes: the mean of their squares is the square of one process."""
        rms = self.bottleneck.rms
        rms.copy_((sum_over_processes(rms.square()) / processes()).sqrt())

    @torch.no_grad()
    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Fit.reconstruct`."""
        training = self.bottleneck.training
        self.bottleneck.eval()
        try:
            y = self.bottleneck(rows.float())
        finally:
            self.bottleneck.train(training)
        return y, torch.full((len(rows),), self.bottleneck.config.k)
