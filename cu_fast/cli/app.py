"""The command line, ``cu-fast``: thin; what it does is in the modules that it calls."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cu_fast import __version__
from cu_fast.cli import models, sae
from cu_fast.cli.models import model_folder
from cu_fast.cli.options import Cache, Data, Device, Dtype, Json, MaskKind, ModelFolder, Op, Silent, names, several
from cu_fast.cli.tables import pairs, show_step, shown_table, tuned_table
from cu_fast.cli.terminal import console, errors_are_messages

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Unlearned inference: exact, masked top-k codebooks in Hugging Face models.",
)


@app.callback()
def main() -> None:
    level = logging.INFO if os.environ.get("CU_FAST_LOG") else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("cu_fast").setLevel(level)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not hide a result


@app.command()
def env(as_json: Json = False) -> None:
    """What this machine offers, which implementation runs, and why another does not."""
    with errors_are_messages():
        facts = environment()
        if as_json:
            print(json.dumps(facts, indent=2))
        else:
            console.print(pairs(facts, "environment"))


def environment() -> dict[str, Any]:
    import torch
    import transformers

    from cu_fast import ops
    from cu_fast.kernels import native

    impls = {name: reason or "available" for name, reason in ops.available_impls().items()}
    return {
        "cu_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "simd": native.simd_level() if native.available() else None,
        "impl on cpu": ops.resolve("auto", torch.device("cpu")),
        "cuda": torch.cuda.is_available(),
        "built for": native.cuda_build() or None,
        **{f"impl {name!r}": state for name, state in impls.items()},
        **_triton_table(impls["triton"]),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("CU_FAST_")},
    }


def _triton_table(state: str) -> dict[str, str]:
    """Which tiles the Triton kernels take, where they run; a broken table is a fact about the machine."""
    if state != "available" and os.environ.get("TRITON_INTERPRET") != "1":
        return {}
    from cu_fast.bench import tune

    try:
        return {"triton table": tune.table_in_force(tune.arch_here())}
    except ValueError as error:
        return {"triton table": f"error: {error}"}


@app.command()
def demo(
    author: Annotated[
        str | None, typer.Option(help="Author to unlearn, one of those that --list prints. Default: the last of them.")
    ] = None,
    list_authors: Annotated[bool, typer.Option("--list", help="Print the authors' names and end.")] = False,
    as_json: Json = False,
) -> None:
    """The bundled model forgets an author while you watch."""
    with errors_are_messages():
        from cu_fast.cli import demo as show

        _quiet_transformers()
        bundle = show.load_bundle()
        if list_authors:
            names = [a.name for a in bundle.authors]
            print(json.dumps(names) if as_json else "\n".join(names))
        else:
            chosen = bundle.author(author) if author else bundle.authors[-1]
            figures = show.run(bundle, chosen, _ignore if as_json else functools.partial(show_step, console))
            if as_json:
                print(json.dumps(figures, indent=2))


app.command()(models.train)
app.command()(models.unlearn)
app.command()(models.generate)
app.command(name="eval")(models.evaluate)
app.add_typer(sae.app, name="sae")


@app.command()
def verify(
    model: ModelFolder = "demo",
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Prove it of a running server of vLLM instead, from outside, e.g. http://localhost:8000. Its cu_fast may "
            "be another; MODEL is not read.",
        ),
    ] = None,
    served: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="With --server: the model's name there. Default: its first."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --server: a mask that a request may say there; the server tells no client which it has. May be "
            "repeated.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="With --server: a prompt whose answer a mask should change. May be repeated. Default: questions that "
            "hold the mask's name.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="VLLM_API_KEY", help="With --server: the key that it asks for.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove on this machine that selections are exact, masks bite and nothing else changes; or of a server that they do."""
    with errors_are_messages():
        if server is None:
            if served is not None or mask or prompt:
                raise ValueError(
                    "--model, --mask and --prompt are for --server URL; a model folder is the first argument"
                )
            from cu_fast.cli.verify import verify as run

            _quiet_transformers()
            title, facts, checks = "cu-fast verify", environment(), run(model_folder(model))
        else:
            from cu_fast.cli.verify_server import verify_server

            facts, checks = verify_server(server, served, mask or [], prompt or [], api_key)
            title = f"cu-fast verify --server {server}"
        if as_json:
            print(json.dumps({"environment" if server is None else "server": facts, "checks": checks}, indent=2))
        else:
            table = Table("check", "result", "figure", title=escape(title))
            for check in checks:
                table.add_row(
                    escape(check["check"]),
                    "[green]pass" if check["passed"] else "[bold red]FAIL",
                    escape(check["figure"]),
                )
            console.print(pairs(facts, "environment" if server is None else "server"), table)
        if not all(check["passed"] for check in checks):
            raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model folder, or 'demo' for the bundled model.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGS", help="Arguments of `vllm serve`, after --. They go to vLLM as they are."),
    ] = None,
    attachment: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder that attachment.save() wrote. Default: the folder codebook in MODEL."),
    ] = None,
    always: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Mask that holds in every request, whatever it says. May be repeated."),
    ] = None,
    silent: Annotated[
        Silent,
        typer.Option(
            help="What a request gets that does not say what to unlearn. refuse: HTTP 400. always: the masks of --always. "
            "none: nothing is deleted."
        ),
    ] = "refuse",
    where_it_fires: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=LEVEL]",
            help="Mask that holds for the prompts alone that fire it: above LEVEL, which cu_fast.level_for finds; without "
            "LEVEL its learned gate decides. May be repeated.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="Load format of vLLM for the model's own weights. Default: auto.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Check, print the command and a request, and start nothing.")
    ] = False,
) -> None:
    """Start a vLLM server in which every request says what it unlearns (docs/serving.md)."""
    with errors_are_messages():
        from cu_fast.cli import serve as serving

        given = {"attachment": attachment, "always": always, "silent": silent, "weights": weights}
        given["where_it_fires"] = dict(map(serving.gate, where_it_fires or ()))
        folder = str(model_folder(model))
        start = serving.prepare(folder, {name: value for name, value in given.items() if value}, arguments or [])
        for note in start.notes:
            print(f"note: {note}")
        print("masks:", ", ".join(start.masks))
        print("command:", shlex.join(start.command))
        print("request, once it serves:", start.request, sep="\n")
        if not show:
            serving.become(start.command)


@app.command()
def bench(
    op: Annotated[
        str,
        typer.Argument(
            parser=several(Op, alone=("all",)),
            help=f"What to measure, separated by commas: {names(Op)}; or all.",
        ),
    ] = "codebook_quantize",
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="T,...",
            help="Tokens per call, separated by commas (delete_latents: by default at most 512). Default: 1,8,64,512,4096.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="E,C,k",
            help="Code width, number of codes and codes kept per token, e.g. 512,25000,8. May be repeated. "
            "Default: all shapes of the benchmark's grid.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            parser=several(Dtype),
            metavar="NAME,...",
            help=f"Type of activations and codes, separated by commas: {names(Dtype)}. Default: all.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            parser=several(MaskKind),
            metavar="NAME,...",
            help=f"Share of the codes that is deleted, separated by commas: {names(MaskKind)}. rows: 1%, drawn anew per "
            "token; of delete_latents, whose k is what is deleted: another mask per sequence. one: one mask for all "
            "tokens, of delete_latents alone. Default: all that OP has.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            parser=several(Data),
            metavar="NAME,...",
            help=f"Distribution of activations and codes, separated by commas: {names(Data)}. Default: gaussian.",
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Implementations to measure, separated by commas, e.g. cu_fast,torch_fp32. Which there are depends on "
            "OP and --device; a wrong name lists them. Default: all.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Seconds to measure per implementation and cell (a combination of the values above).")
    ] = 1.0,
    rounds: Annotated[
        int,
        typer.Option(
            help="Smallest number of rounds per cell, however long they take. A round measures every implementation "
            "but those whose first call takes longer than --seconds."
        ),
    ] = 5,
    cache: Annotated[
        Cache | None,
        typer.Option(
            help="warm: untimed calls precede each timed one. cold: caches are emptied before each."
            " Default: warm on a CPU, cold on a GPU."
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Device to measure on.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch and cu_fast. Default: PyTorch's.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="CSV file to which rows are added as they are measured. Default: no file is written."),
    ] = None,
    show: Annotated[
        Path | None, typer.Option(help="Measure nothing; print the tables of this CSV file, which --output wrote.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Measure against PyTorch, in turns, and check the answers."""
    with errors_are_messages():
        from cu_fast import bench as benchmark

        axes = {"tokens": tokens, "dtype": dtype, "mask": mask, "data": data, "provider": provider, "device": device}
        plan = benchmark.make_plan(op, shape, **axes, seconds=seconds, rounds=rounds, cache=cache, threads=threads)
        rows = benchmark.read_rows(show) if show else benchmark.run(plan, output, progress=not as_json)
        text = json.dumps(rows, indent=2) if as_json else benchmark.markdown(rows) if markdown else None
        print(text) if text is not None else console.print(*benchmark.tables(rows))


@app.command()
def tune(
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for the table of tiles. Default: the file that cu_fast reads on this GPU."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Seconds to spend. Kernels not reached by then keep their tiles; their names are printed."),
    ] = 120,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; print the table that is in force.")] = False,
    as_json: Json = False,
) -> None:
    """Measure which tiles of the Triton kernels are fastest on this GPU, and keep them for later processes."""
    with errors_are_messages():
        from cu_fast.bench import tune as tuning

        found = tuning.show() if show else tuning.run(output, budget, progress=not as_json)
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            console.print(*(shown_table(found) if show else tuned_table(found)), highlight=False)


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _ignore(name: str, figures: Any) -> None:
    pass


if __name__ == "__main__":
    sys.exit(app())
