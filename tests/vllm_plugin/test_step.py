"""The mask row of every token of a step: whose it is, which positions are left alone, and what is there at rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cu_fast
from cu_fast.masks import Mask
from cu_fast.nn import BottleneckConfig, CodebookBottleneck
from cu_fast.ops import LatentMasks
from cu_fast.sae import SAE, SAESplice
from cu_fast.vllm.gating import fires
from cu_fast.vllm.step import POISON, Rows


def rows_of(skip_first: int, requests: list[tuple[int, int, int]], max_tokens: int = 16) -> tuple[Rows, list[int]]:
    """Fill a step with requests (row, tokens computed before, tokens in this step)."""
    rows = Rows(max_tokens, skip_first, torch.device("cpu"))
    row, computed, counts = (np.array(values, dtype=np.int32) for values in zip(*requests))
    rows.fill(row, computed, counts)
    return rows, rows.tensor.tolist()


def test_every_token_has_the_row_of_its_request_and_padding_has_none():
    rows, found = rows_of(0, [(3, 0, 4), (-1, 7, 1), (0, 2, 3)], 10)
    assert found == [3, 3, 3, 3, -1, 0, 0, 0, -1, -1]
    assert rows.masked


@pytest.mark.parametrize("skip", [1, 2, 5])
def test_first_positions_are_left_alone_wherever_a_chunk_begins(skip):
    _, found = rows_of(skip, [(3, 0, 4), (5, 1, 3), (7, 30, 2)], 9)
    assert found[:4] == [-1 if position < skip else 3 for position in range(4)]
    assert found[4:7] == [-1 if position < skip else 5 for position in range(1, 4)]
    assert found[7:] == [7, 7]


def test_a_step_of_first_positions_alone_has_no_mask():
    assert not rows_of(1, [(3, 0, 1), (-1, 4, 2)])[0].masked
    assert not rows_of(0, [(-1, 0, 3)])[0].masked


def test_a_shorter_step_leaves_nothing_of_the_one_before():
    rows, _ = rows_of(0, [(3, 0, 8)], 8)
    rows.fill(np.array([4]), np.array([9]), np.array([2]))
    assert rows.tensor.tolist() == [4, 4, -1, -1, -1, -1, -1, -1]


def test_at_rest_a_splice_is_refused_and_computes_no_unmasked_answer():
    # On a CPU the operators look at the rows; on a GPU a row that no table has makes its token NaN (docs/contract.md).
    rows, _ = rows_of(0, [(-1, 0, 4)], 4)
    rows.clear()
    assert rows.tensor.tolist() == [POISON] * 4
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    bottleneck = CodebookBottleneck(BottleneckConfig(d_model=8, code_dim=8, num_codes=32, k=2)).eval()
    table = bottleneck.new_table("cpu")
    with pytest.raises(ValueError, match="mask_row holds -2147483648"):
        bottleneck(x, table.tensors[0], rows.tensor)
    splice = SAESplice(sae()).eval()
    table = splice.new_table("cpu")
    table.write(0, splice.row_of([Mask.from_ids([0], topic="t", sae=splice.sae)]))
    with pytest.raises(ValueError, match="mask_row holds -2147483648"):
        splice(x, LatentMasks(*table.tensors), rows.tensor)


def sae() -> SAE:
    generator = torch.Generator().manual_seed(1)
    enc, dec = torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)
    zero = torch.zeros(6)
    return SAE(enc, zero, zero, dec, kind="threshold")


def test_a_level_is_of_codes_per_token_and_has_to_be_exceeded():
    splice = SAESplice(sae())
    mask = Mask.from_ids([0, 2], topic="t", sae=splice.sae)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    per_token = ((x @ splice.sae.enc[[0, 2]].T) > 0).sum().item() / 5
    assert 0 < per_token < 2
    assert fires(splice, mask, per_token - 1e-9, x)
    assert not fires(splice, mask, per_token, x)
    assert fires(splice, mask, 2.0, x[:0]), "a prompt without tokens that count cannot be judged, and is unlearned"


def test_a_learned_gate_decides_as_topics_of_does():
    splice = SAESplice(sae())
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    share = ((x @ splice.sae.enc[3]) > 0).float().mean().item()
    assert 0 < share < 1
    for level, expected in ((share**0.5 - 1e-3, True), (share**0.5 + 1e-3, False)):
        gate = cu_fast.masks.Gate(torch.tensor([3], dtype=torch.int32), torch.ones(1), 0.0, level)
        mask = Mask.from_ids([0, 2], topic="t", sae=splice.sae).with_gate(gate)
        assert fires(splice, mask, None, x) is expected


def test_a_window_finds_what_the_rest_of_a_prompt_dilutes():
    splice = SAESplice(sae())
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    on = (x @ splice.sae.enc[3]) > 0
    x = torch.cat([x[~on][:60], x[on][:4], x[~on][:60]])
    for window, expected in ((None, False), (8, True)):
        gate = cu_fast.masks.Gate(torch.tensor([3], dtype=torch.int32), torch.ones(1), 0.0, 0.7, window=window)
        mask = Mask.from_ids([0, 2], topic="t", sae=splice.sae).with_gate(gate)
        assert fires(splice, mask, None, x) is expected
