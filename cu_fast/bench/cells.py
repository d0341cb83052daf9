"""What the benchmark measures on: a cell of the grid, and its tensors. Part of ``cu_fast.bench``.

Letters as everywhere: T tokens, E code width, C codes, k codes kept per token, U masks in a table; D equals E here. Of
``delete_latents`` C are the latents of the whole autoencoder, and k those that each mask changes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from torch import Tensor

from cu_fast.masks import Mask
from cu_fast.nn import BottleneckConfig, CodebookBottleneck

OPS = ("sae_encode", "sae_encode_topk", "codebook_quantize", "masked_decode", "bottleneck", "delete_latents")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKS = ("none", "1%", "50%", "rows", "one")
_ABLATING = ("none", "1%", "50%", "rows")
# The kinds that each op has, in the order in which they are measured.
MASKS_OF = dict.fromkeys(OPS, _ABLATING) | {"sae_encode": ("none",), "delete_latents": ("one", "rows")}
DATA = ("gaussian", "mean", "clusters20", "clusters500", "outliers", "equal", "one_cluster")
CLUSTERS = {"clusters20": 20, "clusters500": 500, "one_cluster": 1, "equal": 1}
SPREAD = 0.01  # of a code round its cluster's centre, relative to the centre
OUTLIERS, OUTLIER_SCALE = 8, 30.0  # dimensions of z, and how many times larger, as in LLM activations
COMMON_MEAN = 4.0  # of "mean", in standard deviations of the codes
ROW_SHARE = 0.01  # of the codes that each token's own mask deletes ("rows")
POOL = 16  # masks of delete_latents' "rows": up to so many tokens have one each, more in sequences of SEQUENCE
SEQUENCE = 8
DEVIATIONS = 2.0537  # by which a pre-activation has to exceed its mean to fire: 2 % of a normal distribution do
CLAMP = -25.0  # what a latent of a mask that fires becomes: the smallest of those that SAEBench tries


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid. ``data`` is a kind of DATA."""

    op: str
    T: int
    E: int
    C: int
    k: int
    dtype: str = "fp32"
    mask: str = "none"
    data: str = "gaussian"

    @property
    def config(self) -> dict[str, int | str]:
        """Everything but the op and T, which have columns of their own."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("op", "T")}

    @property
    def input_bytes(self) -> int:
        """What :func:`make_inputs` allocates at its peak: x, the codes while they are drawn, masks as bool."""
        masks = {"none": 0, "one": 0, "rows": 0 if self.op == "delete_latents" else self.T}.get(self.mask, 1)
        copies = 3 if self.op in ("bottleneck", "delete_latents") else 2
        return 4 * (copies * self.C * self.E + self.T * (self.E + 2 * self.k)) + 2 * masks * self.C


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A cell's tensors; those that its op does not have are None.

    x [T, E]; codes [C, E] (``sae_encode``: W_enc [E, E]; ``masked_decode``: the table); bias [C], b_pre [E] of the
    SAE ops; ids int32, weights [T, k] of ``masked_decode``; deleted bool [U, C], which broadcasts to [T, C],
    mask_table int32 [U, ceil(C/32)],
    mask_row int32 [T]; bottleneck: the module in evaluation, its codes ``codes``, encoder and decoder the identity;
    theta [C], dec [C, E] and latents int32 [U, k], each row ascending, of ``delete_latents``, whose encoder is ``codes``.
    memory: bytes that may be used, None = what the device has free. host: the same on the CPU, where these are on a GPU.
    """

    cell: Cell
    x: Tensor
    codes: Tensor
    bias: Tensor | None = None
    b_pre: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None
    deleted: Tensor | None = None
    mask_table: Tensor | None = None
    mask_row: Tensor | None = None
    bottleneck: CodebookBottleneck | None = None
    theta: Tensor | None = None
    dec: Tensor | None = None
    latents: Tensor | None = None
    memory: int | None = None
    host: Inputs | None = None

    @property
    def masks(self) -> dict[str, Tensor | None]:
        return {"mask_table": self.mask_table, "mask_row": self.mask_row}

    def is_deleted(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Whether each code is deleted for its token: rows int64 [n], ids int64 [n, k] >= 0 -> bool [n, k]."""
        if self.deleted is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        return self.deleted[self.mask_row[rows].long()].gather(1, ids)


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same tensors on a device, with ``host`` set to the given ones."""
    parts = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    new: dict = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    if inputs.bottleneck is not None:
        new["bottleneck"] = copy.deepcopy(inputs.bottleneck)
        new["bottleneck"].impl = torch.device(device).type  # before it moves, which folds it there
        new["bottleneck"].to(device)
    return dataclasses.replace(inputs, **new, host=inputs)


def make_inputs(cell: Cell, seed: int = 0, memory: int | None = None) -> Inputs:
    """The tensors of a cell, on the CPU; equal cells and seeds give equal tensors."""
    generator = torch.Generator().manual_seed(seed + 1)
    dtype = DTYPES[cell.dtype]
    codes = _codes(cell.E if cell.op == "sae_encode" else cell.C, cell.E, cell.dtype, cell.data, seed)
    x = torch.randn(cell.T, cell.E, generator=generator)
    spread = torch.ones(cell.E)
    if cell.data == "outliers":
        spread[torch.randperm(cell.E, generator=generator)[:OUTLIERS]] = OUTLIER_SCALE
    x *= spread
    made: dict = {}
    if cell.op in ("sae_encode", "sae_encode_topk"):
        made["bias"] = (0.1 * torch.randn(codes.shape[0], generator=generator)).to(dtype)
        made["b_pre"] = (0.1 * torch.randn(cell.E, generator=generator)).to(dtype)
    elif cell.op == "masked_decode":
        made["ids"] = torch.randint(cell.C, (cell.T, cell.k), generator=generator, dtype=torch.int32)
        made["weights"] = torch.rand(cell.T, cell.k, generator=generator).to(dtype)
    elif cell.op == "bottleneck":
        made["bottleneck"] = _bottleneck(cell, codes)
    elif cell.op == "delete_latents":
        made |= _autoencoder(cell, codes, spread, generator)
    if cell.op != "delete_latents" and cell.mask != "none":
        made |= _masks(cell, generator)
    return Inputs(cell, x.to(dtype), codes, **made, memory=memory)


@functools.lru_cache(maxsize=1)  # neighbouring cells of a run share their codes
def _codes(C: int, E: int, dtype: str, data: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if data in CLUSTERS:
        centres = torch.randn(CLUSTERS[data], E, generator=generator)
        codes = centres[torch.randint(len(centres), (C,), generator=generator)]
        if data != "equal":
            codes += SPREAD * torch.randn(C, E, generator=generator)
    else:
        codes = torch.randn(C, E, generator=generator)
    if data == "mean":
        codes += COMMON_MEAN * torch.randn(E, generator=generator)
    return codes.to(DTYPES[dtype])


def _masks(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    rows = cell.T if cell.mask == "rows" else 1
    share = {"1%": 0.01, "50%": 0.5, "rows": ROW_SHARE}[cell.mask]
    chosen = [torch.randperm(cell.C, generator=generator)[: max(1, round(share * cell.C))] for _ in range(rows)]
    deleted = torch.zeros(rows, cell.C, dtype=torch.bool)
    for row, ids in zip(deleted, chosen):
        row[ids] = True
    bits = [Mask.from_ids(ids, num_codes=cell.C, codebook_sha256="", topic="bench").bits for ids in chosen]
    row = torch.arange(cell.T, dtype=torch.int32) if cell.mask == "rows" else torch.zeros(cell.T, dtype=torch.int32)
    return {"deleted": deleted, "mask_table": torch.stack(bits), "mask_row": row}


def _autoencoder(cell: Cell, codes: Tensor, spread: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What delete_latents has beside x and the encoder. With gaussian data, what it decodes is about as large as x."""
    dtype = DTYPES[cell.dtype]
    deviation = torch.stack([(row.double() * spread).norm() for row in codes])
    bias = 0.1 * deviation * torch.randn(cell.C, generator=generator)
    dec = torch.randn(cell.C, cell.E, generator=generator).div_(cell.E)
    pool = POOL if cell.mask == "rows" else 1
    latents = [torch.randperm(cell.C, generator=generator)[: cell.k].sort().values.int() for _ in range(pool)]
    sequence = torch.arange(cell.T) // (SEQUENCE if cell.T > POOL else 1)
    return {
        "bias": bias.to(dtype),
        "theta": (bias + DEVIATIONS * deviation).to(dtype),
        "dec": dec.to(dtype),
        "latents": torch.stack(latents),
        "mask_row": (sequence % pool).int(),
    }


def _bottleneck(cell: Cell, codes: Tensor) -> CodebookBottleneck:
    bottleneck = CodebookBottleneck(BottleneckConfig(cell.E, cell.E, cell.C, cell.k))
    bottleneck.impl = "cpu"
    with torch.no_grad():
        bottleneck.codebook.codes.copy_(codes)
    return bottleneck.requires_grad_(False).to(DTYPES[cell.dtype]).eval()
