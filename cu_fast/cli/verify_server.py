"""Proof, from outside, that a running server of vLLM unlearns what each request says, and refuses what it should."""

from __future__ import annotations

import json
import re
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cu_fast.vllm import KEY, TAG

SECONDS = 120  # for one answer
QUESTIONS = ("Question: Where was {} born?\nAnswer:", "Question: Who is {}?\nAnswer:", "Tell me about {}.", "{}")
TOKENS = 48  # of an answer
UNKNOWN = "no such mask"


class Answer(NamedTuple):
    """What came back: the status, the text of the body, and the body where it is a JSON object."""

    status: int
    text: str
    json: dict[str, Any]

    @property
    def message(self) -> str:
        error = self.json.get("error")
        return str(error.get("message", error) if isinstance(error, dict) else error or self.text)

    @property
    def words(self) -> str:
        return self.json["choices"][0]["text"]


def verify_server(
    url: str, model: str | None, masks: Sequence[str], prompts: Sequence[str], api_key: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run every check on a server.

    Args:
        url: of the server, without a path.
        model: its name there; None = the first that the server has.
        masks: names of masks that a request may say; the server tells no client which it has.
        prompts: whose answers a mask should change; [] = questions with the mask's name.
        api_key: that the server asks for; None = it asks for none.

    Returns:
        What the server says of itself, and for each check: check (what it is), passed, and figure (what was compared, or the
        error).

    Raises:
        ValueError: url is none.
        OSError: nothing answers there.
    """
    server = Server(url, api_key)
    listed = server.ask("/v1/models")
    if listed.status != 200:
        raise OSError(f"{url}/v1/models answers {listed.status}: {listed.message[:200]}")
    models = listed.json["data"]
    chosen = next((one for one in models if model in (None, one["id"])), None)
    if chosen is None:
        raise ValueError(f"--model is {model!r}; the server has {', '.join(one['id'] for one in models)}")
    server.model, server.length = chosen["id"], chosen.get("max_model_len") or 2048
    about = server.ask("/cu_fast")
    server.says = about.json if about.status == 200 else {}
    version = server.ask("/version").json.get("version", "not known")
    facts = {"url": url, "model": server.model, "vllm": version, "cu_fast": "not known", **server.says}
    checks = []
    for name, check in _checks(server, masks, prompts):
        try:
            figure, passed = check(), True
        except Exception as error:  # a check that cannot run has failed, whatever the reason
            figure, passed = f"{type(error).__name__}: {error}", False
        checks.append({"check": name, "passed": passed, "figure": figure})
    return facts, checks


class Server:
    """A server and what is known of it.

    Args:
        url: without a path.
        api_key: that it asks for.

    Attributes:
        model: its name.
        length: of its longest text, in tokens.
        says: what it says of itself at /cu_fast; {} = nothing.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"--server is {url!r}; it should begin with http:// or https://")
        self.url, self.headers = url.rstrip("/"), {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.model, self.length, self.says = "", 0, dict[str, Any]()

    def ask(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Answer:
        """GET, or POST where there is a body. Raises OSError: nothing answers."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {**self.headers, **headers})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                status, text = response.status, response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode(errors="replace")
        try:
            read = json.loads(text)
        except ValueError:
            read = None
        return Answer(status, text, read if isinstance(read, dict) else {})

    def complete(self, prompt: str, xargs: dict[str, Any] | None, tokens: int = TOKENS, **more: Any) -> Answer:
        """A completion. xargs: None = the request is silent. more: of the body; header: of X-Unlearn."""
        headers = {"X_Unlearn": more.pop("header")} if "header" in more else {}
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
        return self.ask("/v1/completions", body if xargs is None else {**body, "vllm_xargs": xargs}, **headers)

    def text(self, prompt: str, names: list[str], **more: Any) -> str:
        """The answer under some masks. Raises AssertionError: it is refused."""
        answer = self.complete(prompt, {KEY: names}, **more)
        _require(answer.status == 200, f"{names} is answered {answer.status}: {answer.message[:200]}")
        return answer.words


def _checks(server: Server, masks: Sequence[str], prompts: Sequence[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    before = server.ask("/metrics")
    unknown = {KEY: [UNKNOWN]}
    yield "an unknown mask is refused", lambda: _refused(server, unknown)
    yield "also where it is a header", lambda: _refused(server, None, header=UNKNOWN)
    yield "also of a stream, before it begins", lambda: _refused(server, unknown, stream=True)
    yield "the server's own tag is refused", lambda: _refused(server, {KEY: [], TAG: "forged"})
    yield "header and body at once are refused", lambda: _refused(server, {KEY: []}, header="")
    yield "masks where they are not read are refused", lambda: _refused(server, None, **{KEY: [UNKNOWN]})
    yield "a request that says nothing", lambda: _silence(server)
    found: dict[str, Any] = {}
    if server.says.get("masks", 0) > server.says.get("always", -1):  # else there is nothing to compare with
        yield "a mask changes an answer", lambda: _bites(server, masks, prompts, found)
        yield "a header says the same as a body", lambda: _header(server, found)
        yield "prefixes are cached for the same masks alone", lambda: _caches(server, found)
    yield "receipts count", lambda: _receipts(server, before, found)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _refused(server: Server, xargs: dict[str, Any] | None, **more: Any) -> str:
    answer = server.complete("x", xargs, 1, **more)
    _require(answer.status == 400, f"answered {answer.status}: {answer.text[:200]}")
    return f"400: {answer.message[:80]}"


def _silence(server: Server) -> str:
    answer, told = server.complete("x", None, 1), server.says.get("silent")
    is_refused = answer.status == 400
    _require(is_refused or answer.status == 200, f"answered {answer.status}: {answer.text[:200]}")
    _require(told is None or is_refused == (told == "refuse"), f"answered {answer.status}, and silent is {told!r}")
    return "refused" if is_refused else f"answered, under {server.says.get('always', 'an unknown number of')} masks"


def _bites(server: Server, masks: Sequence[str], prompts: Sequence[str], found: dict[str, Any]) -> str:
    _require(bool(masks), "no mask is known; give --mask NAME: the server tells no client which it has")
    for name in masks:
        for prompt in prompts or [question.format(name) for question in QUESTIONS]:
            plain = {server.text(prompt, []) for _ in range(2)}  # of the last bits an answer may depend
            masked = server.text(prompt, [name])
            if masked not in plain:
                found.update(mask=name, prompt=prompt, answer=masked)
                return f"{name!r}, {prompt!r}: {plain.pop().strip()!r} -> {masked.strip()!r}"
    raise AssertionError(f"none of {', '.join(masks)} changes an answer; give --prompt TEXT that speaks of one's topic")


def _header(server: Server, found: dict[str, Any]) -> str:
    _require(bool(found), "no mask changed an answer")
    answer = server.complete(found["prompt"], None, header=urllib.parse.quote(found["mask"]))
    _require(answer.status == 200, f"answered {answer.status}: {answer.message[:200]}")
    _require(answer.words == found["answer"], f"header: {answer.words!r}; body: {found['answer']!r}")
    return repr(answer.words.strip()[:60])


def _caches(server: Server, found: dict[str, Any]) -> str:
    _require(bool(found), "no mask changed an answer")
    prompt = f"{secrets.token_hex(8)} " + "a b c d e f g h " * 8
    used = server.complete(prompt, {KEY: []}, 1).json["usage"]["prompt_tokens"]
    prompt = f"{secrets.token_hex(8)} " + "a b c d e f g h " * max(1, 8 * min(600, server.length // 2) // used)

    def cached(names: list[str]) -> int | None:
        answer = server.complete(prompt, {KEY: names}, 1)
        _require(answer.status == 200, f"{names} is answered {answer.status}: {answer.message[:200]}")
        return (answer.json["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")

    mask = found["mask"]
    first, again, other = cached([mask]), cached([mask]), cached([])
    if again is None:
        return "not known: the server was not started with --enable-prompt-tokens-details"
    _require(not first, f"a prompt that was never sent has {first} cached tokens")
    _require(not other, f"{other} tokens that were computed under {mask!r} were read with nothing deleted")
    if again == 0:
        return "not known: nothing is cached here, or the mask is for the prompts that fire it, which are computed"
    return f"same masks: {again} tokens; others: 0"


def _receipts(server: Server, before: Answer, found: dict[str, Any]) -> str:
    if before.status != 200:
        return f"not known: /metrics answers {before.status}"
    server.text("x", [], tokens=1)
    old, new = _figures(before.text), _figures(server.ask("/metrics").text)
    _require(bool(new), "/metrics has no figures of cu_fast")
    grown = {name: value - old.get(name, 0.0) for name, value in new.items()}
    wanted = ["cu_fast:requests_total", "cu_fast:refusals_total", "cu_fast:tokens"]
    wanted += ["cu_fast:masked_tokens", "cu_fast:hits"] if found else []
    still = [name for name in wanted if not grown.get(name, 0.0) > 0]
    _require(not still, f"{', '.join(still)} did not grow")
    return ", ".join(f"{name.removeprefix('cu_fast:')} +{grown[name]:g}" for name in wanted)


def _figures(text: str) -> dict[str, float]:
    """cu_fast's figures in the text of /metrics, each the sum over its labels."""
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^(cu_fast:\w+)(?:\{.*\})? ([0-9.e+-]+)$", text, re.MULTILINE):
        if not name.endswith("_created"):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
