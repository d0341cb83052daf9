"""examples/forgetting/cost.py measures every job in small, what it measures has happened, and goes on where it stopped."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import mmap

import pytest
import tiny_training
import torch
from scripts import scripts
from test_smollm2_example import write_topics
from tiers import heavy
from tiny_training import WORDS

import cu_fast


@pytest.fixture
def cost(monkeypatch):
    for found in scripts(monkeypatch, "forgetting", "cost", "topics"):
        yield found["cost"]


@pytest.fixture
def folders(cost, tmp_path, monkeypatch):
    """The arguments, with an autoencoder and a codebook of random directions."""
    write_topics(tmp_path / "topics")
    (tmp_path / "valid.txt").write_text(" ".join(WORDS * 40))
    tokenizer = tiny_training.word_tokenizer()
    model = tiny_training.tiny_llama(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    basis = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = cu_fast.SAE(basis, torch.zeros(64), torch.full((64,), 0.01), basis.clone(), b_dec=torch.zeros(32))
    cu_fast.sae.save_sae(sae, tmp_path / "sae")
    config = dataclasses.replace(tiny_training.CONFIG, splice="delta")
    cu_fast.attach(model, {"model.layers.1": config}).save(tmp_path / "out" / "codebook")
    for name, value in {
        "LAYER": "model.layers.1", "BATCHES": (1, 2), "HELD": (1, 4), "CODES": 8, "FIRING": 4, "ENRICHMENT": 0.2,
        "GATE_WINDOWS": 4, "PROMPT": "the cat sat on the mat . Anna reads",
    }.items():  # fmt: skip
        monkeypatch.setattr(cost, name, value)
    monkeypatch.setattr(cost.windows, "__defaults__", (20,))
    where = (tmp_path / name for name in ("model", "topics", "", "sae", "out"))
    model, topics, wikitext, sae, output = map(str, where)
    few = ["--rounds", "2", "--repeats", "2", "--only", "solar", "--batches", "1", "2"]
    return [model, topics, wikitext, sae, "--output", output, *few]


def test_a_fit_that_was_stopped_goes_on(cost, folders, tmp_path, monkeypatch):
    (tmp_path / "out" / "codebook").rename(tmp_path / "out" / "codebook.run")
    fitted = []
    monkeypatch.setattr(cost, "fit_codes", lambda *_, resume, **__: fitted.append(resume))
    monkeypatch.setattr(cost.cu_fast, "attach", lambda *_: None)
    options = argparse.Namespace(output=tmp_path / "out", wikitext=tmp_path, topics=tmp_path / "topics")
    cost.attached(None, tiny_training.word_tokenizer(), "codebook", options)
    assert fitted == [True]


@heavy
def test_every_job_is_measured_once(cost, folders, tmp_path, monkeypatch):
    jobs = []

    def here(arguments: list[str]) -> None:
        jobs.append(tuple(arguments[-2:]))
        cost.main(arguments)

    monkeypatch.setattr(cost, "alone", here)
    left = torch._to_functional_tensor(torch.zeros(3))  # by a compiler: it has no memory
    cost.main(folders)
    del left
    assert jobs == [(what, splice) for splice in cost.SPLICES for what in cost.JOBS]
    with open(tmp_path / "out" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(row["torch_version"] == torch.__version__ and row["load"] for row in rows)
    for splice in cost.SPLICES:
        steps = {row["case"]: row for row in rows if (row["what"], row["splice"]) == ("unlearn", splice)}
        assert set(steps) == {f"{step}: solar" for step in ("count the control", "count", "find_mask", "fit_gate")}
        assert all(float(row["least"]) <= float(row["median"]) and row["repeats"] == "2" for row in steps.values())
        assert int(steps["count the control: solar"]["tokens"]) > int(steps["count: solar"]["tokens"]) > 0
        assert int(steps["find_mask: solar"]["codes"]) > 0
        for batch in ("1", "2"):
            of = {
                (row["case"], row["held"]): row
                for row in rows
                if (row["what"], row["splice"], row["batch"]) == ("decode", splice, batch)
            }
            taken = {case: float(row["codes"]) for case, row in of.items()}
            assert taken.pop(("model alone", "0")) == taken.pop(("model alone, again", "0")) == 0
            assert taken.pop(("nothing deleted", "0")) == 0
            own = taken.pop(("each its own", batch))
            assert 0 < taken["deleted at once", "1"] < taken["deleted at once", "4"] and own > 0 and len(taken) == 2
            assert float(of["model alone", "0"]["added_ms"]) == 0 < float(of["deleted at once", "4"]["median"])
        sizes = [row for row in rows if (row["what"], row["splice"]) == ("held", splice)]
        disk = {row["case"]: int(row["disk"]) for row in sizes if row["disk"]}
        assert disk["mask with a gate"] > disk["mask"] > 64 // 8
        assert ("mask with its latents" in disk) == (splice == "sae")
        memory = {(row["case"], row["held"]): float(row["memory"]) for row in sizes if row["memory"]}
        latents = 8 * (32 + 32 + 2) * 4 if splice == "sae" else 0  # of 8 latents
        assert {held for _, held in memory} == {"1", "4"}
        assert memory["masks", "1"] == memory["masks", "4"] == latents + 64 // 8  # and a bit per code
    cost.main(folders)
    assert len(jobs) == 6, "all was there"


def test_a_step_is_charged_with_its_own_peak(cost):
    """What a step gives back in the end counts, and what one before it took does not. The step's memory is from the system:
    a tensor's may be what another test left free in the heap, which is no growth."""
    _, _, large = cost.timed(lambda: torch.frombuffer(mmap.mmap(-1, 80_000_000), dtype=torch.uint8).fill_(1).max())
    kept, _, small = cost.timed(sum, range(1000))
    assert large > 60 and small < 20 and kept == 499500


def test_a_union_that_is_too_large_is_said(cost, folders, monkeypatch):
    """A codebook's deletion takes so many codes at most; the other cases are measured all the same."""
    monkeypatch.setattr("cu_fast.masks.tables.ChangeTable.write", refuse)
    options = ["--job", "decode", "sae"]
    cost.main([*folders, *options])
    output = folders[folders.index("--output") + 1]
    with open(f"{output}/results.csv") as file:
        cases = {row["case"] for row in csv.DictReader(file)}
    assert "deleted at once: refused, too many" in cases and "nothing deleted" in cases


def refuse(*_: object, **__: object) -> None:
    raise ValueError("too many")
