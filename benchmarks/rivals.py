"""Other libraries that do the same job, where they are installed: :func:`register` adds them to the benchmark.

Beside a deletion there is what is done instead of it: the hook of SAEBench, written anew, and a LoRA, which is another job.

Each is called as its users call it, with what can be prepared once prepared before. A library that does not have
what a cell asks for (deletion, a mask for each row) is skipped there, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cu_fast.bench.cells import CLAMP, DTYPES, Inputs
from cu_fast.bench.eager import normalised, tokens_by_mask
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


# -- beside a deletion -------------------------------------------------------------------------------------------


def _saebench_hook(dtype: torch.dtype) -> Builder:
    """What SAEBench hooks into a model: all latents are encoded, some changed, both decoded, and the difference added."""

    def build(inputs: Inputs) -> Job:
        cell = inputs.cell
        if len(inputs.latents) > 1:
            raise Skip("SAEBench's hook changes the same latents in every token")
        needed = dtype.itemsize * (2 * cell.C * cell.E + 5 * cell.T * cell.C)
        require_memory(inputs.memory, needed, "weights, and activations [T, C],")
        x, bias, theta = (part.to(dtype) for part in (inputs.x, inputs.bias, inputs.theta))
        W_enc, W_dec, latents = inputs.codes.to(dtype).T.contiguous(), inputs.dec.to(dtype), inputs.latents[0].long()

        def run() -> Tensor:
            pre = torch.addmm(bias, x, W_enc)
            activations = torch.relu(pre) * (pre > theta)
            changed = activations.clone()
            some = changed[:, latents]
            changed[:, latents] = torch.where(some > 0, CLAMP, some)
            return x + (changed @ W_dec - activations @ W_dec)

        return Job(run, lambda y: Answer(values=y), note="a JumpReLU autoencoder, in PyTorch")

    return build


class _Known(nn.Linear):
    """A linear layer whose output is there already, so that its own product is not timed."""

    output: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.output


OTHER_JOB = "another job: adds to a linear layer's output, whose own product is not timed"


def _peft_lora(inputs: Inputs) -> Job:
    """PEFT's layer with an adapter of rank k, not merged; with one per mask, and each token's named, where there are several."""
    peft = installed("peft", "peft")
    cell, pool = inputs.cell, len(inputs.latents)
    require_memory(inputs.memory, 8 * (pool * cell.k * cell.E + cell.E**2), "adapters")
    model, x = nn.Sequential(_Known(cell.E, cell.E, bias=False)), inputs.x
    model.to(x.device, x.dtype)
    config = peft.LoraConfig(r=cell.k, lora_alpha=cell.k, target_modules=["0"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of several adapters, which are meant
        for mask in range(pool):
            peft.inject_adapter_in_model(config, model, adapter_name=str(mask))
    layer = model.eval()[0]
    layer.base_layer.output = torch.zeros_like(x)
    note = f"{version('peft')}; {OTHER_JOB}"
    if pool == 1:
        return Job(lambda: layer(x), note=note)
    names = list(map(str, inputs.mask_row.tolist()))
    return Job(lambda: layer(x, adapter_names=names), note=f"{note}; an adapter per mask")


def _torch_lora(inputs: Inputs) -> Job:
    """The same two products and sum in PyTorch; adapter by adapter where there are several."""
    x, held, k = inputs.x, tokens_by_mask(inputs.mask_row), inputs.cell.k
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, len(held), k, x.shape[1], generator=generator).div_(x.shape[1]).to(x.device, x.dtype)
    output, (downs, ups) = torch.zeros_like(x), weights
    ups = ups.mT.contiguous()
    if len(held) == 1:
        return Job(lambda: output + F.linear(F.linear(x, downs[0]), ups[0]), note=OTHER_JOB)

    def run() -> Tensor:
        for (_, some), down, up in zip(held, downs, ups):
            output[some] += F.linear(F.linear(x[some], down), up)
        return output

    return Job(run, note=f"{OTHER_JOB}; an adapter per mask")


_DELETION: dict[str, Builder] = {
    "saebench_hook": _saebench_hook(torch.float32),
    "saebench_hook_bf16": _saebench_hook(torch.bfloat16),
    "peft_lora": _peft_lora,
    "torch_lora": _torch_lora,
}


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
        "delete_latents": _DELETION,
    },
    "cuda": {
        "codebook_quantize": {
            "flashinfer_fp32": _flashinfer(torch.float32),
            "flashinfer_bf16": _flashinfer(torch.bfloat16),
            "faiss_gpu": _faiss_gpu,
        },
        "delete_latents": _DELETION,
    },
}


def register() -> None:
    """From here on, in this process, the benchmark measures them too."""
    for device, ops in RIVALS.items():
        for op, rivals in ops.items():
            PROVIDERS[device][op].update(rivals)
