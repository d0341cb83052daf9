"""Bugs that the tests were seen to find, for `make planted` (planted.py). Each is one replacement in one file."""

from __future__ import annotations

from typing import NamedTuple

TRITON = "tests/kernels/triton_kernels/triton_"


class Bug(NamedTuple):
    """What is planted, and who has to see it.

    Attributes:
        name: what is wrong.
        file: that is changed.
        old: text that is in it once.
        new: what it is replaced with.
        tests: arguments of pytest; or a script of Triton's cases, and one of them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BUGS = (
    # -- the reference -----------------------------------------------------------------------------------------------
    Bug("digits in another order", "cu_fast/kernels/reference/fixed.py",
        "high, middle, low = digits[", "high, low, middle = digits[", ("tests/kernels/test_sae_encode.py",)),
    Bug("tiny products are not cut", "cu_fast/kernels/reference/fixed.py",
        "torch.where(y.abs() < LEAST, 0.0, y)", "y", ("tests/kernels/test_sae_encode.py",)),
    Bug("a sum is rounded twice", "cu_fast/kernels/reference/fixed.py",
        "total.float() * unit", "total.double().float() * unit", ("tests/kernels/test_sae_encode.py",)),
    Bug("hits are counted where nothing is deleted any more", "cu_fast/kernels/reference/codebook.py",
        "torch.cat([best_unmasked[0], score], 1)", "torch.cat([best_unmasked[0], torch.where(deleted, empty, score)], 1)",
        ("tests/kernels/test_codebook_quantize.py",)),
    # -- CPU kernels, which are built again --------------------------------------------------------------------------
    Bug("a faulty weight is passed over", "csrc/cpu/masked_decode-inl.h",
        "if (weight != weight) return -1;", ";", ("tests/kernels/test_masked_decode.py",)),
    Bug("the first threshold is not proven", "csrc/cpu/codebook_quantize_scan-inl.h",
        "return row.gives_up || candidates_of(p, block_, row.token).kept.threshold() >= row.guess;", "return true;",
        ("tests/kernels/test_scan.py",)),
    Bug("what a row's bytes miss is not in the scan's bound", "csrc/cpu/scan-inl.h",
        "1.0f) * row.unit;", "1.0f) * 0;", ("tests/kernels/test_scan.py",)),
    Bug("the caller's floating-point mode stays", "csrc/cpu/parallel.h",
        "_mm_setcsr(mode);", ";", ("tests/kernels/test_native.py", "-k", "denormal or rounding")),
    Bug("deleted codes raise the threshold", "csrc/cpu/codebook_quantize_scan-inl.h",
        "row.lower[row.n + std::popcount(lanes & ((drop & -drop) - 1))] = kNone;", ";", ("tests/kernels/test_scan.py",)),
    Bug("an A100's rates for an H100", "csrc/cuda/predict.h",
        "{9, 0, 3.35, 5.5,", "{9, 0, 2.04, 4.0,", ("tests/kernels/test_cuda_plans.py",)),
    # -- Triton ------------------------------------------------------------------------------------------------------
    Bug("a row of masks that is not there is none", "cu_fast/kernels/triton/select.py",
        "tl.where((unit != unit) | (exists == 0), 1, 0)", "tl.where(unit != unit, 1, 0)",
        (TRITON + "interpreted.py", "codebook_quantize: wrong mask row")),
    Bug("ids beyond the codes add nothing", "cu_fast/kernels/triton/gather_dot.py",
        'tl.where(id == -1, 0.0, float("nan"))', "0.0", (TRITON + "gradients.py", "gather_dot: wrong ids")),
    Bug("a faulty weight adds nothing", "cu_fast/kernels/triton/masked_decode.py",
        "((id != -1) | (weight != weight))", "(id != -1)", (TRITON + "interpreted.py", "masked_decode: faults")),
    # -- operators and modules ---------------------------------------------------------------------------------------
    Bug("the compiler looks into the reference", "cu_fast/ops/choice.py",
        "if torch.compiler.is_compiling():", "if False:", ("tests/ops/test_traced.py",)),
    Bug("evaluation has a gradient of zero", "cu_fast/nn/bottleneck.py",
        "if x.requires_grad and not torch.compiler.is_compiling():", "if False:", ("tests/nn/test_nn.py",)),
    Bug("gradients of codes go to other codes", "cu_fast/nn/autograd.py",
        "torch.sort(ids, stable=True)", "torch.sort(ids.flip(0), stable=True)", ("tests/nn/test_autograd.py",)),
    Bug("dropout leaves every code", "cu_fast/nn/training.py",
        "weights * alive[ids.clamp(min=0)]", "weights", ("tests/nn/test_nn.py",)),
    # -- masks and gates ---------------------------------------------------------------------------------------------
    Bug("a gate's bias is not in its digest", "cu_fast/masks/gate.py",
        'struct.pack("<qdd", len(self.codes), self.bias, self.level)', 'struct.pack("<qd", len(self.codes), self.level)',
        ("tests/test_masks.py",)),
    Bug("padding is counted for the first sequence", "cu_fast/masks/gate.py",
        "torch.where(sequence >= 0, sequence * num_blocks + own, blocks)", "sequence.clamp(min=0) * num_blocks + own",
        ("tests/hf/test_gating.py",)),
    Bug("weights of a gate stay where codes were renumbered", "cu_fast/masks/gate.py",
        "weights=self.weights[order]", "weights=self.weights", ("tests/test_masks.py",)),
    Bug("a gate's checksum is not compared", "cu_fast/masks/gate.py",
        'if gate.digest() != record["sha256"]:', "if False:", ("tests/test_masks.py",)),
    Bug("a checksum of rows is not compared", "cu_fast/masks/rows.py",
        ' or _sha256_of(rows) != record["sha256"]', "", ("tests/test_masks.py",)),
    # -- finding what is deleted -------------------------------------------------------------------------------------
    Bug("a level from the lower quantile", "cu_fast/unlearn/gate.py",
        'method="higher"', 'method="lower"', ("tests/unlearn/test_gate.py",)),
    Bug("tokens of two layers are intersected", "cu_fast/unlearn/gate.py",
        "torch.stack(known).any(0)", "torch.stack(known).all(0)", ("tests/unlearn/test_learn.py",)),
    Bug("counts of another codebook are taken off", "cu_fast/unlearn/count.py",
        'self.source.check("what is taken off", other.source)', "pass", ("tests/unlearn/test_latents.py",)),
    Bug("Fisher's test is off by one", "cu_fast/unlearn/statistics.py",
        "stats.hypergeom.sf(a[exact] - 1,", "stats.hypergeom.sf(a[exact],", ("tests/unlearn/test_rank.py",)),
    Bug("no p-value is corrected", "cu_fast/unlearn/statistics.py",
        'if correction == "none":', "if True:", ("tests/unlearn/test_rank.py",)),
    # -- models of Hugging Face --------------------------------------------------------------------------------------
    Bug("a cropped cache goes on under gates", "cu_fast/hf/states.py",
        "if state is not None and state.length not in (None, length):", "if False:", ("tests/hf/test_gating.py",)),
    Bug("a cache whose rows were moved goes on", "cu_fast/hf/states.py",
        "if state is not None and not hasattr(state, ROWS):", "if False:", ("tests/hostile/test_states.py", "tests/hf/test_gating.py")),
    Bug("a cache goes on under other masks", "cu_fast/hf/active.py",
        "if filled != present and int(length) > 0:", "if False:", ("tests/hf/test_hf_unlearn.py",)),
    Bug("a decoder's second cache is not looked at", "cu_fast/hf/states.py",
        "(value.self_attention_cache, value.cross_attention_cache)", "(value.self_attention_cache,)",
        ("tests/hostile/test_states.py",)),
    Bug("silence where a mask was removed", "cu_fast/hf/active.py",
        "return any(request.beyond for request in self._open)", "return False", ("tests/hostile/test_silence.py",)),
    Bug("a codebook may change inside a context", "cu_fast/hf/forwards.py",
        "if layer.name in request.codebooks and layer.bottleneck.codebook_sha256()", "if False and layer.bottleneck.codebook_sha256()",
        ("tests/hf/test_hf.py",)),
    Bug("first tokens of a packed row are deleted from", "cu_fast/hf/positions.py",
        "first = first | _packed(positions, n)", "pass", ("tests/hf/test_positions.py",)),
    Bug("a training run is resumed with other settings", "cu_fast/train/resume.py",
        "if changed := list(_differences(made_with, json.loads(json.dumps(settings)))):", "if changed := []:",
        ("tests/hostile/test_resume.py",)),
    # -- new: gates, batching, capture, vLLM's rows, loaders ---------------------------------------------------------
    Bug("a gate is judged without the tokens before", "cu_fast/hf/gating.py",
        "found[:, : counts.shape[1]] += counts", "pass", ("tests/hf/test_gating.py",)),
    Bug("what began to fire may end", "cu_fast/hf/gating.py",
        "on = state.on.setdefault(index, [set() for _ in names])", "on = state.on[index] = [set() for _ in names]",
        ("tests/hf/test_gating.py",)),
    Bug("each request of a batch has the first one's masks", "cu_fast/hf/batching.py",
        "0 if entries is None else next(entries)", "0", ("tests/hostile/test_continuous_batching.py",)),
    Bug("requests that ended keep their rows", "cu_fast/hf/batching.py",
        "for name in queued - there:", "for name in ():", ("tests/hostile/test_continuous_batching.py",)),
    Bug("a captured forward ends without poison", "cu_fast/hf/capture.py",
        "                buffer.fill_(POISON)\n                return output", "                return output",
        ("tests/hf/test_captured.py",)),
    Bug("a replay leaves caches as they were", "cu_fast/hf/capture.py",
        "setattr(value, STAMP, stamp)", "pass", ("tests/hf/test_captured.py",)),
    Bug("vLLM: first tokens by place, not by sequence", "cu_fast/vllm/step.py",
        "np.cumsum(counts) - counts - computed", "np.cumsum(counts) - counts", ("tests/vllm_plugin/test_step.py",)),
    Bug("vLLM: rows of an earlier step for padding", "cu_fast/vllm/step.py",
        "self.tensor[len(given) :] = -1", "pass", ("tests/vllm_plugin/test_step.py",)),
    Bug("an archive's rows are not centred", "cu_fast/sae/openai.py",
        'product(w, tensors["pre_bias"])', '0 * product(w, tensors["pre_bias"])', ("tests/sae/test_families.py",)),
    Bug("a folder may hold masks that nothing lists", "cu_fast/hf/files.py",
        "if missing or unlisted:", "if missing:", ("tests/hostile/test_damaged_files.py",)),
)  # fmt: skip
