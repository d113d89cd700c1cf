"""PixelflyMLP against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

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


def gradients(mlp, call, x, residual, dy):
    tensors = [*mlp.parameters(), x, residual]
    y = call(x, residual)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def two_layers(mlp):
    return lambda x, residual: mlp.fc2(mlp.fc1(x), residual)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(
    "how", ["plain", "bare", "scalar gate", "hook", "frozen first", "frozen", "compiled"]
)
def test_shares_the_derivative(activation, how):
    options = {"scalar gate": {"gate": "scalar"}, "bare": {"bias": False, "rank": 0}}.get(how, {})
    options = {"block_size": 16, "rank": 16, "dtype": torch.float64} | options
    mlp = PixelflyMLP(64, 128, 32, activation=activation, **options)
    calls = []
    if how == "hook":
        mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    if how == "frozen first":
        mlp.fc1.blocks.requires_grad_(False)
    if how == "frozen":
        mlp.requires_grad_(False)
    run = torch.compile(mlp, backend="aot_eager", fullgraph=True) if how == "compiled" else mlp
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 32, dtype=torch.float64)
    tensors = [p for p in [*mlp.parameters(), x, residual] if p.requires_grad]
    got, expected = run(x, residual), two_layers(mlp)(x, residual)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(y, tensors, dy) for y in (got, expected))
    torch.testing.assert_close(ours, theirs)
    assert len(calls) == (2 if how == "hook" else 0)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, residual), expected)


class Backwards(TorchDispatchMode):
    """Notes for calls of `pixelfly::backward` whether dy and whether dx is scaled by a slope."""

    def __init__(self):
        super().__init__()
        self.scaled = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.pixelfly.backward.default:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.scaled.append((named["slope"] is not None, named.get("x_slope") is not None))
        return func(*args, **(kwargs or {}))


def scaled(mlp):
    x = torch.randn(3, 64, dtype=mlp.fc1.blocks.dtype)
    with Backwards() as seen:
        mlp(x).sum().backward()
    return seen.scaled  # fc2's, then fc1's


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_no_pass_over_the_hidden_activations(activation):
    mlp = PixelflyMLP(64, activation=activation, block_size=16)
    assert scaled(mlp) == [(False, True), (False, False)]


def test_keeps_the_hidden_activations_and_their_slopes_once():
    mlp = PixelflyMLP(64, 128, block_size=16)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add((t.data_ptr(), t.shape)) or t, lambda t: t
    ):
        mlp(torch.randn(3, 64))
    assert [shape for _, shape in kept].count((3, 128)) == 2


def test_layers_are_called_where_calls_are_watched():
    apart = [(False, False), (True, False)]
    mlp = PixelflyMLP(64, block_size=16)
    inner = mlp.fc2.forward
    mlp.fc2.forward = lambda x, residual=None: 2 * inner(x, residual)
    assert scaled(mlp) == apart
    x = torch.randn(3, 64)
    torch.testing.assert_close(mlp(x), 2 * inner(mlp.fc1(x)))

    calls = []
    handle = register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        mlp = PixelflyMLP(64, block_size=16)
        assert scaled(mlp) == apart
    finally:
        handle.remove()
    assert calls == [mlp.fc1, mlp.fc2, mlp]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    mlp = PixelflyMLP(64, block_size=16, rank=16)
    x = torch.randn(3, 64, requires_grad=True)
    residual = torch.randn(3, 64, requires_grad=True)
    dy = torch.randn(3, 64).to(dtype)
    with torch.autocast("cpu", dtype):
        ours = gradients(mlp, mlp, x, residual, dy)
        theirs = gradients(mlp, two_layers(mlp), x, residual, dy)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 4 * torch.finfo(dtype).eps * b.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("kernel", ["auto", "sm80", "few", "split", "sm90"])
def test_forced_kernels_share_the_derivative(monkeypatch, kernel, activation):
    if kernel in ("split", "sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("sm90 kernels need a Hopper GPU")
    monkeypatch.setenv("PIXELFLY_KERNEL", kernel)
    mlp = PixelflyMLP(
        256, 512, 192, activation=activation, rank=16, device="cuda", dtype=torch.bfloat16
    )
    x, residual, dy = (
        torch.randn(48, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for width in (256, 192, 192)
    )
    ours = gradients(mlp, mlp, x, residual, dy)
    exact = copy.deepcopy(mlp).cpu().double()
    inputs = [t.detach().cpu().double().requires_grad_() for t in (x, residual)]
    expected = gradients(exact, exact, *inputs, dy.detach().cpu().double())
    for a, b in zip(ours, expected, strict=True):
        error = (a.cpu().double() - b).norm()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [5, 300])
def test_shares_the_derivative_on_cuda(dtype, block_size, tokens):
    mlp = PixelflyMLP(256, 512, 256, block_size=block_size, rank=16, device="cuda", dtype=dtype)
    x = torch.randn(tokens, 256, device="cuda").to(dtype).requires_grad_()
    residual = torch.randn(tokens, 256, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(tokens, 256, device="cuda").to(dtype)
    ours = gradients(mlp, mlp, x, residual, dy)
    theirs = gradients(mlp, two_layers(mlp), x, residual, dy)
    for a, b in zip(ours, theirs, strict=True):  # which rounds once more, to dtype
        assert (a - b).float().norm() <= 4 * torch.finfo(dtype).eps * b.float().norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_recompute_keeps_the_input_alone(device, compiled):
    mlp = PixelflyMLP(64, 256, block_size=16, recompute=True, device=device)
    plain = PixelflyMLP.from_layers(mlp.fc1, mlp.fc2)
    x, residual, dy = (torch.randn(33, 64, device=device, requires_grad=True) for _ in range(3))
    call = torch.compile(mlp, fullgraph=True) if compiled else mlp
    ours, theirs = (gradients(f, mlp, x, residual, dy) for f in (call, plain))
    torch.testing.assert_close(ours, theirs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(x, residual)
    assert not any(t.shape == (33, 256) for t in kept)


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


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_recompute_of_a_first_call(activation):
    """What is saved must be the same when the layers' calls are known and when they are not."""
    mlp = PixelflyMLP(
        64, 128, density=0.5, block_size=16, rank=0, recompute=True, activation=activation
    )
    x = torch.randn(2, 3, 64, requires_grad=True)
    for _ in range(2):
        mlp(x).sum().backward()
