"""Shared fixtures: a tiny model with a bottleneck and a tokenizer, all made here; nothing is downloaded."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Scripts that tests start in processes of their own find what the tests find.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).with_name("helpers")), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CU_FAST_TRITON_TABLE"] = "shipped"  # not what was once measured on this machine

import background
import budget
import pytest
import tiers
import tiny_training
import torch

import cu_fast
from cu_fast.hf.checkpoint import save_model

OUTPUTS = pytest.StashKey[str]()
if importlib.util.find_spec("hypothesis"):  # a GPU machine may lack it
    from hypothesis import settings

    # A check of a change tries the same examples each time; new ones are looked for by `make test-all`.
    settings.register_profile("same", derandomize=True)
    settings.load_profile("default" if tiers.TEST_ALL else "same")


def pytest_addoption(parser):
    parser.addoption("--budget", help="a CSV file: what the tests of each folder may cost (helpers/budget.py)")


def pytest_configure(config):
    config.pluginmanager.register(budget.Budget(config.option.budget))
    config.addinivalue_line("markers", "background(task): a helpers/background.py Task that the test waits for")
    if background.FOLDER not in os.environ:
        os.environ[background.FOLDER] = config.stash[OUTPUTS] = tempfile.mkdtemp(prefix="cu_fast-tests-")


def pytest_unconfigure(config):
    gc.unfreeze()
    if OUTPUTS in config.stash:
        shutil.rmtree(config.stash[OUTPUTS], ignore_errors=True)
        del os.environ[background.FOLDER]


def pytest_sessionfinish(session, exitstatus):
    if session.shouldfail or session.shouldstop or exitstatus == pytest.ExitCode.INTERRUPTED:
        background.stop()


def pytest_collection_finish(session):
    gc.freeze()  # what was imported stays: without this each collection of garbage walks it all, a second at a time
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        return
    runs = (item for item in session.items if not any(mark.args[0] for mark in item.iter_markers("skipif")))
    tasks: dict[background.Task, str] = {}
    for item in runs:
        for mark in item.iter_markers("background"):
            tasks.setdefault(mark.args[0], item.nodeid.split("::")[0])
    background.start(tasks)


@pytest.fixture
def tokenizer():
    return tiny_training.word_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_training.tiny_llama(tokenizer)


@pytest.fixture
def attachment(model):
    config = cu_fast.BottleneckConfig(d_model=32, code_dim=32, num_codes=300, k=4, activation="none")
    attached = cu_fast.attach(model, {"model.layers.1": config})
    torch.manual_seed(1)
    (bottleneck,) = attached.bottlenecks.values()
    with torch.no_grad():
        bottleneck.codebook.codes.copy_(torch.randn(300, 32))
    return attached


@pytest.fixture
def folder(attachment, tokenizer, tmp_path):
    """A model folder with one mask, 'even codes / ü'."""
    (bottleneck,) = attachment.bottlenecks.values()
    mask = cu_fast.Mask.from_ids(
        range(0, 300, 2), num_codes=300, codebook_sha256=bottleneck.codebook_sha256(), topic="even codes / ü"
    )
    attachment.add_mask(mask)
    save_model(attachment, tokenizer, tmp_path / "model")
    return tmp_path / "model"
