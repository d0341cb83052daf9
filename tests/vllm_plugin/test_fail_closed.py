"""What does not hold together is not served: the request fails, or the step raises."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import torch
import vllm
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm_engines import engine, params, prompt, runner, says, served, tiny
from vllm_oracle import C, J
from vllm_tiny import TINY, TOKENS, cases

from cu_fast import ops
from cu_fast.vllm import TAG, admission, seams
from cu_fast.vllm.catalog import Catalog, Settings, catalog_of
from cu_fast.vllm.step import POISON

pytestmark = pytest.mark.background(TINY)
IDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def llm():
    return engine()


@pytest.fixture
def used_up():
    """An engine that an error in the middle of a step may leave as it likes."""
    return engine()


@pytest.fixture(scope="module")
def made():
    return cases()


def generate(llm, names=(C,), **options):
    return llm.generate([prompt(IDS)], params(names, 4, **options), use_tqdm=False)


# -- requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "say what to unlearn"),
        ({"unlearn": None}, "say what to unlearn"),
        ({"unlearn": ["Chukwu Akabuese"]}, "no mask 'Chukwu Akabuese'$| [(]parameter"),
        ({"unlearn": "nobody"}, "this server has no mask 'nobody'"),
        ({"unlearn": [C, "nobody"]}, "this server has no mask 'nobody'"),
        ({"unlearn": [C.lower()]}, "this server has no mask"),
        ({"unlearn": [[C]]}, "this server has no mask"),
        ({"unlearn": [3]}, "this server has no mask '3'"),
        ({"unlearn": 3}, "a list of names"),
        ({"unlearn": {"a": 1}}, "a list of names"),
        ({"unlearn": [], TAG: {"names": [], "digest": "0" * 64}}, "the server's own"),
        ({"unlearn": [], TAG: None}, "the server's own"),
    ],
)
def test_a_request_that_is_refused(llm, value, message):
    with pytest.raises(VLLMValidationError, match=message):
        generate(llm, None, extra_args=value)
    assert len(generate(llm)) == 1  # the others go on


def test_a_forged_tag_with_the_right_digest_is_refused(llm):
    catalog = catalog_of(Settings.of(llm.llm_engine.vllm_config))
    with pytest.raises(VLLMValidationError, match="the server's own"):
        generate(llm, None, extra_args={"unlearn": [C], TAG: {"names": [], "digest": catalog.digest(())}})


def test_the_callers_parameters_are_left_as_they_were(llm):
    mine = params([C], 4)
    before = copy.deepcopy(mine.extra_args)
    llm.generate([prompt(IDS)], mine, use_tqdm=False)
    assert mine.extra_args == before


def test_beam_search_loses_masks_and_is_refused(llm):
    with pytest.raises(VLLMValidationError, match="say what to unlearn"):
        llm.beam_search([prompt(IDS)], BeamSearchParams(beam_width=2, max_tokens=4))


def test_pooling_is_refused(llm):
    with pytest.raises(VLLMValidationError, match="only generation knows masks"):
        admission.names_for(llm.llm_engine.vllm_config, vllm.PoolingParams())


def test_a_request_past_admission(used_up, monkeypatch):
    monkeypatch.setattr(InputProcessor, "process_inputs", getattr(InputProcessor.process_inputs, seams.ORIGINAL))
    with pytest.raises(RuntimeError, match="did not pass admission"):
        generate(used_up)


def test_a_front_end_that_read_other_masks(used_up, monkeypatch):
    behind = EngineCore.preprocess_add_request

    def changed(self, request):
        request.sampling_params.extra_args[TAG]["digest"] = "0" * 64
        return behind(self, request)

    monkeypatch.setattr(EngineCore, "preprocess_add_request", changed)
    with pytest.raises(RuntimeError, match="read different masks"):
        generate(used_up)


def test_a_worker_without_the_mask(used_up):
    mine = served(used_up)
    mine.catalog = copy.copy(mine.catalog)
    mine.catalog.masks = {J: mine.catalog.masks[J]}
    with pytest.raises(RuntimeError, match="that this process does not have"):
        generate(used_up)


def test_a_worker_with_another_mask_of_that_name(used_up):
    mine = served(used_up)
    mine.catalog = Catalog(mine.catalog.settings)  # with digests of its own
    mine.catalog.masks = {C: mine.catalog.masks[J], J: mine.catalog.masks[J]}
    with pytest.raises(RuntimeError, match="that this process does not have"):
        generate(used_up)


# -- steps ------------------------------------------------------------------------------------------------------


def test_a_runner_that_says_nothing_of_its_tokens(used_up, monkeypatch):
    original = getattr(GPUModelRunner._prepare_inputs, seams.ORIGINAL)
    monkeypatch.setattr(GPUModelRunner, "_prepare_inputs", original)
    with pytest.raises(RuntimeError, match="did not say whose tokens it computes"):
        generate(used_up, names=[])


def test_a_hook_that_was_lost(used_up):
    layer = runner(used_up).model.get_submodule("model.layers.1")
    layer._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="did not run once"):
        generate(used_up)


def test_a_hook_that_runs_twice(used_up):
    layer = runner(used_up).model.get_submodule("model.layers.1")
    (hook,) = layer._forward_hooks.values()
    layer.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="did not run once"):
        generate(used_up)


def test_tokens_that_are_split(used_up):
    (layer,) = served(used_up).layers
    with pytest.raises(RuntimeError, match="outside a forward"):
        layer(torch.zeros(4, 192), None)
    layer.served.tokens = 8
    with pytest.raises(RuntimeError, match="split or moved"):
        layer(torch.zeros(4, 192), None)
    with pytest.raises(RuntimeError, match="split or moved"):
        layer(torch.zeros(16, 96), None)
    layer(torch.zeros(8, 192), None)


@pytest.mark.parametrize("name", ["llama-replace", "llama-delta"])
def test_rows_at_rest_are_poison(made, name):
    llm = tiny(made[name].model, made[name].attachment)
    says(llm, made[name].answers[:8], 4)
    (layer,) = served(llm).layers
    rows = layer.rows.tensor
    assert (rows == POISON).all() and not layer.rows.masked and len(rows) >= 8
    splice, x = layer.layer.bottleneck, torch.randn(8, 32)
    tables = layer.layer.table.tensors
    table = ops.LatentMasks(*tables) if splice.splice == "delta" else tables[0]
    with pytest.raises(ValueError, match=f"mask_row holds {POISON}"):  # on a GPU, where nothing is read back, NaN
        splice(x, table, rows[:8])
    assert not torch.isnan(splice(x, table, torch.full_like(rows[:8], -1))).any()


# -- engines in one process -------------------------------------------------------------------------------------


def test_engines_in_one_process_do_not_meet(made):
    """Two attachments with layers of one name, and a model without any; in turns."""
    one, other = made["llama-replace"], made["llama-delta"]
    plain, first, second = tiny(one.model, None), tiny(one.model, one.attachment), tiny(other.model, other.attachment)
    for _ in range(2):
        silent = params(None, TOKENS, ignore_eos=True)
        found = plain.generate([prompt(answer.prompt) for answer in one.bare], silent, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in found] == [answer.ids for answer in one.bare]
        for llm, case in ((first, one), (second, other)):
            assert says(llm, case.answers, TOKENS, ignore_eos=True) == [answer.ids for answer in case.answers]
    with pytest.raises(VLLMValidationError, match="this server has no masks"):
        generate(plain, ["a"])
    with pytest.raises(VLLMValidationError, match="the server's own"):
        generate(plain, None, extra_args={TAG: {}})
