"""Every method of codes.py, and the replacing bottleneck, with its settings. Part of study.py."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import codes
import numpy as np
from codes import texts_of
from measure import PIECE, Fires, Measure, behind_a_gate, plain
from shared import methods, metrics, tofu
from trial import Study, Tried
from validation import PER_AUTHOR

import cu_fast
from cu_fast.hf.checkpoint import CODEBOOK
from cu_fast.masks import Gate, Mask, load_masks
from cu_fast.ops import MASK_MODES

# R, and strengths behind a gate: of fewer codes more is taken out
STRENGTHS = {1.0: (0.75, 1, 1.5, 2), 1.5: (0.75, 1, 1.25, 1.5, 2), 2.0: (1, 1.25, 1.5, 2, 2.5, 3), 3.0: (2, 3, 4, 8)}
GATED = [(enrichment, strength) for enrichment, some in STRENGTHS.items() for strength in some]
# also, of an author, whose few rows name few codes
BROADER = [(0.5, 1.5), (0.5, 2), (0.5, 3), (1.0, 3), (1.0, 4), (1.5, 3)]
# for other authors' gold figures; each is measured on the whole split
SET_BY_OTHERS = [(0.5, 1.25), (0.5, 1.5), (0.5, 2), (1.0, 1.25), (1.0, 1.5), (1.5, 1.25), (1.5, 1.5)]
FREE_ENRICHMENTS, FREE_STRENGTHS = (2.0, 3.0, 4.0), (1.0, 1.5, 2.0, 4.0)  # without a gate
RANDOM = (1.5, 3.0)
UNIT = {"topk": 1.0, "codebook": 0.5}  # of strengths: a codebook's codes are fewer, and each says more
CLAMPS, FARRELL_SIZES = (1.0, 4.0, 16.0), (10, 20)
PUBLISHED = (("R > 0, p < 0.05", {"min_enrichment": 0.0, "correction": "none", "test": "chi2"}),)
STRICTER = tuple((f"R > {R:g}", {"min_enrichment": R}) for R in (1.0, 2.0, 3.0, 4.0))
OURS = (
    "delta {}, gated", "delta {}", "random {}, gated", "delta {}, gated per author",
    "delta {}, gated per author, set by other authors", "delta {}, gated as it answers",
)  # fmt: skip
Found = tuple[str, dict[str, Mask], float]  # a rule, the masks of parts, and the seconds that they took


class Parts:
    """What is deleted, in parts that each have codes and a gate of their own.

    Attributes:
        targets: name of a part -> what its texts keep.
        counting, gating: seconds that counting them took, and fitting their gates.
        fires: a set's name -> for each prompt the parts whose gates fire.
    """

    def __init__(
        self, codes: codes.Codes, entries: dict[str, Sequence[dict]], prompts: dict[str, Sequence[str]]
    ) -> None:
        """prompts: of each set that is measured."""
        self.codes, self.entries, self.prompts = codes, entries, prompts
        started = time.perf_counter()
        self.targets = {name: codes.count(texts_of(some)) for name, some in entries.items()}
        self.counting = time.perf_counter() - started

    def find(self, **options: Any) -> dict[str, Mask]:
        found = {name: self.codes.find(target, name, **options) for name, target in self.targets.items()}
        return {name: mask for name, mask in found.items() if mask.num_deleted}  # else no code is that enriched

    @functools.cached_property
    def gates(self) -> dict[str, Gate]:
        _ = self.codes.beside_gates  # counted once for all deletions
        started = time.perf_counter()
        masks = self.find(min_enrichment=GATED[0][0])
        gates = {name: self.codes.gate(mask, self.entries[name]) for name, mask in masks.items()}
        self.gating = time.perf_counter() - started
        return gates

    @functools.cached_property
    def fires(self) -> Fires:
        attachment, masks = self.codes.attachment, self.find(min_enrichment=GATED[0][0])
        with known(attachment, {name: masks[name].with_gate(gate) for name, gate in self.gates.items()}):
            return {
                name: cu_fast.topics_of(attachment, self.codes.tokenizer, asked, set(self.gates))
                for name, asked in self.prompts.items()
            }


@contextlib.contextmanager
def known(attachment: cu_fast.Attachment, masks: dict[str, Mask]) -> Iterator[None]:
    """In which an attachment knows these masks."""
    for name, mask in masks.items():
        attachment.add_mask(mask, name)
    try:
        yield
    finally:
        for name in masks:
            attachment.remove_mask(name)


class CodeStudy:
    """The methods of codes.py, of one kind of codes.

    Attributes:
        whole: the split in one part.
        prompts: of each set that is measured.
    """

    def __init__(self, study: Study, kind: str, folder: Path | None = None) -> None:
        """folder: of the codes; None = they are fitted to the model."""
        self.study, self.kind = study, kind
        text = codes.running_text(study.tokenizer, study.options.wikitext / "valid.txt", codes.RUNNING_TEXT)
        if folder is None:
            folder = study.output.with_name(f"{kind}-{study.options.seed}")
            codes.fitted(study.full, study.tokenizer, study.forget + study.known, text, folder, kind)
        self.codes = codes.Codes(study.full, study.tokenizer, folder, kind, study.control, text)
        self.rows = len(study.forget)
        sets = {name: entries for name, entries, _ in study.sets.items()}
        sets |= {name: entries for name, (entries, _) in study.validation.sets.items()}
        self.prompts = {name: codes.prompts_of(entries) for name, entries in sets.items()}
        self.whole = Parts(self.codes, {study.split: study.forget}, self.prompts)

    @functools.cached_property
    def authors(self) -> Parts:
        """The split in parts of an author."""
        starts = range(0, self.rows, PER_AUTHOR)
        entries = {f"author {i}": self.study.forget[start : start + PER_AUTHOR] for i, start in enumerate(starts)}
        return Parts(self.codes, entries, self.prompts)

    def under(self, masks: dict[str, Mask], topics: Collection[str] | None = None, piece: int | None = None) -> Measure:
        """Measures the model while masks delete.

        Args:
            topics: which of the masks; None = all.
            piece: tokens of an answer after which gates are judged again; None = masks delete in every prompt.
        """
        attachment, inner = self.codes.attachment, plain(self.study.full, self.study.tokenizer, piece=piece)

        def measured(*given: Any) -> tofu.Figures:
            chosen = set(masks).intersection(masks if topics is None else topics)
            with known(attachment, masks), attachment.unlearn(chosen or None, gated=piece is not None):
                return inner(*given)

        return measured

    def tried(
        self,
        setting: str,
        masks: dict[str, Mask],
        seconds: float,
        fires: Fires | None,
        gates: dict[str, Gate] | None = None,
    ) -> Tried:
        """fires: which masks delete for which entries of each set; None = all for all. gates: what decided it, to be kept."""
        measure, extra = self.under(masks), {"codes": sum(mask.num_deleted for mask in masks.values())}
        if fires is not None:
            measure = behind_a_gate(functools.partial(self.under, masks), self.study.untouched, fires)
            share = {name: np.array([topics is not None for topics in found]) for name, found in fires.items()}
            extra |= {f"fires_{name}": float(share[name].mean()) for name in ("forget", "reworded", "retain")}
            extra["fires_general"] = float(np.concatenate([share[name] for name in tofu.GENERAL]).mean())
        kept = [mask.with_gate(gates[name]) if gates else mask for name, mask in masks.items()]
        return Tried(setting, measure, methods.Cost(seconds, self.rows, 0), extra, kept)

    def choose(self, method: str, parts: Parts, found: Iterable[Found], gated: bool) -> None:
        """Record the best of the masks that were found. gated: they delete behind learned gates."""
        gates, fires = (parts.gates, parts.fires) if gated else (None, None)
        settings = []
        for rule, masks, seconds in found:
            if masks:
                seconds += parts.counting + (parts.gating if gated else 0)
                settings.append(self.tried(f"{method}, {rule}", masks, seconds, fires, gates))
        if settings:
            self.study.best(method, settings)

    def enriched(self, parts: Parts, pairs: Iterable[tuple[float, float]], random: bool) -> Iterator[Found]:
        for enrichment, strength in pairs:
            started = time.perf_counter()
            strength = strength * UNIT[self.kind]
            masks = {name: mask.with_strength(strength) for name, mask in parts.find(min_enrichment=enrichment).items()}
            if random:
                masks = {name: self.codes.random(mask) for name, mask in masks.items()}
            yield f"R > {enrichment:g}, strength {strength:g}", masks, time.perf_counter() - started

    def ours(self) -> None:
        free = itertools.product(FREE_ENRICHMENTS, FREE_STRENGTHS)
        for method, pairs, random, gated in (
            (f"delta {self.kind}, gated", GATED, False, True),
            (f"delta {self.kind}", free, False, False),
            (f"random {self.kind}, gated", [RANDOM], True, True),
            (f"delta {self.kind}, gated per author", [*GATED, *BROADER], False, True),
        ):
            if self.study.todo(method):
                parts = self.authors if "author" in method else self.whole
                self.choose(method, parts, self.enriched(parts, pairs, random), gated)

    def set_by_others(self) -> None:
        """A mask per author. Of two halves of the authors each has the setting that brings the other nearest to the gold model."""
        method, gold = f"delta {self.kind}, gated per author, set by other authors", self.study.ratios("retrained", "")
        if not self.study.todo(method) or gold is None:
            return
        parts = self.authors
        author = {entry["question"]: i // PER_AUTHOR for i, entry in enumerate(self.study.forget)}
        asked, fires, untouched = self.study.sets.forget, parts.fires["forget"], self.study.untouched["forget"]
        half = np.array([author[entry["question"]] % 2 for entry in asked])
        found = {}
        for rule, masks, seconds in self.enriched(parts, SET_BY_OTHERS, False):
            ratios = self.study.ratios(method, rule)
            if ratios is None:
                measure = behind_a_gate(functools.partial(self.under, masks), {"asked": untouched}, {"asked": fires})
                ratios = measure("asked", asked, False).ratios
                self.study.keep_ratios(method, rule, ratios)
            found[rule] = masks, seconds, [metrics.forget_quality(ratios[half == h], gold[half == h]) for h in (0, 1)]
        best = [max(found, key=lambda rule: found[rule][2][1 - h]) for h in (0, 1)]
        masks = {name: found[best[i % 2]][0].get(name) for i, name in enumerate(parts.targets)}
        masks = {name: mask for name, mask in masks.items() if mask is not None}
        seconds = parts.counting + parts.gating + max(found[rule][1] for rule in best)
        tried = self.tried("; ".join(best), masks, seconds, parts.fires, parts.gates)
        self.study.record(method, tried, len(found))

    def as_it_answers(self) -> None:
        """The gated deletion as chosen; its gate is judged on every answer too, after each PIECE tokens."""
        method, served = f"delta {self.kind}, gated", f"delta {self.kind}, gated as it answers"
        kept = self.study.kept(method).with_suffix(".safetensors")
        if not self.study.todo(served) or not kept.exists():
            return
        chosen = self.study.table.find(**self.study.keys(method))
        measure = self.under({mask.topic: mask for mask in load_masks(kept)}, piece=PIECE)
        extra = {name: chosen[name] for name in ("codes", *(name for name in chosen if name.startswith("fires_")))}
        cost = methods.Cost(*(chosen[name] for name in methods.Cost._fields))
        self.study.record(served, Tried(chosen["setting"], measure, cost, extra))

    def farrell(self) -> None:
        settings = []
        for size, clamp in itertools.product(FARRELL_SIZES, CLAMPS):
            ((name, mask),) = self.whole.find(rank="saebench", size=size).items()
            mask = mask.with_clamp(-clamp * self.codes.size_of(mask, self.whole.targets[name]))
            settings.append(self.tried(f"farrell, {size} latents, -{clamp:g}", {name: mask}, self.whole.counting, None))
        self.study.best("farrell", settings)

    def dsg(self) -> None:
        ((name, mask),) = self.whole.find(rank="dsg", size=codes.DSG_SIZE).items()
        level, size = self.codes.dsg_level(mask), self.codes.size_of(mask, self.whole.targets[name])
        fires = {
            key: [{name} if share > level else None for share in self.codes.share_firing(mask, asked)]
            for key, asked in self.prompts.items()
        }
        settings = []
        for clamp in CLAMPS:
            masks = {name: mask.with_clamp(-clamp * size, dense=True)}
            settings.append(self.tried(f"dsg, -{clamp:g}", masks, self.whole.counting, fires))
        self.study.best("dsg", settings)


def study_codes(study: Study) -> None:
    for kind in codes.KINDS:
        methods_of = [method.format(kind) for method in OURS]
        methods_of += ["farrell", "dsg"] if kind == "topk" else []
        if not any(map(study.todo, methods_of)):
            continue
        part = CodeStudy(study, kind)
        part.ours()
        part.set_by_others()
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
        own.start("codebook, replacing, nothing deleted", self.under({}), "bottleneck")

    def under(self, *given: Any, **options: Any) -> Measure:
        inner, mode = super().under(*given, **options), self.mode

        def measured(*given: Any) -> tofu.Figures:
            (splice,) = self.codes.attachment.bottlenecks.values()
            splice.mask_mode = mode
            return inner(*given)

        return measured

    def by_rule(self, rules: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Found]:
        for (rule, options), self.mode in itertools.product(rules, MASK_MODES):
            started = time.perf_counter()
            masks = self.whole.find(**options)
            yield f"{rule}, {self.mode}", masks, time.perf_counter() - started


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
    for method, (rules, gated) in wanted.items():
        part.choose(method, part.whole, part.by_rule(rules), gated)
