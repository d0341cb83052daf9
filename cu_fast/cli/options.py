"""Options that several commands share, and the choices of all options.

The package defines these choices, in modules that import torch, which takes seconds. They are written down again here,
so that ``--help`` and a mistyped option answer at once; ``tests/cli/test_options.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, get_args

import typer

Activation = Literal["relu", "none"]
Recipe = Literal["joint", "frozen_below"]
Splice = Literal["replace", "delta"]
Kind = Literal["topk", "codebook"]
Device = Literal["cpu", "cuda"]
Cache = Literal["warm", "cold"]
Op = Literal["sae_encode", "sae_encode_topk", "codebook_quantize", "masked_decode", "bottleneck", "delete_latents"]
Dtype = Literal["fp32", "bf16"]
MaskKind = Literal["none", "1%", "50%", "rows", "one"]
Silent = Literal["refuse", "always", "none"]
Data = Literal["gaussian", "mean", "clusters20", "clusters500", "outliers", "equal", "one_cluster"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of text.")]
ModelFolder = Annotated[
    str, typer.Argument(help="Model folder that `cu-fast train` wrote, or 'demo' for the bundled model.")
]
ROWS = (
    'a JSON Lines file. Each line is an object with "prompt" and "completion" (causal models) or with "source" and '
    '"target" (sequence-to-sequence models)'
)


def several(choices: object, *, alone: tuple[str, ...] = ()) -> Callable[[str], str]:
    """A parser that checks an option's text and returns it: choices of a Literal, separated by commas, or one of alone.

    Typer itself has no such type: its lists are options that are repeated.
    """
    allowed = ", ".join(map(repr, get_args(choices))) + "".join(f", or {name!r} alone" for name in alone)

    def parse(text: str) -> str:
        for name in () if text in alone else text.split(","):
            if name not in get_args(choices):
                raise typer.BadParameter(f"{name!r} is not one of {allowed}.")
        return text

    return parse


def names(choices: object) -> str:
    """The choices of a Literal, for a help text."""
    return ", ".join(get_args(choices))
