"""`|` and `&` of block layouts."""

from __future__ import annotations

import pytest
import torch

from pixelfly import masks


def test_algebra():
    a = masks.local(256, 128, block_size=32)
    b = masks.random(256, 128, block_size=32, seed=5)
    assert torch.equal((a | b).grid, a.grid | b.grid)
    assert torch.equal((a & b).grid, a.grid & b.grid)
    with pytest.raises(ValueError, match="256x128/32 and 128x256/32"):
        _ = a | a.transpose()
    with pytest.raises(ValueError, match="256x128/32 and 256x128/64"):
        _ = a & masks.local(256, 128, block_size=64)
    with pytest.raises(TypeError):
        _ = a | a.grid


def test_nominal_density_of_the_operand_with_the_same_blocks():
    """What its blocks grew from is not forgotten: the result is that layout."""
    size = {"block_size": 32}
    grown = masks.flat_block_butterfly(768, 768, **size, grid_size=16, max_stride=8)
    assert "grew it from 25.0%" in repr(grown)
    inside, whole = masks.block_diagonal(768, 768, **size), masks.dense(768, 768, **size)
    for result in (grown | inside, inside | grown, grown & whole, whole & grown, grown | grown):
        assert result == grown and repr(result) == repr(grown)
    exact = masks.BlockLayout.from_grid(grown.grid, 32)
    assert (exact | grown).nominal_density == exact.density  # all of it was asked for
    assert (exact & grown).nominal_density == grown.nominal_density


def test_nominal_density_of_new_blocks():
    size = {"block_size": 32}
    wide = masks.global_(768, 768, **size, width=40)  # 64 in whole blocks
    band, chance = masks.local(768, 768, **size), masks.random(768, 768, **size)
    both = band | wide
    assert both.nominal_density == min(both.density, band.density + wide.nominal_density)
    assert (band & wide).nominal_density == (band & wide).density < wide.nominal_density
    for exact in (band | chance, band & chance):
        assert exact.nominal_density == exact.density and "grew" not in repr(exact)
