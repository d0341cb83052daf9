"""Unlearned inference in stock vLLM: a plug-in, and a deletion for every request.

    vllm serve MODEL --load-format cu_fast --model-loader-extra-config '{"attachment": "MODEL/codebook"}'
    a request says: "vllm_xargs": {"unlearn": ["topic", ...]}          [] = nothing, said explicitly

The way of a request, and the files in that order: ``catalog`` (what the operator offers), ``middleware`` (a header says it),
``admission`` (which masks it gets, or why it is refused; its salt for the prefix cache), ``runner_v1`` and ``runner_v2``
(which token of a step is whose), ``step`` (the mask row of every token), ``gating`` (masks for prompts that fire them),
``served`` (the splices of one model, and the guard around its forward), ``operator`` (what a layer calls). ``loader`` puts
them in, after ``refusals`` has looked at the server's settings; ``seams`` is how anything of vLLM is wrapped.

The load format is what makes it fail closed: where this plug-in did not load, vLLM does not know the format and ends.
"""

from __future__ import annotations

import logging

LOAD_FORMAT = "cu_fast"
KEY = "unlearn"  # what a client writes, in SamplingParams.extra_args and in vllm_xargs
TAG = "_cu_fast"  # what admission writes there, and nothing else may
TESTED = ("0.30", "0.31", "0.32")  # versions of vLLM, by their first two numbers

logger = logging.getLogger("vllm.cu_fast")  # vLLM prints what is below its own name


def register() -> None:
    """The entry point ``vllm.general_plugins``: run in every process of vLLM, also more than once.

    Where something that the plug-in needs of vLLM is not there, nothing is changed, the load format stays unknown, and the
    log says why: servers that do not use cu_fast are not disturbed, and one that does refuses to start.
    """
    import vllm

    from cu_fast.vllm import admission, loader, middleware, reports, runner_v1, seams

    try:
        wraps = seams.found([*middleware.WRAPS, *admission.WRAPS, *runner_v1.WRAPS])
        install = loader.prepare()
        reports.prepare()
    except (ImportError, AttributeError, TypeError) as error:
        logger.error(
            "cu_fast is not available in this vLLM (%s; tested: %s): %s. Load format 'cu_fast' stays unknown",
            vllm.__version__,
            ", ".join(TESTED),
            error,
        )
        return
    if not vllm.__version__.startswith(tuple(f"{version}." for version in TESTED)):
        logger.warning("cu_fast was tested with vLLM %s; this is %s", ", ".join(TESTED), vllm.__version__)
    seams.wrap(wraps)
    install()
