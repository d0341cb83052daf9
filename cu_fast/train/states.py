"""Hidden states of one layer, streamed through a bounded file: what codes are fitted to, the model frozen.

A position is a token's place in a window; a row is what the layer's output holds there. Left out are the first position of
every window, whose row is an attention sink at many layers, padding, and rows longer than ``OUTLIER`` medians.

    count     the texts are read once, without the model: how many rows there will be
    held out  every ``HOLD_EVERY``-th window, up to ``HELD_ROWS`` rows: for figures, never trained on
    rounds    of as many rows as the file holds. The model runs once per token; a round's rows are read in an order that
              is a function of the seed and the step, so that a run that was stopped goes on in the same one

Several processes share the file: each runs its own batches of windows, and then all see all rows. Batches are the same
however many processes there are, and so are the rows, bit for bit.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cu_fast.hf import Tokenizer
from cu_fast.hf.places import near
from cu_fast.train.texts import Texts, windows
from cu_fast.unlearn.reading import reader_of

OUTLIER = 6.0  # medians of the held-out rows' lengths
HOLD_EVERY = 20  # windows, the first among them
HELD_ROWS = 8192
POOL = 8  # batches that windows are sorted by length in, so that little is padded
ROWS, NORMS, FILLED = "rows.bf16", "norms.fp32", "filled.json"


class Batch(NamedTuple):
    """Windows that the model reads at once: whether they are held out, and how many rows they give."""

    held: bool
    rows: int
    windows: list[list[int]]


class Round(NamedTuple):
    """What the file holds at once: its first batch, how many, and their rows."""

    first: int
    batches: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the texts give, known before the model runs.

    Attributes:
        tokens: that the model reads.
        held: rows held out.
        rows: rows to train on, outliers among them.
        rounds: of batches to train on, as many in each as the file holds; at least one.
        largest: rows of the largest batch to train on.
        sha256: of all windows.
    """

    tokens: int
    held: int
    rows: int
    rounds: tuple[Round, ...]
    largest: int
    sha256: str


class Source:
    """Batches of windows from texts, the same in every pass.

    Args:
        texts: read anew in every pass.
        tokenizer: the model's.
        length: tokens of a window, at most.
        size: windows of a batch.
        tokens: after which a pass ends; None = all of the texts.
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer, length: int, size: int, tokens: int | None) -> None:
        self.texts, self.tokenizer, self.length, self.size, self.tokens = texts, tokenizer, length, size, tokens

    def windows(self) -> Iterator[list[int]]:
        """The windows, up to ``tokens`` tokens."""
        left = self.tokens
        for window in windows(self.texts, self.tokenizer, self.length):
            window = window[:left]
            if len(window) < 2:
                return
            left = None if left is None else left - len(window)
            yield window

    def batches(self) -> Iterator[Batch]:
        """The batches: held-out ones, and those to train on, each in an order of its own."""
        held, pool, held_rows = [], [], 0
        for number, window in enumerate(self.windows()):
            if number % HOLD_EVERY == 0 and held_rows < HELD_ROWS:
                held_rows += len(window) - 1
                held.append(window)
            else:
                pool.append(window)
            if len(held) == self.size:
                yield _batch(True, held)
                held = []
            if len(pool) == POOL * self.size:
                yield from self._cut(pool)
                pool = []
        if held:
            yield _batch(True, held)
        yield from self._cut(pool)

    def _cut(self, pool: list[list[int]]) -> Iterator[Batch]:
        pool = sorted(pool, key=len)
        for i in range(0, len(pool), self.size):
            yield _batch(False, pool[i : i + self.size])

    def plan(self, capacity: int) -> Plan:
        """Read all texts once, without the model.

        Args:
            capacity: rows that the file holds, those held out among them.
        """
        digest, rounds, sizes, tokens, held = hashlib.sha256(), [], [], 0, 0
        for batch in self.batches():
            for window in batch.windows:
                digest.update(array.array("q", window).tobytes() + b"|")
                tokens += len(window)
            held += batch.rows * batch.held
            sizes += [] if batch.held else [batch.rows]
        for number, size in enumerate(sizes):
            if not rounds or rounds[-1].rows + size > capacity - held:
                rounds.append(Round(number, 0, 0))
            rounds[-1] = Round(rounds[-1].first, rounds[-1].batches + 1, rounds[-1].rows + size)
        return Plan(tokens, held, sum(sizes), tuple(rounds), max(sizes, default=0), digest.hexdigest())


def _batch(held: bool, some: list[list[int]]) -> Batch:
    return Batch(held, sum(len(window) - 1 for window in some), some)


class _Reached(Exception):
    """Ends a forward pass at the layer whose output is wanted: the layers above are not needed."""


class Reader:
    """Runs windows through a model, up to one layer.

    Args:
        model: a transformers model; it is in evaluation mode while it runs.
        layer: name of the layer, as in ``model.named_modules()``.
        pad: the id that windows are padded with, on the right.

    Raises:
        ValueError: there is no such layer, or it does not run when the model reads texts.
    """

    def __init__(self, model: nn.Module, layer: str, pad: int) -> None:
        names = [name for name, _ in model.named_modules() if name]
        if layer not in names:
            raise ValueError(f"the model has no layer {layer!r}; {near(layer, names)}")
        self.model, self.layer, self.pad = model, layer, pad
        self.width = self([[0, 0]]).shape[1]

    @torch.inference_mode()
    def __call__(self, some: list[list[int]]) -> Tensor:
        """The rows of a batch of windows, bf16 [rows, D] on the CPU: window by window, the first position left out."""
        longest = max(map(len, some))
        tokens = torch.tensor([window + [self.pad] * (longest - len(window)) for window in some])
        there = torch.tensor([[1] * len(window) + [0] * (longest - len(window)) for window in some])
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        device, training = self.model.device, self.model.training
        self.model.eval()
        handle = self.model.get_submodule(self.layer).register_forward_hook(keep)
        try:
            reader_of(self.model)(input_ids=tokens.to(device), attention_mask=there.to(device))
        except _Reached:
            pass
        finally:
            handle.remove()
            self.model.train(training)
        if not seen or not isinstance(seen[0], Tensor) or seen[0].shape[:2] != tokens.shape or seen[0].dim() != 3:
            raise ValueError(
                f"layer is {self.layer!r}, which gives no row per token when the model reads a text; it should be a layer "
                f"such as {default_layer(self.model)!r}"
            )
        wanted = there.bool()
        wanted[:, 0] = False
        return seen[0][wanted.to(seen[0].device)].to("cpu", torch.bfloat16)


def default_layer(model: nn.Module) -> str:
    """The layer at a quarter of the depth: of L layers the one with index ceil(L / 4), 8 of 30, counted from 0.

    Raises:
        ValueError: the model has no list of layers that its config knows the length of.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    part = reader_of(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is part and name), "")
    for name, module in part.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return f"{prefix}{name}.{min(-(-depth // 4), depth - 1)}"
    raise ValueError("layer is None, and the model has no list of layers; name one, as in model.named_modules()")


class States(torch.utils.data.Dataset):
    """The rows of a plan, in steps: a map-style data set whose order is a function of the seed alone.

    Args:
        plan: of the source.
        source: of the windows.
        reader: of the rows.
        folder: for the files, which are made where they are missing.
        mark: what the rows depend on, as a text; files with another mark are filled anew.
        batch_size: rows of a step, over all processes.
        epochs: how often a round's rows are read before the next round.
        seed: of the order.
        rank: of this process.
        ranks: how many processes there are.

    Attributes:
        steps: of the training.
        seconds: that the model ran for.

    Raises:
        OSError: the disk is full.
    """

    def __init__(
        self, plan: Plan, source: Source, reader: Reader, folder: Path, mark: str, batch_size: int, epochs: float,
        seed: int, rank: int, ranks: int,
    ) -> None:  # fmt: skip
        self.plan, self.source, self.reader, self.folder, self.mark = plan, source, reader, folder, mark
        self.batch_size, self.seed, self.rank, self.ranks = batch_size, seed, rank, ranks
        done = list(itertools.accumulate(r.rows for r in plan.rounds))
        ends = [max(number, round(rows * epochs / batch_size)) for number, rows in enumerate(done, 1)]
        self._ends = [end * batch_size for end in ends]  # positions, of which a step takes batch_size
        self.steps, self.seconds = ends[-1], 0.0
        self._stream: Iterator[Batch] | None = None
        self._next = 0
        self._order: tuple[tuple[int, int], Tensor] | None = None
        self._usable: Tensor | None = None  # places of the rows that are no outliers, in the round that the file holds
        size = plan.held + max(r.rows for r in plan.rounds)
        if rank == 0:
            for name, width in ((ROWS, 2 * reader.width), (NORMS, 4)):
                _reserve(folder / name, size * width)
        barrier()
        self._rows = _mapped(folder / ROWS, size * reader.width, torch.bfloat16).view(size, reader.width)
        self._norms = _mapped(folder / NORMS, size, torch.float32)
        said = json.loads((folder / FILLED).read_text()) if (folder / FILLED).is_file() else {}
        self.filled: int | None = said.get("round") if said.get("mark") == mark else None
        if self.filled is None:
            self._run((batch for batch in source.batches() if batch.held), plan.held, 0)
        self._limit = OUTLIER * self._norms[: plan.held].nanmedian()

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, position: int) -> Tensor:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> Tensor:
        """The rows at positions of the order, bf16 [n, D]; fills the file with another round first where that is due."""
        current = next(i for i, end in enumerate(self._ends) if positions[0] < end)
        if positions[-1] >= self._ends[current]:
            raise ValueError("positions are of two rounds; a step's are of one")
        self.fill(current)
        at = torch.tensor(positions) - (self._ends[current - 1] if current else 0)
        turns, places = at // len(self._usable), at % len(self._usable)
        picked = torch.empty_like(at)
        for turn in turns.unique().tolist():
            picked[turns == turn] = self._ordered(current, turn)[places[turns == turn]]
        return self._rows[picked]

    def held_out(self) -> Tensor:
        """The rows that are never trained on, bf16 [n, D]."""
        held = self.plan.held
        return self._rows[:held][self._norms[:held] <= self._limit]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """At most n rows of the round that the file holds, drawn without repeats, bf16 [n, D]."""
        drawn = torch.randperm(len(self._usable), generator=generator)[:n]
        return self._rows[self._usable[drawn]]

    def fill(self, number: int) -> None:
        """Bring a round's rows into the file, in all processes together."""
        if self.filled != number:
            barrier()  # no process reads the round before any more
            self.filled = None
            if self.rank == 0:
                (self.folder / FILLED).unlink(missing_ok=True)
            due = self.plan.rounds[number]
            if self._stream is None or self._next > due.first:
                self._stream, self._next = (batch for batch in self.source.batches() if not batch.held), 0
            some = itertools.islice(self._stream, due.first - self._next, due.first - self._next + due.batches)
            self._run(some, due.rows, self.plan.held)
            self._next = due.first + due.batches
            if self.rank == 0:
                (self.folder / FILLED).write_text(json.dumps({"mark": self.mark, "round": number}))
            self.filled, self._usable = number, None
        if self._usable is None:
            norms = self._norms[self.plan.held : self.plan.held + self.plan.rounds[number].rows]
            self._usable = (norms <= self._limit).nonzero()[:, 0] + self.plan.held  # NaN is not
            if len(self._usable) == 0:
                raise ValueError("no row is usable: the layer's output is NaN or Inf wherever it was looked at")

    def _ordered(self, number: int, turn: int) -> Tensor:
        """The order in which a round's usable rows are read for the turn-th time."""
        if self._order is None or self._order[0] != (number, turn):
            drawn = hashlib.sha256(f"{self.seed} {number} {turn}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7], "little"))
            self._order = (number, turn), self._usable[torch.randperm(len(self._usable), generator=generator)]
        return self._order[1]

    def _run(self, batches: Iterator[Batch], rows: int, start: int) -> None:
        """Run this process's batches through the model, and write their rows."""
        began, at = time.perf_counter(), start
        for number, batch in enumerate(batches):
            if number % self.ranks == self.rank:
                found = self.reader(batch.windows)
                self._rows[at : at + batch.rows] = found
                self._norms[at : at + batch.rows] = found.float().norm(dim=1)
            at += batch.rows
        barrier()
        self.seconds += time.perf_counter() - began
        if at != start + rows:
            raise ValueError(f"{self.source.texts.name} changed while it was read; start again, from texts that stay")


def barrier() -> None:
    """Wait for the other processes, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _reserve(path: Path, size: int) -> None:
    """Make a file of a size, with its place on the disk: a mapped file that finds none while it is written to kills the
    process."""
    if path.is_file() and path.stat().st_size == size:
        return
    with open(path, "wb") as stream:
        stream.truncate(size)
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                f"{path} needs {size} bytes, which the disk does not have ({error.strerror}); give a smaller "
                f"buffer_bytes, or an output on another disk"
            ) from error


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
