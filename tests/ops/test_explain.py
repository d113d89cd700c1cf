"""ops.explain says which kernels would serve a call."""

from __future__ import annotations

import pytest
import torch

from pixelfly.ops import explain

from .helpers import make_layout, named_grids, xor_grid


def test_cpu():
    layout = make_layout(xor_grid(8, 8), 32)
    record = explain(torch.empty(2, 5, 256), layout, rank=16, activation="gelu")
    assert record.device == "cpu"
    assert record.flops == 2 * 10 * (layout.nnz * 32 * 32 + 16 * 512)
    text = str(record)
    for fragment in ("T=10", "256->256", "rank 16", "float32", "gelu", "8 x [T, 128]·[128, 32]"):
        assert fragment in text, text


def test_every_layout_has_an_explanation():
    for grid in named_grids().values():
        layout = make_layout(grid, 16)
        assert "ATen" in str(explain(torch.empty(3, layout.in_features), layout))


def test_bad_input():
    layout = make_layout(xor_grid(2, 2), 16)
    with pytest.raises(ValueError, match="in_features=32"):
        explain(torch.empty(3, 16), layout)
    with pytest.raises(ValueError, match="activation"):
        explain(torch.empty(3, 32), layout, activation="tanh")


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["auto", "sm80"])
def test_cuda(path, monkeypatch):
    monkeypatch.setenv("PIXELFLY_KERNEL", path)
    layout = make_layout(xor_grid(16, 16), 64)
    x = torch.empty(4096, 1024, device="cuda", dtype=torch.bfloat16)
    record = explain(x, layout, rank=64, activation="gelu")
    steps = dict(record.kernels)
    assert steps["y"].startswith("product_") and steps["dx"].startswith("product_")
    assert any(kernel.startswith("weight_grad_") for kernel in steps.values())
    if path == "sm80":
        assert all("sm80" in kernel for kernel in steps.values())
    assert "NVIDIA" in str(record) or "cuda:0" in str(record)
