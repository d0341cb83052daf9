"""What a released autoencoder computes here is what its own library computes: the same latents fire, to fp32's accuracy."""

from __future__ import annotations

import pytest
import torch
from releases import RELEASES, C, D, K, gemma_scope, gemma_scope_2, mwhanna, openmoss, sae_lens, sparsify, write
from releases_pickled import PICKLED, dictionary_learning, goodfire, openai, qwen_scope

from cu_fast import ops
from cu_fast.sae import convert_sae, load_sae
from cu_fast.sae.load import FAMILIES, recognised
from cu_fast.sae.released import Source, names_in

ALL = RELEASES | PICKLED
EPS = 2.0**-24  # half a step of fp32, relative: what one rounding may change


def tokens(d: int, T: int = 60) -> torch.Tensor:
    """Tokens with a mean and with lengths of their own, so that a missing token scale shows."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(T, d, generator=generator) * torch.linspace(0.5, 4, T)[:, None] + 0.4


def compare(release, sae) -> None:
    """The same latents fire; activations and what they write agree within the roundings of fp32.

    Of a dot product of D terms, at most D + 8: each term and sum, and w, rho, b and the two results. The sizes are those
    of the terms, and an activation that is off by ``wrong`` writes that much times |v|.
    """
    x = tokens(sae.d_in)
    a = sae.activations(x)
    truth = release.encode(x.double()) * release.unit
    assert torch.equal(a > 0, truth > 0)
    fire = int((truth > 0).sum())
    assert 0.02 * truth.numel() < fire < 0.9 * truth.numel(), "the fixture says nothing where all or none fires"
    rho, sigma = (1.0, 1.0) if sae.scale == "none" else (scale.double()[:, None] for scale in sae._token_scales(x))
    enc, bias, dec = sae.enc.double().abs(), sae.bias.double().abs(), sae.dec.double().abs()
    wrong = (sae.d_in + 8) * EPS * (rho * (x.double().abs() @ enc.T) + bias)
    assert ((a.double() - truth).abs() <= wrong).all()
    assert wrong.max() < 1e-3, "a bound that passes everything tests nothing"

    nothing = release.decode(torch.zeros_like(truth), x.double())
    written = release.decode(truth / release.unit, x.double()) - nothing
    bound = sigma * (((wrong * (truth > 0)) + (sae.num_latents + 8) * EPS * truth) @ dec)
    got = sae.decode(a, None if sae.scale == "none" else x).double()
    assert ((got - written).abs() <= bound + 1e-12).all()

    if release.skips:
        assert sae.b_dec is None
        with pytest.raises(ValueError, match="b_dec is None; for a reconstruction it should be what the release adds"):
            sae.reconstruct(x)
    else:  # besides: b_dec and the mean are rounded, and added
        more = 4 * EPS * (written.abs() + nothing.abs() + (sigma * sae.b_dec.double()).abs())
        whole = release.decode(truth / release.unit, x.double())
        assert ((sae.reconstruct(x).double() - whole).abs() <= bound + more + 1e-12).all()
        assert nothing.abs().max() > 0.01 or not sae.b_dec.any(), "a bias of nothing says nothing"


@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_its_library_computes(name, tmp_path):
    family, make = ALL[name]
    release = make(tmp_path)
    sae = load_sae(release.folder)
    assert (sae.family, sae.num_latents, sae.d_in) == (family, C, D)
    compare(release, sae)


@pytest.mark.parametrize("name", ALL)
def test_orientation_is_the_familys_where_shapes_do_not_tell(name, tmp_path):
    release = ALL[name][1](tmp_path, d=32, c=32)
    compare(release, load_sae(release.folder))


@pytest.mark.parametrize("name", ALL)
def test_one_family_recognises_it(name, tmp_path):
    family, make = ALL[name]
    folder = make(tmp_path).folder
    (file,) = [file for file in names_in(folder) if not file.endswith((".json", ".yaml"))]
    assert [known.NAME for known in FAMILIES if recognised(known, Source(folder, file))] == [family]
    if "/" not in file:
        assert load_sae(folder / file).sha256() == load_sae(folder).sha256()


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_what_its_tensors_are(name, suffix, tmp_path):
    plain = load_sae(PICKLED[name][1](tmp_path / "plain").folder)
    release = PICKLED[name][1](tmp_path / "pickle", suffix=suffix)
    sae = convert_sae(release.folder, tmp_path / "converted")
    assert (sae.sha256(), sae.family, sae.site) == (plain.sha256(), plain.family, plain.site)
    assert sae.provenance == plain.provenance and torch.equal(sae.b_dec, plain.b_dec)
    again = load_sae(tmp_path / "converted")
    assert (again.sha256(), again.family, again.site) == (sae.sha256(), "sae_lens", sae.site)


def test_every_family_has_a_release_here():
    assert {family for family, _ in ALL.values()} == {family.NAME for family in FAMILIES}


def test_what_a_release_says_is_kept(tmp_path):
    sae = load_sae(gemma_scope(tmp_path).folder)
    assert (sae.site, sae.provenance.l0, sae.provenance.dtype) == ("gemma-scope-2b-pt-res/layer_3", 71, "F32")
    cache = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "0a1b"
    cache.mkdir(parents=True)
    (cache / "layer_3").symlink_to(tmp_path / "gemma-scope-2b-pt-res" / "layer_3")
    linked = load_sae(cache / "layer_3" / "width_16k" / "average_l0_71")
    assert (linked.site, linked.sha256()) == (sae.site, sae.sha256())

    sae = load_sae(gemma_scope_2(tmp_path / "a").folder)
    assert (sae.site, sae.site_out, sae.provenance.model) == ("model.layers.5.output", None, "gemma-v3-270m")
    sae = load_sae(gemma_scope_2(tmp_path / "b", d_out=20).folder)
    assert (sae.site, sae.site_out) == ("model.layers.5.pre_feedforward_layernorm.output", "model.layers.5.output")
    assert load_sae(gemma_scope_2(tmp_path / "c", config=False).folder).site is None

    sae = load_sae(sparsify(tmp_path, dtype=torch.bfloat16).folder)
    assert (sae.site, sae.k, sae.provenance.l0, sae.provenance.dtype) == ("layers.3.mlp", K, K, "BF16")
    sae = load_sae(sparsify(tmp_path, c=2 * D, num_latents=0, expansion_factor=2).folder)
    assert sae.num_latents == 2 * D

    sae = load_sae(sae_lens(tmp_path).folder)
    assert (sae.site, sae.provenance.l0, sae.provenance.model) == ("blocks.8.hook_resid_post", None, "gpt2-small")
    old = sae_lens(tmp_path, metadata={}, hook_point="blocks.8.hook_resid_post", architecture="jumprelu")
    assert load_sae(old.folder).site == "blocks.8.hook_resid_post"


def test_files_beside_it_do_not_matter(tmp_path):
    folder = sae_lens(tmp_path).folder
    before = load_sae(folder).sha256()
    write(folder / "sparsity.safetensors", {"sparsity": torch.zeros(C)})
    write(folder / "optimizer" / "state.safetensors", {"W_enc": torch.zeros(3)})
    (folder / "README.md").write_text("of the release")
    (folder / "training_state.pt").write_bytes(b"never opened")
    assert load_sae(folder).sha256() == before


def test_a_topk_is_the_fused_selection(tmp_path):
    sae = load_sae(sparsify(tmp_path).folder)
    x = tokens(D)
    selection = ops.sae_encode(x, ops.pack_codes(sae.enc, "dot", sae.bias), k=K)
    dense = torch.zeros(len(x), C).scatter(1, selection.ids.long(), selection.scores)
    assert torch.equal(sae.activations(x), dense)


def test_what_the_other_families_say_is_kept(tmp_path):
    sae = load_sae(sparsify(tmp_path, transcode=True).folder)
    assert (sae.site, sae.site_out) == ("layers.3.mlp.input", "layers.3.mlp.output")
    sae = load_sae(openmoss(tmp_path).folder)
    assert (sae.site, sae.site_out) == ("blocks.5.hook_mlp_in", "blocks.5.hook_mlp_out")
    folder = mwhanna(tmp_path).folder
    sae = load_sae(folder)
    assert (sae.site, sae.site_out) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    assert (sae.provenance.model, sae.d_in, sae.d_out) == ("Qwen/Qwen3-4B", D, D - 4)
    (folder / "config.yaml").unlink()
    assert load_sae(folder).site is None
    sae = load_sae(RELEASES["jumprelu transcoder"][1](tmp_path).folder)
    assert (sae.site, sae.site_out, sae.d_out) == ("blocks.8.hook_mlp_in", "blocks.8.hook_mlp_out", D - 4)
    sae = load_sae(dictionary_learning(tmp_path, kind="BatchTopKSAE").folder)
    assert (sae.site, sae.k, sae.provenance.l0) == ("resid_post_layer_5", None, K)
    assert sae.provenance.model == "EleutherAI/pythia-70m"
    sae = load_sae(qwen_scope(tmp_path).folder)
    assert (sae.site, sae.k, sae.provenance.model) == ("model.layers.3", K, "Qwen/Qwen3-1.7B-Base")
    assert load_sae(openai(tmp_path).folder).site == "resid_post_mlp_v5_32k/8"
    sae = load_sae(goodfire(tmp_path).folder)
    assert (sae.site, sae.provenance.model) == ("model.layers.19", "Llama-3.1-8B-Instruct")


def test_k_is_said_once(tmp_path):
    named = qwen_scope(tmp_path).folder
    assert load_sae(named, k=K).k == K
    with pytest.raises(ValueError, match=f"the release's name says {K}"):
        load_sae(named, k=K + 1)
    bare = qwen_scope(tmp_path, name="copied").folder
    with pytest.raises(ValueError, match=r"k is not known; it should be said, as --k or k=, or be in the name"):
        load_sae(bare)
    assert load_sae(bare, k=K).sha256() == load_sae(named).sha256()
    with pytest.raises(ValueError, match=f"'k' is {C + 1}; it should be at most C = {C}"):
        load_sae(bare, k=C + 1)
    with pytest.raises(ValueError, match="k is 0; it should be a positive integer"):
        load_sae(bare, k=0)
    with pytest.raises(ValueError, match=f"k is 3; it should be {K}, as .* says"):
        load_sae(sparsify(tmp_path).folder, k=3)
