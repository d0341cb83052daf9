"""TOFU on a pretrained model, by every method: python study.py BASE TOFU WIKITEXT --models runs/forgetting --split forget01

BASE is SmolLM2-135M-Instruct; --models holds what models.py made. Every result is a row of results.csv: what is left of the
split, TOFU's model utility, and the cost. Its truth ratios go to ratios.jsonl, from which report.py computes forget quality
once the model that never saw the split has its row too: nothing that is chosen here looks at that model. Settings are
chosen as validation.py says; validation.csv has every one that was tried. Rows that are there are not measured again.

models    base, full and retrained
codes     codes.py
prompts   prompts.py
training  examples/tofu/methods.py, losses.py and eul.py; the chosen weights stay in a folder beside the table
replacing the model that bottleneck.py trained, where it is there
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import codes
import prompts
from deletions import OURS, study_codes, study_replacing
from measure import plain
from shared import methods
from training import ANY_PRICE, study_training
from trial import GOLD, Study, Tried, short
from validation import names_of

TRAINED = (*methods.METHODS, "rmu", "me+gd", "idk+ap", "icu", "eul")
METHODS = {
    "models": ("base", "retrained"),
    "codes": (
        *(name.format(kind) for kind in codes.KINDS for name in OURS),
        "farrell",
        "dsg",
    ),
    "prompts": ("instruction", "in-context"),
    "training": (*TRAINED, *map(ANY_PRICE.format, TRAINED)),
    "replacing": tuple(f"codebook, replacing{rest}" for rest in (", as published", "", ", gated")),
}


def study_models(study: Study) -> None:
    """The model before fine-tuning, and the one that never saw the split, where it is there."""
    for method, name in (("base", "base"), ("retrained", GOLD[study.split])):
        if study.todo(method) and (name == "base" or (study.options.models / f"{name}-{study.options.seed}").exists()):
            tried = Tried("", plain(study.model(name), study.tokenizer))
            study.judge(method, tried)  # how well strangers stand for what was never seen; nothing is chosen by it
            study.record(method, tried)


def study_prompts(study: Study) -> None:
    for method, prompt in (
        ("instruction", prompts.instruction(names_of(study.sets.forget))),
        ("in-context", prompts.flipped(study.forget, study.control)),
    ):
        if study.todo(method):
            study.best(method, [Tried("", plain(study.full, study.tokenizer, prompt=prompt))])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("wikitext", type=Path, help="folder of WikiText-2")
    parser.add_argument("--models", type=Path, default=Path("runs/forgetting"), help="made by models.py")
    parser.add_argument("--split", choices=list(GOLD), default="forget01")
    parser.add_argument("--only", default=",".join(METHODS), help=f"which of {', '.join(METHODS)}")
    parser.add_argument("--methods", help="which of these, as delta-topk-gated or npo; all by default")
    parser.add_argument(
        "--retain-rows", type=int, help="rows of retain_perturbed that utility is measured on; all by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the models")
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting/results.csv"))
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := [name for name in parts if name not in METHODS]:
        parser.error(f"--only has {unknown[0]!r}; there are {', '.join(METHODS)}")
    known = [short(method) for part in parts for method in METHODS[part]]
    options.methods = options.methods.split(",") if options.methods else known
    if unknown := [name for name in options.methods if name not in known]:
        parser.error(f"--methods has {unknown[0]!r}; of {', '.join(parts)} there are {', '.join(known)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    study = Study(options)
    run = dict(zip(METHODS, (study_models, study_codes, study_prompts, study_training, study_replacing)))
    for part in parts:
        run[part](study)


if __name__ == "__main__":
    main()
