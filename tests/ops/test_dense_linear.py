"""dense_linear: what F.linear computes under autocast, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelfly.nn.dense import call_linear
from pixelfly.ops.dense_linear import dense_linear

from .helpers import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,)], ids=str)
def test_values_and_gradients(device, dtype, bias, shape):
    layer = nn.Linear(24, 40, bias, device=device)
    x = torch.randn(*shape, 24, device=device).to(dtype).requires_grad_()
    dy = torch.randn(*shape, 40, device=device).to(dtype)
    leaves = [x, *layer.parameters()]
    with torch.autocast(device, dtype):
        results = [
            [y, *torch.autograd.grad(y, leaves, dy)]
            for y in (dense_linear(x, layer.weight, layer.bias), layer(x))
        ]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = theirs.detach().abs().amax() if theirs.numel() else 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(scale) * 2e-2)


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_frozen(frozen):
    tensors = {
        "x": torch.randn(3, 8).bfloat16(),
        "weight": torch.randn(16, 8),
        "bias": torch.randn(16),
    }
    for name, t in tensors.items():
        t.requires_grad_(name != frozen)
    dense_linear(**tensors).float().sum().backward()
    assert [n for n, t in tensors.items() if t.grad is None] == [frozen]


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_do_more_are_called(device):
    x = torch.randn(3, 8, device=device).bfloat16()
    layer = nn.Linear(8, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        plain = call_linear(layer, x)
        torch.testing.assert_close(plain, F.linear(x, layer.weight, layer.bias))
        layer.register_forward_hook(lambda module, args, y: 2 * y)
        torch.testing.assert_close(call_linear(layer, x), 2 * plain)
    assert torch.equal(call_linear(nn.Identity(), x), x)
