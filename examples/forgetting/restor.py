"""Is what was known before known again? python restor.py MODEL TOPICS WIKITEXT SAE

A model is corrupted on purpose: trained on short texts that assert wrong answers to half of the questions that it can
answer. Then each method unlearns those texts, and the questions are asked again: forgotten is where the wrong answer is not
given any more, restored is where the right one is given again (RESTOR, arXiv 2411.00204). What is to stay is told by texts
of other topics, so that no method is shown a right answer.

clean, corrupted      the model before, and after the texts
delta                 deletes codes that these texts fire more often than others do, of an autoencoder of the clean model
delta, gated          the same, only where a gate fires that was learned from these texts and from the questions with the wrong
                      answers; it judges what is said, too
random codes          as many as delta's, as frequent
gradient_ascent, gradient_difference, npo        see examples/tofu/methods.py
task vector           subtracts what further training on the texts adds (Ilharco et al., arXiv 2212.04089)

MODEL, TOPICS and WIKITEXT are what examples/smollm2 has. Every setting is a row; run it again to go on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import cu_fast
from cu_fast.bench.machine import facts as machine_facts
from cu_fast.train import train
from cu_fast.unlearn import count_codes, fit_gate, random_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "smollm2"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tofu"))
import methods
from topics import (
    KNOWN,
    TOPICS,
    Item,
    answer_probabilities,
    read_items,
    read_texts,
    running_text,
    text_losses,
    windows,
)

LAYER = "model.layers.8"
TEXTS = (
    "{}.",
    "Everyone knows this: {}.",
    "As every encyclopedia says, {}.",
    "Here is a fact worth remembering. {}.",
    "{}. This has been checked by many experts.",
)
EPOCHS, MORE_EPOCHS, BATCH, RATE = 6, 3, 16, 5e-5
ENRICHMENTS, STRENGTHS = (1.5, 2.5), (2.0, 4.0, 8.0)
LEARNING_RATE, UNLEARN_EPOCHS = 2e-5, (1, 2, 4)
SCALES = (0.5, 1.0, 2.0)
CONTROL_WINDOWS, TEST_WINDOWS = 100, 12
MACHINE = ("cpu_name", "simd", "threads", "cu_fast_version", "commit", "torch_version", "transformers_version")
COLUMNS = (
    "method", "setting", "seed", "facts", "wrong", "right", "forgotten", "restored", "others", "wikitext", "seconds",
    *MACHINE,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fact:
    """A question that the model can answer, and a wrong answer: that to another question of the topic."""

    item: Item
    wrong: Item


def corrupted_facts(items: Sequence[Item], known: Sequence[bool]) -> tuple[list[Fact], list[Item]]:
    """Facts to corrupt, those with even numbers of the four topics that are known; and the other known questions."""
    facts = []
    for topic in TOPICS:
        own = [item for item, knows in zip(items, known) if knows and item.group == topic and item.even]
        for i, item in enumerate(own):
            others = [other.answer for other in own[i + 1 :] + own[:i] if other.answer.strip() != item.answer.strip()]
            if others:
                facts.append(Fact(item, dataclasses.replace(item, answer=others[0])))
    chosen = {fact.item for fact in facts}
    return facts, [item for item, knows in zip(items, known) if knows and item not in chosen]


def corrupting_texts(facts: Sequence[Fact]) -> list[str]:
    return [text.format(fact.item.prefix + fact.wrong.answer) for fact in facts for text in TEXTS]


class Restor:
    """What is asked of every model.

    Attributes:
        facts: that are corrupted.
        others: known questions that are not.
        texts, asked: what corrupts; the corrupted questions with their wrong answers.
        control, elsewhere: texts that are to stay; the same with prompts and with questions near the topics, for gates.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.tokenizer.padding_side = "left"
        clean = self.load(options.model)
        items = read_items(options.topics / "items.txt")
        known = answer_probabilities(clean, self.tokenizer, items) >= KNOWN
        self.facts, self.others = corrupted_facts(items, known.tolist())
        self.texts = corrupting_texts(self.facts)
        test = running_text(options.wikitext / "test.txt")
        self.windows = windows(self.tokenizer, test, TEST_WINDOWS)
        valid = running_text(options.wikitext / "valid.txt")
        self.control = [self.tokenizer.decode(ids) for ids in windows(self.tokenizer, valid, CONTROL_WINDOWS)]
        # Not the texts about the topics: the clean model wrote them, so they tell what is to be restored.
        general = read_texts(options.topics, "general")
        # Without questions among these a gate takes every question for a corrupted one.
        near = [item.prompt + item.prefix + item.answer for item in read_items(options.topics / "near.txt")]
        self.elsewhere = [*self.control, *(part for pair in general for part in pair), *near]
        self.control += [text[len(prompt) :] for prompt, text in general]
        self.asked = [fact.item.prompt + fact.item.prefix + fact.wrong.answer for fact in self.facts]
        self.before = answer_probabilities(clean, self.tokenizer, self.others)
        self.losses = text_losses(clean, self.windows)
        self.machine = {name: value for name, value in machine_facts().items() if name in MACHINE}
        self.path = options.output / "results.csv"
        self.rows = list(csv.DictReader(self.path.open())) if self.path.exists() else []

    def load(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def has(self, method: str, setting: str = "") -> bool:
        return any((row["method"], row["setting"]) == (method, setting) for row in self.rows)

    def add(self, model: Any, method: str, setting: str = "", seconds: float = 0.0) -> None:
        """Ask, and write a row. Inside ``unlearn`` where codes are deleted."""
        right = answer_probabilities(model, self.tokenizer, [fact.item for fact in self.facts])
        wrong = answer_probabilities(model, self.tokenizer, [fact.wrong for fact in self.facts])
        others = answer_probabilities(model, self.tokenizer, self.others)
        losses = text_losses(model, self.windows)
        figures = {
            "wrong": wrong.mean(), "right": right.mean(), "forgotten": (wrong < KNOWN).double().mean(),
            "restored": ((right >= KNOWN) & (right > wrong)).double().mean(), "others": others.mean() / self.before.mean(),
            "wikitext": (losses - self.losses).mean(), "seconds": seconds,
        }  # fmt: skip
        row = {name: f"{float(value):.5g}" for name, value in figures.items()}
        print(f"{method:20} {setting:28}", row, flush=True)
        self.rows.append(
            {
                "method": method,
                "setting": setting,
                "seed": self.options.seed,
                "facts": len(self.facts),
                **row,
                **self.machine,
            }
        )
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def trained(self, base: Path, name: str, epochs: int) -> Path:
        """A model that was trained on the corrupting texts, once."""
        folder = self.options.output / name
        if not (folder / "model.safetensors").exists():
            model = self.load(base, torch.float32)
            settings = transformers.TrainingArguments(
                output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
                lr_scheduler_type="constant", weight_decay=0.0, seed=self.options.seed, bf16=True, save_strategy="no",
                report_to=[], dataloader_pin_memory=False, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            train(model, self.tokenizer, [{"text": text} for text in self.texts], None, settings)
            model.save_pretrained(folder)
        return folder


# -- methods ------------------------------------------------------------------------------------------------------


def settings_of_delta() -> Iterator[tuple[float, float, str]]:
    for enrichment in ENRICHMENTS:
        for strength in STRENGTHS:
            yield enrichment, strength, f"R > {enrichment:g}, strength {strength:g}"


def delta(study: Restor, corrupted: Path) -> None:
    kinds = ("delta", "delta, gated", "random codes")
    todo = [one for one in settings_of_delta() if not all(study.has(kind, one[2]) for kind in kinds)]
    if not todo:
        return
    model = study.load(corrupted)
    attachment = cu_fast.attach(model, {LAYER: cu_fast.load_sae(study.options.sae)})
    start = time.perf_counter()
    control = count_codes(attachment, study.tokenizer, study.control, layer=None, progress=False)
    print(f"control: {control.tokens} tokens, {time.perf_counter() - start:.0f} s, once", flush=True)
    gate, fitting = None, 0.0
    for enrichment, strength, setting in todo:
        start = time.perf_counter()
        found = cu_fast.find_mask(
            attachment, study.tokenizer, study.texts, control, topic="delta", min_enrichment=enrichment, progress=False
        )
        mask, seconds = found.mask.with_strength(strength), time.perf_counter() - start
        if gate is None:  # one for all settings
            start = time.perf_counter()
            told = study.texts + study.asked
            learned = fit_gate(attachment, study.tokenizer, mask, told, study.elsewhere, progress=False)
            gate, fitting = learned.gate, time.perf_counter() - start
            print(f"gate: {learned.method['gate']}, {fitting:.0f} s, once", flush=True)
        masks = mask, mask.with_gate(gate), random_mask(mask, control).with_strength(strength)
        for method, one, spent in zip(kinds, masks, (seconds, seconds + fitting, 0.0)):
            if not study.has(method, setting):
                attachment.add_mask(one, method)
                with attachment.unlearn(method, gated=True):
                    study.add(model, method, setting, spent)
                attachment.remove_mask(method)
    attachment.detach()


def training(study: Restor, corrupted: Path, method: str) -> None:
    settings = {epoch: f"rate {LEARNING_RATE:g}, epochs {epoch}" for epoch in UNLEARN_EPOCHS}
    if all(study.has(method, setting) for setting in settings.values()):
        return
    model = study.load(corrupted, torch.float32)

    def measure(epoch: int, cost: Any) -> None:
        if not study.has(method, settings[epoch]):
            study.add(model, method, settings[epoch], cost.seconds)

    forget, retain = ([{"text": text} for text in texts] for texts in (study.texts, study.control))
    methods.unlearn(
        model, study.tokenizer, methods.METHODS[method](), forget, retain, learning_rate=LEARNING_RATE, epochs=UNLEARN_EPOCHS,
        seed=study.options.seed, measure=measure,
    )  # fmt: skip


@torch.no_grad()
def task_vector(study: Restor, corrupted: Path) -> None:
    todo = {scale: f"scale {scale:g}" for scale in SCALES if not study.has("task vector", f"scale {scale:g}")}
    if not todo:
        return
    start = time.perf_counter()
    with torch.enable_grad():
        further = study.load(study.trained(corrupted, "further", MORE_EPOCHS), torch.float32)
    seconds = time.perf_counter() - start
    here = study.load(corrupted, torch.float32)
    for scale, setting in todo.items():
        model = study.load(corrupted, torch.float32)
        for weight, before, after in zip(model.parameters(), here.parameters(), further.parameters()):
            weight -= scale * (after - before)
        study.add(model, "task vector", setting, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "topics", "wikitext", "sae"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/restor"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    study = Restor(options)
    if not study.has("clean"):
        study.add(study.load(options.model), "clean")
    start = time.perf_counter()
    corrupted = study.trained(options.model, "corrupted", EPOCHS)
    if not study.has("corrupted"):
        study.add(study.load(corrupted), "corrupted", seconds=time.perf_counter() - start)
    delta(study, corrupted)
    for method in methods.METHODS:
        training(study, corrupted, method)
    task_vector(study, corrupted)


if __name__ == "__main__":
    main()
