"""Commands on a model folder: train one, find a topic's mask, generate and measure with masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cu_fast.cli import fit
from cu_fast.cli.options import ROWS, Activation, Dtype, Json, Kind, ModelFolder, Recipe, Splice
from cu_fast.cli.tables import evidence_table, pairs
from cu_fast.cli.terminal import console, errors_are_messages

TEXTS = "a text file with one text per line, or a .jsonl file with one JSON string per line"


def train(
    model: Annotated[str, typer.Argument(help="Folder of the transformers model, with its tokenizer, to start from.")],
    data: Annotated[
        Path,
        typer.Argument(help=f'Training rows: {ROWS} or with "text" (causal models). With --splice delta: {fit.TEXTS}.'),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder of the run: its two newest checkpoints, one per epoch, and in 'model' the trained model. With "
            "--splice delta: a new folder, which will hold the codes alone."
        ),
    ],
    splice: Annotated[
        Splice,
        typer.Option(
            help="replace: what codes say takes the place of the layer's output, and the model is trained with them. "
            "delta: codes are fitted to the layer, and the model stays as it is."
        ),
    ] = "replace",
    kind: Annotated[
        Kind | None,
        typer.Option(help="With --splice delta: topk, a TopK sparse autoencoder; codebook, a codebook bottleneck."),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Name of the layer that the bottleneck follows, e.g. model.layers.3. Default with --splice delta: the one "
            "at a quarter of the depth."
        ),
    ] = None,
    codes: Annotated[
        int | None,
        typer.Option(
            help="Number of codes in the codebook, C. Default: 25000; with --splice delta 16384, or 8192 latents."
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="Codes kept per token. Default: 8; with --splice delta 16, or 32 latents.")
    ] = None,
    code_dim: Annotated[
        int | None,
        typer.Option(help="Width of a code, E. Default: the model's hidden size; with --splice delta 256."),
    ] = None,
    activation: Annotated[
        Activation | None,
        typer.Option(
            help="Activation function of the bottleneck's encoder; none: the encoder is linear. Default: relu."
        ),
    ] = None,
    recipe: Annotated[
        Recipe | None,
        typer.Option(
            help="joint: train the whole model. frozen_below: freeze what runs before the bottleneck, "
            "for a model that already knows its task. Default: joint."
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the training rows; may be a fraction. Default: 10; with --splice delta 4."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Training rows per step, on each device. Default: 12. With --splice delta: tokens per step, on all "
            "devices together. Default: 2048."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of all weights but the codes: warm-up for 30 steps, then a cosine down to 0. Default: "
            "1e-3. With --splice delta: warm-up, then constant, then down to 0; 2e-3 for topk."
        ),
    ] = None,
    codebook_learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of the codes; the schedule is the same. Default: 3e-3."),
    ] = None,
    prompt_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of a prompt's tokens in the loss; a completion's have 1. 0: they do not count. Default: 1."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="With --splice delta: tokens that the model reads, at most. Default: all of the data."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="With --splice delta: tokens that the model reads at once. Default: 256."),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(
            help="With --splice delta: size in MiB, at most, of the file beside --output that holds the layer's outputs "
            "while it trains. Default: 1024."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="With --splice delta: type of the model and of the training's products. Default: bf16."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the rows, the first codes and dropout.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            help="Continue from the newest checkpoint of the run that was stopped; all settings but --epochs have to be "
            "the same, and with --splice delta that too."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Put a codebook bottleneck into a model and train it; or fit codes to a model that stays as it is."""
    with errors_are_messages():
        if splice == "delta":
            fit.refuse(splice, activation=activation, recipe=recipe, codebook_learning_rate=codebook_learning_rate,
                       prompt_weight=prompt_weight)  # fmt: skip
            figures = fit.run(
                model, data, output, dtype, kind=kind, layer=layer, num_codes=codes, k=k, code_dim=code_dim,
                tokens=tokens, max_length=max_length, epochs=epochs, batch_size=batch_size, seed=seed, resume=resume,
                learning_rate=learning_rate, buffer_bytes=None if buffer is None else buffer * 2**20,
            )  # fmt: skip
            where = output
        else:
            fit.refuse(splice, kind=kind, tokens=tokens, max_length=max_length, buffer=buffer, dtype=dtype)
            if layer is None:
                raise ValueError("there is no --layer; name the layer that the bottleneck follows, e.g. model.layers.3")
            import transformers

            from cu_fast.hf.checkpoint import read_model, save_model
            from cu_fast.nn import BottleneckConfig
            from cu_fast.train import train as run

            rows = _read_lines(data, dict)
            network, tokenizer = read_model(model)
            width = getattr(network.config.get_text_config(), "hidden_size", None)
            if width is None:
                raise ValueError(
                    f"{model}: its config states no hidden_size; put bottlenecks into it with cu_fast.attach"
                )
            config = BottleneckConfig(
                width, code_dim or width, _or(codes, 25_000), _or(k, 8), activation=activation or "relu"
            )
            arguments = transformers.TrainingArguments(
                output_dir=str(output), num_train_epochs=_or(epochs, 10),
                per_device_train_batch_size=_or(batch_size, 12), learning_rate=_or(learning_rate, 1e-3),
                lr_scheduler_type="cosine", warmup_steps=30, weight_decay=0.0, seed=seed, save_strategy="epoch",
                save_total_limit=2, logging_steps=50, report_to=[], dataloader_pin_memory=False,
            )  # fmt: skip
            attachment, figures = run(
                network, tokenizer, rows, {layer: config}, arguments, recipe=recipe or "joint", resume=resume,
                prompt_weight=_or(prompt_weight, 1.0), codebook_learning_rate=_or(codebook_learning_rate, 3e-3),
            )  # fmt: skip
            where = output / "model"
            save_model(attachment, tokenizer, where)
        if as_json:
            print(json.dumps(figures, indent=2))
        else:
            console.print(pairs(figures, f"trained; saved to {where}"))


def _or(given: Any, usual: Any) -> Any:
    return usual if given is None else given


def unlearn(
    model: ModelFolder,
    target: Annotated[Path, typer.Option(help=f"Texts about the topic: {TEXTS}.")],
    topic: Annotated[str, typer.Option(help="Name of the topic, which becomes the mask's name.")],
    control: Annotated[
        Path | None, typer.Option(help="Texts that are not about the topic, in the same format; or give --words.")
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            metavar="WORD,...",
            help="Words of the topic, separated by commas, in place of --control: the target's texts, with unrelated "
            "words for these, are then the control.",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Name of the layer whose codes are counted. Default: the one that has a bottleneck."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            help="Codes counted per token, the most similar first. Default: the bottleneck's k. "
            "More deletes more, also of what other texts use."
        ),
    ] = None,
    min_enrichment: Annotated[
        float,
        typer.Option(
            help="Delete only codes that are more frequent in the target than in the control by more than this, "
            "in bits: 2 is four times as frequent."
        ),
    ] = 2.0,
    alpha: Annotated[
        float,
        typer.Option(help="Delete only codes with a p-value below this, corrected for many tests; above 0, at most 1."),
    ] = 0.05,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write the mask to. Default: the model folder, beside its other masks."),
    ] = None,
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
        folder = model_folder(model)
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


def generate(
    model: ModelFolder,
    prompt: Annotated[
        str, typer.Option(help="Text that the model continues, or answers if it is sequence-to-sequence.")
    ],
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Topic to unlearn: the name of one of the model's masks, or a folder with a mask. "
            "May be repeated: all are unlearned together. Default: none."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Largest number of tokens to generate; an end-of-sequence token ends the text earlier.")
    ] = 64,
    as_json: Json = False,
) -> None:
    """Generate greedily, with topics unlearned."""
    with errors_are_messages():
        import torch

        from cu_fast.hf.checkpoint import load_model

        network, tokenizer, attachment = load_model(model_folder(model))
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


def evaluate(
    model: ModelFolder,
    sets: Annotated[list[str], typer.Argument(help=f"Sets of questions, each as NAME=FILE; FILE is {ROWS}.")],
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Topic to unlearn: the name of one of the model's masks. May be repeated: the sets are measured with "
            "none, then with each alone. Default: only with none."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write results.json, results.csv and report.md to. Default: no file is written."),
    ] = None,
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
        _, tokenizer, attachment = load_model(model_folder(model))
        results = evaluation.compare(attachment, tokenizer, rows, without or [], progress=not as_json)
        text = evaluation.report(results, rows)
        if output:
            evaluation.write(output, results, text)
        print(json.dumps(results, indent=2)) if as_json else console.print(Markdown(text))


def model_folder(name: str) -> Path:
    from cu_fast.cli.demo import BUNDLE

    return BUNDLE if name == "demo" else Path(name)


def _holds_masks(name: str) -> bool:
    """Whether a folder holds a mask, or one per layer. An empty name is no folder, though Path takes it for one."""
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
