"""The kernels as they are used on a GPU: in CUDA graphs, on streams, compiled, in a model. Skipped without one.

The CUDA kernels, the Triton kernels, or, as a rehearsal, the CPU's, with stand-ins for graphs and streams:
gpu_examples.py.
"""

from __future__ import annotations

import gpu_examples as gpu
import hurtful
import pytest
import recorded
import tiny_models as tiny
import torch
from gpu_examples import CHOSEN, DEVICE, DRY, IMPL, identical, on

from cu_fast import BottleneckConfig, Mask, ops
from cu_fast.cli.verify import verify
from cu_fast.hf import forwards
from cu_fast.nn import CodebookBottleneck

pytestmark = pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))

T, D, E, K = 300, 48, 256, 8
C = gpu.codes_that_scan(T, E, K, 30_000)  # from T tokens on, the GPU scans
OPERATORS = ("pack_codes", "sae_encode", "sae_encode_topk", "codebook_quantize", "masked_decode", "codebook_bottleneck")


class Case:
    """Tensors on the device, written to in place, and each operator called on them with scan or without."""

    def __init__(self, scan: str, T: int = T, E: int = E, C: int = C) -> None:
        self.T, self.C = T, C
        self.x, self.W_enc, self.codes, self.table, self.b_enc = on(
            tuple(
                hurtful.matrix(rows, width, "gaussian", torch.bfloat16, seed)
                for seed, (rows, width) in enumerate(((T, D), (E, D), (C, E), (C, D), (1, E)))
            )
        )
        self.mask_table, self.mask_row = on(hurtful.masks(T, C, 0.3, 9))
        self.packed = ops.pack_codes(self.codes, scan=scan)
        self.encoder = ops.pack_codes(self.W_enc, "dot", self.b_enc[0], "none")
        self.z = ops.sae_encode(self.x, self.encoder, impl=IMPL)
        self.latents = ops.pack_codes(self.codes, "dot", scan=scan)
        self.ids = ops.codebook_quantize(self.z, self.packed, k=K, impl=IMPL).ids
        self.receipt = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def call(self, op: str):
        masks = {"mask_table": self.mask_table, "mask_row": self.mask_row}
        if op == "pack_codes":
            packed = ops.pack_codes(self.codes, scan="none")
            return packed.digits, packed.factor
        if op == "sae_encode":
            return ops.sae_encode(self.x, self.encoder, impl=IMPL)
        if op == "sae_encode_topk":
            return ops.sae_encode(self.z, self.latents, k=K, **masks, impl=IMPL)
        if op == "codebook_quantize":
            return ops.codebook_quantize(self.z, self.packed, k=K, **masks, return_hits=True, impl=IMPL)
        if op == "masked_decode":
            return ops.masked_decode(self.ids, None, self.table, **masks, impl=IMPL)
        encoder = (self.encoder, None)
        return ops.codebook_bottleneck(
            self.x, encoder, self.packed, self.table, None, **masks, k=K, receipt=self.receipt, impl=IMPL
        )

    def change(self, seed: int) -> None:
        """New inputs and masks in the same memory."""
        self.x.copy_(hurtful.matrix(self.T, D, "gaussian", torch.bfloat16, seed))
        self.z.copy_(ops.sae_encode(self.x, self.encoder, impl=IMPL))
        for old, new in zip((self.mask_table, self.mask_row), hurtful.masks(self.T, self.C, 0.6, seed)):
            old.copy_(new)


# -- graphs, streams, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40, T])
@pytest.mark.parametrize("scan", ["int8", "none"])
@pytest.mark.parametrize("op", OPERATORS)
def test_a_graph_is_replayed_with_what_its_memory_holds_then(op, scan, tokens):
    case = Case(scan, tokens)
    outputs, replay = gpu.capture(lambda: case.call(op))
    seen = []
    for seed in (20, 21, 20):
        case.change(seed)
        replay()
        want = case.call(op)
        assert identical(outputs, want)
        seen.append([part.clone() for part in gpu.parts(outputs)])
    assert identical(seen[2], seen[0])
    assert op == "pack_codes" or not identical(seen[1], seen[0]), "the replay does not see new inputs"


@pytest.mark.parametrize("op", ["codebook_quantize", "codebook_bottleneck"])
def test_a_graph_of_one_token_and_many_codes(op):
    """As many as a scan of one token takes."""
    case = Case("int8", 1, 2048, gpu.codes_that_scan(1, 2048, K, C))
    outputs, replay = gpu.capture(lambda: case.call(op))
    for seed in (20, 21):
        case.change(seed)
        replay()
        assert identical(outputs, case.call(op))


@pytest.mark.parametrize("mask_mode", ["ablate", "reselect"])
def test_a_module_in_a_graph_takes_new_masks_without_being_captured_again(mask_mode):
    module = bottleneck()
    module.mask_mode = mask_mode
    x = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    table = torch.zeros(4, (C + 31) // 32, dtype=torch.int32, device=DEVICE)
    row = (torch.arange(24, dtype=torch.int32, device=DEVICE) % 4) - 1
    outputs, replay = gpu.capture(lambda: module(x, table, row))
    nothing = outputs.clone()
    replay()
    assert identical(outputs, nothing)
    for share, changes in ((1.0, True), (0.0, False), (0.5, True)):
        table[:3].copy_(hurtful.masks(24, C, share, 3)[0])
        module.reset_receipt()
        replay()
        counted = module.receipt()
        assert counted["tokens"] == 24 and (counted["hits"] > 0) is changes
        assert identical(outputs, module(x, table, row))
        changed = (outputs != nothing).flatten(0, 1).any(1)
        assert changed.any() == changes and not changed[row < 0].any()


@pytest.mark.parametrize("scan", ["int8", "none"])
def test_nothing_waits_for_the_device_and_nothing_keeps_memory(scan):
    case, module = Case(scan), bottleneck()
    x = case.x.float()

    def everything():
        for op in OPERATORS[1:]:
            case.call(op)
        module(x, case.mask_table, case.mask_row)

    everything()
    before = gpu.allocated()
    with gpu.no_waiting():
        for _ in range(20):
            everything()
    assert gpu.allocated() == before


def test_two_streams_at_once():
    cases = [Case("int8", 17), Case("int8"), Case("none", 1), Case("none", 70)]
    wanted = [[case.call(op) for op in OPERATORS] for case in cases]
    gpu.settle()
    for _ in range(3):
        got: list[list] = [[] for _ in cases]
        places = gpu.streams(len(cases))
        for op in OPERATORS:  # in turn, so that the streams overlap
            for case, place, results in zip(cases, places, got):
                with place:
                    results.append(case.call(op))
        gpu.settle()
        assert all(identical(*pair) for pair in zip(got, wanted, strict=True))


# -- modules and models --------------------------------------------------------------------------------------------


def bottleneck(**changes) -> CodebookBottleneck:
    config = {"d_model": D, "code_dim": 64, "num_codes": C, "k": K, "activation": "none"} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = CodebookBottleneck(BottleneckConfig(**config))
    module.impl = IMPL
    return module.requires_grad_(False).to(DEVICE).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"autoencoder": False, "code_dim": D, "weight": "score"}, {"similarity": "l2"}]
)
def test_a_module_gives_what_it_gives_on_the_cpu(changes):
    there = bottleneck(**changes)
    here = CodebookBottleneck(there.config)
    here.load_state_dict({name: value.cpu() for name, value in there.state_dict().items()})
    here.eval()
    here.impl = "cpu"
    x, (table, row) = torch.randn(5, 7, D), hurtful.masks(35, C, 0.5, 2)
    assert identical(there(on(x), on(table), on(row)), here(x, table, row))
    assert there.receipt() == here.receipt() | {"impl": IMPL}


def test_a_compiled_module_equals_the_eager_one():
    module = bottleneck()
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    x = torch.randn(2, 9, D, device=DEVICE)
    table, row = on(hurtful.masks(18, C, 0.5, 2))
    assert identical(compiled(x, table, row), module(x, table, row))


def llama(impl: str, **changes):
    """A tiny Llama on the device with a bottleneck, its inputs, and a mask of half the codes that they use."""
    model = tiny.build("llama").to(DEVICE)
    layer = tiny.FAMILIES["llama"].layer
    attachment = tiny.attach_to(model, layer, **changes)
    module = attachment.bottlenecks[layer]
    module.impl = impl
    given = {name: value.to(DEVICE) for name, value in tiny.inputs("llama").items()}
    seen = []
    with attachment.observe(lambda x, bottleneck: seen.append(bottleneck.select(x).ids)):
        tiny.logits(model, given)
    used = seen[0].flatten().unique().cpu()
    mask = Mask.from_ids(used[::2], num_codes=tiny.C, codebook_sha256=module.codebook_sha256(), topic="a", layer=layer)
    attachment.add_mask(mask)
    return attachment, given, used


def test_training_has_the_same_gradient_in_every_run():
    torch.manual_seed(0)
    config = BottleneckConfig(d_model=D, code_dim=E, num_codes=2000, k=K, code_dropout=0.1, weight="score")
    module, x = CodebookBottleneck(config).train().to(DEVICE), torch.randn(500, D, device=DEVICE)
    x[100:300] = x[0]  # so that some codes have many places
    module.rms_steps.fill_(10**6)
    seen = []
    for _ in range(3):
        module.zero_grad()
        module.rms.fill_(1.0)
        torch.manual_seed(1)
        module(x).square().sum().backward()
        seen.append([parameter.grad for parameter in module.parameters()])
    assert all(identical(tuple(again), tuple(seen[0])) for again in seen[1:])


@pytest.mark.parametrize("mask_mode", ["ablate", "reselect"])
def test_deleted_codes_bite_in_a_model(mask_mode):
    attachment, given, used = llama(CHOSEN)
    attachment.mask_mode = mask_mode
    attachment.reset_report()
    plain = tiny.under(attachment, None, given)
    masked = tiny.under(attachment, ["a", None], given)
    assert not torch.equal(masked[0], plain[0]) and torch.equal(masked[1], plain[1])
    (report,) = attachment.report()
    assert report["impl"] == IMPL and report["tokens"] == 2 * given["input_ids"].numel() and report["hits"] > 0

    module, seen = next(iter(attachment.bottlenecks.values())), []
    reference, _, _ = llama("reference")
    reference.mask_mode = mask_mode
    assert torch.equal(tiny.under(reference, ["a", None], given), masked)
    with attachment.unlearn("a"), attachment.observe(lambda x, bottleneck: seen.append(x.clone())):
        tiny.logits(attachment.model, given)
    table, row = (
        attachment._layers[0].table.table,
        torch.zeros(seen[0].numel() // tiny.D, dtype=torch.int32, device=DEVICE),
    )
    z = seen[0].flatten(0, 1)
    deleted = set(used[::2].tolist())
    assert deleted & set(module.select(z).ids.flatten().tolist())
    row_of_a = [i for i in range(len(table)) if bool((table[i] != 0).any())]
    assert len(row_of_a) == 1
    left = module._select(z, tiny.K, mask_table=table, mask_row=row + row_of_a[0]).ids
    assert not deleted & set(left.flatten().tolist())


@torch.no_grad()
def test_generation_without_a_topic():
    attachment, given, _ = llama(CHOSEN)
    options = {"max_new_tokens": 5, "do_sample": False}
    with attachment.unlearn(None):
        plain = attachment.model.generate(**given, **options)
    with attachment.unlearn(["a", None]):
        masked = attachment.model.generate(**given, **options)
    assert masked.shape == plain.shape and torch.equal(masked[1], plain[1])


TOPICS = ("a", None, ["a", None], [None, "a"], "a")


def test_a_captured_model_deletes_what_holds_at_its_replay(monkeypatch):
    if DRY:
        recorded.graphs(monkeypatch)
    attachment, given, _ = llama(CHOSEN)
    captured = attachment.capture(lambda: attachment.model(**given, use_cache=False).logits, batch=2)
    for topics in TOPICS:
        with attachment.unlearn(topics):
            got = captured.replay().clone()
            assert torch.equal(got, tiny.logits(attachment.model, given))
    captured._replay()
    assert captured.output.isnan().all(), "a replay that was not armed"
    with attachment.unlearn("a"), gpu.no_waiting():
        captured.replay()


@pytest.mark.parametrize("splice", ["replace", "delta"])
def test_a_model_whose_graphs_the_compiler_makes(splice, monkeypatch):
    monkeypatch.setattr(forwards, "GRAPHS_ON", {torch.device(DEVICE).type})
    torch._dynamo.reset()
    attachment, given, _ = llama(CHOSEN, splice=splice)
    model = attachment.model
    call = torch.compile(model, fullgraph=True, mode=None if DRY else "reduce-overhead", backend="inductor")
    with torch.no_grad():
        for topics in TOPICS * 3:  # the first runs warm up and record
            with attachment.unlearn(topics):
                got = call(**given, use_cache=False).logits.clone()
                torch.testing.assert_close(got, model(**given, use_cache=False).logits, atol=1e-3, rtol=1e-3)
    assert DRY or torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@torch.no_grad()
def test_generation_with_a_static_cache():
    attachment, given, _ = llama(CHOSEN)
    for topics in TOPICS:
        with attachment.unlearn(topics):
            plain = attachment.model.generate(**given, max_new_tokens=8, do_sample=False)
            static = attachment.model.generate(
                **given, max_new_tokens=8, do_sample=False, cache_implementation="static"
            )
        assert torch.equal(plain, static)


def test_detach_gives_the_model_back():
    attachment, given, _ = llama(IMPL)
    model = attachment.model
    attachment.detach()
    assert torch.equal(tiny.logits(model, given), tiny.logits(tiny.build("llama").to(DEVICE), given))


def test_verify_compares_with_the_gpu(folder):
    checks = verify(folder)
    assert all(check["passed"] for check in checks), checks
    assert DRY or IMPL in checks[0]["figure"]
