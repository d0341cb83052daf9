"""Parameters that are written to in ways that torch counts no version for: what was computed from them is stale."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from tiny_models import add_masks, attach_to, build, inputs, under

LAYER = "model.layers.1"


@pytest.fixture
def given():
    return inputs("llama")


@pytest.fixture
def attachment(given):
    attached = attach_to(build("llama"), LAYER)
    add_masks(attached, given)
    return attached


def step(parameter):
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


WRITES = {
    "data copy": lambda p: p.data.copy_(torch.randn_like(p)),
    "init": lambda p: torch.nn.init.normal_(p.data),
    "NumPy": lambda p: p.detach().numpy().__imul__(-1),
    "fused optimizer": step,
}


@pytest.mark.parametrize("write", WRITES)
def test_codes_that_were_written_unseen(attachment, given, write):
    bottleneck = attachment.bottlenecks[LAYER]
    sha, before = bottleneck.codebook_sha256(), under(attachment, None, given)
    WRITES[write](bottleneck.codebook.codes)
    with pytest.raises(RuntimeError, match="a codebook changed since mask 'a' was added"):
        under(attachment, "a", given)
    attachment.model.eval()
    assert bottleneck.codebook_sha256() != sha
    assert not torch.equal(under(attachment, None, given), before)


@pytest.mark.parametrize("write", WRITES)
def test_an_encoder_that_was_written_unseen(attachment, given, write):
    bottleneck = attachment.bottlenecks[LAYER]
    before = under(attachment, "a", given)
    WRITES[write](bottleneck.autoencoder.W_enc)
    after = under(attachment, "a", given)
    assert not torch.equal(after, before)
    bottleneck.fold()
    assert torch.equal(after, under(attachment, "a", given))


def test_a_bottleneck_that_was_exchanged(attachment, given):
    """As peft's modules_to_save does, with a copy that it trains: the masks are of the codes of the first."""
    layer = attachment.model.get_submodule(LAYER)
    mine = layer.codebook_bottleneck
    layer.codebook_bottleneck = copy.deepcopy(mine)
    for topics in ("a", None):
        with pytest.raises(RuntimeError, match=r"bottleneck of layer 'model.layers.1' was replaced since attach"):
            under(attachment, topics, given)
    layer.codebook_bottleneck = torch.compile(mine, backend="eager")  # that is still the same
    under(attachment, "a", given)


def test_evaluation_mode_folds_again(attachment, given):
    """Also where the model was in it already."""
    bottleneck = attachment.bottlenecks[LAYER]
    before = under(attachment, None, given)
    bottleneck.autoencoder.W_dec.data.mul_(3)
    attachment.model.eval()
    assert not torch.equal(under(attachment, None, given), before)


def test_weights_that_are_offloaded_after_attach(attachment, given):
    """accelerate puts them on the meta device between forwards, where there is nothing to select from: an error."""
    accelerate.cpu_offload(attachment.model, execution_device=torch.device("cpu"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        under(attachment, "a", given)


def test_a_model_that_is_vectorised(attachment, given):
    """vmap has no rule for the operators; it does not leave them out."""

    def one(ids):
        return attachment.model(input_ids=ids[None], use_cache=False).logits

    with torch.no_grad(), attachment.unlearn("a"), pytest.raises(RuntimeError):
        torch.func.vmap(one)(given["input_ids"])
