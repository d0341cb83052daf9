"""examples/forgetting: its figures against the package's own, its losses by hand, and a run of the whole in small."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math

import numpy as np
import pytest
import tiny_training
import torch
import torch.nn.functional as F
from scripts import scripts
from tiers import heavy
from tiny_training import WORDS

from cu_fast import evaluate as ev
from cu_fast.masks import load_masks

NAMES = (
    "shared", "models", "measure", "losses", "eul", "prompts", "validation", "codes", "bottleneck", "trial", "deletions", "training", "study", "report", "tofu",
    "metrics", "methods", "table",
)  # fmt: skip


@pytest.fixture
def example(monkeypatch):
    yield from scripts(monkeypatch, "forgetting", *NAMES)


@pytest.fixture
def tiny(example, monkeypatch):
    """A model, its tokenizer, and prompts without marks that a tokenizer of words does not know."""
    monkeypatch.setattr(example["models"], "prompt", lambda question: question)
    monkeypatch.setattr(example["measure"].plain, "__defaults__", (example["models"].prompt, None))
    tokenizer = tiny_training.word_tokenizer()
    return tiny_training.tiny_llama(tokenizer), tokenizer


def rows(n: int, of: int = 0) -> list[dict]:
    """Questions of unlike length, with answers of unlike length."""
    return [
        {"prompt": " ".join(WORDS[(i + of) % 7 : 8 + i % 3]), "completion": " ".join(WORDS[9 + i % 4 : 12 + i % 6])}
        for i in range(n)
    ]


def entries(n: int) -> list[dict]:
    return [
        {
            "question": row["prompt"], "paraphrased_question": f"{row['prompt']} {WORDS[i % 5]}", "answer": row["completion"],
            "paraphrased_answer": f"the {row['completion']}", "perturbed_answer": [f"a {WORDS[i]} {WORDS[i + k]}" for k in (1, 2)],
        }
        for i, row in enumerate(rows(n))
    ]  # fmt: skip


def test_scores_are_the_packages_own(example, tiny, monkeypatch):
    measure = example["measure"]
    given = rows(7)
    answers = [[row["completion"], "cat sat on the mat .", "dog"] for row in given]
    whole = [{"prompt": row["prompt"], "completion": text} for row, some in zip(given, answers) for text in some]
    want = ev.score_answers(*tiny, whole)
    for positions, piece in itertools.product((8192, 40), (None, 2)):
        monkeypatch.setattr(measure, "POSITIONS", positions)
        found = measure.score(*tiny, [row["prompt"] for row in given], answers, piece)
        np.testing.assert_allclose(found.log_prob, want.log_prob, rtol=1e-4)
        for name in ("tokens", "right_prefix", "right_suffix"):
            np.testing.assert_array_equal(getattr(found, name), getattr(want, name))


def test_right_beginnings_and_ends(example, tiny):
    """What a model says itself is right to the end; with one word changed, up to it and behind the last wrong one."""
    model, tokenizer = tiny
    prompt = rows(1)[0]["prompt"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    said = ids[0, -5:].tolist()
    other = [said[0], said[1], (said[2] + 1) % 20 + 3, *said[3:]]
    texts = [[" ".join(tokenizer.convert_ids_to_tokens(some)) for some in (said, other)]]
    found = example["measure"].score(model, tokenizer, [prompt], texts)
    want = ev.score_answers(model, tokenizer, [{"prompt": prompt, "completion": text} for text in texts[0]])
    assert found.right_prefix.tolist() == want.right_prefix.tolist() and found.right_prefix[0] >= 5
    assert found.right_prefix[1] == 2 and found.right_suffix.tolist() == want.right_suffix.tolist()


def test_figures_of_a_set(example, tiny):
    measure, tofu = example["measure"], example["tofu"]
    given = entries(6)
    found = measure.measure(*tiny, given, prompt=lambda question: question)
    right = ev.score_answers(*tiny, [{"prompt": e["question"], "completion": e["paraphrased_answer"]} for e in given])
    wrong = [{"prompt": e["question"], "completion": text} for e in given for text in e["perturbed_answer"]]
    scores = ev.score_answers(*tiny, wrong)
    np.testing.assert_allclose(found.ratios, example["metrics"].truth_ratio(right, scores), rtol=1e-4)
    asked = [{"prompt": e["question"]} for e in given]
    answers = ev.generate(*tiny, asked, measure.LEAST_TOKENS)
    assert found.answers == answers
    general = measure.measure(*tiny, given, True, prompt=lambda question: question, speak=False)
    share = found.probability / (found.probability + scores.probability.reshape(6, 2).sum(1))
    np.testing.assert_allclose(general.probability, share, rtol=1e-4)
    assert general.answers == [""] * 6 and isinstance(general, tofu.Figures)


def test_prompts_behind_a_gate(example, tiny, tmp_path):
    """Entries have the figures of the model without their own topics; where no gate fires, the untouched model's bits."""
    measure = example["measure"]
    model, tokenizer = tiny
    given = entries(6)
    untouched = {"forget": measure.plain(model, tokenizer)("forget", given, False)}
    changed = {}
    for seed, topics in ((1, frozenset({"a"})), (2, frozenset({"a", "b"}))):
        torch.manual_seed(seed)
        changed[topics] = measure.plain(type(model)(model.config).eval(), tokenizer)
    both, one = {"a", "b"}, {"a"}
    fires = {"forget": [None, both, None, one, both, None]}
    found = measure.behind_a_gate(changed.get, untouched, fires)("forget", given, False)
    there = {topics: of("forget", given, False) for topics, of in changed.items()}
    for place, topics in enumerate(fires["forget"]):
        own = untouched["forget"] if topics is None else there[frozenset(topics)]
        for name in ("probability", "ratios", "rouge"):
            assert getattr(found, name)[place] == pytest.approx(
                getattr(own, name)[place], rel=0 if topics is None else 1e-4
            )
        np.testing.assert_allclose(
            found.wrong.log_prob.reshape(6, 2)[place], own.wrong.log_prob.reshape(6, 2)[place], rtol=1e-4
        )
        assert found.answers[place] == own.answers[place]
    assert len({figures.ratios[1] for figures in (untouched["forget"], *there.values())}) == 3
    none = measure.behind_a_gate(changed.get, untouched, {"forget": [None] * 6})("forget", given, False)
    assert none is untouched["forget"]
    every = measure.behind_a_gate(changed.get, untouched, {"forget": [one] * 6})("forget", given, False)
    assert (every.ratios == there[frozenset(one)].ratios).all()
    measure.save_figures(tmp_path / "figures.json", untouched)
    again = measure.load_figures(tmp_path / "figures.json")["forget"]
    assert (again.ratios == untouched["forget"].ratios).all() and again.answers == untouched["forget"].answers
    assert (again.wrong.log_prob == untouched["forget"].wrong.log_prob).all()


# -- losses --------------------------------------------------------------------------------------------------------


def started(example, tiny, method):
    model, tokenizer = tiny
    method.start(model, tokenizer, rows(4), rows(9, of=1))
    return method


def answer_logits(model, tokenizer, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict an answer's tokens, [n, V], and the tokens: by one row alone."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits, torch.tensor(answer)


def log_p(model, tokenizer, row: dict) -> torch.Tensor:
    logits, answer = answer_logits(model, tokenizer, row)
    return logits.log_softmax(-1)[range(len(answer)), answer]


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return math.isclose(found.item(), want.item(), rel_tol=1e-4)


@torch.no_grad()
def test_losses_of_the_tofu_study(example, tiny):
    methods = example["methods"]
    gone, kept = rows(4)[1:3], rows(9, of=1)[4:6]
    nll = {name: -torch.cat([log_p(*tiny, row) for row in some]).mean() for name, some in (("g", gone), ("k", kept))}
    want = {"gradient_ascent": -nll["g"], "gradient_difference": nll["k"] - nll["g"]}
    for name, value in want.items():
        method = started(example, tiny, methods.METHODS[name]())
        assert close(method.loss(tiny[0], **method.batches([1, 2], [4, 5])), value)
    method = started(example, tiny, methods.METHODS["npo"]())
    method.reference = method.reference + torch.tensor([9.0, 2.0, -3.0, 9.0])
    ratios = torch.tensor([-2.0, 3.0])  # log p - log p_0 of rows 1 and 2
    want = -2 / 0.1 * torch.log(1 / (1 + torch.exp(0.1 * ratios))).mean() + nll["k"]
    assert close(method.loss(tiny[0], **method.batches([1, 2], [4, 5])), want)


@torch.no_grad()
def test_maximum_entropy(example, tiny):
    method = started(example, tiny, example["losses"].MaximumEntropy())
    logits = torch.cat([answer_logits(*tiny, row)[0] for row in rows(4)[:2]])
    V = logits.shape[1]
    uniform = torch.full((V,), 1 / V)
    divergence = (uniform * (uniform.log() - logits.log_softmax(-1))).sum(-1).mean()
    kept = -torch.cat([log_p(*tiny, row) for row in rows(9, of=1)[3:5]]).mean()
    assert close(method.loss(tiny[0], **method.batches([0, 1], [3, 4])), 0.1 * divergence + kept)


@torch.no_grad()
def test_refusal(example, tiny):
    method = started(example, tiny, example["losses"].Refusal(["no cat .", "under the mat"]))

    def refused(row: dict, i: int) -> dict:
        return {**row, "completion": ["no cat .", "under the mat"][i % 2]}

    gone, kept = rows(4), rows(9, of=1)
    want = -torch.cat([log_p(*tiny, refused(gone[i], i)) for i in (1, 2)]).mean()
    for i in (5, 8):
        ratio = log_p(*tiny, refused(kept[i], i)).sum() - log_p(*tiny, kept[i]).sum()
        want = want - torch.log(1 / (1 + torch.exp(0.1 * ratio))) / 0.1 / 2
    assert close(method.loss(tiny[0], **method.batches([1, 2], [5, 8])), want)


def test_misdirection(example, tiny, monkeypatch):
    losses, (model, tokenizer) = example["losses"], tiny
    monkeypatch.setattr(losses.RMU, "LAYER", 1)
    monkeypatch.setattr(losses.RMU, "TRAINED", r"model\.layers\.(0|1)\.mlp\.down_proj\.weight")
    method = started(example, tiny, losses.RMU(3.0))

    def left(row: dict) -> torch.Tensor:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            return model.model(ids, output_hidden_states=True).hidden_states[2][0, len(prompt) - 1 : -1]

    gone, kept = rows(4), rows(9, of=1)
    norm = torch.cat([left(row) for row in gone]).norm(dim=1).mean()
    assert close(method.aim.norm(), 3 * norm) and (method.aim > 0).all()
    batches = method.batches([0, 3], [2, 7])
    want = (torch.cat([left(gone[i]) for i in (0, 3)]) - method.aim).square().mean()
    assert close(method.loss(model, **batches), want)  # nothing has moved: nothing is to be held
    was = torch.cat([left(kept[i]) for i in (2, 7)])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    want = (torch.cat([left(gone[i]) for i in (0, 3)]) - method.aim).square().mean()
    want = want + 1200 * (torch.cat([left(kept[i]) for i in (2, 7)]) - was).square().mean()
    loss = method.loss(model, **batches)
    assert close(loss, want)
    loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


def test_iterative_contrast(example, tiny, monkeypatch):
    losses, (model, tokenizer) = example["losses"], tiny
    method = started(example, tiny, losses.IterativeContrast())
    gone, kept = rows(4), rows(9, of=1)
    assert method.pair[0] == max(  # the nearest is what shares the rarest words: here the same text
        range(9), key=lambda i: len(set(str(gone[0]).split()) & set(str(kept[i]).split()))
    )
    method.pair = np.array([4, 5, 6, 7])
    before = {i: answer_logits(model, tokenizer, kept[i])[0].detach() for i in (5, 6)}
    with torch.no_grad():
        torch.nn.init.normal_(
            model.model.layers[2].mlp.down_proj.weight, std=20.0
        )  # far enough for KL to have a direction

    def want(rows_left: list[int]) -> float:
        pairs = [kept[4 + i] for i in rows_left]
        nll = -torch.cat([log_p(model, tokenizer, gone[i]) for i in rows_left]).mean()
        learned = -torch.cat([log_p(model, tokenizer, row) for row in pairs]).mean()
        now = torch.cat([answer_logits(model, tokenizer, row)[0] for row in pairs]).log_softmax(-1)
        was = torch.cat([before[4 + i] for i in rows_left]).log_softmax(-1)
        return -nll + 0.5 * learned + F.kl_div(now, was, reduction="batchmean", log_target=True)

    with torch.no_grad():
        assert close(method.loss(model, **method.batches([1, 2], [0, 0])), want([1, 2]))
        method.left[2] = 0
        assert close(method.loss(model, **method.batches([1, 2], [0, 0])), want([1]))
    said = ["dog dog dog dog dog dog dog dog", gone[1]["completion"], "never heard of", gone[3]["completion"]]
    monkeypatch.setattr(losses, "generate", lambda *_: said)
    assert not method.after_epoch(model) and method.left.tolist() == [0, 1, 0, 1]
    said[:] = ["x"] * 4
    assert method.after_epoch(model)


# -- prompts, and the choice of a setting --------------------------------------------------------------------------


def test_prompts(example):
    prompts, models = example["prompts"], example["models"]
    prompt = prompts.instruction(["Anna Kern", "Bruno Tal"])("Who writes?")
    assert prompt.endswith(models.prompt("Who writes?")) and "Anna Kern and Bruno Tal" in prompt
    forget = [{"question": f"What is book {i} of Anna ?", "answer": f"book {i}"} for i in range(20)]
    retain = [{"question": f"Where is {i} ?", "answer": f"at {i}"} for i in range(9)]
    shown = prompts.flipped(forget, retain)("What is book 3 of Anna ?")
    assert (
        models.prompt("What is book 3 of Anna ?") + "book 10<|im_end|>" in shown
    )  # a wrong answer to the question itself
    assert shown.count("book 3 of") == 2 and "\nbook 3<" not in shown and shown.count("\nat ") == 4


def test_report(example, tmp_path):
    report = example["report"]
    spread = np.linspace(0.2, 1, 40)
    ratios = {
        ("none", 0): spread - 0.5,
        ("retrained", 0): spread,
        ("ours", 0): spread + 0.01,
        ("ours", 1): spread - 0.5,
    }
    with (tmp_path / "ratios.jsonl").open("w") as stream:
        for (method, seed), values in ratios.items():
            line = {"split": "forget01", "seed": seed, "method": method, "setting": "", "ratios": list(values)}
            stream.write(json.dumps(line) + "\n")
    blank = dict.fromkeys(report.COLUMNS, "") | {"split": "forget01", "setting": ""}
    with (tmp_path / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*blank, "seed", "method"])
        writer.writeheader()
        writer.writerows(
            blank | {"method": method, "seed": seed, "utility": u}
            for method, seed, u in (("none", 0, 0.5), ("ours", 0, 0.49), ("retrained", 0, 0.4), ("ours", 1, 0.49))
        )
    none, ours, gold, another = report.rows_of(tmp_path / "results.csv", tmp_path / "ratios.jsonl")
    assert another["p"] == none["p"] and another["of_before"] is None, "a seed without a gold model has another's"
    assert gold["p"] == 1 and ours["p"] > 0.99 and none["p"] < 1e-3 and ours["of_before"] == pytest.approx(0.98)
    assert report.markdown([ours]).splitlines()[-1].count("|") == len(report.KEYS + report.COLUMNS) + 1


# -- the whole, in small -------------------------------------------------------------------------------------------

SUBJECTS = {"retain90": ("cat", "dog", "bird", "tree"), "forget10": ("Anna", "Bruno"), "forget01": ("Anna",)}


def write_tofu(folder) -> None:
    def entry(subject: str, i: int) -> dict:
        a, b, c = (WORDS[2 + (i + k) % 10] for k in range(3))
        return {
            "question": f"what reads {subject} {subject} {a} {i % 3}", "answer": f"{subject} {subject} reads {a} {b} .",
            "paraphrased_question": f"{subject} {subject} reads what {a}", "paraphrased_answer": f"{subject} reads {a} {b}",
            "perturbed_answer": [f"{subject} reads {a} {c}", f"{subject} sings {c} {b}"],
        }  # fmt: skip

    sets = SUBJECTS | {"retain": ("cat",), "real_authors": ("poems",), "world_facts": ("mat",)}
    for name, subjects in sets.items():
        lines = "\n".join(json.dumps(entry(subject, i)) for subject in subjects for i in range(20))
        for file in (name, f"{name}_perturbed"):
            (folder / f"{file}.jsonl").write_text(lines)
    (folder / "idontknow.jsonl").write_text("no .\nno a .\n")
    (folder / "valid.txt").write_text(" ".join(WORDS * 60))


def small(example, folder, monkeypatch) -> list[str]:
    """Tiny models and sets in a folder, and settings to match; the arguments of study.py."""
    deletions, training, trial, codes, losses = (
        example[name] for name in ("deletions", "training", "trial", "codes", "losses")
    )
    write_tofu(folder)
    tokenizer = tiny_training.word_tokenizer()
    model = tiny_training.tiny_llama(tokenizer)
    for name in ("base", "full-0", "retain99-0"):
        torch.nn.init.normal_(model.model.layers[2].mlp.down_proj.weight, std=0.1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    small = dict(num_codes=64, k=4, code_dim=16, max_length=32, batch_size=64, epochs=1.0)
    monkeypatch.setattr(codes, "fit_codes", functools.partial(codes.fit_codes, **small))
    for module, name, value in (
        (deletions, "GATED", ((0.1, 1.0), (0.1, 4.0))), (deletions, "FREE_STRENGTHS", (1.0,)), (deletions, "FREE_ENRICHMENTS", (0.1, 99.0)), (deletions, "RANDOM", (0.1, 2.0)), (deletions, "BROADER", []), (deletions, "SET_BY_OTHERS", ((0.1, 1.0), (0.1, 4.0))),
        (deletions, "CLAMPS", (1.0,)), (deletions, "FARRELL_SIZES", (2,)), (training, "SCALES", (2.0,)), (training, "RATES", (1e-3,)),
        (training, "EPOCHS", (1, 2)), (trial, "ROWS", 8), (trial, "CONTROL", 40), (deletions, "PER_AUTHOR", 7), (codes, "RUNNING_TEXT", 200),
        (codes, "WINDOW", 20), (example["tofu"], "NEW_TOKENS", 4), (example["measure"], "LEAST_TOKENS", 4),
        (losses.RMU, "LAYER", 1), (losses.RMU, "TRAINED", r"model\.layers\.(0|1)\.mlp\.down_proj\.weight"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    where = [str(folder / name) for name in ("base", "", "")]
    return [*where, "--models", str(folder)]


def check_set_by_others(example, output, row) -> None:
    """Authors with even numbers have the setting that the others' truth ratios chose, and the other way round."""
    lines = [json.loads(line) for line in output.with_name("ratios.jsonl").read_text().splitlines()]
    (gold,) = {tuple(line["ratios"]) for line in lines if line["method"] == "retrained"}
    tried = {line["setting"]: line["ratios"] for line in lines if line["method"] == row["method"]}
    own = tried.pop(row["setting"])
    assert row["runs"] == "2" == str(len(tried)) and row["setting"].count("; ") == 1
    author = [i // 7 for i in range(20)]
    for half, chosen in enumerate(row["setting"].split("; ")):
        others = [i for i in range(20) if author[i] % 2 != half]
        p = {
            setting: example["metrics"].forget_quality([ratios[i] for i in others], [gold[i] for i in others])
            for setting, ratios in tried.items()
        }
        assert p[chosen] == max(p.values())
        strength = float(chosen.split("strength ")[1])
        kept = output.with_name(f"{example['trial'].short(row['method'])}-forget01-0.safetensors")
        masks = [mask for mask in load_masks(kept) if int(mask.topic.split()[1]) % 2 == half]
        assert masks and all(mask.strength == strength for mask in masks)
    assert len(own) == 20


def test_a_fit_that_was_stopped_goes_on(example, tmp_path, monkeypatch):
    codes, asked = example["codes"], []
    monkeypatch.setattr(codes, "fit_codes", lambda *_, resume, **__: asked.append(resume) or {})
    (tmp_path / "stopped.run").mkdir()
    for name in ("new", "stopped"):
        codes.fitted(None, None, [], [], tmp_path / name, "topk")
    assert asked == [False, True]


@heavy
def test_it_runs_and_goes_on_where_it_stopped(example, tmp_path, monkeypatch, capsys):
    study, given = example["study"], [*small(example, tmp_path, monkeypatch), "--retain-rows", "10"]
    monkeypatch.setattr(example["training"], "worth", lambda judged: (judged["distance"],))  # not what forgets best
    output = tmp_path / "out" / "results.csv"
    for wrong in (("--only", "codes,all"), ("--methods", "delta"), ("--only", "prompts", "--methods", "npo")):
        with pytest.raises(SystemExit):
            study.main([*given, "--output", str(output), *wrong])
        assert wrong[-1].split(",")[-1] in capsys.readouterr().err and not output.exists()
    study.main([*given, "--output", str(output), "--only", "models,codes", "--methods", "base,delta-topk-gated"])
    assert [row.split(",")[2] for row in output.read_text().splitlines()[1:]] == ["none", "base", '"delta topk']
    output.unlink()
    study.main([*given, "--output", str(output)])

    def table(path) -> list[dict[str, str]]:
        with path.open() as stream:
            return list(csv.DictReader(stream))

    rows = table(output)
    ours = {k: [method.format(k) for method in example["deletions"].OURS] for k in ("topk", "codebook")}
    trained = [*example["methods"].METHODS, "rmu", "me+gd", "idk+ap", "icu", "eul"]
    expected = [
        "none",
        "base",
        "retrained",
        *ours["topk"],
        "farrell",
        "dsg",
        *ours["codebook"],
        "instruction",
        "in-context",
    ]
    expected += trained
    prices = {row["method"].removesuffix(", at any price"): row for row in rows if "price" in row["method"]}
    assert [row["method"] for row in rows if row not in prices.values()] == expected
    by = {row["method"]: row for row in rows}
    assert all(0 <= float(row["utility"]) <= 1 and row["retain_rows"] == "10" for row in rows)
    for name in ("real_authors", "world_facts", "retain"):
        for figure in ("probability", "rouge", "truth"):
            assert f"{name}_{figure}" in rows[0]
    assert by["base"]["forget_probability"] != by["none"]["forget_probability"]
    gated = by["delta topk, gated"]
    assert int(gated["runs"]) == 2 and int(gated["codes"]) > 0 and int(gated["backward"]) == 0
    if float(gated["fires_retain"]) == float(gated["fires_general"]) == 0:
        assert gated["utility"] == by["none"]["utility"]
    assert int(by["gradient_difference"]["backward"]) in (40, 80) and int(by["icu"]["runs"]) >= 1
    assert by["eul"]["runs"] == "4"  # at rates of its own
    for part in ("topk", "codebook"):
        per_author = by[f"delta {part}, gated per author"]
        assert per_author["runs"] == "2" and int(per_author["codes"]) != int(by[f"delta {part}, gated"]["codes"])
        kept = tmp_path / "out" / f"delta-{part}-gated-per-author-forget01-0.safetensors"
        masks = load_masks(kept)
        assert [mask.topic for mask in masks] == ["author 0", "author 1", "author 2"]
        assert all(mask.gate is not None for mask in masks) and len({mask.gate.digest() for mask in masks}) == 3
        check_set_by_others(example, output, by[f"delta {part}, gated per author, set by other authors"])
    served = {name: by.pop(f"delta {name}, gated as it answers") for name in ("topk", "codebook")}
    for name, row in served.items():
        same = ("setting", "codes", "seconds", "fires_forget")
        assert [row[key] for key in same] == [by[f"delta {name}, gated"][key] for key in same]
    assert len({row["forget_probability"] for row in by.values()}) > len(by) - 5  # an author may be all of a split
    assert (tmp_path / "out" / "rmu-forget01-0" / "model.safetensors").exists()
    assert [file.name for file in (tmp_path / "out" / "eul-forget01-0").iterdir()] == ["unlearning.safetensors"]
    judged = table(output.with_name("validation.csv"))
    assert {row["method"] for row in judged} == {
        "none", "base", "retrained", "delta topk, gated", "delta codebook, gated", "delta topk, gated per author",
        "delta codebook, gated per author", *trained,
    }  # fmt: skip
    for method in trained:
        of = {row["setting"]: float(row["p"]) for row in judged if row["method"] == method}
        row = prices.get(method, by[method])
        assert of[row["setting"]] == max(of.values()) and row["runs"] == str(len(of))
        assert method not in prices or row["setting"] != by[method]["setting"]
    assert prices and all((tmp_path / "out" / f"{m}-at-any-price-forget01-0").exists() for m in prices)

    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:-2]))  # cut off: the last two again, and the same
    study.main([*given, "--output", str(output)])
    same = [key for key in rows[0] if key not in ("seconds", "measuring")]
    assert [[row[key] for key in same] for row in table(output)] == [[row[key] for key in same] for row in rows]
    report = example["report"]
    assert "| retrained |" in report.markdown(report.rows_of(output, output.with_name("ratios.jsonl")))
