"""vLLM's greedy answers, and transformers' own. Imports vLLM only when an engine is made: by then it is said how it is to run."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def engine(model: Path, settings: dict[str, Any] | None, **options: Any) -> Any:
    """An engine as those of ``vllm_engines``.

    Args:
        model: folder.
        settings: of the plug-in, ``model_loader_extra_config``; None = vLLM alone.
        options: of ``vllm.LLM``, beyond those or instead of them.
    """
    import vllm_engines

    own = {} if settings is None else {"load_format": "cu_fast", "model_loader_extra_config": settings}
    return vllm_engines.engine(model, None, **own, **options)


def close(llm: Any) -> None:
    """Give up an engine's memory."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def say(
    llm: Any, prompts: Sequence[list[int]], unlearn: Sequence[list[str] | None], tokens: int, **options: Any
) -> list:
    """What vLLM returns for requests of one batch, decoded greedily.

    Args:
        llm: the engine.
        prompts: ids.
        unlearn: per prompt the names that its request says; None = it says nothing.
        tokens: of an answer, at most.
        options: of ``SamplingParams``.
    """
    from vllm import SamplingParams

    wanted = [
        SamplingParams(
            temperature=0, max_tokens=tokens, extra_args=None if names is None else {"unlearn": names}, **options
        )
        for names in unlearn
    ]
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    return found


def ids_of(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in outputs]


@torch.inference_mode()
def greedy(model: Any, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The same in transformers, one prompt at a time, under what the caller's ``unlearn`` says for all."""
    found = []
    for ids in prompts:
        x = torch.tensor([ids])
        out = model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=tokens, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found
