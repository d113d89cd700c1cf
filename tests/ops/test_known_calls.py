"""Calls like one that was checked before take a shorter way: to the same results and errors."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from pixelfly.ops import Weights, butterfly_lowrank_mm, butterfly_mlp
from pixelfly.ops.functional import linear

from .helpers import DEVICES, make_layout, xor_grid


def weights(rows: int, cols: int, rank: int, dtype: torch.dtype, device: str) -> Weights:
    """Fresh weights of a fresh layout: nobody has called with it."""
    layout = make_layout(xor_grid(rows, cols), 16)
    n, k = layout.out_features, layout.in_features
    shapes = [(layout.nnz, 16, 16), (n, rank), (rank, k), (n,)]
    blocks, u, v, bias = (
        (torch.randn(shape, device=device) / 4).to(dtype).requires_grad_() for shape in shapes
    )
    low_rank = (u, v) if rank else (None, None)
    return Weights(blocks, layout, *low_rank, bias)


def tensors(*weights: Weights) -> list[torch.Tensor]:
    return [t for w in weights for t in w if isinstance(t, torch.Tensor)]


def outputs(function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    y = function()
    wanted = [t for t in leaves if t.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ["nothing", "x", "first", "second", "all weights"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_mlp(device, frozen, activation, autocast):
    for rank, with_residual in itertools.product((0, 8), (False, True)):
        first = weights(8, 4, rank, torch.float32, device)
        second = weights(4, 8, 0, torch.float32, device)
        x = torch.randn(2, 3, 64, device=device, requires_grad=True)
        residual = torch.randn(2, 3, 64, device=device, requires_grad=True)
        cast = contextlib.nullcontext()
        if autocast:
            cast = torch.autocast(device, torch.bfloat16)
            residual = residual.detach().bfloat16().requires_grad_()
        still = {"x": [x], "first": tensors(first), "second": tensors(second), "nothing": []}
        still["all weights"] = tensors(first, second)
        for t in still[frozen]:
            t.requires_grad_(False)
        leaves = [x, *tensors(first, second)] + [residual] * with_residual

        def call(x=x, first=first, second=second, r=residual if with_residual else None):
            return butterfly_mlp(x, first, second, activation=activation, residual=r)

        def two_calls(x=x, first=first, second=second, r=residual if with_residual else None):
            """What compiled code does."""
            give = activation not in (None, "relu")
            hidden, slope = linear(x, *first, activation, give_slope=give)
            return linear(hidden, *second, None, r, x_slope=slope)[0]

        with cast:
            ours = [outputs(call, leaves) for _ in range(2)]
            expected = outputs(two_calls, leaves)
            assert type(call().grad_fn).__name__ == "_MLPBackward"
        for results in ours:
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_mlp_keeps_what_its_backward_needs():
    """hidden activations and their derivative, no more; frozen weights keep no input."""
    first, second = (weights(*size, 0, torch.float32, "cpu") for size in ((8, 4), (4, 8)))
    x = torch.randn(2, 3, 64, requires_grad=True)

    def kept(activation: str) -> list[tuple[int, ...]]:
        shapes = []
        butterfly_mlp(x, first, second, activation=activation)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), id):
            butterfly_mlp(x, first, second, activation=activation)
        return sorted(tuple(s) for s in shapes if len(s) == 2)

    assert kept("gelu") == [(6, 64), (6, 128), (6, 128)]
    assert kept("relu") == [(6, 64), (6, 128)]
    for t in tensors(first, second):
        t.requires_grad_(False)
    assert kept("gelu") == [(6, 128)]
    assert kept("relu") == [(6, 128)]
    assert kept(None) == []


def test_mlp_names_what_is_wrong_in_either_layer():
    first, second = (weights(*size, 8, torch.float32, "cpu") for size in ((8, 4), (4, 8)))
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    bad = [
        (first._replace(bias=y), second, y, ValueError, "bias.shape .*features=128"),
        (first, second._replace(v=None), y, ValueError, "u without v"),
        (first, second._replace(u=second.u.double()), y, TypeError, "u.dtype"),
        (first, first, y, ValueError, "x.shape.* must be in_features=64, got 128"),
        (first, second, y[:2], ValueError, r"residual.shape .*\[3, 64\]"),
        (first, second, 1.0, TypeError, "residual must be a Tensor or None"),
    ]
    for again in range(2):
        for up, down, residual, error, message in bad:
            with pytest.raises(error, match=message):
                butterfly_mlp(x, up, down, activation="gelu", residual=residual)
        with pytest.raises(ValueError, match="activation must be one of"):
            butterfly_mlp(x, first, second, activation="tanh")
        with pytest.raises(TypeError, match="x must be a Tensor"):
            butterfly_mlp([1.0], first, second, activation=None)
        if not again:
            butterfly_mlp(x, first, second, activation="gelu")


def test_derivatives_that_are_refused():
    first, second = (weights(*size, 0, torch.float32, "cpu") for size in ((2, 2), (2, 2)))
    x = torch.randn(3, 32, requires_grad=True)

    def call(x):
        return butterfly_mlp(x, first, second, activation="gelu")

    for _ in range(2):
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not implemented.*reference"):
            dx.square().sum().backward()
        with pytest.raises(RuntimeError, match="torch.func are not implemented.*reference"):
            torch.func.grad(lambda x: call(x).sum())(x.detach())
    with torch.no_grad():
        batched = torch.func.vmap(call)(x.detach()[:, None])
    torch.testing.assert_close(batched[:, 0], call(x.detach()))


def test_a_layer_knows_calls_by_rank_dtype_and_device():
    w = weights(4, 4, 8, torch.float32, "cpu")
    x = torch.randn(5, 64)
    y = butterfly_lowrank_mm(x, *w)
    without = butterfly_lowrank_mm(x, w.blocks, w.layout, bias=w.bias)
    low = x @ w.v.t() @ w.u.t()
    torch.testing.assert_close(y, without + low, atol=1e-4, rtol=1e-4)
    double = [None if t is None else t.double() for t in (x, w.blocks, w.u, w.v, w.bias)]
    wide = butterfly_lowrank_mm(*double[:2], w.layout, *double[2:])
    torch.testing.assert_close(wide.float(), y, atol=1e-4, rtol=1e-4)
    keys = {(8, torch.float32), (0, torch.float32), (8, torch.float64)}
    assert {key[:2] for key in w.layout.calls} == keys
    with pytest.raises(TypeError, match="v.dtype must be x.dtype"):
        butterfly_lowrank_mm(x, w.blocks, w.layout, w.u, w.v.double(), w.bias)


def test_in_place_use_of_the_output():
    w = weights(4, 4, 0, torch.float32, "cpu")
    x = torch.randn(2, 3, 64, requires_grad=True)
    for _ in range(2):
        butterfly_lowrank_mm(x, *w).relu_().sum().backward()
        butterfly_mlp(x, w, w, activation="gelu").mul_(2).sum().backward()
