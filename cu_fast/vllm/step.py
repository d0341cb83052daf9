"""The mask row of every token of the present step, for one layer: a buffer of fixed address.

A step is ``fill`` (the runner's inputs are ready), the model's forward, and ``clear``. At rest every row is POISON, a row that
no table has, which makes its token NaN: a kernel that runs when nothing was filled computes nothing.
"""

from __future__ import annotations

import numpy as np
import torch

POISON = torch.iinfo(torch.int32).min


class Rows:
    """mask_row for the tokens of a step.

    Args:
        max_tokens: that a step has, padding included.
        skip_first: positions at the start of each sequence that masks leave alone.
        device: of the layer.

    Attributes:
        tensor: int32 [max_tokens].
        masked: a token of this step has a mask.
    """

    def __init__(self, max_tokens: int, skip_first: int, device: torch.device) -> None:
        self.skip_first = skip_first
        self.tensor = torch.full((max_tokens,), POISON, dtype=torch.int32, device=device)
        self.masked = False

    def fill(self, rows: np.ndarray, computed: np.ndarray, counts: np.ndarray) -> None:
        """Set the rows of a step's tokens; behind them -1, for padding.

        Args:
            rows: int32, per request its row; -1 = nothing is deleted.
            computed: int, per request the position of its first token in this step.
            counts: int, per request its tokens in this step.
        """
        per_token = np.repeat(rows, counts)
        if self.skip_first and (computed < self.skip_first).any():
            starts = np.repeat(np.cumsum(counts) - counts - computed, counts)
            per_token[np.arange(len(per_token)) - starts < self.skip_first] = -1
        self.masked = bool((per_token >= 0).any())
        given = torch.from_numpy(per_token)
        if self.tensor.device.type != "cpu":  # memory of its own each time: an earlier step's copy may still read
            given = given.pin_memory()
        self.tensor[len(given) :] = -1
        self.tensor[: len(given)].copy_(given, non_blocking=True)

    def fill_nothing(self) -> None:
        """For profiling, warm-up and capture: no token is a request's."""
        self.tensor.fill_(-1)
        self.masked = False

    def set(self, row: int, start: int, stop: int) -> None:
        """Set the row of some tokens of a step, once it is known."""
        self.tensor[start:stop] = row
        self.masked |= row >= 0 and stop > start

    def clear(self) -> None:
        """Back to rest."""
        self.tensor.fill_(POISON)
        self.masked = False
