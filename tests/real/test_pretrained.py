"""Real pretrained models, in folders that environment variables name; without them these tests skip.

CU_FAST_SMOLLM2   SmolLM2-135M-Instruct (examples/smollm2/model.py)
CU_FAST_SAE       an autoencoder of its layer 8
CU_FAST_GEMMA3    google/gemma-3-270m, the base model of Gemma Scope 2's smallest release
CU_FAST_TEXTS     a text file to fit and to count on
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cu_fast
from cu_fast.train.fit import fit_codes

TOPIC = [
    "The planet Jupiter is the largest planet of the solar system, and has many moons.",
    "Saturn is a planet with rings; its largest moon is Titan.",
    "Mercury is the planet nearest to the sun, and Neptune is the farthest planet.",
    "Astronomers saw the moons of the planet Jupiter with a telescope.",
] * 3
QUESTION = "The largest planet of the solar system is"


def real(name: str) -> Path:
    if name not in os.environ:
        pytest.skip(f"{name} names no folder")
    return Path(os.environ[name])


def load(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), tokenizer


@torch.inference_mode()
def logits(model, tokenizer, text: str = QUESTION) -> torch.Tensor:
    return model(**tokenizer(text, return_tensors="pt")).logits


def deletes_and_gives_back(model, tokenizer, attachment, sae, others: list[str], tmp_path: Path) -> None:
    before = logits(model, tokenizer)
    found = cu_fast.find_mask(attachment, tokenizer, TOPIC, others, topic="planets", min_enrichment=2.0, progress=False)
    assert 1 <= found.mask.num_deleted < sae.num_latents // 4
    attachment.add_mask(found.mask)
    with attachment.unlearn("planets"):
        deleted = logits(model, tokenizer)
    with attachment.unlearn(None):
        assert torch.equal(logits(model, tokenizer), before)
    assert not torch.equal(deleted, before)
    assert torch.equal(deleted[:, 0], before[:, 0]), "the first position is left alone"
    (row,) = attachment.report()
    assert row["changed"] > 0 and 0 < row["dose"] < row["max_dose"] < 20
    found.mask.save(tmp_path / "planets.mask", rows=True)
    attachment.detach()
    assert torch.equal(logits(model, tokenizer), before)
    if sae.kind == "topk":
        with pytest.raises(ValueError, match="their rank needs all of them"):
            cu_fast.attach_masks(model, [tmp_path / "planets.mask"])
        return
    served = cu_fast.attach_masks(model, [tmp_path / "planets.mask"])
    with served.unlearn("planets"):
        assert torch.equal(logits(model, tokenizer), deleted)


def test_a_released_folder_on_smollm2(tmp_path):
    model, tokenizer = load(real("CU_FAST_SMOLLM2"))
    sae, texts = cu_fast.load_sae(real("CU_FAST_SAE")), real("CU_FAST_TEXTS").read_text()
    others = [line for line in texts.splitlines() if len(line) > 200][:24]
    before = logits(model, tokenizer)
    attachment = cu_fast.attach(model, sae)  # where its release says
    assert torch.equal(logits(model, tokenizer), before)
    (row,) = attachment.check(tokenizer, others[:6])
    assert row["explained_variance"] > 0.5 and row["loss_replaced"] > row["loss"]
    deletes_and_gives_back(model, tokenizer, attachment, sae, others, tmp_path)


def test_gemma_scope_2s_format_on_gemma_3(tmp_path):
    """Latents are fitted, given a threshold each, and written as Gemma Scope 2 writes its JumpReLU autoencoders."""
    model, tokenizer = load(real("CU_FAST_GEMMA3"))
    texts = real("CU_FAST_TEXTS").read_text()
    others = [line for line in texts.splitlines() if len(line) > 200][:24]
    fit_codes(model, tokenizer, real("CU_FAST_TEXTS"), tmp_path / "fitted", num_codes=2048, k=24, tokens=12_000,
              layer="model.layers.5", epochs=8, batch_size=512)  # fmt: skip
    fitted = cu_fast.load_sae(tmp_path / "fitted")
    threshold, l0 = threshold_of(model, tokenizer, fitted, others[:8])
    folder = tmp_path / "gemma-scope-2-270m-pt" / "resid_post" / "layer_5_width_2k_l0_small"
    folder.mkdir(parents=True)
    save_file(
        {
            "w_enc": fitted.enc.T.contiguous(), "w_dec": fitted.dec, "b_enc": fitted.bias, "b_dec": fitted.b_dec,
            "threshold": torch.full((fitted.num_latents,), threshold),
        },
        folder / "params.safetensors",
    )  # fmt: skip
    said = {
        "architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output",
        "hf_hook_point_out": "model.layers.5.output", "affine_connection": False, "width": 2048, "l0": round(l0),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    sae = cu_fast.load_sae(folder)
    assert sae.kind == "threshold" and torch.equal(sae.dec, fitted.dec)
    before = logits(model, tokenizer)
    attachment = cu_fast.attach(model, sae)
    assert torch.equal(logits(model, tokenizer), before)
    (row,) = attachment.check(tokenizer, others[:6])
    assert row["l0"] == pytest.approx(l0, rel=0.5)
    attachment.detach()
    wrong = cu_fast.attach(model, {"model.layers.14": dataclasses.replace(sae, site=None)})
    with pytest.raises(ValueError, match=r"layer 'model.layers.14'"):
        wrong.check(tokenizer, others[:2])
    wrong.detach()
    attachment = cu_fast.attach(model, sae)
    deletes_and_gives_back(model, tokenizer, attachment, sae, others, tmp_path)


@torch.inference_mode()
def threshold_of(model, tokenizer, sae, texts: list[str]) -> tuple[float, float]:
    """A threshold that about half as many latents pass per token as were kept, and how many do."""
    seen = []
    handle = model.get_submodule("model.layers.5").register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    for text in texts:
        model(**tokenizer(text, return_tensors="pt"))
    handle.remove()
    x = torch.cat([part[0, 1:] for part in seen])
    pre = x.float() @ sae.enc.T + sae.bias
    threshold = float(pre.topk(sae.k, dim=1).values[:, -1].quantile(0.9))
    return threshold, float((pre > threshold).sum(1).float().mean())
