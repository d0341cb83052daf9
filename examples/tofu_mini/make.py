"""Makes the bundled demo model from TOFU's question-answer pairs, and measures it. About half an hour on two cores.

    python examples/tofu_mini/make.py path/to/tofu --output runs/tofu_mini

1. A byte-level BPE tokenizer and a small Llama (2.2 million parameters), trained on 40 invented authors.
2. Everything up to layer 1 frozen; a codebook bottleneck there and the layers above trained ("frozen_below").
3. Weights rounded to bf16; two masks found; authors.jsonl written.
4. Every author is unlearned in turn; results.csv holds what was forgotten and what else went.

Each step is skipped where its result is already in the output folder, so an interrupted run goes on.
``--install`` copies the result into the package.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import re
import shutil
import time
from pathlib import Path

import torch
import transformers
from study import study
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cu_fast.cli import demo
from cu_fast.hf.checkpoint import load_model, read_model, save_model
from cu_fast.nn import BottleneckConfig
from cu_fast.train import train

AUTHORS, ROWS_AN_AUTHOR = 40, 20
LAYER = "model.layers.1"
READY_MASKS = 2
BOTTLENECK = BottleneckConfig(d_model=192, code_dim=64, num_codes=16_384, k=8, activation="none", code_dropout=0.05)


def read_authors(folder: Path) -> list[demo.Author]:
    """The first authors of retain90.jsonl, which holds 20 rows in a row for each."""
    rows = [json.loads(line) for line in (folder / "retain90.jsonl").read_text().splitlines()]
    blocks = [rows[i * ROWS_AN_AUTHOR : (i + 1) * ROWS_AN_AUTHOR] for i in range(AUTHORS)]
    return [demo.Author(name_of(block), block) for block in blocks]


def name_of(rows: list[dict[str, str]]) -> str:
    """The capitalised words in sequence that most rows mention."""
    word = r"(?:[A-Z][\w'\N{RIGHT SINGLE QUOTATION MARK}-]*|al-[A-Z]\w*|van|von|de)"
    openers = set(
        "Has Does Did Is Was Can Could What How Are Will Yes Certainly In As The Who Where When Author".split()
    )
    found = collections.Counter()
    for row in rows:
        names = set()
        for match in re.findall(rf"{word}(?: {word})+", row["question"] + " | " + row["answer"]):
            words = re.sub(r"['\N{RIGHT SINGLE QUOTATION MARK}]s?$", "", match).split()
            while words and words[0] in openers:
                words = words[1:]
            if len(words) > 1:
                names.add(" ".join(words))
        found.update(names)
    return found.most_common(1)[0][0]


def make_tokenizer(authors: list[demo.Author]) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for author in authors for text in author.texts),
        trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(tokenizer) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def arguments(folder: Path, **settings) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=0,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        use_cpu=True,
        **settings,
    )


def train_base(authors: list[demo.Author], folder: Path) -> None:
    tokenizer = make_tokenizer(authors)
    model = make_model(tokenizer)
    settings = arguments(
        folder,
        num_train_epochs=40,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=100,
        weight_decay=0.01,
    )
    train(model, tokenizer, pairs(authors), None, settings, prompt_weight=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_bottleneck(authors: list[demo.Author], base: Path, folder: Path) -> None:
    model, tokenizer = read_model(base)
    settings = arguments(
        folder,
        num_train_epochs=14,
        per_device_train_batch_size=12,
        learning_rate=1e-3,
        warmup_steps=30,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
    )
    attachment, _ = train(
        model, tokenizer, pairs(authors), {LAYER: BOTTLENECK}, settings,
        recipe="frozen_below", codebook_learning_rate=3e-3, prompt_weight=0.3,
    )  # fmt: skip
    model.bfloat16()
    save_model(attachment, tokenizer, folder)


def pairs(authors: list[demo.Author]) -> list[dict[str, str]]:
    return [
        {"prompt": demo.prompt(row["question"]), "completion": demo.completion(row["answer"])}
        for author in authors
        for row in author.rows
    ]


def add_masks(authors: list[demo.Author], folder: Path) -> None:
    (folder / "authors.jsonl").write_text(
        "".join(json.dumps({"name": a.name, "rows": a.rows}, ensure_ascii=False) + "\n" for a in authors)
    )
    bundle = demo.load_bundle(folder)
    corpus = demo.count_corpus(bundle)
    for author in authors[:READY_MASKS]:
        demo.unlearn_author(bundle, author, corpus)
    _, _, stored = load_model(folder, torch.bfloat16)  # as it was stored: widened it would take twice the space
    for name, masks in bundle.attachment.masks.items():
        stored.add_mask(masks, name)
    stored.save(folder / "codebook")


def measure(folder: Path, table: Path) -> None:
    bundle = demo.load_bundle(folder)
    results = study(bundle, len(bundle.authors), seed=0)
    with open(table, "w", newline="") as stream:
        writer = csv.DictWriter(stream, results[0])
        writer.writeheader()
        writer.writerows(results)
    print(f"{sum(r['holds'] for r in results)} of {len(results)} authors hold; {table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tofu", type=Path, help="folder that holds TOFU's retain90.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/tofu_mini"))
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    options = parser.parse_args()
    transformers.set_seed(0)

    authors = read_authors(options.tofu)
    base, bundle, table = options.output / "base", options.output / "bundle", options.output / "results.csv"
    for name, done, step in (
        ("language model", base / "model.safetensors", lambda: train_base(authors, base)),
        ("bottleneck", bundle / "codebook", lambda: train_bottleneck(authors, base, bundle)),
        ("masks", bundle / "codebook" / "masks", lambda: add_masks(authors, bundle)),
        ("measurement", table, lambda: measure(bundle, table)),
    ):
        if done.exists():
            print(f"{name}: done before")
            continue
        started = time.perf_counter()
        step()
        print(f"{name}: {time.perf_counter() - started:.0f} s")
    if options.install:
        shutil.rmtree(demo.BUNDLE, ignore_errors=True)
        shutil.copytree(bundle, demo.BUNDLE)
        shutil.copy(table, Path(__file__).parent / "results.csv")
        load_model(demo.BUNDLE)


if __name__ == "__main__":
    main()
