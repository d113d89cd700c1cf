"""TokenMLP against the transposed MLP that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelfly.nn import TokenMLP
from pixelfly.ops.activations import ACTIVATIONS, apply_activation
from pixelfly.ops.plan import device_plan, plan_header

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
@pytest.mark.parametrize("channels", [40, 48, 144])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_autocast(device, dtype, tokens, channels, activation):
    """As near float64 as the transposed MLP under the same autocast; gradients in float32.

    Not with ReLU, where a sum that rounds to the other side of zero changes a whole gradient.
    """
    mlp = TokenMLP(tokens, 100, device=device, activation=activation)
    x = torch.randn(4, tokens, channels, device=device, requires_grad=True)
    dy = torch.randn(4, tokens, channels, device=device, dtype=dtype)
    with torch.autocast(device, dtype):
        y, theirs = mlp(x), transposed(mlp, x)
    assert y.dtype == dtype
    ours, theirs = gradients(y, mlp, x, dy), gradients(theirs, mlp, x, dy)
    mlp.double()
    wide = x.detach().double().requires_grad_()
    exact = gradients(transposed(mlp, wide), mlp, wide, dy.double())
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        # Twice: without kernels of its own, the bias is added to products already rounded.
        bound = 2 * (b.double() - c).norm() + 1e-3 * c.norm()
        assert (a.double() - c).norm() <= bound, ((a.double() - c).norm(), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed_memory", [False, True])
def test_compiled_on_a_gpu(dtype, transposed_memory):
    """With the kernels and, in float32, without; x as timm's patches lie, too."""
    torch._dynamo.reset()
    mlp = TokenMLP(196, 384, device="cuda", dtype=dtype)
    x = torch.randn(4, 144, 196, device="cuda", dtype=dtype).mT
    x = (x if transposed_memory else x.contiguous()).requires_grad_()
    dy = torch.randn(4, 196, 144, device="cuda", dtype=dtype)
    ours, theirs = torch.compile(mlp, fullgraph=True)(x), mlp(x)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(gradients(ours, mlp, x, dy), gradients(theirs, mlp, x, dy), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.gpu
def test_operator_refuses():
    mlp = TokenMLP(64, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 64, 32, device="cuda", dtype=torch.bfloat16)
    of = (mlp._layouts[0], 0, x.device)
    plan, header = device_plan(*of), plan_header(*of)
    blocks = torch.randn(1, 64, 64, device="cuda", dtype=torch.bfloat16)

    def call(x=x, blocks=blocks, out=64):
        return torch.ops.pixelfly.column_product(
            x, blocks, None, None, plan, header, out, 0, False, False
        )

    assert call()[0].shape == x.shape
    for options, message in [
        ({"x": x[0]}, r"x must be \[S, in_features, C\]"),
        ({"x": x.transpose(1, 2)}, "to 64 features, got 32|contiguous"),
        ({"out": 65}, "the plan is for 64 to 64 features, got 64 to 65"),
        ({"blocks": blocks.half()}, "blocks must have the other operands' dtype"),
        ({"x": x[..., :20].contiguous()}, "a multiple of 16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_over_samples_and_columns(device, dtype):
    tensors = [torch.randn(s, device=device).to(dtype) for s in ((3, 20, 16), (9, 5, 776))]
    tensors += [torch.randn(0, 4, 8, device=device).to(dtype)]
    torch.library.opcheck(torch.ops.pixelfly.feature_sums.default, (tensors,))
    for ours, x in zip(torch.ops.pixelfly.feature_sums(tensors), tensors, strict=True):
        torch.testing.assert_close(ours, x.double().sum((0, 2)).float(), atol=1e-3, rtol=1e-5)


@pytest.mark.gpu
def test_both_layers_share_a_plan_in_compiled_code():
    torch._dynamo.reset()
    mlp = TokenMLP(40, 60, device="cuda")  # one block each way
    x = torch.randn(3, 40, 64, device="cuda", requires_grad=True)
    results = []
    for f in (mlp, torch.compile(mlp, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            y = f(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *mlp.parameters()])])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


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
