"""Methods that delete codes of the model as it is: ours, random codes, and two of sparse autoencoders. Part of this study.

ours      codes that the split's texts keep more often than retain rows do (find_mask), taken out several times over; with a
          gate learned from the split's and retain prompts (fit_gate), or for every prompt
random    as many codes of the same frequency, behind the same gate
Farrell   latents that fire for the split and for fewer than 1 % of retain tokens set to a negative value where they fire, for
          every prompt (Farrell et al., arXiv 2410.19278; 10 or 20 latents, multipliers 25 to 200)
DSG       latents with a large mean square on the split beside retain rows, all set to a negative value in prompts of which a
          larger share of tokens fires one of them than of 95 % of retain prompts (Muhamed et al., arXiv 2504.08192; 20 latents)

Negative values are given as multiples of what the latents are where they fire, as no two autoencoders have one scale.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch

import cu_fast
from cu_fast.masks import Gate, Mask
from cu_fast.train.fit import fit_codes
from cu_fast.unlearn import TextCounts, count_codes, count_texts, fit_gate, random_mask
from cu_fast.unlearn.reading import kept_codes, reading

KINDS = ("topk", "codebook")
RUNNING_TEXT = 60_000  # tokens of wikitext among those that codes are fitted to
WINDOW = 256
GATE_LINES = 200  # of running text, among the texts that a gate is to leave alone
GATE_WINDOW = 64  # tokens that a gate looks at together: a question and its answer
DSG_PERCENTILE, DSG_SIZE = 95, 20


def texts_of(entries: Sequence[dict]) -> list[str]:
    return [models.prompt(entry["question"]) + entry["answer"] for entry in entries]


def prompts_of(entries: Sequence[dict]) -> list[str]:
    return [models.prompt(entry["question"]) for entry in entries]


def running_text(tokenizer, wikitext: Path, tokens: int) -> list[str]:
    ids = tokenizer(wikitext.read_text()[: 6 * tokens])["input_ids"][:tokens]
    return [tokenizer.decode(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]


def fitted(model: Any, tokenizer: Any, entries: Sequence[dict], text: list[str], folder: Path, kind: str) -> Path:
    """Codes fitted to what leaves a layer, once, on what the model was fine-tuned on and running text."""
    if not folder.exists():
        start, stopped = time.perf_counter(), folder.with_name(f"{folder.name}.run").is_dir()
        figures = fit_codes(model, tokenizer, texts_of(entries) + text, folder, kind=kind, resume=stopped)
        said = {name: round(value, 4) for name, value in figures.items()}
        print(f"fitted {kind}: {said} {time.perf_counter() - start:.0f} s", flush=True)
    return folder


class Codes:
    """A model with codes, and what others than the split keep of them.

    Args:
        folder: that :func:`fitted` wrote.
        control: retain entries that are counted, and that the gate is to leave alone.
        text: running text, for the gate.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, kind: str, control: Sequence[dict], text: Sequence[str]
    ) -> None:
        self.tokenizer, self.kind, self.control, self.text = tokenizer, kind, list(control), list(text)
        self.attachment = cu_fast.attach(model, cu_fast.load_sae(folder) if kind == "topk" else folder)
        start = time.perf_counter()
        self.others = self.count(texts_of(self.control))
        print(f"{kind}: counted {len(self.control)} retain rows in {time.perf_counter() - start:.1f} s", flush=True)

    def count(self, texts: Sequence[str]):
        return count_codes(
            self.attachment, self.tokenizer, texts, layer=None, squares=self.kind == "topk", examples=0, progress=False
        )

    def find(self, target: Any, topic: str, **options: Any) -> Mask:
        """target: counts."""
        found = cu_fast.find_mask(
            self.attachment, self.tokenizer, target, self.others, topic=topic, progress=False, **options
        )
        return found.mask

    @functools.cached_property
    def beside_gates(self) -> TextCounts:
        """What a gate is to leave alone: retain rows and running text, counted once for all gates."""
        lines = [text[start : start + 160] for text in self.text for start in (0, 400)][:GATE_LINES]
        start = time.perf_counter()
        counts = self.count_texts(prompts_of(self.control) + texts_of(self.control) + lines)
        print(f"{self.kind}: counted what gates leave alone in {time.perf_counter() - start:.1f} s", flush=True)
        return counts

    def count_texts(self, texts: Sequence[str]) -> TextCounts:
        return count_texts(self.attachment, self.tokenizer, texts, window=GATE_WINDOW, progress=False)

    def gate(self, mask: Mask, forget: Sequence[dict]) -> Gate:
        """That lets no retain prompt pass that it was fitted with."""
        fitted = fit_gate(
            self.attachment, self.tokenizer, mask, self.count_texts(prompts_of(forget) + texts_of(forget)),
            self.beside_gates, max_share=0.0, held_out=0.3, window=GATE_WINDOW, progress=False,
        )  # fmt: skip
        return fitted.gate

    def random(self, mask: Mask) -> Mask:
        """As many codes of the same frequency, deleted in the same way and behind the same gate."""
        other = random_mask(mask, self.others).with_strength(mask.strength)
        return other.with_gate(mask.gate)

    def size_of(self, mask: Mask, target: Any) -> float:
        """What a latent of the mask is where it fires, on average: the root of the mean square."""
        ids = mask.ids()
        return float((target.squares[ids].sum() / target.counts[ids].sum()).sqrt())

    def share_firing(self, mask: Mask, prompts: Sequence[str]) -> np.ndarray:
        """Of each prompt the share of tokens at which a code of the mask is kept: DSG's rho. float64 [N]."""
        deleted = torch.zeros(mask.num_codes, dtype=torch.bool)
        deleted[mask.ids()] = True
        shares: list[float] = []

        def visit(_: str, x: torch.Tensor, valid: torch.Tensor, __: torch.Tensor) -> None:
            splice = self.attachment.bottlenecks[mask.layer]
            hit = torch.cat([(deleted[ids.long()] & (ids >= 0)).any(1) for _, ids in kept_codes(splice, x)])
            fires = torch.zeros(valid.shape, dtype=torch.bool)
            fires[valid] = hit
            shares.extend((fires.sum(1) / valid.sum(1).clamp(min=1)).tolist())

        with torch.inference_mode(), reading(self.attachment, self.tokenizer, [mask.layer], visit) as read:
            for start in range(0, len(prompts), 32):
                read(list(prompts[start : start + 32]))
        return np.array(shares)

    def dsg_level(self, mask: Mask) -> float:
        return float(np.percentile(self.share_firing(mask, prompts_of(self.control)), DSG_PERCENTILE))
