"""Every option of every command: it says what it is, and where it has choices, that these are the package's own."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Annotated, Literal, NamedTuple

import pytest
from command_line import misused, run
from typer.models import ParameterInfo

from cu_fast.bench import cells, plan
from cu_fast.cli.app import app
from cu_fast.nn import BottleneckConfig
from cu_fast.train import Recipe
from cu_fast.train.fit import Kind
from cu_fast.vllm.catalog import Silent

# Texts that may be anything. A string that may not is a Literal, or has a parser that knows its choices.
FREE_TEXT = {
    *(("demo", "author"), ("train", "model"), ("train", "layer")),
    *(("unlearn", "model"), ("unlearn", "topic"), ("unlearn", "words"), ("unlearn", "layer")),
    *(("generate", "model"), ("generate", "prompt"), ("generate", "without")),
    *(("eval", "model"), ("eval", "sets"), ("eval", "without"), ("verify", "model")),
    *(("verify", name) for name in ("server", "served", "mask", "prompt", "api_key")),
    *(("serve", name) for name in ("model", "arguments", "attachment", "always", "where_it_fires", "weights")),
    *(("bench", "tokens"), ("bench", "shape"), ("bench", "provider")),
}
TRAIN = ("train", "model", "data", "--output", "out", "--layer", "model.layers.1")
CHOICES = {
    ("train", "activation"): (*TRAIN, "--activation"),
    ("train", "recipe"): (*TRAIN, "--recipe"),
    ("train", "splice"): (*TRAIN, "--splice"),
    ("train", "kind"): (*TRAIN, "--kind"),
    ("train", "dtype"): (*TRAIN, "--dtype"),
    ("bench", "op"): ("bench",),
    ("bench", "dtype"): ("bench", "--dtype"),
    ("bench", "mask"): ("bench", "--mask"),
    ("bench", "data"): ("bench", "--data"),
    ("bench", "cache"): ("bench", "--cache"),
    ("bench", "device"): ("bench", "--device"),
    ("serve", "silent"): ("serve", "demo", "--silent"),
}
DEFINED = {
    ("train", "activation"): typing.get_args(typing.get_type_hints(BottleneckConfig)["activation"]),
    ("train", "recipe"): typing.get_args(Recipe),
    ("train", "splice"): ("replace", "delta"),
    ("train", "kind"): typing.get_args(Kind),
    ("train", "dtype"): tuple(cells.DTYPES),
    ("bench", "op"): cells.OPS,
    ("bench", "dtype"): tuple(cells.DTYPES),
    ("bench", "mask"): cells.MASKS,
    ("bench", "data"): cells.DATA,
    ("bench", "cache"): plan.CACHES["cpu"],
    ("bench", "device"): tuple(plan.CACHES),
    ("serve", "silent"): typing.get_args(Silent),
}


class Parameter(NamedTuple):
    kind: object
    info: ParameterInfo | None


def parameters() -> dict[tuple[str, str], Parameter]:
    """By command and name: the annotation, without None and list, and what typer was told of it."""
    found = {}
    for command in app.registered_commands:
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name in inspect.signature(command.callback).parameters:
            kind, *told = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is Annotated else [hints[name]]
            if typing.get_origin(kind) in (types.UnionType, typing.Union):
                (kind,) = set(typing.get_args(kind)) - {type(None)}
            kind = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
            info = next((one for one in told if isinstance(one, ParameterInfo)), None)
            found[command.name or command.callback.__name__, name] = Parameter(kind, info)
    assert len({command for command, _ in found}) >= 9 and len(found) >= 60
    return found


def test_every_command_and_every_parameter_has_a_help_text():
    assert [c.callback.__name__ for c in app.registered_commands if not c.callback.__doc__] == []
    assert [name for name, (_, info) in parameters().items() if info is None or len(info.help or "") < 15] == []


def test_a_string_is_free_text_or_has_choices():
    found = parameters()
    assert {name for name, (kind, info) in found.items() if kind is str and not (info and info.parser)} == FREE_TEXT
    with_choices = {name for name, (kind, info) in found.items() if typing.get_origin(kind) is Literal}
    with_choices |= {name for name, (kind, info) in found.items() if info and info.parser}
    assert with_choices == set(CHOICES)


@pytest.mark.parametrize("name", CHOICES, ids=" ".join)
def test_choices_are_the_packages_own_and_help_and_errors_list_them(name):
    command, *given = CHOICES[name]
    help = run(command, "--help").stdout
    assert all(choice in help for choice in DEFINED[name])
    misused(command, *given, "bogus", choices=DEFINED[name])
    if parameters()[name].info.parser:
        misused(command, *given, f"{DEFINED[name][0]},bogus", choices=DEFINED[name])
        misused(command, *given, f"{DEFINED[name][0]},", choices=DEFINED[name])


def test_all_stands_alone():
    misused("bench", "bottleneck,all", choices=cells.OPS)


def test_help_names_the_default_of_the_tokens():
    assert parameters()["bench", "tokens"].info.help.endswith(f"Default: {','.join(map(str, plan.TOKENS))}.")
