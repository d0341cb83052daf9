"""Servers with other settings: masks for prompts that fire them; faults that ``cu-fast verify`` has to see. Needs vLLM."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm")

import concurrent.futures

from vllm_server import PLACES, UNREAD, C, J, body_with, checks_of, completion, refused, says, serving

from cu_fast.cli import demo


@pytest.fixture(scope="module")
def bundle():
    return demo.load_bundle()


def test_a_mask_for_the_prompts_that_fire_it(tmp_path, bundle):
    ours = next(author for author in bundle.authors if author.name == J).rows[
        :6
    ]  # each fires 0.66 codes per token or more
    others = [author.rows[1] for author in bundle.authors if author.name not in (C, J)][:8]  # these 0.24 or less
    questions = [row["question"] for row in ours + others]
    right = demo.generate(bundle, questions, [J] * 6 + [None] * 8)
    assert right[:6] != demo.generate(bundle, questions, [None] * 14)[:6]
    with serving(tmp_path, "--silent", "none", "--where-it-fires", f"{J}=0.4") as server:

        def ask(question):
            return server.ask("/v1/completions", completion(demo.prompt(question), **says([J])))

        for turn in (1, 2):  # the second time nothing is read that the first one cached
            with concurrent.futures.ThreadPoolExecutor(14) as pool:
                answers = list(pool.map(ask, questions))
            assert [one.texts[0].strip() for one in answers] == [one.strip() for one in right]
            used = [one.json["usage"] for one in answers]
            assert {one["prompt_tokens_details"]["cached_tokens"] for one in used} == {0}
            computed = [one["total_tokens"] - 1 for one in used]  # the last one is only said
            (line,) = [
                one for one in server.ask("/metrics").body.splitlines() if one.startswith("cu_fast:masked_tokens{")
            ]
            assert float(line.rsplit(" ", 1)[1]) == turn * sum(computed[:6]), "of the others no token had the mask"
        code, checks = checks_of(server)
        assert code == 0 and server.ask("/cu_fast").json["where_it_fires"] == 1, checks


FAULTS = """
import importlib.abc, importlib.util, sys

def no_salt(module):
    module.salted = lambda digest, salt: f":{salt or ''}"

def no_bite(module):
    fill = module.Rows.fill
    module.Rows.fill = lambda self, rows, *rest: fill(self, rows * 0 - 1, *rest)

CHANGES = {"cu_fast.vllm.admission": no_salt, "cu_fast.vllm.step": no_bite}

class Planted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            change(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Planted())
"""


def test_verify_sees_masks_without_effect_and_a_cache_without_salt(tmp_path):
    with serving(tmp_path, "--silent", "none", planted=FAULTS) as server:
        code, checks = checks_of(server)
        red = {name for name, (passed, _) in checks.items() if not passed}
        assert code == 1 and red == {
            "a mask changes an answer",
            "a header says the same as a body",  # the same answer, but that of no mask
            "prefixes are cached for the same masks alone",
        }, checks
        assert checks["a request that says nothing"][1] == "answered, under 0 masks"
        # Where silence is answered, masks in a place that is not read would be dropped.
        for more in PLACES.values():
            refused(server.ask("/v1/completions", completion(**{key: v for key, v in more.items() if key != "vllm_xargs"})
                               if "vllm_xargs" not in more else completion(vllm_xargs={"Unlearn": [C]})), "unlearn")  # fmt: skip
        for path, body in UNREAD.items():
            assert server.ask(path, {**body, **says([C])}).status == (400 if path == "/generative_scoring" else 501)
        assert server.ask("/generative_scoring", UNREAD["/generative_scoring"]).status == 200
        beams = {"use_beam_search": True, "n": 2}
        refused(server.ask("/v1/completions", completion(unlearn=[C], **beams)), "beam search would lose")
        refused(server.ask("/v1/completions", body_with('"vllm_xargs": {"unlearn": ["x"]}, "vllm_xargs": {}')), "twice")
