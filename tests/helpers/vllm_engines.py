"""vLLM on a CPU, with and without the plug-in. Only tests that have made sure that vLLM is there import this.

Its engine runs in the process of the test, so that a test can look at it and change it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from vllm import LLM, SamplingParams  # noqa: E402 - reads the environment
from vllm.platforms import current_platform  # noqa: E402
from vllm_oracle import BUNDLE, Answer  # noqa: E402

import cu_fast.vllm  # noqa: E402

cu_fast.vllm.register()  # the engine does so too, where the package is installed with its entry point

BLOCK = 32  # tokens of a block of the cache; the smallest that attention on a CPU takes
_KEPT: list[LLM] = []  # an engine that is freed closes the process groups of every other in the process


def engine(
    model: Path = BUNDLE, attachment: Path | None = BUNDLE / "codebook", settings: Any = None, **options: Any
) -> LLM:
    """vLLM's engine.

    Args:
        model: folder.
        attachment: folder; None = without the plug-in.
        settings: more of ``--model-loader-extra-config``, by name.
        options: of ``LLM``, in place of what is given here.
    """
    given = {
        "model": str(model), "dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 64 * 2**20,
        "enforce_eager": True, "max_num_seqs": 64, "seed": 0, "block_size": BLOCK, "enable_prefix_caching": False,
    }  # fmt: skip
    if attachment is not None:
        extra = {"attachment": str(attachment), **(settings or {})}
        given |= {"load_format": "cu_fast", "model_loader_extra_config": extra}
    _KEPT.append(LLM(**given | options))
    # A second time is of no use, and fails on modules that may have been imported by then (llvmlite).
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    return _KEPT[-1]


def tiny(model: Path, attachment: Path | None, **options: Any) -> LLM:
    """An engine for one of tiny_models.py, saved without a tokenizer."""
    return engine(model, attachment, skip_tokenizer_init=True, max_model_len=64, kv_cache_memory_bytes=2**24, **options)


def params(names: Sequence[str] | None, tokens: int, **options: Any) -> SamplingParams:
    """Greedy, under some masks; None = says nothing of masks."""
    extra = {} if names is None else {"extra_args": {"unlearn": list(names)}}
    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "detokenize": False, **extra, **options})


def prompt(ids: Sequence[int], salt: str | None = None) -> dict[str, Any]:
    return {"prompt_token_ids": list(ids), **({} if salt is None else {"cache_salt": salt})}


def outputs(llm: LLM, wanted: Iterable[Answer], tokens: int, **options: Any) -> list[Any]:
    """vLLM's outputs for prompts under their masks, all in one batch."""
    wanted = list(wanted)
    given = [params(answer.names, tokens, **options) for answer in wanted]
    return llm.generate([prompt(answer.prompt) for answer in wanted], given, use_tqdm=False)


def says(llm: LLM, wanted: Iterable[Answer], tokens: int, **options: Any) -> list[list[int]]:
    """The ids that vLLM says for prompts under their masks, all in one batch."""
    return [list(output.outputs[0].token_ids) for output in outputs(llm, wanted, tokens, **options)]


def served(llm: LLM) -> Any:
    """What the plug-in put into the engine's model; of an engine in this process."""
    from cu_fast.vllm.served import served_in

    return served_in(runner(llm))


def runner(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def report(llm: LLM) -> dict[str, Any]:
    """Of the first worker."""
    return llm.collective_rpc("cu_fast_report")[0]


class Counts:
    """What an engine counts from now on: ``Counts(llm)``, run something, ``.since()``."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.start = self._now()

    def _now(self) -> dict[str, Any]:
        found = report(self.llm)
        hits = sum(layer["hits"] for layer in found["layers"].values())
        return {"tokens": found["tokens"], "steps": found["steps"], "hits": hits, "masked": found["masked_tokens"]}

    def since(self) -> dict[str, Any]:
        now, masked = self._now(), self.start["masked"]
        grown = {name: tokens - masked.get(name, 0) for name, tokens in now["masked"].items()}
        masked = {name: tokens for name, tokens in grown.items() if tokens}
        return {name: now[name] - self.start[name] for name in ("tokens", "steps", "hits")} | {"masked": masked}


def expected(answers: Iterable[Answer]) -> dict[str, Any]:
    """tokens, hits and masked tokens of prompts that are computed once, every token of them."""
    answers, masked = list(answers), dict[str, int]()
    for answer in answers:
        for name in answer.names:
            masked[name] = masked.get(name, 0) + answer.computed
    return {
        "tokens": sum(answer.computed for answer in answers),
        "hits": sum(answer.hits for answer in answers),
        "masked": masked,
    }
