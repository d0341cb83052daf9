"""Folders that were damaged, edited, mixed up, or changed after they were loaded: refused, or of no effect."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiers import TEST_ALL, heavy
from tiny_models import add_masks, attach_to, build, inputs, under

import cu_fast
from cu_fast.hf.checkpoint import load_model, read_model, save_model
from cu_fast.masks import Mask

LAYERS = ("model.layers.0", "model.layers.1")
REFUSALS = (ValueError, FileNotFoundError, FileExistsError)
NOT_VALUE_ERRORS = (UnicodeError, json.JSONDecodeError)  # they are, but say nothing of the file
DAMAGES = 10_000 if TEST_ALL else 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of two layers and two masks; tests work on copies of it."""
    attachment = attach_to(build("llama"), *LAYERS)
    add_masks(attachment, inputs("llama"), "ab")
    path = tmp_path_factory.mktemp("saved") / "attachment"
    attachment.save(path)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "attachment"))


def load(path):
    return cu_fast.attach(build("llama"), path, impl="reference")


def computes(attachment) -> dict:
    """Everything that an attachment computes with, by value."""
    found = {"masks": list(attachment.masks.items()), "model": type(attachment.model).__name__}
    found["masks"] = [
        (name, [(m.bits.tolist(), m.num_codes, m.codebook_sha256, m.topic, m.layer, repr(m.method)) for m in parts])
        for name, parts in attachment.masks.items()
    ]
    for layer, bottleneck in attachment.bottlenecks.items():
        found[layer] = bottleneck.config, bottleneck.mask_mode
        for key, value in bottleneck.state_dict().items():
            found[layer, key] = value.dtype, value.shape, value.flatten().contiguous().view(torch.uint8).tolist()
    return found


def edit(file: Path, sealed: bool, **changes) -> None:
    """Change a record; ``sealed``: so that its own checksum fits again."""
    record = json.loads(file.read_text()) | changes
    if sealed:
        record.pop("record_sha256", None)
        text = json.dumps(record, sort_keys=True, ensure_ascii=False)
        record["record_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(record))


def refused(path, match: str) -> None:
    """Attaching raises, with a message that says where."""
    with pytest.raises(REFUSALS, match=match) as caught:
        load(path)
    assert type(caught.value) not in NOT_VALUE_ERRORS


# -- files that change after they were loaded --------------------------------------------------------------------


def test_files_zeroed_after_loading_change_nothing(copied):
    attachment = load(copied)
    before, given = computes(attachment), inputs("llama")
    for file in copied.rglob("*.safetensors"):
        with open(file, "r+b") as stream:  # the same inode, as `cp new old` has it
            stream.write(bytes(os.path.getsize(file)))
    assert computes(attachment) == before
    assert not torch.equal(under(attachment, "a", given), under(attachment, None, given))


@heavy
def test_files_truncated_after_loading_do_not_kill_the_process(folder):
    code = f"""
import os, pathlib, torch
from cu_fast.hf.checkpoint import load_model
model, tokenizer, attachment = load_model({str(folder)!r})
for file in pathlib.Path({str(folder)!r}).rglob("*.safetensors"):
    os.truncate(file, 0)
with torch.no_grad(), attachment.unlearn("even codes / ü"):
    print(model(**tokenizer("Anna writes", return_tensors="pt")).logits.isfinite().all().item())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split()[-1] == "True", (run.returncode, run.stderr[-500:])


def test_a_models_own_weights_are_not_mapped(folder):
    model, _ = read_model(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = folder / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.write(bytes(os.path.getsize(file)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- masks that are missing, exchanged, or too many --------------------------------------------------------------


def exchange(a: Path, b: Path) -> None:
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def link(a: Path, b: Path) -> None:
    shutil.rmtree(a)
    a.symlink_to(b.name)


def a_file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


MIXED_UP = {
    "a layer's part is missing": (lambda p: shutil.rmtree(p / "a" / "1"), r"masks/a lacks \['1'\]"),
    "the other part is missing": (lambda p: shutil.rmtree(p / "a" / "0"), r"masks/a lacks \['0'\]"),
    "a part is a file": (lambda p: a_file_instead(p / "a" / "1"), r"masks/a/1/mask\.json does not exist"),
    "two names exchanged": (lambda p: exchange(p / "a", p / "b"), r"masks/a/0/mask\.json is the record of another"),
    "two parts exchanged": (lambda p: exchange(p / "a" / "0", p / "a" / "1"), r"is the record of another"),
    "one a link to another": (lambda p: link(p / "a", p / "b"), r"masks/a/0/mask\.json is the record of another"),
    "a copy of another": (
        lambda p: (shutil.rmtree(p / "a"), shutil.copytree(p / "b", p / "a")), r"is the record of another",
    ),
    "renamed": (lambda p: (p / "a").rename(p / "c"), r"masks lacks \['a'\] and holds \['c'\]"),
    "missing": (lambda p: shutil.rmtree(p / "a"), r"masks lacks \['a'\]"),
    "all missing": (lambda p: shutil.rmtree(p), r"masks lacks \['a', 'b'\]"),
    "one too many": (lambda p: shutil.copytree(p / "a", p / "c"), r"masks lacks \[\] and holds \['c'\]"),
    "a stray folder": (lambda p: (p / "a copy").mkdir(), r"holds \['a copy'\], which config\.json does not list"),
    "a part too many": (lambda p: shutil.copytree(p / "b" / "0", p / "a" / "2"), r"masks/a lacks \[\] and holds \['2'\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", MIXED_UP)
def test_masks_that_are_not_those_that_were_saved_are_refused(copied, what):
    mix_up, message = MIXED_UP[what]
    mix_up(copied / "masks")
    refused(copied, message)


def test_hidden_folders_of_other_programs_are_passed_over(saved, copied):
    for place in (copied / "masks", copied / "masks" / "a", copied / "masks" / "a" / "0"):
        (place / ".ipynb_checkpoints").mkdir()
    assert computes(load(copied)) == computes(load(saved))


def test_a_mask_of_several_layers_is_loaded_alone_and_with_nothing_else(copied):
    attachment = load(copied)
    attachment.remove_mask("a")
    (copied / "masks" / "a" / ".ipynb_checkpoints").mkdir()
    assert attachment.load_mask(copied / "masks" / "a") == "a" and len(attachment.masks["a"]) == 2
    (copied / "masks" / "a" / "of mine").mkdir()
    with pytest.raises(ValueError, match="masks/a holds of mine beside masks"):
        attachment.load_mask(copied / "masks" / "a", "again")


# -- whatever computes is under a checksum -----------------------------------------------------------------------


def test_every_flipped_bit_of_the_tensors_is_refused(copied):
    file = copied / "bottleneck.safetensors"
    raw, rng = file.read_bytes(), random.Random(0)
    for _ in range(50):
        bit = rng.randrange(8 * len(raw))
        file.write_bytes(flipped(raw, bit))
        refused(copied, r"bottleneck\.safetensors")


def edited_layer(path: Path, **changes) -> dict:
    layers = json.loads((path / "config.json").read_text())["layers"]
    layers[LAYERS[0]]["config"] |= changes
    return layers


EDITS = {
    "k": lambda p: {"layers": edited_layer(p, k=3)},
    "activation": lambda p: {"layers": edited_layer(p, activation="relu")},
    "weight": lambda p: {"layers": edited_layer(p, weight="mean")},
    "mask_mode": lambda p: {"layers": edited_layer(p, mask_mode="reselect")},
    "code_dropout": lambda p: {"layers": edited_layer(p, code_dropout=0.5)},
    "a layer's name": lambda p: {"layers": {n.replace("1", "2"): v for n, v in edited_layer(p).items()}},
    "model_class": lambda p: {"model_class": "MistralForCausalLM"},
    "model_type": lambda p: {"model_type": "mistral"},
    "a mask less": lambda p: {"masks": {}},
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_config_is_refused(copied, what):
    edit(copied / "config.json", sealed=False, **EDITS[what](copied))
    refused(copied, r"config\.json was changed after it was saved")


# -- damage is a ValueError that names the file ------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
CONTENTS = {
    "deeply nested": f'{{"format": {DEEP}}}'.encode(),
    "a long number": b'{"format": ' + b"1" * 5000 + b"}",
    "infinity": b'{"format": 1e999}',
    "not a number": b'{"format": NaN}',
    "a key twice": b'{"format": "cu_fast.attachment", "format": "cu_fast.attachment"}',
    "half a character": b'{"format": "\\ud800"}',
    "not UTF-8": b'{"format": "\xff"}',
    "nothing": b"",
    "half a file": b'{"format": "cu_',
    "a pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("name", ["config.json", "masks/a/0/mask.json"])
@pytest.mark.parametrize("what", CONTENTS)
def test_what_is_not_json_is_refused_by_name(copied, name, what):
    (copied / name).write_bytes(CONTENTS[what])
    refused(copied, rf"{name} is not valid JSON")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": {LAYERS[0]: {"codebook_sha256": 5, "config": None}}}, {"layers": [1]}, {"layers": {"": 1}},
        {"masks": 3}, {"masks": {"a": 5}}, {"masks": {"a": [5]}}, {"masks": {"a" * 300: ["x"]}}, {"masks": {"": ["x"]}},
        {"tensors_sha256": None}, {"model_class": []}, {"model_type": {}}, {"format_version": "2"}, {"format": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_the_wrong_types_is_refused(copied, changes):
    edit(copied / "config.json", sealed=True, **changes)
    refused(copied, "config.json|masks")


@pytest.mark.parametrize("what", ["codebook_sha256", "k", "num_codes", "code_dropout", "reconstruction_weight"])
@pytest.mark.parametrize("value", [5.5, "x", None, [], 10**30, -1], ids=str)
def test_a_layer_of_the_wrong_types_is_refused(copied, what, value):
    layers = edited_layer(copied, **({} if what == "codebook_sha256" else {what: value}))
    if what == "codebook_sha256":
        layers[LAYERS[0]][what] = value
    if (what, value) != ("reconstruction_weight", 5.5) and (what, value) != ("reconstruction_weight", 10**30):
        edit(copied / "config.json", sealed=True, layers=layers)
        refused(copied, "config.json")


@pytest.mark.parametrize("key", ["topic", "layer", "num_codes", "num_deleted", "codebook_sha256", "digest", "method"])
@pytest.mark.parametrize("value", [5.5, True, [[]], 10**30], ids=str)
def test_a_mask_of_the_wrong_types_is_refused(copied, key, value):
    file = copied / "masks" / "a" / "0" / "mask.json"
    edit(file, sealed=True, **{key: value})
    with pytest.raises(ValueError, match="masks/a/0/mask"):
        Mask.load(file.parent)
    refused(copied, "masks/a/0/mask")


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "ü" * 100])
def test_a_name_that_no_folder_can_have_is_refused_and_nothing_written(tmp_path, name):
    attachment = attach_to(build("llama"), *LAYERS)
    add_masks(attachment, inputs("llama"), "a")
    attachment.add_mask(attachment.masks["a"], name)
    with pytest.raises(ValueError, match="a mask's name") as caught:
        attachment.save(tmp_path / "saved")
    assert type(caught.value) is ValueError and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "a/" + "a" * 250])
def test_a_folder_that_cannot_be_is_refused_and_nothing_written(tmp_path, name):
    mask = Mask.from_ids([1], num_codes=9, codebook_sha256="a" * 64, topic="a")
    with pytest.raises(ValueError, match="the folder's name") as caught:
        mask.save(tmp_path / name)
    assert type(caught.value) is ValueError and not list(tmp_path.iterdir())


# -- model folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["pipeline"], [5], ["no such"], "LlamaForCausalLM", 5, [], None, [["x"]], ["torch"]], ids=str
)
def test_architectures_that_are_no_model_are_refused(folder, names):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": names}))
    with pytest.raises(ValueError, match=r"config\.json names the architectures"):
        load_model(folder)


@pytest.mark.parametrize("what", CONTENTS)
def test_a_model_config_that_is_not_json_is_refused_by_name(folder, what):
    (folder / "config.json").write_bytes(CONTENTS[what])
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)


@pytest.mark.parametrize("changes", [{"hidden_size": "x"}, {"model_type": 5}, {"vocab_size": -1}])
def test_a_model_config_of_the_wrong_types_is_refused(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match="no model that transformers can read"):
        load_model(folder)


def test_code_in_the_folder_never_runs_and_nobody_is_asked(folder, tmp_path):
    (folder / "evil.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).write_text('x')\n"
        f"import transformers\nclass Config(transformers.LlamaConfig): model_type = 'unheard_of'\n"
        f"class Tokenizer(transformers.PreTrainedTokenizerFast): pass\n"
    )
    other = shutil.copytree(folder, tmp_path / "other")
    for path, changes in {
        folder / "config.json": {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}},
        other / "tokenizer_config.json": {
            "tokenizer_class": "Unheard",
            "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]},
        },
    }.items():
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code = """
import sys
from cu_fast.hf.checkpoint import read_model
for path in sys.argv[1:]:
    try:
        read_model(path)
        print("read", path)
    except ValueError:
        print("refused", path)
"""
    command = [sys.executable, "-c", code, str(other), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, input="y\n" * 9)
    assert not (tmp_path / "ran").exists() and "y/N" not in run.stdout
    assert run.returncode == 0 and f"refused {folder}" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("what", ["a layer", "one tensor", "another shape"])
def test_weights_that_are_missing_are_refused(folder, what):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in [name for name in tensors if "layers.2" in name][: None if what == "a layer" else 1]:
        value = tensors.pop(name)
        if what == "another shape":
            tensors[name] = value[:1].clone()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2"):
        load_model(folder)


def test_tied_weights_are_not_missing(folder):
    assert "lm_head.weight" not in safetensors.torch.load_file(folder / "model.safetensors")
    assert read_model(folder)[0].config.tie_word_embeddings


def test_a_model_saved_anew_while_it_is_loaded_is_refused(folder, attachment, tokenizer, monkeypatch):
    attach = cu_fast.hf.checkpoint.attach

    def slow(*args, **options):
        save_model(attachment, tokenizer, folder)  # another process would
        return attach(*args, **options)

    monkeypatch.setattr(cu_fast.hf.checkpoint, "attach", slow)
    with pytest.raises(ValueError, match="was saved anew while it was loaded"):
        load_model(folder)


# -- anything at all ---------------------------------------------------------------------------------------------


def flipped(raw: bytes, bit: int) -> bytes:
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


def zeroed(raw: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(raw))
    count = min(rng.randint(1, 64), len(raw) - start)
    return raw[:start] + bytes(count) + raw[start + count :]


DAMAGE = {
    "a bit": lambda raw, rng: flipped(raw, rng.randrange(8 * len(raw))),
    "a bit of the first bytes": lambda raw, rng: flipped(raw, rng.randrange(8 * min(len(raw), 200))),
    "truncated": lambda raw, rng: raw[: rng.randrange(len(raw))],
    "appended": lambda raw, rng: raw + rng.choice([b"\0", b" ", b"\n", rng.randbytes(rng.randint(1, 99))]),
    "random bytes": lambda raw, rng: rng.randbytes(rng.choice([8, 100, len(raw)])),
    "a zeroed run": zeroed,
}


def test_damaged_folders_are_refused_or_compute_the_same(saved, copied):
    model, rng, counts = build("llama"), random.Random(7), collections.Counter()
    attachment = cu_fast.attach(model, saved, impl="reference")
    original, files = computes(attachment), sorted(file for file in copied.rglob("*") if file.is_file())
    attachment.detach()
    assert len(files) == 10
    for _ in range(DAMAGES):
        file, kind = rng.choice(files), rng.choice(sorted(DAMAGE))
        raw = file.read_bytes()
        file.write_bytes(DAMAGE[kind](raw, rng))
        try:
            damaged = cu_fast.attach(model, copied, impl="reference")
        except REFUSALS as error:
            assert type(error) not in NOT_VALUE_ERRORS and str(copied) in str(error), (file, kind, repr(error))
            counts["refused"] += 1
        else:
            assert computes(damaged) == original, (file.relative_to(copied), kind)
            counts["harmless"] += 1
            damaged.detach()
        file.write_bytes(raw)
    assert counts["refused"] >= 0.8 * DAMAGES and counts.total() == DAMAGES, counts
    assert counts["harmless"] > 0, "no damage was one that says the same, such as a blank after a record"
