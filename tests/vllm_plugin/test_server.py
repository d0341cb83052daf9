"""A server over HTTP: the right masks for each request, and nothing that a client sends takes one off. Needs vLLM."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import concurrent.futures
import json
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

from vllm_server import (
    MASKED,
    PLACES,
    PLAIN,
    QUESTION,
    SETS,
    TOKENS,
    UNREAD,
    C,
    J,
    body_with,
    checks_of,
    completion,
    refused,
    says,
    serving,
)

from cu_fast.cli import demo
from cu_fast.vllm import TAG
from cu_fast.vllm.catalog import Settings, catalog_of


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), "--silent", "refuse") as made:
        yield made
        assert made.process.poll() is None, "it served to the end"
        models = made.ask("/v1/models")
        assert models.status == 200


@pytest.fixture(scope="module")
def bundle():
    return demo.load_bundle()


def chat(**more) -> dict:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": "m", "messages": messages, "temperature": 0, "max_tokens": TOKENS, **more}


def tokens_of(server, text=QUESTION) -> list[int]:
    return server.ask("/tokenize", {"model": "m", "prompt": text}).json["tokens"]


# -- what is right ---------------------------------------------------------------------------------------------------


def test_32_requests_at_once_with_four_sets_of_masks(server, bundle):
    named = [next(author for author in bundle.authors if author.name == name) for name in (C, J)]
    questions = [row["question"] for author in named for row in author.rows[:4]]
    cases = [(question, names) for question in questions for names in SETS]
    right = demo.generate(bundle, [q for q, _ in cases], [set(names) or None for _, names in cases])
    right = dict(zip(cases, right))
    assert len(cases) == 32 and len({right[q, names] for q, names in cases}) > 16, "masks change answers"

    def ask(case):
        return server.ask("/v1/completions", completion(demo.prompt(case[0]), **says(list(case[1]))))

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, cases))
    assert [one.status for one in answers] == [200] * 32
    wrong = [(case, a.texts) for case, a in zip(cases, answers) if a.texts[0].strip() != right[case].strip()]
    assert wrong == []


WAYS = {
    "completion": ("/v1/completions", completion(**says([C])), {}),
    "one name": ("/v1/completions", completion(**says(C)), {}),
    "stream": ("/v1/completions", completion(stream=True, **says([C])), {}),
    "invocation": ("/invocations", completion(**says([C])), {}),
    "chat": ("/v1/chat/completions", chat(**says([C])), {}),
    "chat stream": ("/v1/chat/completions", chat(stream=True, **says([C])), {}),
    "chat batch": ("/v1/chat/completions/batch", {**chat(**says([C])), "messages": [chat()["messages"]] * 2}, {}),
    "message": ("/v1/messages", chat(**says([C])), {}),
    "header": ("/v1/completions", completion(), {"X_Unlearn": C}),
    "header, encoded": ("/v1/completions", completion(), {"X_Unlearn": urllib.parse.quote(C)}),
    "header, two names": ("/v1/completions", completion(), {"x_unlearn": f"{C} , {urllib.parse.quote(C)}"}),
    "header, stream": ("/v1/completions", completion(stream=True), {"X_Unlearn": C}),
    "header, chat": ("/v1/chat/completions", chat(), {"X_Unlearn": C}),
    "header, chat batch": (
        "/v1/chat/completions/batch",
        {**chat(), "messages": [chat()["messages"]]},
        {"X_Unlearn": C},
    ),
    "header, message": ("/v1/messages", chat(), {"X_Unlearn": C}),
    "many times": ("/v1/completions", completion(**says([C] * 10_000)), {}),
    "several prompts": ("/v1/completions", completion([QUESTION] * 3, **says([C])), {}),
    "n": ("/v1/completions", completion(**{**says([C]), "n": 2, "temperature": 1, "top_k": 1, "seed": 0}), {}),
    "said twice, alike": ("/v1/completions", completion(unlearn=[C], **says([C])), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_say_it(server, way):
    path, body, headers = WAYS[way]
    answer = server.ask(path, body, **headers)
    assert answer.status == 200, answer.body
    texts = [text.strip() for text in answer.texts]
    assert texts == [MASKED] * {"chat batch": 2, "several prompts": 3, "n": 2}.get(way, 1)


def test_nothing_deleted_is_said_explicitly(server):
    for body, headers in (
        (completion(**says([])), {}),
        (completion(**says("")), {}),
        (completion(), {"X_Unlearn": ""}),
    ):
        answer = server.ask("/v1/completions", body, **headers)
        assert answer.status == 200 and answer.texts[0].strip() == PLAIN


def test_a_response(server):
    body = {"model": "m", "input": QUESTION, "max_output_tokens": TOKENS, "temperature": 0, "store": False}
    answer = server.ask("/v1/responses", {**body, **says([C])})
    assert answer.status == 200 and answer.texts[0].strip() == MASKED, answer.body
    assert server.ask("/v1/responses", body, X_Unlearn=C).texts[0].strip() == MASKED
    for wrong in (body, {**body, **says(["Nobody"])}, {**body, "stream": True, **says(["Nobody"])}):
        assert server.ask("/v1/responses", wrong).status == 400


def test_tokens_in_tokens_out(server):
    ids = tokens_of(server)
    body = {"model": "m", "token_ids": ids, "output_mode": "text"}
    parameters = {"temperature": 0, "max_tokens": TOKENS}

    def ask(extra, **more):
        headers = {"X_Unlearn": more.pop("header")} if "header" in more else {}
        given = parameters if extra is None else {**parameters, "extra_args": extra}
        return server.ask("/inference/v1/generate", {**body, "sampling_params": given, **more}, **headers)

    assert ask({"unlearn": [C]}).texts[0].strip() == MASKED and ask({"unlearn": []}).texts[0].strip() == PLAIN
    assert ask(None, header=C).texts[0].strip() == MASKED
    assert ask({"unlearn": [C]}, request_id="_warmup_0_").texts[0].strip() == MASKED
    tags = [{"names": [], "digest": catalog().digest(())}, "x", [], {}, None]
    for tag in tags:
        for extra in ({TAG: tag}, {TAG: tag, "unlearn": []}, {TAG: tag, "unlearn": [C]}):
            refused(ask(extra), words="the server's own")
    refused(ask(None), words="say what to unlearn")
    refused(ask(None, **says([C])), words="where it is not read")
    refused(ask({"unlearn": []}, **says([C])), words="where it is not read, or twice")
    refused(ask({"unlearn": []}, header=C), words="both say")
    refused(ask({"unlearn": None}), words="say what to unlearn")
    refused(ask({"Unlearn": [C], "unlearn": []}), words="Unlearn")


def test_what_render_writes_carries_the_masks(server):
    rendered = server.ask("/v1/completions/render", completion(**says([C])))
    assert rendered.status == 200, rendered.body
    (body,) = rendered.json if isinstance(rendered.json, list) else [rendered.json]
    answer = server.ask("/inference/v1/generate", {**body, "output_mode": "text", "model": "m"})
    assert answer.status == 200 and answer.texts[0].strip() == MASKED, answer.body


# -- what is refused -------------------------------------------------------------------------------------------------


def catalog():
    return catalog_of(Settings.read({}, demo.BUNDLE))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, body", [("/v1/completions", completion()), ("/v1/chat/completions", chat())])
def test_refusals(server, path, body, stream):
    def ask(words, more=None, **headers):
        refused(server.ask(path, {**body, "stream": stream, **(more or {})}, **headers), words)

    ask("say what to unlearn")
    ask("say what to unlearn", {"vllm_xargs": {}})
    ask("this server has no mask 'Nobody'", says(["Nobody"]))
    ask("this server has no mask 'Nobody'", says("Nobody"))
    ask("this server has no mask 'Nobody'", says([C, "Nobody"]))
    ask("this server has no mask 'Nobody'", X_Unlearn="Nobody")
    ask("this server has no mask 'Nobody'", X_Unlearn=f"{C}, Nobody")
    ask("the server's own", {"vllm_xargs": {"unlearn": [C], TAG: "x"}})
    ask("the server's own", {"vllm_xargs": {TAG: ["x"]}})
    ask("the server's own", {"vllm_xargs": {TAG: ["x"]}}, X_Unlearn=C)
    ask("both say", says([C]), X_Unlearn=C)
    ask("both say", says([]), X_Unlearn=C)
    ask("both say", says([C]), X_Unlearn="")
    ask("both say", {"unlearn": [C]}, X_Unlearn="")
    # Completions refuse to stream beams before they ask for anything.
    words = "not currently supported" if stream and path == "/v1/completions" else "beam search would lose"
    for more, headers in ((says([C]), {}), (says([]), {}), ({"unlearn": [C]}, {}), ({}, {"X_Unlearn": C})):
        ask(words, {**more, "use_beam_search": True, "n": 2}, **headers)
    ask(words, {"use_beam_search": True, "n": 2})


@pytest.mark.parametrize(
    "name",
    [
        *(C.upper(), C.lower(), f"{C} ", f" {C}", f"{C}\u200b", C.replace("a", "\u0430"), C.replace(" ", "\u00a0")),
        *("".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in C), f"{C},{J}", "", " ", "\x00", "x" * 1_000_000),
    ],
)
def test_a_name_that_is_nearly_one(server, name):
    started = time.monotonic()
    answer = server.ask("/v1/completions", completion(**says([name])))
    refused(answer, "this server has no mask")
    assert len(answer.body) < 1000 and time.monotonic() - started < 10


@pytest.mark.parametrize(
    "value",
    [None, 0, 1, 1.5, True, False, {}, {C: 1}, [None], [0], [True], [[C]], [{"a": C}], ["Nobody"] * 100_000, [[]]],
)
def test_a_value_that_is_no_list_of_names(server, value):
    answer = server.ask("/v1/completions", completion(**says(value)))
    assert answer.status == 400, answer


@pytest.mark.parametrize("place", PLACES)
def test_masks_where_they_are_not_read(server, place):
    """Beside [], which would be answered with nothing deleted."""
    body = completion(**{**says([]), **PLACES[place]})
    for path, given in (
        ("/v1/completions", body),
        ("/invocations", body),
        ("/v1/chat/completions", {**chat(), **body}),
    ):
        given = {key: value for key, value in given.items() if key != "prompt" or path != "/v1/chat/completions"}
        refused(server.ask(path, given), "unlearn")


@pytest.mark.parametrize(
    "text",
    [
        '"vllm_xargs": {"unlearn": ["Chukwu Akabueze"], "unlearn": []}',
        '"vllm_xargs": {"unlearn": ["Chukwu Akabueze"]}, "vllm_xargs": {"unlearn": []}',
        '"vllm_xargs": {"unlearn": []}, "vllm_xargs": {"unlearn": ["Chukwu Akabueze"]}',
        '"vllm_xargs": {"unlearn": ["Chukwu Akabueze"], "\\u0075nlearn": []}',
    ],
)
def test_keys_that_come_twice(server, text):
    refused(server.ask("/v1/completions", body_with(text)), "twice")


def test_another_encoding_of_the_body(server):
    for body, status in ((completion(**says([C])), 200), (completion(unlearn=[C], **says([])), 400)):
        answer = server.ask("/v1/completions", json.dumps(body).encode("utf-16"))
        assert answer.status in (status, 400) and PLAIN not in answer.body, answer


@pytest.mark.parametrize("path", UNREAD)
def test_paths_that_do_not_read_the_body(server, path):
    for more, headers in (({}, {}), (says([C]), {}), (says([C]), {"X_Unlearn": ""}), ({}, {"X_Unlearn": "Nobody"})):
        answer = server.ask(path, {**UNREAD[path], **more}, **headers)
        assert answer.status == (400 if path == "/generative_scoring" else 501), answer
    if path == "/generative_scoring":
        scores = [server.ask(path, UNREAD[path], X_Unlearn=name).json["data"][0]["score"] for name in ("", C, C)]
        assert scores[0] != scores[1] == scores[2], "the header holds there"


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v2/embed"]
)
def test_pooling(server, path):
    body = {"model": "m", "input": QUESTION, "text_1": "a", "text_2": "b", "query": "a", "documents": ["b"]}
    for more, headers in (({}, {}), (says([C]), {}), ({}, {"X_Unlearn": C})):
        assert 400 <= server.ask(path, {**body, **more}, **headers).status < 500


# -- what a client sends that a server might trust -------------------------------------------------------------------

FIELDS = {
    "cache_salt": {"cache_salt": "x"},
    "kv_transfer_params": {
        "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [0, 1], TAG: {"names": []}}
    },
    "ec_transfer_params": {"ec_transfer_params": {"x": 1}},
    "priority": {"priority": -1},
    "request_id": {"request_id": "_warmup_0_"},
    "mixed request_id": {"request_id": "_v2_mixed_warmup_0_"},
    "extra_args": {"extra_args": {TAG: {"names": [], "digest": ""}}},
    "prompt_embeds": {"prompt_embeds": "AAAA"},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 4},
    "skip_clone": {"skip_clone": True},
    "skip_reading_prefix_cache": {"skip_reading_prefix_cache": False},
    "sampling_params": {"sampling_params": {"extra_args": {TAG: {"names": []}}}},
    "names": {"_cu_fast": {"names": [], "digest": ""}},
    "logprobs": {"logprobs": 1, "prompt_logprobs": 1, "echo": False},
    "kv_hints": {"kv_hints": {"x": 1}},
    "session": {"vllm_xargs": {"unlearn": [C], "session_id": "x", "kv_transfer_params": "y"}},
    "diffusion": {"vllm_xargs": {"unlearn": [C], "kv_cache_report_mode": "all", "abort_immediately": 1}},
}
HEADERS = {
    "request id": {"X_Request_Id": "_warmup_0_"},
    "data parallel": {"X_data_parallel_rank": "3"},
    "session": {"X_Session_ID": "x", "X_Unlearn_": ""},
    "other names": {"Unlearn": "", "X_Unlearned": "", "vllm_xargs": "{}", "X_Cu_Fast": "{}"},
    "trace": {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "baggage": "unlearn="},
}
CASES = {**{f"field {name}": (body, {}) for name, body in FIELDS.items()}}
CASES |= {f"header {name}": ({}, headers) for name, headers in HEADERS.items()}


@pytest.mark.parametrize("case", CASES)
def test_nothing_a_client_sends_takes_a_mask_off(server, case):
    more, headers = CASES[case]
    answer = server.ask("/v1/completions", {**completion(**says([C])), **more}, **headers)
    assert PLAIN not in answer.body, answer
    if answer.status == 200 and case != "field truncate_prompt_tokens":
        assert answer.texts[0].strip() == MASKED
    # Nor does anything else say for a client that is silent what it unlearns.
    silent = {key: value for key, value in more.items() if key != "vllm_xargs"}
    answer = server.ask("/v1/completions", {**completion(), **silent}, **headers)
    assert 400 <= answer.status < 500, answer
    assert server.ask("/health").status == 200


def test_a_prefix_of_other_masks_is_not_read(server, bundle):
    before = " ".join(row["question"] for row in bundle.authors[0].rows[:12])
    prompt = f"{before}\n{QUESTION}"

    def ask(names, **more):
        answer = server.ask("/v1/completions", completion(prompt, **says(list(names)), **more))
        assert answer.status == 200, answer
        return answer.texts[0], answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    right = {names: ask(names) for names in SETS}
    assert [cached for _, cached in right.values()] == [0] * 4
    assert all(ask(names)[1] >= 128 for names in SETS), "each is cached for its own"
    assert ask((J, C)) == ask((C, J)), "their order does not matter"
    digests = [catalog().digest(names) for names in SETS]
    salts = [salt for digest in digests for salt in (digest, f"{digest}:", f":{digest}", f"{digest}:{digest}")]
    for salt in [*salts, ":", "\x00"]:
        answer = server.ask("/v1/completions", completion(prompt, cache_salt=salt, **says([C])))
        if answer.status == 200:
            assert answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert answer.texts[0] == right[C,][0]
    assert answer.status in (200, 400)


# -- what a server says of itself ------------------------------------------------------------------------------------


def test_it_says_what_it_offers_and_what_it_did(server):
    about = server.ask("/cu_fast")
    assert about.json["masks"] == 2 and about.json["silent"] == "refuse" and about.json["vllm"].startswith("0.")
    assert C not in about.body and J not in about.body, "whose data was erased is not for every client to read"
    server.ask("/v1/completions", completion(**says([C, J])))
    text = server.ask("/metrics").body
    for line in ('cu_fast:requests_total{mask="Chukwu Akabueze"}', "cu_fast:refusals_total", "cu_fast:tokens",
                 'cu_fast:masked_tokens{mask="Jaime Vasquez"}', "cu_fast:hits{layer="):  # fmt: skip
        assert [one for one in text.splitlines() if one.startswith(line)], line


def test_verify_passes(server):
    code, checks = checks_of(server)
    assert code == 0 and len(checks) >= 10, checks
    assert not [figure for _, figure in checks.values() if figure.startswith("not known")]
    assert checks["a request that says nothing"][1] == "refused"


def test_the_command_became_vllm(server):
    words = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().split(b"\0")
    assert b"--load-format" in words and b"cu_fast.cli.app" not in words and b"--middleware" not in words


def test_the_exit_code_is_vllms_own():
    command = [sys.executable, "-m", "cu_fast.cli.app", "serve", "demo", "--", "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--no-such-option" in done.stderr


# -- other servers ---------------------------------------------------------------------------------------------------


def test_what_always_holds_is_not_taken_off(tmp_path):
    options = "--always", C, "--silent", "always"
    middleware = "--middleware", "cu_fast.vllm.middleware.UnlearnHeader"  # that is there already
    with serving(tmp_path, *options, arguments=middleware) as server:
        ways = [
            ({}, {}),
            (says([]), {}),
            (says(""), {}),
            (says([C]), {}),
            ({}, {"X_Unlearn": ""}),
            ({}, {"X_Unlearn": C}),
        ]
        for more, headers in ways:
            for stream in (False, True):
                answer = server.ask("/v1/completions", completion(stream=stream, **more), **headers)
                assert answer.status == 200 and answer.texts[0].strip() == MASKED, answer
        beams = server.ask("/v1/completions", completion(use_beam_search=True, n=2))
        assert beams.status == 200 and PLAIN not in beams.body and "Lagos" not in beams.body
        refused(
            server.ask("/v1/completions", completion(use_beam_search=True, n=2, **says([J]))), "beam search would lose"
        )
        both = server.ask("/v1/completions", completion(**says([J])))
        assert both.status == 200 and "Lagos" not in both.body
        for more, headers in CASES.values():
            silent = {key: value for key, value in more.items() if key != "vllm_xargs"}
            answer = server.ask("/v1/completions", {**completion(), **silent}, **headers)
            assert PLAIN not in answer.body, answer
        ids = tokens_of(server)
        for extra in ({}, {"unlearn": []}, {TAG: {"names": [], "digest": catalog().digest(())}}):
            parameters = {"temperature": 0, "max_tokens": TOKENS, "extra_args": extra}
            body = {"model": "m", "token_ids": ids, "output_mode": "text", "sampling_params": parameters}
            answer = server.ask("/inference/v1/generate", body)
            assert answer.status == (400 if TAG in extra else 200) and PLAIN not in answer.body, answer
        code, checks = checks_of(server)
        assert code == 0 and checks["a request that says nothing"][1] == "answered, under 1 masks", checks
