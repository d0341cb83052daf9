"""The bottleneck: evaluation equals training's forward, is exact in any batch, fails closed, and learns."""

from __future__ import annotations

import dataclasses

import hurtful
import pytest
import torch

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.nn import BottleneckConfig, CodebookBottleneck

FAMILIES = {
    "codeunlearn": dict(d_model=24, code_dim=24, num_codes=200, k=8),
    "narrow": dict(d_model=24, code_dim=10, num_codes=200, k=4, activation="none"),
    "codebook_features": dict(d_model=24, code_dim=24, num_codes=200, k=4, weight="mean", autoencoder=False),
    "codebook_features_l2": dict(
        d_model=24, code_dim=24, num_codes=200, k=4, weight="mean", autoencoder=False, similarity="l2"
    ),
    "topk_sae": dict(d_model=24, code_dim=24, num_codes=200, k=6, similarity="dot", weight="score", autoencoder=False),
}


def bottleneck(seed=0, **config):
    torch.manual_seed(seed)
    made = CodebookBottleneck(BottleneckConfig(**(FAMILIES["codeunlearn"] | config)))
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    made.rms.fill_(3.0)
    return made.eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return bottleneck(**FAMILIES[request.param])


def test_evaluation_is_the_equation(family):
    config, x = family.config, 3 * torch.randn(2, 5, 24)
    flat, codes = x.reshape(-1, 24).double(), family.codebook.codes.detach().double()
    z = flat / 3
    if config.autoencoder:
        sae = family.autoencoder
        z = (z - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
        z = z.relu() if config.activation == "relu" else z
    scores = z @ codes.T
    if config.similarity == "cosine":
        scores = scores / codes.norm(dim=1)
    elif config.similarity == "l2":
        scores = scores - 0.5 * codes.square().sum(1)
    top = scores.topk(config.k)
    weights = {"one": 1.0, "mean": 1 / config.k, "score": top.values.relu()[..., None]}[config.weight]
    y = (codes[top.indices] * weights).sum(1)
    if config.autoencoder:
        y = y @ family.autoencoder.W_dec.double().T + family.autoencoder.b_dec.double()
    got = family(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    torch.testing.assert_close(got.double().reshape(-1, 24), 3 * y, rtol=1e-5, atol=1e-5)


def test_training_forward_gives_evaluation_values(family):
    x = torch.randn(40, 24)
    family.config = dataclasses.replace(family.config, normalize=False)
    evaluated = family(x)
    trained = family.train()(x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["ablate", "reselect"])
def test_a_token_does_not_depend_on_its_batch(family, mode):
    family.mask_mode = mode
    x = 3 * torch.randn(33, 24)
    table, row = hurtful.masks(33, 200, 0.3, 1)
    batch = family(x, table, row)
    for t in (0, 13, 32):
        assert torch.equal(family(x[t : t + 1], table, row[t : t + 1])[0], batch[t])


def test_the_unfolded_form_agrees_and_is_chosen_by_size(family, monkeypatch):
    x = 3 * torch.randn(9, 24)
    table, row = hurtful.masks(9, 200, 0.3, 1)
    folded = family(x, table, row)
    monkeypatch.setattr("cu_fast.nn.bottleneck.FOLD_LIMIT_BYTES", 0)
    family.fold()
    assert (family.folded.table is None) == (family.config.code_dim < family.config.d_model)
    torch.testing.assert_close(family(x, table, row), folded, rtol=1e-5, atol=1e-5)


def test_ablate_zeroes_and_reselect_replaces():
    made, x = bottleneck(weight="one"), 3 * torch.randn(1, 24)
    ids = made.select(x, 9).ids[0]
    table = torch.zeros(1, 7, dtype=torch.int32)
    first = int(ids[0])
    table[0, first // 32] = torch.tensor(1 << (first % 32), dtype=torch.int64).to(torch.int32)
    row = torch.zeros(1, dtype=torch.int32)
    bias = made.folded.b_dec

    def summed(chosen):
        return ops.masked_decode(chosen[None], None, made.folded.table, bias)

    assert torch.equal(made(x, table, row), summed(ids[1:8]))
    made.mask_mode = "reselect"
    assert torch.equal(made(x, table, row), summed(ids[1:9]))
    assert made.receipt()["tokens"] == 2 and made.receipt()["hits"] == 2


def test_implementations_give_the_same_bits(family):
    x = 3 * torch.randn(19, 24)
    table, row = hurtful.masks(19, 200, 0.3, 1)
    got = {}
    for family.impl in ("reference", "cpu"):
        family.fold()
        got[family.impl] = family(x, table, row)
    assert torch.equal(got["reference"], got["cpu"])


def test_a_faulty_token_is_nan_and_alone(family):
    x = torch.randn(4, 24)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    y = family(x)
    assert y[1:3].isnan().all() and torch.equal(y[[0, 3]], family(x[[0, 3]]))


def test_a_mask_in_training_mode_is_an_error():
    table, row = hurtful.masks(2, 200, 0.3, 1)
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        bottleneck().train()(torch.randn(2, 24), table, row)


def test_evaluation_has_no_gradient_and_says_so():
    x = torch.randn(2, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"evaluation mode has no gradient.*model\.train\(\)"):
        bottleneck()(x).sum().backward()


def test_leading_dimensions_are_tokens():
    made, x = bottleneck(), torch.randn(6, 24)
    y = made(x)
    for shape in ((2, 3, 24), (6, 1, 24), (3, 48)):
        assert torch.equal(made(x.reshape(shape)), y.reshape(shape))
    assert torch.equal(made(x[0]), y[0])


def test_writing_to_a_parameter_is_seen():
    made, x = bottleneck(), torch.randn(3, 24)
    before = made(x)
    with torch.no_grad():
        made.autoencoder.b_dec += 1
    torch.testing.assert_close(made(x), before + 3, rtol=1e-5, atol=1e-5)


WRITES = {
    "in place": lambda module, name, new: getattr(module, name).detach().copy_(new),
    "replaced": lambda module, name, new: setattr(
        module, name, torch.nn.Parameter(new) if name in module._parameters else new
    ),
    "through data": lambda module, name, new: getattr(module, name).data.copy_(new),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "name",
    ["codebook.codes", "rms", *(f"autoencoder.{w}_{p}" for w, p in zip("WbbWb", ["enc", "enc", "pre", "dec", "dec"]))],
)
def test_every_weight_that_is_written_to_is_seen(write, name):
    made, fresh, x = bottleneck(), bottleneck(1), torch.randn(3, 24)
    before, sha256 = made(x), made.codebook_sha256()
    owner, _, attribute = name.rpartition(".")
    module = made.get_submodule(owner)
    WRITES[write](module, attribute, torch.rand_like(getattr(module, attribute)) + 0.5)
    if write == "through data":
        made.refresh()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(made(x), fresh(x)) and not torch.equal(fresh(x), before)
    assert made.codebook_sha256() == fresh.codebook_sha256()
    assert (made.codebook_sha256() != sha256) == (name == "codebook.codes")


@pytest.mark.parametrize("name", ["codebook", "autoencoder"])
def test_a_module_that_is_replaced_is_seen(name):
    made, other, x = bottleneck(), bottleneck(1), torch.randn(3, 24)
    before = made(x)
    setattr(made, name, getattr(other, name))
    fresh = bottleneck(2)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(made(x), fresh(x)) and not torch.equal(fresh(x), before)


def test_weights_that_are_no_parameters_or_of_inference_mode():
    made, x = bottleneck(), torch.randn(3, 24)
    want = made(x)
    with torch.inference_mode():
        assert torch.equal(bottleneck()(x), want)
    torch.nn.utils.parametrize.register_parametrization(made.autoencoder, "b_dec", torch.nn.Identity())
    with torch.no_grad():
        made.autoencoder.parametrizations.b_dec.original += 1
    torch.testing.assert_close(made(x), want + 3, rtol=1e-5, atol=1e-5)


def test_load_state_dict_folds_again_and_changes_the_hash():
    a, b, x = bottleneck(0), bottleneck(1), torch.randn(3, 24)
    assert a.codebook_sha256() != b.codebook_sha256()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x)) and a.codebook_sha256() == b.codebook_sha256()


def test_the_hash_knows_rounding_but_not_storage():
    made = bottleneck()
    fp32 = made.codebook_sha256()
    rounded = made.bfloat16().codebook_sha256()
    assert rounded != fp32 and made.float().codebook_sha256() == rounded
    assert float(made.rms) == 3.0 and made.rms.dtype == torch.float32


def test_casting_does_not_round_the_scale():
    made = bottleneck()
    made.rms.fill_(3.0001)
    assert float(made.half().rms) == pytest.approx(3.0001, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_and_weights(family, dtype):
    x = torch.randn(5, 24).to(dtype)
    assert family(x).dtype == dtype
    y = family.to(dtype)(x)
    assert y.dtype == dtype and y.isfinite().all()


def test_gradient_is_straight_through():
    made = bottleneck(normalize=False, activation="none").train()
    made.rms.fill_(1.0)
    x = torch.randn(4, 24, requires_grad=True)
    upstream = torch.randn(4, 24)
    made(x).backward(upstream)
    sae = made.autoencoder
    # As if y were W_dec z: the selection passes the gradient unchanged.
    torch.testing.assert_close(x.grad, upstream @ sae.W_dec @ sae.W_enc)
    ids = made.select(x.detach()).ids.long()
    through = torch.zeros_like(made.codebook.codes)
    through.index_add_(0, ids.flatten(), (upstream @ sae.W_dec).repeat_interleave(8, 0))
    torch.testing.assert_close(made.codebook.codes.grad, through)


def test_code_dropout_silences_codes_in_training_only():
    made, x = bottleneck(code_dropout=0.5, normalize=False), torch.randn(200, 24)
    evaluated = made(x)
    assert torch.equal(made(x), evaluated)
    made.train()
    torch.manual_seed(0)
    first, losses = made(x), made.losses
    alive = torch.rand(200, generator=torch.Generator().manual_seed(0)) >= 0.5
    ids = made.codebook.counts.nonzero()[:, 0]
    assert 0.3 < alive[ids].float().mean() < 0.7
    with torch.no_grad():
        z = made.autoencoder.encode(x / made.rms)
        kept, weights = made._select_training(z)
        q = (made.codebook.codes[kept] * (weights * alive[kept])[..., None]).sum(1)
        torch.testing.assert_close(first, made.autoencoder.decode(q) * made.rms, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, evaluated)
    whole = (made.codebook.codes[kept] * weights[..., None]).sum(1)
    torch.testing.assert_close(losses["codebook"], (whole - z).square().mean() / (z - z.mean(0)).square().mean())


def test_padding_is_left_out_of_training():
    made = bottleneck().train()
    x, padded = torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)
    padded[0, 3:] = False
    real = x[padded]
    alone = bottleneck().train()
    want = alone(real)
    made.token_mask = padded
    got = made(x)
    torch.testing.assert_close(got[padded], want)
    assert torch.equal(got[~padded], x[~padded]) and torch.equal(made.codebook.counts, alone.codebook.counts)
    torch.testing.assert_close(made.auxiliary_loss(), alone.auxiliary_loss())
    made.token_mask = torch.ones(7, dtype=torch.bool)  # of something else: nothing is left out
    assert made(x).shape == x.shape and int(made.codebook.counts.sum()) == 8 * (8 + 10)


def test_auxiliary_loss_is_the_weighted_sum_and_needs_a_forward():
    made = bottleneck(reconstruction_weight=2.0, l1_weight=0.5).train()
    with pytest.raises(RuntimeError, match="forward pass"):
        made.auxiliary_loss()
    made(torch.randn(30, 24))
    parts = made.losses
    want = 2 * parts["reconstruction"] + 0.25 * (parts["commitment"] + parts["codebook"]) + 0.5 * parts["l1"]
    torch.testing.assert_close(made.auxiliary_loss(), want)
    torch.testing.assert_close(parts["l1"], made.codebook.codes.abs().mean())


def test_training_reduces_reconstruction_error(family):
    g = torch.Generator().manual_seed(0)
    data = 5 * torch.randn(64, 24, generator=g)[torch.randint(64, (512,), generator=g)]
    family.train()
    family.seed_codes(data, g)
    optimizer = torch.optim.Adam(family.parameters(), lr=1e-2)
    errors = []
    for _ in range(40):
        family(data)
        errors.append(family.losses["reconstruction"].item())
        optimizer.zero_grad()
        family.auxiliary_loss().backward()
        optimizer.step()
    assert errors[-1] < 0.85 * errors[0], errors[::8]


def test_usage_and_reseeding():
    made = bottleneck(num_codes=300).train()
    x = torch.randn(2, 24)
    made(x)
    used = made.codebook.counts.clone()
    assert int(used.sum()) == 16 and made.usage()["dead"] == int((used == 0).sum())
    assert made.usage()["perplexity"] == pytest.approx(len(used[used > 0]), rel=0.5)
    before = made.codebook.codes.detach().clone()
    moved = made.reseed_dead(torch.Generator().manual_seed(0))
    changed = (made.codebook.codes != before).any(1)
    assert moved == int((used == 0).sum()) and torch.equal(changed, used == 0)
    assert int(made.codebook.counts.sum()) == 0


def test_seed_codes_start_at_the_data_and_set_the_scale():
    made = bottleneck(activation="none", num_codes=50).train()
    made.rms_steps.zero_()
    x = 7 * torch.randn(100, 24)
    made.seed_codes(x)
    assert float(made.rms) == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    z = made.autoencoder.encode(x / made.rms)
    differences = (made.codebook.codes[:, None] * made.config.k - z[None]).abs().amax(2)
    assert differences.min(1).values.max() < 1e-6


def test_a_narrow_encoder_starts_at_the_principal_axes():
    made = CodebookBottleneck(BottleneckConfig(**FAMILIES["narrow"])).train()
    basis = torch.randn(10, 24)
    made.seed_codes(torch.randn(500, 10) @ basis)
    fresh = torch.randn(50, 10) @ basis  # lies in the same ten dimensions
    reconstructed, _ = made.autoencoder(fresh)
    torch.testing.assert_close(reconstructed, fresh, rtol=1e-4, atol=1e-4)


def test_erase_leaves_no_trace_and_acts_as_reselect():
    made, x = bottleneck(), 3 * torch.randn(6, 24)
    ids = torch.unique(made.select(x, 2).ids)
    table = torch.zeros(1, 7, dtype=torch.int64)
    for j in ids.tolist():
        table[0, j // 32] |= 1 << (j % 32)
    table = torch.where(table >= 2**31, table - 2**32, table).int()
    made.mask_mode = "reselect"
    masked = made(x, table, torch.zeros(6, dtype=torch.int32))
    gone, sha = made.codebook.codes.detach()[ids.long()], made.codebook_sha256()
    kept = made.erase(ids)
    assert torch.equal(made(x), masked)
    assert made.config.num_codes == 200 - len(ids) == len(kept) and made.codebook_sha256() != sha
    for tensor in made.state_dict().values():
        if tensor.shape[-1:] == gone.shape[-1:]:
            assert not (tensor.reshape(-1, 1, gone.shape[-1]) == gone).all(-1).any()
    with pytest.raises(ValueError, match="should remain"):
        made.erase(torch.arange(made.config.num_codes - 7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(k=0), "k is 0"),
        (dict(k=201), "at most num_codes, 200"),
        (dict(num_codes=2.5), "num_codes is 2.5"),
        (dict(similarity="l3"), "similarity is 'l3'"),
        (dict(activation="gelu"), "activation is 'gelu'"),
        (dict(mask_mode="drop"), "mask_mode is 'drop'"),
        (dict(autoencoder=False, code_dim=12), "code_dim is 12"),
        (dict(l1_weight=-1), "l1_weight is -1"),
        (dict(code_dropout=1.0), "code_dropout is 1.0"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        BottleneckConfig(**(FAMILIES["codeunlearn"] | change))


def test_config_round_trip_refuses_what_it_does_not_know():
    config = BottleneckConfig(**FAMILIES["narrow"])
    assert BottleneckConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown keys \['beta'\] and lacks \['k'\]"):
        BottleneckConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "k"} | {"beta": 1})


def test_compiles_whole_with_and_without_masks(family):
    x = 3 * torch.randn(2, 4, 24)
    table, row = hurtful.masks(8, 200, 0.3, 1)
    torch._dynamo.reset()
    compiled = torch.compile(family, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), family(x))
        assert torch.equal(compiled(x, table, row), family(x, table, row))


def test_is_deleted_reads_the_bits_of_the_contract():
    table = torch.tensor([[1 << 3, -(2**31)]], dtype=torch.int32)
    ids = torch.tensor([[3, 63, 4, -1]])
    assert reference.is_deleted(ids, table, torch.tensor([0], dtype=torch.int32)).tolist() == [
        [True, True, False, False]
    ]
    assert not reference.is_deleted(ids, table, torch.tensor([-1], dtype=torch.int32)).any()


def test_casting_twice_rounds_nothing_that_was_folded():
    bottleneck = CodebookBottleneck(BottleneckConfig(d_model=32, code_dim=32, num_codes=600, k=4)).bfloat16().eval()
    x = torch.randn(3, 32)
    y = bottleneck(x)
    assert torch.equal(bottleneck.to(torch.bfloat16)(x), y)
    assert bottleneck.folded.codes.factor.dtype == torch.float32


@pytest.mark.parametrize("row", [-2, -(2**31), 3, 2**31 - 1])
@pytest.mark.parametrize("splice", ["replace", "delta"])
def test_a_mask_row_that_does_not_exist_is_nan(splice, row, monkeypatch):
    """As in every kernel on a GPU, where no value is looked at first: what is deleted there is not known."""
    monkeypatch.setattr(ops, "check_values", lambda *arguments: None)
    monkeypatch.setattr(ops.checks, "check_values", lambda *arguments: None)
    module, x = bottleneck(splice=splice), torch.randn(4, 24)
    module.impl = "reference"
    table = module.new_table("cpu")
    table.write(0, module.row_of([]))
    table.write(2, module.row_of([]))
    tensors = tuple(tensor[:3] for tensor in table.tensors)
    masks = tensors[0] if splice == "replace" else ops.LatentMasks(*tensors)
    rows = torch.tensor([0, row, -1, 2], dtype=torch.int32)
    y, want = module(x, masks, rows), module(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.parametrize("return_hits", [False, True])
def test_a_selection_under_a_mask_row_that_does_not_exist(return_hits, monkeypatch):
    monkeypatch.setattr(ops.checks, "check_values", lambda *arguments: None)
    codes, z = ops.pack_codes(torch.randn(50, 24), "dot"), torch.randn(3, 24)
    masks = {"mask_table": torch.zeros(2, 2, dtype=torch.int32), "mask_row": torch.tensor([0, -5, 2]).int()}
    scores, ids, _ = ops.codebook_quantize(z, codes, k=4, impl="reference", return_hits=return_hits, **masks)
    assert scores[1:].isnan().all() and (ids[1:] == -1).all()
    assert torch.equal(ids[0], ops.codebook_quantize(z, codes, k=4).ids[0])
