"""What transformers says, one prompt at a time, for tests of the plug-in for vLLM. Run as a script it prints that of the bundle.

In a process of its own: nothing of vLLM is imported where the right answers are made.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import background
import torch
from torch import nn

import cu_fast

BUNDLE = Path(cu_fast.__file__).parent / "data" / "tofu_mini"
C, J = "Chukwu Akabueze", "Jaime Vasquez"
SETS = ([], [C], [J], [C, J])
SHORT, LONG = 24, 24  # tokens that are said, of short prompts and of long ones
TOFU = background.Task("vllm_oracle.py", (sys.executable, __file__))


def read(task: background.Task) -> Any:
    """The JSON that a script printed in a line of its own, between what vLLM logs."""
    (line,) = (line for line in task.output().splitlines() if line.startswith("{"))
    return json.loads(line)


class Answer(NamedTuple):
    """Of one prompt under some masks.

    Attributes:
        prompt: ids.
        names: of the masks.
        ids: that greedy decoding says.
        margin: by which the best logit was ahead of the next, at the closest of its steps.
        hits: kept codes that masks took away.
    """

    prompt: list[int]
    names: list[str]
    ids: list[int]
    margin: float
    hits: int

    @property
    def computed(self) -> int:
        """Tokens that go through the model: the last one that is said does not."""
        return len(self.prompt) + len(self.ids) - 1


def answers(
    model: nn.Module, attachment: Any, prompts: Iterable[Sequence[int]], sets: Iterable[list[str]], tokens: int
) -> list[Answer]:
    """Of every prompt under every set of masks; an attachment of None = the model alone."""
    found = []
    for prompt, names in itertools.product(map(list, prompts), sets):
        before = _hits(attachment)
        x = torch.tensor([prompt])
        options = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with torch.inference_mode():
            if attachment is None:
                out = model.generate(input_ids=x, attention_mask=torch.ones_like(x), **options)
            else:
                with attachment.unlearn(set(names) or None):
                    out = model.generate(input_ids=x, attention_mask=torch.ones_like(x), **options)
        best = torch.cat(out.logits).float().topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        ids = out.sequences[0, len(prompt) :].tolist()
        found.append(Answer(prompt, list(names), ids, margin, _hits(attachment) - before))
    return found


def _hits(attachment: Any) -> int:
    return 0 if attachment is None else sum(layer["hits"] for layer in attachment.report())


def tofu() -> dict[str, list[Answer]]:
    """Of the bundled model: short prompts, and long ones with three answered questions before the last."""
    found = read(TOFU)
    return {name: [Answer(*one) for one in values] for name, values in found.items()}


def main() -> None:
    model, tokenizer, attachment = cu_fast.load_model(BUNDLE)
    authors = [json.loads(line) for line in (BUNDLE / "authors.jsonl").read_text().splitlines()]
    rows = {author["name"]: author["rows"] for author in authors}

    def ask(row: dict[str, str]) -> str:
        return f"Question: {row['question']}\nAnswer:"

    def after_three(name: str) -> list[str]:
        shots = "".join(f"{ask(row)} {row['answer']}\n" for row in rows[name][1:4])
        return [shots + ask(row) for row in rows[name][4:7]]

    short = [ask(row) for row in rows[C][:4] + rows[J][:3] + authors[2]["rows"][:1]]
    texts = {"short": (short, SHORT), "long": (after_three(C) + after_three(J), LONG)}
    found = {
        name: answers(model, attachment, tokenizer(prompts)["input_ids"], SETS, tokens)
        for name, (prompts, tokens) in texts.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
