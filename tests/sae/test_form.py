"""The form itself: strict thresholds, ties, NaN, identity, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cu_fast.sae import SAE, Provenance


def small(**changes) -> SAE:
    """Three latents that read the one component of x; each writes to a component of its own."""
    parts = {"enc": torch.ones(3, 1), "bias": torch.zeros(3), "theta": torch.zeros(3), "dec": torch.eye(3)}
    return SAE(**parts | changes)


def test_a_latent_at_its_threshold_does_not_fire():
    above = torch.tensor(2 + 2.0**-21)  # one step of a row's integers
    sae = small(theta=torch.tensor([2.0, 0.0, -5.0]))
    a = sae.activations(torch.stack([torch.tensor([2.0]), above[None], torch.zeros(1), torch.tensor([-1.0])]))
    assert torch.equal(a[:, 0], torch.stack([torch.tensor(0.0), above, torch.tensor(0.0), torch.tensor(0.0)]))
    assert torch.equal(a[:, 1:], torch.tensor([2.0, above, 0.0, 0.0])[:, None].expand(4, 2)), "pre > 0 is asked too"


@pytest.mark.parametrize("scale", ["none", "constant_norm"])
def test_of_equal_latents_the_smaller_ids_are_kept(scale):
    C, k = 500, 70
    many = {"enc": torch.ones(C, 1), "bias": torch.zeros(C), "theta": torch.zeros(C), "dec": torch.ones(C, 1)}
    a = small(**many, kind="topk", k=k, scale=scale).activations(torch.tensor([[2.0], [-1.0]]))
    wanted = torch.zeros(2, C)
    wanted[0, :k] = 2.0 if scale == "none" else 1.0
    assert torch.equal(a, wanted)


@pytest.mark.parametrize("changes", [{}, {"kind": "topk", "k": 2}, {"scale": "constant_norm", "norm": 2.0}])
def test_a_token_with_nan_or_inf_is_nan(changes):
    sae = small(**changes)
    x = torch.tensor([[float("nan")], [float("inf")], [2.0]])
    a = sae.activations(x)
    assert a[:2].isnan().all() and a[2].isfinite().all()
    y = sae.decode(a, x)
    assert y[:2].isnan().all() and y[2].isfinite().all()


def test_sigma_needs_x():
    sae = small(scale="constant_norm", norm=2.0)
    a = sae.activations(torch.tensor([[4.0]]))
    assert torch.equal(a, torch.tensor([[2.0, 2.0, 2.0]]))
    assert torch.equal(sae.decode(a, torch.tensor([[4.0]])), torch.tensor([[4.0, 4.0, 4.0]]))
    with pytest.raises(ValueError, match=r"x is None; with scale 'constant_norm'"):
        sae.decode(a)
    with pytest.raises(ValueError, match=r"x has 2 rows; it should have 1"):
        sae.decode(a, torch.ones(2, 1))


def test_a_reconstruction_adds_what_the_release_adds():
    b_dec, x = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0], [8.0]])
    assert torch.equal(small(b_dec=b_dec).reconstruct(x), x + b_dec)
    scaled = small(b_dec=b_dec, scale="constant_norm", norm=2.0).reconstruct(x)
    assert torch.equal(scaled, (2 + b_dec) * x / 2)
    wide = {"enc": torch.tensor([[1.0, -1.0, 0.0]] * 3), "b_dec": b_dec, "scale": "layer_norm"}
    y = small(**wide).reconstruct(torch.tensor([[6.0, 2.0, 1.0]], dtype=torch.bfloat16))
    std = 7.0**0.5  # of 6, 2, 1, whose mean is 3
    torch.testing.assert_close(y, ((4 / (std + 1e-5) + b_dec) * std + 3)[None])
    with pytest.raises(ValueError, match=r"b_dec is None; for a reconstruction it should be"):
        small().reconstruct(x)


def test_its_identity_is_all_that_computes_and_nothing_else():
    sae = small()
    changed = [
        small(enc=torch.full((3, 1), 2.0)),
        small(bias=torch.ones(3)),
        small(theta=torch.ones(3)),
        small(dec=torch.ones(3, 3)),
        small(kind="topk", k=1),
        small(kind="topk", k=2),
        small(scale="layer_norm"),
        small(scale="constant_norm"),
        small(scale="constant_norm", norm=2.0),
    ]
    assert len({one.sha256() for one in [sae, *changed]}) == 1 + len(changed)
    same = dataclasses.replace(
        sae, enc=sae.enc.clone(), site="a", site_out="b", family="c", provenance=Provenance(l0=3), b_dec=torch.ones(3)
    )
    assert same.sha256() == sae.sha256()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"enc": torch.ones(3, 1).double()}, TypeError, "enc is torch.float64; it should be"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias is torch.float16; it should be float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\]; it should be \[3\]"),
        ({"dec": torch.eye(4)}, ValueError, r"dec has shape \[4, 4\]; it should be \[3, 4\]"),
        ({"theta": torch.full((3,), torch.inf)}, ValueError, "theta holds NaN or Inf"),
        ({"b_dec": torch.zeros(1)}, ValueError, r"b_dec has shape \[1\]; it should be \[3\]"),
        ({"b_dec": torch.zeros(3).half()}, TypeError, "b_dec is torch.float16; it should be float32"),
        ({"b_dec": torch.full((3,), torch.nan)}, ValueError, "b_dec holds NaN or Inf"),
        ({"kind": "relu"}, ValueError, "kind is 'relu'; it should be 'threshold' or 'topk'"),
        ({"kind": "topk"}, ValueError, "k is None; for kind 'topk' it should be an integer from 1 to C = 3"),
        ({"kind": "topk", "k": 4}, ValueError, "k is 4; for kind 'topk'"),
        ({"kind": "topk", "k": 2, "theta": torch.ones(3)}, ValueError, "theta is not zero"),
        ({"k": 2}, ValueError, "k is 2; for kind 'threshold' it should be None"),
        ({"scale": "rms"}, ValueError, "scale is 'rms'"),
        ({"norm": 2.0}, ValueError, "norm is 2.0; it should be positive, and 1.0 unless"),
        ({"scale": "constant_norm", "norm": 0.0}, ValueError, "norm is 0.0; it should be positive"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        small(**changes)
