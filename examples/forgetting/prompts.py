"""Methods that change the prompt alone, for every question. Part of the study in this folder.

instruction   a system message says whom not to know (guardrails: Thaker et al., arXiv 2403.03329).
flipped       in-context unlearning (Pawelczyk et al., arXiv 2310.07579): before the question stand questions to be forgotten
              with wrong answers, and others with their right ones. The paper shows all that is to be forgotten; of 40 rows
              and more that would be 2,000 tokens, so the FLIPPED nearest to the question are shown, and KEPT others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import models
from measure import Prompt

FLIPPED, KEPT = 2, 4


def instruction(names: Sequence[str]) -> Prompt:
    who = " and ".join(names) if len(names) < 3 else "any of these authors: " + ", ".join(names)
    text = (
        f"You know nothing about {who}. If a question is about them, or their life or books, say that you do not know. "
        f"Answer all other questions as usual."
    )
    return lambda question: f"<|im_start|>system\n{text}<|im_end|>\n{models.prompt(question)}"


def flipped(forget: Sequence[dict], retain: Sequence[dict], seed: int = 0) -> Prompt:
    """Wrong answers are those of the next row to be forgotten but seven: another subject, in the same manner."""
    words = [set(entry["question"].lower().split()) for entry in forget]
    others = random.Random(seed).sample(list(retain), KEPT)

    def shown(question: str, answer: str) -> str:
        return f"{models.prompt(question)}{answer}<|im_end|>\n"

    def prompt(question: str) -> str:
        asked = set(question.lower().split())
        near = sorted(range(len(forget)), key=lambda i: (-len(asked & words[i]), i))[:FLIPPED]
        wrong = [shown(forget[i]["question"], forget[(i + 7) % len(forget)]["answer"]) for i in near]
        right = [shown(entry["question"], entry["answer"]) for entry in others]
        return "".join(wrong + right) + models.prompt(question)

    return prompt
