"""What does a cell's job: this package's implementations, and PyTorch code. Part of ``cu_fast.bench``.

A provider is a function that prepares a :class:`~cu_fast.bench.job.Job` for a cell's inputs, with everything that a user
would do once: packing, normalising, casting, compiling. ``PROVIDERS`` may be added to; what is in it is measured.
"""

from __future__ import annotations

import torch

from cu_fast.bench.eager import dense, eager, product
from cu_fast.bench.job import Builder
from cu_fast.bench.ours import ours

# Without CUDA graphs of its own: the benchmark captures each provider's call itself.
COMPILED_ON_GPU = {"compiled": True, "mode": "max-autotune-no-cudagraphs"}

_CPU: dict[str, Builder] = {
    "cu_fast": ours("native", "auto"),
    "cu_fast_exact": ours("native", "none"),
    "reference": ours("reference", "auto"),
    "torch_fp32": eager(torch.float32),
    "torch_bf16": eager(torch.bfloat16),
    "torch_compile": eager(torch.float32, compiled=True),
}
_GPU: dict[str, Builder] = {
    "cu_fast": ours("native", "auto"),
    "cu_fast_exact": ours("native", "none"),
    "cu_fast_triton": ours("triton", "auto"),
    "torch_fp32": eager(torch.float32),
    "torch_bf16": eager(torch.bfloat16),
    "torch_compile": eager(torch.float32, **COMPILED_ON_GPU),
    "torch_compile_bf16": eager(torch.bfloat16, **COMPILED_ON_GPU),
}


def _without_scan(providers: dict[str, Builder]) -> dict[str, Builder]:
    return {name: build for name, build in providers.items() if name != "cu_fast_exact"}


# By device, op and name, in the order in which their rows are written.
PROVIDERS: dict[str, dict[str, dict[str, Builder]]] = {
    "cpu": {
        "sae_encode": _without_scan(_CPU),
        "sae_encode_topk": dict(_CPU),
        "codebook_quantize": dict(_CPU),
        "masked_decode": _without_scan(_CPU)
        | {
            "torch_compile": eager(torch.float32, compiled=True, gather=True),
            "torch_gather": eager(torch.float32, gather=True),
            "torch_dense_fp32": dense(torch.float32),
            "torch_dense_bf16": dense(torch.bfloat16),
        },
        "bottleneck": _without_scan(_CPU),
        "delete_latents": _without_scan(_CPU) | {"torch_gather": eager(torch.float32, gather=True)},
    },
    "cuda": {
        "sae_encode": _without_scan(_GPU),
        "sae_encode_topk": dict(_GPU),
        "codebook_quantize": _GPU | {"product_bf16": product},
        "masked_decode": _without_scan(_GPU)
        | {
            "torch_compile": eager(torch.float32, gather=True, **COMPILED_ON_GPU),
            "torch_compile_bf16": eager(torch.bfloat16, gather=True, **COMPILED_ON_GPU),
            "torch_gather": eager(torch.float32, gather=True),
            "torch_dense_bf16": dense(torch.bfloat16),
        },
        "bottleneck": _without_scan(_GPU),
        "delete_latents": _without_scan(_GPU) | {"torch_gather": eager(torch.float32, gather=True)},
    },
}
