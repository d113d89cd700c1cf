"""TokenMLP against the transposed MLP that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelfly.nn import TokenMLP
from pixelfly.ops.activations import ACTIVATIONS, apply_activation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def transposed(mlp, x):
    hidden = F.linear(x.transpose(1, 2), mlp.fc1.weight, mlp.fc1.bias)
    hidden = apply_activation(hidden, ACTIVATIONS[mlp.activation])
    return F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias).transpose(1, 2)


def gradients(y, mlp, x, dy):
    return [y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], dy)]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_formula(activation, bias, compiled):
    torch._dynamo.reset()
    mlp = TokenMLP(13, 24, activation=activation, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 13, 10, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    call = torch.compile(mlp, backend="aot_eager", fullgraph=True) if compiled else mlp
    torch.testing.assert_close(
        gradients(call(x), mlp, x, dy), gradients(transposed(mlp, x), mlp, x, dy)
    )


@pytest.mark.parametrize("frozen", [("fc1",), ("fc2",), ("fc1", "fc2")])
def test_frozen_layers(frozen):
    mlp = TokenMLP(8, 16, dtype=torch.float64)
    for name in frozen:
        getattr(mlp, name).requires_grad_(False)
    x = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    wanted = [p for p in mlp.parameters() if p.requires_grad] + [x]
    ours, theirs = (
        torch.autograd.grad(f(x).square().sum(), wanted)
        for f in (mlp, lambda x: transposed(mlp, x))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [196, 64])
def test_autocast(device, dtype, tokens):
    """As near float64 as the transposed MLP under the same autocast; gradients in float32."""
    mlp = TokenMLP(tokens, 96, device=device)
    x = torch.randn(4, tokens, 40, device=device, requires_grad=True)
    dy = torch.randn(4, tokens, 40, device=device, dtype=dtype)
    with torch.autocast(device, dtype):
        y, theirs = mlp(x), transposed(mlp, x)
    assert y.dtype == dtype
    ours, theirs = gradients(y, mlp, x, dy), gradients(theirs, mlp, x, dy)
    mlp.double()
    exact = gradients(
        transposed(mlp, wide := x.detach().double().requires_grad_()), mlp, wide, dy.double()
    )
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        bound = 1.5 * (b.double() - c).norm() + 1e-3 * c.norm()
        assert (a.double() - c).norm() <= bound


def test_empty_batch():
    x = torch.randn(0, 8, 4, requires_grad=True)
    mlp = TokenMLP(8, 16)
    mlp(x).sum().backward()
    assert x.grad.shape == x.shape and not mlp.fc1.weight.grad.any()


def test_bad_input():
    mlp = TokenMLP(8, 16)
    with pytest.raises(ValueError, match=r"x must be \[B, 8, C\], got \[2, 4, 8\]"):
        mlp(torch.randn(2, 4, 8))
    with pytest.raises(TypeError, match=r"torch.float32, got torch.float64"):
        mlp(torch.randn(2, 8, 4).double())
    with pytest.raises(ValueError, match="activation must be one of"):
        TokenMLP(8, 16, activation="tanh")
    with pytest.raises(ValueError, match="from N tokens to a hidden width and back, got 8 to 16"):
        TokenMLP.from_layers(nn.Linear(8, 16), nn.Linear(16, 9), None)
