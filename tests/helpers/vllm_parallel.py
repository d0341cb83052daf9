"""What a model that is split over two processes says, and what each of them counted, as JSON."""

from __future__ import annotations

import json
import sys

import background

PARALLEL = background.Task("vllm_parallel.py", (sys.executable, __file__))


def main() -> None:
    from vllm_engines import engine, says
    from vllm_oracle import LONG, SHORT, tofu

    oracle, llm = tofu(), engine(tensor_parallel_size=2)
    found = {name: says(llm, oracle[name], tokens) for name, tokens in (("short", SHORT), ("long", LONG))}
    print(json.dumps({"says": found, "reports": llm.collective_rpc("cu_fast_report")}))


if __name__ == "__main__":
    main()
