"""A stateful test: blocks, copied contexts, threads, caches, masks, erasing and detaching in any order.

Beside the model an oracle knows what each forward has to delete, or which error it has to raise, and a twin computes it:
the same bottleneck behind the same layer, called with mask rows made by hand.
"""

from __future__ import annotations

import collections
import contextvars
import copy
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiers import TEST_ALL
from tiny_models import K, attach_to, build, inputs
from tiny_saes import make_sae, without

from cu_fast import attach
from cu_fast.hf import StaleCacheError
from cu_fast.masks import Mask

LAYER = "model.layers.1"
SPLICES, SAE_OF_MODEL = ("replace", "delta", "threshold"), make_sae()
STEPS, STEPS_EACH = (10_000 if TEST_ALL else 500), 50
GIVEN = inputs("llama", batch=2, tokens=5)
MORE = {"input_ids": torch.tensor([[5], [6]])}
NAMES = ("a", "b", "c")
TOPICS = st.one_of(
    st.none(),
    st.sampled_from(NAMES),
    st.frozensets(st.sampled_from(NAMES), min_size=1),
    st.lists(st.one_of(st.none(), st.sampled_from(NAMES)), min_size=1, max_size=3),
)

model, twin, worker = build("llama"), build("llama"), ThreadPoolExecutor(1)
counts = collections.Counter()


class Block:
    """One ``unlearn``: what it deletes, as a set of masks per entry, and whether it was left.

    beyond: it names something that does not always hold.
    """

    def __init__(self, manager, entries, by_sequence, outer, beyond):
        self.manager, self.entries, self.by_sequence, self.outer = manager, entries, by_sequence, outer
        self.open, self.deletes, self.beyond = True, any(entries), beyond


class Place:
    """A context, and the block that holds in it."""

    def __init__(self, context, block=None):
        self.context, self.block = context, block


class Machine(RuleBasedStateMachine):
    splice = "replace"

    @initialize(silent=st.sampled_from(["refuse", "plain"]))
    def start(self, silent):
        self.silent, self.places, self.blocks, self.caches = silent, [], [], []
        self.attachment, self.steps = None, 0
        self.attach()

    def attach(self):
        options = {"silent": self.silent}
        if self.splice == "threshold":
            self.attachment = attach(model, {LAYER: SAE_OF_MODEL}, **options)
        else:
            self.attachment = attach_to(model, LAYER, attach_options={**options, "splice": self.splice})
        self.bottleneck = self.attachment.bottlenecks[LAYER]
        with torch.no_grad(), self.attachment.observe(lambda x, b: seen.append(b.active(x))):
            seen = []
            model(**GIVEN)
        used = sorted(set(seen[0].flatten().tolist()) - {-1})
        self.used = used
        self.masks, self.always, self.mode = {}, frozenset(), "ablate"  # masks: name -> codes, by their first numbers
        self.there, self.generation = (
            list(range(self.bottleneck.num_codes)),
            0,
        )  # the codes that are left, by their first numbers
        self.places, self.blocks, self.caches, self.known = [Place(contextvars.Context())], [], [], {}
        self.compiled = None
        for name, codes in (("a", used[::3]), ("b", used[1::3])):
            self.add(name, set(codes))

    # -- the oracle ----------------------------------------------------------------------------------------------

    def masking(self):
        return any(block.open and block.deletes for block in self.blocks)

    def entries_of(self, topics):
        by_sequence = isinstance(topics, list)
        names = [() if t is None else (t,) if isinstance(t, str) else t for t in (topics if by_sequence else [topics])]
        return [frozenset(self.content(n) for n in {*each, *self.always}) for each in names], by_sequence

    def content(self, name):
        """A mask by what it deletes: names do not matter to a cache."""
        return frozenset(self.masks[name])

    def holds(self, place):
        """Per sequence what has to be deleted there, or the error that has to come."""
        block = place.block
        if block is None:
            if self.silent == "refuse" and (
                set(self.masks) - self.always or any(block.open and block.beyond for block in self.blocks)
            ):
                return RuntimeError, "nothing was said here"
            return [frozenset(map(self.content, self.always))] * 2, None
        if not block.open:
            return RuntimeError, "was left"
        if block.by_sequence and len(block.entries) != 2:
            return ValueError, "the batch should be"
        return block.entries if block.by_sequence else block.entries * 2, None

    def signature(self, entries):
        return self.generation, tuple(entries), self.mode if any(entries) else None

    def expected(self, entries, given):
        """The twin's logits."""
        key = self.signature(entries), given["input_ids"].shape[1]
        if key not in self.known:
            now = {code: i for i, code in enumerate(self.there)}
            ids = [[now[c] for mask in entry for c in mask if c in now] for entry in entries]
            bits = [Mask.from_ids(i, num_codes=len(now), codebook_sha256="", topic="").bits for i in ids]
            row = torch.arange(2, dtype=torch.int32).repeat_interleave(given["input_ids"].shape[1])

            def through(module, args, output):
                if self.splice == "replace":
                    return self.bottleneck(output, torch.stack(bits), row)
                return torch.cat([output[:, :1], self.without(output, ids)[:, 1:]], 1)  # the first token is left alone

            handle = twin.model.layers[1].register_forward_hook(through)
            passed = self.bottleneck.passed.clone()
            try:
                with torch.no_grad():
                    self.known[key] = twin(**given, use_cache=False).logits
            finally:
                handle.remove()
                self.bottleneck.passed.copy_(passed)
        return self.known[key]

    def without(self, x, ids):
        """x less what each sequence's deleted codes or latents wrote, in plain PyTorch."""
        if self.splice == "threshold":
            return torch.stack([without(SAE_OF_MODEL, one, dict.fromkeys(some, 4.0)) for one, some in zip(x, ids)])
        coder, codes = self.bottleneck.autoencoder, self.bottleneck.codebook.codes
        similar = (x @ coder.W_enc.T + coder.b_enc) @ (codes / codes.norm(dim=1, keepdim=True)).T
        kept = torch.zeros_like(similar).scatter_(-1, similar.topk(K).indices, 1.0)
        deleted = torch.stack(
            [torch.zeros(len(codes)).index_fill_(0, torch.tensor(sorted(i)).long(), 1.0) for i in ids]
        )
        return x - 2 * (kept * deleted[:, None]) @ codes @ coder.W_dec.T

    def check(self, place, run, given, threaded=False):
        """Run something there; it gives the twin's logits, or raises what it has to."""
        entries, message = self.holds(place)
        call = (lambda: worker.submit(place.context.run, run).result()) if threaded else lambda: place.context.run(run)
        if message is not None:
            counts[message] += 1
            with pytest.raises(entries, match=message):
                call()
            return None
        counts["masked" if any(entries) else "plain"] += 1
        got = call()
        torch.testing.assert_close(got.logits, self.expected(entries, given), atol=2e-3, rtol=1e-3)
        return got

    def refused_while_masking(self, change, apply):
        if self.masking():
            with pytest.raises(RuntimeError, match="while masks hold"):
                change()
        else:
            change()
            apply()

    # -- what may happen -----------------------------------------------------------------------------------------

    @invariant()
    def forwards(self):
        """After each step a forward in one of the places, now in a thread, and with one of the caches."""
        counts["steps"] += 1
        self.steps += 1
        place, threaded = self.places[self.steps % len(self.places)], self.steps % 3 == 0
        self.check(place, torch.no_grad()(lambda: model(**GIVEN, use_cache=False)), GIVEN, threaded)
        if self.caches:
            self.go_on(place, *self.caches[self.steps % len(self.caches)])

    @rule(data=st.data(), topics=TOPICS, copied=st.booleans())
    def enter(self, data, topics, copied):
        place = data.draw(st.sampled_from(self.places))
        flat = topics if isinstance(topics, (list, frozenset)) else [topics]
        manager = self.attachment.unlearn(topics)
        if any(name is not None and name not in self.masks for name in flat):
            with pytest.raises(ValueError, match="there is no mask"):
                place.context.run(manager.__enter__)
            return
        place.context.run(manager.__enter__)
        beyond = bool({*flat} - {None} - self.always)
        place.block = Block(manager, *self.entries_of(topics), place.block, beyond)
        self.blocks.append(place.block)
        if copied and len(self.places) < 5:
            self.places.append(Place(place.context.copy(), place.block))

    @precondition(lambda self: any(block.open for block in self.blocks))
    @rule(data=st.data(), inside_out=st.booleans())
    def leave(self, data, inside_out):
        """Mostly where it was entered; else where another holds, or nothing, which is noticed."""
        block = data.draw(st.sampled_from([block for block in self.blocks if block.open]))
        there = [place for place in self.places if place.block is block]
        place = data.draw(st.sampled_from(there if inside_out and there else self.places))
        block.open = False
        if place.block is block:
            place.context.run(block.manager.__exit__, None, None, None)
            place.block = block.outer
            while place.block is not None and not place.block.open:
                place.block = place.block.outer
        else:
            with pytest.raises(RuntimeError, match="was left where another one holds"):
                place.context.run(block.manager.__exit__, None, None, None)

    @precondition(lambda self: len(self.places) < 5)
    @rule(data=st.data(), fresh=st.booleans())
    def copy_a_context(self, data, fresh):
        place = data.draw(st.sampled_from(self.places))
        self.places.append(Place(contextvars.Context()) if fresh else Place(place.context.copy(), place.block))

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def add_mask(self, name, data):
        self.add(name, data.draw(st.sets(st.sampled_from(self.used), min_size=1, max_size=12)) & set(self.there))

    def add(self, name, codes):
        numbers = [self.there.index(code) for code in codes]
        mask = Mask.from_ids(
            numbers, num_codes=len(self.there), codebook_sha256=self.bottleneck.codebook_sha256(), topic=name
        )
        if name in self.masks or not codes:
            with pytest.raises(ValueError, match=r"there is a mask|deletes no code"):
                self.attachment.add_mask(mask)
        else:
            self.attachment.add_mask(mask)
            self.masks[name] = codes

    @rule(name=st.sampled_from(NAMES))
    def remove_mask(self, name):
        if name in self.always or name not in self.masks:
            with pytest.raises(ValueError, match=r"always holds|there is no mask"):
                self.attachment.remove_mask(name)
        else:
            self.attachment.remove_mask(name)
            del self.masks[name]

    @rule(names=st.frozensets(st.sampled_from(NAMES)))
    def set_always(self, names):
        def change():
            self.attachment.always = names

        if names - set(self.masks):
            with pytest.raises(ValueError, match="there is no mask"):
                change()
        elif any(block.open for block in self.blocks):
            with pytest.raises(RuntimeError, match="always cannot change while"):
                change()
        else:
            change()
            self.always = names

    @rule(mode=st.sampled_from(["ablate", "reselect"]))
    def set_mode(self, mode):
        def change():
            self.attachment.mask_mode = mode

        if mode == "reselect" and self.splice != "replace":
            with pytest.raises(ValueError, match="keep the hidden state, and select nothing instead"):
                change()
            return
        self.refused_while_masking(change, lambda: setattr(self, "mode", mode))

    @rule(name=st.sampled_from(NAMES), all_of_it=st.integers(0, 3))
    def erase(self, name, all_of_it):
        if all_of_it or name not in self.masks or len(self.there) - len(self.masks[name]) < K:
            return  # one time in four
        gone = self.masks[name]
        if self.splice != "replace":
            with pytest.raises(RuntimeError, match=r"whose splice keeps the hidden state|erase\(\) while"):
                self.attachment.erase(name)
            return

        def apply():
            self.there = [code for code in self.there if code not in gone]
            self.masks = {n: codes - gone for n, codes in self.masks.items() if n != name}
            self.always -= {name}
            self.generation += bool(gone)

        if any(block.open for block in self.blocks):
            with pytest.raises(RuntimeError, match=r"erase\(\) while"):
                self.attachment.erase(name)
        else:
            self.attachment.erase(name)
            apply()

    @precondition(lambda self: len(self.caches) < 4)
    @rule(data=st.data())
    def fill_a_cache(self, data):
        place = data.draw(st.sampled_from(self.places))
        got = self.check(place, torch.no_grad()(lambda: model(**GIVEN, use_cache=True)), GIVEN)
        if got is not None:
            self.caches.append((got.past_key_values, self.signature(self.holds(place)[0])))

    def go_on(self, place, cache, filled):
        cache = copy.deepcopy(cache)
        run = torch.no_grad()(lambda: model(**MORE, past_key_values=cache))
        entries, message = self.holds(place)
        if message is None and self.signature(entries) != filled:
            counts["stale"] += 1
            with pytest.raises(StaleCacheError):
                place.context.run(run)
        elif message is not None:
            with pytest.raises((entries, StaleCacheError)):  # whichever is looked at first
                place.context.run(run)
        else:
            longer = {"input_ids": torch.cat([GIVEN["input_ids"], MORE["input_ids"]], 1)}
            got = place.context.run(run)
            torch.testing.assert_close(got.logits, self.expected(entries, longer)[:, -1:], atol=2e-3, rtol=1e-3)

    @rule(data=st.data())
    def generate(self, data):
        place = data.draw(st.sampled_from(self.places))

        def run():
            return model.generate(
                **GIVEN, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
            )

        entries, message = self.holds(place)
        if message is not None:
            message = message if entries is RuntimeError else r"generate\(\) was given 2 sequences"
            with pytest.raises(entries, match=message):
                place.context.run(run)
            return
        got = place.context.run(run)
        first = self.expected(entries, GIVEN)[:, -1]
        torch.testing.assert_close(got.logits[0], first, atol=2e-3, rtol=1e-3)

    @precondition(lambda self: self.compiled is None)
    @rule(really=st.integers(0, 7))
    def compile(self, really):
        if really == 0:  # it takes a second
            counts["compilations"] += 1
            self.compiled = torch.compile(model, backend="eager")

    @precondition(lambda self: self.compiled is not None)
    @rule(data=st.data(), threaded=st.booleans())
    def forward_compiled(self, data, threaded):
        place = data.draw(st.sampled_from(self.places))
        compiled = self.compiled
        self.check(place, torch.no_grad()(lambda: compiled(**GIVEN, use_cache=False)), GIVEN, threaded)

    @rule(really=st.integers(0, 7))
    def detach_and_attach(self, really):
        if really:
            return
        if self.masking():
            with pytest.raises(RuntimeError, match="while masks hold"):
                self.attachment.detach()
            return
        self.attachment.detach()
        with torch.no_grad():
            assert torch.equal(model(**GIVEN).logits, twin(**GIVEN).logits), "the model is what it was"
        self.attach()

    def teardown(self):
        if self.attachment is not None:
            for block in self.blocks:
                if block.open:
                    self.attachment._active.close(block.manager._request)
            self.attachment.detach()


@pytest.mark.parametrize("splice", SPLICES)
def test_any_order_of_things(splice):
    counts.clear()
    machine, steps = type("Machine", (Machine,), {"splice": splice}), STEPS // len(SPLICES)
    # Each of these was met, or the machine had nothing to say about it. Few steps do not meet all.
    kinds = ["masked", "plain", "nothing was said here"]
    if TEST_ALL:
        kinds += ["stale", "compilations", "was left", "the batch should be"]

    def missed():
        return [kind for kind in kinds if counts[kind] <= steps / 200]

    # By `make test` the same walks each time, so a second turn would see nothing new.
    while not counts["steps"] or (TEST_ALL and (counts["steps"] < steps or (missed() and counts["steps"] < 6 * steps))):
        examples = max(2, (steps - counts["steps"]) // STEPS_EACH)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=STEPS_EACH, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck), derandomize=not TEST_ALL, database=None,
            ),
        )  # fmt: skip
    assert not missed(), counts
