"""What is released as a pickle: its tensors are read, and nothing in it runs; damaged and hostile ones say what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from releases import C, D, K, numbers
from releases_pickled import dictionary_learning, goodfire, openai, qwen_scope

from cu_fast.sae import convert_sae, load_sae


def refused(source: Path, *parts: str) -> None:
    """convert_sae raises, its message holds these parts, and nothing is written."""
    target = source.parent / "written"
    with pytest.raises(ValueError) as error:
        convert_sae(source, target)
    for part in parts:
        assert part in str(error.value)
    assert "weights_only" not in str(error.value), "PyTorch's message advises to let a pickle run"
    assert not target.exists()


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Config:
    """An object such as transcoders were released with."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["beside", "instead", "before"])
def test_nothing_in_a_pickle_runs(place, old, tmp_path):
    path = dictionary_learning(tmp_path, suffix=".pt").folder / "ae.pt"
    bomb = Bomb(tmp_path / "it ran")
    state = torch.load(path, weights_only=True)
    bad = {"beside": state | {"config": bomb}, "instead": bomb, "before": {"config": bomb} | state}[place]
    torch.save(bad, path, _use_new_zipfile_serialization=not old)
    refused(path.parent, str(path), "objects are never unpickled", "torch.save(autoencoder.state_dict(), 'ae.pt')")
    path.write_bytes(pickle.dumps(bad))
    refused(path.parent, str(path), "objects are never unpickled")
    assert not bomb.path.exists()


def test_the_object_in_a_pickle_is_named(tmp_path):
    path = dictionary_learning(tmp_path, suffix=".pt").folder / "ae.pt"
    torch.save(torch.load(path, weights_only=True) | {"cfg": Config()}, path)
    refused(
        path.parent,
        f"{path} is not read",
        "holds objects (test_pickles.Config) beside tensors",
        "the library that wrote",
    )


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_pickles(share, tmp_path):
    path = qwen_scope(tmp_path, suffix=".pt").folder / "layer3.sae.pt"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    refused(path.parent, f"{path} is not read: it is truncated, or holds objects")


@pytest.mark.parametrize("what", [torch.zeros(3), [torch.zeros(3)], {3: torch.zeros(3)}, "a text"])
def test_what_is_no_dict_of_tensors_is_named(what, tmp_path):
    path = tmp_path / "ae.pt"
    torch.save(what, path)
    refused(path, f"{path} holds a {type(what).__name__}; it should hold a dict from names to tensors")


def test_tensors_in_a_pickle_are_checked_as_others_are(tmp_path):
    folder = goodfire(tmp_path, suffix=".pt").folder
    (path,) = folder.iterdir()
    state = torch.load(path, weights_only=True)
    weight = "encoder_linear.weight"
    for bad, words in (
        (state[weight].double(), "is torch.float64; it should be one of F32, BF16, F16"),
        (state[weight].to_sparse(), "is torch.sparse_coo on cpu; it should be one of"),
        (torch.empty(C, D, device="meta"), "is torch.strided on meta; it should be one of"),
        (state[weight].T.contiguous(), f"has shape [{C}]; it should be [C], not empty, with C = {D}"),
        (state[weight].where(state[weight] != state[weight][2, 2], torch.nan), "holds NaN or Inf"),
    ):
        torch.save(state | {weight: bad}, path)
        refused(path, f"{path}: tensor ", words)
    torch.save(state | {"extra": torch.zeros(3)}, path)
    refused(path, "holds the unexpected ['extra']")
    torch.save({key: torch.nn.Parameter(value) for key, value in state.items()}, path)
    convert_sae(path, tmp_path / "written")
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert convert_sae(path, tmp_path / "old").sha256() == load_sae(tmp_path / "written").sha256()


def test_settings_of_openais_pickle(tmp_path):
    for values, words in (
        ({"activation": "Identity"}, "'activation' is 'Identity'; it should be 'ReLU' or 'TopK'"),
        ({"activation_state_dict": {"k": None}}, "'k' is None; it should be a positive integer"),
    ):
        path = openai(tmp_path, suffix=".pt", **{"activation": "TopK"} | values).folder / "8.pt"
        refused(path, f"{path}: {words}")


def test_pickles_with_other_names_are_not_opened(tmp_path):
    folder = dictionary_learning(tmp_path, suffix=".pt").folder
    for name in ("optimizer.pt", "training_state.pth", "checkpoints/ae_100.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(Bomb(tmp_path / "it ran"), folder / name)
    convert_sae(folder, tmp_path / "written")
    (folder / "ae.pt").rename(folder / "model.pt")
    refused(
        folder, "No family that is known has these", "are read that are called as one of these, or given themselves"
    )


def test_of_several_pickles_one_is_given(tmp_path):
    folder = qwen_scope(tmp_path, suffix=".pt").folder
    (folder / "layer4.sae.pt").write_bytes((folder / "layer3.sae.pt").read_bytes())
    refused(folder, "holds several autoencoders: layer3.sae.pt, layer4.sae.pt; give the path of one file")
    sae = convert_sae(folder / "layer4.sae.pt", tmp_path / "written")
    assert (sae.site, sae.k) == ("model.layers.4", K)


def test_what_is_no_pickle_is_preferred(tmp_path):
    folder = dictionary_learning(tmp_path, kind="AutoEncoderTopK").folder
    torch.save(numbers(0, other=(2,)), folder / "ae.pt")
    assert convert_sae(folder, tmp_path / "written").sha256() == load_sae(folder).sha256()


def test_a_release_is_not_written_over(tmp_path):
    folder = qwen_scope(tmp_path, suffix=".pt").folder
    for source in (folder, folder / "layer3.sae.pt"):
        with pytest.raises(ValueError, match="which holds the release itself; it should be another"):
            convert_sae(source, folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files, which are not replaced: notes\.txt"):
        convert_sae(folder, tmp_path / "other")
