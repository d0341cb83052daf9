"""What vLLM's V2 model runner says on a CPU, as JSON; a process of its own, since variables choose it.

That runner's kernels are Triton's, whose interpreter runs them; it lies in a folder of its own, beside vLLM's packages.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import background

V2 = background.Task("vllm_v2.py", (sys.executable, __file__))


def main() -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    sys.path.insert(0, str(Path(sys.prefix) / "triton"))
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)

    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm_engines import Counts, engine, report, runner, says
    from vllm_oracle import LONG, SHORT, tofu

    preempted, preempt = [], Scheduler._preempt_request

    def count(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    Scheduler._preempt_request = count
    oracle = tofu()
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    cases = {
        "mixed": ("short", SHORT, {}),
        "chunked": ("long", LONG, {"max_num_batched_tokens": 32, "max_num_seqs": 16, "enable_chunked_prefill": True}),
        "speculation": ("long", LONG, {"speculative_config": speculation}),
        "preemption": ("long", LONG, {"num_gpu_blocks_override": 18}),
    }
    found = {}
    for name, (prompts, tokens, options) in cases.items():
        preempted.clear()
        llm = engine(**options)
        counts = Counts(llm)
        found[name] = {
            "says": says(llm, oracle[prompts], tokens), **counts.since(), "preempted": len(preempted),
            "runner": [kind.__module__ for kind in type(runner(llm)).__mro__],
        }  # fmt: skip
        says(llm, oracle[prompts][:1], 2)
        found[name]["held"] = report(llm)["held"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
