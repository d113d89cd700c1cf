"""The output's variance at the start is a dense layer's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixelfly.masks import BlockLayout, flat_block_butterfly
from pixelfly.nn import PixelflyLinear
from pixelfly.nn.init import init_weights_


def output_variance(layer: nn.Module, tokens: int = 2048) -> torch.Tensor:
    with torch.no_grad():
        return layer(torch.randn(tokens, layer.in_features)).var(dim=0, unbiased=False)


CASES = {
    "blocks": {"rank": 0, "density": 0.25},
    "low rank": {"rank": 32, "density": 0.25},
    "rule": {"density": 0.25},
    "full butterfly": {},
    "mostly low rank": {"rank": 128, "max_stride": 1},
    "global": {"density": 0.3, "lowrank": "global"},
    "scalar gate": {"density": 0.25, "gate": "scalar"},
    "token gate": {"density": 0.25, "gate": "token"},
    "block size 16": {"density": 0.1, "block_size": 16},
}


@pytest.mark.parametrize("shape", [(768, 768), (512, 2048), (2048, 512), (1000, 760)])
@pytest.mark.parametrize("case", CASES)
def test_variance_equals_a_dense_layers(case, shape):
    layer = PixelflyLinear(*shape, **CASES[case])
    expected = output_variance(nn.Linear(*shape)).mean()
    torch.testing.assert_close(output_variance(layer).mean(), expected, rtol=0.05, atol=0)


def test_every_row_of_a_ragged_layout_has_it():
    # Block rows that keep 1, 2, 5, 3 and (with the low rank alone) 0 blocks; ragged both ways.
    grid = torch.tensor(
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    )
    layout = BlockLayout.from_grid(grid.bool(), 64, 5 * 64 - 40, 5 * 64 - 24)
    layer = PixelflyLinear(layout.in_features, layout.out_features, layout=layout, rank=32)
    rows = [output_variance(layer) for _ in range(16) if layer.reset_parameters() is None]
    variance = torch.stack(rows).mean(0)
    for i, row in enumerate(variance.split(64)):
        assert row.mean() == pytest.approx(1 / 3, rel=0.08), f"block row {i}"
    assert variance.mean() == pytest.approx(1 / 3, rel=0.05)


def test_tails_are_zero():
    layer = PixelflyLinear(200, 136, block_size=64, rank=0)
    layout = layer.layout
    last_row, last_col = layout.grid.shape[0] - 1, layout.grid.shape[1] - 1
    for block, row, col in zip(layer.blocks, layout.row_indices, layout.col_indices, strict=True):
        if row == last_row:
            assert block[136 % 64 :].abs().max() == 0
        if col == last_col:
            assert block[:, 200 % 64 :].abs().max() == 0


@pytest.mark.parametrize("rank", [0, 32])
def test_std_is_the_dense_weights(rank):
    layout = flat_block_butterfly(512, 512, block_size=32, max_stride=4)
    blocks = torch.empty(layout.nnz, 32, 32)
    u, v = (torch.empty(512, rank), torch.empty(rank, 512)) if rank else (None, None)
    init_weights_(blocks, layout, u, v, std=0.02)
    weight = PixelflyLinear(512, 512, False, layout=layout, rank=rank)
    with torch.no_grad():
        weight.blocks.copy_(blocks)
        if rank:
            weight.u.copy_(u)
            weight.v.copy_(v)
    energy = weight.to_dense().weight.square().sum()
    assert energy.item() == pytest.approx(512 * 512 * 0.02**2, rel=0.05)


def test_zero_std_still_learns():
    # A layer that starts at zero (std=0) keeps v, so that u has a gradient.
    layer = PixelflyLinear(64, 64, block_size=16, rank=16)
    layer.init_std = 0.0
    layer.reset_parameters()
    nn.init.zeros_(layer.bias)
    y = layer(torch.randn(8, 64))
    assert y.abs().max() == 0
    y.sum().backward()
    assert layer.u.grad.abs().max() > 0 and layer.blocks.grad.abs().max() > 0


def test_bias_is_a_dense_layers():
    layer = PixelflyLinear(1024, 64, block_size=32)
    assert 0.9 / 32 < layer.bias.abs().max() <= 1 / 32
