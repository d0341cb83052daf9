"""Masks: algebra, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from cu_fast.files import read_safetensors, seal, write_directory
from cu_fast.masks import Gate, LatentRows, Mask, MaskTable, load_masks

SHA = "a" * 64


def mask(ids, topic="topic", sha=SHA, **more):
    return Mask.from_ids(ids, num_codes=70, codebook_sha256=sha, topic=topic, **more)


def test_bits_are_the_contract():
    made = mask([0, 31, 32, 69])
    assert made.bits.tolist() == [1 | -(2**31), 1, 1 << 5]
    assert made.ids().tolist() == [0, 31, 32, 69] and made.num_deleted == 4


def test_algebra():
    a, b = mask([1, 2, 40], "a"), mask([2, 40, 50], "b")
    assert (a | b).ids().tolist() == [1, 2, 40, 50]
    assert (a & b).ids().tolist() == [2, 40]
    assert (a - b).ids().tolist() == [1]
    assert (a | b).topic == "union of a and b"
    assert [part["topic"] for part in (a | b).method["parts"]] == ["a", "b"]
    assert (a | b).digest == (b | a).digest != a.digest


def test_other_codebooks_are_refused():
    with pytest.raises(ValueError, match="another codebook"):
        mask([1]) | mask([2], sha="b" * 64)


def test_round_trip(tmp_path):
    made = mask([3, 64], "Äuthor / 1", layer="model.layers.1", method={"alpha": 0.05, "n": 3})
    made.save(tmp_path / "m")
    made.save(tmp_path / "m")  # over an older one
    read = Mask.load(tmp_path / "m")
    assert torch.equal(read.bits, made.bits) and read.digest == made.digest
    assert (read.topic, read.layer, read.method) == (made.topic, made.layer, made.method)
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "a temporary folder was left"


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(FileExistsError, match="holds other files, which are not replaced: letters"):
        mask([3]).save(tmp_path)
    assert (tmp_path / "letters").read_text() == "dear"


@pytest.mark.parametrize("key", ["topic", "num_codes", "num_deleted", "codebook_sha256", "digest", "method"])
def test_an_edited_record_is_refused(tmp_path, key):
    mask([3]).save(tmp_path / "m")
    file = tmp_path / "m" / "mask.json"
    record = json.loads(file.read_text())
    record[key] = 71 if key.startswith("num") else "else"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"mask\.json was changed"):
        Mask.load(tmp_path / "m")


def test_edited_bits_are_refused(tmp_path):
    mask([3]).save(tmp_path / "m")
    mask([4]).save(tmp_path / "other")
    (tmp_path / "m" / "mask.safetensors").write_bytes((tmp_path / "other" / "mask.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not match mask\.json"):
        Mask.load(tmp_path / "m")


@pytest.mark.parametrize("name", ["mask.json", "mask.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    mask([3]).save(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Mask.load(tmp_path / "m")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:5],
        lambda raw: b"",
        lambda raw: struct.pack("<Q", 2**62) + raw[8:],
        lambda raw: raw.replace(b'"I32"', b'"F99"'),
        lambda raw: raw.replace(b"[3]", b"[9]"),
        lambda raw: b"\x80\x04K\x01.",  # a pickle
    ],
)
def test_a_truncated_or_hostile_file_is_an_error(tmp_path, damage):
    mask([3]).save(tmp_path / "m")
    file = tmp_path / "m" / "mask.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"mask\.safetensors"):
        Mask.load(tmp_path / "m")


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    mask([3]).save(tmp_path / "m")
    file = tmp_path / "m" / "mask.safetensors"
    with pytest.raises(ValueError, match=r"lacks the tensors \['codes'\] and holds the unexpected \['bits'\]"):
        read_safetensors(file, {"codes": (3,)})
    with pytest.raises(ValueError, match=r"'bits' has shape \[3\]; it should be \[4\]"):
        read_safetensors(file, {"bits": (4,)})


def test_a_record_of_the_wrong_types_is_refused(tmp_path):
    for key, value in (("codebook_sha256", 5), ("topic", None), ("num_codes", True), ("num_codes", 0), ("method", [])):
        mask([3]).save(tmp_path / "m")
        file = tmp_path / "m" / "mask.json"
        record = json.loads(file.read_text()) | {key: value}
        del record["record_sha256"]
        file.write_bytes(seal(record, "it")[0])
        with pytest.raises(ValueError, match=re.escape(f"mask.json has {key} {value!r}")):
            Mask.load(tmp_path / "m")


@pytest.mark.parametrize(
    "value", [0.1 + 0.2, 1e-300, 5e-324, -0.0, 1.7976931348623157e308, 2**70, (1, 2), {9: 1, 10: 2}]
)
def test_what_a_method_holds_comes_back(tmp_path, value):
    mask([3], method={"value": value}).save(tmp_path / "m")
    read = Mask.load(tmp_path / "m").method["value"]
    assert repr(read) == repr(json.loads(json.dumps(value)))


HURTFUL = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "a set": {1},
    "half a character": "\ud800",
    "a key twice": {1: 0, "1": 1},
    "a long number": 10**5000,
}


@pytest.mark.parametrize("name", HURTFUL)
def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path, name):
    value = HURTFUL[name]
    with pytest.raises(ValueError, match="mask 'topic' cannot be saved"):
        mask([3], method={"value": value}).save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_masks_of_several_layers_and_nothing_else(tmp_path):
    for number in range(2):
        mask([number]).save(tmp_path / "m" / str(number))
    (tmp_path / "m" / ".ipynb_checkpoints").mkdir()
    assert [made.ids().tolist() for made in load_masks(tmp_path / "m")] == [[0], [1]]
    (tmp_path / "m" / "notes").mkdir()
    with pytest.raises(ValueError, match="holds notes beside masks"):
        load_masks(tmp_path / "m")


@pytest.mark.parametrize("ids", [[70], [-1]])
def test_ids_outside_the_codebook_are_refused(ids):
    with pytest.raises(ValueError, match="should lie in"):
        mask(ids)


def test_bits_beyond_the_last_code_are_refused():
    with pytest.raises(ValueError, match="beyond the last"):
        Mask(torch.tensor([0, 0, 1 << 6], dtype=torch.int32), 70, SHA, "t")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_directory(tmp_path / "d", {"a": b"old"}, "a|b")
    with pytest.raises(TypeError):
        write_directory(tmp_path / "d", {"a": b"new", "b": "not bytes"}, "a|b")
    assert (tmp_path / "d" / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_table_is_written_in_place_and_grows():
    table = MaskTable(70, "cpu", rows=2)
    held = table.table
    table.write(1, (mask([3]).bits,))
    assert held[1].tolist() == [8, 0, 0] and table.table is held
    table.write(5, (mask([33]).bits,))
    assert table.table.shape[0] >= 6 and table.table[5].tolist() == [0, 2, 0] and table.table[1].tolist() == [8, 0, 0]


def test_after_erasing():
    kept = torch.tensor([0, 2, 3, 69])
    left = mask([1, 2, 69]).after_erasing(kept, "c" * 64)
    assert left.ids().tolist() == [1, 3] and left.num_codes == 4 and left.codebook_sha256 == "c" * 64


def gate(codes=(0, 5, 69), weights=(2.0, -0.5, 1e-3), bias=-0.0, level=0.1, window=None):
    return Gate(torch.tensor(codes, dtype=torch.int32), torch.tensor(weights), bias, level, window=window)


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(shape, generator=generator) for shape in ((n, 2), (n,), (n,), (n, 2)))
    return LatentRows(*parts, dict(kind="threshold", k=None, scale="none", norm=1.0, site=None, site_out=None))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strength": 0.0}, "strength is 0 and clamp is 0, which changes nothing"),
        ({"strength": -1.0}, "strength is -1.0; it should be a number from 0 to 1,000,000"),
        ({"strength": 1e38}, "strength is 1e\\+38; it should be"),
        ({"strength": float("nan")}, "strength is nan; it should be"),
        ({"clamp": -1e38}, "clamp is -1e\\+38; it should be a number from -1,000,000 to 1,000,000"),
        ({"clamp": float("inf")}, "clamp is inf; it should be"),
        ({"dense": True}, "not 0 where the mask is dense"),
    ],
)
def test_what_would_change_nothing_or_overflow_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        mask([3], **how)
    assert mask([3], strength=0.0, clamp=1.0).clamp == 1.0, "adds to what is left"


class TestGate:
    ids = torch.tensor([[0, 1, 5], [5, 9, -1], [2, 69, 0], [-1, -1, -1], [0, 5, 69]], dtype=torch.int32)
    sequence = torch.tensor([0, 2, 2, 2, -1])

    position = torch.tensor([0, 0, 1, 2, -1])

    def test_counts_tokens_that_keep_a_code(self):
        arguments = self.ids, self.sequence, self.position
        counts = gate().count(*arguments, 3, 1)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [[[1, 1, 0, 1]], [[0, 0, 0, 0]], [[1, 1, 1, 3]]]
        parts = sum(gate().count(*(tensor[i : i + 1] for tensor in arguments), 3, 1) for i in range(5))
        assert torch.equal(parts, counts)
        assert gate().count(*(tensor[:0] for tensor in arguments), 3, 1).tolist() == [[[0] * 4]] * 3
        blocks = gate(window=2).count(*arguments, 3, 3)
        assert blocks[2].tolist() == [[0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 1]]
        assert torch.equal(blocks.sum(1, keepdim=True), counts) and blocks[1].sum() == 0
        later = gate(window=2).count(*(tensor[2:4] for tensor in arguments), 3, 2, first=1)
        assert torch.equal(later[2], blocks[2, 1:])
        kept = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
        for window, K in ((None, 1), (2, 3)):
            made = gate(window=window)
            found = made.count_kept(kept, self.sequence, self.position, 3, K)
            assert torch.equal(found, made.count(*arguments, 3, K)) and found.dtype == torch.int64

    @pytest.mark.parametrize("window", [2, 6, 16, None])
    def test_of_windows_the_largest_value_counts(self, window):
        """By a loop over windows; sequences of up to 20 tokens, the last one of none."""
        generator = torch.Generator().manual_seed(1)
        made = gate(range(4), [1.0, 2.0, 0.5, -1.5], window=window)
        lengths = [20, 1, 3, 6, 7, 9, 12, 0]
        kept = torch.rand(sum(lengths), 4, generator=generator) < 0.3
        sequence = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths))
        position = torch.cat([torch.arange(n) for n in lengths])
        found = made.value(made.count_kept(kept, sequence, position, 8, made.num_blocks(20)))
        half = (window or 40) // 2
        for n, of, value in zip(lengths, kept.split(lengths), found.tolist()):
            starts = [0] if n <= 2 * half else range(0, n - half, half)
            pieces = [of[start : start + 2 * half] for start in starts]
            assert n == 0 or sum(len(piece) for piece in pieces) >= n == starts[-1] + len(pieces[-1])
            want = [
                sum(
                    w * float(np.sqrt(np.float32(piece[:, j].double().mean()))) for j, w in enumerate([1, 2, 0.5, -1.5])
                )
                for piece in pieces
            ]
            assert value == pytest.approx(max(want) if n else float("inf"), rel=1e-12)

    def test_blocks_that_were_judged_need_not_be_kept(self):
        """Token by token with the last blocks alone: the largest so far is the largest of the whole at each token."""
        generator = torch.Generator().manual_seed(2)
        made = gate(range(3), [1.0, 2.0, -0.5], window=6)
        kept, position = torch.rand(23, 3, generator=generator) < 0.3, torch.arange(23)
        nowhere = torch.zeros(23, dtype=torch.int64)
        whole, last = [], []
        for n in range(1, 24):
            counts = made.count_kept(kept[:n], nowhere[:n], position[:n], 1, made.num_blocks(n))
            whole.append(made.value(counts))
            last.append(made.value(counts[:, max(0, made.num_blocks(n - 1) - 2) :]))
        assert torch.equal(torch.cat(whole).cummax(0).values, torch.cat(last).cummax(0).values)
        assert not torch.equal(torch.cat(whole), torch.cat(last))

    def test_value_is_the_sum_over_roots_of_shares(self):
        generator = torch.Generator().manual_seed(0)
        for n in (1, 2, 3, 5, 8, 97):
            made = gate(range(n), torch.randn(n, generator=generator).tolist(), bias=0.3)
            counts = torch.randint(0, 50, (6, n), generator=generator)
            tokens = torch.tensor([50, 50, 61, 1, 0, 10**6])
            got = made.value(torch.cat([counts, tokens[:, None]], 1)[:, None])
            weights = [Fraction(w) for w in made.weights.double().tolist()]
            for row, T, value in zip(counts.tolist(), tokens.tolist(), got.tolist()):
                if T == 0:
                    assert value == float("inf")
                else:
                    roots = [Fraction(float(np.sqrt(np.float32(c / T)))) for c in row]
                    want = Fraction(0.3) + sum(w * r for w, r in zip(weights, roots))
                    assert abs(Fraction(value) - want) <= Fraction(2**-50) * (
                        1 + sum(abs(w) * r for w, r in zip(weights, roots))
                    )
            assert got.dtype == torch.float64

    def test_the_order_of_the_sum_is_a_tree_of_halves(self):
        big = float(2**60)
        made = gate(range(5), [big, 1.0, 3.0, -big, 2.0], bias=0.0)
        # (big + -big), (1 + 2), 3 in halves of 5; then (0 + 3), (3); in order from the left it were 2
        assert made.value(torch.ones(1, 1, 6, dtype=torch.int64)).tolist() == [6.0]

    def test_it_is_part_of_what_a_mask_does(self):
        plain = mask([3])
        made = plain.with_gate(gate())
        digests = {plain.digest, made.digest}
        for change in (
            dict(codes=(0, 6, 69)),
            dict(weights=(2.0, -0.5, 2e-3)),
            dict(bias=0.5),
            dict(level=0.2),
            dict(window=4),
        ):
            digests.add(plain.with_gate(gate(**change)).digest)
        assert len(digests) == 7
        assert plain.with_gate(gate()).digest == made.digest and made.with_gate(None).digest == plain.digest
        assert made.with_strength(3).gate is made.gate and (made | plain).gate is None

    @pytest.mark.parametrize("window", [None, 64])
    def test_round_trip(self, tmp_path, window):
        made = mask([3], strength=2.5).with_gate(gate(window=window))
        made.save(tmp_path / "m")
        read = Mask.load(tmp_path / "m")
        assert read.digest == made.digest and read.strength == 2.5 and read.gate.window == window
        assert torch.equal(read.gate.codes, made.gate.codes) and torch.equal(read.gate.weights, made.gate.weights)
        assert repr((read.gate.bias, read.gate.level)) == "(-0.0, 0.1)"
        assert json.loads((tmp_path / "m" / "mask.json").read_text())["format_version"] == 2
        mask([3]).save(tmp_path / "old")
        assert json.loads((tmp_path / "old" / "mask.json").read_text())["format_version"] == 1

    def test_a_file_with_another_gate_is_refused(self, tmp_path):
        mask([3]).with_gate(gate()).save(tmp_path / "m")
        mask([3]).with_gate(gate(weights=(2.0, -0.5, 2e-3))).save(tmp_path / "other")
        (tmp_path / "m" / "mask.safetensors").write_bytes((tmp_path / "other" / "mask.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"does not hold the gate of mask\.json"):
            Mask.load(tmp_path / "m")
        mask([3]).save(tmp_path / "none")
        (tmp_path / "m" / "mask.safetensors").write_bytes((tmp_path / "none" / "mask.safetensors").read_bytes())
        with pytest.raises(ValueError, match="lacks the tensors"):
            Mask.load(tmp_path / "m")

    def test_rows_of_the_gate(self, tmp_path):
        made = mask([3], strength=2.0).with_gate(gate().with_rows(rows(3)))
        assert made.digest == mask([3], strength=2.0).with_gate(gate()).digest
        (tmp_path / "m").mkdir()
        for name, content in dataclasses.replace(made, rows=rows(1)).to_files(rows=True)[0].items():
            (tmp_path / "m" / name).write_bytes(content)
        read = Mask.load(tmp_path / "m")
        assert read.digest == made.digest and read.gate.rows.settings() == rows(3).settings()
        assert all(torch.equal(a, b) for a, b in zip(read.gate.rows.rows(), rows(3).rows()))
        assert all(torch.equal(a, b) for a, b in zip(read.rows.rows(), rows(1).rows()))
        other = dataclasses.replace(made.with_gate(gate().with_rows(rows(3, seed=1))), rows=rows(1))
        (tmp_path / "m" / "mask.safetensors").write_bytes(other.to_files(rows=True)[0]["mask.safetensors"])
        with pytest.raises(ValueError, match=r"does not hold the rows of mask\.json"):
            Mask.load(tmp_path / "m")
        with pytest.raises(ValueError, match="rows of the gate are 2; there should be 3"):
            gate().with_rows(rows(2))

    @pytest.mark.parametrize("with_rows", [False, True])
    def test_every_flipped_byte_is_refused(self, tmp_path, with_rows):
        made = mask([3]).with_gate(gate().with_rows(rows(3)))
        made = dataclasses.replace(made, rows=rows(1))
        files, _ = made.to_files(rows=with_rows)
        for name, content in files.items():
            for i in range(len(content)):
                changed = bytearray(content)
                changed[i] ^= 1
                for other, whole in files.items():
                    (tmp_path / other).write_bytes(bytes(changed) if other == name else whole)
                try:
                    read = Mask.load(tmp_path)
                except ValueError:
                    continue
                # The padding of a safetensors header, or a space of JSON, says nothing.
                assert read.digest == made.digest and read.topic == made.topic, (name, i)
                if with_rows:
                    pairs = zip((read.rows, read.gate.rows), (made.rows, made.gate.rows))
                    assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one.rows(), two.rows())), (
                        name,
                        i,
                    )

    @pytest.mark.parametrize(
        "value",
        [None, 5, {}, {"num_codes": 3}, dict(num_codes=True), dict(num_codes=0), dict(bias="0"), dict(level=None), dict(sha256=1), dict(window="8")],
    )  # fmt: skip
    def test_a_record_that_describes_no_gate_is_refused(self, tmp_path, value):
        mask([3]).with_gate(gate()).save(tmp_path / "m")
        file = tmp_path / "m" / "mask.json"
        record = json.loads(file.read_text())
        whole = isinstance(value, dict) and value and value != {"num_codes": 3}
        record["gate"] = record["gate"] | value if whole else value
        del record["record_sha256"]
        file.write_bytes(seal(record, "it")[0])
        with pytest.raises(ValueError, match=r"mask\.json has gate .*describes none"):
            Mask.load(tmp_path / "m")

    @pytest.mark.parametrize(
        "change, words",
        [
            (dict(codes=(5, 5, 6)), "each above the one before"),
            (dict(codes=(-1, 5, 6)), "at least 0"),
            (dict(codes=(), weights=()), r"codes of the gate is torch.int32 \[0\]"),
            (dict(weights=(1.0, 2.0)), r"weights of the gate is torch.float32 \[2\]; it should be torch.float32 \[3\]"),
            (dict(weights=(1.0, 2.0, float("inf"))), "should be finite"),
            (dict(bias=float("nan")), "should be finite"),
            (dict(level=float("inf")), "should be finite"),
            (dict(window=0), "window is 0; it should be an even number of tokens, at least 2, or None"),
            (dict(window=7), "window is 7"),
            (dict(window=8.0), "window is 8.0"),
        ],
    )
    def test_what_is_no_gate_is_refused(self, change, words):
        with pytest.raises(ValueError, match=words):
            gate(**change)

    def test_a_code_beyond_the_last_is_refused(self):
        with pytest.raises(ValueError, match="the gate has code 70; the last of 70 codes is 69"):
            mask([3]).with_gate(gate(codes=(0, 5, 70)))

    def test_after_erasing_it_is_renumbered_or_lost(self):
        kept = torch.tensor([69, 0, 5, 7])
        left = mask([7]).with_gate(gate()).after_erasing(kept, "c" * 64)
        assert left.gate.codes.tolist() == [0, 1, 2]
        assert left.gate.weights.tolist() == torch.tensor([1e-3, 2.0, -0.5]).tolist()
        assert mask([7]).with_gate(gate()).after_erasing(kept[:2], "c" * 64).gate is None
