"""What a server did, for ``collective_rpc("cu_fast_report")`` in any process, and for vLLM's own ``/metrics``.

Admission counts in the front end, where the endpoint is. Tokens and hits are counted where they are computed; the middleware
asks the workers for them when the endpoint is read.
"""

from __future__ import annotations

from typing import Any

_METRICS: dict[str, Any] = {}
METHOD = "cu_fast_report"


def prepare() -> None:
    """Give every worker the method, and the process its counters. Raises ImportError, AttributeError: something moved."""
    from prometheus_client import Counter, Gauge
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, METHOD, _report)
    if not _METRICS:
        gauge = {"multiprocess_mode": "mostrecent"}
        _METRICS.update(
            requests=Counter("cu_fast:requests", "Requests admitted, by mask; '' = nothing is deleted.", ["mask"]),
            refusals=Counter("cu_fast:refusals", "Requests refused for what they say, or do not say, to unlearn."),
            tokens=Gauge("cu_fast:tokens", "Tokens computed, since the server started.", **gauge),
            masked=Gauge("cu_fast:masked_tokens", "Of those the tokens under a mask.", ["mask"], **gauge),
            hits=Gauge("cu_fast:hits", "Kept codes that masks changed.", ["layer"], **gauge),
        )


def _report(worker: Any) -> dict[str, Any] | None:
    """Of a worker: its model's report; None where it serves without masks."""
    from cu_fast.vllm.served import served_in

    served = served_in(worker.model_runner)
    return None if served is None else served.report()


def admitted(names: tuple[str, ...]) -> None:
    """Count a request."""
    for name in names or ("",):
        _METRICS["requests"].labels(name).inc()


def refused() -> None:
    """Count a refusal."""
    _METRICS["refusals"].inc()


async def refresh(engine: Any) -> None:
    """Bring the workers' figures to the endpoint: those of the first of them, the others' are equal."""
    found = (await engine.collective_rpc(METHOD))[0]
    if found is None:
        return
    _METRICS["tokens"].set(found["tokens"])
    for name, tokens in found["masked_tokens"].items():
        _METRICS["masked"].labels(name).set(tokens)
    for layer, receipt in found["layers"].items():
        _METRICS["hits"].labels(layer).set(receipt["hits"])
