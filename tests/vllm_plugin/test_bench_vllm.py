"""benchmarks/bench_vllm.py in small: what it measures is right. No times."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

from cu_fast import bench

REQUESTS = 3


def test_every_kind_says_what_transformers_says(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("bench_vllm")
    options = dict(rounds=1, requests=REQUESTS, tokens=6, layers=7)
    rows = script.run(**options, output=tmp_path / "rows.csv")
    assert [row["kernel_provider"] for row in rows] == [kind.name for kind in script.kinds(REQUESTS)]
    assert all(row["match"] == 1 and row["status"] == "ok" for row in rows)
    notes = {row["kernel_provider"]: row["note"] for row in rows}
    assert f"{REQUESTS} of {REQUESTS} answers are those without the plug-in" in notes["delta, nothing deleted"]
    for splice in ("replace", "delta"):
        assert f" {REQUESTS} of {REQUESTS} answers" not in notes[f"{splice}, a mask per request"]
    assert len(bench.read_rows(tmp_path / "rows.csv")) == len(rows)
    bench.tables(rows)
