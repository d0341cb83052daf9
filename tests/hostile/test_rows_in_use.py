"""Rows of the mask tables are written again only once nothing reads them: holders, forwards in flight, device streams."""

from __future__ import annotations

import contextvars
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import C, add_masks, attach_to, build, inputs, logits, under
from tiny_saes import make_sae, mask_of

from cu_fast import attach
from cu_fast.masks import Gate, MaskTable, tables
from cu_fast.sae import SAESplice
from cu_fast.vllm.gating import fires

LAYER = "model.layers.1"


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture
def attachment(given):
    attached = attach_to(build("llama"), LAYER)
    add_masks(attached, given)
    return attached


def row_of(attachment, topics):
    with attachment.unlearn(topics):
        return attachment._active.request.get().rows[0]


def test_a_context_is_left_while_a_forward_reads_its_row(attachment, given):
    """Between the look-up and the kernel; another request would write its own mask there."""
    model, bottleneck = attachment.model, attachment.bottlenecks[LAYER]
    inside, goes_on, entered, forward = threading.Event(), threading.Event(), [], bottleneck.forward
    model.model.layers[2].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    under(attachment, "a", given)

    def slow(*arguments):
        inside.set()
        goes_on.wait(20)
        return forward(*arguments)

    with ThreadPoolExecutor(1) as pool:
        with attachment.unlearn("a"):
            row, context = attachment._active.request.get().rows[0], contextvars.copy_context()
            bottleneck.forward = slow
            future = pool.submit(context.run, logits, model, given)
            assert inside.wait(20)
        del bottleneck.forward
        assert row_of(attachment, "b") != row
        goes_on.set()
        with pytest.raises(RuntimeError, match="was left"):
            future.result()
        assert torch.equal(entered[0], entered[1]), "the forward that was under way kept its mask"
        pool.submit(under, attachment, None, given).result()  # the thread has gone on to something else
    assert row_of(attachment, "b") in (0, 1) and len(attachment._topics._rows) == 1


def test_a_row_is_given_back_when_its_last_holder_is_gone(attachment, given):
    topics = attachment._topics
    with attachment.unlearn("a"):
        logits(attachment.model, given)
        copied = contextvars.copy_context()
    assert row_of(attachment, "b") == 0, "a context that was left holds no row, whoever still has a copy of it"
    del copied
    request = topics.request("a")
    hold = request.hold
    request.close()
    assert row_of(attachment, "b") == 1
    del hold
    assert row_of(attachment, "b") == 0
    for _ in range(100):
        attachment.unlearn({"a", "b"}).__enter__()  # never left: Python drops it
        attachment._active.request.set(None)
    assert len(topics._rows) <= 2 and len(attachment._layers[0].table.table) == 64


def test_rows_of_masks_that_fired_together_are_given_back():
    """Each prompt of a block may fire other gates: their unions hold rows for a forward, not as long as the block."""
    sae = make_sae()
    attachment = attach(build("llama"), {LAYER: sae})
    for latent in range(6):
        gate = Gate(torch.tensor([latent], dtype=torch.int32), torch.ones(1), 0.0, 0.75)
        attachment.add_mask(mask_of(sae, [latent, latent + 6], f"mask {latent}").with_gate(gate))
    seen, generator = set(), torch.Generator().manual_seed(0)
    with torch.no_grad(), attachment.unlearn(set(attachment.masks), gated=True):
        for _ in range(60):
            attachment.model(torch.randint(1, 60, (1, 9), generator=generator))
            rows = attachment._topics._rows
            seen |= set(rows)
            assert len(rows) <= 3, "of the block, of this forward, of the one before"
    assert len(seen) > 10


@pytest.mark.parametrize("level", [0.5, None])
def test_a_prompt_that_is_judged_leaves_nothing_behind(level):
    """vLLM's judge, many times: what a splice keeps of a gate's latents is kept once."""
    sae, x = make_sae(), torch.randn(7, 32)
    gate = Gate(torch.arange(4, dtype=torch.int32), torch.ones(4), 0.0, 0.5)
    mask, splice = mask_of(sae, range(5), "a").with_gate(gate), SAESplice(sae)
    for _ in range(50):
        fires(splice, mask, level, x)
    assert len(splice._judged) == 1
    del mask, gate
    gc.collect()
    assert len(splice._judged) == 0


class Stream:
    """Stands for a device's stream, and writes down what waits for what."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(f"event on {self.name}")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch):
    """Two streams; ``here`` is the present one of this thread."""
    log = []
    made = {name: Stream(name, log) for name in ("A", "B")}
    present = threading.local()

    def here(name):
        present.stream = made[name]

    here("A")
    from cu_fast.hf import request as hf_request

    for module in (tables, hf_request):
        monkeypatch.setattr(module, "stream_of", lambda device: present.stream)
    return here, log


def test_a_row_is_written_after_every_stream_that_read_it(attachment, given, streams):
    here, log = streams
    under(attachment, "a", given)
    here("B")
    log.clear()
    under(attachment, "b", given)  # takes the row that kernels queued on A still read
    assert log[:2] == ["event on A", "B waits for A"]


def test_a_row_is_read_after_it_was_written(attachment, given, streams):
    here, log = streams
    with attachment.unlearn("a"):
        here("B")
        log.clear()
        logits(attachment.model, given)
        assert log == ["B waits for A"]
        log.clear()
        here("A")
        logits(attachment.model, given)
        assert log == []
    here("B")
    log.clear()
    under(attachment, "b", given)
    assert {"event on A", "event on B"} <= set(log[:2]) and {"B waits for A", "B waits for B"} == set(log[2:4])


def test_a_table_that_grows_keeps_the_old_one_for_its_readers(streams):
    table = MaskTable(C, "cpu", rows=2)
    table.write(1, (torch.full(((C + 31) // 32,), 7, dtype=torch.int32),))
    old = table.table
    table.write(5, (torch.ones((C + 31) // 32, dtype=torch.int32),))
    assert table.table.shape[0] == 8 and torch.equal(table.table[1], old[1])
    assert any(kept is old for (kept,) in table._outgrown)
