"""Texts as windows, and the rows of a layer: streamed, bounded, in an order that is a function of the seed."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tracemalloc
import types
from collections import Counter

import pytest
import torch
from tiny_fit import sentences
from tiny_models import FAMILIES, VOCABULARY, D, build

from cu_fast.train.states import HOLD_EVERY, NORMS, OUTLIER, ROWS, Reader, Source, States, default_layer
from cu_fast.train.texts import BLOCK, Texts, windows

# -- texts -----------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_windows(tokenizer, tmp_path, monkeypatch):
    texts = sentences(5)
    (tmp_path / "a.jsonl").write_text("\n\n".join([json.dumps({"text": t, "id": 1}) for t in texts[:3]]) + "\n")
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("\n".join(json.dumps(t) for t in texts[3:]))
    wanted = list(windows(Texts(texts), tokenizer, 6))
    assert list(windows(Texts(tmp_path / "a.jsonl"), tokenizer, 6)) == wanted
    for window in wanted:
        assert 1 < len(window) <= 6
    ids = [tokenizer(t)["input_ids"] for t in texts]
    assert sum(map(len, wanted)) == sum(len(i) - (len(i) % 6 == 1) for i in ids)  # one token alone gives no row

    class Rows(list):
        column_names = ("id", "text")

    rows = Rows({"text": t} for t in texts)
    fake = types.SimpleNamespace(load_from_disk=lambda path: rows, load_dataset=lambda *given, **named: rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert list(windows(Texts(tmp_path / "a.parquet"), tokenizer, 6)) == wanted
    assert list(windows(Texts(tmp_path), tokenizer, 6)) == wanted
    rows.column_names = ("question",)
    with pytest.raises(ValueError, match="columns question; one should be 'text'"):
        Texts(tmp_path)
    fake.load_from_disk = lambda path: {"train": rows, "test": rows}
    with pytest.raises(ValueError, match="splits train, test; give the folder of one"):
        Texts(tmp_path)


def test_without_the_datasets_library_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(RuntimeError, match=r"pip install datasets, or give a text file or a \.jsonl file"):
            Texts(source)


def test_a_text_file_is_one_running_text(tokenizer, tmp_path):
    """Windows go on over lines and over the blocks that are read; every one but the last is full."""
    text = "\n\n".join(sentences(4000))
    assert len(text) > 2 * BLOCK
    (tmp_path / "book").write_text(text)
    found = list(windows(Texts(tmp_path / "book"), tokenizer, 7))
    assert {len(window) for window in found[:-1]} == {7}
    whole = tokenizer(text)["input_ids"]
    assert [i for window in found for i in window] == whole[: sum(map(len, found))] and len(whole) - 7 < 7 * len(found)


def test_windows_start_with_what_the_tokenizer_puts_before_a_text(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    found = list(windows(Texts(["the a red blue green"]), tokenizer, 4))
    assert found == [[2, 3, 4, 5], [2, 6, 7]]


def test_a_file_is_not_held_whole(tokenizer, tmp_path):
    line = " ".join(sentences(20)) + "\n"
    with (tmp_path / "book").open("w") as stream:
        for _ in range(10_000):
            stream.write(line)
    size = (tmp_path / "book").stat().st_size
    with (tmp_path / "lines.jsonl").open("w") as stream:
        for _ in range(10_000):
            stream.write(json.dumps(line) + "\n")
    for name in ("book", "lines.jsonl"):
        tracemalloc.start()
        read = sum(map(len, Texts(tmp_path / name)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == size and peak < size / 10, (name, peak, size)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'"a"\n\n{"a": 1}\n', "line 3 is"), (b'"a"\n[', "line 2 is not valid JSON"), (b"\xff\xff", "should be UTF-8")],
)
def test_damaged_lines_are_named(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(Texts(tmp_path / "a.jsonl"))


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data is .*none\.txt, which does not exist"):
        Texts(tmp_path / "none.txt")
    with pytest.raises(TypeError, match="data is a generator; it should be a path, or a list"):
        Texts(text for text in "ab")
    with pytest.raises(TypeError, match="data, text 2 is 3; it should be a string"):
        list(Texts(["a", 3]))


# -- rows of a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5_decoder"])
def test_rows_are_the_layers_output_without_first_positions_and_padding(family):
    """Against the layer's output in a forward pass of each window alone; the layers above do not run."""
    model, layer = build(family).train(), FAMILIES[family].layer
    generator = torch.Generator().manual_seed(1)
    some = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 4, 2)]
    above, seen = [], []
    model.get_submodule(FAMILIES[family].next).register_forward_hook(lambda *_: above.append(1))
    rows = Reader(model, layer, 0)(some)
    assert not above and model.training and rows.dtype == torch.bfloat16 and rows.shape == (8 + 3 + 1, D)
    assert not rows.requires_grad

    model.eval()

    def keep(module, given, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    handle = model.get_submodule(layer).register_forward_hook(keep)
    reader = model.get_encoder() if family.startswith("t5") else model
    with torch.no_grad():
        for window in some:
            reader(input_ids=torch.tensor([window]))
    handle.remove()
    wanted = torch.cat([out[0, 1:] for out in seen])
    # bf16 keeps 8 bits; padding changes the order in which a product adds.
    torch.testing.assert_close(rows.float(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


def test_the_default_layer_is_at_a_quarter_of_the_depth():
    assert default_layer(build("llama")) == "model.layers.1"
    assert default_layer(build("gpt2")) == "transformer.h.1"
    assert default_layer(build("t5_encoder")) == "encoder.block.1"
    model = build("llama")
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity()] * 30)
    model.config.num_hidden_layers = 30
    assert default_layer(model) == "model.layers.8"


def test_layers_that_give_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"no layer 'model.layer.1'; near names: .*model\.layers\.1"):
        Reader(build("llama"), "model.layer.1", 0)
    with pytest.raises(ValueError, match=r"'decoder.block.1', which gives no row per token.*'encoder.block.1'"):
        Reader(build("t5_decoder"), "decoder.block.1", 0)


# -- the buffer ------------------------------------------------------------------------------------------------------


class Counting:
    """A reader whose rows say which tokens they are of: (id, id before, 1, 0, ...)."""

    width = 8

    def __init__(self, change=lambda rows: rows):
        self.seen, self.change = Counter(), change

    def __call__(self, some):
        self.seen.update(tuple(window) for window in some)
        rows = torch.zeros(sum(len(w) - 1 for w in some), self.width)
        rows[:, 0] = torch.tensor([i for w in some for i in w[1:]])
        rows[:, 1] = torch.tensor([i for w in some for i in w[:-1]])
        rows[:, 2] = 8
        return self.change(rows).bfloat16()


def numbered(n, length=5):
    """A source of n windows that differ: their tokens are numbers below 256, which bf16 holds."""

    made = [[(7 * i + 3 * j + i // 9) % 256 for j in range(length)] for i in range(n)]
    source = Source(Texts([""]), None, length, 4, None)
    source.windows = lambda: iter(made)
    return source, made


def states(folder, source, reader, *, rows=10**6, batch=16, epochs=1.0, seed=0, mark="m"):
    plan = source.plan(rows)
    folder.mkdir(exist_ok=True)
    return States(plan, source, reader, folder, mark, batch, epochs, seed, 0, 1)


def read(made):
    return torch.cat([made.__getitems__(list(range(p, p + 16))) for p in range(0, len(made), 16)])


def of(some):
    return Counter((b, a) for window in some for a, b in itertools.pairwise(window))


def counted(rows):
    return Counter((int(a), int(b)) for a, b in rows[:, :2].tolist())


@pytest.mark.parametrize("rows", [10**6, 150])
def test_every_row_is_read_as_often_as_epochs_say_and_the_model_runs_once(tmp_path, rows):
    """In one round, and in several, of what the file holds: files stay within the size that was given."""
    source, every = numbered(160)
    reader = Counting()
    made = states(tmp_path / "a", source, reader, rows=rows, epochs=2.0)
    assert (len(made.plan.rounds) > 3) == (rows == 150)
    held, trained = every[::HOLD_EVERY], [w for i, w in enumerate(every) if i % HOLD_EVERY]
    assert made.plan.held == 4 * len(held) and made.plan.rows == 4 * len(trained) and made.plan.tokens == 800
    assert counted(made.held_out()) == of(held)
    found = counted(read(made))
    wanted = of(trained)
    assert sum(found.values()) == made.steps * 16 == sum(wanted.values()) * 2
    assert set(found) == set(wanted)
    if rows == 10**6:
        assert found == Counter({key: 2 * value for key, value in wanted.items()})
    assert reader.seen == Counter(map(tuple, every))
    size = sum((tmp_path / "a" / name).stat().st_size for name in (ROWS, NORMS))
    assert size <= rows * (2 * 8 + 4) and size < 10**6


def test_the_order_is_a_function_of_the_seed(tmp_path):
    source, _ = numbered(160)
    first = read(states(tmp_path / "a", source, Counting(), rows=150))
    assert torch.equal(first, read(states(tmp_path / "b", source, Counting(), rows=150)))
    assert not torch.equal(first, read(states(tmp_path / "c", source, Counting(), rows=150, seed=1)))
    turns = read(states(tmp_path / "d", source, Counting(), epochs=2.0)).chunk(2)
    assert counted(turns[0]) == counted(turns[1]) and not torch.equal(*turns)


def test_a_step_can_be_read_without_those_before_it(tmp_path):
    """As a run that goes on does, in the same files and in none: what is there is not run again."""
    source, _ = numbered(160)
    whole = read(states(tmp_path / "a", source, Counting(), rows=150))
    last = list(range(len(whole) - 32, len(whole) - 16))
    for folder, runs in (("b", True), ("a", False)):
        reader = Counting()
        again = states(tmp_path / folder, source, reader, rows=150)
        assert torch.equal(again.__getitems__(last), whole[last])
        assert bool(reader.seen) == runs
    reader = Counting()
    assert torch.equal(states(tmp_path / "a", source, reader, rows=150, mark="other").__getitems__(last), whole[last])
    assert reader.seen


def test_outliers_and_nan_are_left_out(tmp_path):
    source, every = numbered(160)

    def change(rows):
        median = rows.norm(dim=1).median()
        rows[rows[:, 0] == 77] *= OUTLIER * 20 / rows[rows[:, 0] == 77].norm(dim=1, keepdim=True) * median
        rows[rows[:, 0] == 78] = torch.nan
        return rows

    made = states(tmp_path / "a", source, Counting(change), epochs=1.5)
    found = read(made).float()
    assert of(w for i, w in enumerate(every) if i % HOLD_EVERY) & Counter({(77, 74): 1})
    assert found.isfinite().all() and found.norm(dim=1).max() < 400 and len(found[:, 0].unique()) > 100


def test_windows_are_cut_off_at_the_number_of_tokens(tokenizer):
    texts = Texts(sentences(50))
    source = Source(texts, tokenizer, 8, 4, 33)
    found = list(source.windows())
    assert 32 <= sum(map(len, found)) <= 33
    assert found[:-1] == list(windows(texts, tokenizer, 8))[: len(found) - 1]


def test_little_is_padded(tokenizer):
    """Windows of a batch are about as long: sorted within a few batches."""
    source = Source(Texts(sentences(400)), tokenizer, 16, 4, None)
    batches = [batch for batch in source.batches() if not batch.held]
    read = sum(max(map(len, b.windows)) * len(b.windows) for b in batches)
    real = sum(len(w) for b in batches for w in b.windows)
    assert len(batches) > 50 and read / real < 1.1


def test_data_that_change_while_they_are_read_are_an_error(tmp_path):
    source, every = numbered(160)
    plan = source.plan(10**6)
    source.windows = lambda: iter(every[:-10])
    made = States(plan, source, Counting(), tmp_path, "m", 16, 1.0, 0, 0, 1)
    with pytest.raises(ValueError, match="changed while it was read"):
        made.fill(0)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source, _ = numbered(160)
    with pytest.raises(OSError, match=r"which the disk does not have.*smaller buffer_bytes"):
        states(tmp_path / "a", source, Counting())
