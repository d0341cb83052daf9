"""The sparse autoencoder of a bottleneck, in PyTorch: what training differentiates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cu_fast import ops


class SparseAutoencoder(nn.Module):
    """Encoder and decoder of the bottleneck: one linear layer each way (arXiv 2410.10866; ReLU by default).

    Starts at the identity where code_dim equals d_model, else at a random orthogonal map and its transpose, so
    that an untrained bottleneck keeps as much of x as it can.

    Args:
        d_model: D.
        code_dim: E.
        activation: of the encoder: "relu" or "none".
    """

    def __init__(self, d_model: int, code_dim: int, activation: ops.Activation = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.W_enc = nn.Parameter(torch.empty(code_dim, d_model))
        self.b_enc = nn.Parameter(torch.zeros(code_dim))
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.W_dec = nn.Parameter(torch.empty(d_model, code_dim))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        with torch.no_grad():
            if code_dim == d_model:
                nn.init.eye_(self.W_enc)
            else:
                nn.init.orthogonal_(self.W_enc)
            self.W_dec.copy_(self.W_enc.T)

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> z [..., E], differentiable. Evaluation goes through ops.sae_encode instead."""
        z = F.linear(x - self.b_pre, self.W_enc, self.b_enc)
        return torch.relu(z) if self.activation == "relu" else z

    def decode(self, q: Tensor) -> Tensor:
        """q [..., E] -> [..., D], differentiable."""
        return F.linear(q, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> (reconstruction [..., D], z [..., E]), differentiable."""
        z = self.encode(x)
        return self.decode(z), z
