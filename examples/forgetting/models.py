"""Fine-tunes SmolLM2-135M-Instruct on TOFU: python models.py path/to/SmolLM2 path/to/tofu --output runs/forgetting

full        all 4,000 question-answer pairs: the model that is to forget.
retain99    without forget01; retain95, without forget05; retain90, without forget10: the gold models, which never saw it.

All weights are trained, on answers only, five epochs, as TOFU does it; the rate suits a model of this size. A training that
was interrupted goes on where it was, and a model that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers

from cu_fast.train import train

MODELS = {"full": None, "retain99": "forget01", "retain90": "forget10", "retain95": "forget05"}
EPOCHS, BATCH, RATE = 5, 16, 3e-4


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def prompt(question: str) -> str:
    """The model's chat format, without a system message."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def row(question: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt(question), "completion": answer}


def training_rows(folder: Path, left_out: str | None) -> list[dict[str, str]]:
    gone = {entry["question"] for entry in read(folder, left_out)} if left_out else set()
    entries = read(folder, "retain90") + read(folder, "forget10")
    return [row(entry["question"], entry["answer"]) for entry in entries if entry["question"] not in gone]


def finetune(base: Path, rows: list[dict[str, str]], folder: Path, seed: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    steps = len(rows) // BATCH
    settings = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=steps // 2, weight_decay=0.01, max_grad_norm=1.0, seed=seed, bf16=True,
        logging_steps=50, save_steps=steps, save_total_limit=1, report_to=[], dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="group_by_length",
    )  # fmt: skip
    begun = any(folder.glob("checkpoint-*"))
    _, figures = train(model, tokenizer, rows, None, settings, prompt_weight=0.0, resume=begun)
    print(figures)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of SmolLM2-135M-Instruct: see examples/smollm2/model.py")
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--models", default="full,retain99,retain90", help=f"which of {', '.join(MODELS)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.models.split(","):
        folder = options.output / f"{name}-{options.seed}"
        if (folder / "model.safetensors").exists():
            print(f"{name}: done before", flush=True)
            continue
        started = time.perf_counter()
        finetune(options.base, training_rows(options.tofu, MODELS[name]), folder, options.seed)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
