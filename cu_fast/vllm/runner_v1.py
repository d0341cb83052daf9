"""Rows for the V1 model runner (``vllm/v1/worker/gpu_model_runner.py``), which a CPU runs too."""

from __future__ import annotations

from collections.abc import Callable

from cu_fast.vllm.seams import Wrap
from cu_fast.vllm.served import served_in


def _prepare_inputs(original: Callable) -> Callable:
    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens, *args, **kwargs):
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        served = served_in(self)
        if served is not None:
            ids = self.input_batch.req_ids
            served.release_others(self.requests)  # of which some may not be in this step
            requests = [self.requests[i] for i in ids]
            held = [served.hold(r.req_id, r.sampling_params, r.num_prompt_tokens) for r in requests]
            served.fill(held, self.input_batch.num_computed_tokens_cpu[: len(ids)], num_scheduled_tokens)
        return result

    return _prepare_inputs


def _dummy_run(original: Callable) -> Callable:
    def _dummy_run(self, *args, **kwargs):
        served = served_in(self)
        if served is not None:
            served.fill_nothing()
        return original(self, *args, **kwargs)

    return _dummy_run


_RUNNER = "vllm.v1.worker.gpu_model_runner", "GPUModelRunner"
WRAPS = [
    Wrap(*_RUNNER, "_prepare_inputs", ("scheduler_output", "num_scheduled_tokens"), _prepare_inputs),
    Wrap(*_RUNNER, "_dummy_run", (), _dummy_run),
]
