"""What to measure: the axes of the grid, and the command line's options that restrict them. Part of ``cu_fast.bench``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from cu_fast.bench.cells import DATA, DTYPES, MASKS, MASKS_OF, OPS, Cell
from cu_fast.bench.job import Builder
from cu_fast.bench.providers import PROVIDERS

TOKENS = (1, 8, 64, 512, 4096)
TOKENS_OF = {"delete_latents": (1, 8, 64, 512)}  # by op, where it has others
SHAPES = ((512, 25_000, 8), (512, 25_000, 64), (768, 24_576, 32), (2048, 65_536, 32), (4096, 16_384, 64))
SHAPES_OF = {"delete_latents": ((2304, 16_384, 20), (2304, 16_384, 345))}  # of Gemma 2 2B
CACHES = {"cpu": ("warm", "cold"), "cuda": ("cold", "warm")}  # by device, the default first


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure: an op, several ("sae_encode,bottleneck") or "all", and the values of each axis, None = all that the op has.

    shapes: (E, C, k). data: kinds of ``cells.DATA``, None = gaussian. seconds: for each provider of a cell. rounds: at
    least so many, however long they take; a provider one call of which takes longer than ``seconds`` is called once.
    cache: "warm", untimed calls come right before each timed one, or "cold": other memory is read before each, so that the
    last-level cache holds nothing of what the call reads; None = warm on the CPU, cold on a GPU.
    device: "cpu" or "cuda". memory: bytes that may be used, None = what is free.
    """

    op: str = "codebook_quantize"
    tokens: tuple[int, ...] | None = None
    shapes: tuple[tuple[int, int, int], ...] | None = None
    dtypes: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    providers: tuple[str, ...] | None = None
    seconds: float = 1.0
    rounds: int = 5
    cache: str | None = None
    threads: int | None = None
    seed: int = 0
    memory: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_choice("device", [self.device], CACHES)
        if self.cache is None:
            object.__setattr__(self, "cache", CACHES[self.device][0])  # the way to write to a frozen dataclass
        _check_choice("OP", self.ops, (*OPS, "all"))
        _check_choice("dtype", self.dtypes, DTYPES)
        _check_choice("mask", self.masks, MASKS)
        _check_choice("data", self.data, DATA)
        _check_choice("cache", [self.cache], CACHES[self.device])
        known = {name for op in self.ops for name in providers_of(op, self.device)}
        _check_choice("provider", self.providers, sorted(known))
        for T in self.tokens or ():
            _check_positive("tokens", T)
        for shape in self.shapes or ():
            if len(shape) != 3 or min(shape) < 1 or shape[2] > shape[1]:
                raise ValueError(f"shape is {','.join(map(str, shape))}; it should be E,C,k with k <= C, each >= 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it should be greater than 0")
        for name in ("rounds", "threads"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if not self.cells():
            has = "; ".join(f"{op} has {', '.join(MASKS_OF[op])}" for op in self.ops)
            raise ValueError(f"no cell of {self.op!r} has mask {self.masks}; {has}")

    @property
    def ops(self) -> tuple[str, ...]:
        return OPS if self.op == "all" else tuple(self.op.split(","))

    def cells(self) -> list[Cell]:
        """The cells in the order in which they are measured; axes that an op does not have collapse."""
        found = {op: set(providers_of(op, self.device)) for op in self.ops}
        wanted = [op for op, names in found.items() if names & set(self.providers or names)]
        return list(dict.fromkeys(cell for op in wanted for cell in self._cells(op)))

    def _cells(self, op: str) -> Iterator[Cell]:
        masks = [mask for mask in self.masks or MASKS_OF[op] if mask in MASKS_OF[op]]
        shapes, tokens = self.shapes or SHAPES_OF.get(op, SHAPES), self.tokens or TOKENS_OF.get(op, TOKENS)
        for (E, C, k), dtype, kind, mask, T in itertools.product(
            shapes, self.dtypes or tuple(DTYPES), self.data or ("gaussian",), masks, tokens
        ):
            yield Cell(op, T, E, *((E, 1) if op == "sae_encode" else (C, k)), dtype, mask, kind)


def providers_of(op: str, device: str = "cpu") -> dict[str, Builder]:
    """Every provider of an op on a device, by name."""
    return dict(PROVIDERS[device][op])


def make_plan(op: str, shape: Iterable[str] | None = None, **options: Any) -> Plan:
    """A Plan from the command line's strings: each axis a comma-separated list, each shape "E,C,k".

    Raises ValueError with the option's name, what it was and what it should be.
    """
    axes = {name: options.pop(name, None) for name in ("tokens", "dtype", "mask", "data", "provider")}
    split = {name: tuple(filter(None, text.split(","))) if text else None for name, text in axes.items()}
    shapes = tuple(_ints("shape", text, "E,C,k, for example 512,25000,8") for text in shape or ())
    return Plan(
        op=op,
        tokens=_ints("tokens", axes["tokens"], "whole numbers, for example 1,64") if axes["tokens"] else None,
        shapes=shapes or None,
        dtypes=split["dtype"],
        masks=split["mask"],
        data=split["data"],
        providers=split["provider"],
        **options,
    )


def _ints(name: str, text: str, wanted: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it should be {wanted}") from None


def _check_choice(name: str, values: Iterable[str] | None, allowed: Iterable[str]) -> None:
    for value in values or ():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(allowed)}")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it should be at least 1")
