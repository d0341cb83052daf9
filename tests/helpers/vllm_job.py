"""A batch of requests in a vLLM of a process of its own: python vllm_job.py JOB.JSON prints a line of JSON.

The V2 model runner runs here under Triton's interpreter, which changes the process for good; so does drafting by n-grams, after
whose first use (numba) vLLM 0.32 cannot make another engine in the process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm_inside


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def use_v2() -> None:
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    sys.path.insert(0, str(Path(sys.prefix) / "triton"))
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=Driver)  # vLLM looks for one that is active


def count() -> tuple[list[str], list[str]]:
    """Ids of requests that a step leaves out while they are running, and of those that are preempted, time and again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule, preempt = Scheduler.schedule, Scheduler._preempt_request
    waited: list[str] = []
    preempted: list[str] = []

    def counted(self, *args, **kwargs):
        done = schedule(self, *args, **kwargs)
        waited.extend(one.request_id for one in self.running if one.request_id not in done.num_scheduled_tokens)
        return done

    def counted_preempt(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    Scheduler.schedule, Scheduler._preempt_request = counted, counted_preempt
    return waited, preempted


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    if job["v2"]:
        use_v2()
    waited, preempted = count()
    llm = vllm_inside.engine(Path(job["model"]), job["settings"], **job["options"])
    found = vllm_inside.say(llm, job["prompts"], job["unlearn"], job["tokens"])
    is_v2 = bool(llm.llm_engine.vllm_config.use_v2_model_runner)
    counts = {"waited": len(waited), "preempted": len(preempted)}
    print(json.dumps({"ids": vllm_inside.ids_of(found), "v2": is_v2, **counts}))


if __name__ == "__main__":
    main()
