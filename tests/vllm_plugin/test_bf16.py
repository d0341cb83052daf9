"""In bf16, answers of vLLM and of transformers part at choices that bf16 cannot tell apart, with and without splices.

The two round at other places: vLLM 0.32 adds a block's residual in its norm, and multiplies in other kernels. So the answers of
the plain model part too. What a splice is given then differs; given the same, it does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import torch
import vllm_inside
from transformers import AutoModelForCausalLM, AutoTokenizer

import cu_fast

BUNDLE = Path(cu_fast.__file__).parent / "data" / "tofu_mini"
C, J = "Chukwu Akabueze", "Jaime Vasquez"
LAYER = "model.layers.1"
PROMPTS, TOKENS = 12, 32
SETS = {"plain": None, "nothing": [], "one": [C], "two": [C, J]}


@dataclasses.dataclass
class Parting:
    """The first step at which two answers differ.

    Attributes:
        margin: fp32's, between the two tokens that are said there.
        loss: what the two said tokens' difference loses in bf16 at that step, in transformers.
    """

    margin: float
    loss: float


@dataclasses.dataclass
class Found:
    """Of a set of masks.

    Attributes:
        equal: answers.
        partings: of the others.
        losses: fp32 [steps], how much of fp32's margin between the best two tokens bf16 loses in transformers, at every step
            of its answers.
        passes: (x, y) of every step of the layer in vLLM.
    """

    equal: int
    partings: list[Parting]
    losses: torch.Tensor
    passes: list[tuple[torch.Tensor, torch.Tensor]]


def prompts(count: int = PROMPTS) -> list[list[int]]:
    lines = (BUNDLE / "authors.jsonl").read_text().splitlines()
    rows = {author["name"]: author["rows"] for author in map(json.loads, lines)}
    some = [row for pair in zip(rows[C], rows[J], *(rows[name] for name in list(rows)[2:4])) for row in pair][:count]
    return AutoTokenizer.from_pretrained(BUNDLE)([f"Question: {row['question']}\nAnswer:" for row in some])["input_ids"]


class Transformers:
    """The bundled model in bf16 and in fp32, with its splice or without."""

    def __init__(self, spliced: bool) -> None:
        self.attachments = {}
        self.models = {}
        for dtype in (torch.bfloat16, torch.float32):
            if spliced:
                self.models[dtype], _, self.attachments[dtype] = cu_fast.load_model(BUNDLE, dtype)
            else:
                self.models[dtype] = AutoModelForCausalLM.from_pretrained(BUNDLE, dtype=dtype).eval()

    def under(self, dtype: torch.dtype, names: list[str] | None):
        return contextlib.nullcontext() if names is None else self.attachments[dtype].unlearn(set(names) or None)

    def say(self, asked: list[list[int]], names: list[str] | None, tokens: int) -> list[list[int]]:
        with self.under(torch.bfloat16, names):
            return vllm_inside.greedy(self.models[torch.bfloat16], asked, tokens)

    @torch.inference_mode()
    def logits(self, dtype: torch.dtype, ids: list[int], names: list[str] | None) -> torch.Tensor:
        """fp32 [tokens, vocabulary]"""
        with self.under(dtype, names):
            return self.models[dtype](input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@contextlib.contextmanager
def recorded(passes: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Adds what a layer is given and what leaves it, each the sum that the next norm reads, of the tokens of each step."""
    from cu_fast.vllm.served import ServedLayer

    original = ServedLayer.__call__

    def call(self, hidden, residual):
        tokens = self.served.tokens
        x = (hidden + residual)[:tokens]
        original(self, hidden, residual)
        passes.append((x, (hidden + residual)[:tokens]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServedLayer, "__call__", call)
        yield


def compare(llm, oracle: Transformers, asked: list[list[int]], names: list[str] | None, tokens: int = TOKENS) -> Found:
    """What vLLM says in bf16 against what transformers does."""
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    with recorded(passes):
        said = vllm_inside.ids_of(vllm_inside.say(llm, asked, [names] * len(asked), tokens))
    right = oracle.say(asked, names, tokens)
    partings, losses = [], []
    for prompt, mine, theirs in zip(asked, said, right):
        ids, begin = prompt + theirs, len(prompt) - 1
        narrow, wide = (oracle.logits(dtype, ids[:-1], names)[begin:] for dtype in (torch.bfloat16, torch.float32))
        best = wide.topk(2).indices
        losses.append((narrow - wide).gather(1, best).diff(dim=1)[:, 0].abs())
        if mine != theirs:
            step = next(i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b)
            a, b = mine[step], theirs[step]
            parting = (wide[step, a] - wide[step, b]).abs(), ((narrow - wide)[step, a] - (narrow - wide)[step, b]).abs()
            partings.append(Parting(*map(float, parting)))
    return Found(len(asked) - len(partings), partings, torch.cat(losses), passes)


@pytest.fixture(scope="module")
def oracles():
    return {False: Transformers(False), True: Transformers(True)}


@pytest.fixture(scope="module")
def engines():
    made = {spliced: vllm_inside.engine(BUNDLE, {} if spliced else None, dtype="bfloat16") for spliced in (False, True)}
    yield made
    for llm in made.values():
        vllm_inside.close(llm)


@pytest.mark.parametrize("which", SETS)
def test_answers_part_where_bf16_cannot_tell_two_tokens_apart(engines, oracles, which):
    names = SETS[which]
    spliced = names is not None
    found = compare(engines[spliced], oracles[spliced], prompts(), names)
    print(
        which, found.equal, [(round(one.margin, 4), round(one.loss, 4)) for one in found.partings], found.losses.max()
    )
    for parting in found.partings:
        assert parting.margin <= found.losses.max()


@pytest.mark.parametrize("which", ["nothing", "two"])
def test_the_splice_does_the_same_with_the_same_activations(engines, oracles, which):
    names = SETS[which]
    found = compare(engines[True], oracles[True], prompts(4), names, 8)
    attachment = oracles[True].attachments[torch.bfloat16]
    splice = attachment.bottlenecks[LAYER]
    bits = torch.zeros_like(attachment.masks[C][0].bits)
    for name in names:
        bits |= attachment.masks[name][0].bits
    assert len(found.passes) == 8
    for x, y in found.passes:
        assert x.dtype == torch.bfloat16
        rows = torch.zeros(len(x), dtype=torch.int32)
        assert torch.equal(splice(x, bits[None], rows) if names else splice(x), y)
