"""A server starts only where every layer is found and no setting lets a token run without its masks."""

from __future__ import annotations

import ast
import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import vllm
from tiny_models import attach_to, build
from tiny_saes import make_sae
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor import model_loader
from vllm.v1.engine.input_processor import InputProcessor
from vllm_engines import engine, says, tiny
from vllm_oracle import BUNDLE, C
from vllm_tiny import CONFIGS, TINY, cases

import cu_fast
import cu_fast.vllm
from cu_fast.vllm import LOAD_FORMAT, admission, refusals, seams
from cu_fast.vllm.catalog import Settings, catalog_of

pytestmark = pytest.mark.background(TINY)


@pytest.fixture(scope="module")
def llm():
    return engine()


@pytest.fixture(scope="module")
def made():
    return cases()


@pytest.mark.parametrize(
    ("layer", "source", "message"),
    [
        ("model.layers.1.mlp.up_proj", make_sae(d_in=48), r"no module 'model.layers.1.mlp.up_proj'; .*gate_up_proj"),
        ("model.layers.1.self_attn.q_proj", make_sae(d_in=128), r"no module 'model.layers.1.self_attn.q_proj'"),
        ("model.layers.1.mlp:in", make_sae(), "what leaves a module"),
        ("model.layers.1:in -> model.layers.1", make_sae(), "what leaves a module"),
    ],
)
def test_a_place_that_vllm_does_not_have(made, tmp_path, layer, source, message):
    cu_fast.attach(build("llama", **CONFIGS["llama"]), {layer: source}).save(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        tiny(made["llama-delta"].model, tmp_path / "a")


def test_a_module_that_returns_no_hidden_state(made, tmp_path):
    """o_proj returns a pair too, of which the second is a bias."""
    cu_fast.attach(build("llama", **CONFIGS["llama"]), {"model.layers.1.self_attn.o_proj": make_sae()}).save(
        tmp_path / "a"
    )
    llm = tiny(made["llama-delta"].model, tmp_path / "a")
    with pytest.raises(RuntimeError, match="a tensor is understood"):
        says(llm, made["llama-delta"].answers[:1], 2)


def test_an_attachment_of_another_model(made):
    with pytest.raises(ValueError, match=r"'gpt2'.*'llama'"):
        tiny(made["llama-delta"].model, made["gpt2-delta"].attachment)


def test_no_attachment(made, tmp_path):
    with pytest.raises(FileNotFoundError):
        tiny(made["llama-delta"].model, tmp_path / "none")


def test_a_splice_of_another_width(made, tmp_path):
    model = build("llama", **CONFIGS["llama"], hidden_size=64)
    attach_to(model, "model.layers.1", d_model=64).save(tmp_path / "a")
    with pytest.raises(ValueError, match="splice of width 64; the model's hidden state has 32"):
        tiny(made["llama-delta"].model, tmp_path / "a")


class Changed:
    """A config in which some values are others."""

    def __init__(self, config, **values):
        assert all(hasattr(config, name) for name in values)
        self.__dict__.update(values, _config=config)

    def __getattr__(self, name):
        return getattr(self._config, name)


GATED = SimpleNamespace(gates={C: 1.0})
REFUSED = [
    ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
    ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
    ("parallel_config", "use_ubatching", True, "micro-batching"),
    ("parallel_config", "enable_hc_sp", True, "sequence parallelism"),
    ("parallel_config", "use_sequence_parallel_moe", True, "sequence parallelism"),
    ("parallel_config", "enable_elastic_ep", True, "elastic expert parallelism"),
    (None, "kv_transfer_config", object(), "a KV connector"),
    (None, "ec_transfer_config", object(), "an encoder-cache connector"),
    ("cache_config", "kv_offloading_size", 1.0, "KV offloading"),
    ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
    ("model_config", "enable_sleep_mode", True, "sleep mode"),
    (None, "weight_transfer_config", object(), "weight transfer"),
    ("model_config", "is_encoder_decoder", True, "an encoder-decoder model"),
    ("model_config", "runner_type", "pooling", "a pooling model"),
    ("model_config", "is_diffusion", True, "a diffusion model"),
    ("model_config", "enable_prompt_embeds", True, "prompt embeddings"),
    ("model_config", "enable_trace_replay", True, "trace replay"),
    (None, "speculative_config", SimpleNamespace(enable_adaptive_verification=True), "adaptive verification"),
    ("scheduler_config", "enable_chunked_prefill", True, "where_it_fires with chunked prefill"),
    ("scheduler_config", "long_prefill_token_threshold", 8, "where_it_fires with long_prefill_token_threshold"),
    ("compilation_config", "mode", CompilationMode.STOCK_TORCH_COMPILE, "STOCK_TORCH_COMPILE"),
    ("compilation_config", "cudagraph_mode", CUDAGraphMode.FULL, "CUDA graphs of whole forwards"),
    ("compilation_config", "cudagraph_mode", CUDAGraphMode.FULL_DECODE_ONLY, "CUDA graphs of whole forwards"),
    ("compilation_config", "cudagraph_mode", CUDAGraphMode.PIECEWISE, "breakable CUDA graphs"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name", "value", "reason"), REFUSED)
def test_a_setting_that_is_refused(llm, monkeypatch, part, name, value, reason):
    config, catalog = llm.llm_engine.vllm_config, catalog_of(Settings.of(llm.llm_engine.vllm_config))
    assert refusals.refusals(config, catalog) == []
    if reason.startswith("where_it_fires"):
        catalog, whole = GATED, Changed(config.scheduler_config, enable_chunked_prefill=False)
        config = Changed(config, scheduler_config=whole)
    if reason.startswith("breakable"):
        breakable = "vllm.compilation.breakable_cudagraph.is_breakable_cudagraph_enabled"
        monkeypatch.setattr(breakable, lambda: True)
    changed = {name: value} if part is None else {part: Changed(getattr(config, part), **{name: value})}
    (found,) = refusals.refusals(Changed(config, **changed), catalog)
    assert reason in found


def test_every_refusal_is_tested():
    """Read from the source: the keys of the two dictionaries."""
    tree = ast.parse(Path(refusals.__file__).read_text())
    reasons = [
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    ]
    tested = {reason for *_, reason in REFUSED}
    assert len(reasons) == len(tested) == 22
    assert all(sum(short in reason for short in tested) == 1 for reason in reasons)


def test_what_is_not_refused(llm):
    config, catalog = llm.llm_engine.vllm_config, catalog_of(Settings.of(llm.llm_engine.vllm_config))
    for mode in (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE):
        changed = Changed(config, compilation_config=Changed(config.compilation_config, cudagraph_mode=mode))
        assert refusals.refusals(changed, catalog) == []


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"where_it_fires": {C: 1.0}}, {"enable_chunked_prefill": True}, "where_it_fires with chunked prefill"),
        ({}, {"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"alway": [C]}, {}, "'alway'; .*always"),
        ({"always": ["nobody"]}, {}, "no such mask"),
        ({"silent": "always"}, {}, "always is empty"),
        ({"silent": "none", "always": [C]}, {}, "silent is 'none'"),
        ({"silent": "perhaps"}, {}, "silent is 'perhaps'"),
        ({"weights": "cu_fast"}, {}, "weights is 'cu_fast'"),
    ],
)
def test_a_start_that_is_refused(settings, options, message):
    with pytest.raises(ValueError, match=message):
        engine(settings=settings, **options)


def test_a_draft_is_left_as_it_is(llm, monkeypatch):
    config = llm.llm_engine.vllm_config
    model, loader = config.model_config, model_loader.get_model_loader(config.load_config)
    monkeypatch.setattr(loader, "inner", SimpleNamespace(load_model=lambda **given: "bare"))
    for draft, prefix in ((Changed(model, runner_type="draft"), ""), (copy.copy(model), ""), (model, "draft")):
        assert loader.load_model(config, draft, prefix) == "bare"
    with pytest.raises(AttributeError, match="parameters"):  # on the way to splices
        loader.load_model(config, model)


WITHOUT = f"""
import os
from vllm import LLM, envs, plugins
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known
try:
    LLM(model={str(BUNDLE)!r}, dtype="float32", max_model_len=64, kv_cache_memory_bytes=2**23, enforce_eager=True,
        load_format="cu_fast")
except Exception as error:
    print("error:", error)
print("cu_fast" in known)
del os.environ["VLLM_PLUGINS"]
plugins.plugins_loaded = False
plugins.load_general_plugins()
print("cu_fast" in known)
"""


def test_a_server_in_which_the_plug_in_is_not_loaded():
    """And vLLM finds it by its entry point, where nothing keeps it away."""
    environment = os.environ | {"VLLM_PLUGINS": "another_one"}
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=True
    ).stdout
    lines = out.splitlines()[-3:]
    assert "error:" in lines[0] and "`cu_fast` is not supported" in lines[0]
    assert lines[1:] == ["False", "True"]


# -- registering ------------------------------------------------------------------------------------------------


class Moved:
    def stays(self, a):
        return a


@pytest.fixture
def unregistered(monkeypatch):
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER))
    del model_loader._LOAD_FORMAT_TO_MODEL_LOADER[LOAD_FORMAT]
    return model_loader._LOAD_FORMAT_TO_MODEL_LOADER


@pytest.mark.parametrize(
    ("module", "owner", "name", "parameters", "message"),
    [
        ("vllm.no_such_module", "Moved", "stays", (), "no_such_module"),
        (__name__, "Elsewhere", "stays", (), "Elsewhere"),
        (__name__, "Moved", "renamed", (), "renamed"),
        (__name__, "Moved", "stays", ("a", "b"), "Moved.stays has no parameter 'b'"),
    ],
)
def test_something_of_vllm_that_moved(unregistered, monkeypatch, caplog, module, owner, name, parameters, message):
    def make(original):
        return lambda self, a: -original(self, a)

    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    first = seams.Wrap(__name__, "Moved", "stays", ("a",), make)
    monkeypatch.setattr(admission, "WRAPS", [first, seams.Wrap(module, owner, name, parameters, make)])
    with caplog.at_level(logging.ERROR, "vllm.cu_fast"):
        cu_fast.vllm.register()
    assert LOAD_FORMAT not in unregistered and Moved().stays(1) == 1
    assert message in caplog.text and "stays unknown" in caplog.text


def test_registering_twice_is_once(unregistered):
    cu_fast.vllm.register()
    process, loader = InputProcessor.process_inputs, unregistered[LOAD_FORMAT]
    cu_fast.vllm.register()
    assert InputProcessor.process_inputs is process and unregistered[LOAD_FORMAT] is loader
    assert not hasattr(getattr(process, seams.ORIGINAL), seams.ORIGINAL)


def test_another_version_of_vllm_is_named(monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", "0.320.1")
    with caplog.at_level(logging.WARNING, "vllm.cu_fast"):
        cu_fast.vllm.register()
    assert "this is 0.320.1" in caplog.text
