"""benchmarks/ideal.py counts what a step must move and compute."""

from __future__ import annotations

import pytest
import torch
import vision_ops  # noqa: F401  transformers beside a CPU torch
from ideal import OPTIMIZER_BYTES, ideal, ideal_step
from torch import nn

from pixelfly import PixelflyConfig, sparsify_
from pixelfly.nn import PixelflyMLP

T, K, H, N = 32, 64, 256, 128


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(K, H), nn.GELU(), nn.Linear(H, N))


def step(model: nn.Module):
    x = torch.empty(T, K, device="meta")
    return ideal_step(model.to("meta"), lambda m: m(x).sum())


def test_dense_products():
    costs = step(mlp())
    # The input wants no gradient: the first layer has a forward and a dW.
    assert costs["product"].flops == 2 * T * (2 * K * H + 3 * H * N)
    operands = [(T * K, H * K, T * H), (T * H, N * H, T * N)]
    forward = sum(sum(sizes) for sizes in operands) + H + N  # biases
    backward = sum(operands[0]) + 2 * sum(operands[1])
    assert costs["product"].bytes == 2 * (forward + backward)
    assert costs["optimizer"].bytes == OPTIMIZER_BYTES * (K * H + H + H * N + N)
    assert costs["pixelfly"].flops == 0


def test_pixelfly_products():
    model = mlp()
    sparsify_(model, PixelflyConfig(density=0.5, block_size=16, rank=0))
    kept = [layer.blocks.numel() for layer in (model[0], model[2])]
    costs = step(model)
    assert costs["product"].flops == 0
    assert costs["pixelfly"].flops == 2 * T * (2 * kept[0] + 3 * kept[1])


def test_slopes_are_bytes():
    mlp = PixelflyMLP(K, H, N, activation="gelu", block_size=16, rank=0, bias=False)
    kept = [layer.blocks.numel() for layer in (mlp.fc1, mlp.fc2)]
    costs = step(mlp)
    plans = costs["pixelfly"].bytes - 2 * (
        T * K + kept[0] + T * H  # the first layer's forward
        + T * H + kept[1] + T * N  # the second's
        + T * N + T * H + kept[1] + T * H + kept[1]  # dy, x, blocks; dx, dblocks
        + T * H + T * K + kept[0] + kept[0]  # dz, x, blocks; dblocks
    ) - 2 * T * H  # slopes, written and read  # fmt: skip
    assert 0 < plans < 40_000  # four times a plan


def test_a_whole_model():
    pytest.importorskip("transformers")
    options = {"density": 0.25, "block_size": 16, "rank": 0}
    dense, ours = (ideal("tiny", form, **options) for form in ("dense", "blocks"))
    for kind in ("attention", "norm", "loss", "embedding"):
        assert dense[kind].bytes == ours[kind].bytes > 0
    assert ours["pixelfly"].flops > 0
    assert ours["product"].flops + ours["pixelfly"].flops < dense["product"].flops
