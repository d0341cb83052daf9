"""Trains the fine-tuned model with a bottleneck in it: python bottleneck.py path/to/tofu path/to/wikitext2 --output runs/forgetting

CodeUnlearn (Wu et al., arXiv 2410.10866): what leaves a layer becomes what the kept codes decode to, and nothing flows round
them. The paper trains a model with its bottleneck from the start, on one task. Here

model       the fine-tuned one (full-SEED of models.py), one more epoch over the same 4,000 pairs
codes       those of the delta codebook, fitted to the model as it was (codes.py): the bottleneck starts as good as they are
frozen      what runs below the bottleneck, so that codes keep what they are fitted to; the bottleneck and all above it learn
the loss    on answers, and the bottleneck's own: reconstruction, commitment and codebook terms

Written is a model folder that cu_fast.hf.load_model reads. A training that was interrupted goes on from its last
checkpoint, one per half epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import codes
import models
import torch
import transformers

import cu_fast
from cu_fast.hf.checkpoint import save_model
from cu_fast.nn import CodebookBottleneck
from cu_fast.rows import Collator, encode_row
from cu_fast.train import CodebookTrainer, freeze_below

EPOCHS, BATCH, RATE, CODES_RATE = 1, 16, 2e-4, 6e-4
OUTLIER = 3.0  # median lengths


@torch.no_grad()
def give_codes(bottleneck: CodebookBottleneck, x: torch.Tensor) -> None:
    """Give rows that codes were not fitted to codes of their own, in place: k each, of those that write least.

    Args:
        x: [n, D], much longer than all that codes were fitted to.
    """
    codebook, autoencoder, k = bottleneck.codebook.codes, bottleneck.autoencoder, bottleneck.k
    x = x / bottleneck.rms
    z = autoencoder.encode(x)
    spare = codebook.norm(dim=1).argsort()[: len(x) * k]
    codebook[spare] = (z / k).repeat_interleave(k, 0)
    # What the decoder has no direction for; rows that are not as long move little by it.
    autoencoder.W_dec += (torch.linalg.pinv(z) @ (x - autoencoder.decode(z))).T


@torch.inference_mode()
def sinks(attachment: cu_fast.Attachment, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """Long rows [n, D] at the start that all texts share: attention sinks, which fitting leaves out."""
    columns = zip(*(row["input_ids"] for row in rows))
    shared = len(list(itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)))
    seen: list[torch.Tensor] = []
    with attachment.unlearn(None), attachment.observe(lambda x, _: seen.append(x[0])):
        attachment.model(input_ids=torch.tensor([rows[0]["input_ids"]]))
    lengths = seen[0].norm(dim=1)
    return seen[0][:shared][lengths[:shared] > OUTLIER * lengths.median()].clone()


def train(model, tokenizer, rows: list[dict[str, str]], fitted: Path, folder: Path, seed: int) -> dict[str, float]:
    """Train a model with a bottleneck that starts at fitted codes, and write both to a folder.

    Args:
        model: fp32, in evaluation mode; it is changed.
        rows: prompts and completions.
        fitted: codes of the model, as :func:`codes.fitted` wrote them.
        folder: for checkpoints, and the model at the end.

    Returns:
        The last figures of the training.
    """
    attachment = cu_fast.attach(model, fitted, splice="replace")
    (bottleneck,) = attachment.bottlenecks.values()
    bottleneck.config = dataclasses.replace(bottleneck.config, normalize=False)  # the scale stays as it was fitted
    encoded = [encode_row(tokenizer, row, 0.0, 512) for row in rows]
    collate = Collator(tokenizer.pad_token_id)
    give_codes(bottleneck, sinks(attachment, encoded))
    freeze_below(attachment, collate(encoded[:1]))
    half = max(1, len(rows) // BATCH // 2)
    settings = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=min(20, half), weight_decay=0.0, max_grad_norm=1.0, seed=seed, bf16=True,
        logging_steps=10, save_steps=half, save_total_limit=1, report_to=[], dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="group_by_length", remove_unused_columns=False,
    )  # fmt: skip
    trainer = CodebookTrainer(
        attachment, CODES_RATE, model=model, args=settings, train_dataset=encoded, data_collator=collate
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    save_model(attachment, tokenizer, folder)
    return next(log for log in reversed(trainer.state.log_history) if "task_loss" in log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("wikitext", type=Path, help="folder of WikiText-2")
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting"), help="holds the fine-tuned model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, full = (options.output / f"{name}-{options.seed}" for name in ("bottleneck", "full"))
    if (folder / "model.safetensors").exists():
        print("bottleneck: done before", flush=True)
        return
    started = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(full)
    model = transformers.AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16).eval()
    entries = [entry for name in ("retain90", "forget10") for entry in models.read(options.tofu, name)]
    text = codes.running_text(tokenizer, options.wikitext / "valid.txt", codes.RUNNING_TEXT)
    fitted = options.output / f"codebook-{options.seed}"
    codes.fitted(model, tokenizer, entries, text, fitted, "codebook")
    model = transformers.AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32, attn_implementation="eager")
    print(train(model.eval(), tokenizer, models.training_rows(options.tofu, None), fitted, folder, options.seed))
    print(f"bottleneck: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
