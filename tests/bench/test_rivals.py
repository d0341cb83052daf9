"""The benchmark of benchmarks/: other libraries, where installed and with stand-ins, and whole models. No times."""

from __future__ import annotations

import importlib
import importlib.metadata
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_bench import FP32, of, run
from test_bench_gpu import Cuda
from test_bench_gpu import run as run_on_gpu

from cu_fast import bench
from cu_fast.bench.clock_gpu import GraphClock
from cu_fast.bench.plan import providers_of
from cu_fast.bench.providers import PROVIDERS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LIBRARIES = {
    "sae_encode_topk": ("faiss", "eai_sparsify", "sae_lens"),
    "codebook_quantize": ("faiss", "codebook_features"),
}
ON_GPU = ("flashinfer_fp32", "flashinfer_bf16", "faiss_gpu")
DELETION = ("saebench_hook", "saebench_hook_bf16", "peft_lora", "torch_lora")


@pytest.fixture
def script(monkeypatch):
    """Gives a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def rivals(script):
    script("rivals").register()


def test_they_are_measured_where_they_are_registered_alone(script):
    known = {(device, op): list(providers_of(op, device)) for device in PROVIDERS for op in PROVIDERS[device]}
    others = (*ON_GPU, *DELETION, *sum(LIBRARIES.values(), ()))
    assert not any(name in names for names in known.values() for name in others)
    script("rivals").register()
    for (device, op), names in known.items():
        added = {"cpu": LIBRARIES, "cuda": {"codebook_quantize": ON_GPU}}[device] | {"delete_latents": DELETION}
        more = added.get(op, ())
        assert list(providers_of(op, device)) == [*names, *more]


@pytest.mark.parametrize("op", LIBRARIES)
def test_those_that_are_installed_are_right(op, rivals):
    rows = run(op, providers=("cu_fast", *LIBRARIES[op]), masks=("none", "50%", "rows"), dtypes=("fp32",))
    assert len(rows) == 3 * (1 + len(LIBRARIES[op]))
    for row in rows:
        assert row["kernel_provider"] in FP32 and row["status"] in ("ok", "skipped", "not installed"), row["note"]
        assert row["match"] == 1.0 if row["status"] == "ok" else row["note"], row


@pytest.mark.parametrize("on", [run, run_on_gpu])
def test_beside_a_deletion_the_hook_is_right_and_a_lora_is_not_judged(on, rivals, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(bench, "GraphClock", lambda: GraphClock(Cuda(), "cpu"))
    rows = on("delete_latents", providers=("cu_fast", *DELETION), tokens=(20,), dtypes=("fp32",))
    one, several = rows[:5], rows[5:]
    assert [row["status"] for row in one] == ["ok", "ok", "ok", "not installed", "ok"]
    assert [row["status"] for row in several] == ["ok", "skipped", "skipped", "not installed", "ok"]
    assert one[0]["match"] == one[1]["match"] == several[0]["match"] == 1.0 > one[2]["match"]
    assert "the same latents in every token" in several[1]["note"]
    for lora in (one[4], several[4]):
        assert lora["match"] == lora["identical"] == "" and "another job" in lora["note"] and lora["ratio"] > 0
    assert "an adapter per mask" in several[4]["note"] and "an adapter per mask" not in one[4]["note"]


def test_peft_is_called_as_it_is_documented(rivals, monkeypatch):
    peft, made, called = ModuleType("peft"), [], []

    class Layer(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x, adapter_names=None):
            called.append(adapter_names)
            return self.base_layer(x)

    def inject(config, model, adapter_name):
        made.append((config["r"], adapter_name))
        if config["target_modules"] == ["0"] and not isinstance(model[0], Layer):
            model[0] = Layer(model[0])

    peft.LoraConfig, peft.inject_adapter_in_model = dict, inject
    monkeypatch.setitem(sys.modules, "peft", peft)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
    rows = run("delete_latents", providers=("peft_lora",), tokens=(20,), dtypes=("bf16",))
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[0]["note"].startswith("peft 1.0; another job")
    assert made == [(60, "0")] + [(60, str(mask)) for mask in range(16)]
    names = 8 * ["0"] + 8 * ["1"] + 4 * ["2"]
    assert called[0] is None and called[-1] == names and all(each in (None, names) for each in called)


def test_a_library_that_is_missing_has_a_row(rivals, monkeypatch):
    for name in ("faiss", "codebook_features.models", "sparsify", "sae_lens"):
        monkeypatch.setitem(sys.modules, name, None)
    for op, names in LIBRARIES.items():
        rows = run(op, providers=names, masks=("none",), dtypes=("fp32",))
        assert [row["status"] for row in rows] == ["not installed"] * len(names)
        assert all("cannot be imported" in row["note"] for row in rows)


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for FlashInfer and a faiss with GPUs, as far as they are called."""
    flashinfer, faiss, patch = ModuleType("flashinfer"), ModuleType("faiss"), ModuleType("faiss.contrib.torch_utils")

    def top_k(scores, k):
        values, ids = scores.topk(k)
        return values.flip(1), ids.flip(1)  # it need not sort

    class Index:
        def __init__(self, resources, width):
            self.width = width

        def add(self, codes):
            assert codes.shape[1] == self.width
            self.codes = codes

        def search(self, x, k):
            return (x @ self.codes.T).topk(k)

    flashinfer.top_k = top_k
    faiss.StandardGpuResources, faiss.GpuIndexFlatIP = object, Index
    for module in (flashinfer, faiss, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
    monkeypatch.setattr(bench, "GraphClock", lambda: GraphClock(Cuda(), "cpu"))
    return faiss


def test_those_for_gpus_are_called_as_they_are_documented(rivals, libraries):
    rows = run_on_gpu("codebook_quantize", dtypes=("fp32",), masks=("none", "50%"), providers=ON_GPU)
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["ok", "ok", "skipped"]
    exact = [row for row in rows if row["kernel_provider"] != "flashinfer_bf16" and row["status"] == "ok"]
    assert all(row["match"] == 1.0 for row in exact)
    del libraries.StandardGpuResources
    (row,) = run_on_gpu("codebook_quantize", dtypes=("fp32",), masks=("none",), providers=("faiss_gpu",))
    assert row["status"] == "not installed" and "without GPUs" in row["note"]


# -- the scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["bottleneck", "codebook_quantize", "delete_latents", "masked_decode", "sae_encode"])
def test_a_script_gives_the_rows_of_the_command(op, script, monkeypatch):
    asked, path = [], str(BENCHMARKS / f"bench_{op}.py")
    monkeypatch.setattr(bench, "run", lambda plan, output, progress: asked.append(plan) or [])
    monkeypatch.setattr(sys, "argv", [path, "--seconds", "2"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(path, run_name="__main__")
    assert exit.value.code == 0 and asked[0].seconds == 2 and all(name.startswith(op) for name in asked[0].ops)
    assert all(set(names) <= set(providers_of(name)) for name, names in LIBRARIES.items() if name in asked[0].ops)


def test_models_are_measured_with_and_without(script, tmp_path, capsys):
    path, models = tmp_path / "rows.csv", script("bench_models")
    models.main(["--shape", "64,70,4", "--seconds", "1e-6", "--rounds", "1", "--output", str(path)])
    assert "tokens per second" in capsys.readouterr().out
    rows = bench.read_rows(path)
    assert [row["kernel_provider"] for row in rows] == ["none", "cu_fast", "torch_fp32"] * 2
    assert all(row["status"] == "ok" and row["kernel_name"] == "models" for row in rows), rows
    assert [float(row["added_percent"]) for row in of(rows, "none")] == [0.0, 0.0]
    (sheet,) = bench.tables(rows)
    assert sheet.row_count == 6 and "| gpt2 | 70, 4 | cu_fast |" in bench.markdown(rows)
    with pytest.raises(SystemExit):
        models.main(["--data", "gpt3"])
    assert "--data is 'gpt3'; it should be of gpt2, t5" in capsys.readouterr().err


@torch.no_grad()
def test_the_eager_bottleneck_of_a_model_does_the_same(script):
    models = script("bench_models")
    inputs = models.ModelInputs(models.model_cell("t5", (64, 70, 4)), seed=0)
    states = [build(inputs).call().last_hidden_state for build in models.MODEL_PROVIDERS.values()]
    assert torch.allclose(states[1], states[2], atol=1e-4) and not torch.allclose(states[0], states[1], atol=1e-2)
