"""Every way of ``generate`` that runs on a CPU, in every family, under masks that change every logit.

What the forwards gave is compared with whole forwards by hand (see ``canary``): each row was masked, or not, as asked.
`make test-all` runs the whole matrix; else each variant meets two families.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import pytest
import tokenizers
import torch
import transformers
from canary import (
    APART,
    CANARY,
    NEW,
    SPLICES,
    TOLERANCE,
    Case,
    Record,
    assisted,
    attach_canary,
    by_a_callable,
    continued,
    continued_from_other_masks,
    exits_early,
    expected,
    given_embeddings,
    guided,
    is_t5,
    judge,
    leaves_the_model_whole,
    make,
    prompts,
    streamed,
    streamed_by_a_thread,
)
from tiers import TEST_ALL
from tiny_models import FAMILIES, VOCABULARY
from transformers.generation import CompileConfig, ContinuousBatchingConfig

from cu_fast.hf import StaleCacheError

FEW = 2 if TEST_ALL else 1  # tokens where each shape is compiled; "compiled static" always has steps too
ALL = tuple(FAMILIES)
T5 = ("t5_encoder", "t5_decoder")
DECODERS = tuple(name for name in ALL if name not in T5)
PAGED = ("llama", "mistral", "qwen3", "gemma3", "phi3")


# -- more ways to generate; each is given a case, inside unlearn ----------------------------------------------------


def on_a_static_cache() -> dict:
    """As on a GPU, where transformers compiles by itself what runs on one."""
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def compiled_static(case):
    case.generate(**on_a_static_cache())
    assert case.model._compiled_call is not None


def compiled_static_before(case):
    torch.compiler.reset()
    case.model.generate(**case.given, max_new_tokens=NEW, **on_a_static_cache())


def compiled(case):
    case.model.compile(backend="eager")
    case.generate(max_new_tokens=FEW)


def compiled_before(case):
    torch.compiler.reset()
    case.model.compile(backend="eager")
    case.model.generate(**case.given, max_new_tokens=FEW)


def healed(case):
    """Tokens are called w3, w30, ...: the last of the prompt is begun anew, by a generate inside generate."""
    words = {f"w{i}": i for i in range(3, VOCABULARY)} | {"<pad>": 0, "<bos>": 1, "<unk>": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    )
    case.given["input_ids"] = case.given["input_ids"].clone()
    case.given["input_ids"][:, -1] = 3
    case.generate(token_healing=True, tokenizer=tokenizer)


def with_encoder_outputs(case):
    given = {"input_ids": case.given["input_ids"], "attention_mask": case.given["attention_mask"]}
    with torch.no_grad():
        encoded = case.model.get_encoder()(**given)
    case.generate(input_ids=None, encoder_outputs=encoded)


def with_decoder_input(case):
    case.generate(decoder_input_ids=torch.tensor([[0, 7, 9], [0, 8, 4]]))


def square(case):
    """As many rows as tokens: which dimension is which?"""
    case.given = {key: value[:, :6] for key, value in case.given.items()}
    case.generate(num_beams=3)


def padded(case):
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), case.given["input_ids"]], 1)
    ids[1, :3] = torch.tensor([9, 8, 7])
    case.padding = [3, 0]
    case.given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    case.generate(num_beams=1)


def padded_beams(case):
    case.model.generation_config.num_beams = 2  # where generate() itself is not told
    padded(case)


def batched(case):
    """Continuous batching: many requests packed into one sequence, in another thread."""
    case.model.set_attn_implementation("eager")
    config = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64, return_logprobs=True)
    options = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    rows, head = [], case.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, args, output: rows.extend(output.reshape(-1, VOCABULARY).clone()))
    given = case.given["input_ids"].tolist()
    try:
        answers = case.model.generate_batch(given, options, config, warmup=False).values()
    finally:
        hook.remove()
    if failed := [answer.error for answer in answers if answer.error]:
        raise RuntimeError(failed[0])
    log = torch.stack(rows).log_softmax(-1)
    for answer in answers:
        ids = list(answer.prompt_ids)
        for token, score in zip(answer.generated_tokens, answer.logprobs, strict=True):
            # Of all rows the one that gave this token this score, or nearly.
            row = rows[(log[:, token] - score).abs().argmin()]
            case.records.append(Record(given.index(list(answer.prompt_ids)), list(ids), row))
            ids.append(token)


# -- the matrix ----------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """run: given the case, inside unlearn. batch: of the prompt. before: given the case, before attach.

    quick: the families for a run of a part, where it takes long; (): two, in turns. tokens: that are generated.
    """

    run: Callable[[Case], None]
    batch: int = 2
    families: tuple[str, ...] = ALL
    before: Callable[[Case], None] | None = None
    quick: tuple[str, ...] = ()
    tokens: int = NEW


def options(*, batch: int = 2, families: tuple[str, ...] = ALL, **given) -> Variant:
    return Variant(lambda case: case.generate(**given), batch, families)


class Never(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def any_token(batch, ids):
    return list(range(VOCABULARY))


SAMPLED = {"do_sample": True, "top_k": 0}
VARIANTS = {
    "greedy": options(),
    "batch of one": options(batch=1),
    "sample": options(**SAMPLED),
    "sample, warped": options(do_sample=True, top_k=9, top_p=0.9, temperature=0.7, typical_p=0.9),
    "return sequences": options(**SAMPLED, num_return_sequences=3),
    "beams 2": options(num_beams=2),
    "beams 3": options(num_beams=3),
    "beams 3, all returned": options(num_beams=3, num_return_sequences=3),
    "beam sample": options(num_beams=3, num_return_sequences=2, **SAMPLED),
    "beams, one prompt": options(num_beams=3, batch=1),
    "beams, early stopping": options(num_beams=3, early_stopping=True, length_penalty=2.0),
    "beams, no cache": options(num_beams=2, use_cache=False),
    "beams, static cache": options(num_beams=2, cache_implementation="static"),
    "assisted": Variant(assisted, batch=1),
    "assisted, sampled": Variant(lambda case: assisted(case, **SAMPLED), batch=1),
    "early exit 2": Variant(lambda case: exits_early(case, 2), batch=1),
    "early exit 1": Variant(leaves_the_model_whole, batch=1),
    "prompt lookup": options(prompt_lookup_num_tokens=3, recorder=False, batch=1),
    "static cache": options(cache_implementation="static"),
    "static cache, longer": options(cache_implementation="static", max_cache_len=32),
    "offloaded cache": options(cache_implementation="offloaded"),
    "offloaded static cache": options(cache_implementation="offloaded_static"),
    "sliding cache": options(cache_implementation="sliding_window"),
    "hybrid cache": options(cache_implementation="hybrid"),
    "quantized cache": options(cache_implementation="quantized"),
    "no cache": options(use_cache=False),
    "prefill chunks": options(prefill_chunk_size=4),
    "guidance": Variant(guided),
    "embeddings": Variant(given_embeddings),
    "continued": Variant(continued),
    "continued from other masks": Variant(continued_from_other_masks, families=DECODERS),
    "callable": Variant(by_a_callable),
    "streamer": Variant(streamed, batch=1),
    "streamer, thread": Variant(streamed_by_a_thread, batch=1),
    "compiled before": Variant(lambda case: case.generate(max_new_tokens=FEW), 2, ALL, compiled_before, ("gpt2",), FEW),
    "compiled": Variant(compiled, quick=("llama",), tokens=FEW),
    "compiled static": Variant(compiled_static, quick=("phi3",)),
    "compiled static before": Variant(compiled_static, before=compiled_static_before, quick=("gpt2",)),
    "bad words": options(bad_words_ids=[[5], [6, 7]], suppress_tokens=[9], begin_suppress_tokens=[10]),
    "least length": options(min_new_tokens=NEW, eos_token_id=2),
    "penalties": options(repetition_penalty=1.3, no_repeat_ngram_size=2, sequence_bias={(5,): 2.0}, recorder=False),
    "allowed tokens": options(prefix_allowed_tokens_fn=any_token),
    "stopping criteria": options(stopping_criteria=[Never()], max_time=1000.0),
    "token healing": Variant(healed, batch=1),
    "token healing, two": Variant(healed),
    "encoder outputs": Variant(with_encoder_outputs, families=T5),
    "decoder start": options(decoder_start_token_id=7, families=T5),
    "decoder input": Variant(with_decoder_input, families=T5),
    "square": Variant(square),
    "left padded": Variant(padded),
    "left padded, beams": Variant(padded_beams),
    "continuous batching": Variant(batched, quick=("llama",)),
    "contrastive": options(penalty_alpha=0.6, top_k=4),
    "groups": options(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "constrained": options(num_beams=4, force_words_ids=[[5]]),
    "dola": options(dola_layers="high"),
    "more tokens at once": options(use_mtp=True, recorder=False, batch=1),
}


class Refusal(NamedTuple):
    """An error that is right. when: "always"; "masked", where something is deleted; "listed", by sequence."""

    families: tuple[str, ...]
    error: type[Exception]
    message: str
    when: str = "always"


REMOTE = Refusal(ALL, ValueError, "requires `trust_remote_code=True`")  # code from elsewhere, which no test runs
STATEFUL = Refusal(("mamba",), ValueError, "assisted generation is not supported with stateful models")
# transformers cuts the depth in the config, which these do not read, and looks for a T5's decoder in the wrong place.
NO_EXIT = (
    STATEFUL,
    Refusal(("gpt2", "gpt_neox", "opt"), IndexError, "list index out of range"),
    Refusal(T5, AttributeError, "no attribute 'transformer'"),
)
NO_GPU = Refusal(tuple(name for name in ALL if name != "mamba"), AssertionError, "Torch not compiled with CUDA")
# Forwards that would be wrong if they ran.
SQUARE = Refusal(DECODERS, RuntimeError, "which of the two is the batch is not known", "listed")
REFUSALS: dict[str, tuple[Refusal, ...]] = {
    "early exit 2": NO_EXIT,
    # The swapped layer is the second, so nothing would be deleted in the assistant.
    "early exit 1": (*NO_EXIT, Refusal(PAGED, RuntimeError, r"\['model.layers.1'\] did not run", "masked")),
    "square": (SQUARE,),
    "continued from other masks": (Refusal(DECODERS, StaleCacheError, "this KV cache was computed under"),),
    # One sequence is healed at a time, and then which of the entries is its own is not known.
    "token healing, two": (
        Refusal(DECODERS, ValueError, "was given 1 sequences, and unlearn.. 2 entries", "listed"),
        Refusal(T5, RuntimeError, "cannot reshape tensor of 0 elements"),
    ),
    # The rest is what transformers cannot do.
    "assisted": (STATEFUL,),
    "assisted, sampled": (STATEFUL,),
    "prompt lookup": (STATEFUL,),
    "token healing": (Refusal(T5, RuntimeError, "cannot reshape tensor of 0 elements"),),  # heals the decoder's start
    "offloaded cache": (NO_GPU,),
    "offloaded static cache": (NO_GPU,),
    "quantized cache": (
        Refusal(("mistral", "gemma3", "mamba"), ValueError, "only full attention layers"),
        Refusal(T5, ValueError, "does not support the quantized cache"),
        Refusal(("gpt2", "gpt_neox", "llama", "qwen3", "phi3", "opt"), ImportError, "install optimum-quanto"),
    ),
    "prefill chunks": (Refusal(("mamba",), ValueError, "can only be called on Attention layers"),),
    "guidance": (Refusal(T5, ValueError, "exactly one of input_ids or inputs_embeds"),),  # gives no decoder input
    "continuous batching": (
        Refusal(("gpt_neox",), RuntimeError, "missing 1 required positional argument"),
        Refusal(("opt",), RuntimeError, "no attribute 'get_seq_length'"),
        Refusal(("mamba",), ValueError, "Invalid layer type: linear_attention"),
        Refusal(T5, RuntimeError, "exactly one of input_ids or inputs_embeds"),
    ),
    "contrastive": (REMOTE,),
    "groups": (REMOTE,),
    "constrained": (REMOTE,),
    "dola": (REMOTE,),
    "more tokens at once": (
        STATEFUL, Refusal(tuple(name for name in ALL if name != "mamba"), ValueError, "Could not find `num_mtp_layers`"),
    ),
}  # fmt: skip


def topics_of(variant: str) -> list:
    return ["canary", None] if VARIANTS[variant].batch == 1 else [["canary", None], [None, "canary"], "canary", None]


def refusal(variant: str, name: str, topics) -> Refusal | None:
    holds = {"always": True, "masked": topics is not None, "listed": isinstance(topics, list)}
    return next((r for r in REFUSALS.get(variant, ()) if name in r.families and holds[r.when]), None)


def pairs(everything: bool) -> list[tuple[str, str]]:
    found = []
    for i, (name, variant) in enumerate(VARIANTS.items()):
        families = variant.families
        if not everything:
            able = [family for family in families if refusal(name, family, None) is None] or families
            families = variant.quick or [able[(2 * i + j) % len(able)] for j in range(2)]
        found += [(name, family) for family in families]
    return found


def cases(found: list[tuple[str, str]]) -> list[bool]:
    """Whether it is refused, of every case."""
    return [refusal(variant, name, topics) is not None for variant, name in found for topics in topics_of(variant)]


# A GPU's machine offloads, and where quanto is the quantized cache runs, and rounds.
ELSEWHERE = {
    "offloaded cache": torch.cuda.is_available(),
    "offloaded static cache": torch.cuda.is_available(),
    "quantized cache": importlib.util.find_spec("optimum") is not None,
}
HERE = pairs(TEST_ALL)


@pytest.mark.parametrize("variant, name", HERE, ids=[f"{variant}-{name}" for variant, name in HERE])
def test_each_row_runs_under_its_own_mask(variant, name):
    check(variant, name, "replace")


def kept(everything: bool) -> list[tuple[str, str, str]]:
    """Each variant once, with splices that keep the hidden state in turns; of what compiles all, where it may take long."""
    found = []
    for i, (name, variant) in enumerate(VARIANTS.items()):
        able = [family for family in variant.families if refusal(name, family, None) is None] or variant.families
        if name == "square":  # which token is the first is not certain, so the first loses the code, too
            continue
        if everything:
            found += [(name, family, splice) for splice in SPLICES[1:] for family in (variant.quick or able)]
        elif not variant.quick:
            found.append((name, able[i % len(able)], SPLICES[1 + i % 3]))
    return found


KEPT = kept(TEST_ALL)


@pytest.mark.parametrize("variant, name, splice", KEPT, ids=["-".join(case) for case in KEPT])
def test_each_row_runs_under_its_own_mask_where_the_state_is_kept(variant, name, splice):
    check(variant, name, splice)


def check(variant, name, splice):
    if ELSEWHERE.get(variant):
        pytest.skip("this machine can do it, and what should come of it is not known here")
    run, batch, _, before, _, tokens = VARIANTS[variant]
    torch.manual_seed(0)
    case = Case(name, batch, before, splice)
    for topics in topics_of(variant):
        case.reset()
        case.topics = topics
        entries = topics if isinstance(topics, list) else [topics] * batch
        error = refusal(variant, name, topics)
        with case.attachment.unlearn(topics):
            if error is not None:
                with pytest.raises(error.error, match=error.message):
                    run(case)
                continue
            run(case)
        assert [sum(r.row == row for r in case.records) >= tokens for row in range(batch)] == [True] * batch
        verdicts = judge(name, case.encoded, case.records, entries, case.guidance, splice)
        assert verdicts == [{"MASKED" if entry else "UNMASKED"} for entry in entries], f"unlearn({topics})"
        # By its own count: every token that passed lost the one code, what a helper's forwards gave too.
        (report,) = case.attachment.report()
        if splice == "replace":
            assert report["hits"] * batch == report["tokens"] * sum(entry is not None for entry in entries)
        else:  # but the first of each sequence
            assert report["hits"] == report["changed"] <= report["tokens"]
            assert bool(report["hits"]) == bool(report["tokens"]) == any(entries)


def test_how_many_cases_there_are():
    """So that none is lost unseen."""
    everything, part = pairs(True), pairs(False)
    assert (len(VARIANTS), len(everything), len(part)) == (57, 598, 109)
    assert (len(cases(everything)), sum(cases(everything))) == (2150, 473)
    assert (len(cases(part)), sum(cases(part))) == (392, 60)
    assert min(sum(family == name for _, family in part) for name in ALL) >= 3
    assert HERE in (everything, part)
    assert (len(kept(True)), len(kept(False))) == (1485, 51) and KEPT in (kept(True), kept(False))


@pytest.mark.parametrize("splice", SPLICES)
@pytest.mark.parametrize("name", ALL)
def test_the_answers_are_far_apart(name, splice):
    """Every logit changes, and inside unlearn they are those by hand."""
    ids = prompts(name, 4)
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if is_t5(name) else {})}
    attachment = attach_canary(make(name), name, splice)
    active = []
    with torch.no_grad():
        with attachment.unlearn("canary"):
            masked = attachment.model(**given).logits
        with attachment.unlearn(None), attachment.observe(lambda x, bottleneck: active.append(bottleneck.active(x))):
            unmasked = attachment.model(**given).logits
    assert (active[0] == CANARY).any(1).all(), "every token keeps the code"
    answers = expected(name, ids.tolist(), ids.tolist(), splice)
    noise = (answers - torch.stack([masked, unmasked])).abs().max()
    if splice != "replace":  # the first token is left alone
        answers = answers[:, :, 1:]
    apart = (answers[0] - answers[1]).abs()
    # Of logits of 10 and more, by products of 24 bits here and of fp32 there.
    assert noise < TOLERANCE / 5 and apart.min() > 2 * noise
    assert apart.amax(-1).min() > APART >= 50 * TOLERANCE
