"""What a server may not be started with: what would run without masks, or give tokens the masks of others."""

from __future__ import annotations

from typing import Any

from cu_fast.vllm.catalog import Catalog


def refusals(vllm_config: Any, catalog: Catalog) -> list[str]:
    """Of a ``VllmConfig`` what is refused, each with its reason; [] = nothing.

    Raises:
        AttributeError: vLLM has another name for a setting.
    """
    parallel, scheduler, cache = vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.cache_config
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    speculative = vllm_config.speculative_config
    found = {
        "pipeline parallelism: layers would be in processes that are not told whose tokens they compute":
            parallel.pipeline_parallel_size > 1,
        "prefill context parallelism: it splits a prompt's tokens over devices":
            parallel.prefill_context_parallel_size > 1,
        "micro-batching (DBO): it splits the tokens of a step": parallel.use_ubatching,
        "sequence parallelism: it splits the tokens of a step between layers":
            parallel.use_sequence_parallel_moe or _either(parallel, "enable_hc_sp", compilation.pass_config, "enable_sp"),
        "elastic expert parallelism: it loads models by a load format of its own, without splices":
            parallel.enable_elastic_ep,
        "a KV connector: it may take blocks of a prefix for those of other masks": vllm_config.kv_transfer_config is not None,
        "an encoder-cache connector: it moves states between engines": vllm_config.ec_transfer_config is not None,
        "KV offloading: its blocks are not known to carry the masks they were computed under":
            bool(cache.kv_offloading_size),
        "kv_sharing_fast_prefill: layers would be given some tokens of a step": cache.kv_sharing_fast_prefill,
        "sleep mode: waking up would bring back weights without splices": model.enable_sleep_mode,
        "weight transfer: weights that are pushed would not fit the codes": vllm_config.weight_transfer_config is not None,
        "an encoder-decoder model: its states outlive a request's masks": model.is_encoder_decoder,
        "a pooling model: only generation knows masks": model.runner_type == "pooling",
        "a diffusion model: it computes tokens again": model.is_diffusion,
        "prompt embeddings: they may have been computed under other masks": model.enable_prompt_embeds,
        "trace replay: it says tokens that a client chose": model.enable_trace_replay,
        "speculation with adaptive verification: it moves drafts on the device":
            speculative is not None and speculative.enable_adaptive_verification,
        "where_it_fires with chunked prefill: a prompt is judged whole; start with --no-enable-chunked-prefill":
            bool(catalog.gates) and scheduler.enable_chunked_prefill,
        "where_it_fires with long_prefill_token_threshold: vLLM splits prompts there, also without chunked prefill":
            bool(catalog.gates) and scheduler.long_prefill_token_threshold > 0,
        "compilation mode STOCK_TORCH_COMPILE: the checks round the forward would be compiled away":
            compilation.mode is not None and compilation.mode.name == "STOCK_TORCH_COMPILE",
        **_graphs(compilation.cudagraph_mode),
    }  # fmt: skip
    return [reason for reason, holds in found.items() if holds]


def _either(first: Any, name: str, second: Any, older: str) -> bool:
    """A setting that has another name in older versions. Raises AttributeError where it has neither."""
    return getattr(first, name) if hasattr(first, name) else getattr(second, older)


def _graphs(mode: Any) -> dict[str, bool]:
    """Graphs of whole forwards, whose replay runs no check; FULL_AND_PIECEWISE becomes PIECEWISE in ``loader``."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    whole = mode is not None and mode.has_full_cudagraphs() and not mode.has_piecewise_cudagraphs()
    return {
        "CUDA graphs of whole forwards: a replay runs no check; start with --compilation-config "
        '\'{"cudagraph_mode": "PIECEWISE"}\'': whole,
        "breakable CUDA graphs: a replay runs no check; unset VLLM_USE_BREAKABLE_CUDAGRAPH":
            mode is not None and mode.name != "NONE" and is_breakable_cudagraph_enabled(),
    }  # fmt: skip
