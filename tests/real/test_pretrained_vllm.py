"""SmolLM2-135M-Instruct in vLLM, as it is, with four topics deleted for different requests of one batch.

Folders by environment variables; without them these tests skip.

CU_FAST_SMOLLM2   SmolLM2-135M-Instruct (examples/smollm2/model.py)
CU_FAST_SAE       an autoencoder of its layer 8
CU_FAST_TOPICS    questions and texts, as examples/smollm2/topics.py describes them
CU_FAST_TEXTS     a text file to count on: WikiText-2
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import torch
import vllm_inside
from scripts import scripts
from transformers import AutoModelForCausalLM, AutoTokenizer

import cu_fast
from cu_fast.unlearn import count_codes

LAYER = "model.layers.8"
# Minimum enrichment and strength, as the study chose them without a gate.
SETTINGS = {"solar": (3.0, 2.0), "potter": (3.0, 8.0), "ww2": (2.0, 4.0), "france": (2.0, 4.0)}
SETS = ([], ["solar"], ["potter"], ["ww2"], ["france"], ["france", "potter"])
PER_TOPIC, TOKENS = 6, 24
TEXTS, WINDOWS = 40, 24  # of each topic, and of running text, to count on


def real(name: str) -> Path:
    if name not in os.environ:
        pytest.skip(f"{name} names no folder")
    return Path(os.environ[name])


def load(dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(real("CU_FAST_SMOLLM2"), dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(real("CU_FAST_SMOLLM2"))
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def topics():
    patch = pytest.MonkeyPatch()
    for modules in scripts(patch, "smollm2", "topics"):
        yield modules["topics"]
    patch.undo()


@pytest.fixture(scope="module")
def prompts(tokenizer, topics) -> list[list[int]]:
    """Questions with odd numbers, PER_TOPIC of each topic in turn."""
    items = topics.read_items(real("CU_FAST_TOPICS") / "items.txt")
    asked = [[item.prompt for item in items if item.group == name and not item.even][:PER_TOPIC] for name in SETTINGS]
    return tokenizer([prompt for prompts in zip(*asked) for prompt in prompts])["input_ids"]


@pytest.fixture(scope="module")
def attached(tokenizer, topics, tmp_path_factory):
    """A model in fp32 with its attachment, and the folder of that."""
    model = load(torch.float32)
    attachment = cu_fast.attach(model, {LAYER: real("CU_FAST_SAE")})
    texts = {
        name: [text for _, text in topics.read_texts(real("CU_FAST_TOPICS"), name)[:TEXTS]]
        for name in (*SETTINGS, "general")
    }
    wiki = topics.windows(tokenizer, topics.running_text(real("CU_FAST_TEXTS")), WINDOWS)
    texts["wikitext"] = [tokenizer.decode(ids) for ids in wiki]
    counts = {
        name: count_codes(attachment, tokenizer, some, layer=None, name=name, progress=False)
        for name, some in texts.items()
    }
    for name, (enrichment, strength) in SETTINGS.items():
        control = sum_of([counts[other] for other in counts if other != name])
        found = cu_fast.find_mask(attachment, tokenizer, counts[name], control, topic=name, min_enrichment=enrichment,
                                  progress=False)  # fmt: skip
        attachment.add_mask(found.mask.with_strength(strength))
    folder = tmp_path_factory.mktemp("smollm2") / "attachment"
    attachment.save(folder)
    return model, attachment, folder


def sum_of(parts):
    added = {name: sum(getattr(part, name) for part in parts) for name in ("counts", "tokens")}
    return dataclasses.replace(parts[0], **added)


@pytest.fixture(scope="module")
def requests(prompts) -> list[tuple[list[int], list[str]]]:
    """Every prompt with every set, in one batch: neighbours have other masks."""
    return [(prompt, names) for prompt in prompts for names in SETS]


@pytest.fixture(scope="module")
def oracle(attached, tokenizer, requests) -> list[list[int]]:
    """What transformers says to each request, greedily."""
    model, attachment, _ = attached
    said: list = [None] * len(requests)
    for names in SETS:
        mine = [i for i, request in enumerate(requests) if request[1] == names]
        inputs = tokenizer.pad({"input_ids": [requests[i][0] for i in mine]}, return_tensors="pt")
        with attachment.unlearn(set(names) or None), torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        for i, row in zip(mine, ids[:, inputs["input_ids"].shape[1] :].tolist()):
            said[i] = row
    return [until_end(row, tokenizer.eos_token_id) for row in said]


def until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


class Judge:
    """How far fp32 is from fp64, and how close a choice of the oracle was."""

    def __init__(self, attached) -> None:
        self.model, self.attachment, folder = attached
        self.wide = load(torch.float64)
        self.wide_attachment = cu_fast.attach(self.wide, folder)
        (splice,) = self.wide_attachment.bottlenecks.values()
        inner = splice.forward

        def forward(x, *args):
            narrow = x.float()
            return x + (inner(narrow, *args).double() - narrow.double())

        splice.forward = forward

    @torch.inference_mode()
    def logits(self, ids: list[int], names: list[str], wide: bool) -> torch.Tensor:
        """fp64 [tokens, vocabulary]."""
        model, attachment = (self.wide, self.wide_attachment) if wide else (self.model, self.attachment)
        with attachment.unlearn(set(names) or None):
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()

    def loss(self, ids: list[int], names: list[str], start: int) -> float:
        """The most that a logit loses in fp32, from a token on."""
        return float((self.logits(ids, names, False) - self.logits(ids, names, True))[start:].abs().max())

    def margin(self, ids: list[int], names: list[str]) -> float:
        best = self.logits(ids, names, False)[-1].topk(2).values
        return float(best[0] - best[1])


@pytest.fixture(scope="module")
def engines(attached):
    """vLLM alone, and with the attachment."""
    folder = real("CU_FAST_SMOLLM2")
    options = {"max_num_seqs": 256, "max_model_len": 256, "kv_cache_memory_bytes": 512 * vllm_inside.MIB}
    bare = vllm_inside.engine(folder, None, **options)
    served = vllm_inside.engine(folder, {"attachment": str(attached[2])}, **options)
    yield bare, served
    vllm_inside.close(bare)
    vllm_inside.close(served)


def test_requests_of_one_batch_say_what_transformers_says(engines, attached, requests, oracle):
    """An answer may leave the oracle's only where two tokens are as close as fp32 is to fp64, in both implementations."""
    _, served = engines
    prompts, names = zip(*requests)
    said = vllm_inside.ids_of(vllm_inside.say(served, prompts, names, TOKENS))
    judge, differ = Judge(attached), 0
    for (prompt, masks), mine, right in zip(requests, said, oracle):
        if mine == right:
            continue
        differ += 1
        step = next(i for i, (a, b) in enumerate(zip(mine, right)) if a != b)
        prefix = prompt + right[:step]
        margin, loss = judge.margin(prefix, masks), judge.loss(prefix, masks, len(prompt) - 1)
        print(f"{masks}: differs at step {step} of {len(right)}, margin {margin:.2e}, fp32 loses {loss:.2e}")
        assert margin <= 2 * loss, (masks, step)  # each of the two logits may be off by that much
    print(f"{len(requests) - differ} of {len(requests)} answers have equal ids")
    assert differ <= len(requests) // 20
    for topic in SETTINGS:  # the masks are no empty ones
        plain = [ids for (_, masks), ids in zip(requests, said) if masks == []]
        masked = [ids for (_, masks), ids in zip(requests, said) if masks == [topic]]
        assert sum(a != b for a, b in zip(plain, masked)) >= len(plain) // 4


def test_with_nothing_held_vllm_is_as_it_was(engines, prompts):
    """Bit for bit: the same batch in an engine without the plug-in has the same logits, all of them."""
    bare, served = engines
    before, ids = logits_of(bare, prompts, None)
    after, same = logits_of(served, prompts, [])
    assert ids == same
    assert len(before) == len(after) >= TOKENS and all(map(torch.equal, before, after))
    held, _ = logits_of(served, prompts, ["france"])
    assert not any(map(torch.equal, before, held)), "the comparison sees a mask"


def logits_of(llm, prompts: list[list[int]], names: list[str] | None) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Of each step the logits of all requests, and what is said. A batch of the same prompts has the same steps."""
    found: list[torch.Tensor] = []
    (model,) = llm.apply_model(lambda model: model)
    compute = type(model).compute_logits

    def compute_logits(*args, **kwargs):
        logits = compute(model, *args, **kwargs)
        found.append(logits.clone())
        return logits

    model.compute_logits = compute_logits
    llm.reset_prefix_cache()
    ids = vllm_inside.ids_of(vllm_inside.say(llm, prompts, [names] * len(prompts), TOKENS))
    del model.compute_logits
    return found, ids
