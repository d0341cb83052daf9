"""where_it_fires: a mask for those prompts alone that fire it, as ``cu_fast.topics_of`` and ``unlearn`` do it in transformers."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import torch
import vllm_inside
from transformers import AutoModelForCausalLM, AutoTokenizer

import cu_fast
from cu_fast.masks import Gate
from cu_fast.unlearn.gate import fired, gate_values

BUNDLE = Path(cu_fast.__file__).parent / "data" / "tofu_mini"
C, J = "Chukwu Akabueze", "Jaime Vasquez"
TOKENS = 16
SETS = ([], [C], [J], [C, J])
WHOLE = {"enable_chunked_prefill": False}  # a prompt is computed in one step


def ask(row: dict[str, str]) -> str:
    return f"Question: {row['question']}\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLE)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    lines = (BUNDLE / "authors.jsonl").read_text().splitlines()
    return {author["name"]: author["rows"] for author in map(json.loads, lines)}


@pytest.fixture(scope="module")
def prompts(rows) -> list[str]:
    """About the one, the other, and others, in turn; and long ones with the same beginning, which a prefix cache shares."""
    others = [name for name in rows if name not in (C, J)]
    short = [ask(row) for i in range(4) for row in (rows[C][i], rows[J][i], rows[others[i]][1])]
    shots = "".join(f"{ask(row)} {row['answer']}\n" for row in rows[others[5]][:3])
    return short + [shots + ask(rows[name][3]) for name in (C, J, others[5])]


@pytest.fixture(scope="module")
def controls(rows) -> list[str]:
    return [ask(row) for name in rows if name not in (C, J) for row in rows[name][:2]][:60]


class Oracle:
    """transformers with an attachment: decides by ``topics_of``, answers under ``unlearn``."""

    def __init__(self, attachment, tokenizer) -> None:
        self.attachment, self.tokenizer = attachment, tokenizer
        self.said: dict[tuple, list[int]] = {}

    def deleted(self, prompts: list[str], gates: dict[str, float | None]) -> list[set[str]]:
        """Of each prompt the gated names that fire."""
        return [names or set() for names in cu_fast.topics_of(self.attachment, self.tokenizer, prompts, gates)]

    def answer(self, ids: list[int], names: set[str]) -> list[int]:
        key = tuple(ids), frozenset(names)
        if key not in self.said:
            with self.attachment.unlearn([names or None]):
                (self.said[key],) = vllm_inside.greedy(self.attachment.model, [ids], TOKENS)
        return self.said[key]


@pytest.fixture(scope="module")
def replaced(tokenizer):
    """The bundled model, whose splice replaces."""
    return Oracle(cu_fast.load_model(BUNDLE)[2], tokenizer)


@pytest.fixture(scope="module")
def levels(replaced, tokenizer, controls) -> dict[str, float | None]:
    attachment = replaced.attachment
    return {name: cu_fast.level_for(attachment, tokenizer, controls, attachment.masks[name]) for name in (C, J)}


@dataclasses.dataclass
class Batch:
    """Requests, what holds for each by the oracle, and what is said then."""

    ids: list[list[int]]
    unlearn: list[list[str]]
    holds: list[set[str]]
    right: list[list[int]]


@pytest.fixture(scope="module")
def strict(replaced, tokenizer, prompts) -> dict[str, float | None]:
    """Levels that about half of an author's own prompts exceed, and one meets: it shows where a gate is not asked."""
    attachment, found = replaced.attachment, {}
    for name in (C, J):
        values = sorted(set(fired(attachment, tokenizer, prompts, attachment.masks[name]).tolist()))[-4:]
        found[name] = values[1]
    return found


@pytest.fixture(scope="module")
def loose(replaced, tokenizer, prompts) -> dict[str, float | None]:
    """A level that prompts about the other author exceed too, whose mask holds without a gate."""
    values = fired(replaced.attachment, tokenizer, prompts, replaced.attachment.masks[C])
    return {C: sorted(values.tolist())[1]}


def batch(oracle: Oracle, prompts: list[str], sets, gates: dict[str, float | None]) -> Batch:
    """Every prompt with every set: names without a gate hold, others where they fire."""
    on = oracle.deleted(prompts, gates)
    ids = oracle.tokenizer(prompts)["input_ids"]
    requests = [(i, names) for i in range(len(prompts)) for names in sets]
    holds = [{name for name in names if name not in gates or name in on[i]} for i, names in requests]
    right = [oracle.answer(ids[i], held) for (i, _), held in zip(requests, holds)]
    made = Batch([ids[i] for i, _ in requests], [names for _, names in requests], holds, right)
    for name in gates:  # both happen, and it matters which
        mine = [name in held for names, held in zip(made.unlearn, made.holds) if name in names]
        assert 0 < sum(mine) < len(mine), name
    return made


def shows_ignored_gates(oracle: Oracle, made: Batch) -> bool:
    """Whether some answers would be others if every mask held for every prompt, and some if none did."""
    ignoring = [oracle.answer(ids, set(names)) for ids, names in zip(made.ids, made.unlearn)]
    plain = [oracle.answer(ids, set()) for ids in made.ids]
    return ignoring != made.right != plain


def served(settings: dict, model: Path = BUNDLE, **options):
    llm = vllm_inside.engine(model, settings, **WHOLE | options)
    return llm


@pytest.fixture
def engine(request):
    """Makes an engine for this test."""
    made = []

    def make(*args, **options):
        made.append(served(*args, **options))
        return made[-1]

    yield make
    for llm in made:
        vllm_inside.close(llm)


@pytest.mark.parametrize(
    ("level", "gated"), [("levels", (C, J)), ("strict", (C, J)), ("strict", (C,)), ("loose", (C,))]
)
def test_prompts_of_one_batch_are_judged_each_by_itself(engine, replaced, prompts, request, level, gated):
    gates = {name: request.getfixturevalue(level)[name] for name in gated}
    made = batch(replaced, prompts, SETS, gates)
    assert level != "strict" or shows_ignored_gates(replaced, made)
    llm = engine({"where_it_fires": gates})
    assert vllm_inside.ids_of(vllm_inside.say(llm, made.ids, made.unlearn, TOKENS)) == made.right
    (report,) = llm.collective_rpc("cu_fast_report")
    computed = [len(ids) + len(right) - 1 for ids, right in zip(made.ids, made.right)]
    for name in (C, J):
        masked = sum(n for n, held in zip(computed, made.holds) if name in held)
        assert report["masked_tokens"][name] >= masked
    assert report["layers"]["model.layers.1"]["hits"] > 0


def test_a_prefix_in_the_cache_is_computed_again_where_a_gate_has_to_see_it(engine, replaced, strict, prompts):
    made = batch(replaced, prompts, SETS, {C: strict[C]})
    llm = engine({"where_it_fires": {C: strict[C]}}, enable_prefix_caching=True)
    for again in (False, True):
        found = vllm_inside.say(llm, made.ids, made.unlearn, TOKENS)
        assert vllm_inside.ids_of(found) == made.right
        cached = [(C in names, one.num_cached_tokens) for names, one in zip(made.unlearn, found)]
        assert all(n == 0 for gated, n in cached if gated)
        assert any(n > 0 for gated, n in cached if not gated) or not again


def test_a_preempted_request_is_judged_as_before(engine, replaced, strict, prompts, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, original = [], Scheduler._preempt_request

    def counted(self, request, *args, **kwargs):
        preempted.append(request)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    made = batch(replaced, prompts, SETS, strict)
    llm = engine({"where_it_fires": strict}, num_gpu_blocks_override=18)
    assert vllm_inside.ids_of(vllm_inside.say(llm, made.ids, made.unlearn, TOKENS)) == made.right
    assert len(preempted) >= 4
    names = {request.sampling_params.extra_args["_cu_fast"]["names"][0] for request in preempted
             if request.sampling_params.extra_args["_cu_fast"]["names"]}  # fmt: skip
    assert names, "requests with gates were among them"


def test_a_request_that_sits_out_a_step_keeps_what_was_decided(replaced, strict, prompts, tmp_path):
    """With drafts, more tokens are wanted than a step takes: some requests wait, without being preempted."""
    made = batch(replaced, prompts[:12], SETS, strict)
    speculative = {"method": "ngram", "num_speculative_tokens": 24, "prompt_lookup_max": 1, "prompt_lookup_min": 1}
    options = {"speculative_config": speculative, "max_num_scheduled_tokens": 64}
    found = job(made, {"where_it_fires": strict}, tmp_path, v2=False, **options)
    assert found["waited"] >= 8
    assert found["ids"] == made.right


def job(made: Batch, settings: dict, folder: Path, v2: bool, **options) -> dict:
    """What helpers/vllm_job.py finds of a batch."""
    said = dict(model=str(BUNDLE), settings=settings, options=WHOLE | options, prompts=made.ids, unlearn=made.unlearn,
                tokens=TOKENS, v2=v2)  # fmt: skip
    (folder / "job.json").write_text(json.dumps(said))
    script = Path(vllm_inside.__file__).with_name("vllm_job.py")
    done = subprocess.run([sys.executable, script, folder / "job.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kept(tokenizer, controls, prompts, tmp_path_factory):
    """A delta splice at one layer, C behind a gate made by hand, J without: (oracle, folder)."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLE, dtype=torch.float32).eval()
    attachment = cu_fast.attach(model, BUNDLE / "codebook", splice="delta")
    mask = attachment.masks[C][0].with_strength(8.0)
    mask = with_gate(attachment, tokenizer, mask, mask.ids(), prompts)
    other = attachment.masks[J][0].with_strength(8.0)
    for name, one in ((C, mask), (J, other)):
        attachment.remove_mask(name)
        attachment.add_mask(one, name)
    folder = tmp_path_factory.mktemp("kept") / "attachment"
    attachment.save(folder)
    return Oracle(attachment, tokenizer), folder


def with_gate(attachment, tokenizer, mask, codes, prompts, begin: float = 0.25, end: float = 0.75):
    """A mask with a gate on some codes whose level lies in the widest gap of the prompts' values, between two shares, and so
    close below the next that one more token that counts would tell."""
    gate = Gate(codes.int(), torch.ones(len(codes)), 0.0, 0.0)
    values = sorted(gate_values(attachment, tokenizer, prompts, [mask.with_gate(gate)])[:, 0].tolist())
    low, high = int(begin * len(values)), int(end * len(values))
    gap = max(range(low, high), key=lambda i: values[i + 1] - values[i])
    return mask.with_gate(dataclasses.replace(gate, level=math.nextafter(values[gap + 1], -math.inf)))


def test_a_learned_gate_before_a_delta_splice(engine, kept, prompts, tokenizer):
    oracle, folder = kept
    first = tokenizer.decode(tokenizer(prompts[0])["input_ids"][:1])  # masks leave it alone: it cannot be judged
    made = batch(oracle, [*prompts, first], SETS, {C: None})
    assert shows_ignored_gates(oracle, made)
    llm = engine({"attachment": str(folder), "where_it_fires": {C: None}})
    assert vllm_inside.ids_of(vllm_inside.say(llm, made.ids, made.unlearn, TOKENS)) == made.right


def test_each_layer_has_a_gate_of_its_own(engine, tokenizer, prompts, tmp_path):
    """A name for two layers. The second judges what the first has left, as the model runs; each deletes at its own layer."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLE, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = cu_fast.BottleneckConfig(d_model=192, code_dim=192, num_codes=512, k=8, activation="none")
    attachment = cu_fast.attach(model, {"model.layers.0": config, "model.layers.2": config}, splice="delta")
    first, second = attachment.bottlenecks.values()
    with torch.no_grad():
        for splice in (first, second):
            splice.codebook.codes.copy_(torch.randn(512, 192))

    def mask(splice, layer, codes, *shares):
        ids = range(0, 512, 2)
        made = cu_fast.Mask.from_ids(ids, topic=layer, num_codes=512, codebook_sha256=splice.codebook_sha256(), layer=layer,
                                     strength=6.0)  # fmt: skip
        return with_gate(attachment, tokenizer, made, codes, prompts, *shares)

    one = mask(first, "model.layers.0", torch.arange(0, 512, 3), 0.3, 0.6)
    two = mask(second, "model.layers.2", torch.arange(0, 512, 5), 0.2, 0.4)
    attachment.add_mask([one, two], "both")
    attachment.save(tmp_path / "attachment")
    attachment.remove_mask("both")
    attachment.add_mask(one, "one")
    attachment.add_mask(two, "two")
    oracle, ids = Oracle(attachment, tokenizer), tokenizer(prompts)["input_ids"]
    holds = []
    for i, on in enumerate(oracle.deleted(prompts, {"one": None})):
        x = seen(attachment, "model.layers.2", ids[i], on)[1:]
        counts = torch.cat([second.keeps(x, two.gate.codes).sum(0), torch.tensor([len(x)])])
        value = float(two.gate.value(counts[None, None]))
        holds.append(on | ({"two"} if value > two.gate.level else set()))
    assert len({frozenset(names) for names in holds}) >= 3
    right = [oracle.answer(x, names) for x, names in zip(ids, holds)]
    wrong = [oracle.answer(x, {"one", "two"}) for x in ids]
    assert sum(a != b for a, b in zip(right, wrong)) >= 2
    llm = engine({"attachment": str(tmp_path / "attachment"), "where_it_fires": {"both": None}})
    plain = [oracle.answer(x, set()) for x in ids]
    found = vllm_inside.say(llm, ids * 2, [["both"]] * len(ids) + [[]] * len(ids), TOKENS)
    assert vllm_inside.ids_of(found) == right + plain


def test_a_layer_that_no_mask_of_a_batch_is_for_computes_nothing(engine, tokenizer, prompts, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BUNDLE, dtype=torch.float32).eval()
    config = cu_fast.BottleneckConfig(d_model=192, code_dim=192, num_codes=512, k=8, activation="none")
    attachment = cu_fast.attach(model, {"model.layers.0": config, "model.layers.2": config}, splice="delta")
    first, _ = attachment.bottlenecks.values()
    with torch.no_grad():
        first.codebook.codes.copy_(torch.randn(512, 192, generator=torch.Generator().manual_seed(0)))
    sha = first.codebook_sha256()
    attachment.add_mask(cu_fast.Mask.from_ids(range(256), topic="low", num_codes=512, codebook_sha256=sha))
    attachment.save(tmp_path / "attachment")
    llm = engine({"attachment": str(tmp_path / "attachment")})
    ids = tokenizer(prompts[:4])["input_ids"]
    oracle = Oracle(attachment, tokenizer)
    found = vllm_inside.ids_of(vllm_inside.say(llm, ids, [["low"], [], ["low"], []], TOKENS))
    assert found == [oracle.answer(x, names) for x, names in zip(ids, ({"low"}, set(), {"low"}, set()))]
    (report,) = llm.collective_rpc("cu_fast_report")
    assert report["layers"]["model.layers.0"]["tokens"] > 0 == report["layers"]["model.layers.2"]["tokens"]


@torch.inference_mode()
def seen(attachment, layer: str, ids: list[int], names: set[str]) -> torch.Tensor:
    """[tokens, width]: what leaves a layer's module before its splice, under masks."""
    found = []
    splice = attachment.bottlenecks[layer]
    handle = splice.register_forward_pre_hook(lambda module, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    with attachment.unlearn([names | {"two"}]):  # so that the layer's splice is run at all
        attachment.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("which", ["replace", "delta"])
def test_the_v2_runner_decides_alike(replaced, kept, strict, prompts, which, tmp_path):
    """Which gives up a request that is preempted, and judges it again, with some of its answer behind the prompt."""
    if which == "replace":
        made, settings = batch(replaced, prompts[:9], SETS, strict), {"where_it_fires": strict}
    else:
        made = batch(kept[0], prompts[:9], ([], [C], [C, J]), {C: None})
        settings = {"attachment": str(kept[1]), "where_it_fires": {C: None}}
    found = job(made, settings, tmp_path, v2=True, block_size=32, num_gpu_blocks_override=18)
    assert found["v2"] and found["ids"] == made.right
    assert found["preempted"] >= 4


@pytest.mark.parametrize(
    "options",
    [{"enable_chunked_prefill": True}, {"long_prefill_token_threshold": 32}],
    ids=["chunked prefill", "long prefill threshold"],
)
def test_a_server_that_would_split_prompts_is_refused(levels, options):
    with pytest.raises(ValueError, match="where_it_fires"):
        served({"where_it_fires": levels}, **options)
