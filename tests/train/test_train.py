"""Training: both recipes learn, what should stay frozen does, a run resumes where it stopped, ranks agree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from tiers import heavy
from tiny_training import CONFIG, LAYERS, ROWS, arguments

from cu_fast.hf.checkpoint import load_model
from cu_fast.train import CodebookTrainer, Collator, encode_row, freeze_below, seed_codes, train, weighted_loss


@pytest.mark.parametrize(("recipe", "reached"), [("joint", 2.4), ("frozen_below", 2.7)])
def test_a_recipe_learns(model, tokenizer, tmp_path, recipe, reached):
    """What is below is random here, so freezing it leaves less to learn with."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = arguments(tmp_path, num_train_epochs=24)
    attachment, _ = train(model, tokenizer, ROWS, LAYERS, settings, recipe=recipe, prompt_weight=0.0, reseed_every=5)
    bottleneck = attachment.bottlenecks["model.layers.1"]
    after = model.state_dict()
    unchanged = {name for name, value in before.items() if torch.equal(after[name], value)}
    below = {n for n in before if n.startswith(("model.layers.0", "model.layers.1", "model.embed_tokens", "lm_head"))}
    assert unchanged == (below if recipe == "frozen_below" else set())
    assert not model.training and float(bottleneck.rms) != 1.0

    batch = Collator(tokenizer.pad_token_id)([encode_row(tokenizer, row, 0.0, 99) for row in ROWS])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = weighted_loss(logits, batch["labels"], batch["loss_weights"], shift=True)
    assert loss < reached  # log(25) = 3.2 before


def test_the_log_holds_every_term_and_the_use_of_codes(model, tokenizer, tmp_path):
    # With what is below frozen, codes have something fixed to learn: whatever the seed, they come near.
    settings = arguments(tmp_path)
    _, figures = train(model, tokenizer, ROWS, LAYERS, settings, recipe="frozen_below", reseed_every=3)
    assert {"task_loss", "reconstruction", "commitment", "codebook", "l1", "codes_used", "code_perplexity"} <= set(
        figures
    )
    assert 0 < figures["codes_used"] <= 1 and figures["reconstruction"] < 1


def test_a_run_resumes_to_the_same_weights(tokenizer, model, tmp_path):
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    settings = arguments(tmp_path, save_strategy="epoch", num_train_epochs=3, save_only_model=False)
    whole, _ = train(model, tokenizer, ROWS, LAYERS, settings, recipe="frozen_below", reseed_every=0)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    whole.detach()
    model.load_state_dict(fresh)
    model.requires_grad_(True)
    shutil.rmtree(max(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])))
    train(model, tokenizer, ROWS, LAYERS, settings, recipe="frozen_below", reseed_every=0, resume=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], msg=name)


def test_resuming_from_nothing_is_an_error(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="checkpoint"):
        train(model, tokenizer, ROWS, LAYERS, arguments(tmp_path), resume=True)


def test_sequence_to_sequence(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
            decoder_start_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip
    rows = [{"source": row["prompt"], "target": row["completion"]} for row in ROWS]
    attachment, figures = train(
        model, tokenizer, rows, {"encoder.block.1": CONFIG}, arguments(tmp_path, num_train_epochs=24)
    )
    assert figures["task_loss"] < 1.5
    assert attachment.bottlenecks["encoder.block.1"].codebook.counts.sum() > 0


def test_without_bottlenecks_it_trains_the_model(model, tokenizer, tmp_path):
    attachment, figures = train(model, tokenizer, [{"text": "the cat sat"}] * 12, None, arguments(tmp_path))
    assert attachment is None and figures["loss"] < 1


@pytest.mark.parametrize("bottlenecks", [None, LAYERS])
def test_learning_rates(model, tokenizer, tmp_path, bottlenecks):
    """Adam's first step is as long as the rate, in every entry whose gradient is not tiny."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = arguments(tmp_path, max_steps=1, learning_rate=1e-3, weight_decay=0.0)
    train(model, tokenizer, ROWS, bottlenecks, settings, embedding_learning_rate=1e-2)
    for name, value in before.items():
        step = (model.get_parameter(name).detach() - value.detach()).abs().max()
        torch.testing.assert_close(float(step), 1e-2 if "embed_tokens" in name else 1e-3, rtol=1e-2, atol=0, msg=name)


def test_the_parts_take_an_attachment_that_holds_masks(folder, tmp_path):
    """They say themselves that nothing is deleted while they run the model."""
    model, tokenizer, attachment = load_model(folder)
    rows, collate = [encode_row(tokenizer, row, 1.0, 99) for row in ROWS], Collator(tokenizer.pad_token_id)
    assert attachment.masks and "model.layers.0.mlp.up_proj.weight" in freeze_below(attachment, collate(rows[:1]))
    settings = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
    trainer = CodebookTrainer(attachment, None, model=model, args=settings, train_dataset=rows, data_collator=collate)
    assert trainer.train().training_loss > 0
    seed_codes(attachment, rows, collate, 6, torch.Generator().manual_seed(0))


def test_the_loss_weighs_tokens():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=g), torch.randint(7, (2, 5), generator=g)
    weights = torch.tensor([[1, 1, 0.3, 1, 1], [1, 0, 0, 1, 0]])
    token = -logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None])[..., 0]
    want = (token * weights[:, 1:]).sum() / weights[:, 1:].sum()
    torch.testing.assert_close(weighted_loss(logits, labels, weights, shift=True), want)


def test_rows_are_encoded_with_their_weights(tokenizer):
    row = encode_row(tokenizer, {"prompt": "the cat", "completion": "sat ."}, 0.3, 4)
    assert row["labels"] == row["input_ids"] == tokenizer("the cat sat .")["input_ids"]
    assert row["loss_weights"] == [0.3, 0.3, 1.0, 1.0]
    assert encode_row(tokenizer, {"text": "cat"}, 1.0, 9)["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(dataset=[]), ValueError, "dataset is empty"),
        (dict(dataset=[{"question": "a"}]), ValueError, r"keys \['question'\]"),
        (dict(recipe="both"), ValueError, "recipe is 'both'"),
        (dict(bottlenecks={"model.layer.1": CONFIG}), ValueError, r"model\.layers\.1"),
    ],
)
def test_wrong_arguments_are_named(model, tokenizer, tmp_path, change, error, words):
    settings = dict(dataset=ROWS, bottlenecks=LAYERS, arguments=arguments(tmp_path)) | change
    with pytest.raises(error, match=words):
        train(model, tokenizer, **settings)


@heavy
def test_two_processes_hold_the_same_codes(tmp_path):
    """torchrun, gloo: dead codes are moved to the same places on every rank."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch, tiny_training
            from cu_fast.train import train

            tokenizer = tiny_training.word_tokenizer()
            model = tiny_training.tiny_llama(tokenizer)
            settings = tiny_training.arguments({str(tmp_path / "out")!r}, ddp_backend="gloo")
            attachment, _ = train(model, tokenizer, tiny_training.ROWS, tiny_training.LAYERS, settings, reseed_every=2)
            codes = attachment.bottlenecks["model.layers.1"].codebook.codes.data
            mine = [torch.empty_like(codes) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(mine, codes)
            with open({str(tmp_path / "rank")!r} + str(torch.distributed.get_rank()), "w") as file:
                file.write(str(len(mine) == 2 and torch.equal(mine[0], mine[1])))
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [path.read_text() for path in sorted(tmp_path.glob("rank*"))]
    assert said == ["True", "True"], done.stdout + done.stderr
