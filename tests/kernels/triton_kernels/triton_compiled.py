"""The Triton kernels as machine code, without a GPU: python tests/kernels/triton_kernels/triton_compiled.py sm_90 [every]

Runs the host functions for an architecture with launches written down instead of made, compiles what they would have
started, and prints a line of JSON for each kernel. Without "every": one launch of each kernel that matters most.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import triton
from calls import call
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cu_fast.kernels.triton import HOME, gather_dot, launch, scatter_sum

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    fp32: "*fp32", bf16: "*bf16", fp16: "*fp16", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16",
    torch.int8: "*i8",
}  # fmt: skip

# T, E, C, k, dtype, whether there is a plane, are masks and hits
EVERY = [
    (1, 512, 25_000, 8, bf16, False, True),
    (1, 512, 25_000, 64, fp32, False, False),
    (1, 512, 25_000, 256, fp16, False, False),
    (1, 512, 25_000, 1000, bf16, False, True),
    (4, 512, 25_000, 8, fp32, False, False),
    (4, 512, 25_000, 64, bf16, False, True),
    (4, 512, 25_000, 256, bf16, False, False),
    (4, 512, 25_000, 1000, bf16, False, False),
    (512, 512, 25_000, 8, bf16, False, False),
    (512, 512, 25_000, 64, fp32, False, True),
    (512, 512, 25_000, 256, fp16, False, True),
    (512, 512, 2_000, 1000, fp16, False, True),
    (8, 4096, 65_536, 32, bf16, True, True),
    (512, 512, 25_000, 8, bf16, True, True),
    (512, 515, 25_003, 64, fp32, True, False),
]
MAIN = [EVERY[0], EVERY[9], EVERY[13]]
# T, E, k, dtype; the last has too few places for a piece
TRAINING = [(64, 512, 8, bf16), (64, 4096, 64, fp32), (64, 515, 9, fp16), (9, 512, 9, fp32)]

# T, Din, Dout, M, dtype, scale, whether there is a floor
DELETIONS = [
    (64, 4096, 4096, 20, bf16, 1, True), (1, 515, 515, 20, fp16, 0, True), (64, 768, 515, 200, fp32, 2, False),
]  # fmt: skip


def digits(C: int, E: int) -> torch.Tensor:
    return torch.empty(C, 3, -(-E // 64) * 64, dtype=torch.int8)


def written_down(arch: str, every: bool) -> list[tuple]:
    """(kernel, config, arguments) of all launches; equal ones once."""
    launches = {}

    def start(kernel, programs, config, **arguments):
        launches.setdefault(
            repr((kernel.__name__, source_of(kernel, config, arguments)[1:])), (kernel, config, arguments)
        )

    launch.arch_of, launch.multiprocessors_of = (lambda device: arch), (lambda device: 132)
    for name in {*HOME.values(), "fixed", "gather_dot", "scatter_sum"}:
        importlib.import_module(f"cu_fast.kernels.triton.{name}").start = start
    for T, E, C, k, dtype, scan, rich in EVERY if every else MAIN:
        launch.TUNING = launch.Tuning(scan_start=-1 if scan else 1e9)
        z, codes = torch.empty(T, E, dtype=dtype), digits(C, E)
        masks = (torch.empty(3, (C + 31) // 32, dtype=torch.int32), torch.empty(T, dtype=torch.int32))
        groups = (C + 63) // 64
        plane = (torch.empty(groups, (E + 3) // 4, 64, 4, dtype=torch.uint8), torch.empty(groups, 196), torch.empty(E))
        given = dict(on=torch.ops.cu_fast_triton, k=k, scan=plane if scan else None)
        if rich:
            numbers = dict(factor=torch.empty(C), bias=torch.empty(C))
            call("codebook_quantize", z=z, digits=codes, **numbers, mask=masks, return_hits=True, **given)
        else:
            numbers = dict(W_factor=torch.empty(C), b_enc=torch.empty(C), b_pre=torch.empty(E))
            call("sae_encode_topk", x=z, W_digits=codes, **numbers, relu=True, **given)
    for T, dtype in ((1, bf16), (4, fp32), (64, bf16)) if every else ((64, bf16),):
        numbers = dict(W_factor=torch.empty(1000), b_enc=torch.empty(1000), b_pre=torch.empty(512))
        given = dict(x=torch.empty(T, 512, dtype=dtype), W_digits=digits(1000, 512), **numbers, relu=True)
        call("sae_encode", on=torch.ops.cu_fast_triton, **given)
    for D, dtype, mean in ((4096, bf16, False), (512, fp32, True), (515, fp16, True))[: 3 if every else 2]:
        given = dict(
            ids=torch.empty(64, 32, dtype=torch.int32), weights=torch.empty(64, 32), bias=torch.empty(D),
            table=torch.empty(1000, D, dtype=dtype), residual=torch.empty(64, D, dtype=dtype), mean=mean,
            mask=(torch.empty(3, 32, dtype=torch.int32), torch.empty(64, dtype=torch.int32)),
        )  # fmt: skip
        call("masked_decode", on=torch.ops.cu_fast_triton, **given)
    for T, Din, Dout, M, dtype, scale, floor in DELETIONS if every else DELETIONS[:2]:
        numbers = {name: torch.empty(1000) for name in ("enc_factor", "bias", "theta")}
        floors = dict(floor_scores=torch.empty(T), floor_ids=torch.empty(T, dtype=torch.int32)) if floor else {}
        call(
            "delete_latents", on=torch.ops.cu_fast_triton, x=torch.empty(T, Din, dtype=dtype), enc_digits=digits(1000, Din),
            residual=torch.empty(T, Dout, dtype=dtype), dec=torch.empty(1000, Dout), scale=scale, norm=2.0, **numbers,
            mask_latents=torch.empty(3, M, dtype=torch.int32), mask_change=torch.empty(3, M, 3),
            mask_row=torch.empty(T, dtype=torch.int32), **floors,
        )  # fmt: skip
    for T, E, k, dtype in TRAINING if every else TRAINING[:1]:
        ids, weights = torch.zeros(T, k, dtype=torch.int32), torch.empty(T, k, dtype=dtype)
        g, codes = torch.empty(T, E, dtype=dtype), torch.empty(1000, E, dtype=dtype)
        gather_dot.gather_dot(ids, g, codes)
        scatter_sum.scatter_sum(ids, weights, g, 1000)
    return list(launches.values())


def source_of(kernel, config, arguments) -> tuple:
    """The arguments of ASTSource as Triton's launcher would make them: Nones and ones are constants, alignment is known."""
    signature, constants, attributes = {}, {}, {}
    values = {**arguments, **dict(config.blocks)}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return kernel, signature, constants, attributes


def of_nvidia(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code))
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "spills": stack + local + opcodes["LDL"] + opcodes["STL"],
        "fused": opcodes["FFMA"] + opcodes["FFMA2"] + len(re.findall(r"\bfma\.rn", ptx)),
        "products": opcodes["FMUL"] + opcodes["FMUL2"],
        "flushes": ptx.count(".ftz"),
        "byte_products": sorted(name for name in opcodes if name in ("IMMA", "IGMMA", "UTCIMMA")),
        "division": sorted(set(re.findall(r"div\.\w+\.f32", ptx))),
        "root": sorted(set(re.findall(r"sqrt\.\w+(?:\.ftz)?\.f32", ptx))),
    }


def of_amd(kernel) -> dict:
    asm = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s+(\d+)", asm).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        # x * 1.0 + y is a sum, and so AMD subtracts from widened fp16.
        "fused": len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)\w*_f32 (?!\S+ \S+ 1\.0,)", asm)),
        "products": len(re.findall(r"\bv_(?:pk_)?mul\w*_f32", asm)),
        "flushes": 0 if number("amdhsa_float_denorm_mode_32") == 3 else 1,
        "byte_products": sorted(set(re.findall(r"v_mfma_i32_\w+_i8", asm))),
        "division": ["div.rn.f32"] if "v_div_fixup_f32" in asm else [],
        "root": ["sqrt.rn.f32"] if re.search("v_(sqrt|rsq)_f32", asm) else [],
    }


def compiled(arch: str, kernel, config, arguments) -> dict:
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    begin = time.perf_counter()
    made = triton.compile(
        ASTSource(*source_of(kernel, config, arguments)), target=target, options=launch.options(config)
    )
    seconds = time.perf_counter() - begin
    return {
        "kernel": kernel.__name__,
        "config": repr(config),
        "sample": arguments.get("SAMPLE") is True,
        "mean": arguments.get("mean") is True,
        "tokens": dict(config.blocks).get("BLOCK_T", 1),
        "from_integers": sorted(set(re.findall(r"sitofp (?:<.* x )?(i\d+)\b.* to (?:<.* x )?(\w+)", made.asm["llir"]))),
        "seconds": round(seconds, 2),
        "shared": made.metadata.shared,
        **(of_nvidia(made) if nvidia else of_amd(made)),
    }


if __name__ == "__main__":
    arch = sys.argv[1]
    for arguments in written_down(arch, "every" in sys.argv[2:]):
        print(json.dumps(compiled(arch, *arguments)), flush=True)
