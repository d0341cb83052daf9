"""What ``impl=`` means on a device: what "auto" takes, what an explicit choice says where it cannot run, and the log."""

from __future__ import annotations

import types

import pytest
import torch

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.ops import choice, packing


def test_cuda_says_why_it_cannot_run():
    reason = ops.available_impls()["cuda"]
    if reason is None:
        pytest.skip("the CUDA kernels can run here")
    with pytest.raises(RuntimeError) as caught:
        ops.codebook_quantize(torch.ones(2, 8), ops.pack_codes(torch.ones(64, 8)), k=4, impl="cuda")
    assert str(caught.value) == f"impl='cuda' is not available: {reason}"


@pytest.mark.parametrize("impl, device", [("cuda", "cpu"), ("cpu", "cuda")])
def test_tensors_elsewhere(impl, device, monkeypatch):
    monkeypatch.setattr(choice, "failure", lambda *_: None)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' needs {impl.upper()} tensors, these are on {device}"):
        ops.resolve(impl, torch.device(device))


@pytest.fixture
def auto(monkeypatch, caplog):
    """What "auto" means on a device where only the kernels of ``can_run`` can, and the log."""

    def choose(device: str, *can_run: str) -> tuple[str, str]:
        why_not = {"cpu": "it is missing", "cuda": "it is too old", "triton": "it is not installed"}
        monkeypatch.setattr(choice, "failure", lambda impl, _: None if impl in can_run else why_not[impl])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"number {index}")
        choice._announced.cache_clear()
        with caplog.at_level("INFO", "cu_fast"):
            return ops.resolve("auto", torch.device(device)), caplog.text

    yield choose
    choice._announced.cache_clear()


@pytest.mark.parametrize("can_run", [("cuda",), ("cpu", "cuda", "triton")])
def test_auto_on_a_gpu_is_cuda(auto, can_run):
    impl, log = auto("cuda:1", *can_run)
    assert impl == "cuda" and "on cuda: impl 'cuda' (number 1)\n" in log


def test_auto_on_a_gpu_without_cuda_kernels_is_triton(auto):
    impl, log = auto("cuda:0", "cpu", "triton")
    assert impl == "triton" and "impl 'triton' (number 0), because 'cuda' cannot run: it is too old\n" in log


def test_auto_on_a_gpu_without_kernels_is_the_reference(auto):
    impl, log = auto("cuda:0", "cpu")
    reasons = "'cuda' cannot run: it is too old; 'triton' cannot run: it is not installed\n"
    assert impl == "reference" and f"exact but slow, because {reasons}" in log


def test_auto_on_a_cpu_is_never_triton(auto, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    impl, log = auto("cpu", "cuda", "triton")
    assert impl == "reference" and "because 'cpu' cannot run: it is missing\n" in log
    impl, log = auto("xpu", "cpu", "cuda", "triton")
    assert impl == "reference" and "on xpu: impl 'reference', exact but slow, because there are no kernels" in log


@pytest.mark.parametrize("can_run, packs", [(("cuda",), True), (("triton",), True), (("cpu",), False)])
def test_a_gpu_has_a_plane_where_some_kernels_can_read_it(auto, monkeypatch, can_run, packs):
    auto("cuda:0", *can_run)
    monkeypatch.setattr(reference, "pack_scan", lambda digits, factor, E: ("plane", "terms", "mean"))
    digits = types.SimpleNamespace(shape=(700, 3, 64), device=torch.device("cuda:0"))
    assert packing._pack_scan(digits, None, 40, "auto") == (("plane", "terms", "mean") if packs else None)
    if not packs:
        with pytest.raises(RuntimeError, match=r"needs kernels for cuda:0 tensors: 'cuda' cannot .*; 'triton' cannot"):
            packing._pack_scan(digits, None, 40, "int8")
