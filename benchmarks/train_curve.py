"""Loss curves of the bundled model's bottleneck, trained anew: python benchmarks/train_curve.py --steps 60 --seeds 3.

The recipe of examples/tofu_mini/make.py ("frozen_below") on the bundled model's own authors, a fresh bottleneck in place
of the bundled one, with a constant learning rate, so that a shorter run is the start of a longer one. Every seed is
trained with

    reference      impl="reference", the first --reference-steps: a step takes it many times longer
    cpu            impl="cpu"
    embedding_bag  impl="cpu", and the sum of codes left to F.embedding_bag and its gradient

Prints each curve's distance from cpu's of the same seed, and how far seeds are apart.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cu_fast.cli import demo
from cu_fast.hf import attach
from cu_fast.hf.checkpoint import read_model
from cu_fast.nn import BottleneckConfig, training
from cu_fast.train import CodebookTrainer, Collator, UsageCallback, encode_row, freeze_below, seed_codes

LAYER = "model.layers.1"
BOTTLENECK = BottleneckConfig(d_model=192, code_dim=64, num_codes=16_384, k=8, activation="none", code_dropout=0.05)
WAYS = ("reference", "cpu", "embedding_bag")
OURS = training.gather_sum


def embedding_bag(ids: Tensor, weights: Tensor, codes: Tensor, impl: str) -> Tensor:
    return F.embedding_bag(ids.long().clamp(min=0), codes, per_sample_weights=weights, mode="sum")


def curve(way: str, seed: int, steps: int) -> Tensor:
    """The loss of every step: task and auxiliary, [steps]."""
    training.gather_sum = embedding_bag if way == "embedding_bag" else OURS
    model, tokenizer = read_model(demo.BUNDLE)
    authors = demo.load_bundle(demo.BUNDLE).authors
    rows = [
        encode_row(
            tokenizer,
            {"prompt": demo.prompt(row["question"]), "completion": demo.completion(row["answer"])},
            prompt_weight=0.3,
            max_length=512,
        )
        for author in authors
        for row in author.rows
    ]
    transformers.set_seed(seed)
    collate, generator = Collator(tokenizer.pad_token_id), torch.Generator().manual_seed(seed)
    attachment = attach(model, {LAYER: BOTTLENECK})
    attachment.bottlenecks[LAYER].impl = "reference" if way == "reference" else "cpu"
    seed_codes(attachment, rows[:: len(rows) // 512][:512], collate, 12, generator)
    freeze_below(attachment, collate(rows[:1]))
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=12, learning_rate=1e-3, warmup_steps=10,
            lr_scheduler_type="constant_with_warmup", adam_beta2=0.95, max_grad_norm=1.0, seed=seed, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
            train_sampling_strategy="group_by_length",
        )  # fmt: skip
        trainer = CodebookTrainer(
            attachment, 3e-3, model=model, args=settings, train_dataset=rows, data_collator=collate
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(UsageCallback(trainer, 60, 0.7, seed))
        trainer.args.remove_unused_columns = False
        trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--reference-steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    curves, started = {}, time.perf_counter()
    for seed in range(options.seeds):
        for way in WAYS:
            steps = min(options.steps, options.reference_steps) if way == "reference" else options.steps
            curves[way, seed] = curve(way, seed, steps)
            first, last = curves[way, seed][0], curves[way, seed][-10:].mean()
            print(
                f"{time.perf_counter() - started:6.0f} s  seed {seed}  {way:14} {steps} steps  loss {first:.3f} -> {last:.3f}",
                flush=True,
            )
    print(f"\n{'difference of the losses':36} {'steps':>6} {'mean':>10} {'largest':>10}")
    pairs = [((way, seed), ("cpu", seed)) for way in WAYS if way != "cpu" for seed in range(options.seeds)]
    pairs += [(("cpu", a), ("cpu", b)) for a, b in itertools.combinations(range(options.seeds), 2)]
    for (way, seed), (other, other_seed) in pairs:
        steps = min(len(curves[way, seed]), len(curves[other, other_seed]))
        apart = (curves[way, seed][:steps] - curves[other, other_seed][:steps]).abs()
        names = f"{way}, seed {seed} - {other}, seed {other_seed}"
        print(f"{names:36} {steps:6} {apart.mean():10.2e} {apart.max():10.2e}")


if __name__ == "__main__":
    main()
