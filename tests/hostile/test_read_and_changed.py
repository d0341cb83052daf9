"""Places that an autoencoder reads and changes: one read and another changed, and how modules are called and what they
return."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from kept_state import GIVEN, LAYER, PAIR, Kept, small
from tiny_models import VOCABULARY, D, logits, under
from tiny_saes import LATENTS, make_sae, mask_of, without

import cu_fast


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


# -- one place is read, another is changed --------------------------------------------------------------------------


def test_two_threads_read_a_pair():
    kept = Kept("threshold", PAIR)
    ids = [torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    want = [kept.by_hand([["a"], ["a"]] if i % 2 else [[], []], {"input_ids": one}) for i, one in enumerate(ids)]

    def work(i):
        with kept.attachment.unlearn("a" if i % 2 else None):
            return [logits(kept.model, {"input_ids": ids[i]}) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(work, range(4))):
            for got in found:
                torch.testing.assert_close(got, want[i], atol=1e-3, rtol=1e-3)


class Skipping(torch.nn.Module):
    """Runs a module as it should, twice, or not at all."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.how = inner, "once"

    def forward(self, x):
        if self.how == "fails":
            raise KeyError("inside")
        for _ in range(2 if self.how == "twice" else 1 if self.how == "once" else 0):
            y = self.inner(x)
        return x if self.how == "never" else y


def parts(reads, writes):
    """A model with an MLP in which the module that is read, and the one that is changed, may misbehave."""
    model = small()
    mlp, made = model.model.layers[1].mlp, {}
    for name in {reads, writes}:
        made[name] = Skipping(getattr(mlp, name))
        setattr(mlp, name, made[name])
    sae = make_sae(d_in=48 if reads == "up_proj" else D, d_out=D)
    place = f"{LAYER}.mlp.{reads}.inner -> {LAYER}.mlp.{writes}.inner"
    attachment = cu_fast.attach(model, {place: sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "a"))
    return attachment, made[reads], made[writes]


def test_a_pair_whose_places_run_in_other_ways():
    attachment, read, changed = parts("up_proj", "down_proj")
    model = attachment.model
    plain = under(attachment, "a", GIVEN)
    read.how = "twice"
    torch.testing.assert_close(under(attachment, "a", GIVEN), plain)
    read.how, changed.how = "once", "twice"
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="nothing was read"):
        logits(model, GIVEN)
    changed.how = "fails"
    with attachment.unlearn("a"), pytest.raises(KeyError):
        logits(model, GIVEN)  # what was read is left behind
    changed.how = "once"
    read.inner.forward = lambda x: x.new_ones(*x.shape[:-1], 48)
    read.how = "never"
    read.forward = lambda x: x.new_ones(*x.shape[:-1], 48)
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="nothing was read"):
        logits(model, GIVEN)  # and is not used
    with attachment.unlearn(None):
        logits(model, GIVEN)


def test_a_changed_place_that_is_skipped():
    attachment, _, changed = parts("up_proj", "down_proj")
    changed.forward = lambda x: x.new_zeros(*x.shape[:-1], D)
    with attachment.unlearn("a"), pytest.raises(RuntimeError, match="did not run: nothing was deleted there"):
        logits(attachment.model, GIVEN)


def test_a_place_that_is_read_after_it_was_changed():
    sae, model = make_sae(), small()
    attachment = cu_fast.attach(model, {f"{LAYER} -> model.layers.0": sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "a"))
    for _ in range(2):  # what the forward before has read stays unused
        with attachment.unlearn("a"), pytest.raises(RuntimeError, match="nothing was read; the place that is read"):
            logits(model, GIVEN)


def test_what_was_read_may_be_written_to_before_it_is_used():
    """Models add to a hidden state in place."""
    kept = Kept("threshold", PAIR)
    want = under(kept.attachment, "a", GIVEN)
    gate = kept.model.model.layers[1].mlp.act_fn  # runs between the two

    class Overwriting(torch.nn.Module):
        def forward(self, x):
            if seen:
                seen[0].zero_()
            return gate(x)

    seen = []
    mlp = kept.model.model.layers[1].mlp
    mlp.act_fn = Overwriting()
    up = mlp.up_proj.forward

    def first_up(x):
        seen[:] = [x]
        return up(x)

    mlp.up_proj.forward, gate_proj = first_up, mlp.gate_proj.forward
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) * mlp.act_fn(gate_proj(x)))
    got = under(kept.attachment, "a", GIVEN)
    torch.testing.assert_close(got, want)


def test_a_model_runs_inside_another_between_the_two_places():
    """The inner one has a swapped layer of its own; that it starts must not make the outer one forget what it read."""

    class Outer(hf.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.first, self.last = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
            self.inner = small().model

        def forward(self, input_ids):
            x = self.first(self.inner.embed_tokens(input_ids))
            return self.last(self.inner(input_ids=input_ids).last_hidden_state + x)

    torch.manual_seed(0)
    model, saes = Outer(small().config).eval(), [make_sae(seed=1), make_sae(seed=2)]
    attachment = cu_fast.attach(model, {"first -> last": saes[0], "inner.layers.1": saes[1]})
    for name, sae in zip("ab", saes):
        attachment.add_mask(mask_of(sae, range(LATENTS), name))
    ids, read = GIVEN["input_ids"], []
    with torch.no_grad():
        model.first.register_forward_hook(lambda m, args, out: read.append(out))
        with attachment.unlearn(None):
            plain = model(ids)
        with attachment.unlearn("a"):
            got = model(ids)
    torch.testing.assert_close(got, without(saes[0], read[0], dict.fromkeys(range(LATENTS), 4.0), plain).where(
        torch.arange(6)[:, None] > 0, plain))  # fmt: skip


# -- how modules are called, and what they return -------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [f"{LAYER}.self_attn:in", f"{LAYER}.self_attn.o_proj:in", f"{LAYER}.self_attn", "model"]
)
def test_arguments_by_name_tuples_and_outputs(place):
    """Attention is called with keywords and returns a tuple; the model returns a ModelOutput."""
    sae, model = make_sae(), small()
    side = "in" if place.endswith(":in") else "out"
    plain = logits(model, GIVEN)
    attachment = cu_fast.attach(model, {place: sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "a"))
    twin = small()
    module = twin.get_submodule(place.removesuffix(":in"))

    def changed(x):
        y = without(sae, x, dict.fromkeys(range(LATENTS), 4.0))
        return torch.cat([x[:, :1], y[:, 1:]], 1)

    if side == "in":
        forward = module.forward

        def called(*args, **kwargs):
            if args:
                return forward(changed(args[0]), *args[1:], **kwargs)
            return forward(**{**kwargs, "hidden_states": changed(kwargs["hidden_states"])})

        module.forward = called
    elif place == "model":
        module.register_forward_hook(
            lambda m, a, out: type(out)(**{**out, "last_hidden_state": changed(out.last_hidden_state)})
        )
    else:
        module.register_forward_hook(lambda m, a, out: (changed(out[0]), *out[1:]))
    want, runs = logits(twin, GIVEN, use_cache=False), [model]
    if place in (f"{LAYER}.self_attn:in", "model"):
        runs.append(torch.compile(model, backend="eager", fullgraph=True))
    for run in runs:
        with attachment.unlearn("a"):
            torch.testing.assert_close(logits(run, GIVEN, use_cache=False), want, atol=1e-3, rtol=1e-3)
        with attachment.unlearn(None):
            assert torch.equal(logits(run, GIVEN, use_cache=False), plain)


def test_a_list_or_a_named_tuple_keeps_its_kind():
    from collections import namedtuple

    Pair = namedtuple("Pair", "hidden extra")

    class Last(torch.nn.Module):
        def forward(self, x):
            return Last.kind(x)

    class Model(hf.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed, self.last = torch.nn.Embedding(VOCABULARY, D), Last()

        def forward(self, input_ids):
            return self.last(self.embed(input_ids))

    torch.manual_seed(0)
    model, sae = Model(small().config).eval(), make_sae()
    attachment = cu_fast.attach(model, {"last": sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "a"))
    for Last.kind, kind in ((lambda x: [x, 1], list), (lambda x: Pair(x, 1), Pair), (lambda x: (x, 1), tuple)):
        with attachment.unlearn("a"), torch.no_grad():
            out = model(GIVEN["input_ids"])
        assert type(out) is kind and out[1] == 1 and not torch.equal(out[0], model.embed(GIVEN["input_ids"]))


def test_a_place_whose_module_takes_no_argument_by_name_is_refused_with_a_reason():
    class Odd(torch.nn.Module):
        def forward(self, **given):
            return given["x"]

    class Model(hf.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed, self.odd = torch.nn.Embedding(VOCABULARY, D), Odd()

        def forward(self, input_ids):
            return self.odd(x=self.embed(input_ids))

    torch.manual_seed(0)
    model, sae = Model(small().config).eval(), make_sae()
    attachment = cu_fast.attach(model, {"odd:in": sae})
    attachment.add_mask(mask_of(sae, range(LATENTS), "a"))
    with (
        attachment.unlearn("a"),
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"'odd:in' was given no first argument, but .'x'.; name"),
    ):
        model(GIVEN["input_ids"])
