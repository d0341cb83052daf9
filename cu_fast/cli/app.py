"""The command line, ``cu-fast``: thin; what it does is in the modules that it calls."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cu_fast import __version__
from cu_fast.cli.tables import evidence_table, pairs, show_step, shown_table, tuned_table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Unlearned inference: exact, masked top-k codebooks in Hugging Face models.",
)
console = Console()
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of text.")]
ModelFolder = Annotated[str, typer.Argument(help="A folder made by `cu-fast train`, or 'demo' for the bundled model.")]


@contextlib.contextmanager
def errors_are_messages() -> Iterator[None]:
    """What a user can mend is printed as one message, without a traceback; the exit code is 1."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        if os.environ.get("CU_FAST_LOG"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("error:", *str(text).split("\n"), file=sys.stderr)
        raise typer.Exit(1) from error


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
    author: Annotated[str | None, typer.Option(help="Whom to unlearn live; any author of the training set.")] = None,
    list_authors: Annotated[bool, typer.Option("--list", help="Print the authors' names.")] = False,
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


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A transformers model folder.")],
    data: Annotated[Path, typer.Argument(help="JSON lines: text | prompt, completion | source, target.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints; the model goes to its 'model' folder.")],
    layer: Annotated[str, typer.Option(help="The layer that the bottleneck follows, e.g. model.layers.3.")],
    codes: Annotated[int, typer.Option(help="C, the size of the codebook.")] = 25_000,
    k: Annotated[int, typer.Option(help="Codes kept a token.")] = 8,
    code_dim: Annotated[int | None, typer.Option(help="E, the width of a code; default: the model's.")] = None,
    activation: Annotated[str, typer.Option(help="The encoder's: relu or none.")] = "relu",
    recipe: Annotated[str, typer.Option(help="joint, or frozen_below: for a model that knows its task.")] = "joint",
    epochs: Annotated[float, typer.Option()] = 10,
    batch_size: Annotated[int, typer.Option()] = 12,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    codebook_learning_rate: Annotated[float, typer.Option()] = 3e-3,
    prompt_weight: Annotated[float, typer.Option(help="Weight of a prompt's tokens in the loss.")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the output folder.")] = False,
) -> None:
    """Put a codebook bottleneck into a model and train it."""
    with errors_are_messages():
        import transformers

        from cu_fast.hf.checkpoint import read_model, save_model
        from cu_fast.nn import BottleneckConfig
        from cu_fast.train import train as run

        rows = _read_lines(data, dict)
        network, tokenizer = read_model(model)
        width = getattr(network.config.get_text_config(), "hidden_size", None)
        if width is None:
            raise ValueError(f"{model}: its config states no hidden_size; put bottlenecks into it with cu_fast.attach")
        config = BottleneckConfig(width, code_dim or width, codes, k, activation=activation)
        arguments = transformers.TrainingArguments(
            output_dir=str(output), num_train_epochs=epochs, per_device_train_batch_size=batch_size,
            learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=30, weight_decay=0.0, seed=seed,
            save_strategy="epoch", save_total_limit=2, logging_steps=50, report_to=[], dataloader_pin_memory=False,
        )  # fmt: skip
        attachment, figures = run(
            network, tokenizer, rows, {layer: config}, arguments, recipe=recipe, prompt_weight=prompt_weight,
            codebook_learning_rate=codebook_learning_rate, resume=resume,
        )  # fmt: skip
        save_model(attachment, tokenizer, output / "model")
        console.print(pairs(figures, f"trained; saved to {output / 'model'}"))


@app.command()
def unlearn(
    model: ModelFolder,
    target: Annotated[Path, typer.Option(help="Texts that hold the topic: a line each (JSON strings in .jsonl).")],
    topic: Annotated[str, typer.Option(help="The mask's name.")],
    control: Annotated[Path | None, typer.Option(help="Texts that do not hold it.")] = None,
    words: Annotated[
        str | None, typer.Option(help="No control? Comma-separated words of the topic to replace.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Which bottleneck, where there are several.")] = None,
    depth: Annotated[int | None, typer.Option(help="Codes counted at each token (S'); default: k.")] = None,
    min_enrichment: Annotated[float, typer.Option(help="In bits.")] = 2.0,
    alpha: Annotated[float, typer.Option(help="Bound on the corrected p-value.")] = 0.05,
    output: Annotated[Path | None, typer.Option(help="A folder for the mask; default: with the model.")] = None,
    as_json: Json = False,
) -> None:
    """Find the codes of a topic and save them as a mask. No training; reversible."""
    with errors_are_messages():
        from cu_fast.hf.checkpoint import CODEBOOK, load_model
        from cu_fast.unlearn import find_mask, replace_words

        if (control is None) == (words is None):
            raise ValueError("give either --control, texts without the topic, or --words, to make them from the target")
        texts = _read_texts(target)
        others = _read_texts(control) if control else replace_words(texts, [w.strip() for w in words.split(",")], texts)
        folder = _model_folder(model)
        if output is None and model == "demo":
            raise ValueError("the bundled model's folder is not written to; give --output")
        _, tokenizer, attachment = load_model(folder)
        finding = find_mask(
            attachment, tokenizer, texts, others, topic=topic, layer=layer, depth=depth,
            min_enrichment=min_enrichment, alpha=alpha, progress=not as_json,
        )  # fmt: skip
        found, where = finding.mask.num_deleted > 0, output or folder / CODEBOOK
        text = json.dumps(finding.to_dict() | {"path": str(where) if found else None}, indent=2)
        table = evidence_table(finding)
        if found and output:
            finding.mask.save(output)
        elif found:
            if topic in attachment.masks:
                attachment.remove_mask(topic)
            attachment.add_mask(finding.mask)
            attachment.save(where)
        if as_json:
            print(text)
        else:
            console.print(table)
            if found:
                console.print(f"mask saved to {where}", highlight=False, markup=False)
        if not found:
            raise typer.Exit(1)


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="What the model continues.")],
    without: Annotated[list[str] | None, typer.Option(help="A mask's name, or its folder; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    as_json: Json = False,
) -> None:
    """Generate greedily, with topics unlearned."""
    with errors_are_messages():
        import torch

        from cu_fast.hf.checkpoint import load_model

        network, tokenizer, attachment = load_model(_model_folder(model))
        names = [
            attachment.load_mask(name) if name not in attachment.masks and _holds_masks(name) else name
            for name in without or []
        ]
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode(), attachment.unlearn(set(names) or None):
            out = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        if not network.config.is_encoder_decoder:
            out = out[:, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(out[0], skip_special_tokens=True)
        if as_json:
            print(json.dumps({"text": text, "masks": names, "report": attachment.report()}, indent=2))
        else:
            print(text)


@app.command(name="eval")
def evaluate(
    model: ModelFolder,
    sets: Annotated[list[str], typer.Argument(help="NAME=FILE: JSON lines of prompt, completion | source, target.")],
    without: Annotated[list[str] | None, typer.Option(help="A mask's name; may be repeated. Each alone.")] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for results.json, results.csv and report.md.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what a model knows of sets of questions, as it is and with each topic unlearned."""
    with errors_are_messages():
        from rich.markdown import Markdown

        from cu_fast import evaluate as evaluation
        from cu_fast.hf.checkpoint import load_model

        rows = {}
        for entry in sets:
            name, _, file = entry.partition("=")
            if not name or not file:
                raise ValueError(f"{entry!r} is no set; it should be NAME=FILE, as in forgotten=forgotten.jsonl")
            if name in rows:
                raise ValueError(f"there are two sets {name!r}; give each a name of its own")
            rows[name] = _read_lines(Path(file), dict)
        if "" in (without or []):  # in the results that is the model as it is
            raise ValueError("there is no mask ''; --without should be a mask's name")
        _, tokenizer, attachment = load_model(_model_folder(model))
        results = evaluation.compare(attachment, tokenizer, rows, without or [], progress=not as_json)
        text = evaluation.report(results, rows)
        if output:
            evaluation.write(output, results, text)
        print(json.dumps(results, indent=2)) if as_json else console.print(Markdown(text))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A model folder; default: the bundled model.")] = "demo",
    as_json: Json = False,
) -> None:
    """Prove on this machine that selections are exact, masks bite and nothing else changes."""
    with errors_are_messages():
        from cu_fast.cli.verify import verify as run

        _quiet_transformers()
        checks = run(_model_folder(model))
        if as_json:
            print(json.dumps({"environment": environment(), "checks": checks}, indent=2))
        else:
            table = Table("check", "result", "figure", title="cu-fast verify")
            for check in checks:
                table.add_row(
                    escape(check["check"]),
                    "[green]pass" if check["passed"] else "[bold red]FAIL",
                    escape(check["figure"]),
                )
            console.print(pairs(environment(), "environment"), table)
        if not all(check["passed"] for check in checks):
            raise typer.Exit(1)


@app.command()
def bench(
    op: Annotated[str, typer.Argument(help="Operators, bottleneck: a,b; or all.")] = "codebook_quantize",
    tokens: Annotated[str | None, typer.Option(help="T: 1,64. Each axis: default all.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="E,C,k: 512,25000,8; may be repeated.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32,bf16.")] = None,
    mask: Annotated[str | None, typer.Option(help="none,1%,50%,rows (a different one for each token).")] = None,
    data: Annotated[str | None, typer.Option(help="Default: gaussian. A wrong one lists them all.")] = None,
    provider: Annotated[str | None, typer.Option(help="Whom to measure: cu_fast,torch_fp32. Default: all.")] = None,
    seconds: Annotated[float, typer.Option(help="For each provider of a cell.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="At least so many.")] = 5,
    cache: Annotated[str | None, typer.Option(help="warm (default) or cold (default on a GPU).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Default: torch's.")] = None,
    output: Annotated[Path | None, typer.Option(help="A CSV file that rows are added to, cell by cell.")] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing; print the tables of this CSV file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
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
    output: Annotated[Path | None, typer.Option(help="The table's file; default: where this package looks.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds; what was not reached by then is said.")] = 120,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; print the table in force.")] = False,
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


def _model_folder(name: str) -> Path:
    from cu_fast.cli.demo import BUNDLE

    return BUNDLE if name == "demo" else Path(name)


def _holds_masks(name: str) -> bool:
    """Whether a folder holds a mask, or masks a layer each. An empty name is no folder, though Path takes it for one."""
    return name != "" and any(any(Path(name).glob(pattern)) for pattern in ("mask.json", "*/mask.json"))


def _read_texts(path: Path) -> list[str]:
    return _read_lines(path, str if path.suffix == ".jsonl" else None)


def _read_lines(path: Path, kind: type | None) -> list[Any]:
    """The lines that are not blank: as they are, or JSON values of a kind, objects with texts or strings."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file ({error}); it should be UTF-8") from error
    lines = [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    return [line if kind is None else _read_value(line, kind, where) for where, line in lines]


def _read_value(line: str, kind: type, where: str) -> Any:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {line[:60]!r}; it should be a JSON {'object' if kind is dict else 'string'}")
    for key, text in value.items() if kind is dict else ():
        if key in ("text", "prompt", "completion", "source", "target") and not isinstance(text, str):
            raise ValueError(f"{where}: {key} is {text!r}; it should be a string")
    return value


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _ignore(name: str, figures: Any) -> None:
    pass


if __name__ == "__main__":
    sys.exit(app())
