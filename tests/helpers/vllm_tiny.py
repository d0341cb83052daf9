"""Tiny models with splices, saved for vLLM, and what transformers says under their masks. Run as a script it makes them.

It prints JSON: the folder, and the answers of each case. The masks are called a and b.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import background
import torch
from tiny_models import VOCABULARY, bottleneck_config, build
from tiny_saes import make_sae
from torch import nn
from vllm_oracle import Answer, answers, read

import cu_fast
from cu_fast.masks import Mask

TINY = background.Task("vllm_tiny.py", (sys.executable, __file__))
SETS = ([], ["a"], ["b"], ["a", "b"])
TOKENS = 12  # that are said
MARGIN = 1e-3  # of the logits, whose rounding is a thousandth of that
# What attention on a CPU takes: heads of 32.
CONFIGS = {"llama": {"head_dim": 32}, "gpt2": {"n_head": 1}, "gemma3": {"head_dim": 32}}
REPLACE, DELTA = "replace", "delta"
CASES = {
    "llama-replace": ("llama", {"model.layers.1": REPLACE}),
    "llama-delta": ("llama", {"model.layers.1": DELTA}),
    "llama-mlp-delta": ("llama", {"model.layers.1.mlp": DELTA}),
    "llama-three-layers": ("llama", {"model.layers.0": DELTA, "model.layers.1.mlp": REPLACE, "model.layers.2": REPLACE}),
    "gpt2-replace": ("gpt2", {"transformer.h.1": REPLACE}),
    "gpt2-delta": ("gpt2", {"transformer.h.1": DELTA}),
    "gemma3-replace": ("gemma3", {"model.layers.1": REPLACE}),
    "gemma3-delta": ("gemma3", {"model.layers.1": DELTA}),
}  # fmt: skip


class Case(NamedTuple):
    """A model and its attachment.

    Attributes:
        model: folder.
        attachment: folder.
        answers: of every prompt under each of SETS.
        all_positions: the same, where masks delete at the first position too.
        bare: the model alone, an answer per prompt.
    """

    model: Path
    attachment: Path
    answers: list[Answer]
    all_positions: list[Answer]
    bare: list[Answer]


def cases() -> dict[str, Case]:
    """What the script made."""
    found = read(TINY)
    folder, made = Path(found["folder"]), {}
    for name, (family, _) in CASES.items():
        lists = ([Answer(*one) for one in values] for values in found["cases"][name])
        made[name] = Case(folder / family, folder / name, *lists)
    return made


def attached(model: nn.Module, kinds: dict[str, str], prompts: list[list[int]], **options: Any) -> Any:
    """An attachment with random splices, and masks of what they use at the prompts."""
    torch.manual_seed(7)
    sources = {
        layer: bottleneck_config() if kind == REPLACE else make_sae(seed=5 + i)
        for i, (layer, kind) in enumerate(kinds.items())
    }
    attachment = cu_fast.attach(model, sources, **options)
    used: dict[str, list[torch.Tensor]] = {layer: [] for layer in kinds}
    layer_of = {id(splice): layer for layer, splice in attachment.bottlenecks.items()}

    def look(x, splice):
        ids = splice.select(x).ids if layer_of[id(splice)] in replaced else splice.active(x)
        used[layer_of[id(splice)]].append(ids[ids >= 0].flatten())

    replaced = {layer for layer, kind in kinds.items() if kind == REPLACE}
    with torch.no_grad(), attachment.unlearn(None), attachment.observe(look):
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]))
    for i, name in enumerate("ab"):
        masks = []
        for layer, splice in attachment.bottlenecks.items():
            ids = torch.cat(used[layer]).unique()[i::3]
            sae = sources[layer] if kinds[layer] == DELTA else None
            codes = {"sae": sae} if sae else {"num_codes": splice.config.num_codes}
            masks.append(Mask.from_ids(ids, topic=name, layer=layer, codebook_sha256=splice.codebook_sha256(), **codes))
        attachment.add_mask(masks)
    return attachment


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vllm-tiny-", dir=os.environ[background.FOLDER]))
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(5, 21, (16,), generator=generator).tolist()
    candidates = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    found = {}
    for family, config in CONFIGS.items():
        build(family, **config).save_pretrained(folder / family)
    for name, (family, kinds) in CASES.items():
        model = build(family, **CONFIGS[family])
        bare = answers(model, None, candidates, [[]], TOKENS)
        attachment = attached(model, kinds, candidates)
        attachment.save(folder / name)
        said = answers(model, attachment, candidates, SETS, TOKENS)
        attachment.detach()
        attachment = attached(model, kinds, candidates, skip_first=0)
        everywhere = answers(model, attachment, candidates, SETS, TOKENS)
        # Those prompts alone whose answers hang on no rounding.
        close = [min(a.margin for a in said if a.prompt == prompt) < MARGIN for prompt in candidates]
        kept = [prompt for prompt, is_close in zip(candidates, close) if not is_close]
        found[name] = [[a for a in group if a.prompt in kept] for group in (said, everywhere, bare)]
    print(json.dumps({"folder": str(folder), "cases": found}))


if __name__ == "__main__":
    main()
