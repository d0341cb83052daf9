"""What a request says by its header and its body, as admission hears it. Without vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
import types

import pytest

from cu_fast.cli.demo import BUNDLE
from cu_fast.vllm import middleware, reports
from cu_fast.vllm.catalog import Refused
from cu_fast.vllm.middleware import SAID, Said, UnlearnHeader, names_in


@pytest.mark.parametrize(
    "values, names",
    [
        ([b""], []),
        ([b" , ,"], []),
        ([b"a"], ["a"]),
        ([b"a, b b ,c"], ["a", "b b", "c"]),
        ([b"a", b"b, c"], ["a", "b", "c"]),
        ([b"Chukwu%20Akabueze"], ["Chukwu Akabueze"]),
        ([b"a%2Cb, %C3%BC"], ["a,b", "ü"]),
        (["ü".encode()], ["\u00c3\u00bc"]),  # not percent-encoded: no mask's name, so it is refused
        ([b"%FF"], ["\ufffd"]),
        ([b"\xff\x00"], ["\u00ff\x00"]),
    ],
)
def test_names_of_a_header(values, names):
    assert names_in(values) == names


def body(text: str | bytes) -> list:
    said = Said(None)
    said._body += text.encode() if isinstance(text, str) else text
    return said.body


A, B = {"unlearn": ["a"]}, {"unlearn": ["b"]}


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, []),
        ({"vllm_xargs": A}, [["a"]]),
        ({"vllm_xargs": {"unlearn": None}}, [None]),
        ({"vllm_xargs": None}, []),
        ({"vllm_xargs": [A]}, []),
        (A, [["a"]]),
        ({"extra_body": {"vllm_xargs": A}}, [["a"]]),
        ({"sampling_params": {"extra_args": A}}, [["a"]]),
        ({"vllm_xargs": A, **B}, [["a"], ["b"]]),
        ({"vllm_xargs": {"Unlearn": ["a"]}}, [["a"]]),
        ({" UNLEARN ": "a"}, ["a"]),
        ({"messages": [{"role": "user", "content": "x", **A}]}, []),
        ({"tools": [{"function": {"parameters": {"properties": A}}}]}, []),
        ({"unlearned": ["a"]}, []),
    ],
)
def test_what_a_body_says(given, said):
    text = json.dumps(given)
    assert body(text) == said
    assert body(text.encode("utf-16")) == said  # as the server's own reader of JSON would take it
    assert body(text.replace("unlearn", "\\u0075nlearn")) == said


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"unlearn"', "\xff", "[" * 100_000, "--x\r\nunlearn"])
def test_a_body_that_is_no_object_is_silent(text):
    assert body(text) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"vllm_xargs": {"unlearn": ["a"], "unlearn": []}}',
        '{"vllm_xargs": {"unlearn": ["a"]}, "vllm_xargs": {}}',
        '{"unlearn": ["a"], "unlearn": ["a"]}',
        '{"sampling_params": {"extra_args": {"unlearn": ["a"]}, "extra_args": {}}}',
    ],
)
def test_a_body_that_says_it_twice_is_refused(text):
    with pytest.raises(Refused, match="twice"):
        _ = body(text)


class Application:
    """Reads a body of several messages and answers; keeps what it saw."""

    def __init__(self):
        self.said, self.later, self.scopes = None, None, []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope["type"])
        while scope["type"] == "http" and (await receive()).get("more_body"):
            pass
        self.said = SAID.get()
        self.later = await asyncio.create_task(self.task())

    async def task(self):
        return SAID.get()


def served(application, scope, parts=(b"",)):
    messages = [{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def call():
        await UnlearnHeader(application)({"path": "/v1/completions", "headers": [], **scope}, receive, send)
        assert SAID.get() is None, "the context of a request ends with it"

    asyncio.run(call())
    return sent


def test_a_request_is_heard_in_its_task_and_in_those_it_starts():
    application = Application()
    headers = [(b"content-type", b"application/json"), (b"X-UNLEARN", b"a"), (b"x-unlearn", b"b")]
    text = json.dumps({"vllm_xargs": A}).encode()
    served(application, {"type": "http", "headers": headers}, [text[:9], text[9:], b""])
    assert application.said.header == ["a", "b"] and application.said.body == [["a"]]
    assert application.later is application.said
    served(application, {"type": "http", "headers": [(b"x-unlearn", b"")]})
    assert application.said.header == [], "nothing, said explicitly"
    served(application, {"type": "http"})
    assert application.said.header is None and application.said.body == []
    served(application, {"type": "websocket", "headers": headers})
    assert application.said.header == ["a", "b"]


def test_requests_at_once_do_not_hear_one_another():
    heard = {}

    async def application(scope, receive, send):
        await asyncio.sleep(0.01 if scope["path"] == "/0" else 0)
        heard[scope["path"]] = SAID.get().header

    async def all_of_them():
        wrapped = UnlearnHeader(application)
        calls = [{"type": "http", "path": f"/{i}", "headers": [(b"x-unlearn", b"%d" % i)]} for i in range(9)]
        await asyncio.gather(*(wrapped(scope, None, None) for scope in calls))

    asyncio.run(all_of_them())
    assert heard == {f"/{i}": [str(i)] for i in range(9)}


def test_a_form_is_not_kept():
    application = Application()
    kinds = [(b"content-type", b"application/json"), (b"content-type", b"multipart/form-data; boundary=x")]
    served(application, {"type": "http", "headers": kinds}, [b"{}"])
    assert application.said._body == b"{}", "the first of two is the one that counts"
    served(application, {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}, [b"{}"])
    assert application.said._body == b""


def test_a_body_that_nothing_reads_is_not_read():
    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})

    assert [message["status"] for message in served(application, {"type": "http"}, [b"x" * 9])] == [401]


def test_the_lifespan_passes():
    application = Application()
    served(application, {"type": "lifespan"})
    assert application.scopes == ["lifespan"] and application.said is None


class Engine:
    def __init__(self, load_format):
        load = types.SimpleNamespace(load_format=load_format, model_loader_extra_config={"silent": "none"})
        model = types.SimpleNamespace(model=str(BUNDLE))
        self.vllm_config = types.SimpleNamespace(load_config=load, model_config=model)
        self.reports = 0


def test_the_server_says_what_it_offers(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="9.9"))
    application, engine = Application(), Engine("cu_fast")
    app = types.SimpleNamespace(state=types.SimpleNamespace(engine_client=engine))
    start, answer = served(application, {"type": "http", "path": "/behind/cu_fast", "root_path": "/behind", "app": app})
    assert start["status"] == 200 and application.scopes == []
    found = json.loads(answer["body"])
    assert found["masks"] == 2 and found["silent"] == "none"
    assert found["vllm"] == "9.9" and found["tested"] and not found["always"] and not found["where_it_fires"]

    engine.vllm_config.load_config.load_format = "auto"  # no masks: as without the plug-in
    served(application, {"type": "http", "path": "/cu_fast", "app": app})
    assert application.scopes == ["http"]


class Served:
    """An application of FastAPI, as far as middleware goes."""

    def __init__(self, *classes):
        self.user_middleware = [types.SimpleNamespace(cls=one) for one in classes]

    def add_middleware(self, cls):
        self.user_middleware.append(types.SimpleNamespace(cls=cls))


@pytest.mark.parametrize(
    "load_format, before, count",
    [("cu_fast", (), 1), ("cu_fast", (UnlearnHeader,), 1), ("auto", (), 0), ("auto", (UnlearnHeader,), 1)],
)
def test_every_server_with_the_load_format_has_it_once(load_format, before, count):
    calls, app = [], Served(*before)
    (wrap,) = middleware.WRAPS
    wrap.make(lambda *given: calls.append(given))(types.SimpleNamespace(load_format=load_format), app, ("generate",))
    assert len(calls) == 1 and [one.cls for one in app.user_middleware] == [UnlearnHeader] * count


def test_the_counts_are_asked_for_before_they_are_read(monkeypatch):
    asked = []

    async def refresh(engine):
        asked.append(engine)

    monkeypatch.setattr(reports, "refresh", refresh)
    app = types.SimpleNamespace(state=types.SimpleNamespace(engine_client="engine"))
    application = Application()
    served(application, {"type": "http", "path": "/metrics", "app": app})
    assert asked == ["engine"] and application.scopes == ["http"]
    assert middleware.reports is reports
