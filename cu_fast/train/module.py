"""What is trained on rows: a small module whose forward returns the loss. Part of ``cu_fast.train.fit``."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

EVALUATED = 2048  # rows that figures are computed of at once


class Fit(nn.Module):
    """Base of what is fitted: it remembers which of its C codes fired, and says how well it reconstructs.

    Args:
        num_codes: C.
        dead_after: rows after which a code that none of them kept is dead.

    Attributes:
        idle: int64 [C], rows since each code was last kept, over all processes.
    """

    def __init__(self, num_codes: int, dead_after: int) -> None:
        super().__init__()
        self.dead_after = dead_after
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))

    @abstractmethod
    def start(self, rows: Tensor, generator: torch.Generator) -> None:
        """Start from data.

        Args:
            rows: [n, D], n at least C, drawn at random.
            generator: on the CPU, for further draws.
        """

    @abstractmethod
    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows [n, D]: the reconstruction, fp32 [n, D], and how many codes each keeps, int64 [n]."""

    def before_step(self) -> None:
        """Called when the gradients are there, before the optimizer."""

    def after_step(self) -> None:
        """Called after the optimizer."""

    def saw(self, fired: Tensor, rows: int, *more: Tensor) -> list[Tensor]:
        """Count a step for :attr:`idle`, in all processes together.

        Args:
            fired: bool [C], which codes this process's rows kept.
            rows: of this process.
            more: scalars.

        Returns:
            The sums of ``more`` over the processes.
        """
        told = torch.cat([fired.float(), *(value.detach().float().reshape(1) for value in more)])
        told = sum_over_processes(told)
        self.idle += rows * processes()
        self.idle[told[: len(fired)] > 0] = 0
        return list(told[len(fired) :])

    @torch.no_grad()
    def figures(self, rows: Tensor) -> dict[str, float]:
        """How it does.

        Args:
            rows: bf16 [n, D], held out.

        Returns:
            explained_variance: 1 - the squared error over the variance of the rows.
            dead_share: of the codes, those that no row of the last ``dead_after`` trained on kept.
            l0: codes kept per row, on average.
        """
        device = self.idle.device
        mean = rows.double().mean(0)
        error = spread = kept = 0.0
        for start in range(0, len(rows), EVALUATED):
            x = rows[start : start + EVALUATED].to(device)
            y, number = self.reconstruct(x)
            error += float((y.double() - x.double()).square().sum())
            spread += float((x.double() - mean.to(device)).square().sum())
            kept += float(number.sum())
        return {
            "explained_variance": 1 - error / max(spread, 1e-30),
            "dead_share": float((self.idle >= self.dead_after).double().mean()),
            "l0": kept / len(rows),
        }


def processes() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of the processes' values, in place where there are several."""
    if processes() > 1:
        torch.distributed.all_reduce(value)
    return value
