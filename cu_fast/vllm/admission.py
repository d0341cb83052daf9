"""The front half: which masks a request gets, decided before it is queued, and its salt for the prefix cache.

    InputProcessor                          reads the attachment's masks when the front end starts
    AsyncLLM.generate                       says no before a stream has begun, whose status would be 200; takes the header
    InputProcessor.process_inputs           says no, and tags the request with its masks and their digest
    EngineCore.preprocess_add_request       trusts no front end: without a tag of its own digest nothing runs. Sets the salt
    to_beam_search_params                   says no: beam search makes its requests anew, and would lose the masks
    ResponsesRequest.to_sampling_params     says no: the stream of a response begins before generate is called

The salt of a prefix is the digest, 64 hexadecimal digits, and then the client's: whatever a client writes, blocks that
were computed under other masks have another one. Nothing deleted has a digest too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from cu_fast.vllm import KEY, TAG, reports
from cu_fast.vllm.catalog import Refused, Settings, catalog_of
from cu_fast.vllm.middleware import SAID, Said, means_key
from cu_fast.vllm.seams import Wrap


def names_for(vllm_config: Any, params: Any) -> tuple[str, ...] | None:
    """What a request unlearns; None = this server has no masks.

    Raises:
        VLLMValidationError: it is refused; HTTP 400.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    settings = Settings.of(vllm_config)
    try:
        extra = getattr(params, "extra_args", None) or {}
        if TAG in extra:
            raise Refused(f"{TAG!r} is the server's own; a request says {KEY!r}")
        if other := [key for key in extra if key != KEY and means_key(key)]:
            raise Refused(f"{other[0]!r} is not read; a request says {KEY!r}")
        if settings is None:
            if KEY in extra or ((said := SAID.get()) is not None and said.header is not None):
                raise Refused("this server has no masks; it was not started with --load-format cu_fast")
            return None
        if not isinstance(params, SamplingParams):
            raise Refused("only generation knows masks; pooling is refused")
        return catalog_of(settings).wanted(extra.get(KEY))
    except Refused as error:
        reports.refused()
        raise VLLMValidationError(str(error), parameter=KEY) from error


def _generate(original: Callable) -> Callable:
    def generate(self, prompt, sampling_params, *args, **kwargs):
        if (said := SAID.get()) is not None:
            sampling_params = _agreed(sampling_params, said)
        names = names_for(self.vllm_config, sampling_params)
        if names is not None and isinstance(prompt, AsyncGenerator):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError("a prompt that comes in pieces is refused: its state would be kept between them")
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _agreed(params: Any, said: Said) -> Any:
    """The parameters of an HTTP request, with what its header says.

    Raises:
        VLLMValidationError: header and body both say something, or the body does where its path does not read it.
    """
    from vllm.exceptions import VLLMValidationError

    extra = params.extra_args or {}
    try:
        if said.header is not None and (said.body or KEY in extra):
            raise Refused(f"the header X-Unlearn and the body's {KEY!r} both say what to unlearn; say it once")
        if not all(KEY in extra and value == extra[KEY] for value in said.body):
            raise Refused(
                f"the body says {KEY!r} where it is not read, or twice; write it into vllm_xargs alone. A path that does not "
                f"read vllm_xargs takes the header X-Unlearn"
            )
    except Refused as error:
        reports.refused()
        raise VLLMValidationError(str(error), parameter=KEY) from error
    if said.header is None:
        return params
    params = params.clone()
    params.extra_args = {**extra, KEY: said.header}
    return params


def _init(original: Callable) -> Callable:
    def __init__(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        if (settings := Settings.of(vllm_config)) is not None:
            catalog_of(settings)  # now: at the first request the folder may be another

    return __init__


def _process_inputs(original: Callable) -> Callable:
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        names = names_for(self.vllm_config, params)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if names is not None:
            own = request.sampling_params
            if own is params:
                raise RuntimeError("vLLM gave no copy of the SamplingParams; a tag would stay on the caller's")
            catalog = catalog_of(Settings.of(self.vllm_config))
            own.extra_args = {**(own.extra_args or {}), TAG: {"names": list(names), "digest": catalog.digest(names)}}
            if not catalog.gates.keys().isdisjoint(names):
                own.skip_reading_prefix_cache = True  # a gate judges the whole prompt: it has to be computed
            reports.admitted(names)
        return request

    return process_inputs


def _preprocess_add_request(original: Callable) -> Callable:
    def preprocess_add_request(self, request):
        settings = Settings.of(self.vllm_config)
        if settings is not None and not request.abort_immediately:
            names, digest = tag_of(request.sampling_params, request.request_id)
            if catalog_of(settings).digest(names) != digest:
                raise RuntimeError(
                    "front end and engine read different masks from the attachment's folder; restart both"
                )
            request.cache_salt = salted(digest, request.cache_salt)
        return original(self, request)

    return preprocess_add_request


def salted(digest: str, salt: str | None) -> str:
    """The salt of a request's prefix: no client's salt makes it that of other masks."""
    return f"{digest}:{salt or ''}"


def tag_of(params: Any, request_id: str) -> tuple[tuple[str, ...], str]:
    """(names, digest) that admission wrote. Raises RuntimeError where it did not."""
    tag = ((None if params is None else params.extra_args) or {}).get(TAG)
    if tag is None:
        raise RuntimeError(f"request {request_id} did not pass admission; its masks are not known, so it does not run")
    return tuple(tag["names"]), tag["digest"]


def _is_said(said: Said | None) -> bool:
    try:
        return said is not None and (said.header is not None or bool(said.body))
    except Refused:
        return True


def _silence_is_refused(said: Said | None) -> bool:
    settings = None if said is None or said.vllm_config is None else Settings.of(said.vllm_config)
    return settings is not None and settings.silent == "refuse"


def _to_beam_search_params(original: Callable) -> Callable:
    def to_beam_search_params(self, *args, **kwargs):
        if _is_said(SAID.get()) or KEY in (getattr(self, "vllm_xargs", None) or {}) or _silence_is_refused(SAID.get()):
            from vllm.exceptions import VLLMValidationError

            reports.refused()
            raise VLLMValidationError("beam search would lose the request's masks; it is refused", parameter=KEY)
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _to_sampling_params(original: Callable) -> Callable:
    def to_sampling_params(self, *args, **kwargs):
        params = original(self, *args, **kwargs)
        if (said := SAID.get()) is not None and said.vllm_config is not None:
            names_for(said.vllm_config, _agreed(params, said))
        return params

    return to_sampling_params


_OPENAI = "vllm.entrypoints.openai"
_SPEECH = "vllm.entrypoints.speech_to_text"
WRAPS = [
    Wrap("vllm.v1.engine.async_llm", "AsyncLLM", "generate", ("prompt", "sampling_params"), _generate),
    Wrap("vllm.v1.engine.input_processor", "InputProcessor", "__init__", ("vllm_config",), _init),
    Wrap("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("request_id", "prompt", "params"),
         _process_inputs),
    Wrap("vllm.v1.engine.core", "EngineCore", "preprocess_add_request", ("request",), _preprocess_add_request),
    Wrap(f"{_OPENAI}.responses.protocol", "ResponsesRequest", "to_sampling_params", (), _to_sampling_params),
    *(
        Wrap(f"{module}.protocol", owner, "to_beam_search_params", (), _to_beam_search_params)
        for module, owner in (
            (f"{_OPENAI}.chat_completion", "ChatCompletionRequest"),
            (f"{_OPENAI}.completion", "CompletionRequest"),
            (f"{_SPEECH}.transcription", "TranscriptionRequest"),
            (f"{_SPEECH}.translation", "TranslationRequest"),
        )
    ),
]  # fmt: skip
