"""What vLLM's compiled models say, as JSON: without the plug-in, and then with it, by one compile cache.

Processes of their own, since variables choose the backend: Dynamo alone ("eager"), or with Inductor behind it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import background

BACKENDS = ("eager", "inductor")
TASKS = {
    (backend, kind): background.Task("vllm_compiled.py", (sys.executable, __file__, backend, kind))
    for backend in BACKENDS
    for kind in ("plain", "masked")
}
MODELS = ("llama-delta", "gpt2-delta")


def main(backend: str, kind: str) -> None:
    if kind == "masked":
        TASKS[backend, "plain"].output()  # it was here first
    os.environ["VLLM_CPU_CI_ENV"] = str(int(backend == "eager"))
    os.environ["VLLM_CACHE_ROOT"] = str(Path(os.environ[background.FOLDER]) / f"vllm-cache-{backend}")

    from torch._dynamo.utils import counters
    from vllm_engines import engine, params, prompt, says, served, tiny
    from vllm_oracle import SHORT, tofu
    from vllm_tiny import TOKENS, cases

    made, found = cases(), {}
    for name in ("tofu", *MODELS):
        is_tofu, masked = name == "tofu", kind == "masked"
        before, options = counters["stats"]["unique_graphs"], {} if is_tofu else {"ignore_eos": True}
        answers, tokens = (tofu()["short"], SHORT) if is_tofu else (made[name].answers, TOKENS)
        if is_tofu:
            llm = engine(enforce_eager=False) if masked else engine(attachment=None, enforce_eager=False)
        else:
            llm = tiny(made[name].model, made[name].attachment if masked else None, enforce_eager=False)
        config = llm.llm_engine.vllm_config
        if masked:
            ids = says(llm, answers, tokens, **options)
        else:
            prompts = [prompt(answer.prompt) for answer in answers]
            outputs = llm.generate(prompts, params(None, tokens, **options), use_tqdm=False)
            ids = [list(output.outputs[0].token_ids) for output in outputs]
        found[name] = {
            "says": ids, "hash": config.compute_hash(), "mode": config.compilation_config.mode.name,
            "backend": config.compilation_config.backend, "graphs": counters["stats"]["unique_graphs"] - before,
            "masked": served(llm) is not None,
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
