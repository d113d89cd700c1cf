"""PixelflyMLP against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pixelfly.nn import PixelflyLinear, PixelflyMLP


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_formula(activation):
    mlp = PixelflyMLP(
        64, 128, 32, activation=activation, block_size=16, rank=16, dtype=torch.float64
    )
    functions = {
        None: lambda z: z,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "silu": F.silu,
    }
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 32, dtype=torch.float64)
    y = mlp(x, residual)
    fc1, fc2 = mlp.fc1.to_dense(), mlp.fc2.to_dense()
    expected = fc2(functions[activation](fc1(x))) + residual
    torch.testing.assert_close(y, expected)
    dx, dx_expected = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(dx, dx_expected)


def test_defaults():
    mlp = PixelflyMLP(64, block_size=16)
    assert (mlp.fc1.out_features, mlp.fc2.out_features) == (256, 64)
    assert mlp.fc1.activation == "gelu" and mlp.fc2.activation is None


def test_names():
    mlp = PixelflyMLP(64, block_size=16, names=("c_fc", "c_proj"), rank=0)
    assert [name for name, _ in mlp.named_parameters()] == [
        "c_fc.blocks", "c_fc.bias", "c_proj.blocks", "c_proj.bias",
    ]  # fmt: skip


def test_bad_input():
    with pytest.raises(ValueError, match="names must be two different names"):
        PixelflyMLP(64, block_size=16, names=("fc", "fc"))
    with pytest.raises(TypeError, match="layout cannot serve both layers"):
        PixelflyMLP(64, layout=None)
    first, second = PixelflyLinear(64, 128, block_size=16), PixelflyLinear(64, 64, block_size=16)
    with pytest.raises(ValueError, match="second.in_features must be first.out_features=128"):
        PixelflyMLP.from_layers(first, second)
