"""torch.ops.cu_fast_triton under Triton's interpreter: what torch.library and torch.compile ask of operators.

Prints a line of JSON for each case of CASES, as triton_interpreted.py does: TRITON_INTERPRET=1 python tests/kernels/triton_kernels/triton_operators.py
"""

from __future__ import annotations

from collections.abc import Callable

import hurtful
import torch
import triton_harness
from calls import every_operator, plane_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cu_fast import BottleneckConfig, ops
from cu_fast.kernels import reference, triton
from cu_fast.nn import CodebookBottleneck

D, E, C, K = 20, 16, 80, 4


def opcheck(op: str, T: int, dtype: torch.dtype, mask: bool) -> None:
    given = every_operator(T, E, C, K, dtype=dtype, mask=mask, scan=False, layout="rows")
    torch.library.opcheck(triton.operator(op), (), given[op])


def stays_one_graph(function: Callable[..., tuple[Tensor, ...]]) -> None:
    """What is compiled equals the eager function in every bit, and is compiled once for every number of tokens."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for T in (6, 9, 12):
        x, (table, row) = hurtful.matrix(T, D, "mixed", torch.float32, T), hurtful.masks(T, C, 0.4, T)
        triton_harness.same(compiled(x, table, row), function(x, table, row))
    assert backend.frame_count == 1, f"compiled {backend.frame_count} times"
    calls = {str(node.target).split(".")[0] for graph in backend.graphs for node in graph.graph.nodes}
    assert "cu_fast_triton" in calls, f"no Triton operator is in the graph: {calls}"


def packed() -> ops.PackedCodes:
    codes = hurtful.matrix(C, D, "tied", torch.float32, 2)
    return ops.pack_codes(codes, "dot", scan="none")._replace(scan=ops.ScanPlane(*plane_of(codes, on=reference)))


def compiled_quantize(scan: bool) -> None:
    from cu_fast.kernels.triton import launch

    launch.TUNING = launch.Tuning(scan_start=-1 if scan else 1e9)
    codes = packed()

    def run(x, table, row):
        masks = {"mask_table": table, "mask_row": row}
        return ops.codebook_quantize(x, codes, k=K, **masks, return_hits=True, impl="triton")

    stays_one_graph(run)


def compiled_bottleneck(mask_mode: str) -> None:
    table_of_rows, codes = hurtful.matrix(C, D, "gaussian", torch.bfloat16, 4), packed()

    def run(x, table, row):
        receipt = torch.zeros(2, dtype=torch.int64)
        options = {"mask_mode": mask_mode, "weight": "score", "receipt": receipt, "impl": "triton"}
        y = ops.codebook_bottleneck(x, None, codes, table_of_rows, None, table, row, k=K, **options)
        return y, receipt

    stays_one_graph(run)


def compiled_module() -> None:
    """Its receipt is a buffer, which the operator writes."""
    module = CodebookBottleneck(BottleneckConfig(d_model=D, code_dim=E, num_codes=C, k=K))
    module.requires_grad_(False).eval().impl = "triton"

    def run(x, table, row):
        return (module(x.unflatten(0, (-1, 3)), table, row),)

    stays_one_graph(run)
    receipt = module.receipt()
    assert receipt["impl"] == "triton" and receipt["tokens"] == 2 * (6 + 9 + 12) and receipt["hits"] > 0, receipt


CASES = {
    **{
        f"{op}: opcheck, {name}": (opcheck, op, *case)
        for op in triton.HOME
        for name, case in {
            "all given": (5, torch.float32, True),
            "bf16": (5, torch.bfloat16, True),
            "nothing given": (5, torch.float32, False),
            "no tokens": (0, torch.float32, True),
        }.items()
    },
    "codebook_quantize: compiled": (compiled_quantize, False),
    "codebook_quantize: compiled, scan": (compiled_quantize, True),
    "codebook_bottleneck: compiled, ablate": (compiled_bottleneck, "ablate"),
    "codebook_bottleneck: compiled, reselect": (compiled_bottleneck, "reselect"),
    "CodebookBottleneck: compiled": (compiled_module,),
}


HEAVY = {name for name in CASES if name.startswith(("codebook_quantize: comp", "codebook_bottleneck: comp"))}
HEAVY |= {name for name in CASES if name.endswith(("opcheck, bf16", "opcheck, nothing given"))}


if __name__ == "__main__":
    triton_harness.report(CASES, HEAVY)
