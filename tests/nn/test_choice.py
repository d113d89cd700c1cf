"""The rule that turns a density into a layout and a rank."""

from __future__ import annotations

import itertools

import pytest
import torch

from pixelfly.masks import BlockLayout, block_diagonal, flat_block_butterfly
from pixelfly.nn import choose
from pixelfly.nn.choice import kept_fan_in, kept_weights


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(768, 768), (3072, 768), (768, 3072), (2304, 768), (1024, 1024), (4096, 1024), (4096, 4096)],
)
def test_published_density_is_met_exactly_without_low_rank(out_features, in_features):
    choice = choose(out_features, in_features, density=0.25, rank=0)
    assert choice.density == 0.25
    assert choice.rank == 0 and choice.lowrank_weights == 0


@pytest.mark.parametrize(
    ("shape", "rank", "density"),
    [
        ((768, 768), 32, 0.25),
        ((1024, 1024), 32, 0.25),
        ((2048, 2048), 64, 0.25),
        ((4096, 4096), 128, 0.25),
        ((3072, 768), 48, 0.244792),
        ((4096, 1024), 48, 0.246094),
    ],
)
def test_low_rank_takes_its_share(shape, rank, density):
    choice = choose(*shape, density=0.25)
    assert choice.rank == rank
    assert choice.density == pytest.approx(density, abs=1e-6)
    share = choice.lowrank_weights / (choice.lowrank_weights + choice.block_weights)
    assert 0.23 < share < 1 / 3 + 1e-9


SHAPES = [(192, 192), (256, 1024), (1000, 1000), (72, 520), (768, 3072), (1152, 384)]


@pytest.mark.parametrize("lowrank", ["factored", "global"])
@pytest.mark.parametrize("shape", SHAPES)
def test_never_above_the_density_and_never_worse_with_more(shape, lowrank):
    for block_size, rank in itertools.product((16, 32), (None, 0)):
        last = 0.0
        for density in (0.15, 0.25, 0.4, 0.7, 1.0):
            try:
                choice = choose(
                    *shape, density=density, block_size=block_size, rank=rank, lowrank=lowrank
                )
            except ValueError as error:
                assert "nearest reachable" in str(error)
                assert last == 0.0, "reachable at a lower density"
                continue
            assert choice.density <= density * (1 + 1e-9)
            if rank == 0:
                assert choice.density >= last
                assert choice.rank == 0
            last = choice.density


def test_rank_is_taken_from_the_budget():
    with_rank = choose(1024, 1024, density=0.25, rank=64)
    assert with_rank.rank == 64
    assert with_rank.density == 0.25  # 12.5 % + 2 of 16 blocks
    assert with_rank.layout.nnz == 32


def test_stride_fixed_rank_fills_the_rest():
    choice = choose(1024, 1024, density=0.25, max_stride=2)
    assert choice.layout == flat_block_butterfly(1024, 1024, max_stride=2)
    assert choice.density == 0.25 and choice.rank == 64


def test_global_form_is_in_the_layout():
    choice = choose(1024, 1024, density=0.25, lowrank="global", rank=64)
    assert choice.factored_rank == 0 and choice.rank == 64
    assert choice.layout.grid[0].all() and choice.layout.grid[:, 0].all()
    assert 0.18 < choice.density <= 0.25
    assert choose(1024, 1024, density=0.25, lowrank="global").rank == 64


def test_without_density_the_full_butterfly_and_a_third_of_low_rank():
    choice = choose(1024, 1024)
    butterfly = flat_block_butterfly(1024, 1024)
    assert choice.layout == butterfly
    assert choice.lowrank_weights <= kept_weights(butterfly) / 2
    assert choose(1024, 1024, rank=0).lowrank_weights == 0


def test_own_layout():
    layout = block_diagonal(512, 256, block_size=32)
    choice = choose(512, 256, layout=layout, rank=8)
    assert choice.layout is layout and choice.rank == 8


def test_a_low_rank_that_does_not_fit_is_said():
    choice = choose(192, 192, density=0.25, block_size=32)
    assert choice.rank == 0 and "no low rank" in choice.note


def test_counts_ignore_what_sticks_out():
    layout = BlockLayout.from_grid(torch.ones(2, 3).bool(), 64, 72, 136)
    assert kept_weights(layout) == 72 * 136
    assert kept_fan_in(layout).tolist() == [136, 136]
    diagonal = BlockLayout.from_grid(torch.eye(2).bool(), 64, 72, 72)
    assert kept_fan_in(diagonal).tolist() == [64, 8]
    assert kept_weights(diagonal) == 64 * 64 + 8 * 8


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"density": 0.0}, ValueError, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, "density must be in"),
        ({"density": "0.25"}, TypeError, "density must be a number"),
        (
            {"density": 0.01},
            ValueError,
            "not reachable.*nearest reachable is 0.0625.*block_size=16",
        ),
        ({"density": 0.25, "rank": 128}, ValueError, "not reachable.*rank=128"),
        ({"density": 0.1, "max_stride": 4}, ValueError, "max_stride=4; the nearest.*0.1875"),
        ({"density": 0.2, "max_stride": 4, "rank": 16}, ValueError, "cannot all be given"),
        ({"block_size": 48}, ValueError, "block_size must be 16, 32, 64 or 128, got 48"),
        ({"max_stride": 3}, ValueError, "max_stride"),
        ({"max_stride": 4096}, ValueError, "max_stride"),
        ({"rank": -1}, ValueError, "rank must be between 0 and"),
        ({"rank": 2048}, ValueError, "rank must be between 0 and"),
        ({"rank": 1.5}, TypeError, "rank must be an int"),
        ({"rank": 16, "lowrank": "global"}, ValueError, "multiple of block_size=64"),
        ({"lowrank": "svd"}, ValueError, "lowrank must be 'factored' or 'global', got 'svd'"),
        ({"layout": "dense"}, TypeError, "layout must be a BlockLayout"),
    ],
)
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        choose(1024, 1024, **options)


def test_bad_features_and_layouts():
    with pytest.raises(ValueError, match="out_features must be a positive multiple of 8, got 10"):
        choose(10, 64)
    with pytest.raises(TypeError, match="in_features must be an int"):
        choose(64, 64.0)
    layout = block_diagonal(64, 64, block_size=16)
    with pytest.raises(ValueError, match=r"got one for \(64, 64\)"):
        choose(64, 128, layout=layout)
    with pytest.raises(ValueError, match="layout excludes density"):
        choose(64, 64, layout=layout, density=0.25)
    with pytest.raises(ValueError, match="layout excludes max_stride"):
        choose(64, 64, layout=layout, max_stride=2)


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_a_rank_that_takes_more_than_a_dense_layer(density):
    with pytest.raises(ValueError, match="the largest rank that leaves room for blocks is") as e:
        choose(512, 512, density=density, rank=512)
    rank = int(str(e.value).split()[-1])
    assert choose(512, 512, density=density, rank=rank).density <= density
    with pytest.raises(ValueError, match="nearest reachable|largest rank"):
        choose(512, 512, density=density, rank=rank + 16)


def test_nearest_reachable_is_reachable():
    with pytest.raises(ValueError, match="nearest reachable is 0.08333"):
        choose(768, 768, density=0.05)
    assert choose(768, 768, density=1 / 12, rank=0).density == pytest.approx(1 / 12)
