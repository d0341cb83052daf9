"""Other libraries that do the same job, where they are installed: :func:`register` adds them to the benchmark.

Each is called as its users call it, with what can be prepared once prepared before. A library that does not have
what a cell asks for (deletion, a mask for each row) is skipped there, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from cu_fast.bench.cells import DTYPES, Inputs
from cu_fast.bench.eager import normalised
from cu_fast.bench.job import Builder, Job, Skip, require_memory
from cu_fast.bench.providers import PROVIDERS
from cu_fast.bench.truth import Answer


def installed(name: str, package: str) -> ModuleType:
    """Imports a module of a package; raises Skip where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:  # the package itself, or one that it needs
        raise Skip(f"{package} cannot be imported here: {error}", status="not installed") from error


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _faiss(inputs: Inputs) -> Job:
    """IndexFlatIP on normalised codes; an SAE's bias is one more dimension, in which x is 1."""
    faiss = installed("faiss", "faiss-cpu")
    cell = inputs.cell
    require_memory(inputs.memory, 8 * cell.C * cell.E, "codes, and the index,")
    x, codes = inputs.x.float(), inputs.codes.float()
    if cell.op == "codebook_quantize":
        codes = normalised(codes)
    else:
        x = F.pad(x - inputs.b_pre.float(), (0, 1), value=1.0)
        codes = torch.cat([codes, inputs.bias.float()[:, None]], 1)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(codes.shape[1])
    index.add(codes.numpy())
    # Codebook Features loads a patch of faiss whose search takes no params; it keeps faiss's own under this name.
    search = getattr(index, "search_numpy", index.search)
    z, k = x.numpy(), cell.k
    if inputs.deleted is None:
        return Job(lambda: search(z, k), _faiss_answer)

    import numpy as np

    bitmaps = [np.packbits(~row.numpy(), bitorder="little") for row in inputs.deleted]
    selectors = [faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits)) for bits in bitmaps]
    params = [faiss.SearchParameters(sel=selector) for selector in selectors]

    def masked(keep_alive=(bitmaps, selectors)):
        if len(params) == 1:
            return search(z, k, params=params[0])
        found = [search(z[t : t + 1], k, params=one) for t, one in enumerate(params)]
        return tuple(map(np.concatenate, zip(*found)))

    return Job(masked, _faiss_answer, note="" if len(params) == 1 else "a search for each token's mask")


def _faiss_answer(output) -> Answer:
    return Answer(torch.from_numpy(output[1]))


def _codebook_features(inputs: Inputs) -> Job:
    """The snap function of Codebook Features: the same score, and the mean of the k codes, which it always makes."""
    models = installed("codebook_features.models", "codebook-features")
    cell = inputs.cell
    if inputs.mask_row is not None and cell.mask == "rows":
        raise Skip("codebook-features deletes the same codes for every token")
    require_memory(inputs.memory, 8 * cell.T * cell.C, "scores [T, C]")
    options = {
        "cosine": False,
        "keep_k_codes": True,
        "disable_for_tkns": "all",
        "disable_topk": 0,
        "disable_sim_idx": [],
        "disable_codes": [] if inputs.deleted is None else inputs.deleted[0].nonzero()[:, 0],
    }
    z, snap = inputs.x[None], models.InnerProductSnapFunction.apply
    note = f"{version('codebook-features')}; also makes the mean of the codes"
    return Job(lambda: snap(z, inputs.codes, cell.k, options), lambda out: Answer(out[1][0]), note=note)


def _no_deletion(inputs: Inputs, package: str) -> None:
    if inputs.deleted is not None:
        raise Skip(f"{package} has no deletion")


def _eai_sparsify(inputs: Inputs) -> Job:
    sparsify = installed("sparsify", "eai-sparsify")
    cell = inputs.cell
    _no_deletion(inputs, "eai-sparsify")
    require_memory(inputs.memory, 4 * cell.C * cell.E + 8 * cell.T * cell.C, "codes, and activations [T, C],")
    config = sparsify.SparseCoderConfig(num_latents=cell.C, k=cell.k)
    coder = sparsify.SparseCoder(cell.E, config, dtype=DTYPES[cell.dtype], decoder=False)
    _set(coder.encoder.weight, inputs.codes)
    _set(coder.encoder.bias, inputs.bias)
    _set(coder.b_dec, inputs.b_pre)
    return Job(lambda: coder.encode(inputs.x), lambda out: Answer(out.top_indices), note=version("eai-sparsify"))


def _sae_lens(inputs: Inputs) -> Job:
    sae_lens = installed("sae_lens", "sae-lens")
    cell = inputs.cell
    _no_deletion(inputs, "sae-lens")
    require_memory(inputs.memory, 16 * cell.C * cell.E + 12 * cell.T * cell.C, "weights, and activations [T, C],")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[cell.dtype]
    config = sae_lens.TopKSAEConfig(
        d_in=cell.E, d_sae=cell.C, k=cell.k, dtype=dtype, device="cpu", apply_b_dec_to_input=True
    )
    sae = sae_lens.TopKSAE(config).eval()
    _set(sae.W_enc, inputs.codes.T)
    _set(sae.b_enc, inputs.bias)
    _set(sae.b_dec, inputs.b_pre)
    note = f"{version('sae-lens')}; returns activations [T, C]"
    return Job(lambda: sae.encode(inputs.x), lambda z: Answer(_ids_of_activations(z, cell.k)), note=note)


def _ids_of_activations(z: Tensor, k: int) -> Tensor:
    values, ids = z.topk(k)
    return torch.where(values > 0, ids, -1)


def _set(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.requires_grad_(False).copy_(value)


# -- on a GPU ----------------------------------------------------------------------------------------------------


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


# By device, op and name, as cu_fast.bench.providers.PROVIDERS.
RIVALS: dict[str, dict[str, dict[str, Builder]]] = {
    "cpu": {
        "sae_encode_topk": {"faiss": _faiss, "eai_sparsify": _eai_sparsify, "sae_lens": _sae_lens},
        "codebook_quantize": {"faiss": _faiss, "codebook_features": _codebook_features},
    },
    "cuda": {
        "codebook_quantize": {
            "flashinfer_fp32": _flashinfer(torch.float32),
            "flashinfer_bf16": _flashinfer(torch.bfloat16),
            "faiss_gpu": _faiss_gpu,
        },
    },
}


def register() -> None:
    """From here on, in this process, the benchmark measures them too."""
    for device, ops in RIVALS.items():
        for op, rivals in ops.items():
            PROVIDERS[device][op].update(rivals)
