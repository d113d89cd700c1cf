"""Attention layouts against element-level definitions."""

from __future__ import annotations

import pytest
import torch

from pixelfly.masks import AttentionLayout, butterfly_attention_layout


@pytest.mark.parametrize("length", [64, 100, 257])
@pytest.mark.parametrize("max_stride", [None, 1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_butterfly(length, max_stride, causal):
    layout = butterfly_attention_layout(
        length, block_size=16, max_stride=max_stride, global_blocks=1, local_blocks=1, causal=causal
    )
    rows = -(-length // 16)
    stride = max_stride or 1 << (rows - 1).bit_length()
    dense = layout.to_dense()[0]
    for q in range(0, length, 7):
        for kv in range(0, length, 5):
            i, j = q // 16, kv // 16
            kept = i == j or (i ^ j) in {1 << s for s in range(12) if 1 << s < stride}
            kept = (kept or i == 0 or j == 0 or abs(i - j) <= 1) and (not causal or j <= i)
            assert dense[q, kv] == kept, (q, kv)
    assert layout.density == pytest.approx(dense.double().mean().item())


def test_rectangles_and_algebra():
    a = butterfly_attention_layout(100, 260, block_size=32, global_blocks=0)
    assert a.grid.shape == (1, 4, 9) and a.to_dense().shape == (1, 100, 260)
    b = AttentionLayout.from_grid(torch.rand(4, 9) < 0.5, 32, 100, 260)
    assert torch.equal((a | b).grid, a.grid | b.grid)
    assert torch.equal((a & b).grid, a.grid & b.grid)
    assert (a | a) == a and hash(a | a) == hash(a) and a != b
    heads = AttentionLayout.per_head([a, b])
    assert heads.heads == 2 and torch.equal((heads | a).grid[1], (a | b).grid[0])
    assert heads.density == pytest.approx((a.density + b.density) / 2)


def test_plot_and_immutability():
    pytest.importorskip("matplotlib").use("Agg")
    layout = butterfly_attention_layout(64, block_size=16)
    assert layout.plot().get_xlabel()
    with pytest.raises(AttributeError, match="immutable"):
        layout.q_len = 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: butterfly_attention_layout(0), ValueError, "q_len must be a positive int"),
        (lambda: butterfly_attention_layout(64, block_size=48), ValueError, "block_size must be"),
        (lambda: butterfly_attention_layout(512, max_stride=3), ValueError, "power of two"),
        (lambda: butterfly_attention_layout(512, max_stride=8), ValueError, "at most 4"),
        (lambda: butterfly_attention_layout(512, global_blocks=-1), ValueError, "non-negative"),
        (lambda: butterfly_attention_layout(64, 128, causal=True), ValueError, "as many queries"),
        (lambda: AttentionLayout.from_grid(torch.ones(2, 2), 16), TypeError, "boolean"),
        (lambda: AttentionLayout.from_grid("grid", 16), TypeError, "boolean tensor .*got str"),
        (lambda: AttentionLayout.from_grid(torch.ones(2) > 0, 16), ValueError, "grid must be"),
        (lambda: AttentionLayout.from_grid(torch.eye(2) > 0, 16, 50), ValueError, "need a grid"),
        (lambda: AttentionLayout.per_head([]), ValueError, "one or more"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
