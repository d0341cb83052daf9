"""Trains the translators that the study compares: python examples/translation/models.py DATA --output runs/translation

DATA holds train.tsv, valid.tsv and test.tsv, a line a pair: story<TAB>english<TAB>french. One seed's folder gets

base            a small encoder-decoder of T5's architecture, English to French, trained from scratch.
RECIPE          base with a codebook bottleneck behind its third encoder layer, trained further by that recipe.
RECIPE_plain    its twin: base, trained further just so, without the bottleneck. What the bottleneck costs is counted
                from here.

RECIPE is "frozen_below" or, with --recipe joint, the paper's "joint". Of the checkpoints of a training the one with the
best BLEU on validation sentences is kept. What is there already is kept; a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import scipy.sparse.linalg
import torch
import transformers
from corpus import TOPICS, Pair, deal, read, rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cu_fast import attach
from cu_fast import evaluate as ev
from cu_fast.hf.checkpoint import read_model, save_model
from cu_fast.nn import BottleneckConfig
from cu_fast.rows import Collator, encode_row
from cu_fast.train import freeze_below, train

VOCABULARY = 4096
SHAPE = dict(d_model=256, d_kv=64, d_ff=768, num_layers=4, num_decoder_layers=3, num_heads=4, dropout_rate=0.1)
LAYER = "encoder.block.2"
BOTTLENECK = BottleneckConfig(d_model=256, code_dim=256, num_codes=25_000, k=8, activation="none", code_dropout=0.05)
BASE = dict(
    num_train_epochs=12, per_device_train_batch_size=32, learning_rate=7e-4, warmup_steps=100, weight_decay=0.01
)
EMBEDDING_RATE = 1e-2  # T5's embedding starts ten and more times as large as its other weights
SECOND = dict(
    num_train_epochs=3, per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=200, weight_decay=0.0
)
CODEBOOK_RATE = 3e-3
SAVED = dict(save_steps=500, save_total_limit=6)  # of which one is chosen
MAX_LENGTH = 128  # tokens of a sentence, for training and in translations
VALIDATED = 300  # validation sentences that a checkpoint is chosen by


def autocast() -> torch.autocast:
    """All models alike, in training and in measurement."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def make_tokenizer(pairs: Sequence[Pair]) -> transformers.PreTrainedTokenizerFast:
    """One byte-level BPE for both languages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for pair in pairs for text in (pair.english, pair.french)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def aligned_embedding(tokenizer, pairs: Sequence[Pair], dim: int, seed: int) -> torch.Tensor:
    """Tokens of the same sentence pairs alike, of whichever language: latent semantic analysis across languages (Dumais
    et al., 1997). As T5's output embedding is its input embedding, to look at a word is nearly to translate it. [V, dim],
    entries of size 1, as T5's own start.
    """
    texts = [f"{pair.english} {pair.french}" for pair in pairs]
    found = [sorted(set(ids)) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pair_of = np.repeat(np.arange(len(found)), [len(ids) for ids in found])
    token_of = np.concatenate(found)
    frequency, length = np.bincount(token_of, minlength=len(tokenizer)), np.bincount(pair_of)
    # Rows of length 1: their products are how often two tokens meet, between 0 and 1. Then columns alike.
    values = 1 / np.sqrt(frequency[token_of])
    values /= np.sqrt(np.bincount(pair_of, values**2, minlength=len(length)))[pair_of]
    matrix = scipy.sparse.csr_matrix((values, (token_of, pair_of)), shape=(len(tokenizer), len(found)))
    draw = np.random.default_rng(seed)
    left, scale, _ = scipy.sparse.linalg.svds(matrix, dim, v0=draw.standard_normal(min(matrix.shape)))
    vectors = left * np.sqrt(scale)
    vectors[frequency == 0] = draw.standard_normal((int((frequency == 0).sum()), dim))
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * dim**0.5).float()


def make_model(tokenizer, pairs: Sequence[Pair], seed: int) -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(seed)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(tokenizer), pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=pad, **SHAPE
        )
    )
    with torch.no_grad():
        model.shared.weight.copy_(aligned_embedding(tokenizer, pairs, SHAPE["d_model"], seed))
    model.generation_config.no_repeat_ngram_size = 2  # what has learnt little stammers, and no topic ends that
    return model


def arguments(folder: Path, seed: int, **settings) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        max_grad_norm=1.0,
        seed=seed,
        logging_steps=100,
        report_to=[],
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        train_sampling_strategy="group_by_length",
        **SAVED | settings,
    )


def fit(model, tokenizer, split, folder: Path, seed: int, settings: dict, bottlenecks=None, **options):
    """Train, go on if it was begun, and keep the best checkpoint. Returns the attachment."""
    training = folder / "training"
    attachment, figures = train(
        model, tokenizer, rows(split["train"]), bottlenecks, arguments(training, seed, **settings),
        max_length=MAX_LENGTH, resume=any(training.glob("checkpoint-*")), **options,
    )  # fmt: skip
    print(figures, flush=True)
    keep_best(model, tokenizer, split["valid"][:VALIDATED], training)
    return attachment


def keep_best(model, tokenizer, pairs: Sequence[Pair], training: Path) -> None:
    """Load the checkpoint that translates the pairs best, by BLEU."""
    checkpoints = sorted(training.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    best = (-1.0, checkpoints[-1])
    for checkpoint in checkpoints:
        load(model, checkpoint)
        with autocast():
            answers = ev.generate(model, tokenizer, rows(pairs), MAX_LENGTH)
            scores = ev.score_answers(model, tokenizer, rows(pairs), MAX_LENGTH)
        bleu = ev.bleu(answers, [pair.french for pair in pairs])
        loss = -scores.log_prob.sum() / scores.tokens.sum()
        print(f"{checkpoint.name}: validation BLEU {100 * bleu:.2f}, {loss:.3f} nats a token", flush=True)
        best = max(best, (bleu, checkpoint), key=lambda pair: pair[0])
    load(model, best[1])


def load(model, checkpoint: Path) -> None:
    # Tied weights are in the file once, so names may be missing; none may be unknown.
    unknown = model.load_state_dict(safetensors.torch.load_file(checkpoint / "model.safetensors"), strict=False)[1]
    if unknown:
        raise ValueError(f"{checkpoint} holds {unknown[:3]}, which the model does not have")
    model.eval()


def train_base(split, folder: Path, seed: int) -> None:
    tokenizer = make_tokenizer(split["train"])
    model = make_model(tokenizer, split["train"], seed)
    fit(model, tokenizer, split, folder, seed, BASE, embedding_learning_rate=EMBEDDING_RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_codebook(split, base: Path, folder: Path, seed: int, recipe: str) -> None:
    model, tokenizer = read_model(base)
    attachment = fit(
        model, tokenizer, split, folder, seed, SECOND, {LAYER: BOTTLENECK},
        recipe=recipe, codebook_learning_rate=CODEBOOK_RATE,
    )  # fmt: skip
    save_model(attachment, tokenizer, folder)


def train_plain(split, base: Path, folder: Path, seed: int, recipe: str) -> None:
    model, tokenizer = read_model(base)
    if recipe == "frozen_below":  # just the parameters that are frozen in the other
        attachment = attach(model, {LAYER: BOTTLENECK})
        batch = [encode_row(tokenizer, row, 1.0, MAX_LENGTH) for row in rows(split["train"][:1])]
        freeze_below(attachment, Collator(tokenizer.pad_token_id)(batch))
        attachment.detach()
    fit(model, tokenizer, split, folder, seed, SECOND)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train.tsv, valid.tsv and test.tsv")
    parser.add_argument("--output", type=Path, default=Path("runs/translation"))
    parser.add_argument("--recipe", choices=("frozen_below", "joint"), default="frozen_below")
    parser.add_argument(
        "--stages", default="base,codebook,plain", help="which, in this order; codebook and plain may run side by side"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split = deal(read(options.data), TOPICS.values())
    print({name: len(pairs) for name, pairs in split.items()}, flush=True)
    folder, recipe, seed = options.output / f"seed-{options.seed}", options.recipe, options.seed
    base, plain, codebook = folder / "base", folder / f"{recipe}_plain", folder / recipe
    stages = {
        "base": (base, base / "tokenizer.json", lambda: train_base(split, base, seed)),
        "codebook": (codebook, codebook / "codebook", lambda: train_codebook(split, base, codebook, seed, recipe)),
        "plain": (plain, plain / "tokenizer.json", lambda: train_plain(split, base, plain, seed, recipe)),
    }
    for stage in options.stages.split(","):
        place, done, step = stages[stage]
        if done.exists():
            print(f"{place.name}: done before", flush=True)
            continue
        started = time.perf_counter()
        step()
        shutil.rmtree(place / "training")
        print(f"{place.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
