"""Model folders: what is written is read back, bit for bit, and a damaged folder never yields an unmasked model."""

from __future__ import annotations

import json

import pytest
import torch

from cu_fast.hf.checkpoint import load_model, read_model, save_model
from cu_fast.masks import Mask


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("Anna writes", return_tensors="pt")).logits


def test_round_trip(folder, attachment, tokenizer):
    model, read_tokenizer, read = load_model(folder)
    assert type(model) is type(attachment.model) and not model.training
    with attachment.unlearn(None), read.unlearn(None):
        plain = logits(model, read_tokenizer)
        assert torch.equal(plain, logits(attachment.model, tokenizer))
    with attachment.unlearn("even codes / ü"), read.unlearn("even codes / ü"):
        masked = logits(attachment.model, tokenizer)
        assert torch.equal(logits(model, read_tokenizer), masked)
    assert not torch.equal(masked, plain)


def test_the_models_own_files_hold_the_model_alone(folder, attachment, tokenizer):
    plain, _ = read_model(folder)
    attachment.detach()
    assert plain.state_dict().keys() == attachment.model.state_dict().keys()
    assert torch.equal(logits(plain, tokenizer), logits(attachment.model, tokenizer))


def test_a_bottleneck_stored_narrow_is_widened_and_keeps_its_masks(attachment, tokenizer, tmp_path):
    attachment.model.bfloat16()
    save_model(attachment, tokenizer, tmp_path / "m")
    _, _, read = load_model(tmp_path / "m")
    (narrow,), (wide,) = attachment.bottlenecks.values(), read.bottlenecks.values()
    assert narrow.codebook.codes.dtype == torch.bfloat16 and wide.codebook.codes.dtype == torch.float32
    assert narrow.codebook_sha256() == wide.codebook_sha256()
    _, _, read = load_model(tmp_path / "m", torch.float16)
    assert next(iter(read.bottlenecks.values())).codebook.codes.dtype == torch.bfloat16


def test_no_folder_and_no_codebook_are_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        read_model(tmp_path / "none")
    (folder / "codebook").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no 'codebook' folder"):
        load_model(folder)


@pytest.mark.parametrize("file", ["codebook/config.json", "codebook/bottleneck.safetensors"])
def test_a_missing_file_is_an_error(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.split("/")[1]):
        load_model(folder)


@pytest.mark.parametrize("file", ["codebook/config.json", "codebook/bottleneck.safetensors"])
def test_a_truncated_file_is_an_error(folder, file):
    raw = (folder / file).read_bytes()
    (folder / file).write_bytes(raw[: len(raw) - 5])
    with pytest.raises(ValueError, match=file.split("/")[1]):
        load_model(folder)


def test_a_damaged_mask_is_an_error(folder):
    (record,) = (folder / "codebook" / "masks").rglob("mask.json")
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"topic": "another"}))
    with pytest.raises(ValueError, match="was changed after it was saved"):
        load_model(folder)


def test_erasing_is_for_good_and_acts_as_reselect(folder, tokenizer, tmp_path):
    model, _, read = load_model(folder)
    (bottleneck,) = read.bottlenecks.values()
    other = Mask.from_ids([1, 2, 299], num_codes=300, codebook_sha256=bottleneck.codebook_sha256(), topic="other")
    read.add_mask(other)
    read.mask_mode = "reselect"
    gone = bottleneck.codebook.codes.detach()[::2].clone()
    with read.unlearn("even codes / ü"):
        masked = logits(model, tokenizer)
    with read.unlearn({"even codes / ü", "other"}):
        both = logits(model, tokenizer)

    with pytest.raises(RuntimeError, match="leave every unlearn context"), read.unlearn("other"):
        read.erase("even codes / ü")
    read.erase("even codes / ü")
    save_model(read, tokenizer, tmp_path / "erased")
    model, _, erased = load_model(tmp_path / "erased")
    (bottleneck,) = erased.bottlenecks.values()
    with erased.unlearn(None):
        assert torch.equal(logits(model, tokenizer), masked)
    assert set(erased.masks) == {"other"} and erased.masks["other"][0].ids().tolist() == [0, 149]
    with erased.unlearn("other"):
        assert torch.equal(logits(model, tokenizer), both)
    codes = bottleneck.codebook.codes.detach()
    assert codes.shape == (150, 32) and not (codes[:, None] == gone[None]).all(-1).any()
    raw = (tmp_path / "erased" / "codebook" / "bottleneck.safetensors").read_bytes()
    assert gone[0].numpy().tobytes() not in raw and codes[0].numpy().tobytes() in raw


def test_silent_is_handed_on(folder, tokenizer):
    model, _, _ = load_model(folder)
    with pytest.raises(RuntimeError, match="nothing was said here"):
        logits(model, tokenizer)
    model, _, read = load_model(folder, silent="plain")
    with read.unlearn(None):
        said = logits(model, tokenizer)
    assert torch.equal(logits(model, tokenizer), said)
