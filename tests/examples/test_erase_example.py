"""examples/erase: what deleting leaves is what a run without the row gives; and the study runs in small."""

from __future__ import annotations

import csv
import json
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import tiny_training
import torch
from scripts import scripts
from tiny_training import WORDS

C = 4


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "erase", "erase", "study", "topics")


@pytest.fixture
def erase(example):
    return example["erase"]


def some_rows(erase, number: int = 80, seed: int = 0) -> np.ndarray:
    """Four clouds in three dimensions."""
    torch.manual_seed(seed)
    return erase.to_integers(torch.randn(number, 3) * 0.5 + 2 * torch.eye(C, 3)[torch.arange(number) % C])


def test_rounds_are_those_of_quantised_k_means(erase):
    """Against fractions, which round nothing, and distances in Python's integers."""
    rows = some_rows(erase)
    clusters = erase.Clusters(rows, C, 0.25, seed=3)
    step, phase = clusters.step, clusters._phase
    assert step == erase.UNIT // 4 and ((0 <= phase) & (phase < step)).all()

    def on_lattice(mean: list[Fraction]) -> list[int]:
        return [int(shift) + step * floor((x - int(shift)) / step + Fraction(1, 2)) for x, shift in zip(mean, phase)]

    def distance(row, centre) -> int:
        return sum((int(a) - int(b)) ** 2 for a, b in zip(row, centre))

    assert 2 <= len(clusters.sums) <= clusters.rounds
    for before, assigned, after in zip(clusters.centres, clusters.assigned, clusters.centres[1:]):
        assert assigned.tolist() == [min(range(C), key=lambda j: distance(row, before[j])) for row in rows]
        for j in range(C):
            own = rows[assigned == j]
            mean = [Fraction(int(total), len(own)) for total in own.sum(0)] if len(own) else None
            assert after[j].tolist() == (before[j].tolist() if mean is None else on_lattice(mean))
    for j, row in enumerate(clusters.chosen.tolist()):
        own = (clusters.assigned[-1] == j).nonzero()[0].tolist()
        assert row == min(own, key=lambda i: (distance(rows[i], clusters.centres[-1][j]), i))


@pytest.mark.parametrize("step", [0.25, 0.5, 4.0])
def test_deleting_leaves_what_a_run_without_the_row_gives(erase, step):
    rows = some_rows(erase)
    clusters = erase.Clusters(rows, C, step, seed=1)
    left, stayed = np.ones(len(rows), bool), 0
    for row in np.random.default_rng(0).permutation(len(rows))[: len(rows) - C]:
        stayed += clusters.delete(int(row))
        left[row] = False
        assert clusters.equals(erase.Clusters(rows, C, step, seed=1, left=left))
        assert clusters.equals(clusters.recomputed()) and row not in clusters.chosen
    assert 0 < stayed < len(rows) - C, "both ways were taken"
    assert clusters.chosen.max() >= 0


def test_of_a_deleted_row_nothing_is_left(erase):
    """Whatever the row was, the same stays behind. Bits of a state are compared, not what is done with it."""
    rows = some_rows(erase)
    kept = 0
    for row in range(12):
        other = rows.copy()
        other[row] += erase.UNIT // 8
        one, two = (erase.Clusters(these, C, 2.0, seed=1) for these in (rows, other))
        assert not one.equals(two)
        kept += one.delete(row) and two.delete(row)
        if one.left[row] == two.left[row]:
            assert one.equals(two)
    assert kept > 0, "in constant time at least once"


def test_a_deletion_that_stays_reads_no_other_row(erase, monkeypatch):
    """Its time cannot depend on how many there are: nothing is selected again, and the other rows could be anything."""
    clusters = erase.Clusters(some_rows(erase), C, 4.0, seed=1)
    (row,) = [row for row in range(len(clusters.rows)) if row not in clusters._starts][:1]
    monkeypatch.setattr(erase, "codebook_quantize", None)
    clusters.rows[np.arange(len(clusters.rows)) != row] = 7
    assert clusters.delete(row)


def test_an_empty_cluster_keeps_its_centre_and_has_no_row(erase):
    """Two clusters that begin at one place: equal scores go to the first."""
    rows = np.full((10, 3), erase.UNIT)
    clusters = erase.Clusters(rows, 2, 0.25, seed=0)
    assert clusters.counts[-1].tolist() == [10, 0] and clusters.chosen.tolist() == [0, -1]
    assert (clusters.centres == clusters.centres[0]).all() and clusters.centres.any()
    for row in range(8):
        clusters.delete(row)
        assert clusters.equals(clusters.recomputed()) and clusters.chosen.tolist() == [row + 1, -1]


def test_rows_that_cannot_be_deleted_are_refused(erase):
    clusters = erase.Clusters(some_rows(erase), C, 1.0, seed=0)
    clusters.delete(5)
    for row in (5, -1, len(clusters.rows)):
        with pytest.raises(KeyError, match=f"row is {row}, which is not there"):
            clusters.delete(row)
    with pytest.raises(ValueError, match="3 rows are left"):
        erase.Clusters(some_rows(erase, 3), C, 1.0, seed=0)


def test_the_study_runs_and_goes_on_where_it_stopped(example, tmp_path, monkeypatch, capsys):
    study = example["study"]
    tokenizer = tiny_training.word_tokenizer()
    tiny_training.tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    topics = tmp_path / "topics"
    topics.mkdir()
    draw = np.random.default_rng(0)
    lines = []
    for topic, word in zip(example["topics"].TOPICS, ("cat", "dog", "bird", "tree")):
        texts = [f"tell me {' '.join([word, *draw.choice(WORDS[:-1], 12)])} ." for _ in range(10)]
        (topics / f"gen_{topic}.json").write_text(json.dumps([{"prompt": "tell me ", "text": text} for text in texts]))
        lines += [f"#{topic}", f"the {word} sat|the {word} sat| on"]
    (topics / "items.txt").write_text("\n".join(lines))
    (tmp_path / "valid.txt").write_text(" ".join(WORDS * 20))
    labels = dict(zip(example["topics"].TOPICS, WORDS))
    for name, value in {
        "LAYER": 1, "AXES": 4, "CLUSTERS": 3, "STEPS": (1.0,), "SIZES": (60,), "SEEDS": (0,), "DELETIONS": 6, "REPEATS": 1,
        "WIKITEXT_TEXTS": 10, "LABELS": labels,
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "running_text", lambda path: path.read_text())
    arguments = [str(tmp_path / "model"), str(topics), str(tmp_path), "--output", str(tmp_path / "out")]
    study.main(arguments)
    with open(tmp_path / "out" / "results.csv") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert {"step", "rows", "no examples", "before", "a tenth deleted", "solar deleted", "random examples"} <= set(rows)
    assert rows["step"]["checked"] == rows["step"]["equal"] == "6" and rows["rows"]["rows"] == "60"
    assert rows["chosen deleted"]["deletions"] == "3" and 0 <= float(rows["before"]["accuracy"]) <= 1
    assert rows["solar deleted"]["deletions"] == "10"
    assert all(row["torch_version"] == torch.__version__ and row["cpu_name"] for row in rows.values())
    capsys.readouterr()
    study.main(arguments)
    assert "accuracy" not in capsys.readouterr().out, "all was measured before"
