"""Layouts and their generators, against definitions written out element by element."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelfly import masks
from pixelfly.masks import BlockLayout

GENERATORS = {
    "flat_block_butterfly": masks.flat_block_butterfly,
    "block_diagonal": masks.block_diagonal,
    "local": masks.local,
    "global_": masks.global_,
    "random": masks.random,
    "bigbird": masks.bigbird,
    "longformer": masks.longformer,
    "strided": masks.strided,
    "dense": masks.dense,
}
SIZES = st.integers(1, 40).map(lambda n: 8 * n)
SMALL_BLOCKS = st.sampled_from([16, 32, 64])


def covered(mask: torch.Tensor, block: int) -> torch.Tensor:
    """Bool grid: a block is kept if any of its elements is."""
    rows, cols = (-(-n // block) for n in mask.shape)
    grid = torch.zeros(rows, cols, dtype=torch.bool)
    for i, j in itertools.product(range(rows), range(cols)):
        grid[i, j] = mask[i * block : (i + 1) * block, j * block : (j + 1) * block].any()
    return grid


def butterfly_cell(i: int, j: int, max_stride: int) -> bool:
    return i == j or (i ^ j) in [1 << k for k in range(int(math.log2(max_stride)))]


def research_mask(n: int, k: int, grid: int, factors: int, wide: int, shuffle: bool):
    """The research code's mask, element by element: shuffle, stretch, global rows and columns."""
    pattern = torch.tensor(
        [[butterfly_cell(i, j, 1 << factors) for j in range(grid)] for i in range(grid)]
    )
    if shuffle:  # columns '(group c) -> (c group)'
        group = 1 << (int(math.log2(grid)) - factors)
        width = grid // group
        order = [g * width + c for c in range(width) for g in range(group)]
        pattern = pattern[:, order]
    mask = torch.zeros(n, k, dtype=torch.bool)
    for i, j in itertools.product(range(n), range(k)):
        cell = bool(pattern[i * grid // n, j * grid // k])
        mask[i, j] = cell or i < wide or j < wide
    return mask


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, None])
def test_butterfly_is_the_xor_rule(stride):
    layout = masks.flat_block_butterfly(512, 512, block_size=32, max_stride=stride)
    for i, j in itertools.product(range(16), range(16)):
        assert layout.grid[i, j] == butterfly_cell(i, j, stride or 16)
    per_row = 1 + int(math.log2(stride or 16))
    assert (layout.grid.sum(1) == per_row).all() and (layout.grid.sum(0) == per_row).all()


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SMALL_BLOCKS, st.data())
def test_butterfly_on_any_grid(n, k, block, data):
    """XOR on the smaller side's grid, padded and truncated, stretched along the larger side."""
    rows, cols = -(-n // block), -(-k // block)
    size = min(rows, cols)
    padded = 1
    while padded < size:
        padded *= 2
    stride = data.draw(st.sampled_from([1 << e for e in range(int(math.log2(padded)) + 1)]))
    layout = masks.flat_block_butterfly(n, k, block_size=block, max_stride=stride)
    for i, j in itertools.product(range(rows), range(cols)):
        assert layout.grid[i, j] == butterfly_cell(i * size // rows, j * size // cols, stride)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.data(),
    st.sampled_from([16, 32]),
    st.booleans(),
)
def test_research_definition(log_grid, height, width, data, block, shuffle):
    grid = 1 << log_grid
    n, k = 8 * grid * height, 8 * grid * width
    factors = data.draw(st.integers(0, log_grid))
    wide = data.draw(st.integers(0, min(n, k)))
    layout = masks.flat_block_butterfly(
        n,
        k,
        block_size=block,
        max_stride=1 << factors,
        grid_size=grid,
        global_width=wide,
        shuffle=shuffle,
    )
    mask = research_mask(n, k, grid, factors, wide, shuffle)
    assert torch.equal(layout.grid, covered(mask, block))
    assert layout.nominal_density == pytest.approx(mask.double().mean().item(), rel=1e-5)
    assert (layout.to_dense() | ~mask).all()  # the cover holds every element asked for


@pytest.mark.parametrize(
    ("out_features", "in_features", "factors", "actual", "nominal"),
    [(3072, 768, 2, "20.8%", "18.8%"), (768, 768, 3, "31.9%", "25.0%")],
)
def test_published_densities_and_their_warning(out_features, in_features, factors, actual, nominal):
    layout = masks.flat_block_butterfly(
        out_features, in_features, block_size=32, max_stride=1 << factors, grid_size=16
    )
    text = repr(layout)
    assert f"density {actual}" in text and f"the block cover grew it from {nominal}" in text


def test_exact_layouts_do_not_warn():
    for width in (512, 1024):
        layout = masks.flat_block_butterfly(width, width, block_size=32, max_stride=8, grid_size=16)
        assert layout.density == layout.nominal_density == 0.25
        assert "grew" not in repr(layout)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(GENERATORS)), SIZES, SIZES, SMALL_BLOCKS)
def test_every_generator_on_any_shape(name, n, k, block):
    layout = GENERATORS[name](n, k, block_size=block)
    rows, cols = -(-n // block), -(-k // block)
    assert layout.grid.shape == (rows, cols) and layout.grid.dtype == torch.bool
    assert layout.grid.any(1).all() and layout.grid.any(0).all() or name == "random"
    pairs = [(i, j) for i in range(rows) for j in range(cols) if layout.grid[i, j]]
    assert list(zip(layout.row_indices.tolist(), layout.col_indices.tolist(), strict=True)) == pairs
    assert layout.row_indices.dtype == layout.col_indices.dtype == torch.int32
    assert layout.nnz == len(pairs)
    mask = layout.to_dense()
    assert mask.shape == (n, k)
    assert torch.equal(covered(mask, block), layout.grid)
    assert layout.density == pytest.approx(mask.double().mean().item(), rel=1e-9)
    assert torch.equal(layout.transpose().to_dense(), mask.T)
    assert layout.transpose().transpose() == layout
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout and hash(again) == hash(layout) and again.density == layout.density


def test_a_layout_pickled_elsewhere_is_equal(tmp_path):
    """Python hashes bytes differently in every process; a pickle must not bring such a hash."""
    make = "masks.flat_block_butterfly(64, 64, block_size=16)"
    program = f"import pickle; from pixelfly import masks; print(pickle.dumps({make}).hex())"
    # Elsewhere: -c finds the source tree in the working directory first, without its library.
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    layout = masks.flat_block_butterfly(64, 64, block_size=16)
    again = pickle.loads(bytes.fromhex(result.stdout))
    assert again == layout and hash(again) == hash(layout)


def test_patterns_by_name():
    size = {"block_size": 16}
    assert torch.equal(masks.block_diagonal(64, 64, **size).grid, torch.eye(4, dtype=torch.bool))
    assert masks.dense(64, 128, **size).density == 1.0
    index = torch.arange(8)
    distance = (index[:, None] - index).abs()
    assert torch.equal(masks.local(128, 128, **size, window=2).grid, distance <= 2)
    assert torch.equal(masks.strided(128, 128, **size, stride=3).grid, distance % 3 == 0)
    assert masks.strided(256, 256, **size) == masks.strided(256, 256, **size, stride=4)
    wide = masks.global_(128, 96, **size, width=24).grid  # 24 features touch two blocks
    assert wide[:2].all() and wide[:, :2].all() and not wide[2:, 2:].any()
    union = masks.local(128, 128, **size) | masks.global_(128, 128, **size)
    assert masks.longformer(128, 128, **size) == union
    chance = masks.random(128, 128, **size, blocks_per_row=2, seed=3)
    assert masks.bigbird(128, 128, **size, random_blocks=2, seed=3) == union | chance


@pytest.mark.parametrize(("n", "k", "block"), [(1000, 8, 64), (8, 1000, 64), (64, 64, 128)])
def test_default_global_width_on_small_sides(n, k, block):
    for name in ("global_", "longformer", "bigbird"):
        layout = GENERATORS[name](n, k, block_size=block)
        assert layout.grid.all() and layout.nominal_density == 1.0


def test_no_global_features_no_random_blocks():
    band = masks.local(512, 256, block_size=32)
    assert masks.longformer(512, 256, block_size=32, global_width=0) == band
    assert masks.bigbird(512, 256, block_size=32, global_width=0, random_blocks=0) == band
    chance = masks.random(512, 256, block_size=32)
    assert masks.bigbird(512, 256, block_size=32, global_width=0) == band | chance


def test_random_has_exact_counts_and_a_seed():
    one = masks.random(512, 256, block_size=32, blocks_per_row=3, seed=1)
    assert (one.grid.sum(1) == 3).all()
    assert one == masks.random(512, 256, block_size=32, blocks_per_row=3, seed=1)
    assert one != masks.random(512, 256, block_size=32, blocks_per_row=3, seed=2)


def test_global_width_of_the_butterfly():
    plain = masks.flat_block_butterfly(256, 512, block_size=32)
    wide = masks.flat_block_butterfly(256, 512, block_size=32, global_width=40)
    assert wide == plain | masks.global_(256, 512, block_size=32, width=40)


@pytest.mark.parametrize("width", [24, 32, 40, 100])
@pytest.mark.parametrize("shape", [(256, 512), (200, 136)])
@pytest.mark.parametrize("name", ["flat_block_butterfly", "longformer", "bigbird"])
def test_nominal_density_counts_the_global_features_asked_for(name, shape, width):
    layout = GENERATORS[name](*shape, block_size=32, global_width=width)
    parts = {
        "flat_block_butterfly": [masks.flat_block_butterfly(*shape, block_size=32)],
        "longformer": [masks.local(*shape, block_size=32)],
        "bigbird": [masks.local(*shape, block_size=32), masks.random(*shape, block_size=32)],
    }[name]
    mask = torch.stack([part.to_dense() for part in parts]).any(0)
    mask[:width] = mask[:, :width] = True
    assert torch.equal(layout.grid, covered(mask, 32))
    assert layout.nominal_density == pytest.approx(mask.double().mean().item(), rel=1e-9)
    assert ("the block cover grew it" in repr(layout)) == (width % 32 != 0)


def test_stretch_along_the_larger_side():
    layout = masks.block_diagonal(64, 256, block_size=32)
    assert layout.grid.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert masks.block_diagonal(256, 64, block_size=32) == layout.transpose()


def test_layout_is_a_value():
    grid = torch.eye(4, dtype=torch.bool)
    layout = BlockLayout.from_grid(grid, 32)
    same = BlockLayout.from_grid(grid.numpy(), 32, 128, 128)
    assert layout == same and hash(layout) == hash(same) and len({layout, same}) == 1
    assert layout != BlockLayout.from_grid(grid, 64)
    assert layout != BlockLayout.from_grid(grid, 32, 120, 128)
    assert layout != "a layout"
    grid[0, 1] = True  # the caller's tensor is the caller's
    assert layout == same
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.block_size = 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        del layout.grid


def test_empty_layout_is_allowed():
    layout = BlockLayout.from_grid(torch.zeros(2, 3, dtype=torch.bool), 16)
    assert layout.nnz == 0 and layout.density == 0.0 and not layout.to_dense().any()
    assert "nnz=0" in repr(layout)


def test_to_device_is_equal():
    layout = masks.local(256, 128, block_size=32)
    moved = layout.to("meta")
    assert moved == layout and hash(moved) == hash(layout)
    assert moved.row_indices.device.type == moved.col_indices.device.type == "meta"
    assert moved.grid.device.type == "cpu"


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layout = masks.flat_block_butterfly(256, 512, block_size=32)
    axes = layout.plot()
    assert "256x512" in axes.get_title()
    assert layout.plot(axes) is axes
    plt.close("all")


BAD = {
    "block size": (lambda: masks.dense(64, 64, block_size=48), ValueError, "block_size .*got 48"),
    "out": (lambda: masks.dense(60, 64, block_size=16), ValueError, "out_features .*8, got 60"),
    "in": (lambda: masks.local(64, 0, block_size=16), ValueError, "in_features .*8, got 0"),
    "float": (lambda: masks.dense(64.0, 64, block_size=16), ValueError, "out_features"),
    "stride 3": (
        lambda: masks.flat_block_butterfly(256, 256, block_size=32, max_stride=3),
        ValueError,
        "max_stride must be a power of two, got 3",
    ),
    "stride 0": (
        lambda: masks.flat_block_butterfly(256, 256, block_size=32, max_stride=0),
        ValueError,
        "max_stride must be a power of two, got 0",
    ),
    "stride too large": (
        lambda: masks.flat_block_butterfly(256, 256, block_size=32, max_stride=16),
        ValueError,
        "max_stride must be at most 8.*got 16",
    ),
    "stride beyond the grid": (
        lambda: masks.flat_block_butterfly(512, 512, block_size=16, max_stride=8, grid_size=4),
        ValueError,
        "max_stride must be at most 4",
    ),
    "grid size 12": (
        lambda: masks.flat_block_butterfly(768, 768, grid_size=12),
        ValueError,
        "grid_size must be a power of two, got 12",
    ),
    "grid size does not divide": (
        lambda: masks.flat_block_butterfly(1000, 1024, grid_size=16),
        ValueError,
        "grid_size must divide out_features=1000.*got 16",
    ),
    "global width": (
        lambda: masks.flat_block_butterfly(256, 128, global_width=129),
        ValueError,
        "flat_block_butterfly: global_width must lie in 0..128, got 129",
    ),
    "shuffle": (
        lambda: masks.flat_block_butterfly(256, 256, shuffle=True),
        ValueError,
        "shuffle needs grid_size",
    ),
    "width": (lambda: masks.global_(64, 64, width=65), ValueError, "width must lie in 1..64"),
    "longformer's width": (
        lambda: masks.longformer(32, 64, global_width=64),
        ValueError,
        "longformer: global_width must lie in 0..32, got 64",
    ),
    "bigbird's width": (
        lambda: masks.bigbird(512, 512, global_width=-1),
        ValueError,
        "bigbird: global_width must lie in 0..512, got -1",
    ),
    "bigbird's blocks": (
        lambda: masks.bigbird(512, 512, random_blocks=9),
        ValueError,
        "bigbird: random_blocks must lie in 0..8, got 9",
    ),
    "seed": (lambda: masks.random(64, 64, seed=2**70), ValueError, "random: seed must lie in -922"),
    "window": (lambda: masks.local(64, 64, window=-1), ValueError, "window .*got -1"),
    "stripes": (lambda: masks.strided(64, 64, stride=0), ValueError, "stride .*got 0"),
    "no random block": (
        lambda: masks.random(64, 64, block_size=16, blocks_per_row=5),
        ValueError,
        "blocks_per_row must lie in 1..4, got 5",
    ),
    "grid of numbers": (
        lambda: BlockLayout.from_grid(torch.ones(2, 2), 16),
        TypeError,
        "grid must be boolean, got torch.float32",
    ),
    "flat grid": (
        lambda: BlockLayout.from_grid(torch.ones(4, dtype=torch.bool), 16),
        ValueError,
        r"\[rows, cols\], got shape \(4,\)",
    ),
    "grid of words": (
        lambda: BlockLayout.from_grid("10 01", 16),
        TypeError,
        "grid must be a boolean tensor or array, got str",
    ),
    "grid of unequal rows": (
        lambda: BlockLayout.from_grid([[True], [True, False]], 16),
        TypeError,
        "grid must be a boolean tensor or array, got list",
    ),
    "grid on the meta device": (
        lambda: BlockLayout.from_grid(torch.ones(2, 2, dtype=torch.bool, device="meta"), 16),
        TypeError,
        "grid must be a boolean tensor or array, got Tensor .*meta",
    ),
    "grid of another shape": (
        lambda: BlockLayout.from_grid(torch.ones(2, 2, dtype=torch.bool), 16, 64, 32),
        ValueError,
        "64x32 matrix in blocks of 16 has a grid of 4x2, got 2x2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [1.0, 1.5, "1", [1], True])
@pytest.mark.parametrize(
    ("generator", "argument"),
    [
        (masks.flat_block_butterfly, "block_size"),
        (masks.flat_block_butterfly, "max_stride"),
        (masks.flat_block_butterfly, "grid_size"),
        (masks.flat_block_butterfly, "global_width"),
        (masks.local, "window"),
        (masks.longformer, "global_width"),
        (masks.bigbird, "global_width"),
        (masks.bigbird, "random_blocks"),
        (masks.random, "blocks_per_row"),
        (masks.random, "seed"),
        (masks.strided, "stride"),
    ],
)
def test_counts_must_be_integers(generator, argument, value):
    with pytest.raises((TypeError, ValueError)) as info:
        generator(256, 256, **{argument: value})
    assert f" {argument} must be" in str(info.value) and f"got {value!r}" in str(info.value)


@pytest.mark.parametrize("block_size", [None, 64.0, "64"])
def test_block_size_of_a_grid(block_size):
    with pytest.raises(ValueError, match=f"block_size must be one of .*got {block_size!r}"):
        BlockLayout.from_grid(torch.ones(2, 2, dtype=torch.bool), block_size)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (torch.ones(2, 2, dtype=torch.bool), ValueError, "has a grid of 4x4, got 2x2"),
        (torch.ones(16, dtype=torch.bool), ValueError, "has a grid of 4x4, got 16"),
        (torch.ones(4, 4, dtype=torch.int32), TypeError, "boolean tensor.*got torch.int32 on cpu"),
        ([[True] * 4] * 4, TypeError, "boolean tensor.*got list"),
    ],
)
def test_constructor_refuses_a_grid_that_does_not_fit(grid, error, message):
    with pytest.raises(error, match=message):
        BlockLayout(64, 64, 16, grid)
