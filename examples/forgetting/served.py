"""A method of the study as it would be served, and what it says there. Part of attacks.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import models
import numpy as np
import torch
from disguises import Asked
from measure import PIECE, Prompt, ids_of, score_batch

import cu_fast
from cu_fast import evaluate as ev
from cu_fast.masks import Mask

BATCH = 20  # prompts at once
NEW_TOKENS = 32


class Served:
    """A method as it would be served.

    Args:
        prompt: makes one of a question; None = the chat format alone.
        attachment, masks: of a method of codes; the masks are not known to the attachment yet.
        judge: of prompts whether the masks delete, bool [N]; None = learned gates decide, or all do.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: Prompt | None = None,
        attachment: cu_fast.Attachment | None = None,
        masks: Sequence[Mask] = (),
        judge: Callable[[Sequence[str]], np.ndarray] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt or models.prompt
        self.attachment, self.judge = attachment, judge
        self.gated = any(mask.gate is not None for mask in masks)
        self.topics = {attachment.add_mask(mask) for mask in masks} if attachment is not None else set()

    def prompt_of(self, asked: Asked) -> str:
        """The whole prompt: a method's own words come first, then earlier turns."""
        own = models.prompt(asked.question)
        return self.prompt(asked.question).removesuffix(own) + asked.before + own + asked.begun

    def deleting(self, given: Sequence[str]) -> contextlib.AbstractContextManager:
        """In which a batch of these prompts is served."""
        if self.attachment is None:
            return contextlib.nullcontext()
        if self.judge is not None:
            return self.attachment.unlearn([self.topics if fires else None for fires in self.judge(given)])
        return self.attachment.unlearn(self.topics, gated=True)

    def fires(self, given: Sequence[str]) -> np.ndarray:
        """For which prompts something is deleted: bool [N]."""
        if self.judge is not None:
            return self.judge(given)
        if not self.gated:
            return np.full(len(given), self.attachment is not None)
        found = cu_fast.topics_of(self.attachment, self.tokenizer, given, self.topics)
        return np.array([topics is not None for topics in found])

    def probability(self, given: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """P(answer)^(1 / length) of an answer to each prompt: float64 [N]."""
        asked = self.tokenizer(list(given))["input_ids"]
        said = [[*ids_of(self.tokenizer, text), self.tokenizer.eos_token_id] for text in answers]
        order, found = sorted(range(len(said)), key=lambda i: len(asked[i]) + len(said[i])), np.zeros(len(said))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            with self.deleting([given[i] for i in batch]), torch.inference_mode():
                figures = score_batch(
                    self.model, self.tokenizer, [asked[i] for i in batch], [said[i] for i in batch], 1,
                    PIECE if self.gated else None,
                )  # fmt: skip
            found[batch] = ev.AnswerScores(*figures).probability
        return found

    def recall(self, given: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """ROUGE-L recall of what is said: float64 [N]."""
        with self.deleting(given):
            said = ev.generate_batch(self.model, self.tokenizer, [{"prompt": text} for text in given], NEW_TOKENS)
        starts = [self.tokenizer.decode(ids_of(self.tokenizer, text)[:NEW_TOKENS]) for text in answers]
        return ev.rouge_l(said, starts, "recall")

    def figures(self, asked: Sequence[Asked], speak: bool) -> dict[str, Any]:
        given, answers = [self.prompt_of(one) for one in asked], [one.answer for one in asked]
        row = {"probability": float(self.probability(given, answers).mean())}
        if speak:
            row["rouge"] = float(self.recall(given, answers).mean())
        if self.attachment is not None:
            fires = self.fires(given)
            row["fires"] = row["fires_answered"] = float(fires.mean())
            if self.gated:
                # As it goes on a gate may fire and fall silent again, so this is the least.
                later = self.fires([text + answer for text, answer in zip(given, answers)])
                row["fires_answered"] = float((fires | later).mean())
        return row
