"""The questions and texts of the study, and what a model says to them.

A folder of topics holds items.txt and near.txt (a line "#topic", then lines "question|prefix|answer") and per topic
gen_<topic>.json, texts that the model wrote about it ([{"prompt": ..., "text": ...}, ...]); gen_general.json, texts of no
topic; and where the topics are not the four below, subjects.json: {topic: {"name": ..., "subjects": [...]}, ...}. The study
asks the model for what is near a topic; others read gen_near.json, which has subjects near three of them, chosen by hand.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

TOPICS = ("solar", "potter", "ww2", "france")
NAMES = ("the solar system", "Harry Potter", "World War II", "France")
KNOWN = 0.1  # a question counts where the untouched model gives its answer at least this probability
WINDOW = 256  # tokens of a window of running text


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclasses.dataclass(frozen=True)
class Item:
    """A question, how its answer begins, and the answer's word; number: its place among those of its group."""

    group: str
    number: int
    question: str
    prefix: str
    answer: str

    @property
    def prompt(self) -> str:
        return chat(self.question)

    @property
    def even(self) -> bool:
        return self.number % 2 == 0


def read_topics(folder: Path) -> dict[str, str]:
    """Topic -> its name in English."""
    file = folder / "subjects.json"
    if not file.exists():
        return dict(zip(TOPICS, NAMES))
    return {topic: one["name"] for topic, one in json.loads(file.read_text()).items()}


def read_items(path: Path) -> list[Item]:
    items, group, number = [], "", 0
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            group, number = line[1:], 0
        elif line.strip():
            items.append(Item(group, number, *line.split("|")))
            number += 1
    return items


def read_texts(folder: Path, name: str) -> list[tuple[str, str]]:
    """(prompt, text that begins with it) of a topic."""
    return [(one["prompt"], one["text"]) for one in json.loads((folder / f"gen_{name}.json").read_text())]


def read_neighbours(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The same for what is near a topic, by topic, where it was written by hand; a topic without any has none."""
    near = json.loads((folder / "gen_near.json").read_text())
    return {topic: [(one["prompt"], one["text"]) for one in some] for topic, some in near.items()}


def running_text(path: Path) -> str:
    """WikiText as it was before it was tokenized."""
    text = path.read_text().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "unk")
    text = re.sub(r" ([,.;:!?\)\]])", r"\1", text)
    text = re.sub(r"([\(\[]) ", r"\1", text)
    return re.sub(r" '(s|re|t|ve|ll|d|m)\b", r"'\1", text)


def windows(tokenizer: Any, text: str, number: int, tokens: int = WINDOW) -> list[list[int]]:
    ids = tokenizer(text)["input_ids"]
    return [ids[i * tokens : (i + 1) * tokens] for i in range(min(number, len(ids) // tokens))]


@torch.inference_mode()
def answer_probabilities(model: Any, tokenizer: Any, items: Sequence[Item], batch_size: int = 16) -> torch.Tensor:
    """P(answer | question, prefix) of each item, float64. Inside ``unlearn`` with one entry for all."""
    found = torch.zeros(len(items), dtype=torch.float64)
    order = sorted(range(len(items)), key=lambda i: len(items[i].question))
    for start in range(0, len(items), batch_size):
        some = order[start : start + batch_size]
        heads = [tokenizer(items[i].prompt + items[i].prefix)["input_ids"] for i in some]
        whole = [tokenizer(items[i].prompt + items[i].prefix + items[i].answer)["input_ids"] for i in some]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in whole], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.int64) for row in whole], batch_first=True
        )
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, (i, head, full) in enumerate(zip(some, heads, whole)):
            said = logits[row, len(head) - 1 : len(full) - 1].double().log_softmax(-1)
            found[i] = said.gather(1, torch.tensor(full[len(head) :])[:, None]).sum().exp()
    return found


@torch.inference_mode()
def text_losses(model: Any, rows: Sequence[list[int]], batch_size: int = 4) -> torch.Tensor:
    """Nats per token of each window, float64; all windows are of one length."""
    losses = []
    for start in range(0, len(rows), batch_size):
        ids = torch.tensor(rows[start : start + batch_size])
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(1))
    return torch.cat(losses)


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, items: Sequence[Item], new_tokens: int = 24, batch_size: int = 20) -> list[str]:
    """What the model says greedily to each question, without the prefix."""
    said = []
    for start in range(0, len(items), batch_size):
        prompts = [item.prompt for item in items[start : start + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        said += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def share_said(items: Sequence[Item], texts: Sequence[str]) -> float:
    """How many of the texts hold their item's answer, as a share."""
    return sum(item.answer.strip().lower() in text.lower() for item, text in zip(items, texts)) / len(items)
