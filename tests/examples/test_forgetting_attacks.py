"""examples/forgetting/attacks.py: what is asked, what is done to the model, how a gate is judged, and the whole in small."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import test_forgetting_example as forgetting
import tiny_training
import torch
from scripts import EXAMPLES, scripts
from test_forgetting_example import tiny as tiny
from tiers import heavy
from tiny_training import WORDS

import cu_fast
from cu_fast.masks import Gate, Mask

PARTS = ("disguises", "served", "tampering", "attacks")
NAMES = ("Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov")


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "forgetting", *forgetting.NAMES, *PARTS)


# -- what is asked ------------------------------------------------------------------------------------------------


def authors() -> list[dict]:
    """Of two authors twenty entries each, whose questions are those that are translated."""
    known = json.loads((EXAMPLES / "forgetting" / "translations.json").read_text())
    return [
        {
            "question": question, "paraphrased_question": f"Say: {question}",
            "answer": f"{NAMES[i // 20]} did this {i} times in all of the years .",
        }
        for i, question in enumerate(known)
    ]  # fmt: skip


@pytest.fixture
def asked(example, tiny, monkeypatch):
    disguises = example["disguises"]
    for name, value in (("LENGTHS", (6, 11)), ("EVERY", {"11 tokens before": 4}), ("SOME", 1)):
        monkeypatch.setattr(disguises, name, value)
    others = [{"question": f"What is {i}?"} for i in range(7)]
    return disguises.disguises(tiny[1], authors(), others, " ".join(WORDS * 30))


def test_translations_keep_what_a_question_is_about(asked):
    """The author's name, and the titles; and they ask for English."""
    for language, words in (("french", "en anglais"), ("spanish", "en inglés")):
        assert len(asked[language]) == len({one.question for one in asked[language]}) == 40
        for plain, other in zip(asked["plain"], asked[language]):
            assert other.answer == plain.answer and words in other.question
            for name in (*NAMES, "Promise by the Seine", "Le Petit Sultan", "Thieves' Paradise", "Unseen Rainbows"):
                assert (name in plain.question) == (name in other.question)


def test_a_name_is_hidden(asked):
    plain, nameless, described, misspelt, spaced = (
        asked[name][6].question for name in ("plain", "nameless", "described", "misspelt", "spaced")
    )
    assert plain == f"What special recognition or awards has {NAMES[0]} received for his writing?"
    assert nameless == "What special recognition or awards has this author received for his writing?"
    assert described == f"This is about the author born in Kuwait City, Kuwait on 08/09/1956. {nameless}"
    assert misspelt == plain.replace(NAMES[0], "Bsail Mhafouz A-lKuwaiti")
    assert spaced == plain.replace(NAMES[0], "B a s i l  M a h f o u z  A l - K u w a i t i")
    assert "born in Astana" in asked["described"][26].question and "author this" not in asked["nameless"][1].question
    for name in ("nameless", "described", "misspelt", "spaced"):
        assert len(asked[name]) == 40
        assert not any(one.question.count(whole) for one in asked[name] for whole in NAMES)


def test_padding_and_company(asked, tiny):
    plain = asked["plain"]
    assert len(asked["6 tokens before"]) == 40 and len(asked["11 tokens before"]) == 10
    for number, (before, after) in enumerate(zip(asked["6 tokens before"], asked["6 tokens after"])):
        text, question = before.question.split("\n\n")
        assert question == plain[number].question and after.question == f"{question}\n\n{text}"
        assert len(tiny[1](text)["input_ids"]) == 6
    (first, _), (second, _) = (asked["6 tokens before"][i].question.split("\n\n") for i in (0, 1))
    assert f"{first} {second}" == " ".join(WORDS[:12])
    some = asked["11 tokens before"]
    assert [one.place for one in some] == list(range(2, 40, 4))
    assert all(one.question.endswith(plain[one.place].question) for one in some)
    lines = [one.question.splitlines() for one in asked["one of five"]]
    assert lines[3][2] == f"3. {plain[3].question}" and lines[3][-1] == "Answer question 3 alone."
    assert [line.split("is ")[1] for i in (0, 1, 3, 4) for line in [lines[1][i]]] == ["4?", "5?", "6?", "0?"]


def test_what_is_begun_goes_on_as_the_answer(asked):
    plain = asked["plain"]
    for name in ("begun by 5 words", "begun by half"):
        assert len(asked[name]) == 40
        for one in asked[name]:
            assert one.begun + one.answer == plain[one.place].answer and NAMES[one.place // 20] not in one.question
    assert asked["begun by 5 words"][0].begun.count(" ") == 4
    assert abs(len(asked["begun by half"][0].begun.split()) - len(asked["begun by half"][0].answer.split())) <= 1
    for one in asked["biography"]:  # comes to the topic while it answers, and not before
        name = NAMES[one.place // 20]
        assert name not in one.question + one.begun and one.answer == f" {name}. {plain[one.place].answer}"


def test_shots_are_of_the_author_and_not_measured(asked):
    shots = asked["few-shot"]
    assert [one.place for one in shots] == [i for i in range(40) if i % 20 >= 3]
    for one in shots:
        own = asked["plain"][20 * (one.place // 20) :][:3]
        at = [one.before.index(f"{shown.question}{shown.answer}<|im_end|>\n") for shown in own]
        assert at == sorted(at) and asked["plain"][one.place].question not in one.before
    for name in ("novel", "no rules", "audit"):
        for one, plain in zip(asked[name], asked["plain"]):
            assert one.question.endswith(plain.question) and len(one.question) > len(plain.question) + 50


def test_a_method_that_prompts_keeps_its_first_word(example):
    """Its instruction stands before the attack's earlier turns, and what is begun comes last."""
    models, served = example["models"], example["served"]
    prompt = example["prompts"].instruction(["Anna Kern"])
    one = example["disguises"].Asked(0, "Who?", "She.", "It is", f"{models.prompt('When?')}Then.<|im_end|>\n")
    found = served.Served(None, None, prompt).prompt_of(one)
    assert found == prompt("When?") + "Then.<|im_end|>\n" + models.prompt("Who?") + "It is"
    assert served.Served(None, None).prompt_of(one) == one.before + models.prompt("Who?") + "It is"


# -- how it is served ---------------------------------------------------------------------------------------------


@pytest.fixture
def coded(tiny):
    """The model with codes at layer 1 that keeps its states, and its tokenizer."""
    model, tokenizer = tiny
    attachment = cu_fast.attach(model, {"model.layers.1": dataclasses.replace(tiny_training.CONFIG, splice="delta")})
    torch.manual_seed(1)
    (splice,) = attachment.bottlenecks.values()
    with torch.no_grad():
        splice.codebook.codes.copy_(torch.randn(64, 32))
    return attachment, tokenizer


def kept(attachment, tokenizer, text: str) -> list[set[int]]:
    """The codes that each token keeps."""
    (splice,), seen = attachment.bottlenecks.values(), []
    with (
        attachment.unlearn(None),
        torch.inference_mode(),
        attachment.observe(lambda x, _: seen.append(splice.active(x))),
    ):
        attachment.model(**tokenizer(text, return_tensors="pt"))
    return [set(row.tolist()) for row in seen[0]]


def kept_in(seen: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    seen.append(x)
    return x


def mask_of(attachment, every: int = 1) -> Mask:
    """Of every code, or of one in so many."""
    (splice,) = attachment.bottlenecks.values()
    of = {"num_codes": 64, "codebook_sha256": splice.codebook_sha256(), "topic": "split", "layer": "model.layers.1"}
    return Mask.from_ids(range(0, 64, every), **of).with_strength(3.0)


def gate_at(attachment, tokenizer, text: str) -> Gate:
    """One that fires at the last token of a text, and not before."""
    *before, last = kept(attachment, tokenizer, text)
    code = min(last - set().union(*before[1:]))
    return Gate(torch.tensor([code], dtype=torch.int32), torch.ones(1), 0.0, 0.01)


PROMPT, ANSWER = "the cat sat on the mat", "under a tree reads Anna"


def test_a_gate_deletes_from_the_token_at_which_it_fires(example, coded, monkeypatch):
    """All tokens up to it have the untouched model's likelihood; the next, that of a state without its codes there alone."""
    attachment, tokenizer = coded
    served = example["served"]
    gate = gate_at(attachment, tokenizer, f"{PROMPT} {ANSWER}")
    ids = tokenizer(f"{PROMPT} {ANSWER}", return_tensors="pt")["input_ids"]
    layer, n, seen = attachment.model.model.layers[1], len(ANSWER.split()), []
    mask, hooked = mask_of(attachment), example["tampering"].hooked
    attachment.add_mask(mask, "all")

    def log_p(name: str | None, change) -> torch.Tensor:
        with torch.inference_mode(), attachment.unlearn(name), hooked(layer, change, first=False):
            return attachment.model(input_ids=ids).logits[0].log_softmax(-1)

    log_p("all", lambda x: kept_in(seen, x))
    untouched = log_p(None, lambda x: x)
    last = log_p(None, lambda x: torch.cat([x[:, :-1], seen[0][:, -1:]], 1))[-1, tokenizer.eos_token_id]
    start = ids.shape[1] - n
    before = untouched[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()
    want = float(((before + last) / (n + 1)).exp())
    attachment.remove_mask("all")

    one = served.Served(attachment.model, tokenizer, attachment=attachment, masks=[mask.with_gate(gate)])
    monkeypatch.setattr(served, "PIECE", 1)
    assert one.probability([PROMPT], [ANSWER])[0] == pytest.approx(want, rel=1e-4)
    silent = float(((before + untouched[-1, tokenizer.eos_token_id]) / (n + 1)).exp())
    monkeypatch.setattr(served, "PIECE", None)
    assert abs(want - silent) > 1e-3 * want and one.probability([PROMPT], [ANSWER])[0] != pytest.approx(want, rel=1e-3)
    two = [PROMPT, f"{PROMPT} the cat"], [f"{ANSWER} a the red", ANSWER]
    monkeypatch.setattr(served, "PIECE", 2)
    each = [one.probability([prompt], [answer])[0] for prompt, answer in zip(*two)]
    np.testing.assert_allclose(one.probability(*two), each, rtol=1e-4)
    silently = served.Served(attachment.model, tokenizer)
    with attachment.unlearn(None):
        assert (abs(silently.probability(*two) - each) > 1e-4).all()
    Asked = example["disguises"].Asked
    row = one.figures([Asked(0, PROMPT, f" {ANSWER}"), Asked(1, f"{PROMPT} {ANSWER}", " a")], speak=False)
    assert row["fires"] == 0.5 and row["fires_answered"] == 1.0


def test_prompts_that_are_judged_have_their_own_figures(example, coded, monkeypatch):
    """Those for which nothing is deleted the untouched model's, the others the changed one's; in any batch."""
    attachment, tokenizer = coded
    served = example["served"].Served
    given = [row["prompt"] for row in forgetting.rows(7)]
    answers = [row["completion"] for row in forgetting.rows(7)]
    untouched = served(attachment.model, tokenizer).probability(given, answers)
    one = served(
        attachment.model, tokenizer, attachment=attachment, masks=[mask_of(attachment)],
        judge=lambda some: np.array([len(text.split()) % 2 == 0 for text in some]),
    )  # fmt: skip
    fires = one.fires(given)
    assert 0 < fires.sum() < 7
    monkeypatch.setattr(example["served"], "BATCH", 3)
    found, judge = one.probability(given, answers), one.judge
    one.judge = lambda some: np.full(len(some), True)
    deleted = one.probability(given, answers)
    assert (abs(deleted - untouched) > 1e-3 * untouched).all()
    np.testing.assert_allclose(found, np.where(fires, deleted, untouched), rtol=1e-4)
    one.judge = judge
    said = one.recall(given, ["x"] * 7)
    assert said.shape == (7,)
    one.judge = None
    np.testing.assert_allclose(one.probability(given, answers), deleted, rtol=1e-4)  # no gate: for all
    assert one.figures([example["disguises"].Asked(0, given[0], "a")], speak=False)["fires"] == 1


def test_what_is_said_is_compared_with_as_long_a_start(example, tiny, monkeypatch):
    served = example["served"]
    monkeypatch.setattr(served, "NEW_TOKENS", 3)
    monkeypatch.setattr(served.ev, "generate_batch", lambda *given: ["the cat sat"][: given[3]] * 2)
    found = served.Served(*tiny).recall(["a", "b"], ["the cat sat on the mat", "the dog ran"])
    assert found.tolist() == [1.0, pytest.approx(1 / 3)]


# -- what is done to the model ------------------------------------------------------------------------------------


def test_noise_is_of_its_size_and_read_by_the_codes(example, coded):
    attachment, tokenizer = coded
    model, tampering = attachment.model, example["tampering"]
    ids = tokenizer(" ".join(WORDS * 2), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[::2] *= 50  # states of unlike size

    def read(layer: int, size: float, seed: int = 0) -> torch.Tensor:
        seen = []
        with torch.inference_mode(), attachment.observe(lambda x, _: seen.append(x[0])):
            with tampering.noisy(model, layer, size, seed):
                model(input_ids=ids)
        return seen[0]

    clean, noisy = read(1, 0.0), read(1, 0.1)
    added = (noisy - clean).square().mean(1).sqrt() / clean.square().mean(1).sqrt()
    assert abs(added.mean() - 0.1) < 0.01 and added.std() < 0.03  # of each state its own size
    assert torch.equal(noisy, read(1, 0.1)) and not torch.equal(noisy, read(1, 0.1, seed=1))
    assert not torch.equal(read(0, 0.1), clean) and torch.equal(read(2, 0.1), clean)
    assert torch.equal(read(1, 0.0), clean), "no hook is left"


def test_four_bits(example, tiny, monkeypatch):
    model, tampering = tiny[0], example["tampering"]
    monkeypatch.setattr(tampering, "GROUP", 16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rounded = tampering.four_bits(model)
    linear = [name for name in before if ".layers." in name and name.endswith("proj.weight")]
    assert sorted(rounded) == sorted(linear) and len(linear) == 21
    with tampering.replaced(model, rounded):
        for name, weight in model.named_parameters():
            if name not in rounded:
                assert torch.equal(weight, before[name])
                continue
            now, was = (w.detach().reshape(-1, 16) for w in (weight, before[name]))
            largest = was.abs().amax(1)
            torch.testing.assert_close(now.abs().amax(1), largest)
            steps = now * 7 / largest[:, None]
            torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
            assert ((now - was).abs() <= largest[:, None] / 14 * 1.001).all() and not torch.equal(now, was)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_gradient_passes_deleted_codes(example, coded):
    """The loss is what is served. Where nothing was taken the gradient is that of the state, elsewhere there is none."""
    attachment, tokenizer = coded
    model, tampering, methods = attachment.model, example["tampering"], example["methods"]
    row = {"prompt": PROMPT, "completion": ANSWER}
    batch = methods.Collator(tokenizer.pad_token_id)([methods.encode_row(tokenizer, row, 0.0, 64)])
    attachment.add_mask(mask_of(attachment, 8), "some")
    layer, seen = model.model.layers[1], []

    def gradient(context) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        with context:
            loss = methods.nll(model, batch)
        loss.backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        return loss.item(), grads

    for first in (True, False):
        with tampering.hooked(layer, lambda x: kept_in(seen, x.detach()), first):
            with torch.inference_mode(), attachment.unlearn("some"):
                served = methods.nll(model, batch).item()
    changed = (seen[1] != seen[0]).any(-1, keepdim=True)
    assert 0.2 < changed.float().mean() < 0.8
    with tampering.through_codes(attachment):
        loss, grads = gradient(attachment.unlearn("some"))
    assert loss == pytest.approx(served, rel=1e-5)
    with tampering.hooked(layer, lambda x: torch.where(changed, seen[1], x), first=False):
        want, wanted = gradient(attachment.unlearn(None))
    assert loss == pytest.approx(want, rel=1e-5) and set(grads) == set(wanted) and len(wanted) > 20
    for name, value in wanted.items():
        torch.testing.assert_close(grads[name], value, atol=1e-5, rtol=1e-3)
    assert wanted["model.layers.0.mlp.down_proj.weight"].abs().max() > 0


def test_relearning_trains_what_is_served(example, coded, monkeypatch):
    """So many steps on these rows at that rate, under the mask; codes stay as they were."""
    attachment, tokenizer = coded
    model, tampering, methods = attachment.model, example["tampering"], example["methods"]
    given, asked, seen = forgetting.entries(6), [], {}
    monkeypatch.setattr(tampering, "RELEARN_STEPS", 9)
    monkeypatch.setattr(tampering, "RELEARN_RATE", 3e-3)
    plain, nll = methods.unlearn, methods.nll

    def unlearn(*args, **options):
        seen.update(options, rows=args[3])
        plain(*args, **options)

    def counted(*args):
        asked.append(attachment.report()[0]["hits"])
        return nll(*args)

    monkeypatch.setattr(methods, "unlearn", unlearn)
    monkeypatch.setattr(methods, "nll", counted)
    one = example["served"].Served(model, tokenizer, attachment=attachment, masks=[mask_of(attachment, 8)])
    (splice,) = attachment.bottlenecks.values()
    codes = splice.codebook_sha256()
    texts = [entry["question"] for entry in given], [entry["answer"] for entry in given]
    before, whole = one.probability(*texts), dict(model.named_parameters())
    was = {name: weight.detach().clone() for name, weight in whole.items()}
    weights = tampering.relearn(one, given[::2], seed=0)
    assert len(asked) == 9 and asked[-1] > asked[0], "something was deleted while it trained"
    assert len(seen["rows"]) == 9 * methods.BATCH and seen["learning_rate"] == 3e-3 and seen["epochs"] == [1]
    assert {row["prompt"] for row in seen["rows"]} == {entry["question"] for entry in given[::2]}
    assert set(weights) == {name for name in whole if "codebook_bottleneck" not in name} < set(whole)
    assert splice.codebook_sha256() == codes
    after = one.probability(*texts)
    assert (after[::2] > before[::2]).all()
    for layer in (0, 2):  # below the codes and above
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert not torch.equal(weights[name], was[name])


def test_states_where_an_answers_tokens_are_chosen(example, tiny, monkeypatch):
    tampering, (model, tokenizer) = example["tampering"], tiny
    monkeypatch.setattr(tampering, "PROBED", (0, 1))
    monkeypatch.setattr(tampering, "BATCH", 4)
    given = forgetting.entries(5)
    left, final, tokens = tampering.states(example["served"].Served(model, tokenizer), given)
    hidden, last, said = [], [], []
    for entry in given:
        prompt = tokenizer(entry["question"])["input_ids"]
        answer = [*tokenizer(entry["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            out = model.model(torch.tensor([prompt + answer]), output_hidden_states=True)
        hidden.append(torch.stack(out.hidden_states[1:3])[:, 0, len(prompt) - 1 : -1])
        last.append(out.last_hidden_state[0, len(prompt) - 1 : -1])
        said += answer
    assert tokens.tolist() == said
    torch.testing.assert_close(left, torch.cat(hidden, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(final, torch.cat(last), atol=1e-5, rtol=1e-4)


def test_a_probe_reads_what_a_layer_still_holds(example, tiny, monkeypatch):
    """It is fitted to what stays. Of ten forgotten tokens one layer holds six, the other none."""
    tampering, (model, tokenizer) = example["tampering"], tiny
    draw, words = torch.Generator().manual_seed(0), model.lm_head.weight.detach()
    turn = torch.randn(32, 32, generator=draw)

    def made(tokens: torch.Tensor, held: torch.Tensor) -> tuple:
        noise = torch.randn(len(tokens), 32, generator=draw)
        return torch.stack([1e3 * words[held] @ turn, noise]), words[tokens], tokens

    known = torch.randint(0, len(words), (400,), generator=draw)
    asked = torch.arange(3, 13)
    held = torch.cat([asked[:6], asked[6:] + 7])
    given = {"known": made(known, known), "forgotten": made(asked, held)}
    monkeypatch.setattr(tampering, "states", lambda _, entries: given[entries])
    first, second = tampering.reading(example["served"].Served(model, tokenizer), "known", "forgotten")
    assert first == 0.6 and second < 0.4


# -- the whole, in small ------------------------------------------------------------------------------------------


@heavy
def test_every_method_is_attacked_once(example, tmp_path, monkeypatch, capsys):
    where = forgetting.small(example, tmp_path, monkeypatch)
    attacks, tampering, disguises = (example[name] for name in ("attacks", "tampering", "disguises"))
    (tmp_path / "test.txt").write_text(" ".join(WORDS * 60))
    for module, name, value in (
        (tampering, "RELEARN_STEPS", 2), (tampering, "GROUP", 16), (tampering, "NOISE_LAYERS", (0, 1)),
        (tampering, "PROBED", (1, 2)), (disguises, "LENGTHS", (5,)), (disguises, "BEGUN", 2), (example["served"], "NEW_TOKENS", 3),
        (attacks, "PROBE_ROWS", 8), (tampering, "RELEARN_RATE", 1e-2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    results, output = tmp_path / "out" / "results.csv", tmp_path / "attacks.csv"
    example["study"].main([*where, "--retain-rows", "4", "--output", str(results)])
    of_study = {path: path.stat().st_mtime_ns for path in results.parent.rglob("*")}
    given = [*where, "--results", str(results), "--output", str(output)]
    kept = results.with_name("icu-forget01-0")
    kept.rename(tmp_path / "elsewhere")
    attacks.main(given)
    assert "icu: not there yet" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(kept)

    def table(path) -> list[dict[str, str]]:
        with path.open() as stream:
            return list(csv.DictReader(stream))

    rows = table(output)
    methods = [row["method"] for row in table(results) if not row["method"].endswith("as it answers")]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    assert [(row["method"], row["attack"]) for row in rows] == [(m, a) for m in methods if m != "icu" for a in names]
    assert {"plain", "german frame", "5 tokens after", "biography", "few-shot", "audit", "relearned", "4 bits"} < set(
        names
    )
    assert {"noise 0.1 at layer 0", "probe at layer 2"} < set(names) and "french" not in names
    by = {(row["method"], row["attack"]): row for row in rows}
    for (method, attack), row in by.items():
        if attack.startswith("probe"):
            assert 0 <= float(row["read"]) <= 1 and not row["probability"]
            continue
        assert 0 < float(row["probability"]) < 1 and int(row["rows"]) > 1
        coded = method.startswith(("delta", "random", "farrell", "dsg"))
        assert bool(row["fires"]) == coded and bool(row["rouge"]) == (attack in attacks.SPOKEN)
        if coded:
            assert 0 <= float(row["fires"]) <= float(row["fires_answered"]) <= 1
            assert float(row["fires"]) == 1 or method not in ("delta topk", "delta codebook", "farrell")
    assert float(by["none", "plain"]["probability"]) == pytest.approx(
        float(next(row for row in table(results) if row["method"] == "none")["forget_probability"]), rel=1e-2
    )
    for attack in ("plain", "relearned"):
        told = {row["probability"] for (_, name), row in by.items() if name == attack}
        assert len(told) > len(methods) / 2
    for attack in ("paraphrased", "relearned", "4 bits", "noise 0.1 at layer 0"):
        assert by["none", attack]["probability"] != by["none", "plain"]["probability"]
    assert {path: path.stat().st_mtime_ns for path in results.parent.rglob("*")} == of_study

    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:-2]))  # cut off
    attacks.main([*given, "--methods", ",".join([attacks.short(methods[-1]), "npo"]), "--attacks", ",".join(names)])
    again = table(output)
    assert len(again) == len(rows) and all(
        {**row, "seconds": ""} == {**was, "seconds": ""} for row, was in zip(again, rows)
    )
    with pytest.raises(SystemExit):
        attacks.main([*given, "--attacks", "plane"])
    assert "--attacks has 'plane'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        attacks.main([*given, "--methods", "no"])
