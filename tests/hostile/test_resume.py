"""A run goes on from a checkpoint of its own, whole and of the same settings, to the same weights; or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiers import heavy
from tiny_training import CONFIG, LAYERS, ROWS, arguments, tiny_llama, word_tokenizer

from cu_fast.nn import BottleneckConfig
from cu_fast.train import train

EVERY_EPOCH = dict(save_strategy="epoch", num_train_epochs=3)


def run(folder, *, rows=ROWS, layers=LAYERS, hidden=32, given=None, **settings):
    """A run of six steps per epoch; the model that it made."""
    tokenizer = word_tokenizer()
    model = tiny_llama(tokenizer, hidden)
    options = dict(reseed_every=5, reseed_until=1.0) | (given or {})
    train(model, tokenizer, rows, layers, arguments(folder, **EVERY_EPOCH | settings), **options)
    return model.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output folder with the checkpoints of three epochs, and the weights after them."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder)


@pytest.fixture
def stopped(trained, tmp_path):
    """A copy of that folder, as it was after the second epoch."""
    folder = shutil.copytree(trained[0], tmp_path / "stopped")
    shutil.rmtree(folder / "checkpoint-18")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(layers={"model.layers.0": CONFIG}), "layer model.layers.0 was absent and is there"),
        (dict(layers=LAYERS | {"model.layers.0": CONFIG}), "layer model.layers.0 was absent and is there"),
        (dict(layers=None), "layer model.layers.1 was there and is absent"),
        (dict(layers={"model.layers.1": BottleneckConfig(32, 32, 64, 8, activation="none")}),
         "k of layer model.layers.1 was 4 and is 8"),
        (dict(layers={"model.layers.1": BottleneckConfig(32, 32, 128, 4, activation="none")}), "num_codes of layer"),
        (dict(rows=ROWS[1:]), "dataset was 36 rows"),
        (dict(given=dict(prompt_weight=0.5)), "dataset was 36 rows"),
        (dict(given=dict(recipe="frozen_below")), "recipe was joint and is frozen_below"),
        (dict(given=dict(embedding_learning_rate=0.01)), "embedding_learning_rate was None and is 0.01"),
        (dict(given=dict(codebook_learning_rate=0.01)), "codebook_learning_rate was None and is 0.01"),
        (dict(given=dict(reseed_every=9)), "reseed_every was 5 and is 9"),
        (dict(learning_rate=0.1), "learning_rate was 0.005 and is 0.1"),
        (dict(per_device_train_batch_size=3), "per_device_train_batch_size was 6 and is 3"),
        (dict(seed=7), "seed was 42 and is 7"),
        (dict(optim="sgd"), "and is sgd"),
        (dict(hidden=64, layers={"model.layers.1": BottleneckConfig(64, 64, 64, 4)}), "model was LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_other_settings_are_named_and_refused(stopped, change, words):
    given = {"resume": True, **change.pop("given", {})}
    with pytest.raises(ValueError, match="checkpoint-12 was made with other settings") as caught:
        run(stopped, given=given, **change)
    assert words in str(caught.value) and "another folder" in str(caught.value)


def test_the_length_of_a_run_and_its_log_may_change(stopped):
    run(stopped, given=dict(resume=True), num_train_epochs=4, logging_first_step=True, save_strategy="no")


FILES = ["cu_fast.json", "cu_fast.safetensors", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trainer_state.json"]  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_one_error_that_names_it(stopped, name, damage):
    file = stopped / "checkpoint-12" / name
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "overwritten": bytes(len(content))}.get(damage, b""))
    if damage == "removed":
        file.unlink()
    with pytest.raises(ValueError, match=f"{name} cannot be read .*checkpoint-12 cannot be resumed from"):
        run(stopped, given=dict(resume=True))


def test_a_checkpoint_that_would_run_code_is_refused(stopped):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(stopped / "ran"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (file := stopped / "checkpoint-12" / name).read_bytes()
        for write in (lambda f: torch.save(Code(), f), lambda f: f.write_bytes(pickle.dumps(Code()))):
            write(file)
            with pytest.raises(ValueError, match="cannot be resumed from"):
                run(stopped, given=dict(resume=True))
        file.write_bytes(kept)
    assert not (stopped / "ran").exists()


def test_a_fresh_run_does_not_go_where_checkpoints_lie(stopped):
    with pytest.raises(ValueError, match="checkpoint-12 is an earlier run's"):
        run(stopped)


@heavy
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(trained, tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import transformers
from cu_fast import train
from test_resume import run

class Killed(train.UsageCallback):
    def on_optimizer_step(self, args, state, control, **options):
        super().on_optimizer_step(args, state, control, **options)
        if state.global_step == 14:
            os.kill(os.getpid(), signal.SIGKILL)

train.UsageCallback = Killed
run({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert max(path.name for path in tmp_path.glob("checkpoint-1*")) == "checkpoint-12"
    weights = run(tmp_path, given=dict(resume=True))
    for name, value in trained[1].items():
        assert torch.equal(weights[name], value), name


@heavy
def test_the_command_line_refuses_another_layer_instead_of_crashing(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def command(layer, *more):
        given = ("--codes", 256, "--k", 4, "--batch-size", 6, "--epochs", 2 + len(more), "--output", tmp_path / "out")
        line = ["-m", "cu_fast.cli.app", "train", folder, tmp_path / "rows.jsonl", "--layer", layer, *given, *more]
        return subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, timeout=200)

    first = command("model.layers.2")
    assert first.returncode == 0, first.stderr
    other = command("model.layers.1", "--resume")
    assert other.returncode == 1 and "layer model.layers.2 was there and is absent" in other.stderr, other.stderr
