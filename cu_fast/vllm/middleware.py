"""The header ``X-Unlearn: a, b`` says what a request unlearns. Every server with the load format has this middleware.

A gateway that knows its tenants sets it, and strips the client's. It is read on every path, whatever the body is: what was said
travels as a context variable to admission, which is called in the same task. A name with a comma, or one that is not ASCII,
is percent-encoded. An empty header is "nothing", said explicitly.

The body is kept while the server reads it, for one question of admission: did it say ``unlearn`` where this path does not look?
Some paths drop what they do not know, and would answer without the masks.

Before ``/metrics`` is answered, the workers' counts are asked for. ``/cu_fast`` says what the server is, and
no names: whose data was erased is not for every client to read.
"""

from __future__ import annotations

import contextvars
import functools
import json
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from cu_fast import __version__
from cu_fast.vllm import KEY, LOAD_FORMAT, TESTED, reports
from cu_fast.vllm.catalog import Refused, Settings, catalog_of
from cu_fast.vllm.seams import Wrap

Scope = MutableMapping[str, Any]
HEADER = b"x-unlearn"
PATH = "/cu_fast"
# Where vLLM's protocols have what goes to extra_args, and where clients write it by mistake: one inside the other, too.
PLACES = ("vllm_xargs", "extra_args", "sampling_params", "extra_body")


class Said:
    """What an HTTP request says to unlearn.

    Args:
        header: the names of its header; None = it has none.
        vllm_config: the server's; None = not known.
    """

    def __init__(self, header: list[str] | None, vllm_config: Any = None) -> None:
        self.header, self.vllm_config = header, vllm_config
        self._body = bytearray()

    @functools.cached_property
    def body(self) -> list[Any]:
        """Everything that its body says, wherever; [] where it is silent. Raises Refused: it says something twice."""
        try:
            return list(_said_in(json.loads(self._body, object_pairs_hook=_once)))
        except Refused:
            raise
        except (ValueError, RecursionError):  # no JSON: what the server refuses too
            return []

    def keep(self, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        """receive, with the body kept as it is read: before that, it may be of a client that is not let in."""

        async def kept() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                self._body += message.get("body", b"")
            return message

        return kept


SAID: contextvars.ContextVar[Said | None] = contextvars.ContextVar("cu_fast_said", default=None)


class UnlearnHeader:
    """ASGI middleware.

    Args:
        app: what it is put around.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        config = getattr(engine, "vllm_config", None)
        if path == "/metrics" and engine is not None:
            await reports.refresh(engine)
        if path == PATH and config is not None and (found := offered(config)) is not None:
            await _answer(send, found)
            return
        values = [value for name, value in scope["headers"] if name.lower() == HEADER]
        said = Said(names_in(values) if values else None, config)
        kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
        is_form = bool(kinds) and kinds[0].startswith(b"multipart/")  # the first is the one that counts
        token = SAID.set(said)
        try:
            await self.app(scope, receive if is_form else said.keep(receive), send)
        finally:
            SAID.reset(token)


def _init_entrypoints_middleware(original: Callable) -> Callable:
    """A server that had to be told of the middleware could be started without, and would not hear headers."""

    def init_entrypoints_middleware(args, app, supported_tasks):
        original(args, app, supported_tasks)
        is_there = any(one.cls is UnlearnHeader for one in app.user_middleware)  # --middleware names it
        if args.load_format == LOAD_FORMAT and not is_there:
            app.add_middleware(UnlearnHeader)

    return init_entrypoints_middleware


WRAPS = [
    Wrap(
        "vllm.entrypoints.launchers.app",
        "",
        "init_entrypoints_middleware",
        ("args", "app"),
        _init_entrypoints_middleware,
    )
]


def names_in(values: list[bytes]) -> list[str]:
    """The names in the values of one or more headers; [] where they are empty."""
    parts = [part.strip() for value in values for part in value.decode("latin-1").split(",")]
    return [urllib.parse.unquote(part) for part in parts if part]


def means_key(name: str) -> bool:
    """Whether a client that wrote this meant KEY."""
    return name.strip().casefold() == KEY


def offered(vllm_config: Any) -> dict[str, Any] | None:
    """What the server of a ``VllmConfig`` is, with numbers of masks; None = it has none."""
    import vllm

    settings = Settings.of(vllm_config)
    if settings is None:
        return None
    return {
        "masks": len(catalog_of(settings).masks),
        "always": len(settings.always),
        "where_it_fires": len(settings.where_it_fires),
        "silent": settings.silent,
        "cu_fast": __version__,
        "vllm": vllm.__version__,
        "tested": list(TESTED),
    }


async def _answer(send: Callable, found: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the body, of which the last of two equal keys would hold."""
    told = [key for key, _ in pairs if key in PLACES or means_key(key)]
    if len(told) > len(set(told)):
        twice = next(key for key in told if told.count(key) > 1)
        raise Refused(f"the body says {twice!r} twice; say it once")
    return dict(pairs)


def _said_in(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if means_key(key):
                yield inner
            elif key in PLACES:
                yield from _said_in(inner)
