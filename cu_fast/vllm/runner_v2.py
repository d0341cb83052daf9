"""Rows for the V2 model runner (``vllm/v1/worker/gpu``): a ModelState, which the model names itself. Nothing is wrapped."""

from __future__ import annotations

from typing import Any

import numpy as np

from cu_fast.vllm import TAG
from cu_fast.vllm.served import Held, Served

WARM_UP = ("_warmup_", "_v2_mixed_warmup")  # vllm/v1/worker/gpu/warmup.py: requests that the runner makes for itself


def state_class(vllm_config: Any, model: Any, served: Served) -> type:
    """The ModelState that vLLM would have taken for the model, told whose tokens are whose."""
    from vllm.v1.worker.gpu import model_states

    own = model.__dict__.pop("get_model_state_cls")  # this question must not come here again
    try:
        base = model_states.resolve_model_state_cls(vllm_config, model)
    finally:
        model.get_model_state_cls = own

    class UnlearningModelState(base):
        def add_request(self, req_index, new_req_data):
            super().add_request(req_index, new_req_data)
            i, params = new_req_data.req_id, new_req_data.sampling_params
            is_warm_up = i.startswith(WARM_UP) and TAG not in ((params and params.extra_args) or {})
            if not is_warm_up:  # what comes through the front end has a tag, whatever its id is
                served.hold(i, params, len(new_req_data.prompt_token_ids))

        def remove_request(self, req_id):
            super().remove_request(req_id)
            served.release(req_id)

        def prepare_inputs(self, input_batch, req_states):
            ids = input_batch.req_ids
            held = [self._held(i, i in req_states.req_id_to_index) for i in ids]
            if any(one is not None for one in held):
                counts = np.diff(input_batch.query_start_loc_np[: len(ids) + 1])
                served.fill(held, input_batch.num_computed_tokens_np[: len(ids)], counts)
            else:
                served.fill_nothing()
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs, num_tokens):
            served.fill_nothing()
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

        @staticmethod
        def _held(req_id: str, is_known: bool) -> Held | None:
            """None = no request's: a dummy, or the runner's warm-up."""
            held = served.held.get(req_id)
            if held is None and is_known and not req_id.startswith(WARM_UP):
                raise RuntimeError(f"request {req_id} was added past the plug-in; its masks are not known")
            return held

    return UnlearningModelState
