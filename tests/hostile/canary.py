"""A mask that no token can escape, and what every forward of a tiny model should then give, worked out by hand.

Every token keeps every code, code 0 with a large weight, and the topic "canary" deletes code 0. So one forward without
its mask changes every logit after it. Weights are scores, not choices: rounding cannot tip one code into another, and
the two answers lie thousands of times further apart than two ways to compute one of them.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from tiny_models import FAMILIES, VOCABULARY, D, attach_to, build
from transformers.generation import BaseStreamer

import cu_fast
from cu_fast.masks import Mask

# A bottleneck that replaces the hidden state or keeps it, and autoencoders, which keep it.
SPLICES = ("replace", "delta", "threshold", "topk")
CANARY, CODES, WIDTH = 0, 40, 24
NEW = 4  # tokens that a case generates
TOLERANCE = 1e-3  # between two ways to compute the same, where 5e-5 was seen
APART = 0.05  # at least, between the answers with and without the mask, in the largest of the logits


class Record(NamedTuple):
    """What a forward said would come after tokens.

    row: of the prompt. ids: the tokens before. scores: [vocabulary]. kind: what they are of the logits.
    """

    row: int
    ids: list[int]
    scores: torch.Tensor
    kind: str = "logits"


class Recorder(transformers.LogitsProcessor):
    """Keeps what it is shown of every row at every step: under beam search, of beams that end nowhere too."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores


def is_t5(name: str) -> bool:
    return name.startswith("t5")


@functools.cache
def _built(name: str) -> torch.nn.Module:
    model = build(name)
    with torch.no_grad():  # where padding's embedding is 0, its logit would be 0 whatever is deleted
        weight = model.get_output_embeddings().weight
        weight[0] = 1.5 * weight[1].flip(0)
    return model


def make(name: str) -> torch.nn.Module:
    return copy.deepcopy(_built(name))


def prompts(name: str, batch: int, tokens: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    ids[:, 2:4] = ids[:, 0:2]  # something to look up
    return ids


@functools.cache
def _size(name: str) -> float:
    """The largest norm of what leaves the layer that is swapped."""
    model, norms = make(name), []
    layer = model.get_submodule(FAMILIES[name].layer)
    layer.register_forward_hook(lambda m, a, out: norms.append(_hidden(out).norm(dim=-1).max().item()))
    ids = prompts(name, 8)
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if is_t5(name) else {}))
    return max(norms)


def _hidden(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def attach_canary(model: torch.nn.Module, name: str, splice: str = "replace"):
    """A model that knows the topic "canary"."""
    codes = torch.randn(CODES, WIDTH, generator=torch.Generator().manual_seed(5))
    codes = codes / codes.norm(dim=-1, keepdim=True)
    layer = FAMILIES[name].layer
    if splice in ("threshold", "topk"):
        generator = torch.Generator().manual_seed(6)
        enc, dec = 0.1 * torch.randn(2, CODES, D, generator=generator)
        bias = torch.zeros(CODES)
        bias[CANARY] = 1.5 * _size(name)  # it fires at every token, and is the best of all
        k = CODES // 2 if splice == "topk" else None
        sae = cu_fast.SAE(enc, bias, torch.zeros(CODES), dec, kind=splice, k=k)
        attachment = cu_fast.attach(model, {layer: sae}, skip_first=1)
        attachment.add_mask(Mask.from_ids([CANARY], sae=sae, topic="canary"))
        return attachment
    attachment = attach_to(
        model, layer, attach_options={"skip_first": 1}, code_dim=WIDTH, num_codes=CODES, k=CODES, similarity="dot",
        weight="score", splice=splice,
    )  # fmt: skip
    (bottleneck,) = attachment.bottlenecks.values()
    codes[:, 0], codes[CANARY] = 0, 0
    codes[CANARY, 0] = 1
    with torch.no_grad():  # code 0 alone lies along the bias, so it adds the same to every token, and a lot
        bottleneck.codebook.codes.copy_(codes)
        bottleneck.autoencoder.b_enc[0] = 1.5 * _size(name)
    bottleneck.fold()  # which eager forwards do by themselves after a write, compiled ones do not
    sha256 = bottleneck.codebook_sha256()
    attachment.add_mask(Mask.from_ids([CANARY], num_codes=CODES, codebook_sha256=sha256, topic="canary"))
    return attachment


@functools.cache
def _by_hand(name: str, splice: str):
    """The base model and a splice of plain tensors, nothing of cu_fast in its forward; a list of masked rows."""
    (made,) = attach_canary(make(name), name, splice).bottlenecks.values()
    model, masked = make(name), []

    def replaced(x):
        coder, codes = made.autoencoder, made.codebook.codes
        weights = torch.relu((x @ coder.W_enc.T + coder.b_enc) @ codes.T)
        weights[masked, :, CANARY] = 0
        return weights @ codes @ coder.W_dec.T + coder.b_dec

    def kept(x):
        if splice == "delta":
            coder, code = made.autoencoder, made.codebook.codes[CANARY]
            wrote = 2 * torch.relu((x @ coder.W_enc.T + coder.b_enc) @ code)[..., None] * (coder.W_dec @ code)
        else:
            enc, bias, _, dec = (rows[CANARY] for rows in made.sae.rows())
            wrote = 4 * torch.relu(x @ enc + bias)[..., None] * dec
        y = x.clone()
        y[masked, 1:] -= wrote[masked, 1:]  # the first token of a sequence is left alone
        return y

    def change(module, args, output):
        y = (replaced if splice == "replace" else kept)(_hidden(output))
        return y if isinstance(output, torch.Tensor) else (y, *output[1:])

    model.get_submodule(FAMILIES[name].layer).register_forward_hook(change)
    return model, masked


def expected(name: str, encoded: list[list[int]], ids: list[list[int]], splice: str = "replace") -> torch.Tensor:
    """Logits [2, n, tokens, vocabulary] of whole forwards without a cache, first with the mask, then without.

    encoded: what an encoder is given. ids: the tokens; shorter ones are filled up behind, where nothing looks back.
    """
    model, masked = _by_hand(name, splice)
    masked[:] = range(len(ids))
    given = {"use_cache": False}
    if is_t5(name):
        given |= {
            "input_ids": _rectangle(encoded * 2),
            "attention_mask": _rectangle([[1] * len(e) for e in encoded * 2]),
        }
    given["decoder_input_ids" if is_t5(name) else "input_ids"] = _rectangle(ids * 2)
    with torch.no_grad():
        logits = model(**given).logits
    return logits.unflatten(0, (2, len(ids)))


def _rectangle(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def judge(
    name: str,
    encoded: list[list[int]],
    records: list[Record],
    entries: list[str | None],
    guidance=None,
    splice="replace",
):
    """For each row of the prompt what its forwards ran under: {"MASKED"}, {"UNMASKED"}, or more or other words.

    guidance: what classifier-free guidance was given, (scale, the other prompts), where records are of its scores.
    """
    ids = [record.ids for record in records]
    logits = expected(name, [encoded[record.row] for record in records], ids, splice)
    verdicts: list[set[str]] = [set() for _ in entries]
    if guidance:  # the other prompt goes on with what is said
        scale, others = guidance
        ends = [others[record.row] + record.ids[len(encoded[record.row]) :] for record in records]
        others_logits = expected(name, [], ends, splice)
    for i, record in enumerate(records):
        if splice != "replace" and name == "t5_decoder" and len(record.ids) == 1:
            continue  # said by the first token alone, which masks leave as it is
        answers = logits[:, i, len(record.ids) - 1]
        if record.kind == "log-softmax":
            answers = answers.log_softmax(-1)
        elif record.kind == "guided":
            other = others_logits[:, i, len(ends[i]) - 1].log_softmax(-1)
            answers = other + scale * (answers.log_softmax(-1) - other)
        finite = record.scores.isfinite()  # a processor may forbid tokens
        assert finite.sum() > VOCABULARY - 8
        masked, unmasked = ((answer - record.scores)[finite].abs().max().item() for answer in answers)
        apart = (answers[0] - answers[1])[finite].abs().max().item()
        assert apart > APART, f"{record}: the two answers are only {apart} apart"
        word = f"NEITHER: {masked:.3g} from masked, {unmasked:.3g} from unmasked"
        word = "MASKED" if masked < TOLERANCE else "UNMASKED" if unmasked < TOLERANCE else word
        verdicts[record.row].add(word)
    return verdicts


class Case:
    """One model, one prompt, and the records of what was generated from it."""

    def __init__(self, name: str, batch: int, prepare: Callable | None = None, splice: str = "replace") -> None:
        self.name, self.model = name, make(name)
        ids = prompts(name, batch)
        self.first = self.given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prepare is not None:
            prepare(self)
        self.attachment = attach_canary(self.model, name, splice)
        self.batch = batch
        self.reset()

    def reset(self) -> None:
        batch, self.given = self.batch, dict(self.first)
        self.attachment.reset_report()
        self.padding = [0] * batch  # in front of each row
        self.prefix: list[list[int]] = [[]] * batch  # tokens that generate was not given as tokens
        self.guidance: tuple | None = None
        self.records: list[Record] = []

    @property
    def encoded(self) -> list[list[int]]:
        return [row[n:].tolist() for row, n in zip(self.given["input_ids"], self.padding)]

    def add(self, ids: torch.Tensor, scores: torch.Tensor, kind: str = "logits") -> None:
        """One step of all rows."""
        each = len(ids) // len(self.padding)
        for i, row in enumerate(ids.tolist()):
            front = 0 if is_t5(self.name) else self.padding[i // each]
            self.records.append(Record(i // each, self.prefix[i // each] + row[front:], scores[i], kind))

    def generate(self, recorder: bool = True, kind: str = "logits", **options):
        seen = Recorder()
        options = {**self.given, "max_new_tokens": NEW, "do_sample": False, **options}
        if recorder:
            options["logits_processor"] = [seen]
        output = self.model.generate(**options, return_dict_in_generate=True, output_logits=True, output_scores=True)
        if isinstance(output, torch.Tensor):
            sequences = output
        else:
            sequences = output.sequences
            if getattr(output, "beam_indices", None) is None:
                start = sequences.shape[1] - len(output.logits)
                for step, logits in enumerate(output.logits):
                    self.add(sequences[:, : start + step], logits)
            else:
                kind = "log-softmax"
        for ids, scores in seen.seen:
            self.add(ids, scores, kind)
        return sequences


# -- ways to generate that are more than options: each is given a case, inside unlearn -----------------------------


def assisted(case, **options):
    """By a second plain model; what that one says is its own affair, so nothing is recorded of it."""
    case.generate(recorder=False, assistant_model=make(case.name), **options)


def exits_early(case, layers):
    case.generate(recorder=False, assistant_early_exit=layers)


def leaves_the_model_whole(case):
    """Cut to one layer the model cannot delete: it raises, and is afterwards what it was."""
    with case.attachment.unlearn(None):
        before = case.model.generate(**case.given, max_new_tokens=NEW)
    try:
        exits_early(case, 1)
    finally:
        with case.attachment.unlearn(None):
            assert torch.equal(case.model.generate(**case.given, max_new_tokens=NEW), before)


def guided(case):
    """The other prompt runs in a forward of its own, of which a logits processor asks."""
    others = prompts(case.name, 2, tokens=9)[:, 5:]
    case.guidance = 1.5, others.tolist()
    given = {"negative_prompt_ids": others, "negative_prompt_attention_mask": torch.ones_like(others)}
    # With a cache transformers gives Mamba one token and a mask of many, and its state moves on by that many.
    case.generate(guidance_scale=1.5, kind="guided", use_cache=case.name != "mamba", **given)


def given_embeddings(case):
    ids = case.given["input_ids"]
    embeddings = case.model.get_input_embeddings()(ids)
    if not is_t5(case.name):
        case.prefix = ids.tolist()
    case.generate(input_ids=None, inputs_embeds=embeddings.detach())


def continued(case):
    """From the cache of a forward of the beginning."""
    ids = case.given["input_ids"]
    with torch.no_grad():
        if is_t5(case.name):
            begun = torch.tensor([[0], [0]])
            cache = case.model(**case.given, decoder_input_ids=begun, use_cache=True).cache
            more = torch.tensor([[0, 6], [0, 8]])
            case.generate(decoder_input_ids=more, decoder_attention_mask=torch.ones_like(more), cache=cache)
            return
        cache = case.model(ids[:, :-1], use_cache=True).cache
        if case.name == "mamba":  # a state does not know its length, so generate would read the beginning again
            case.prefix = ids[:, :-1].tolist()
            case.generate(input_ids=ids[:, -1:], attention_mask=torch.ones(2, 1, dtype=torch.long), cache=cache)
        else:
            case.generate(cache=cache)


def continued_from_other_masks(case):
    topics = case.topics
    other = {"canary": None, None: "canary"}
    others = [other[t] for t in topics] if isinstance(topics, list) else other[topics]
    with case.attachment.unlearn(others), torch.no_grad():
        ids = case.given["input_ids"]
        cache = case.model(ids[:, :-1], use_cache=True).cache
    case.generate(cache=cache)


def by_a_callable(case):
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        for _ in range(NEW):
            with torch.no_grad():
                if is_t5(case.name):
                    given = {"encoder_outputs": kwargs["encoder_outputs"], "decoder_input_ids": input_ids}
                else:
                    given = {"input_ids": input_ids}
                scores = logits_processor(input_ids, model(**given, use_cache=False).logits[:, -1])
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        return input_ids

    case.generate(custom_generate=loop)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def streamed(case):
    streamer = Kept()
    sequences = case.generate(streamer=streamer)
    assert streamer.ended and streamer.tokens[-NEW:] == sequences[0, -NEW:].tolist()


def streamed_by_a_thread(case):
    """As a server does it: the thread is given the context."""
    errors, context = [], contextvars.copy_context()

    def work():
        try:
            streamed(case)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=context.run, args=(work,))
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
