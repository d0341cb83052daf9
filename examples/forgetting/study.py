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
import copy
import itertools
import json
import random
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import codes
import eul
import losses
import models
import numpy as np
import prompts
import torch
import transformers
from measure import PIECE, Measure, Sets, behind_a_gate, load_figures, plain, row_of, save_figures
from shared import Table, methods, tofu
from validation import FIGURES, ROWS, Validation, names_of, worth

import cu_fast
from cu_fast.hf.checkpoint import CODEBOOK
from cu_fast.masks import Mask
from cu_fast.ops import MASK_MODES

SEED = 0  # of what is drawn
CONTROL = 800  # retain rows that are counted
# R, and strengths behind a gate: of fewer codes more is taken out
STRENGTHS = {1.0: (0.75, 1, 1.5, 2), 1.5: (0.75, 1, 1.25, 1.5, 2), 2.0: (1, 1.25, 1.5, 2, 2.5, 3), 3.0: (2, 3, 4, 8)}
GATED = [(enrichment, strength) for enrichment, some in STRENGTHS.items() for strength in some]
FREE_ENRICHMENTS, FREE_STRENGTHS = (2.0, 3.0, 4.0), (1.0, 1.5, 2.0, 4.0)  # without a gate
RANDOM = (1.5, 3.0)
UNIT = {"topk": 1.0, "codebook": 0.5}  # of strengths: a codebook's codes are fewer, and each says more
CLAMPS, FARRELL_SIZES = (1.0, 4.0, 16.0), (10, 20)
SCALES = (2.0, 8.0)  # of RMU
PUBLISHED = (("R > 0, p < 0.05", {"min_enrichment": 0.0, "correction": "none", "test": "chi2"}),)
STRICTER = tuple((f"R > {R:g}", {"min_enrichment": R}) for R in (1.0, 2.0, 3.0, 4.0))
RATES, EPOCHS = (1e-5, 5e-5), (2, 4, 6, 8, 10)
NOTHING = methods.Cost(0.0, 0, 0)
QUOTED = 9  # every ninth answer is kept
GOLD = {left_out: name for name, left_out in models.MODELS.items() if left_out}
OURS = ("delta {}, gated", "delta {}", "random {}, gated", "delta {}, gated as it answers")
METHODS = {
    "models": ("base", "retrained"),
    "codes": (
        *(name.format(kind) for kind in codes.KINDS for name in OURS),
        "farrell",
        "dsg",
    ),
    "prompts": ("instruction", "in-context"),
    "training": (*methods.METHODS, "rmu", "me+gd", "idk+ap", "icu", "eul"),
    "replacing": tuple(f"codebook, replacing{rest}" for rest in (", as published", "", ", gated")),
}


def short(method: str) -> str:
    """A method's name in options, and in files' names."""
    return method.replace(", ", "-").replace(" ", "-")


class Tried(NamedTuple):
    """A setting, what it makes of the model, what it cost, further columns, and the mask that it is, where it is one."""

    setting: str
    measure: Measure
    cost: methods.Cost = NOTHING
    extra: Mapping[str, Any] = types.MappingProxyType({})
    mask: Mask | None = None


class Study:
    """The split, the sets, the tables, and the fine-tuned model.

    Attributes:
        forget, known: the split's rows and all others that the model was fine-tuned on.
        judging, control: of the others, those that settings are judged by, and those that codes are compared with; none of
            them is measured.
        untouched: the model's figures before anything is forgotten.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.read(options)
        self.full = self.model("full")
        self.start("none", plain(self.full, self.tokenizer), "untouched")

    def read(self, options: argparse.Namespace) -> None:
        """Sets what needs no model."""
        self.options, self.split, self.output = options, options.split, options.output
        self.sets = Sets(options.tofu, options.split, options.retain_rows)
        self.table, self.trials = Table(options.output), Table(options.output.with_name("validation.csv"))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
        self.tokenizer.padding_side = "left"
        gone = {entry["question"] for entry in tofu.read(options.tofu, self.split)}
        everything = tofu.read(options.tofu, "retain90") + tofu.read(options.tofu, "forget10")
        self.forget = [entry for entry in everything if entry["question"] in gone]
        self.known = [entry for entry in everything if entry["question"] not in gone]
        measured = {entry["question"] for entry in tofu.read(options.tofu, "retain_perturbed")}
        free = [entry for entry in self.known if entry["question"] not in measured]
        random.Random(SEED).shuffle(free)
        self.judging, self.control = free[:ROWS], free[ROWS:][:CONTROL]

    def start(self, method: str, as_it_is: Measure, name: str) -> None:
        """Judge from here on by a model as it is, whose row is a method's; its figures are kept under a name."""
        self.validation = Validation(self.sets.forget, self.judging, self.known, as_it_is)
        kept = self.output.with_name(f"{name}-{self.split}-{len(self.sets.retain)}.json")
        if not kept.exists():
            save_figures(kept, self.sets.measured(as_it_is))
        self.untouched = load_figures(kept) | self.validation.before
        if not self.table.has(**self.keys(method)):
            self.judge(method, Tried("", as_it_is))
            self.record(method, Tried("", lambda name, *_: self.untouched[name]))

    def model(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        folder = self.options.base if name == "base" else self.options.models / f"{name}-{self.options.seed}"
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def keys(self, method: str) -> dict[str, Any]:
        return {"split": self.split, "seed": self.options.seed, "method": method}

    def todo(self, method: str) -> bool:
        return short(method) in self.options.methods and not self.table.has(**self.keys(method))

    def kept(self, method: str) -> Path:
        """Where a method's chosen weights or mask are kept."""
        return self.output.with_name(f"{short(method)}-{self.split}-{self.options.seed}")

    def record(self, method: str, tried: Tried, runs: int = 1) -> None:
        """Measure all sets, and add the row; the truth ratios and some answers, to a file beside the table; the mask too."""
        if tried.mask is not None:
            tried.mask.save(self.kept(method).with_suffix(".safetensors"))
        started = time.perf_counter()
        found = self.sets.measured(tried.measure)
        keys = self.keys(method) | {"setting": tried.setting}
        columns = {"codes": 0, "fires_forget": "", "fires_reworded": "", "fires_retain": "", "fires_general": ""}
        measuring = {"retain_rows": len(self.sets.retain), "measuring": round(time.perf_counter() - started)}
        forget = found["forget"]
        said = {entry["question"]: text for entry, text in zip(self.sets.forget, forget.answers)}
        ratios = [float(f"{value:.6g}") for value in forget.ratios]
        with self.output.with_name("ratios.jsonl").open("a") as stream:
            line = keys | {"ratios": ratios, "answers": dict(list(said.items())[::QUOTED])}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.table.add(
            keys | {"runs": runs, **tried.cost._asdict(), **columns, **tried.extra} | row_of(found) | measuring
        )

    def judge(self, method: str, tried: Tried) -> dict[str, float]:
        keys = self.keys(method) | {"setting": tried.setting}
        found = self.trials.find(**keys)
        if found:
            return {name: float(found[name]) for name in FIGURES}
        judged = self.validation.judge(tried.measure)
        self.trials.add(keys | {"seconds": tried.cost.seconds} | judged)
        return judged

    def best(self, method: str, settings: Sequence[Tried]) -> None:
        """Record the setting that validation prefers; where there is one, without it."""
        judged = [self.judge(method, tried) for tried in settings] if len(settings) > 1 else [None]
        pick = max(range(len(settings)), key=lambda i: worth(judged[i]) if judged[i] else ())
        self.record(method, settings[pick], len(settings))


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


class CodeStudy:
    """The methods of codes.py, of one kind of codes."""

    def __init__(self, study: Study, kind: str, folder: Path | None = None) -> None:
        """folder: of the codes; None = they are fitted to the model."""
        self.study, self.kind = study, kind
        text = codes.running_text(study.tokenizer, study.options.wikitext / "valid.txt", codes.RUNNING_TEXT)
        if folder is None:
            folder = study.output.with_name(f"{kind}-{study.options.seed}")
            codes.fitted(study.full, study.tokenizer, study.forget + study.known, text, folder, kind)
        self.codes = codes.Codes(study.full, study.tokenizer, folder, kind, study.control, text)
        self.rows = len(study.forget)
        started = time.perf_counter()
        self.target = self.codes.count(codes.texts_of(study.forget))
        self.counting = time.perf_counter() - started
        started = time.perf_counter()
        self.gate = self.codes.gate(self.find(min_enrichment=GATED[0][0]), study.forget).gate
        self.gating = time.perf_counter() - started
        sets = {name: entries for name, entries, _ in study.sets.items()}
        sets |= {name: entries for name, (entries, _) in study.validation.sets.items()}
        self.prompts = {name: codes.prompts_of(entries) for name, entries in sets.items()}

    def find(self, **options: Any) -> Mask:
        return self.codes.find(self.target, self.study.split, **options)

    def under(self, mask: Mask | None, name: str | None) -> Measure:
        """Measures the model while a mask deletes in every prompt; None = nothing does."""
        attachment, inner = self.codes.attachment, plain(self.study.full, self.study.tokenizer)
        if mask is not None:
            attachment.add_mask(mask, name)

        def measured(*given: Any) -> tofu.Figures:
            with attachment.unlearn(name):
                return inner(*given)

        return measured

    def tried(
        self, setting: str, mask: Mask, seconds: float, fires: dict[str, np.ndarray] | None, gate: Any = None
    ) -> Tried:
        """fires: for which entries of each set the mask deletes; None = all. gate: what decided it, to be kept."""
        measure, extra = self.under(mask, setting), {"codes": mask.num_deleted}
        if fires is not None:
            measure = behind_a_gate(measure, self.study.untouched, fires)
            extra |= {f"fires_{name}": float(fires[name].mean()) for name in ("forget", "reworded", "retain")}
            extra["fires_general"] = float(np.concatenate([fires[name] for name in tofu.GENERAL]).mean())
        kept = mask if gate is None else mask.with_gate(gate)
        return Tried(setting, measure, methods.Cost(seconds, self.rows, 0), extra, kept)

    def gated(self) -> dict[str, np.ndarray]:
        attachment = self.codes.attachment
        attachment.add_mask(self.find(min_enrichment=GATED[0][0]).with_gate(self.gate), "gate")
        fires = {}
        for name, asked in self.prompts.items():
            found = cu_fast.topics_of(attachment, self.study.tokenizer, asked, ["gate"])
            fires[name] = np.array([topics is not None for topics in found])
        attachment.remove_mask("gate")
        return fires

    def ours(self) -> None:
        for method, pairs, fires in (
            (f"delta {self.kind}, gated", GATED, True),
            (f"delta {self.kind}", itertools.product(FREE_ENRICHMENTS, FREE_STRENGTHS), False),
            (f"random {self.kind}, gated", [RANDOM], True),
        ):
            if not self.study.todo(method):
                continue
            where = self.gated() if fires else None
            settings = []
            for enrichment, strength in pairs:
                started = time.perf_counter()
                strength = strength * UNIT[self.kind]
                mask = self.find(min_enrichment=enrichment).with_strength(strength)
                if method.startswith("random"):
                    mask = self.codes.random(mask)
                if mask.num_deleted == 0:  # no code is that enriched
                    continue
                seconds = self.counting + time.perf_counter() - started + self.gating * fires
                setting = f"{method}, R > {enrichment:g}, strength {strength:g}"
                settings.append(self.tried(setting, mask, seconds, where, self.gate if fires else None))
            if settings:
                self.study.best(method, settings)

    def as_it_answers(self) -> None:
        """The gated deletion as chosen; its gate is judged on every answer too, after each PIECE tokens."""
        method, served = f"delta {self.kind}, gated", f"delta {self.kind}, gated as it answers"
        kept = self.study.kept(method).with_suffix(".safetensors")
        if not self.study.todo(served) or not kept.exists():
            return
        chosen = self.study.table.find(**self.study.keys(method))
        attachment, mask = self.codes.attachment, Mask.load(kept)
        attachment.add_mask(mask, served)
        inner = plain(self.study.full, self.study.tokenizer, piece=PIECE)

        def measured(*given: Any) -> tofu.Figures:
            with attachment.unlearn(served, gated=True):
                return inner(*given)

        extra = {name: chosen[name] for name in ("codes", *(name for name in chosen if name.startswith("fires_")))}
        cost = methods.Cost(*(chosen[name] for name in methods.Cost._fields))
        self.study.record(served, Tried(chosen["setting"], measured, cost, extra))

    def farrell(self) -> None:
        settings = []
        for size, clamp in itertools.product(FARRELL_SIZES, CLAMPS):
            mask = self.codes.find(self.target, self.study.split, rank="saebench", size=size)
            mask = mask.with_clamp(-clamp * self.codes.size_of(mask, self.target))
            settings.append(self.tried(f"farrell, {size} latents, -{clamp:g}", mask, self.counting, None))
        self.study.best("farrell", settings)

    def dsg(self) -> None:
        mask = self.codes.find(self.target, self.study.split, rank="dsg", size=codes.DSG_SIZE)
        level, size = self.codes.dsg_level(mask), self.codes.size_of(mask, self.target)
        fires = {name: self.codes.share_firing(mask, asked) > level for name, asked in self.prompts.items()}
        self.study.best(
            "dsg", [self.tried(f"dsg, -{c:g}", mask.with_clamp(-c * size, dense=True), self.counting, fires) for c in CLAMPS]
        )  # fmt: skip


def study_codes(study: Study) -> None:
    for kind in codes.KINDS:
        methods_of = [method.format(kind) for method in OURS]
        methods_of += ["farrell", "dsg"] if kind == "topk" else []
        if not any(map(study.todo, methods_of)):
            continue
        part = CodeStudy(study, kind)
        part.ours()
        part.as_it_answers()
        for method, run in (("farrell", part.farrell), ("dsg", part.dsg)):
            if kind == "topk" and study.todo(method):
                run()
        part.codes.attachment.detach()


class Replacing(CodeStudy):
    """CodeUnlearn as published, and with stricter rules: the model says what the codes say.

    The model is another one, so it is judged by strangers to itself and by its own figures before.
    """

    mode = "reselect"  # of what is measured next

    def __init__(self, study: Study, folder: Path) -> None:
        own = copy.copy(study)
        own.full = own.model("bottleneck")
        super().__init__(own, "codebook", folder / CODEBOOK)
        own.start("codebook, replacing, nothing deleted", self.under(None, None), "bottleneck")

    def under(self, mask: Mask | None, name: str | None) -> Measure:
        inner, mode = super().under(mask, name), self.mode

        def measured(*given: Any) -> tofu.Figures:
            (splice,) = self.codes.attachment.bottlenecks.values()
            splice.mask_mode = mode
            return inner(*given)

        return measured

    def delete(self, method: str, rules: Sequence[tuple[str, dict[str, Any]]], fires: bool) -> None:
        where = self.gated() if fires else None
        settings = []
        for (rule, options), self.mode in itertools.product(rules, MASK_MODES):
            started = time.perf_counter()
            mask = self.find(**options)
            if mask.num_deleted == 0:
                continue
            seconds = self.counting + time.perf_counter() - started + self.gating * fires
            setting = f"{method}, {rule}, {self.mode}"
            settings.append(self.tried(setting, mask, seconds, where, self.gate if fires else None))
        if settings:
            self.study.best(method, settings)


def study_replacing(study: Study) -> None:
    folder = study.options.models / f"bottleneck-{study.options.seed}"
    wanted = {
        "codebook, replacing, as published": (PUBLISHED, False),
        "codebook, replacing": (STRICTER, False),
        "codebook, replacing, gated": (STRICTER, True),
    }
    wanted = {method: how for method, how in wanted.items() if study.todo(method)}
    if not wanted or not (folder / CODEBOOK).exists():
        return
    part = Replacing(study, folder)
    for method, how in wanted.items():
        part.delete(method, *how)


def trained_methods(folder: Path) -> Iterator[tuple[str, str, Callable[[], methods.GradientAscent]]]:
    """Method, variant, and what makes it."""
    for name, made in methods.METHODS.items():
        yield name, "", made
    for scale in SCALES:
        yield "rmu", f"scale {scale:g}, ", lambda scale=scale: losses.RMU(scale)
    yield "me+gd", "", losses.MaximumEntropy
    yield "idk+ap", "", lambda: losses.Refusal(losses.refusals(folder))
    yield "icu", "", losses.IterativeContrast
    yield "eul", "", eul.EUL


class Sweep:
    """Judges the settings of a method that trains, and keeps the weights of the best."""

    def __init__(self, study: Study, method: str) -> None:
        self.study, self.method, self.runs, self.worth = study, method, 0, ()
        self.tried: Tried | None = None
        self.model: Any = None

    def judge(self, setting: str, model: Any, cost: methods.Cost) -> None:
        """The model as it would be saved: in bf16."""
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        tried = Tried(setting, plain(rounded, self.study.tokenizer), cost)
        found = worth(self.study.judge(self.method, tried))
        self.runs += 1
        if found > self.worth:
            self.worth, self.tried, self.model = found, tried, rounded


def study_training(study: Study) -> None:
    """Each method at every rate, from the fine-tuned model."""
    forget, retain = (
        [models.row(entry["question"], entry["answer"]) for entry in some] for some in (study.forget, study.known)
    )
    seed = study.options.seed
    for method, variants in itertools.groupby(trained_methods(study.options.tofu), key=lambda made: made[0]):
        if not study.todo(method):
            continue
        sweep = Sweep(study, method)
        save, rates = (eul.save, eul.RATES) if method == "eul" else (type(study.full).save_pretrained, RATES)
        for (_, variant, make), rate in itertools.product(variants, rates):
            model = study.model("full", torch.float32)

            def judge(epoch: int, cost: methods.Cost, sweep=sweep, model=model, start=f"{variant}{rate:g}") -> None:
                sweep.judge(f"{start}, {epoch} epochs", model, cost)

            methods.unlearn(
                model,
                study.tokenizer,
                make(),
                forget,
                retain,
                learning_rate=rate,
                epochs=EPOCHS,
                seed=seed,
                measure=judge,
            )
        save(sweep.model, study.kept(method))
        study.record(method, sweep.tried, sweep.runs)


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
