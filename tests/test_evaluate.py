"""Evaluation: scores against a loop over single rows and against figures made by hand."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from tiny_models import build
from tiny_training import WORDS

import cu_fast
from cu_fast import evaluate as ev

PAIRS = [{"prompt": " ".join(WORDS[:n]), "completion": " ".join(WORDS[n : 3 * n])} for n in (1, 4, 2, 5)]
FIRST, END = 3, 1  # ids of the tokenizer: the first word, and the end mark
SENTENCES = [{"source": row["prompt"], "target": row["completion"]} for row in PAIRS]


def by_hand(model, answer: list[int], **context) -> tuple[float, list[bool]]:
    """log P of an answer, and which of its tokens would be chosen, one row at a time."""
    with torch.no_grad():
        logits = (
            model(**context).logits[0].double()[-len(answer) - ("decoder_input_ids" not in context) :][: len(answer)]
        )
    chosen = torch.tensor(answer)
    return float(logits.log_softmax(-1)[range(len(answer)), chosen].sum()), (logits.argmax(-1) == chosen).tolist()


@pytest.mark.parametrize("tokens", [1, 30, 8192])
def test_a_causal_model(model, tokenizer, monkeypatch, tokens):
    monkeypatch.setattr(ev, "BATCH_TOKENS", tokens)
    got = ev.score_answers(model.eval(), tokenizer, PAIRS)
    for i, row in enumerate(PAIRS):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        total, right = by_hand(model, answer, input_ids=torch.tensor([prompt + answer]))
        check(got, i, total, right)


def test_a_sequence_to_sequence_model(tokenizer):
    model = build("t5_encoder")
    got = ev.score_answers(model, tokenizer, SENTENCES)
    end = tokenizer.eos_token_id
    for i, row in enumerate(SENTENCES):
        source, target = ([*tokenizer(row[key])["input_ids"], end] for key in ("source", "target"))
        decoder = [model.config.decoder_start_token_id, *target[:-1]]
        total, right = by_hand(
            model, target, input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([decoder])
        )
        check(got, i, total, right)


def check(got: ev.AnswerScores, i: int, total: float, right: list[bool]) -> None:
    assert got.tokens[i] == len(right)
    assert got.log_prob[i] == pytest.approx(total, rel=1e-4)
    assert got.right_prefix[i] == (right + [False]).index(False)
    assert got.right_suffix[i] == (right[::-1] + [False]).index(False)


class Alphabet(torch.nn.Module):
    """A model that says WORDS in their order, and stops after the tenth."""

    device, config = torch.device("cpu"), types.SimpleNamespace(is_encoder_decoder=False)

    def forward(self, input_ids, attention_mask):
        following = torch.where(input_ids == FIRST + 9, END, input_ids + 1)
        return types.SimpleNamespace(logits=torch.nn.functional.one_hot(following, 99) * 9.0)


def test_what_is_known_by_heart(tokenizer):
    a, b, c, d, e, f, g, h, i, j = WORDS[:10]
    answers = ((c, d, e, f), (c, a, i, j), (h, i, j), (c, d, i, e), (d, e, f, g))
    rows = [{"prompt": f"{a} {b}", "completion": " ".join(words)} for words in answers]
    got = ev.score_answers(Alphabet(), tokenizer, rows)
    assert got.tokens.tolist() == [5, 5, 4, 5, 5]  # with the end mark
    assert got.right_prefix.tolist() == [4, 1, 0, 2, 0]
    assert got.right_suffix.tolist() == [0, 2, 3, 0, 0]
    assert got.kept_share.tolist() == [0.8, 0.2, 0, 0.4, 0]
    assert got.extraction_strength.tolist() == [0, 0.4, 0.75, 0, 0]


@pytest.mark.parametrize("family", ["llama", "t5_encoder"])
@pytest.mark.parametrize("tokens", [1, 8192])
def test_answers_do_not_depend_on_the_batch(tokenizer, monkeypatch, family, tokens):
    monkeypatch.setattr(ev, "BATCH_TOKENS", tokens)
    model, rows = build(family), SENTENCES if family.startswith("t5") else PAIRS
    model.generation_config.eos_token_id = END
    answers = ev.generate(model, tokenizer, rows, 6)
    for row, answer in zip(rows, answers):
        ids = tokenizer(row.get("prompt") or row["source"])["input_ids"] + [END] * ("source" in row)
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0]
        alone = tokenizer.decode(out if "source" in row else out[len(ids) :], skip_special_tokens=True)
        assert answer == alone.strip()
    assert len(set(answers)) > 1


def test_no_rows_and_other_keys(model, tokenizer):
    with pytest.raises(ValueError, match="rows is empty"):
        ev.score_answers(model, tokenizer, [])
    with pytest.raises(ValueError, match="a row has the keys"):
        ev.score_answers(model, tokenizer, [{"question": "a"}])


def test_figures_of_sets():
    assert ev.bleu(["a cat sat on the mat"], ["a cat sat on the mat"]) == pytest.approx(1)
    np.testing.assert_allclose(ev.rouge_l(["a b"], ["a b c d"], "recall"), [0.5])
    np.testing.assert_allclose(ev.rouge_l(["a b"], ["a b c d"]), [2 / 3])


def test_bootstrap():
    values = np.arange(100) / 99
    low, high = ev.bootstrap(lambda rows: values[rows].mean(1), 100)
    assert 0.42 < low < 0.46 and 0.54 < high < 0.58
    assert ev.bootstrap(lambda rows: (values[rows] - values[rows]).sum(1), 100) == (0, 0)


def test_interval():
    assert ev.interval(np.full(5, 0.25)) == ev.interval(np.array([0.25])) == (0.25, 0.25)
    low, high = ev.interval(np.arange(100) / 99)
    assert 0.42 < low < 0.46 and 0.54 < high < 0.58  # 0.5, give or take two standard errors of 0.029
    assert ev.interval(np.arange(100) / 99) == (low, high)


def test_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RuntimeError, match=r"sacrebleu cannot be imported .* pip install 'cu-fast\[eval\]'"):
        ev.bleu(["a"], ["a"])


def test_compare_and_report(attachment, tokenizer):
    (bottleneck,) = attachment.bottlenecks.values()
    sha = bottleneck.codebook_sha256()
    attachment.add_mask(cu_fast.Mask.from_ids(range(0, 300, 2), num_codes=300, codebook_sha256=sha, topic="even"))
    results = ev.compare(attachment, tokenizer, {"a": PAIRS[:2], "b": PAIRS}, ["even"], progress=False)
    assert [(r["set"], r["mask"], r["rows"]) for r in results] == [
        ("a", "", 2),
        ("a", "even", 2),
        ("b", "", 4),
        ("b", "even", 4),
    ]
    for result in results:
        with attachment.unlearn(result["mask"] or None):
            rows = PAIRS[: result["rows"]]
            want, answers = (
                ev.score_answers(attachment.model, tokenizer, rows),
                ev.generate(attachment.model, tokenizer, rows),
            )
        assert result["answers"] == answers
        assert result["probability"] == pytest.approx(want.probability.mean())
        assert result["probability_low"] <= result["probability"] <= result["probability_high"]
        assert result["rouge_l"] == pytest.approx(ev.rouge_l(answers, [r["completion"] for r in rows]).mean())
    assert results[2]["probability"] != results[3]["probability"]

    text = ev.report(results, {"a": PAIRS[:2], "b": PAIRS}, examples=1)
    assert f"| b | even | 4 | {results[3]['rouge_l']:.3f} (" in text
    assert text.count("- truth: ") == 2 and f"- even: {' '.join(results[3]['answers'][0].split())}" in text
    with pytest.raises(ValueError, match="there is no mask 'odd'"):
        ev.compare(attachment, tokenizer, {"a": PAIRS}, ["odd"], progress=False)
