"""Gates that decide while the model runs: in which sequences, and from which forward on, a mask deletes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, attach_to, build, logits
from tiny_saes import activations, firing, hidden, make_sae, mask_of, without
from transformers import DynamicCache, StaticCache

import cu_fast
from cu_fast.masks import Gate

LAYER = "model.layers.1"
TOKENS = 12


@pytest.fixture(params=["threshold", "topk"])
def sae(request):
    return make_sae(request.param)


@pytest.fixture
def ids():
    return torch.randint(1, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[None, 6])
def window(request):
    return request.param


def shares(sae, ids, latent: int, window: int | None = None) -> torch.Tensor:
    """[B, S]: of the tokens up to each, but the first, the root of the share at which a latent fires, the largest of any
    window; 0 for the first."""
    fires = (activations(sae, hidden("llama", LAYER, {"input_ids": ids}))[:, 1:, latent] > 0).float()
    whole, half = window or TOKENS, (window or TOKENS) // 2
    running = [
        torch.stack(
            [fires[:, start : min(n, start + whole)].mean(1) for start in range(0, max(n - half, 1), half)]
        ).amax(0)
        for n in range(1, TOKENS)
    ]
    return torch.nn.functional.pad(torch.stack(running, 1).sqrt(), (1, 0))


def gated(sae, ids, which: int = 0, window: int | None = None):
    """A mask whose gate is about one latent, and its running shares: a latent that fires at some tokens only."""
    x = hidden("llama", LAYER, {"input_ids": ids})
    order = firing(sae, x)
    latent = min(
        order, key=lambda i: abs((activations(sae, x)[..., i] > 0).float().mean() - 0.35) + 0.01 * (i == which)
    )
    share = shares(sae, ids, latent, window)
    level = float(share[:, 1:].median()) + 1e-4
    gate = Gate(torch.tensor([latent], dtype=torch.int32), torch.ones(1), 0.0, level, window=window)
    return mask_of(sae, order[:12], "a").with_gate(gate), share, order[:12]


def oracle(sae, ids, codes, deleted: torch.Tensor) -> torch.Tensor:
    """Logits where those tokens alone, bool [B, S], lose what latents wrote."""
    model = build("llama")

    def after(module, args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        y = torch.where(deleted[..., None], without(sae, x, dict.fromkeys(codes, 4.0)), x)
        return y if isinstance(output, torch.Tensor) else (y, *output[1:])

    model.get_submodule(LAYER).register_forward_hook(after)
    return logits(model, {"input_ids": ids})


def test_a_prompt_is_judged_whole(sae, ids, window):
    mask, share, _ = gated(sae, ids, window=window)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    fires = share[:, -1] > mask.gate.level
    given = {"input_ids": ids}
    with attachment.unlearn("a", gated=True):
        found = logits(attachment.model, given)
    with attachment.unlearn(["a" if fire else None for fire in fires]):
        assert torch.equal(found, logits(attachment.model, given))
    with attachment.unlearn("a"):
        assert fires.all() or not torch.equal(found, logits(attachment.model, given))


@pytest.mark.parametrize("prompt", [1, 4])
def test_it_goes_on_token_by_token_and_stays_on(sae, ids, prompt, window, monkeypatch):
    mask, share, codes = gated(sae, ids, window=window)
    over = share > mask.gate.level
    on = (over & (torch.arange(TOKENS) >= prompt - 1)).cumsum(1) > 0
    assert on.any() and not on[:, 1:].all() and (on & ~over).any(), "the data should switch on, and fall below again"
    on[:, :prompt] = on[:, prompt - 1 : prompt]  # the prompt is judged as a whole
    on[:, 0] = False  # the first position is left alone
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    cache, steps, seen, value = None, [], [], Gate.value
    monkeypatch.setattr(Gate, "value", lambda gate, counts: seen.append(value(gate, counts)) or seen[-1])
    with attachment.unlearn(["a", "a", "a"], gated=True), torch.no_grad():
        for some in (slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, TOKENS))):
            out = attachment.model(input_ids=ids[:, some], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    judged, begin = torch.stack(seen, 1).float(), 1 if prompt == 1 else 0  # a first token cannot be judged
    torch.testing.assert_close(judged[:, begin:].cummax(1).values, share[:, prompt - 1 + begin :].cummax(1).values)
    torch.testing.assert_close(torch.cat(steps, 1), oracle(sae, ids, codes, on), rtol=1e-4, atol=1e-4)


def test_sequences_have_gates_of_their_own_and_start_anew(sae, ids):
    mask, share, _ = gated(sae, ids)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    with attachment.unlearn(["a", None, "a"], gated=True):
        first, again = (logits(attachment.model, {"input_ids": ids}) for _ in range(2))
    assert torch.equal(first, again)
    wanted = ["a" if row != 1 and share[row, -1] > mask.gate.level else None for row in range(3)]
    with attachment.unlearn(wanted):
        assert torch.equal(first, logits(attachment.model, {"input_ids": ids}))


def test_padding_and_beams(sae, ids, window):
    mask, share, _ = gated(sae, ids, window=window)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    prompt, level = ids[:, :7], mask.gate.level
    wanted = ["a" if share[row, 6] > level else None for row in range(3)]
    options = {"max_new_tokens": 1, "num_beams": 2, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    with attachment.unlearn(["a"] * 3, gated=True):
        found = attachment.model.generate(prompt, **options)
    with attachment.unlearn(wanted):
        assert torch.equal(found, attachment.model.generate(prompt, **options))
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), prompt], 1)
    given = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    with attachment.unlearn("a", gated=True):
        found = logits(attachment.model, given)
    with attachment.unlearn(wanted):
        assert torch.equal(found, logits(attachment.model, given))


def test_masks_without_a_gate_hold_and_codebooks_can_have_one(ids):
    attachment = attach_to(build("llama"), LAYER, splice="delta")
    (bottleneck,) = attachment.bottlenecks.values()
    with torch.no_grad():
        kept = bottleneck.active(hidden("llama", LAYER, {"input_ids": ids}))
    code = int(kept[5, 0])
    plain = cu_fast.Mask.from_ids(
        kept[:12].flatten().tolist(), num_codes=bottleneck.num_codes, codebook_sha256=bottleneck.codebook_sha256(),
        topic="plain",
    )  # fmt: skip
    never, ever = (
        plain.with_gate(Gate(torch.tensor([code], dtype=torch.int32), torch.ones(1), 0.0, level))
        for level in (2.0, -1.0)
    )
    for name, mask in (("plain", plain), ("never", never), ("ever", ever)):
        attachment.add_mask(mask, name)
    untouched = logits(build("llama"), {"input_ids": ids})
    results = {}
    for name in attachment.masks:
        with attachment.unlearn(name, gated=True):
            results[name] = logits(attachment.model, {"input_ids": ids})
    assert torch.equal(results["never"], untouched)
    assert torch.equal(results["plain"], results["ever"]) and not torch.equal(results["plain"], untouched)
    with attachment.unlearn({"never", "plain"}, gated=True):
        assert torch.equal(logits(attachment.model, {"input_ids": ids}), results["plain"])


def test_a_static_cache_goes_on_until_it_is_cropped(sae, ids, window):
    mask, _, _ = gated(sae, ids, window=window)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    found = []
    with attachment.unlearn("a", gated=True), torch.no_grad():
        for cache in (DynamicCache(), StaticCache(attachment.model.config, max_cache_len=TOKENS)):
            steps = [attachment.model(input_ids=some, past_key_values=cache).logits for some in ids.split(4, dim=1)[:2]]
            found.append(torch.cat(steps, 1))
            cache.crop(-2)  # of a static cache its tensors stay
            with pytest.raises(cu_fast.StaleCacheError, match="was cropped"):
                attachment.model(input_ids=ids[:, 6:], past_key_values=cache)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("option", ["prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model", "use_mtp"])
def test_assisted_decoding_is_refused(sae, ids, option):
    mask, _, _ = gated(sae, ids)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    value = build("llama") if option == "assistant_model" else 1
    with attachment.unlearn("a", gated=True), pytest.raises(ValueError, match="cannot be used with assisted decoding"):
        attachment.model.generate(ids[:1], max_new_tokens=2, **{option: value})


def test_drafts_that_are_taken_back_are_not_counted(sae, ids, monkeypatch):
    mask, _, _ = gated(sae, ids)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    monkeypatch.setattr("cu_fast.hf.generating._drafts", lambda *_: False)  # of an option that is not known yet
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 5}
    with attachment.unlearn("a", gated=True), pytest.raises(cu_fast.StaleCacheError, match="was cropped"):
        for row in ids:
            attachment.model.generate(row.repeat(1, 2), **options)


def test_what_cannot_be_judged_raises(sae, ids):
    mask, _, _ = gated(sae, ids)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    with attachment.unlearn("a", gated=True), torch.no_grad():
        cache = attachment.model(input_ids=ids, use_cache=True).past_key_values
    with attachment.unlearn("a"), pytest.raises(cu_fast.StaleCacheError, match="computed under a, gated"):
        attachment.model(input_ids=ids[:, :1], past_key_values=cache)
    with attachment.unlearn("a", gated=True), torch.no_grad():
        cache = attachment.model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(cu_fast.StaleCacheError, match="rows were selected or moved"):
            attachment.model(input_ids=ids[:, :1].repeat(2, 1), past_key_values=cache)
    with attachment.unlearn("a", gated=True), torch.no_grad():
        cache = attachment.model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([2, 1, 0]))
        with pytest.raises(cu_fast.StaleCacheError, match="rows were selected or moved"):
            attachment.model(input_ids=ids[:, :1], past_key_values=cache)
    compiled = torch.compile(attachment.model, backend="eager")
    with (
        attachment.unlearn("a", gated=True),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="in eager mode; judge"),
    ):
        compiled(input_ids=ids)
    with (
        attachment.unlearn("a", gated=True),
        pytest.raises(RuntimeError, match="cannot be used with continuous batching"),
    ):
        attachment.model.generate_batch([[1, 2, 3]])


# -- which tokens count, and for which rows of the batch --------------------------------------------------------------


def padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sequences of 12, 8 and 5 tokens, padded on the left."""
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["dynamic", "static"]
)
def test_padding_does_not_count_in_generate(sae, ids, cache):
    """A padded batch is answered as each prompt alone decides; that padding would add to no count is not enough."""
    given = padded(ids)
    rows = [row[valid][None] for row, valid in zip(given["input_ids"], given["attention_mask"].bool())]
    fires = torch.cat(
        [(activations(sae, hidden("llama", LAYER, {"input_ids": row}))[:, 1:] > 0).float().mean(1) for row in rows]
    )
    most = fires[2] - fires[0]  # of the shortest prompt, and less of the one without padding
    latent, mask = int(most.argmax()), gated(sae, ids)[0]
    gate = Gate(torch.tensor([latent], dtype=torch.int32), torch.ones(1), 0.0, float(fires[2, latent].sqrt()) - 1e-3)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask.with_gate(gate))
    entries = ["a" if share.sqrt() > gate.level else None for share in fires[:, latent]]
    assert entries[2] == "a" and None in entries

    def first_answer(topics, gated):
        options = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        with attachment.unlearn(topics, gated=gated), torch.no_grad():
            found = attachment.model.generate(
                **given, **options, **cache, output_logits=True, return_dict_in_generate=True
            )
        return found.logits[0]

    assert torch.equal(first_answer("a", True), first_answer(entries, False))


def test_a_mask_that_does_not_tell_padding_is_refused(sae, ids):
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(gated(sae, ids)[0])
    with (
        attachment.unlearn("a", gated=True),
        pytest.raises(RuntimeError, match="does not tell which tokens are padding"),
    ):
        attachment.model(input_ids=ids, attention_mask=torch.ones(3, 12, 12))


def test_what_always_holds_is_not_gated(sae, ids):
    mask, _, _ = gated(sae, ids)
    never = Gate(mask.gate.codes, mask.gate.weights, 0.0, 1e6)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask.with_gate(never))
    attachment.always = {"a"}
    given = {"input_ids": ids}
    with attachment.unlearn("a"):
        want = logits(attachment.model, given)
    for topics in (None, "a", [None, "a", {"a"}]):
        with attachment.unlearn(topics, gated=True):
            assert torch.equal(logits(attachment.model, given), want)


@pytest.mark.parametrize("entries", ["a", ["a", "a", "a"]], ids=["one entry", "a list"])
def test_beams_of_a_sequence_are_judged_together(sae, ids, entries):
    """A gate that has fired holds for every beam, whichever of them goes on."""
    mask, _, _ = gated(sae, ids)
    attachment = cu_fast.attach(build("llama"), {LAYER: sae})
    attachment.add_mask(mask)
    seen = []
    original = type(attachment._layers[0].bottleneck).forward

    def forward(self, x, masks=None, mask_row=None, residual=None):
        if mask_row is not None:
            seen.append((mask_row.reshape(3, 4, -1) >= 0)[..., -1])
        return original(self, x, masks, mask_row, residual)

    type(attachment._layers[0].bottleneck).forward = forward
    try:
        with attachment.unlearn(entries, gated=True), torch.no_grad():
            attachment.model.generate(input_ids=ids[:, :6], num_beams=4, max_new_tokens=8, do_sample=False)
    finally:
        type(attachment._layers[0].bottleneck).forward = original
    steps = torch.stack(seen)
    assert torch.equal(steps, steps[..., :1].expand_as(steps)), "all beams of a sequence, or none"
    assert (steps[1:] >= steps[:-1]).all() and steps.any() and not steps.all()
