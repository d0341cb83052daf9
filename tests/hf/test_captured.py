"""``attachment.capture``: a forward in a graph, replayed under whatever masks hold. Graphs here are ``recorded``: no GPU.

The protocol is the one of a GPU; that CUDA graphs hold it was not run.
"""

from __future__ import annotations

import threading

import pytest
import recorded
import torch
import transformers
from tiny_models import inputs
from tiny_saes import mask_of
from tiny_splices import KINDS, LAYERS, with_autoencoder, with_codebooks

from cu_fast.hf import StaleCacheError, capture
from cu_fast.hf.request import POISON
from cu_fast.masks import tables

TOPICS = ("a", None, ["b", "a"], {"a", "b"}, [None, "b"], "a")


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    recorded.graphs(monkeypatch)


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture(params=[kind for kind in KINDS if kind != "top-k-autoencoder"])  # which looks at values on a CPU
def attachment(request, given):
    return KINDS[request.param](given)


def captured_logits(attachment, given):
    return attachment.capture(lambda: attachment.model(**given, use_cache=False).logits, batch=2)


def logits(attachment, given):
    with torch.no_grad():
        return attachment.model(**given, use_cache=False).logits


def test_a_replay_deletes_what_holds_then(attachment, given):
    captured = captured_logits(attachment, given)
    seen = []
    for topics in TOPICS:
        with attachment.unlearn(topics):
            seen.append(captured.replay().clone())
            assert torch.equal(seen[-1], logits(attachment, given))
    assert torch.equal(seen[0], seen[-1]) and all(not torch.equal(seen[0], other) for other in seen[1:-1])
    given["input_ids"].fill_(7)  # the tensors that were captured are read anew
    with attachment.unlearn("a"):
        assert torch.equal(captured.replay(), logits(attachment, given))


def test_a_replay_that_was_not_armed_is_nan(attachment, given):
    captured = captured_logits(attachment, given)
    assert (captured._request.buffer == POISON).all()
    with attachment.unlearn("a"):
        captured.replay()
        assert (captured._request.buffer == POISON).all(), "the graph ends so"
        for _ in range(2):
            captured._replay()
            assert captured.output.isnan().all()
        assert torch.equal(captured.replay(), logits(attachment, given)), "it may be armed again"


def test_a_replay_that_fails_leaves_nothing_armed(attachment, given):
    captured = captured_logits(attachment, given)

    def fail():
        assert (captured._request.buffer >= 0).all()
        raise KeyboardInterrupt

    captured._replay = fail
    with attachment.unlearn("a"), pytest.raises(KeyboardInterrupt):
        captured.replay()
    assert (captured._request.buffer == POISON).all()


def test_what_is_counted(attachment, given):
    captured, reports = captured_logits(attachment, given), []
    for run in (lambda: logits(attachment, given), captured.replay):
        attachment.reset_report()
        for topics in (None, "a", ["a", None]):
            with attachment.unlearn(topics):
                run()
        reports.append(attachment.report())
    for row, other in zip(*reports, strict=True):
        assert row["hits"] > 0 and row == {**other, **{k: pytest.approx(v) for k, v in other.items() if "dose" in k}}


def test_nothing_was_said(attachment, given):
    captured = captured_logits(attachment, given)
    with pytest.raises(RuntimeError, match="nothing was said here"):
        captured.replay()
    with attachment.unlearn("a"):
        pass
    attachment.always = {"a"}
    for splice in attachment.bottlenecks.values():
        splice.reset_receipt()
    with attachment.unlearn(None):
        assert torch.equal(captured.replay(), logits(attachment, given)), "what always holds"


def test_what_a_replay_refuses(attachment, given):
    captured = captured_logits(attachment, given)
    splice = next(iter(attachment.bottlenecks.values()))
    with attachment.unlearn(["a"]), pytest.raises(ValueError, match="1 entries, and 2 sequences were captured"):
        captured.replay()
    with attachment.unlearn("a", gated=True), pytest.raises(RuntimeError, match="gated=True needs the model itself"):
        captured.replay()
    with attachment.unlearn("a"):
        with attachment.observe(lambda x, splice: None), pytest.raises(RuntimeError, match="a replay calls nothing"):
            captured.replay()
        splice.training = True
        with pytest.raises(RuntimeError, match="in training mode"):
            captured.replay()
        splice.training = False
        splice.impl = "reference"
        with pytest.raises(RuntimeError, match="capture again"):
            captured.replay()
        splice.impl = "auto"
        captured.replay()
    attachment.detach()
    with pytest.raises(RuntimeError, match="detached"):
        captured.replay()


def test_codes_that_changed(given):
    attachment = with_codebooks(given)
    captured = captured_logits(attachment, given)
    codes = attachment.bottlenecks[LAYERS[0]].codebook.codes
    with attachment.unlearn("a"), torch.no_grad():
        codes[0, 0] += 1
        with pytest.raises(RuntimeError, match=r"codebook of layer .* changed"):
            captured.replay()
        codes[0, 0] -= 1
        attachment.bottlenecks[LAYERS[0]].fold()
        with pytest.raises(RuntimeError, match="capture again"):  # the graph reads what was folded before
            captured.replay()


@pytest.mark.parametrize("what", ["rows", "latents"])
def test_a_table_that_has_grown(given, what):
    """The graph reads the old one, in which later masks never arrive."""
    attachment = with_codebooks(given) if what == "rows" else with_autoencoder(given)
    captured = captured_logits(attachment, given)
    if what == "rows":
        for layer in attachment._layers:
            layer.table.write(64, tuple(torch.zeros_like(tensor[0]) for tensor in layer.table.tensors))
    else:
        splice = attachment.bottlenecks[LAYERS[1]]
        attachment.add_mask(mask_of(splice.sae, range(40), "many"))
    with attachment.unlearn("a" if what == "rows" else "many"), pytest.raises(RuntimeError, match="capture again"):
        captured.replay()
    again = captured_logits(attachment, given)
    with attachment.unlearn("a"):
        assert torch.equal(again.replay(), logits(attachment, given))


def test_masks_that_are_added_later(attachment, given):
    captured = captured_logits(attachment, given)
    for name in "ab":
        masks = attachment.masks[name]
        attachment.remove_mask(name)
        attachment.add_mask(masks, f"{name}2")
    with attachment.unlearn(["b2", "a2"]):
        assert torch.equal(captured.replay(), logits(attachment, given))


def test_what_capture_refuses(given, monkeypatch):
    attachment = with_codebooks(given)
    with pytest.raises(RuntimeError, match="ran no swapped layer"):
        attachment.capture(lambda: None, batch=2)
    with pytest.raises(ValueError, match="the batch holds 2 sequences"):
        attachment.capture(lambda: attachment.model(**given), batch=3)
    attachment.model.config.num_hidden_layers = 1
    with pytest.raises(RuntimeError, match="did not run"):
        captured_logits(attachment, given)
    attachment.model.config.num_hidden_layers = 3
    attachment.model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        captured_logits(attachment, given)
    attachment.model.eval()
    compiled = torch.compile(attachment.model, backend="eager")
    with pytest.raises(RuntimeError, match="give it the model in eager mode"):
        attachment.capture(lambda: compiled(**given, use_cache=False), batch=2)
    captured = captured_logits(attachment, given)
    with pytest.raises(RuntimeError, match="cannot be part of another one"):
        attachment.capture(captured.replay, batch=2)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="are on cpu; a CUDA graph needs them on one CUDA device"):
        captured_logits(attachment, given)


def test_another_capture_is_refused(given, monkeypatch):
    """Whoever makes it: a forward that is captured as it is would keep the masks of then."""
    from cu_fast.hf import forwards

    attachment = with_codebooks(given)
    monkeypatch.setattr(forwards, "capturing", lambda device: True)
    for topics in ("a", None):
        with attachment.unlearn(topics), pytest.raises(RuntimeError, match=r"attachment\.capture\(\)"):
            logits(attachment, given)


def decode_step(attachment, given):
    """A prompt's cache, the token that follows, and the captured step, which has seen neither."""
    model, token = attachment.model, torch.tensor([[5], [6]])
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)

    def prefill():
        cache.reset()
        with torch.no_grad():
            model(**given, past_key_values=cache, use_cache=True)

    with attachment.unlearn(None):
        prefill()
    captured = attachment.capture(lambda: model(input_ids=token, past_key_values=cache, use_cache=True).logits, batch=2)
    return cache, token, prefill, captured


def test_a_cache_is_continued_under_its_masks(attachment, given):
    cache, token, prefill, captured = decode_step(attachment, given)
    for topics, other in (("a", "b"), (["b", "a"], None), (None, "a")):
        with attachment.unlearn(topics):
            prefill()
            got = [captured.replay().clone() for _ in range(2)]
            prefill()
            with torch.no_grad():
                for one in got:
                    want = attachment.model(input_ids=token, past_key_values=cache, use_cache=True).logits
                    assert torch.equal(one, want)
        with attachment.unlearn(other), pytest.raises(StaleCacheError):
            captured.replay()


def test_a_cache_that_a_replay_began(attachment, given):
    """What a replay computed carries its stamp: a forward under other masks does not continue it."""
    cache, token, _, captured = decode_step(attachment, given)
    cache.reset()
    with attachment.unlearn("a"):
        captured.replay()
    for topics in (None, "b"):
        with attachment.unlearn(topics), pytest.raises(StaleCacheError), torch.no_grad():
            attachment.model(input_ids=token, past_key_values=cache, use_cache=True)
        with attachment.unlearn(topics), pytest.raises(StaleCacheError):
            captured.replay()
    with attachment.unlearn("a"), torch.no_grad():
        attachment.model(input_ids=token, past_key_values=cache, use_cache=True)


def test_threads_replay_in_turns(attachment, given):
    captured, wanted, wrong = captured_logits(attachment, given), {}, []
    for name in ("a", "b", None):
        with attachment.unlearn(name):
            wanted[name] = logits(attachment, given)
    inside = captured._replay

    def replay():
        """What the thread's replay left, before another one writes over it."""
        inside()
        seen.output = captured.output.clone()

    captured._replay, seen = replay, threading.local()

    def serve(name):
        for _ in range(20):
            with attachment.unlearn(name):
                captured.replay()
            if not torch.equal(seen.output, wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in (*wanted, *wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Stream:
    """Stands for a device's stream: a clock that ticks with what is queued, and what it waits for."""

    def __init__(self, name, log):
        self.name, self.log, self.time = name, log, 0

    def record_event(self):
        self.time += 1
        self.log.append(f"event {self.name}{self.time}")
        return f"{self.name}{self.time}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_a_replay_on_another_stream_waits_for_the_last_one(attachment, given, monkeypatch):
    """Else it would fill the buffer while kernels of the first still read it."""
    captured, log = captured_logits(attachment, given), []
    streams = {name: Stream(name, log) for name in "AB"}
    present = ["A"]
    from cu_fast.hf import request

    for module in (tables, request, capture):
        monkeypatch.setattr(module, "stream_of", lambda device: streams[present[0]])
    replay = captured._replay
    captured._replay = lambda: (log.append(f"replay on {present[0]}"), replay())
    with attachment.unlearn("a"):
        captured.replay()
    last = log[-1].removeprefix("event ")
    assert log[-2] == "replay on A" and last.startswith("A")
    present[0] = "B"
    log.clear()
    with attachment.unlearn("b"):
        captured.replay()
    # Row 0, which A's kernels read, is written for b, and the buffer filled, after A has come past them.
    assert f"B waits for {last}" in log[: log.index("replay on B")]
    written = next(i for i, line in enumerate(log) if line.startswith("B waits for A"))
    assert written < log.index("replay on B")
