"""``cu-fast verify --server`` against a stand-in for vLLM: all checks pass, and each fault is seen by the check that is for it."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import pytest
from command_line import run

MASKS = ["anna", "bruno (2)"]


class StandIn(http.server.BaseHTTPRequestHandler):
    """Answers as a server of vLLM with the plug-in; faults says what is wrong with it."""

    faults: frozenset[str] = frozenset()
    silent = "refuse"
    always: tuple[str, ...] = ()
    key: str | None = None

    def log_message(self, *args):
        pass

    def answer(self, status, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def has(self, fault):
        return fault in self.faults

    def do_GET(self):
        state = self.server.state
        if self.path == "/v1/models":
            if self.key and self.headers["Authorization"] != f"Bearer {self.key}":
                return self.answer(401, {"error": "Unauthorized"})
            self.answer(200, {"data": [{"id": "m", "max_model_len": 512}]})
        elif self.path == "/version":
            self.answer(200, {"version": "0.32.0"})
        elif self.path == "/cu_fast" and not self.has("blocked"):
            always = len(self.always)
            self.answer(200, {"masks": len(MASKS), "always": always, "silent": self.silent, "cu_fast": "0.1.0"})
        elif self.path == "/metrics" and not self.has("blocked"):
            labels = '{{mask="a b}} 1"}} {}' if not self.has("no receipts") else '{{mask="a"}} {} 5'
            lines = [f"cu_fast:{name}{labels.format(float(value))}" for name, value in state["counts"].items()]
            lines += ["# HELP cu_fast:tokens x", "cu_fast:requests_created 1.7e9", "vllm:tokens 9"]
            self.answer(200, "\n".join(lines).encode())
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        counts, xargs, header = self.server.state["counts"], body.get("vllm_xargs"), self.headers["X-Unlearn"]
        said, problem = None if xargs is None else xargs.get("unlearn"), None
        if header is not None and not self.has("no header"):
            said = [
                one.strip().replace("%20", " ").replace("%28", "(").replace("%29", ")")
                for one in header.split(",")
                if one
            ]
            problem = "both" if xargs is not None and not self.has("both") else None
        if "unlearn" in body and not self.has("top level"):
            problem = "not read"
        if xargs and "_cu_fast" in xargs and not self.has("forged"):
            problem = "the server's own"
        if said is None and (self.silent == "refuse") != self.has("silence"):
            problem = "say what to unlearn"
        if unknown := [one for one in said or [] if one not in MASKS]:
            if self.has("unknown"):
                said = []
            elif not (self.has("stream") and body.get("stream")):
                problem = f"this server has no mask {unknown[0]!r} (parameter=unlearn)"
            else:
                said = []
        if problem:
            counts["refusals_total"] += 1
            return self.answer(400, {"error": {"message": problem}})
        names = tuple(sorted({*(said or []), *self.always}))
        counts["requests_total"] += 1
        counts["tokens"] += 9
        if names:
            counts["masked_tokens"] += 9
            counts["hits"] += 0 if self.has("no bite") else 1
        tokens = len(body["prompt"].split())
        seen = body["prompt"] if self.has("no salt") else (body["prompt"], names)
        cached = (tokens if seen in self.server.state["seen"] else 0) * (not self.has("no cache"))
        self.server.state["seen"].add(seen)
        usage = {"prompt_tokens": tokens}
        if not self.has("no details"):
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        text = f"{body['prompt'][:20]} {names if not self.has('no bite') else ()}"
        self.answer(200, {"choices": [{"text": text}], "usage": usage})


@contextlib.contextmanager
def standing(**attributes):
    handler = type("Handler", (StandIn,), attributes)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    counts = dict.fromkeys(("requests_total", "refusals_total", "tokens", "masked_tokens", "hits"), 3)
    server.state = {"counts": counts, "seen": set()}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def checked(*arguments, masks=("--mask", "anna"), **attributes):
    """Exit code, and by check whether it passed and its figure."""
    with standing(**attributes) as url:
        result = run("verify", "--server", url, "--json", *masks, *arguments)
    assert result.stdout, result.output or repr(result.exception)
    return result.exit_code, {
        one["check"]: (one["passed"], one["figure"]) for one in json.loads(result.stdout)["checks"]
    }


UNKNOWN, HEADER, STREAM = (
    "an unknown mask is refused",
    "also where it is a header",
    "also of a stream, before it begins",
)
TAG, BOTH, PLACE = (
    "the server's own tag is refused", "header and body at once are refused", "masks where they are not read are refused"
)  # fmt: skip
SILENCE, BITES, SAME = "a request that says nothing", "a mask changes an answer", "a header says the same as a body"
CACHE, RECEIPTS = "prefixes are cached for the same masks alone", "receipts count"
ALL = [UNKNOWN, HEADER, STREAM, TAG, BOTH, PLACE, SILENCE, BITES, SAME, CACHE, RECEIPTS]


@pytest.mark.parametrize("silent, words", [("refuse", "refused"), ("none", "answered, under 0 masks")])
def test_a_server_that_does_as_it_should(silent, words):
    code, checks = checked(silent=silent)
    assert code == 0 and list(checks) == ALL and all(passed for passed, _ in checks.values()), checks
    assert checks[SILENCE][1] == words and "same masks:" in checks[CACHE][1] and "hits +" in checks[RECEIPTS][1]


@pytest.mark.parametrize(
    "fault, seen",
    [
        ("unknown", {UNKNOWN, HEADER, STREAM}),
        ("no header", {HEADER, BOTH, SAME}),
        ("stream", {STREAM}),
        ("forged", {TAG}),
        ("both", {BOTH}),
        ("top level", {PLACE}),
        ("silence", {SILENCE}),
        ("no bite", {BITES, SAME, CACHE}),
        ("no salt", {CACHE}),
        ("no receipts", {RECEIPTS}),
    ],
)
def test_a_fault_is_seen_by_the_check_that_is_for_it(fault, seen):
    # Where silence is refused, a header that is dropped is silence: the server is safe, and seen to be.
    code, checks = checked(faults=frozenset({fault}), silent="none")
    red = {name for name, (passed, _) in checks.items() if not passed}
    assert code == 1 and red == seen, checks


@pytest.mark.parametrize(
    "fault, check, words",
    [
        ("no details", CACHE, "not known: the server was not started with --enable-prompt-tokens-details"),
        (
            "no cache",
            CACHE,
            "not known: nothing is cached here, or the mask is for the prompts that fire it, which are computed",
        ),
        ("blocked", RECEIPTS, "not known: /metrics answers 404"),
    ],
)
def test_what_cannot_be_seen_is_not_judged(fault, check, words):
    code, checks = checked(faults=frozenset({fault}))
    assert code == 0 and checks[check] == (True, words)


def test_masks_that_always_hold():
    code, checks = checked("--mask", "bruno (2)", always=("anna",), silent="always")
    assert code == 0 and list(checks) == ALL and checks[SILENCE][1] == "answered, under 1 masks", checks
    assert checks[BITES][1].startswith("'bruno (2)'")
    code, checks = checked(always=tuple(MASKS))
    assert code == 0 and not {BITES, SAME, CACHE} & checks.keys(), checks


def test_without_a_mask_nothing_is_proven():
    code, checks = checked(masks=())
    red = {name for name, (passed, _) in checks.items() if not passed}
    assert code == 1 and red == {BITES, SAME, CACHE} and "give --mask NAME" in checks[BITES][1], checks


def test_prompts_model_and_key():
    code, checks = checked("--prompt", "about books", "--model", "m", "--api-key", "k", key="k")
    assert code == 0 and "about books" in checks[BITES][1]


def test_it_prints_a_table():
    with standing() as url:
        result = run("verify", "--server", url, "--mask", "anna")
    assert result.exit_code == 0 and "anna" in result.stdout and result.stdout.count("pass") == len(ALL)


def test_what_is_no_server_is_a_message():
    with standing() as url:
        pass
    with standing(key="k") as locked:
        for arguments, words in (
            ((url,), "error: "),
            (("localhost:8000",), "--server is 'localhost:8000'; it should begin with http"),
            ((locked,), "answers 401: Unauthorized"),
            ((locked, "--api-key", "k", "--model", "x"), "--model is 'x'; the server has m"),
        ):
            result = run("verify", "--server", *arguments)
            assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.output
    result = run("verify", "--prompt", "x")
    assert result.exit_code == 1 and "--model, --mask and --prompt are for --server URL" in result.stderr
