"""The codebook of a bottleneck: its codes, their use, and their differentiable scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cu_fast import ops
from cu_fast.nn.autograd import gather_dot


class Codebook(nn.Module):
    """C codes of width E and the statistics of their use.

    Args:
        num_codes: C.
        code_dim: E.
        similarity: "cosine", "dot" or "l2".

    Attributes:
        codes: parameter [C, E].
        counts: int64 [C], how often each code was kept in training since ``reset_usage()``.
    """

    def __init__(self, num_codes: int, code_dim: int, similarity: ops.Similarity = "cosine") -> None:
        super().__init__()
        self.similarity = similarity
        self.codes = nn.Parameter(torch.randn(num_codes, code_dim) / code_dim**0.5)
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64), persistent=False)

    def pack(self, scan: ops.Scan = "auto") -> ops.PackedCodes:
        """The codes as the operators take them, packed anew. ``scan``: as for ``ops.pack_codes``."""
        return ops.pack_codes(self.codes.detach(), self.similarity, scan=scan)

    def similarities(self, z: Tensor, ids: Tensor, impl: ops.Impl = "auto") -> Tensor:
        """Scores of given codes, differentiable in z and the codes.

        Args:
            z: [T, E].
            ids: int32 or int64 [T, k], -1 <= id < C.
            impl: "auto", "reference", "cpu", "cuda" or "triton".

        Returns:
            [T, k] in the dtype of the codes; 0 for id -1.
        """
        scores = gather_dot(ids, z, self.codes, impl)
        if self.similarity == "dot":
            return scores
        norms = gather_dot(ids, z.new_ones(len(z), 1), self.codes.norm(dim=-1, keepdim=True), impl)
        return scores / norms.clamp(min=1e-12) if self.similarity == "cosine" else scores - 0.5 * norms.square()

    def usage(self) -> dict[str, float]:
        """How the codes were used in training since ``reset_usage()``.

        Returns:
            used: share of the codes that were kept at least once.
            dead: number of codes that were never kept.
            entropy: of the codes' frequencies, in nats.
            perplexity: exp(entropy), the effective number of codes.
        """
        frequency = self.counts.double() / self.counts.sum().clamp(min=1)
        entropy = float(torch.special.entr(frequency).sum())
        used = int((self.counts > 0).sum())
        return {
            "used": used / self.counts.numel(),
            "dead": self.counts.numel() - used,
            "entropy": entropy,
            "perplexity": float(torch.tensor(entropy).exp()),
        }

    def reset_usage(self) -> None:
        """Set ``counts`` to 0, in place."""
        self.counts.zero_()

    @torch.no_grad()
    def reseed_dead(self, z: Tensor, generator: torch.Generator | None = None) -> int:
        """Move every code not kept since ``reset_usage()`` onto a random row of z.

        A moved code gets the mean norm of the codes in use, so that a dot product selects it neither never nor always.

        Args:
            z: [T, E].
            generator: on the CPU, for the draws; None = torch's global one.

        Returns:
            How many codes were moved.
        """
        dead = (self.counts == 0).nonzero()[:, 0]
        if len(dead) == 0 or len(z) == 0:
            return 0
        rows = torch.randint(len(z), (len(dead),), generator=generator)
        fresh = F.normalize(z[rows.to(z.device)].float(), dim=-1)
        alive = self.codes[self.counts > 0]
        norm = alive.float().norm(dim=-1).mean() if len(alive) else self.codes.float().norm(dim=-1).mean()
        self.codes[dead] = (fresh * norm).to(self.codes.dtype)
        return len(dead)
