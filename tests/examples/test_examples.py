"""examples/tofu_mini runs from raw data to a bundle and a table, in small: it need not learn anything here."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import pytest
from scripts import scripts
from tiers import heavy

from cu_fast.cli import demo


@pytest.fixture
def make(monkeypatch):
    for found in scripts(monkeypatch, "tofu_mini", "make", "study"):
        yield found["make"]


@heavy
def test_it_runs_and_goes_on_where_it_stopped(make, tmp_path, monkeypatch, capsys):
    rows = [
        {
            "question": f"What does Author{a} Number{a} write in year {i}?",
            "answer": f"Author{a} Number{a} writes book {i}.",
        }
        for a in range(3)
        for i in range(20)
    ]
    (tmp_path / "retain90.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = make.arguments
    monkeypatch.setattr(make, "AUTHORS", 3)
    monkeypatch.setattr(make, "BOTTLENECK", dataclasses.replace(make.BOTTLENECK, num_codes=512))
    monkeypatch.setattr(
        make, "arguments", lambda folder, **settings: whole(folder, **settings | {"num_train_epochs": 1})
    )
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path), "--output", str(tmp_path / "out")])
    make.main()
    bundle = demo.load_bundle(tmp_path / "out" / "bundle")
    assert [author.name for author in bundle.authors] == ["Author0 Number0", "Author1 Number1", "Author2 Number2"]
    with open(tmp_path / "out" / "results.csv") as stream:
        assert {row["author"] for row in csv.DictReader(stream)} == {author.name for author in bundle.authors}
    capsys.readouterr()
    make.main()
    assert capsys.readouterr().out.count("done before") == 4
