"""Attachments on disk: the round trip, beside save_pretrained too, and every way a folder can be wrong."""

from __future__ import annotations

import hashlib
import json

import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import add_masks, attach_to, bottleneck_config, build, inputs

import cu_fast
from cu_fast.files import seal

LAYERS = ("model.layers.0", "model.layers.1")
NAMES = ("a", "Zoë", "..", "a/b.c", "100 %")


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture
def attachment(given):
    """Two layers, and masks whose names are no file names."""
    attached = attach_to(build("llama"), *LAYERS)
    add_masks(attached, given, "ab")
    for name in NAMES[1:]:
        attached.add_mask(attached.masks["b"], name)
    attached.remove_mask("b")
    return attached


def logits(attachment, topics, given):
    with torch.no_grad(), attachment.unlearn(topics):
        return attachment.model(**given).logits


def test_save_and_attach(attachment, given, tmp_path):
    with torch.no_grad():
        for bottleneck in attachment.bottlenecks.values():
            bottleneck.rms.fill_(1.7)
            bottleneck.fold()
    attachment.mask_mode = "reselect"
    attachment.save(tmp_path / "saved")
    state = torch.get_rng_state()
    again = cu_fast.attach(build("llama"), tmp_path / "saved", impl="reference")
    assert torch.equal(torch.get_rng_state(), state)
    assert set(again.masks) == set(NAMES) and list(again.bottlenecks) == list(LAYERS)
    assert again.mask_mode == "reselect" and {row["impl"] for row in again.report()} == {"reference"}
    assert not again.bottlenecks[LAYERS[0]].training
    assert all(row["tokens"] == 0 and row["hits"] == 0 for row in again.report())
    for topics in (None, *NAMES, ["..", None]):
        assert torch.equal(logits(again, topics, given), logits(attachment, topics, given))
    for ours, theirs in zip(attachment.bottlenecks.values(), again.bottlenecks.values()):
        assert all(p.requires_grad for p in theirs.parameters()) and theirs.codebook.counts.sum() == 0
        for key, value in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[key], value), key

    attachment.remove_mask("..")
    attachment.save(tmp_path / "saved")  # replaces the folder, old masks and all
    assert ".." not in cu_fast.attach(build("llama"), tmp_path / "saved").masks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_stored_as_bf16_stays_bf16(attachment, given, tmp_path):
    for bottleneck in attachment.bottlenecks.values():
        bottleneck.bfloat16()
    with pytest.raises(RuntimeError, match="cast to another dtype"):
        logits(attachment, "a", given)
    for name in NAMES:
        attachment.remove_mask(name)
    attachment.save(tmp_path / "saved")
    again = cu_fast.attach(build("llama"), tmp_path / "saved")
    assert again.bottlenecks[LAYERS[0]].codebook.codes.dtype == torch.bfloat16
    assert torch.equal(logits(again, None, given), logits(attachment, None, given))


def test_masks_are_loaded_one_by_one(attachment, given, tmp_path):
    one = attachment.masks["a"][1]
    one.save(tmp_path / "one")
    assert attachment.load_mask(tmp_path / "one", "one") == "one"
    attachment.remove_mask("a")
    assert attachment.load_mask(tmp_path / "one") == "a"
    assert torch.equal(logits(attachment, "one", given), logits(attachment, "a", given))
    with pytest.raises(FileNotFoundError):
        attachment.load_mask(tmp_path / "none")


def test_save_never_replaces_anything_else(attachment, tmp_path):
    (tmp_path / "empty").mkdir()
    attachment.save(tmp_path / "empty")
    attachment.model.save_pretrained(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    for path in (tmp_path / "model", tmp_path / "notes", tmp_path / "notes" / "precious.txt", tmp_path / "link"):
        with pytest.raises(FileExistsError, match="exists and is no attachment; give the name of a new folder"):
            attachment.save(path)
    assert (tmp_path / "notes" / "precious.txt").read_text() == "x"


def test_beside_save_pretrained(attachment, given, tmp_path):
    """The model's own folder gives the base weights, and says which of its tensors it did not use."""
    with torch.no_grad():
        attachment.model.lm_head.weight[0] += 1
    attachment.model.save_pretrained(tmp_path)
    attachment.save(tmp_path / "codebook")
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert f"{LAYERS[0]}.codebook_bottleneck.codebook.codes" in stored

    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] and all("codebook_bottleneck" in key for key in info["unexpected_keys"])
    assert not info["missing_keys"]
    again = cu_fast.attach(model, tmp_path / "codebook")
    for topics in (None, "a"):
        assert torch.equal(logits(again, topics, given), logits(attachment, topics, given))


def edit_json(file, **changes):
    """Change a record so that its checksum does not tell."""
    record = json.loads(file.read_text())
    record.update(changes)
    del record["record_sha256"]
    file.write_bytes(seal(record, "it")[0])


def edit_tensors(folder, change):
    """Change tensors so that their checksum does not tell."""
    file = folder / "bottleneck.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    raw = safetensors.torch.save(tensors)
    file.write_bytes(raw)
    edit_json(folder / "config.json", tensors_sha256=hashlib.sha256(raw).hexdigest())


CODES = f"{LAYERS[0]}.codebook.codes"
DAMAGE = {
    "no config": (lambda p: (p / "config.json").unlink(), r"config.json does not exist"),
    "not json": (lambda p: (p / "config.json").write_text("{"), r"config.json is not valid JSON"),
    "another format": (lambda p: edit_json(p / "config.json", format="llama"), r"has format 'llama', version 2"),
    "an earlier version": (
        lambda p: (p / "config.json").write_text('{"format": "cu_fast.attachment", "format_version": 1}'),
        r"version 1; this version .* reads .* Load the folder with the version that wrote it \(1: cu_fast 0.1\) and save",
    ),
    "a later version": (lambda p: edit_json(p / "config.json", format_version=3), r"version 3; this version .* reads"),
    "no layers": (lambda p: edit_json(p / "config.json", layers=3), r"does not describe its layers"),
    "a bad config": (
        lambda p: edit_json(p / "config.json", layers={LAYERS[0]: {"config": {"d_model": 32}, "codebook_sha256": ""}}),
        r"does not describe its layers and masks: .*lacks \['code_dim', 'k', 'num_codes'\]",
    ),
    "a huge claim": (
        lambda p: edit_json(
            p / "config.json",
            layers={
                n: {"config": bottleneck_config(num_codes=10**12).to_dict(), "codebook_sha256": ""} for n in LAYERS
            },
        ),
        r"has shape \[150, 24\]; it should be \[1000000000000, 24\]",
    ),
    "a claim beyond all memory": (
        lambda p: edit_json(
            p / "config.json",
            layers={
                n: {"config": bottleneck_config(num_codes=10**30).to_dict(), "codebook_sha256": ""} for n in LAYERS
            },
        ),
        r"describes a bottleneck that cannot be made",
    ),
    "another model": (
        lambda p: edit_json(p / "config.json", model_type="gpt2"),
        r"of type 'gpt2' .*this one is 'llama'",
    ),
    "no tensors": (lambda p: (p / "bottleneck.safetensors").unlink(), r"bottleneck.safetensors does not exist"),
    "truncated": (
        lambda p: (p / "bottleneck.safetensors").write_bytes((p / "bottleneck.safetensors").read_bytes()[:-9]),
        r"bottleneck.safetensors is damaged",
    ),
    "a missing tensor": (
        lambda p: edit_tensors(p, lambda t: t.pop(CODES)),
        r"lacks the tensors \['model.layers.0.codebook.codes'\]",
    ),
    "an unexpected tensor": (
        lambda p: edit_tensors(p, lambda t: t.update(more=torch.ones(1))),
        r"unexpected \['more'\]",
    ),
    "a misshapen tensor": (
        lambda p: edit_tensors(p, lambda t: t.update({CODES: torch.ones(3, 24)})),
        r"tensor 'model.layers.0.codebook.codes' has shape \[3, 24\]; it should be \[150, 24\]",
    ),
    "a wrong dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({CODES: t[CODES].int()})),
        r"tensor 'model.layers.0.codebook.codes' is torch.int32; it should be one of",
    ),
    "other codes": (
        lambda p: edit_tensors(p, lambda t: t.update({CODES: t[CODES] + 1})),
        r"codebook of layer 'model.layers.0' is not the one in config.json",
    ),
    "an edited mask": (
        lambda p: edit_json(p / "masks" / "a" / "0" / "mask.json", topic="x"),
        r"mask.json is the record of another mask",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_untouched(damage, attachment, given, tmp_path):
    attachment.save(tmp_path / "saved")
    hurt, message = DAMAGE[damage]
    hurt(tmp_path / "saved")
    model = build("llama")
    modules, before = dict(model.named_modules()), model(**given).logits
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cu_fast.attach(model, tmp_path / "saved")
    assert dict(model.named_modules()) == modules and torch.equal(model(**given).logits, before)
