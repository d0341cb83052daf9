"""Who does a cell's job on a GPU: this package, PyTorch, and other libraries where installed. Part of ``cu_fast.bench``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cu_fast.bench.cells import Inputs
from cu_fast.bench.providers import Builder, Job, Skip, dense, eager, normalised, ours, require_memory
from cu_fast.bench.rivals import installed, version
from cu_fast.bench.truth import Answer

# Without CUDA graphs of its own: the benchmark captures each provider's call itself.
COMPILED = {"compiled": True, "mode": "max-autotune-no-cudagraphs"}


def _product(inputs: Inputs) -> Job:
    """All scores in bf16, by the library's matrix product, and nothing else: what a selection is measured against."""
    cell = inputs.cell
    require_memory(inputs.memory, 2 * cell.C * cell.E + 2 * cell.T * cell.C, "codes, and scores [T, C],")
    x, codes = inputs.x.bfloat16(), inputs.codes.bfloat16()
    return Job(lambda: F.linear(x, codes), note="scores [T, C] only: nothing is selected")


def _flashinfer(dtype: torch.dtype) -> Builder:
    """All scores by the library's matrix product, then FlashInfer's selection."""

    def build(inputs: Inputs) -> Job:
        flashinfer = installed("flashinfer", "flashinfer-python")
        cell, k = inputs.cell, inputs.cell.k
        require_memory(inputs.memory, 4 * cell.C * cell.E + 2 * dtype.itemsize * cell.T * cell.C, "codes, and scores,")
        x, codes, deleted = inputs.x.to(dtype), normalised(inputs.codes.float()).to(dtype), inputs.deleted

        def run() -> tuple[Tensor, Tensor]:
            scores = F.linear(x, codes)
            if deleted is not None:
                scores.masked_fill_(deleted, -torch.inf)
            return flashinfer.top_k(scores, k)

        return Job(run, lambda output: Answer(output[1]), note=version("flashinfer-python"))

    return build


def _faiss_gpu(inputs: Inputs) -> Job:
    """GpuIndexFlatIP on normalised codes, called with tensors of the GPU."""
    faiss = installed("faiss", "faiss-gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        raise Skip("the faiss that is installed was built without GPUs", status="not installed")
    installed("faiss.contrib.torch_utils", "faiss-gpu")
    if inputs.deleted is not None:
        raise Skip("faiss's flat index on a GPU has no deletion")
    require_memory(inputs.memory, 12 * inputs.cell.C * inputs.cell.E, "codes, and the index,")
    x, resources = inputs.x.float(), faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatIP(resources, inputs.cell.E)
    index.add(normalised(inputs.codes.float()))

    def run(keep_alive=resources) -> tuple[Tensor, Tensor]:
        return index.search(x, inputs.cell.k)

    return Job(run, lambda output: Answer(output[1]))


_EVERYWHERE: dict[str, Builder] = {
    "cu_fast": ours("native", "auto"),
    "cu_fast_fp32": ours("native", "fp32"),
    "cu_fast_triton": ours("triton", "auto"),
    "torch_fp32": eager(torch.float32),
    "torch_bf16": eager(torch.bfloat16),
    "torch_compile": eager(torch.float32, **COMPILED),
    "torch_compile_bf16": eager(torch.bfloat16, **COMPILED),
}
_SCANLESS = {name: build for name, build in _EVERYWHERE.items() if name != "cu_fast_fp32"}

GPU_PROVIDERS: dict[str, dict[str, Builder]] = {
    "sae_encode": dict(_SCANLESS),
    "sae_encode_topk": dict(_EVERYWHERE),
    "codebook_quantize": _EVERYWHERE
    | {
        "product_bf16": _product,
        "flashinfer_fp32": _flashinfer(torch.float32),
        "flashinfer_bf16": _flashinfer(torch.bfloat16),
        "faiss_gpu": _faiss_gpu,
    },
    "masked_decode": _SCANLESS
    | {
        "torch_compile": eager(torch.float32, gather=True, **COMPILED),
        "torch_compile_bf16": eager(torch.bfloat16, gather=True, **COMPILED),
        "torch_gather": eager(torch.float32, gather=True),
        "torch_dense_bf16": dense(torch.bfloat16),
    },
    "bottleneck": dict(_SCANLESS),
}
