"""What is written is read again, bit for bit; SAELens reads it as well."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from releases import RELEASES
from releases_pickled import PICKLED

from cu_fast.sae import SAE, Provenance, load_sae, save_sae

ALL = RELEASES | PICKLED


def random_sae(kind: str, scale: str, d_out: int = 12, **parts) -> SAE:
    generator = torch.Generator().manual_seed(3)
    shapes = {"enc": (20, 12), "bias": (20,), "theta": (20,), "dec": (20, d_out), "b_dec": (d_out,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "topk":
        made |= {"theta": torch.zeros(20), "k": 5}
    norm = math.sqrt(12) if scale == "constant_norm" else 1.0
    return SAE(**{**made, "kind": kind, "scale": scale, "norm": norm, **parts})


@pytest.mark.parametrize("scale", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_every_kind_and_scale_is_read_as_it_was(kind, scale, tmp_path):
    """Rows that are not centred stay so under layer_norm: whether they have to be is not the reader's to decide."""
    said = Provenance(l0=71.25, dtype="BF16", model="gpt2-small")
    sae = random_sae(kind, scale, site="blocks.8.hook_resid_post", provenance=said)
    save_sae(sae, tmp_path / "written")
    again = load_sae(tmp_path / "written")
    assert again.sha256() == sae.sha256() and torch.equal(again.b_dec, sae.b_dec)
    assert (again.site, again.site_out, again.provenance.model) == (sae.site, None, "gpt2-small")
    assert (again.provenance.l0, again.provenance.dtype, again.family) == (71.25, "F32", "sae_lens")


@pytest.mark.parametrize("name", ALL)
def test_every_release_is_read_as_it_was(name, tmp_path):
    sae = load_sae(ALL[name][1](tmp_path / "release").folder)
    save_sae(sae, tmp_path / "written")
    again = load_sae(tmp_path / "written")
    assert again.sha256() == sae.sha256()
    assert (again.site, again.site_out, again.provenance.model) == (sae.site, sae.site_out, sae.provenance.model)
    assert again.provenance.l0 == sae.provenance.l0
    assert (again.b_dec is None) == (sae.b_dec is None)
    assert sae.b_dec is None or torch.equal(again.b_dec, sae.b_dec)


@pytest.mark.parametrize("kind", ["threshold", "topk"])
@pytest.mark.parametrize("parts", [{"d_out": 7}, {"site": "a", "site_out": "b"}, {"d_out": 7, "b_dec": None}])
def test_a_transcoder_is_read_as_it_was(kind, parts, tmp_path):
    sae = random_sae(kind, "none", **parts)
    save_sae(sae, tmp_path / "written")
    again = load_sae(tmp_path / "written")
    assert again.sha256() == sae.sha256()
    assert (again.site, again.site_out, again.b_dec is None) == (sae.site, sae.site_out, sae.b_dec is None)


def test_what_saelens_cannot_say_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"scale is 'layer_norm'; for one that writes to another place .* 'none' alone"
    ):
        save_sae(random_sae("threshold", "layer_norm", site_out="elsewhere"), tmp_path / "written")
    with pytest.raises(ValueError, match=r"norm is 2.0; SAELens' format knows sqrt\(Din\) = 3.46"):
        save_sae(random_sae("threshold", "constant_norm", norm=2.0), tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_a_folder_is_replaced_whole_and_others_are_not(tmp_path):
    first, second = random_sae("threshold", "none"), random_sae("topk", "none")
    for sae in (first, second):
        save_sae(sae, tmp_path / "written")
        assert load_sae(tmp_path / "written").sha256() == sae.sha256()
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["cfg.json", "sae_weights.safetensors"]
    (tmp_path / "written" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files, which are not replaced: notes\.txt"):
        save_sae(first, tmp_path / "written")
    assert load_sae(tmp_path / "written").sha256() == second.sha256()


def test_its_files_are_saelens_own(tmp_path):
    """The keys that SAELens 6 reads, spelt as it does; a file without its version would be taken for an older one."""
    save_sae(random_sae("topk", "layer_norm", site="blocks.8.hook_resid_post"), tmp_path / "written")
    said = json.loads((tmp_path / "written" / "cfg.json").read_text())
    assert said["metadata"].pop("cu_fast") == {"centred": True, "b_dec": True}
    assert said == {
        "architecture": "topk",
        "d_in": 12,
        "d_sae": 20,
        "k": 5,
        "rescale_acts_by_decoder_norm": False,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.8.hook_resid_post", "model_name": None},
    }


@pytest.mark.parametrize("scale", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_saelens_computes_the_same(kind, scale, tmp_path):
    library = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae = random_sae(kind, scale)
    # Its layer norm takes the mean off x, so that rows and centred rows are one function there.
    sae = dataclasses.replace(sae, enc=sae.enc - sae.enc.mean(1, keepdim=True)) if scale == "layer_norm" else sae
    save_sae(sae, tmp_path / "written")
    theirs = library.SAE.load_from_disk(tmp_path / "written")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(4)) * 2 + 0.4
    with torch.no_grad():
        a = theirs.encode(x)
        y = theirs.decode(a)
    ours = sae.activations(x)
    assert torch.equal(a > 0, ours > 0) and 50 < int((a > 0).sum()) < 950
    torch.testing.assert_close(a, ours, rtol=1e-5, atol=1e-5)  # sums of 12 terms of size 10, in another order
    torch.testing.assert_close(y, sae.reconstruct(x), rtol=1e-5, atol=1e-4)
