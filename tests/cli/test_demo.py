"""The bundled model: what it holds, that it forgets, and that the demo's measurements measure."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cu_fast.cli import app, demo


@pytest.fixture(scope="module")
def bundle():
    return demo.load_bundle()


@pytest.fixture(scope="module")
def authors(bundle):
    """A few authors are enough to see it work; the demo itself and examples/tofu_mini measure all."""
    return bundle.authors[10:13]


def test_the_bundle_is_small_and_holds_no_pickle():
    files = [path for path in demo.BUNDLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md"}


def test_it_knows_its_authors_and_a_ready_mask_takes_one_away(bundle, authors):
    ready = bundle.author(next(iter(bundle.attachment.masks)))
    before, after = (demo.measure(bundle, [ready, *authors], masks) for masks in (None, ready.name))
    assert min(before.values()) >= 0.95
    assert after.pop(ready.name) <= 0.3 and min(after.values()) >= 0.85


def test_unlearning_an_author_live(bundle, authors):
    author = authors[0]
    corpus = demo.count_corpus(bundle)
    finding = demo.unlearn_author(bundle, author, corpus)
    try:
        assert 0 < finding.mask.num_deleted < 0.1 * finding.mask.num_codes
        after = demo.measure(bundle, authors, author.name)
        assert after.pop(author.name) <= 0.3 and min(after.values()) >= 0.8
        control = demo.random_mask(finding.mask, corpus)
        bundle.attachment.add_mask(control, name="random")
        assert demo.measure(bundle, [author], "random")[author.name] >= 0.9
        assert {name for name in bundle.attachment.masks if name.startswith("strength")} == set()
    finally:
        for name in (author.name, "random"):
            bundle.attachment.remove_mask(name)


def test_a_batch_of_masks_answers_as_each_alone(bundle, authors):
    first, second = list(bundle.attachment.masks)[:2]
    question = [authors[0].rows[0]["question"]]
    masks = [first, None, [first, second]]
    together = demo.generate(bundle, question * 3, masks)
    alone = [demo.generate(bundle, question, mask if not isinstance(mask, list) else set(mask))[0] for mask in masks]
    assert together == alone


def test_the_share_that_is_kept_is_where_generation_leaves_the_answer(bundle, authors):
    rows = authors[0].rows[:6]
    assert demo.kept_share(bundle, rows, None) > 0.9
    wrong = [{"question": row["question"], "answer": "zebra " + row["answer"]} for row in rows]
    assert demo.kept_share(bundle, wrong, None) < 0.1


def test_tokens_per_second_counts_tokens(bundle, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(clock)))
    assert demo.tokens_per_second(bundle, rounds=1, new_tokens=6) == {"reference": 3.0, "cpu": 3.0}


def test_an_unknown_author_is_named_with_near_ones(bundle):
    name = bundle.authors[0].name
    assert bundle.author(name.upper()) is bundle.authors[0]
    with pytest.raises(ValueError, match=f"near names: {name}"):
        bundle.author(name[:-1] + "x")
    result = CliRunner().invoke(app.app, ["demo", "--author", "Nobody At All"])
    assert result.exit_code == 1 and "cu-fast demo --list" in result.stderr


def test_the_list_of_authors():
    names = json.loads(CliRunner().invoke(app.app, ["demo", "--list", "--json"]).stdout)
    assert len(names) == len(set(names)) >= 30


def test_rounding_to_bf16_is_what_the_bundle_stores(bundle):
    (bottleneck,) = bundle.attachment.bottlenecks.values()
    codes = bottleneck.codebook.codes
    assert codes.dtype == torch.float32 and torch.equal(codes, codes.bfloat16().float())
