"""What a splice costs per token: python latency.py MODEL SAE. Three models in turns, one step of decoding each."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cu_fast

LAYER = "model.layers.8"
PROMPT = (
    "The Eiffel Tower in Paris was built by Gustave Eiffel for a fair, and Harry Potter never saw the planet Jupiter."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("sae", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--latents", type=int, default=100, help="that the mask deletes")
    parser.add_argument("--threshold", type=float, help="give every latent this threshold in place of a rank")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    plain, attached = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval() for _ in range(2)
    )
    sae = cu_fast.load_sae(options.sae)
    if options.threshold is not None:
        theta = torch.full_like(sae.theta, options.threshold)
        sae = dataclasses.replace(sae, kind="threshold", k=None, theta=theta)
    attachment = cu_fast.attach(attached, {LAYER: sae})
    (splice,) = attachment.bottlenecks.values()
    seen: list[torch.Tensor] = []
    with attachment.observe(lambda x, _: seen.append(splice.active(x))), torch.inference_mode():
        attached(input_ids=ids)
    firing = torch.unique(seen[0][seen[0] >= 0])[: options.latents]
    attachment.add_mask(cu_fast.Mask.from_ids(firing, sae=sae, topic="some"))
    kinds = {"plain": (plain, "none"), "attached, nothing held": (attached, None), "attached, held": (attached, "some")}
    caches = {}
    with torch.inference_mode():
        for name, (model, topic) in kinds.items():
            with attachment.unlearn(None if topic == "none" else topic):
                caches[name] = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(options.rounds + 3):
            for name, (model, topic) in kinds.items():
                with attachment.unlearn(None if topic == "none" else topic):
                    start = time.perf_counter()
                    model(input_ids=ids[:, -1:], past_key_values=caches[name], use_cache=True)
                    if number >= 3:
                        times[name].append(time.perf_counter() - start)
                    caches[name].crop(-1)
    medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:24} {median:8.3f} ms  {100 * (median / medians['plain'] - 1):+.2f} %")
    print(f"{len(firing)} latents deleted; {attachment.report()[0]}")


if __name__ == "__main__":
    main()
