"""Every method of codes.py, and the replacing bottleneck, with its settings. Part of study.py."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import codes
import numpy as np
from measure import PIECE, Measure, behind_a_gate, plain
from shared import methods, tofu
from trial import Study, Tried

import cu_fast
from cu_fast.hf.checkpoint import CODEBOOK
from cu_fast.masks import Mask
from cu_fast.ops import MASK_MODES

# R, and strengths behind a gate: of fewer codes more is taken out
STRENGTHS = {1.0: (0.75, 1, 1.5, 2), 1.5: (0.75, 1, 1.25, 1.5, 2), 2.0: (1, 1.25, 1.5, 2, 2.5, 3), 3.0: (2, 3, 4, 8)}
GATED = [(enrichment, strength) for enrichment, some in STRENGTHS.items() for strength in some]
FREE_ENRICHMENTS, FREE_STRENGTHS = (2.0, 3.0, 4.0), (1.0, 1.5, 2.0, 4.0)  # without a gate
RANDOM = (1.5, 3.0)
UNIT = {"topk": 1.0, "codebook": 0.5}  # of strengths: a codebook's codes are fewer, and each says more
CLAMPS, FARRELL_SIZES = (1.0, 4.0, 16.0), (10, 20)
PUBLISHED = (("R > 0, p < 0.05", {"min_enrichment": 0.0, "correction": "none", "test": "chi2"}),)
STRICTER = tuple((f"R > {R:g}", {"min_enrichment": R}) for R in (1.0, 2.0, 3.0, 4.0))
OURS = ("delta {}, gated", "delta {}", "random {}, gated", "delta {}, gated as it answers")


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

    def choose(self, method: str, found: Iterable[tuple[str, Mask, float]], fires: bool) -> None:
        """Record the best of the masks that were found, each with its rule and the seconds that it took. fires: they delete
        behind the learned gate."""
        where, gate = (self.gated(), self.gate) if fires else (None, None)
        settings = []
        for rule, mask, seconds in found:
            if mask.num_deleted:  # else no code is that enriched
                seconds += self.counting + self.gating * fires
                settings.append(self.tried(f"{method}, {rule}", mask, seconds, where, gate))
        if settings:
            self.study.best(method, settings)

    def enriched(self, pairs: Iterable[tuple[float, float]], random: bool) -> Iterator[tuple[str, Mask, float]]:
        for enrichment, strength in pairs:
            started = time.perf_counter()
            strength = strength * UNIT[self.kind]
            mask = self.find(min_enrichment=enrichment).with_strength(strength)
            if random:
                mask = self.codes.random(mask)
            yield f"R > {enrichment:g}, strength {strength:g}", mask, time.perf_counter() - started

    def ours(self) -> None:
        free = itertools.product(FREE_ENRICHMENTS, FREE_STRENGTHS)
        for method, pairs, random, fires in (
            (f"delta {self.kind}, gated", GATED, False, True),
            (f"delta {self.kind}", free, False, False),
            (f"random {self.kind}, gated", [RANDOM], True, True),
        ):
            if self.study.todo(method):
                self.choose(method, self.enriched(pairs, random), fires)

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

    def by_rule(self, rules: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, Mask, float]]:
        for (rule, options), self.mode in itertools.product(rules, MASK_MODES):
            started = time.perf_counter()
            mask = self.find(**options)
            yield f"{rule}, {self.mode}", mask, time.perf_counter() - started


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
    for method, (rules, fires) in wanted.items():
        part.choose(method, part.by_rule(rules), fires)
