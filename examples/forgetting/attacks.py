"""Does it stay gone? python attacks.py BASE TOFU WIKITEXT --models DIR --results DIR/results.csv --output attacks.csv

Each method of results.csv as it would be served, from what study.py kept beside that table, under what might bring the split
back. Learned gates are judged while the model answers, too; DSG's on the prompt. A row per method and attack:

rows            questions that were asked
probability     of their true answers, the mean; plain: of the same questions, simply asked
rouge           ROUGE-L recall of a greedy answer's first NEW_TOKENS tokens; of some attacks
fires           the share of prompts for which something is deleted; fires_answered: by the end of the true answer
read            by a probe: the share of true answers' tokens
seconds         of one core

What counts as forgotten is what the gold model ("retrained") says under the same attack. Attacks by another question are
disguises.py; beyond those:

relearned   RELEARN_STEPS steps on half of the questions, and the others asked. Codes are deleted while it trains, as they are
            when it serves, which has no gradient: layers below learn by tokens from which nothing is deleted, layers above
            by all. A gate is judged on question and answer together
4 bits      linear layers' weights rounded to nearest, symmetric, a scale for GROUP of them; codes and masks stay
noise       added to what leaves a layer, before its codes; relative to the root of the mean square of each state
probe       a linear map from a later layer's states to what the output layer reads, fitted to PROBE_ROWS answers that stay

Rows that are there are not measured again; a method whose mask or weights are not there yet is passed over.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import codes
import eul
import prompts
import tampering
import torch
import transformers
from disguises import Asked, disguises
from served import Served
from shared import Table, tofu
from trial import GOLD, Study, short
from validation import names_of

import cu_fast
from cu_fast.hf.checkpoint import CODEBOOK
from cu_fast.masks import Mask, load_masks

SPOKEN = ("plain", "paraphrased", "french", "few-shot", "audit", "relearned", "4 bits")
NOISE_EVERY = 2  # of so many questions one is asked
PROBE_ROWS = 100
COLUMNS = ("rows", "probability", "plain", "rouge", "fires", "fires_answered", "read", "seconds")
Run = Callable[..., "dict[str, Any]"]  # of a method as it is served, its name, what is asked, and whether it speaks


class Attacks(Study):
    """Everything that is attacked, and the attacks by name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.read(options)
        self.output = options.results  # beside which study.py kept masks and weights
        self.entries = self.sets.forget
        others = tofu.read(options.tofu, "world_facts_perturbed")
        text = (options.wikitext / "test.txt").read_text().replace("<unk>", "")
        found = disguises(self.tokenizer, self.entries, others, text)
        self.plain = found["plain"]
        self.attacks: dict[str, tuple[list[Asked], Run]] = {name: (asked, ask) for name, asked in found.items()}
        self.attacks["relearned"] = self.plain[1::2], self.relearned
        self.attacks["4 bits"] = self.plain, rounded
        for layer, size in itertools.product(tampering.NOISE_LAYERS, tampering.NOISE):
            run = functools.partial(perturbed, layer=layer, size=size)
            self.attacks[f"noise {size:g} at layer {layer}"] = self.plain[::NOISE_EVERY], run
        for number, layer in enumerate(tampering.PROBED):
            self.attacks[f"probe at layer {layer}"] = [], functools.partial(self.probed, number=number)
        self.probes: tuple[Served, list[float]] | None = None
        self.settings = {row["method"]: row["setting"] for row in Table(options.results).rows if self.is_of(row)}
        for method in [method for method in self.settings if method.endswith("as it answers")]:
            del self.settings[method]  # attacks judge gates like that anyway

    def served(self, method: str, dtype: torch.dtype = torch.bfloat16) -> Served | None:
        """A fresh copy; None where it is not there yet."""
        made = {
            "instruction": lambda: prompts.instruction(names_of(self.entries)),
            "in-context": lambda: prompts.flipped(self.forget, self.control),
        }
        whole = {"none": "full", "retrained": GOLD[self.split], "base": "base"} | dict.fromkeys(made, "full")
        if method in whole:
            prompt = made[method]() if method in made else None
            return Served(self.model(whole[method], dtype), self.tokenizer, prompt)
        weights, saved = self.kept(method), self.kept(method).with_suffix(".safetensors")
        if method.startswith("eul") and weights.exists():
            return Served(eul.load(self.model("full", dtype), weights), self.tokenizer)
        if weights.exists():
            model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).eval()
            return Served(model, self.tokenizer)
        if method.startswith("codebook, replacing"):
            return self.replacing(self.settings[method], load_masks(saved) if saved.exists() else [], dtype)
        if not saved.exists():
            return None
        model, masks = self.model("full", dtype), load_masks(saved)
        kind = "codebook" if "codebook" in method else "topk"
        folder = self.output.with_name(f"{kind}-{self.options.seed}")
        if method == "dsg":
            part, (mask,) = codes.Codes(model, self.tokenizer, folder, kind, self.control, []), masks
            level = part.dsg_level(mask)
            return Served(
                model, self.tokenizer, attachment=part.attachment, masks=masks,
                judge=lambda given: part.share_firing(mask, given) > level,
            )  # fmt: skip
        attachment = cu_fast.attach(model, cu_fast.load_sae(folder) if kind == "topk" else folder)
        return Served(model, self.tokenizer, attachment=attachment, masks=masks)

    def replacing(self, setting: str, masks: Sequence[Mask], dtype: torch.dtype) -> Served:
        """The model that was trained with its bottleneck."""
        model = self.model("bottleneck", dtype)
        attachment = cu_fast.attach(model, self.options.models / f"bottleneck-{self.options.seed}" / CODEBOOK)
        if not masks:
            return Served(model, self.tokenizer)
        (splice,) = attachment.bottlenecks.values()
        splice.mask_mode = setting.split(", ")[-1]
        return Served(model, self.tokenizer, attachment=attachment, masks=masks)

    def relearned(self, served: Served, method: str, asked: Sequence[Asked], speak: bool) -> dict[str, Any]:
        weights = tampering.relearn(self.served(method, torch.float32), self.entries[::2], self.options.seed)
        with tampering.replaced(served.model, weights):
            return served.figures(asked, speak)

    def probed(self, served: Served, method: str, asked: Sequence[Asked], speak: bool, number: int) -> dict[str, Any]:
        if self.probes is None or self.probes[0] is not served:
            self.probes = served, tampering.reading(served, self.control[:PROBE_ROWS], self.entries)
        return {"read": self.probes[1][number]}

    def is_of(self, row: dict[str, str]) -> bool:
        """Whether a row of results.csv is of this split and seed."""
        return row["split"] == self.split and row["seed"] == str(self.options.seed)

    def run(self, method: str, chosen: Sequence[str]) -> None:
        """Add a row for each of these attacks that has none."""
        todo = [attack for attack in chosen if not self.table.has(**self.keys(method), attack=attack)]
        served = self.served(method) if todo else None
        if served is None:
            print(f"{method}: {'not there yet' if todo else 'done before'}", flush=True)
            return
        plain = served.probability([served.prompt_of(one) for one in self.plain], [one.answer for one in self.plain])
        for attack in todo:
            started = time.process_time()
            asked, run = self.attacks[attack]
            row = run(served, method, asked, attack in SPOKEN)
            if asked:
                row |= {"rows": len(asked), "plain": float(plain[[one.place for one in asked]].mean())}
            seconds = {"seconds": round(time.process_time() - started, 1)}
            self.table.add(self.keys(method) | {"attack": attack} | dict.fromkeys(COLUMNS, "") | row | seconds)


def ask(served: Served, method: str, asked: Sequence[Asked], speak: bool) -> dict[str, Any]:
    return served.figures(asked, speak)


def rounded(served: Served, method: str, asked: Sequence[Asked], speak: bool) -> dict[str, Any]:
    with tampering.replaced(served.model, tampering.four_bits(served.model)):
        return served.figures(asked, speak)


def perturbed(
    served: Served, method: str, asked: Sequence[Asked], speak: bool, layer: int, size: float
) -> dict[str, Any]:
    with tampering.noisy(served.model, layer, size):
        return served.figures(asked, speak)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("wikitext", type=Path, help="folder of WikiText-2")
    parser.add_argument("--models", type=Path, default=Path("runs/forgetting"), help="made by models.py")
    parser.add_argument("--results", type=Path, default=Path("runs/forgetting/results.csv"), help="made by study.py")
    parser.add_argument("--split", choices=list(GOLD), default="forget01")
    parser.add_argument("--methods", help="which, as delta-topk-gated; all that results.csv has by default")
    parser.add_argument("--attacks", help="which; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the models")
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting/attacks.csv"))
    parser.set_defaults(retain_rows=None)
    options = parser.parse_args(arguments)
    attacks = Attacks(options)
    chosen = options.attacks.split(",") if options.attacks else list(attacks.attacks)
    if unknown := [name for name in chosen if name not in attacks.attacks]:
        parser.error(f"--attacks has {unknown[0]!r}; there are {', '.join(attacks.attacks)}")
    found = list(attacks.settings)
    wanted = options.methods.split(",") if options.methods else list(map(short, found))
    if unknown := [name for name in wanted if name not in map(short, found)]:
        parser.error(f"--methods has {unknown[0]!r}; {options.results} has {', '.join(map(short, found)) or 'none'}")
    for method in found:
        if short(method) in wanted:
            attacks.run(method, chosen)


if __name__ == "__main__":
    main()
