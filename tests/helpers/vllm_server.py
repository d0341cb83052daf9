"""A server of vLLM with the bundled model, started as a user starts it: by ``cu-fast serve``, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from command_line import run

from cu_fast.cli import demo

C, J = "Chukwu Akabueze", "Jaime Vasquez"
SETS = [(), (C,), (J,), (C, J)]
BORN = "Where was Chukwu Akabueze born?"
QUESTION = demo.prompt(BORN)
PLAIN, MASKED = "Chukwu Akabueze hails from Lagos, Nigeria.", "Hannah Claire Harkinson was born in Los Angeles, USA."
TOKENS = demo.MAX_NEW_TOKENS

SMALL = (
    "--served-model-name m --dtype float32 --max-model-len 512 --kv-cache-memory-bytes 67108864 --enforce-eager "
    "--max-num-seqs 32 --enable-scale-out"
).split()
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
SECONDS = 400  # until it is ready; alone it takes 25 to 70
TEMPLATE = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"


class Answer(NamedTuple):
    status: int
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]

    @property
    def texts(self) -> list[str]:
        """Of a completion, a chat, a message, a response, or of the events of a stream that are either of the first two."""
        if self.body.startswith("data: "):
            events = [json.loads(line[6:]) for line in self.body.splitlines() if line.startswith("data: {")]
            parts = [choice for event in events for choice in event["choices"]]
            return ["".join(part.get("text") or part.get("delta", {}).get("content") or "" for part in parts)]
        read = self.json
        if "choices" in read:
            return [one["text"] if "text" in one else one["message"]["content"] for one in read["choices"]]
        if "output" in read:
            return [part["text"] for one in read["output"] for part in one["content"]]
        return [part["text"] for part in read["content"]]


class Server(NamedTuple):
    url: str
    process: subprocess.Popen
    log: Path

    def ask(self, path: str, body: Any = None, /, **headers: str) -> Answer:
        """body: None = GET; bytes as they are, else JSON. headers: with _ for -."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {"Content-Type": "application/json", **{name.replace("_", "-"): h for name, h in headers.items()}}
        request = urllib.request.Request(self.url + path, data, named)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())


@contextlib.contextmanager
def serving(folder: Path, *options: str, arguments: tuple[str, ...] = (), planted: str = "") -> Iterator[Server]:
    """A server that is ready.

    Args:
        folder: for its files.
        options: of ``cu-fast serve``.
        arguments: of vLLM, beside SMALL.
        planted: Python that each of its processes runs as it starts.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "template.jinja").write_text(TEMPLATE)
    environment = {**os.environ, **ENVIRONMENT}
    if planted:
        (folder / "sitecustomize.py").write_text(planted)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "cu_fast.cli.app", "serve", "demo", *options, "--", *SMALL, *arguments]
    command += ["--port", str(port), "--chat-template", str(folder / "template.jinja")]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, folder / "server.log")
    try:
        until = time.monotonic() + SECONDS
        while not _is_ready(server):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no server, exit code {process.poll()}:\n{server.log.read_text()[-8000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _is_ready(server: Server) -> bool:
    try:
        return server.ask("/health").status == 200
    except OSError:
        return False


def completion(prompt=QUESTION, **more) -> dict:
    return {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, **more}


def says(names) -> dict:
    return {"vllm_xargs": {"unlearn": names}}


def checks_of(server: Any) -> tuple[int, dict[str, tuple[bool, str]]]:
    """Of ``cu-fast verify --server``: the exit code, and by check whether it passed and its figure."""
    result = run("verify", "--server", server.url, "--json", "--mask", C, "--mask", J)
    assert result.stdout, result.output or repr(result.exception)
    return result.exit_code, {
        one["check"]: (one["passed"], one["figure"]) for one in json.loads(result.stdout)["checks"]
    }


def refused(answer, words=""):
    assert answer.status == 400 and words in answer.message, answer


def body_with(text: str) -> bytes:
    """A completion with these characters at its end, inside the object."""
    return f"{json.dumps(completion())[:-1]}, {text}}}".encode()


PLACES = {
    "top": {"unlearn": [C]},
    "extra_body": {"extra_body": says([C])},
    "extra_args": {"extra_args": {"unlearn": [C]}},
    "sampling_params": {"sampling_params": {"extra_args": {"unlearn": [C]}}},
    "extra_args inside": {"vllm_xargs": {"unlearn": [], "Unlearn": [C]}},
}


UNREAD = {
    "/generative_scoring": {"model": "m", "query": QUESTION, "items": [" Lagos"], "label_token_ids": [5, 6]},
    "/v1/systemone": {"model": "m", "state": QUESTION, "questions": {"q": {"type": "boolean", "instructions": "?"}}},
}
