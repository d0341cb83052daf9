"""The libraries of the releases themselves, where they are installed, on the same files: the same latents fire, the same output.

Their sums are in fp32 too, in another order: of at most 40 terms, each below 30 in size.
"""

from __future__ import annotations

import pytest
import torch
from releases import RELEASES, C, D, K, sparsify
from releases_pickled import CLASSES, dictionary_learning

from cu_fast.sae import load_sae

X = torch.randn(60, D, generator=torch.Generator().manual_seed(4)) * 2 + 0.4
# SAELens leaves to the model what these say of it, or does not know them.
NOT_THERE = ("standard, centred model", "layer norm, centred model", "standard, ones")
NATIVE = [name for name, (family, _) in RELEASES.items() if family == "sae_lens" and name not in NOT_THERE]


def same(sae, a: torch.Tensor, y: torch.Tensor) -> None:
    ours = sae.activations(X)
    assert torch.equal(ours > 0, a > 0)
    assert 0.02 < (a > 0).double().mean() < 0.9
    torch.testing.assert_close(ours, a, rtol=1e-5, atol=2e-5)
    y = y if sae.b_dec is not None else y - y  # with a skip connection there is no reconstruction
    torch.testing.assert_close(sae.reconstruct(X) if sae.b_dec is not None else y, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_saelens(name, tmp_path):
    library = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    folder = RELEASES[name][1](tmp_path).folder
    theirs, sae = library.SAE.load_from_disk(folder, dtype="float32"), load_sae(folder)
    with torch.no_grad():
        a = theirs.encode(X)
        y = theirs.decode(a)
    same(sae, a, y)


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning(kind, tmp_path):
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    homes = {
        "AutoEncoderTopK": (top_k, (K,)),
        "BatchTopKSAE": (batch_top_k, (K,)),
        "MatryoshkaBatchTopKSAE": (matryoshka_batch_top_k, (K, [C // 4, C - C // 4])),
    }
    home, more = homes.get(kind, (dictionary, ()))
    folder = dictionary_learning(tmp_path, kind=kind, suffix=".pt").folder
    theirs = getattr(home, kind)(D, C, *more)
    theirs.load_state_dict(torch.load(folder / "ae.pt", weights_only=True))
    sae = load_sae(dictionary_learning(tmp_path / "plain", kind=kind).folder)
    with torch.no_grad():
        a = theirs.encode(X)
        y = theirs.decode(a)
    same(sae, a, y)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(transcode, tmp_path):
    library = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    folder = sparsify(tmp_path, transcode=transcode).folder
    theirs, sae = library.SparseCoder.load_from_disk(folder, device="cpu"), load_sae(folder)
    with torch.no_grad():
        values, ids, _ = theirs.encode(X)
        a = torch.zeros(len(X), C).scatter_(1, ids.long(), values)
        same(sae, a, a @ theirs.W_dec + theirs.b_dec)
