"""examples/forgetting: EUL's loss by hand and its layers kept, and the model trained with a bottleneck in it, in small."""

from __future__ import annotations

import copy
import csv
import functools
import sys

import pytest
import tiny_training
import torch
import torch.nn.functional as F
from scripts import scripts
from test_forgetting_example import NAMES, answer_logits, close, log_p, rows, write_tofu
from tiers import heavy

from cu_fast.hf.checkpoint import load_model
from cu_fast.masks import Mask
from cu_fast.nn import CodebookBottleneck

SMALL = dict(num_codes=64, k=4, code_dim=16, max_length=32, batch_size=64, epochs=1.0)


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "forgetting", *NAMES)


@pytest.fixture
def tiny():
    tokenizer = tiny_training.word_tokenizer()
    return tiny_training.tiny_llama(tokenizer), tokenizer


def stirred(layers) -> None:
    """Unlearning layers that do something."""
    draw = torch.Generator().manual_seed(1)
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=2.0, generator=draw)


# -- EUL -----------------------------------------------------------------------------------------------------------


def test_eul_loss(example, tiny):
    model, tokenizer = tiny
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)  # words that are told apart, for KL to be of a size
    before = copy.deepcopy(model)
    method = example["eul"].EUL()
    method.start(model, tokenizer, rows(4), rows(9, of=1))
    stirred(method.layers)

    now = copy.deepcopy(before)  # the same by other means
    for block, layer in zip(now.model.layers, method.layers):

        def after(module, given, x, layer=layer):
            inner = (x @ layer.down.weight.T + layer.down.bias).clamp(min=0)
            return x + inner @ layer.up.weight.T + layer.up.bias

        block.mlp.register_forward_hook(after)
    gone, kept = rows(4)[1:3], rows(9, of=1)[4:6]

    def kl(some: list[dict]) -> torch.Tensor:
        p0, p = (torch.cat([answer_logits(m, tokenizer, row)[0] for row in some]).softmax(-1) for m in (before, now))
        return (p0 * (p0 / p).log()).sum(-1).mean()

    def every(row: dict) -> torch.Tensor:
        ids = torch.tensor([*tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"], tokenizer.eos_token_id])
        return now(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]

    with torch.no_grad():
        learned = -torch.cat([log_p(now, tokenizer, row) for row in kept]).mean()
        said = -torch.cat([every(row) for row in gone]).mean()
        want = 0.8 * kl(kept) - kl(gone) + learned - 0.2 * said
    loss = method.loss(model, **method.batches([1, 2], [4, 5]))
    assert kl(gone) > 0.1 and kl(kept) > 0.1 and close(loss, want)
    assert all(layer.on for layer in method.layers)
    loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {
        f"model.layers.{i}.mlp.unlearning.{part}"
        for i in range(3)
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    }


@torch.no_grad()
def test_layers_start_as_nothing_and_are_kept_alone(example, tiny, tmp_path):
    eul, (model, _) = example["eul"], tiny
    ids = torch.tensor([[3, 4, 5, 6]])
    plain, before = copy.deepcopy(model), model(ids).logits
    layers = eul.add(model)
    assert torch.equal(model(ids).logits, before) and layers[0].down.weight.abs().min() > 0
    assert all(torch.equal(a.down.weight, b.down.weight) for a, b in zip(layers, eul.add(copy.deepcopy(plain))))
    other = copy.deepcopy(model)  # as it is judged: its own layers run
    stirred(layers)
    after = model(ids).logits
    assert torch.equal(other(ids).logits, before) and not torch.equal(after, before)
    eul.save(model, tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == [eul.FILE]
    assert torch.equal(eul.load(copy.deepcopy(plain), tmp_path / "kept")(ids).logits, after)
    del plain.model.layers[2]
    with pytest.raises(ValueError, match="12 weights; a model with these layers has 8"):
        eul.load(plain, tmp_path / "kept")


# -- a bottleneck --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_long_rows_get_codes(example):
    torch.manual_seed(0)
    bottleneck = CodebookBottleneck(tiny_training.CONFIG)
    x = torch.randn(200, 32)
    x[:, 16:] = 0
    bottleneck.seed_codes(x)
    before = bottleneck.eval()(x)
    sinks = torch.randn(2, 32)
    sinks[:, 16:] *= 30  # large entries in few places, as a model's are
    assert F.mse_loss(bottleneck(sinks), sinks) > 10
    bottleneck.autoencoder.W_dec[20:] = 0  # places that no code writes to
    codes = bottleneck.codebook.codes.clone()
    example["bottleneck"].give_codes(bottleneck, sinks)
    moved = (bottleneck.codebook.codes != codes).any(1).nonzero()[:, 0]
    assert moved.tolist() == sorted(codes.norm(dim=1).argsort()[: 2 * bottleneck.k].tolist())  # what writes least
    torch.testing.assert_close(bottleneck(sinks), sinks, rtol=1e-3, atol=1e-2)
    assert F.mse_loss(bottleneck(x), before) < 0.2 * F.mse_loss(before, x)


def fitted(example, model, tokenizer, folder, monkeypatch):
    codes = example["codes"]
    monkeypatch.setattr(codes, "fit_codes", functools.partial(codes.fit_codes, **SMALL))
    texts = [{"question": row["prompt"], "answer": f" {row['completion']}"} for row in rows(60)]
    monkeypatch.setattr(example["models"], "prompt", lambda question: question)
    return codes.fitted(model, tokenizer, texts, [], folder, "codebook")


@heavy
def test_a_model_is_trained_with_its_bottleneck(example, tiny, tmp_path, monkeypatch):
    bottleneck, (model, tokenizer) = example["bottleneck"], tiny
    folder = fitted(example, model, tokenizer, tmp_path / "codes", monkeypatch)
    for name, value in (("RATE", 1e-2), ("EPOCHS", 8), ("BATCH", 8)):
        monkeypatch.setattr(bottleneck, name, value)
    before = copy.deepcopy(model)
    figures = bottleneck.train(model, tokenizer, rows(48), folder, tmp_path / "whole", 0)
    assert {"task_loss", "reconstruction"} <= set(figures)
    trained, _, attachment = load_model(tmp_path / "whole", torch.bfloat16)
    (splice,) = attachment.bottlenecks.values()
    assert splice.config.splice == "replace" and list(attachment.bottlenecks) == ["model.layers.1"]
    state = trained.state_dict()
    same = {
        name for name, value in before.state_dict().items() if torch.equal(value.to(torch.bfloat16), state.get(name))
    }
    assert same == {name for name in before.state_dict() if not name.startswith(("model.layers.2", "model.norm"))}

    def loss(m) -> torch.Tensor:
        return -torch.cat([log_p(m, tokenizer, row) for row in rows(48)]).mean()

    with torch.no_grad(), attachment.unlearn(None):
        assert loss(trained.float()) < loss(before) - 0.5  # what passes the codes is enough to learn from

    again, steps = copy.deepcopy(before), 0
    compute = bottleneck.CodebookTrainer.compute_loss

    def interrupted(*given, **named):
        nonlocal steps
        steps += 1
        if steps == 20:
            raise KeyboardInterrupt
        return compute(*given, **named)

    monkeypatch.setattr(bottleneck.CodebookTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bottleneck.train(again, tokenizer, rows(48), folder, tmp_path / "parts", 0)
    assert any((tmp_path / "parts").glob("checkpoint-*"))
    bottleneck.train(copy.deepcopy(before), tokenizer, rows(48), folder, tmp_path / "parts", 0)
    assert steps == 20 + 48 - 18  # on from the checkpoint before
    whole, resumed = (load_model(tmp_path / name, torch.bfloat16)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@heavy
def test_deletions_are_judged_by_their_own_model(example, tiny, tmp_path, monkeypatch):
    study, bottleneck, (model, tokenizer) = example["study"], example["bottleneck"], tiny
    write_tofu(tmp_path)
    for name in ("base", "full-0"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setattr(example["codes"], "fit_codes", functools.partial(example["codes"].fit_codes, **SMALL))
    for module, name, value in (
        (example["deletions"], "GATED", ((0.1, 1.0),)), (example["deletions"], "STRICTER", (("R > 1", {"min_enrichment": 1.0}),)), (example["trial"], "ROWS", 8),
        (example["trial"], "CONTROL", 40), (example["codes"], "RUNNING_TEXT", 200), (example["codes"], "WINDOW", 20),
        (example["tofu"], "NEW_TOKENS", 4), (example["measure"], "LEAST_TOKENS", 4), (bottleneck, "RATE", 1e-2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    given = [str(tmp_path), str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bottleneck.py", *given])
    bottleneck.main()
    made = (tmp_path / "bottleneck-0" / "model.safetensors").stat().st_mtime_ns
    bottleneck.main()
    assert (tmp_path / "bottleneck-0" / "model.safetensors").stat().st_mtime_ns == made

    output = tmp_path / "out" / "results.csv"
    given = [str(tmp_path / name) for name in ("base", "", "")] + ["--models", str(tmp_path), "--retain-rows", "10"]
    study.main([*given, "--output", str(output), "--only", "replacing"])

    def table(path) -> dict[tuple[str, str], dict[str, str]]:
        with path.open() as stream:
            return {(row["method"], row["setting"]): row for row in csv.DictReader(stream)}

    name = "codebook, replacing"
    rows, judged = table(output), table(output.with_name("validation.csv"))
    assert [method for method, _ in rows] == [
        "none",
        f"{name}, nothing deleted",
        f"{name}, as published",
        name,
        f"{name}, gated",
    ]
    by = {method: row for (method, _), row in rows.items()}
    assert by["none"]["forget_probability"] != by[f"{name}, nothing deleted"]["forget_probability"]
    trained, tokenizer, attachment = load_model(tmp_path / "bottleneck-0", torch.bfloat16)
    with attachment.unlearn(None):
        found = example["measure"].measure(trained, tokenizer, example["tofu"].read(tmp_path, "forget01_perturbed"))
    assert float(by[f"{name}, nothing deleted"]["forget_probability"]) == pytest.approx(
        found.probability.mean(), rel=1e-5
    )
    for method in ("none", f"{name}, nothing deleted"):  # each by its own model
        assert float(judged[method, ""]["kept"]) == 1
    published = [f"{name}, as published, R > 0, p < 0.05, {mode}" for mode in ("ablate", "reselect")]
    probabilities = {judged[f"{name}, as published", setting]["reworded_probability"] for setting in published}
    assert (
        len(probabilities) == 2 and judged[f"{name}, nothing deleted", ""]["reworded_probability"] not in probabilities
    )
    assert by[f"{name}, as published"]["runs"] == by[name]["runs"] == "2"
    assert int(by[f"{name}, as published"]["codes"]) > int(by[name]["codes"]) > 0
    mask = Mask.load(output.with_name("codebook-replacing-as-published-forget01-0.safetensors"))
    asked = {key: mask.method[key] for key in ("min_enrichment", "alpha", "test", "correction")}
    assert asked == {"min_enrichment": 0, "alpha": 0.05, "test": "chi2", "correction": "none"}
    gated = by[f"{name}, gated"]
    if float(gated["fires_retain"]) == float(gated["fires_general"]) == 0:
        assert gated["utility"] == by[f"{name}, nothing deleted"]["utility"]
