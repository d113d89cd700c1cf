"""The modules under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixelfly.nn import PixelflyLinear, PixelflyMLP

FORMS = {
    "plain": {"density": 0.6, "activation": "gelu"},
    "scalar gate": {"density": 0.6, "gate": "scalar"},
    "token gate": {"density": 0.6, "gate": "token", "activation": "gelu"},
    "global": {"rank": 16, "lowrank": "global"},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def check(module: nn.Module, compiled, x: torch.Tensor, residual: torch.Tensor) -> None:
    parameters = list(module.parameters())
    results = []
    for fn in (module, compiled):
        y = fn(x, residual)
        grads = torch.autograd.grad(y.square().sum(), [x, residual, *parameters])
        results.append((y, *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_fullgraph_forward_and_backward(form):
    layer = PixelflyLinear(128, 96, block_size=16, **FORMS[form])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (7, 12):
        x = torch.randn(tokens, 128, requires_grad=True)
        check(layer, compiled, x, torch.randn(tokens, 96, requires_grad=True))


def test_equal_layers_and_any_length_share_one_graph():
    layers = nn.Sequential(*(PixelflyLinear(64, 64, block_size=16, rank=16) for _ in range(4)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (3, 5, 9):
        torch.testing.assert_close(
            compiled(torch.randn(tokens, 64)).shape, torch.Size([tokens, 64])
        )
    assert counter.frame_count == 1


def test_mlp_with_inductor():
    mlp = PixelflyMLP(64, density=0.4, block_size=16)
    x = torch.randn(9, 64, requires_grad=True)
    check(mlp, torch.compile(mlp, fullgraph=True), x, torch.randn(9, 64, requires_grad=True))


def test_export():
    layer = PixelflyLinear(64, 96, block_size=16, rank=16, activation="silu").eval()
    x = torch.randn(5, 64)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
