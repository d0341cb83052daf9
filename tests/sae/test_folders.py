"""Folders that are no release, or a damaged one, or one that no rule is known for: each message says what and where."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import (
    RELEASES,
    C,
    D,
    K,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    mwhanna,
    numbers,
    openmoss,
    sae_lens,
    sae_lens_transcoder,
    sparsify,
    write,
)
from releases_pickled import PICKLED, dictionary_learning, goodfire, openai, qwen_scope

from cu_fast.files import read_safetensors
from cu_fast.sae import load_sae
from cu_fast.sae.released import entries

ALL = RELEASES | PICKLED
ONE_OF_EACH = {family: name for name, (family, _) in reversed(ALL.items())}  # family -> the first of its releases


def refused(folder: Path, *parts: str) -> None:
    """load_sae raises, and its message holds these parts."""
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    for part in parts:
        assert part in str(error.value)


def file_of(folder: Path) -> Path:
    (path,) = [path for path in folder.rglob("*") if path.suffix in (".npz", ".safetensors")]
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".npz":
        return {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    return read_safetensors(path, {key: entry.shape for key, entry in entries(path).items()})


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder; give the one that holds"):
        load_sae(tmp_path / "none")


def test_unknown_files_are_named_and_so_is_what_families_want(tmp_path):
    refused(tmp_path, "holds nothing. No family", "gemma_scope: params.npz with W_enc", "sparsify: cfg.json, sae.")
    write(tmp_path / "model.safetensors", numbers(0, **{"lm_head.weight": (3, 3)}), {}, "config.json")
    refused(tmp_path, "holds config.json, model.safetensors; model.safetensors: lm_head.weight. No family")


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_name_alone_is_not_recognised(family, tmp_path):
    path = file_of(ALL[ONE_OF_EACH[family]][1](tmp_path).folder)
    tensors = tensors_of(path)
    key = sorted(tensors)[0]
    write(path, {"other" if old == key else old: tensor for old, tensor in tensors.items()})
    folder = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    refused(folder, "No family that is known has these", "other")


def test_two_releases_in_one_folder_are_ambiguous(tmp_path):
    folder = sae_lens(tmp_path).folder
    (folder / "sae.safetensors").write_bytes(file_of(sparsify(tmp_path).folder).read_bytes())
    refused(folder, "That is both sae_lens and sparsify", "sae.safetensors: W_dec, b_dec, encoder.bias", "one release")


@pytest.mark.parametrize("name", ["ae.pt", "layer3.sae.pt", "sae.pth", "sae.pkl", "pytorch_model.bin"])
def test_pickles_are_not_read(name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it was unpickled",)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f"{name} may be pickled, and is not read: run `cu-fast sae convert`")
    assert not (tmp_path / "it was unpickled").exists()


def test_objects_in_an_npz_are_not_read(tmp_path):
    path = file_of(gemma_scope(tmp_path).folder)
    arrays = {**np.load(path), "threshold": np.array([{}] * C, dtype=object)}
    np.savez(path, **arrays)
    refused(path.parent, "params.npz: tensor 'threshold' is object; it should be one of F32, BF16, F16")


@pytest.mark.parametrize("family", ONE_OF_EACH)
@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 0.99])
def test_truncated_files(family, share, tmp_path):
    release = ALL[ONE_OF_EACH[family]][1](tmp_path)
    path = file_of(release.folder)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    refused(release.folder, str(path), "is not a sound", "it may be truncated")


def test_an_npz_whose_bits_changed(tmp_path):
    path = file_of(gemma_scope(tmp_path).folder)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("W_dec.npy").header_offset
    raw[start + 400] ^= 1
    path.write_bytes(raw)
    refused(path.parent, str(path), "is not a sound npz file", "CRC")


def test_an_npz_exchanged_between_its_headers_and_its_weights(tmp_path, monkeypatch):
    path = file_of(gemma_scope(tmp_path).folder)
    load = np.load

    def exchanged(*arguments, **options):
        np.savez(path, W_enc=np.zeros((2, 2), np.float32))
        return load(*arguments, **options)

    monkeypatch.setattr(np, "load", exchanged)
    refused(path.parent, str(path), "is not a sound npz file", "is not a file in the archive")


def test_an_npz_that_claims_more_than_it_holds(tmp_path):
    path = file_of(gemma_scope(tmp_path).folder)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["W_dec.npy"] = (
        parts["W_dec.npy"].replace(b"(40, 24), }", b"(4000000000, 24), }").replace(b" " * 9 + b"\n", b" \n")
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refused(path.parent, "is not a sound npz file", "the array 'W_dec' takes", "its header says 384000000")


UNREAD = ("k", "group_sizes", "stats_last_nonzero")  # what the libraries keep beside weights


@pytest.mark.parametrize("name", ["jumprelu", "gated", "skip transcoder", *ONE_OF_EACH.values(), *PICKLED])
def test_wrong_tensors(name, tmp_path):
    """Every tensor of a family in turn: of another shape, of another dtype, with NaN, with Inf."""
    release = ALL[name][1](tmp_path)
    path = file_of(release.folder)
    tensors = tensors_of(path)
    unread = (*UNREAD, "threshold") if name.startswith("AutoEncoderTopK") else UNREAD
    for key, tensor in tensors.items():
        if key in unread:
            continue
        flat = tensor.flatten()
        hurt = {"NaN": flat.clone(), "Inf": flat.clone()}
        hurt["NaN"][-1], hurt["Inf"][0] = torch.nan, torch.inf
        for bad in hurt.values():
            write(path, tensors | {key: bad.view(tensor.shape)})
            refused(release.folder, f"{path}: tensor {key!r} holds NaN or Inf")
        write(path, tensors | {key: tensor.double()})
        refused(release.folder, f"{path}: tensor {key!r} is ", "64; it should be one of F32, BF16, F16")
        write(path, tensors | {key: tensor[..., None]})
        refused(release.folder, f"{path}: tensor {key!r} has shape", "it should be [")
    vectors = ("b_dec", "b_d", "decoder.bias", "bias", "decoder_bias", "pre_bias", "decoder_linear.bias")
    vector = next(key for key in tensors if key.lower() in vectors)
    wide = len(tensors[vector])
    write(path, tensors | {vector: tensors[vector][1:]})
    refused(release.folder, f"{path}: tensor {vector!r} has shape [{wide - 1}]; it should be [", f"= {wide}")
    write(path, tensors | {"W_other": torch.ones(2)})
    refused(release.folder, str(path), "holds the unexpected ['W_other']; it should hold [")


def test_a_transposed_matrix_is_refused_where_shapes_tell(tmp_path):
    for name in ONE_OF_EACH.values():
        release = ALL[name][1](tmp_path)
        path = file_of(release.folder)
        tensors = tensors_of(path)
        matrices = [key for key, tensor in tensors.items() if tensor.dim() == 2]
        assert len(matrices) == 2
        for key in matrices:
            write(path, tensors | {key: tensors[key].T.clone()})
            refused(release.folder, f"{path}: tensor ", " has shape ", "it should be [")


@pytest.mark.parametrize("key", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_scaling_factor_other_than_one_is_refused(key, tmp_path):
    release = sae_lens(tmp_path)
    path = file_of(release.folder)
    tensors = tensors_of(path)
    write(path, tensors | {key: torch.ones(C)})
    load_sae(release.folder)
    write(path, tensors | {key: torch.ones(C).index_fill(0, torch.tensor([5]), 2.0)})
    refused(release.folder, f"{path}: tensor {key!r} holds 2; it should be all ones")


def test_gemma_scope_needs_the_folders_of_the_release(tmp_path):
    path = file_of(gemma_scope(tmp_path).folder)
    for place in ("copied", "my_embedding/width_4k/average_l0_44", "layer_3/width_16k/average_l0_71/old"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "params.npz").write_bytes(path.read_bytes())
        refused(tmp_path / place, "is not in layer_.../width_.../average_l0_... or embedding/")


@pytest.mark.parametrize(
    "make, config, message",
    [
        (
            sae_lens,
            {"architecture": "temporal"},
            "'architecture' is 'temporal'; it should be one of standard, jumprelu",
        ),
        (sae_lens, {"architecture": "transcoder"}, "a transcoder's 'normalize_activations' should be 'none'"),
        (sae_lens_transcoder, {"normalize_activations": "layer_norm"}, "they are 'layer_norm' and False"),
        (sae_lens_transcoder, {"d_out": None}, "'d_out' is None; it should be a positive integer"),
        (
            sae_lens,
            {
                "normalize_activations": "constant_norm_rescale",
                "metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            },
            "no rule is known for both",
        ),
        (sae_lens, {"metadata": {"cu_fast": {"l0": -1}}}, "'l0' is -1; it should be a positive number"),
        (sae_lens, {"metadata": {"cu_fast": {"centred": 1}}}, "'centred' is 1; it should be true or false"),
        (openmoss, {"sae_type": "clt"}, "'sae_type' is 'clt'; it should be 'sae'"),
        (openmoss, {"act_fn": "batchtopk"}, "'act_fn' is 'batchtopk'; it should be 'relu' or 'jumprelu' or 'topk'"),
        (openmoss, {"norm_activation": "batch-wise"}, "'norm_activation' is 'batch-wise'; it should be"),
        (openmoss, {"norm_activation": "token-wise"}, "of a transcoder it should be another"),
        (openmoss, {"use_glu_encoder": True}, "'use_glu_encoder' is true; it should be false"),
        (openmoss, {"expansion_factor": 0}, "'expansion_factor' is 0; it should be a positive number"),
        (openmoss, {"hook_point_in": "elsewhere"}, "lacks the tensors ['dataset_average_activation_norm.elsewhere']"),
        (
            dictionary_learning,
            {"trainer": {"dict_class": "IdentityDict"}},
            "'trainer.dict_class' is 'IdentityDict'; it",
        ),
        (dictionary_learning, {"trainer": {}}, "'trainer.dict_class' is None; it should be one of AutoEncoder,"),
        (dictionary_learning, {"trainer": {"dict_class": "GatedAutoEncoder"}}, "lacks the tensors ['decoder_bias',"),
        (openai, {"activation": "Identity"}, "'activation' is 'Identity'; it should be 'ReLU' or 'TopK'"),
        (openai, {"activation_state_dict": {}}, "'k' is None; it should be a positive integer"),
        (openai, {"activation_state_dict": {"k": C + 1}}, f"'k' is {C + 1}; it should be at most C = {C}"),
        (
            openai,
            {"activation_state_dict": {"k": 3, "postact_fn": "Identity"}},
            "'postact_fn' is 'Identity'; it should",
        ),
        (sae_lens, {"architecture": 3}, "'architecture' is 3; it should be a text"),
        (
            sae_lens,
            {"activation_fn_str": "tanh-relu"},
            "'activation_fn_str' is 'tanh-relu'; for architecture 'standard'",
        ),
        (sae_lens, {"activation_fn": "topk"}, "'k' is None; it should be a positive integer"),
        (sae_lens, OLD := {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": True}}, "'k' is True"),
        (sae_lens, {**OLD, "activation_fn_kwargs": [1]}, "'activation_fn_kwargs' is [1]; it should be an object"),
        (sae_lens, {**OLD, "k": C + 1}, f"'k' is {C + 1}; it should be at most C = {C}"),
        (sae_lens, {"normalize_activations": "expected_average_only_in"}, "whose factor the files do not hold"),
        (sae_lens, {"normalize_activations": True}, "whose factor the files do not hold"),
        (sae_lens, {"normalize_activations": ["rms"]}, "'normalize_activations' is ['rms']; it should be one of none"),
        (sae_lens, {"apply_b_dec_to_input": 1}, "'apply_b_dec_to_input' is 1; it should be true or false"),
        (sae_lens, {"rescale_acts_by_decoder_norm": True}, "for 'standard' it should be false"),
        (sae_lens, {"d_in": None}, "'d_in' is None; it should be a positive integer"),
        (
            sae_lens,
            {"d_sae": 41},
            "tensor 'W_enc' has shape [24, 40]; it should be [D, C], not empty, with C = 41, D = 24",
        ),
        (sparsify, {"activation": "groupmax"}, "'activation' is 'groupmax'; it should be 'topk'"),
        (sparsify, {"signed": True}, "'signed' is true; it should be false"),
        (sparsify, {"skip_connection": True}, "lacks the tensors ['W_skip']"),
        (sparsify, {"k": 0}, "'k' is 0; it should be a positive integer"),
        (sparsify, {"k": C + 1}, f"'k' is {C + 1}; it should be at most C = {C}"),
        (sparsify, {"num_latents": 0}, "tensor 'encoder.weight' has shape [40, 24]; it should be [C, D]"),
        (
            llama_scope,
            {"norm_activation": "token-wise"},
            "'norm_activation' is 'token-wise'; it should be 'dataset-wise'",
        ),
        (llama_scope, {"act_fn": "topk"}, "'act_fn' is 'topk'; it should be 'jumprelu'"),
        (llama_scope, {"apply_decoder_bias_to_pre_encoder": True}, "it should be false"),
        (llama_scope, {"jump_relu_threshold": None}, "'jump_relu_threshold' is None; it should be a positive number"),
        (
            llama_scope,
            {"dataset_average_activation_norm": 3},
            "'dataset_average_activation_norm' is 3; it should be an",
        ),
        (llama_scope, {"dataset_average_activation_norm": {}}, "'dataset_average_activation_norm.in' is None"),
    ],
)
def test_settings_without_a_rule_are_refused(make, config, message, tmp_path):
    release = make(tmp_path)
    (said,) = release.folder.glob("*.json")
    said.write_text(json.dumps(json.loads(said.read_text()) | config))
    refused(release.folder, f"{said.parent}", message)


def test_gemma_scope_2_of_another_kind(tmp_path):
    folder = gemma_scope_2(tmp_path).folder
    said = folder / "config.json"
    said.write_text(json.dumps({"architecture": "topk"}))
    refused(folder, f"{said}: 'architecture' is 'topk'; it should be 'jump_relu'")
    said.write_text("{")
    refused(folder, f"{said} is not valid JSON")
    said.unlink()
    path = file_of(folder)
    write(path, tensors_of(path) | numbers(0, w_dec=(C, 2, D)))
    refused(folder, f"{path}: tensor 'w_dec' has shape [{C}, 2, {D}]; it should be [C, Dout]")


def test_nothing_stays_mapped(tmp_path):
    for name in ("Gemma Scope", "sparsify"):
        release = RELEASES[name][1](tmp_path)
        sae = load_sae(release.folder)
        before = sae.sha256()
        path = file_of(release.folder)
        path.write_bytes(bytes(path.stat().st_size))
        assert sae.sha256() == before
        assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_refused(kind, tmp_path):
    folder = dictionary_learning(tmp_path, kind=kind, threshold=-1.0).folder
    refused(folder, f"{file_of(folder)}: tensor 'threshold' is -1; it should not be negative: it was never set")
    load_sae(
        dictionary_learning(tmp_path, kind="AutoEncoderTopK", threshold=-1.0).folder
    )  # which ranks, and has no use for it


@pytest.mark.parametrize("k", [K + 1, "6", True, 0])
def test_a_k_of_two_values_is_refused(k, tmp_path):
    folder = dictionary_learning(tmp_path, kind="AutoEncoderTopK", k=k).folder
    refused(folder, f"k is {k!r} and {K} in config.json and the file; it should be one positive integer")


def test_a_norm_that_is_not_used_may_be_anything(tmp_path):
    folder = openmoss(tmp_path, act="topk", norm_activation="inference").folder
    before, path = load_sae(folder).sha256(), file_of(folder)
    norms = {key: torch.tensor(torch.nan) for key in tensors_of(path) if key.startswith("dataset_average")}
    assert len(norms) == 2
    write(path, tensors_of(path) | norms)
    assert load_sae(folder).sha256() == before


def test_a_negative_threshold_of_a_transcoder_is_refused(tmp_path):
    folder = mwhanna(tmp_path, threshold=True).folder
    path = file_of(folder)
    tensors = tensors_of(path)
    tensors["activation_function.threshold"][3] = -0.5
    write(path, tensors)
    refused(folder, f"{path}: tensor 'activation_function.threshold' holds -0.5; it should not be negative")


def test_openais_tensors_alone_do_not_say_their_activation(tmp_path):
    folder = openai(tmp_path).folder
    (folder / "config.json").unlink()
    refused(folder, 'config.json is missing; it should say "activation": "ReLU", or', "as the file did that")


@pytest.mark.parametrize("make, name", [(qwen_scope, "layer4.sae.safetensors"), (mwhanna, "layer_4.safetensors")])
def test_several_layers_in_one_folder_are_told_by_their_file(make, name, tmp_path):
    folder = make(tmp_path).folder
    first = file_of(folder)
    (folder / name).write_bytes(first.read_bytes())
    refused(folder, f"holds several autoencoders: {first.name}, {name}; give the path of one file")
    assert load_sae(folder / name).site.split(".")[-1 if make is qwen_scope else 1] == "4"
    with pytest.raises(ValueError, match=r"README\.md was given\. No family that is known has these"):
        (folder / "README.md").write_text("of the release")
        load_sae(folder / "README.md")


def test_a_renamed_file_is_not_taken_for_another_family(tmp_path):
    path = file_of(goodfire(tmp_path, linear="").folder)
    for name in ("model.safetensors", "checkpoints/final.safetensors", "layer_1.safetensors", "ae.safetensors"):
        (tmp_path / "renamed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "renamed" / name).write_bytes(path.read_bytes())
    refused(tmp_path / "renamed", "No family that is known has these")


def test_a_model_of_codebook_features_is_named(tmp_path):
    key = "model.model.layers.3.mlp.codebook_layer.codebook.weight"
    write(tmp_path / "model.safetensors", {key: torch.zeros(4, 3)}, {"model_type": "codebook"}, "config.json")
    refused(tmp_path, f"model.safetensors: {key}. That is a model of codebook-features", "It is not read")
