"""Attaching autoencoders and masks that carry their rows: messages, strengths, doses, and folders."""

from __future__ import annotations

import json
import shutil

import pytest
import releases
import torch
from safetensors.torch import load_file, save_file
from tiny_models import D, attach_to, bottleneck_config, build, inputs, logits, mask_for, under
from tiny_saes import LATENTS, activations, firing, hidden, make_sae, mask_of, without

import cu_fast
from cu_fast import attach, attach_masks
from cu_fast.masks import Mask

LAYER = "model.layers.1"
GIVEN = inputs("llama")
X = hidden("llama", LAYER, GIVEN)


def attached(sae=None, place=LAYER, **options):
    return attach(build("llama"), {place: sae or make_sae()}, **options)


def leaving(attachment, topics):
    """What leaves the layer."""
    kept = []
    handle = attachment.model.get_submodule(LAYER).register_forward_hook(
        lambda m, a, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    under(attachment, topics, GIVEN)
    handle.remove()
    return kept[0]


def expected(sae, strengths):
    return torch.cat([X[:, :1], without(sae, X, strengths)[:, 1:]], 1)


# -- what attach refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (
            {LAYER: make_sae()},
            {"splice": "replace"},
            ValueError,
            "splice is 'replace', and layer .* has an autoencoder",
        ),
        ({LAYER: make_sae()}, {"splice": "both"}, ValueError, "splice is 'both'"),
        (
            {LAYER: make_sae(d_in=24)},
            {},
            ValueError,
            "d_in of layer .* is 24; the model's width at 'model.layers.1' is 32",
        ),
        ({LAYER: make_sae(d_out=24)}, {}, ValueError, "d_out of layer .* is 24; the model's width .* is 32"),
        ({LAYER: 3}, {}, TypeError, "layer .* has int; it should be a BottleneckConfig, an SAE, or the folder of one"),
        ({}, {}, ValueError, "no layer is named"),
        (make_sae(), {}, ValueError, "the autoencoder does not say where it belongs; give {layer name: autoencoder}"),
        (make_sae(site="blocks.9.hook_resid_post"), {}, ValueError, "the model has no layer number 9"),
        (
            {LAYER: bottleneck_config(mask_mode="reselect")},
            {"splice": "delta"},
            ValueError,
            "mask_mode is 'reselect'; with splice 'delta' it should be 'ablate'",
        ),
    ],
)
def test_refused(source, options, error, message):
    model = build("llama")
    with pytest.raises(error, match=message):
        attach(model, source, **options)
    assert not any("codebook" in name for name, _ in model.named_modules())
    assert torch.equal(logits(model, GIVEN), logits(build("llama"), GIVEN))


def test_an_autoencoder_goes_where_its_release_says():
    for sites, name in (
        ({"site": "blocks.1.hook_resid_post"}, LAYER),
        ({"site": "blocks.1.mlp.hook_in", "site_out": "blocks.1.hook_mlp_out"}, f"{LAYER}.mlp:in -> {LAYER}.mlp"),
    ):
        attachment = attach(build("llama"), make_sae(**sites))
        assert list(attachment.bottlenecks) == [name]


def test_a_folder_of_a_release_that_is_exchanged_after_attach(tmp_path):
    """It was read into memory of its own."""
    release = releases.sparsify(tmp_path / "a", d=D)
    attachment = attach(build("llama"), {LAYER: release.folder})
    sae = cu_fast.load_sae(release.folder)
    attachment.add_mask(mask_of(sae, range(sae.num_latents), "a"))
    want = under(attachment, "a", GIVEN)
    file = release.folder / "sae.safetensors"
    save_file({name: tensor * 0 + 1 for name, tensor in load_file(file).items()}, file)
    assert torch.equal(under(attachment, "a", GIVEN), want)
    shutil.rmtree(release.folder)
    assert torch.equal(under(attachment, "a", GIVEN), want)


# -- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_strengths(kind):
    sae = make_sae(kind)
    ids = firing(sae, X)[:6]
    attachment = attached(sae)
    for name, some, how in (
        ("default", ids[:3], {}),
        ("once", ids[:3], {"strength": 1.0}),
        ("more", ids[2:], {"strength": 7.0}),
    ):
        attachment.add_mask(mask_of(sae, some, name, **how))
    want = {
        "default": dict.fromkeys(ids[:3], 4.0),
        "once": dict.fromkeys(ids[:3], 1.0),
        "more": dict.fromkeys(ids[2:], 7.0),
        # Of a latent that two masks change the stronger one holds, whatever their order.
        frozenset({"once", "more"}): dict.fromkeys(ids[:3], 1.0) | dict.fromkeys(ids[2:], 7.0),
        frozenset({"once", "default"}): dict.fromkeys(ids[:3], 4.0),
    }
    for topics, strengths in want.items():
        torch.testing.assert_close(leaving(attachment, topics), expected(sae, strengths), atol=1e-4, rtol=1e-4)


def test_a_clamp_and_a_dense_mask():
    sae = make_sae()
    ids, attachment = firing(sae, X)[-3:], attached(sae, skip_first=0)
    attachment.add_mask(mask_of(sae, ids, "to -2").with_clamp(-2.0))
    attachment.add_mask(mask_of(sae, ids, "all to -2").with_clamp(-2.0, dense=True))
    a = activations(sae, X)[..., ids]
    fires = a > 0
    for topic, changed in (("to -2", fires), ("all to -2", fires.any(-1, keepdim=True).expand_as(fires))):
        want = X + torch.where(changed, -2.0 - a, 0.0) @ sae.dec[ids]
        torch.testing.assert_close(leaving(attachment, topic), want, atol=1e-4, rtol=1e-4)
    assert 0 < fires.any(-1).sum() < fires[..., 0].numel(), "some tokens fire and some do not"


def test_what_the_report_says_of_doses():
    sae, given = make_sae(), {"input_ids": GIVEN["input_ids"]}
    ids = firing(sae, X)
    ids = ids[2:4] + ids[-2:]
    attachment = attached(sae)
    attachment.add_mask(mask_of(sae, ids, "a"))
    y = expected(sae, dict.fromkeys(ids, 4.0))
    fires = activations(sae, X)[..., ids] > 0
    fires[:, 0] = False
    doses = ((y - X).norm(dim=-1) / X.norm(dim=-1))[fires.any(-1)]
    with attachment.unlearn("a"):
        for _ in range(3):
            logits(attachment.model, given)
    (report,) = attachment.report()
    assert (report["splice"], report["codes"], report["k"]) == ("delta", LATENTS, None)
    assert (report["tokens"], report["hits"]) == (3 * X[..., 0].numel(), 3 * int(fires.sum()))
    assert report["changed"] == 3 * len(doses) < report["tokens"]
    assert report["dose"] == pytest.approx(doses.mean().item(), rel=1e-4)
    assert report["max_dose"] == pytest.approx(doses.max().item(), rel=1e-4)
    attachment.reset_report()
    with attachment.unlearn(None):
        logits(attachment.model, given)
    (report,) = attachment.report()
    assert [report[key] for key in ("tokens", "hits", "changed", "dose", "max_dose")] == [0, 0, 0, 0.0, 0.0]


def test_codes_of_a_bottleneck_that_keeps_the_state():
    attachment = attach_to(build("llama"), LAYER, attach_options={"splice": "delta", "skip_first": 0}, normalize=False)
    (splice,) = attachment.bottlenecks.values()
    kept = splice.select(X).ids.reshape(*X.shape[:2], -1)
    code = kept.flatten().mode().values.item()
    for name, strength, times in (("default", None, 2.0), ("three", 3.0, 3.0)):
        mask = mask_for(splice, [code], name)
        attachment.add_mask(mask if strength is None else mask.with_strength(strength))
        wrote = splice.autoencoder.W_dec @ splice.codebook.codes[code]
        want = X - times * (kept == code).any(-1, keepdim=True) * wrote
        torch.testing.assert_close(leaving(attachment, name), want.detach(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="is dense; only a sparse autoencoder's latents can be"):
        attachment.add_mask(mask_for(splice, [code], "dense").with_clamp(-1.0, dense=True))
    plain = attach_to(build("llama"), LAYER, normalize=False)
    with pytest.raises(ValueError, match="mask 'strong' sets strength; a splice that replaces"):
        plain.add_mask(mask_for(next(iter(plain.bottlenecks.values())), [code], "strong").with_strength(2.0))


# -- masks without their autoencoder --------------------------------------------------------------------------------


def saved(tmp_path, sae, **how):
    for name, ids in (("a", firing(sae, X)[:4]), ("b", firing(sae, X)[2:6])):
        mask_of(sae, ids, name, **how).save(tmp_path / name, rows=True)
    return [tmp_path / "a", tmp_path / "b"]


def test_masks_serve_without_their_autoencoder(tmp_path):
    for sae, place in (
        (make_sae(site="blocks.1.hook_resid_post"), LAYER),
        (make_sae(site="blocks.1.mlp.hook_in", site_out="blocks.1.hook_mlp_out"), f"{LAYER}.mlp:in -> {LAYER}.mlp"),
    ):
        whole, folders = attached(sae, place), saved(tmp_path, sae)
        for folder in folders:
            whole.load_mask(folder)
        for masks, layer in ((folders, None), (map(Mask.load, folders), place)):
            attachment = attach_masks(build("llama"), masks, layer=layer)
            assert list(attachment.bottlenecks) == [place]
            for topics in ("a", "b", {"a", "b"}, None, ["b", None]):
                assert torch.equal(under(attachment, topics, GIVEN), under(whole, topics, GIVEN))
        with pytest.raises(RuntimeError, match="has rows of masks alone, and no autoencoder that could be saved"):
            attachment.save(tmp_path / "attachment")
        (splice,) = attachment.bottlenecks.values()
        with pytest.raises(RuntimeError, match="only rows of masks are here; attach the autoencoder itself"):
            splice.active(X)
        third = mask_of(sae, [40, 41], "third")
        attachment.add_mask(third), whole.add_mask(third)
        assert torch.equal(under(attachment, {"a", "third"}, GIVEN), under(whole, {"a", "third"}, GIVEN))


def test_masks_that_cannot_serve_alone(tmp_path):
    sae, other, model = make_sae(), make_sae(seed=9), build("llama")
    mask_of(sae, [1, 2], "bare").save(tmp_path / "bare")
    bare = Mask.load(tmp_path / "bare")
    rows, topk = mask_of(sae, [1, 2], "rows"), make_sae("topk")
    for masks, layer, error, message in (
        ([bare], LAYER, ValueError, "mask 'bare' carries no rows; save it with rows=True"),
        ([rows, bare], LAYER, ValueError, "mask 'bare' carries no rows"),
        ([], LAYER, ValueError, "masks is empty"),
        ([rows], None, ValueError, "does not say where it belongs"),
        ([rows], "model.layers.8", ValueError, "the model has no layer 'model.layers.8'"),
        ([rows, mask_of(other, [1], "other")], LAYER, ValueError, "masks of several autoencoders are for layer"),
        ([mask_of(topk, [1], "k")], LAYER, ValueError, "keeps its k best latents, and their rank needs all of them"),
        ([rows, rows], LAYER, ValueError, "there are several masks 'rows' for layer"),
        (str(tmp_path / "bare"), LAYER, TypeError, "masks is .*; it should be a list of masks, or of their folders"),
        ([tmp_path / "nowhere"], LAYER, FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            attach_masks(model, masks, layer=layer)
        assert torch.equal(logits(model, GIVEN), logits(build("llama"), GIVEN))
    attachment = attach_masks(model, [rows], layer=LAYER)
    with pytest.raises(ValueError, match="mask 'bare' carries no rows, and the model was given no autoencoder"):
        attachment.add_mask(bare)
    with pytest.raises(ValueError, match="was made for another codebook"):
        attachment.add_mask(mask_of(other, [1], "other"))


# -- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_same_attachment(tmp_path):
    saes = {LAYER: make_sae("topk"), "model.layers.0.mlp:in -> model.layers.0.mlp": make_sae(seed=3)}
    attachment = attach(build("llama"), {**saes, "model.layers.2": bottleneck_config(splice="delta")}, skip_first=2)
    for (layer, sae), topic in zip(saes.items(), "ab"):
        attachment.add_mask(mask_of(sae, range(0, LATENTS, 2), topic, layer=layer, strength=2.5))
    attachment.save(tmp_path / "one")
    again = attach(build("llama"), tmp_path / "one")
    assert list(again.bottlenecks) == list(attachment.bottlenecks)
    assert [layer.skip_first for layer in again._layers] == [2, 2, 2]
    for topics in ("a", {"a", "b"}, None):
        assert torch.equal(under(again, topics, GIVEN), under(attachment, topics, GIVEN))
    assert [layer.skip_first for layer in attach(build("llama"), tmp_path / "one", skip_first=0)._layers] == [0] * 3
    with pytest.raises(ValueError, match=r"splice is 'replace', and layers .* have autoencoders; take 'delta'"):
        attach(build("llama"), tmp_path / "one", splice="replace")


def test_a_folder_that_was_edited(tmp_path):
    attachment = attached()
    (splice,) = attachment.bottlenecks.values()
    attachment.add_mask(mask_of(splice.sae, [1, 2, 3], "a"))
    for number, (what, message) in enumerate(
        {
            "tensors": "sha256|checksum|not the one",
            "kind": "changed|edited|checksum|sha256",
            "skip_first": "changed|edited|checksum|sha256",
            "mask": "changed|edited|checksum|sha256|does not match|lacks",
        }.items()
    ):
        folder = tmp_path / str(number)
        attachment.save(folder)
        if what == "tensors":
            file = folder / "bottleneck.safetensors"
            tensors = load_file(file)
            tensors[f"{LAYER}.dec"][0, 0] += 1
            save_file(tensors, file)
        elif what == "mask":
            shutil.rmtree(folder / "masks" / "a" / "0")
        else:
            file = folder / "config.json"
            record = json.loads(file.read_text())
            if what == "kind":
                record["layers"][LAYER]["sae"]["scale"] = "layer_norm"
            else:
                record["skip_first"] = 10**6
            file.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=message):
            attach(build("llama"), folder)
