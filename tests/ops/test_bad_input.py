"""Bad input: an exception that names the argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

from pixelfly.masks import BlockLayout
from pixelfly.ops import butterfly_lowrank_mm
from pixelfly.ops.plan import device_plan, plan_header

from .helpers import DEVICES, make_call, make_layout, xor_grid


@pytest.fixture
def arguments() -> dict:
    layout = make_layout(xor_grid(4, 2), 16)  # 64 <- 32, 4 blocks
    call = make_call(layout, tokens=(2, 3), rank=8, residual=True, dtype=torch.float32, grad=False)
    return {"layout": layout, **call.inputs}


def zeros(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(*shape, **kwargs)


CASES = {
    "x last dim": (
        {"x": zeros(3, 40)}, ValueError, ["x.shape[-1]", "in_features=32", "got 40"]),
    "x 0-d": ({"x": zeros(())}, ValueError, ["x must have shape", "in_features=32", "0-d"]),
    "x integer": (
        {"x": zeros(2, 3, 32, dtype=torch.int64)}, TypeError, ["x.dtype", "float32", "int64"]),
    "x bool": ({"x": zeros(2, 3, 32).bool()}, TypeError, ["x.dtype", "torch.bool"]),
    "x complex": ({"x": zeros(2, 3, 32).cfloat()}, TypeError, ["x.dtype", "complex64"]),
    "x not a tensor": ({"x": [1.0] * 32}, TypeError, ["x must be a Tensor", "list"]),
    "x dtype": (
        {"x": zeros(2, 3, 32).bfloat16()}, TypeError,
        ["blocks.dtype", "x.dtype=torch.bfloat16", "outside autocast", "got torch.float32"]),
    "x device": (
        {"x": zeros(2, 3, 32, device="meta")}, ValueError, ["blocks.device", "meta", "got cpu"]),
    "blocks nnz": (
        {"blocks": zeros(7, 16, 16)}, ValueError, ["blocks.shape", "[8, 16, 16]", "[7, 16, 16]"]),
    "blocks size": (
        {"blocks": zeros(8, 32, 32)}, ValueError, ["blocks.shape", "[8, 16, 16]", "[8, 32, 32]"]),
    "blocks 2-d": ({"blocks": zeros(8, 256)}, ValueError, ["blocks.shape", "[8, 256]"]),
    "blocks none": ({"blocks": None}, TypeError, ["blocks must be a Tensor", "NoneType"]),
    "u without v": ({"v": None}, ValueError, ["u and v", "u without v"]),
    "v without u": ({"u": None}, ValueError, ["u and v", "v without u"]),
    "u features": ({"u": zeros(32, 8)}, ValueError, ["u.shape", "out_features=64", "[32, 8]"]),
    "u 1-d": ({"u": zeros(64)}, ValueError, ["u.shape", "[64]"]),
    "v rank": ({"v": zeros(16, 32)}, ValueError, ["v.shape", "rank=8", "[16, 32]"]),
    "v features": ({"v": zeros(8, 64)}, ValueError, ["v.shape", "in_features=32", "[8, 64]"]),
    "v dtype": ({"v": zeros(8, 32).double()}, TypeError, ["v.dtype", "float32", "float64"]),
    "bias length": ({"bias": zeros(32)}, ValueError, ["bias.shape", "[out_features=64]", "[32]"]),
    "bias 2-d": ({"bias": zeros(1, 64)}, ValueError, ["bias.shape", "[1, 64]"]),
    "bias number": ({"bias": 0.5}, TypeError, ["bias must be a Tensor or None", "float"]),
    "bias device": (
        {"bias": zeros(64, device="meta")}, ValueError, ["bias.device", "cpu", "got meta"]),
    "activation": (
        {"activation": "tanh"}, ValueError, ["activation", "'gelu_tanh'", "got 'tanh'"]),
    "activation type": ({"activation": torch.relu}, ValueError, ["activation", "built-in"]),
    "activation list": ({"activation": ["relu"]}, ValueError, ["activation", "got ['relu']"]),
    "residual shape": (
        {"residual": zeros(3, 64)}, ValueError, ["residual.shape", "[2, 3, 64]", "[3, 64]"]),
    "residual features": (
        {"residual": zeros(2, 3, 32)}, ValueError, ["residual.shape", "[2, 3, 64]", "[2, 3, 32]"]),
    "layout type": (
        {"layout": torch.ones(4, 2).bool()}, TypeError, ["layout", "BlockLayout", "Tensor"]),
    "layout of another shape": (
        {"layout": make_layout(xor_grid(2, 4), 16)}, ValueError,
        ["x.shape[-1]", "in_features=64", "got 32"]),
    "layout of other blocks": (
        {"layout": make_layout(torch.ones(4, 2).bool().tril(), 16)}, ValueError,
        ["blocks.shape", "[7, 16, 16]"]),
}  # fmt: skip


@pytest.mark.parametrize("after_a_good_call", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_names_argument_expected_and_got(arguments, case, after_a_good_call):
    changes, exception, fragments = CASES[case]
    if after_a_good_call:
        butterfly_lowrank_mm(**arguments)
    with pytest.raises(exception, match="^butterfly_lowrank_mm: ") as info:
        butterfly_lowrank_mm(**{**arguments, **changes})
    for fragment in fragments:
        assert fragment in str(info.value), f"{fragment!r} missing in: {info.value}"


def test_good_arguments_pass(arguments):
    assert butterfly_lowrank_mm(**arguments).shape == (2, 3, 64)


def test_rank_zero_is_no_low_rank(arguments):
    without = butterfly_lowrank_mm(**{**arguments, "u": None, "v": None})
    rank_zero = {**arguments, "u": zeros(64, 0), "v": zeros(0, 32)}
    assert torch.equal(butterfly_lowrank_mm(**rank_zero), without)


@pytest.mark.parametrize("size", [8, 48, 256])
def test_block_size_not_in_the_list(size):
    grid = torch.eye(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="block_size"):
        layout = BlockLayout.from_grid(grid, size)
        butterfly_lowrank_mm(zeros(1, 2 * size), zeros(2, size, size), layout)


def test_features_not_multiples_of_eight():
    grid = torch.eye(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="multiple"):
        layout = BlockLayout.from_grid(grid, 16, 28, 32)
        butterfly_lowrank_mm(zeros(1, 32), zeros(2, 16, 16), layout)


def test_double_backward_is_an_error():
    call = make_call(make_layout(xor_grid(2, 2), 16), rank=8, activation="gelu")
    inputs = {name: t.requires_grad_() for name, t in call.inputs.items()}
    x, blocks = inputs.pop("x"), inputs.pop("blocks")
    y = butterfly_lowrank_mm(x, blocks, call.layout, activation="gelu", **inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented.*reference"):
        dx.square().sum().backward()


def test_torch_func_is_an_error_or_right():
    """vmap loops (torch warns that it is slow); functional gradients raise."""
    call = make_call(make_layout(xor_grid(2, 2), 16), tokens=(3, 5), grad=False)
    x, blocks = call.inputs["x"], call.inputs["blocks"]

    def layer(row, blocks):
        return butterfly_lowrank_mm(row, blocks, call.layout)

    batched = torch.func.vmap(layer, in_dims=(0, None))(x, blocks)
    torch.testing.assert_close(batched, layer(x, blocks))
    with pytest.raises(RuntimeError, match=NO_TORCH_FUNC):
        torch.func.grad(lambda w: layer(x, w).sum())(blocks)


UNUSED_WIDTHS = list(range(40, 100))
NO_TORCH_FUNC = "torch.func are not implemented.*reference"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacfwd", "jacrev"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("of", ["x", "blocks"])
def test_derivatives_by_torch_func_are_refused(device, transform, known, of):
    """Whether or not the layout was used before, and though nothing requires a gradient."""
    # Plans outlive layouts: a size of its own for every case.
    grid = xor_grid(2, UNUSED_WIDTHS.pop())
    layout = make_layout(grid, 16)
    inputs = {
        "x": torch.randn(7, layout.in_features, device=device),
        "blocks": torch.randn(layout.nnz, 16, 16, device=device),
    }
    if known:
        butterfly_lowrank_mm(**inputs, layout=layout)

    def f(value):
        return butterfly_lowrank_mm(**{**inputs, of: value}, layout=layout).sum()

    value = inputs[of]
    with pytest.raises(RuntimeError, match=NO_TORCH_FUNC):
        if transform == "jvp":
            torch.func.jvp(f, (value,), (value,))
        elif transform == "vjp":
            torch.func.vjp(f, value)
        else:
            getattr(torch.func, transform)(f)(value)
    plan = device_plan(layout, 0, value.device)
    assert type(plan) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(plan)


@pytest.mark.gpu
def test_forward_mode_on_cuda_is_refused():
    layout = make_layout(xor_grid(2, 2), 16)
    x = torch.randn(5, 32, device="cuda")
    blocks = torch.randn(layout.nnz, 16, 16, device="cuda")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=NO_TORCH_FUNC):
            butterfly_lowrank_mm(dual, blocks, layout)


@pytest.mark.parametrize("device", DEVICES[1:])
class TestOnCuda:
    def test_x_on_another_device(self, device, arguments):
        with pytest.raises(ValueError, match=re.escape("blocks.device must be x.device=cuda:0")):
            butterfly_lowrank_mm(**{**arguments, "x": arguments["x"].to(device)})

    def test_float64(self, device, arguments):
        on_gpu = {
            name: t if name == "layout" else t.double().to(device) for name, t in arguments.items()
        }
        with pytest.raises(TypeError, match="float64 runs on the CPU only"):
            butterfly_lowrank_mm(**on_gpu)


def test_operator_whose_gradient_would_be_wrong(arguments):
    x, residual = (arguments[name].flatten(0, 1) for name in ("x", "residual"))
    blocks = arguments["blocks"].requires_grad_()
    plan = device_plan(arguments["layout"], 0, x.device)
    header = plan_header(arguments["layout"], 0, x.device)

    def forward(residual, save_slope, dy_is_dz):
        options = (2, save_slope, False, None, dy_is_dz)
        torch.ops.pixelfly.linear(x, blocks, None, None, None, residual, plan, header, *options)

    with pytest.raises(RuntimeError, match="save_slope must be True .* got False"):
        forward(None, False, False)
    with pytest.raises(RuntimeError, match="with dy_is_dz the residual gets no gradient"):
        forward(residual.requires_grad_(), True, True)


class TestDevicesWithoutKernels:
    """The checks of ops.device with a faked build and GPU: no such machine is at hand."""

    @pytest.fixture
    def fake(self, monkeypatch):
        from pixelfly.ops import device

        def configure(cuda, capability, archs="8.0;9.0a+PTX"):
            monkeypatch.setattr(device, "build_info", lambda: {"cuda": cuda, "archs": archs})
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
            return device.check_device

        return configure

    def test_cpu_only_build(self, fake):
        check = fake(None, (9, 0))
        with pytest.raises(RuntimeError, match="built without CUDA.*nvcc.*PIXELFLY_FORCE_CUDA=1"):
            check(torch.device("cuda", 0))

    def test_gpu_too_old(self, fake):
        check = fake("13.0", (7, 5))
        with pytest.raises(RuntimeError, match=r"8\.0 or newer, got cuda:0 \(Some GPU, sm_75\)"):
            check(torch.device("cuda", 0))

    def test_other_device_types(self, fake):
        with pytest.raises(RuntimeError, match="cpu or cuda, got mps"):
            fake("13.0", (8, 0))(torch.device("mps"))

    def test_good_gpu(self, fake):
        fake("13.0", (8, 0))(torch.device("cuda", 0))

    @pytest.mark.parametrize(
        ("archs", "capability", "works"),
        [
            ("8.0;9.0a+PTX", (8, 9), True),
            ("8.0;9.0a+PTX", (12, 0), True),
            ("8.0", (8, 6), True),
            ("8.0", (9, 0), False),
            ("8.6", (8, 0), False),
            ("9.0a", (8, 0), False),
            ("9.0a", (10, 0), False),
            ("9.0a+PTX", (8, 9), False),
        ],
    )
    def test_architecture_that_was_not_built(self, fake, archs, capability, works):
        check = fake("13.0", capability, archs)
        if works:
            return check(torch.device("cuda", 0))
        cure = f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} "
        with pytest.raises(RuntimeError, match=f"LIST='{re.escape(archs)}'; run {cure}"):
            check(torch.device("cuda", 0))
