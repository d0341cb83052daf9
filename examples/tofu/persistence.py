"""Does it stay gone? python examples/tofu/persistence.py path/to/tofu --models runs/tofu --output runs/tofu/persistence.csv

The model with forget01's codes deleted (at most 1 % validation loss), the models that gradient ascent, gradient difference and
NPO unlearned, and those that never saw it, under what might bring knowledge back:

plain           nothing
paraphrased     the questions in other words
8 bits, 4 bits  linear layers' and embeddings' weights rounded to so many bits, a scale for each row
relearned       trained again on a tenth of the forgotten rows, and measured on the others; the codes are erased first
perturbed       a random vector of some length, beside the residual's, added to what enters the bottleneck at every position: of
                TRIES the one under which the answers are most probable
probed          a ridge classifier reads the next token off the states behind the bottleneck's layer; it learns on answers that
                stay, and is asked for the forgotten ones: the share of tokens that it gets right
in sequence     forget05's authors deleted one after the other: what is left of them, and of validation rows; for every prompt,
                and where a prompt fires an author's codes (cu_fast.unlearn)
undone          and given back in another order: logits that differ from those on the way there
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import methods
import numpy as np
import tofu
import torch
from models import LAYER, arguments, training_rows
from study import LADDER, OURS, count, find_codes, gold_of, split_off_validation
from table import Table

from cu_fast import evaluate as ev
from cu_fast.hf import Attachment
from cu_fast.hf.checkpoint import load_model, read_model
from cu_fast.rows import Collator, encode_row
from cu_fast.train import CodebookTrainer
from cu_fast.unlearn import level_for, topics_of, within_loss

SPLIT, DEPTH = "forget01", 16
# Rate and epochs: of the settings in results.csv that pass (forget quality above 0.05) the one with the most utility.
TRAINED = {"gradient_ascent": (1e-4, 8), "gradient_difference": (3e-4, 3), "npo": (1e-4, 8)}
TRIES = 16
LENGTHS = (0.1, 0.3, 1.0)
RELEARN_EPOCHS = (1, 5, 20)
PROBE_ROWS, OTHERS = 300, 100  # rows that stay: to learn to read from, and to measure
IN_SEQUENCE = (1, 2, 5, 10)  # authors


def figures(model, tokenizer, rows: list[dict], truths: list[str], attachment=None, topics=None) -> dict[str, float]:
    """topics: what to delete for each row; None: nothing is changed."""
    rouge, probability, extraction = np.zeros((3, len(rows)))
    for some, places in tofu.grouped(topics or [None] * len(rows)).items():
        asked = [rows[i] for i in places]
        with tofu.AUTOCAST(), attachment.unlearn(some and set(some)) if topics else contextlib.nullcontext():
            scores = ev.score_answers(model, tokenizer, asked)
            answers = ev.generate(model, tokenizer, asked, tofu.NEW_TOKENS)
        rouge[places] = ev.rouge_l(answers, [truths[i] for i in places], "recall")
        probability[places], extraction[places] = scores.probability, scores.extraction_strength
    low, high = ev.interval(rouge)
    return {
        "rouge": float(rouge.mean()), "rouge_low": low, "rouge_high": high,
        "probability": float(probability.mean()), "extraction_strength": float(extraction.mean()),
    }  # fmt: skip


@torch.no_grad()
def round_weights(model: torch.nn.Module, bits: int) -> None:
    """In place: weights of linear layers and embeddings to the nearest of 2^bits - 1 values, symmetric, a scale a row."""
    most = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            scale = module.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
            module.weight.copy_((module.weight / scale).round().clamp(-most, most) * scale)


class Subject(NamedTuple):
    """A model that is to know nothing of the split; with codes deleted, the attachment, and the mask's name."""

    model: Any
    tokenizer: Any
    attachment: Attachment | None = None
    mask: str | None = None

    def masked(self) -> contextlib.AbstractContextManager:
        return self.attachment.unlearn(self.mask) if self.attachment else contextlib.nullcontext()


def load(options: argparse.Namespace, method: str, retain: list[dict]) -> Subject:
    """A fresh copy of the model that a method left."""
    full, gold = (options.models / f"{name}-{options.seed}" for name in ("full", gold_of(SPLIT)))
    if method in ("none", "retrained"):
        return Subject(*read_model((full if method == "none" else gold) / "base"))
    if method in TRAINED:
        model, tokenizer = read_model(full / "base")
        rate, epochs = TRAINED[method]
        methods.unlearn(
            model, tokenizer, methods.METHODS[method](), tofu.rows(tofu.read(options.tofu, SPLIT)), retain,
            learning_rate=rate, epochs=[epochs], seed=options.seed, measure=lambda *_: None,
        )  # fmt: skip
        return Subject(model, tokenizer)
    model, tokenizer, attachment = load_model((gold if method == "retrained with bottleneck" else full) / "bundle")
    if method != "codeunlearn":
        return Subject(model, tokenizer, attachment)
    validation, control = split_off_validation(options.tofu, retain, options.seed)
    mask = find_codes(
        attachment, tokenizer, tofu.rows(tofu.read(options.tofu, SPLIT)), count(attachment, tokenizer, control, DEPTH),
        DEPTH, SPLIT, LADDER, within_loss(attachment, tokenizer, validation, 0.01),
    )  # fmt: skip
    return Subject(model, tokenizer, attachment, attachment.add_mask(mask))


METHODS = ("none", "none with bottleneck", "retrained", "retrained with bottleneck", "codeunlearn", *TRAINED)


def relearn(subject: Subject, rows: list[dict], folder: Path, seed: int) -> Iterator[int]:
    """Train everything again on rows; yields after some epochs. What codes were deleted is erased from the weights first."""
    model, tokenizer, attachment, mask = subject
    if mask:
        attachment.erase(mask)
    encoded, done = [encode_row(tokenizer, row, 0.3, 512) for row in rows], 0
    for end in RELEARN_EPOCHS:
        settings = arguments(
            folder, seed, num_train_epochs=end - done, per_device_train_batch_size=4, learning_rate=3e-4
        )
        settings.lr_scheduler_type, settings.save_strategy = "constant", "no"
        settings.remove_unused_columns = False
        CodebookTrainer(
            attachment, None, model=model, args=settings, train_dataset=encoded,
            data_collator=Collator(tokenizer.pad_token_id),
        ).train()  # fmt: skip
        model.eval()
        done = end
        yield end


@contextlib.contextmanager
def perturbed(model, layer: str, length: float, seed: int) -> Iterator[None]:
    """Adds one random vector, of ``length`` beside the mean residual's, to what leaves the layer, before its bottleneck."""
    generator = torch.Generator().manual_seed(seed)

    def add(module, args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        direction = torch.randn(x.shape[-1], generator=generator.manual_seed(seed)).to(x)
        x = x + direction * (length * x.norm(dim=-1).mean() / direction.norm())
        return x if isinstance(output, torch.Tensor) else (x, *output[1:])

    handle = model.get_submodule(layer).register_forward_hook(add, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def states(model, tokenizer, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Where an answer's tokens are chosen, of each layer above the bottleneck's: [layers, tokens, D]; and those tokens."""
    collate, above = Collator(tokenizer.pad_token_id), int(LAYER.rpartition(".")[2]) + 2  # 0: the embeddings
    encoded, layers, tokens = [encode_row(tokenizer, row, 0.0, 512) for row in rows], [], []
    for start in range(0, len(encoded), 32):
        batch = collate(encoded[start : start + 32])
        of_answer, labels = batch.pop("loss_weights")[:, 1:] > 0, batch.pop("labels")[:, 1:]
        hidden = model(**batch, output_hidden_states=True).hidden_states[above:]
        layers.append(torch.stack([state[:, :-1][of_answer] for state in hidden]))
        tokens.append(labels[of_answer])
    return torch.cat(layers, 1).float().numpy(), torch.cat(tokens).numpy()


def probe(model, tokenizer, known: list[dict], forgotten: list[dict]) -> dict[str, float]:
    from sklearn import linear_model, pipeline, preprocessing

    (x, y), (asked, truth) = states(model, tokenizer, known), states(model, tokenizer, forgotten)
    found = {}
    for above, (seen, unseen) in enumerate(zip(x, asked), 1):
        reader = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.RidgeClassifier())
        found[f"probe, {above} above"] = float(reader.fit(seen, y).score(unseen, truth))
    return found


def delete_in_sequence(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Delete forget05's authors one after the other, then give them back in another order. Yields tests and their figures."""
    model, tokenizer, attachment, _ = subject
    entries = tofu.read(options.tofu, "forget05")
    authors = [entries[start : start + 20] for start in range(0, len(entries), 20)]
    stays = tofu.rows(training_rows(options.tofu, "forget05"))
    validation, control = split_off_validation(options.tofu, stays, options.seed)
    others = count(attachment, tokenizer, control, DEPTH)
    names = [f"author {number}" for number in range(len(authors))]
    for name, author in zip(names, authors):
        attachment.add_mask(find_codes(attachment, tokenizer, tofu.rows(author), others, DEPTH, name, OURS))
    few = [row for author in authors for row in tofu.rows(author[:2])]
    inputs = tokenizer([row["prompt"] + row["completion"] for row in few], return_tensors="pt", padding=True)

    @torch.inference_mode()
    def logits(topics: list[str]) -> torch.Tensor:
        with attachment.unlearn(set(topics) or None):
            return model(**inputs).logits

    on_the_way = [logits(names[:n]) for n in range(len(names) + 1)]
    levels = {}
    for name in names:
        prompts = [row["prompt"] for row in control[:PROBE_ROWS]]
        levels[name] = level_for(attachment, tokenizer, prompts, attachment.masks[name])
    for n in (n for n in IN_SEQUENCE if n <= len(names)):
        deleted = [entry for author in authors[:n] for entry in author]
        for kind in ("in sequence", "in sequence, where they fire"):
            found = {}
            for prefix, rows in (("", tofu.rows(deleted)), ("others_", validation)):
                topics = [set(names[:n])] * len(rows)
                if kind != "in sequence":
                    gates = {name: levels[name] for name in names[:n]}
                    topics = topics_of(attachment, tokenizer, [row["prompt"] for row in rows], gates)
                truths = [ev.truth_of(row) for row in rows]
                measured = figures(model, tokenizer, rows, truths, attachment, topics)
                found |= {f"{prefix}{figure}": value for figure, value in measured.items()}
            yield f"{kind}, {n} authors", found
    left, order = list(names), random.Random(options.seed).sample(names, len(names))
    for name in order:
        left.remove(name)
        logits(left)
    back = logits(left)
    again = [logits(names[:n]) for n in range(len(names) + 1)]
    differing = sum(int((a != b).sum()) for a, b in zip([*on_the_way, on_the_way[0]], [*again, back]))
    moved = int((on_the_way[-1] != on_the_way[0]).sum())
    yield "undone", {"differing": differing, "logits": sum(a.numel() for a in again), "moved by all masks": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("--models", type=Path, default=Path("runs/tofu"), help="made by models.py")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/tofu/persistence.csv"))
    options = parser.parse_args()
    table, entries = Table(options.output), tofu.read(options.tofu, f"{SPLIT}_perturbed")
    truths = [entry["answer"] for entry in entries]
    asked, reworded = tofu.rows(entries), tofu.rows(entries, question="paraphrased_question")
    retain = tofu.rows(training_rows(options.tofu, SPLIT))
    random.Random(options.seed).shuffle(retain)
    others = random.Random(options.seed).sample(retain, PROBE_ROWS)
    few = random.Random(options.seed).sample(range(len(asked)), len(asked) // 10)
    rest = [i for i in range(len(asked)) if i not in few]

    def with_others(subject: Subject) -> dict[str, float]:
        """Also of some answers that are to stay."""
        stays = figures(*subject[:2], others[:OTHERS], [ev.truth_of(row) for row in others[:OTHERS]])
        return figures(*subject[:2], asked, truths) | {f"others_{name}": value for name, value in stays.items()}

    for method in options.methods.split(","):

        def todo(test: str, method: str = method) -> bool:
            return not table.has(method=method, test=test, seed=options.seed)

        def record(test: str, values: dict, method: str = method) -> None:
            for name, value in values.items():
                table.add({"method": method, "test": test, "seed": options.seed, "figure": name, "value": value})

        if todo("plain"):
            subject = load(options, method, retain)
            with subject.masked():
                record("plain", with_others(subject))
                record("paraphrased", figures(*subject[:2], reworded, truths))
        for bits in (8, 4):
            if todo(f"{bits} bits"):
                subject = load(options, method, retain)
                round_weights(subject.model, bits)
                with subject.masked():
                    record(f"{bits} bits", with_others(subject))
        if any(todo(f"relearned, {epochs} epochs") for epochs in RELEARN_EPOCHS):
            subject = load(options, method, retain)
            for epochs in relearn(subject, [asked[i] for i in few], options.models / "relearn", options.seed):
                record(
                    f"relearned, {epochs} epochs",
                    figures(*subject[:2], [asked[i] for i in rest], [truths[i] for i in rest]),
                )
        for length in LENGTHS:
            if todo(f"perturbed, {length}"):
                subject = load(options, method, retain)
                best = None
                with subject.masked():
                    for seed in range(TRIES):
                        with perturbed(subject.model, LAYER, length, seed):
                            found = ev.score_answers(*subject[:2], asked).probability.mean()
                            if best is None or found > best[0]:
                                best = found, figures(*subject[:2], asked, truths)
                record(f"perturbed, {length}", best[1])
        if todo("probed"):
            subject = load(options, method, retain)
            with subject.masked():
                record("probed", probe(*subject[:2], others, asked))
        if method == "codeunlearn" and todo("undone"):
            for test, found in delete_in_sequence(load(options, "none with bottleneck", retain), options):
                if todo(test):
                    record(test, found)


if __name__ == "__main__":
    main()
