"""Slopes (act'(z)) that the forward keeps for the backward: in 8-bit codes beside bfloat16."""

from __future__ import annotations

import pytest
import torch

from pixelfly.nn import PixelflyMLP
from pixelfly.ops import activations
from pixelfly.ops.plan import device_plan, plan_header

from .helpers import DEVICES, Call, check_call, make_call, make_layout, xor_grid

CURVED = ("gelu", "gelu_tanh", "silu")
NUMBERS = activations.ACTIVATIONS


def _forward(call, save_slope=True):
    rank, inputs = call.rank, call.inputs
    operands = [inputs.get(name) for name in ("x", "blocks", "u", "v", "bias", "residual")]
    of = (call.layout, rank, inputs["x"].device)
    shared = (device_plan(*of), plan_header(*of))
    kind = NUMBERS[call.activation]
    return torch.ops.pixelfly.forward(*operands, *shared, kind, save_slope, False), shared


def _call(device, dtype, activation, **options):
    layout = make_layout(xor_grid(4, 4), 32, (24, 8))  # 104 features: no multiple of 16
    return make_call(
        layout, tokens=33, device=device, dtype=dtype, activation=activation, **options
    )


def test_every_code_and_nan():
    codes = torch.arange(256).to(torch.uint8)
    slopes = activations.decode_slope(codes, torch.float32)
    assert slopes[26] == 0 and slopes[226] == 1 and slopes[255].isnan()
    assert slopes[:255].isfinite().all()
    torch.testing.assert_close(activations.encode_slope(slopes).to(torch.uint8), codes)


@pytest.mark.parametrize("activation", ("relu", *CURVED))
def test_codes_reach_every_slope(activation):
    z = torch.linspace(-20, 20, 400001, dtype=torch.float64)
    slopes = activations.activation_slope(z, NUMBERS[activation])
    codes = activations.encode_slope(slopes)
    assert codes.min() >= 0 and codes.max() <= 252
    decoded = activations.decode_slope(codes.to(torch.uint8), torch.float64)
    assert (decoded - slopes).abs().max() <= 0.5001 / 200


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ("relu", *CURVED))
def test_what_forward_saves(device, dtype, activation):
    call = _call(device, dtype, activation, residual=True)
    (_, _, slope), _ = _forward(call)
    assert slope.shape == (33, 104)
    assert slope.dtype == (torch.uint8 if dtype == torch.bfloat16 else dtype)
    assert slope.stride() == ((112 if dtype == torch.bfloat16 else 104), 1)
    if activation == "relu":  # on either side of its kink by rounding
        return
    inputs = {name: t for name, t in call.inputs.items() if name != "residual"}
    z = Call(call.layout, inputs).to(torch.float64, "cpu").run()["y"]
    error = activations.decode_slope(slope.cpu(), torch.float64)
    error -= activations.activation_slope(z, NUMBERS[activation])
    # Half a step of 1/200, and what approximations and sums in 16 bits may add.
    assert error.abs().max() <= 0.0025 + (1e-5 if dtype == torch.float32 else 0.0075)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [1, 2, 3, 4])
def test_opcheck(device, activation):
    names = {number: name for name, number in NUMBERS.items()}
    call = _call(device, torch.bfloat16, names[activation], rank=8)
    (y, t, slope), shared = _forward(call)
    i = call.inputs
    operands = (i["x"], i["blocks"], i["u"], i["v"])
    options = (*shared, activation, True, False)
    check = torch.library.opcheck
    check(torch.ops.pixelfly.forward.default, (*operands, i["bias"], None, *options))
    x_slope = activations.empty_slope(i["x"], i["x"].shape[1]).fill_(100)
    relu = activation == 1
    for given in (slope, *([y] if relu else [])):
        arguments = (call.dy, *operands, t, given, *shared, relu, False, False)
        check(torch.ops.pixelfly.backward.default, (*arguments, *[True] * 5, x_slope, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ("relu", *CURVED))
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tokens", [40, 300])
def test_gradients_stay_within_the_bound_of_bfloat16(device, activation, residual, tokens):
    layout = make_layout(xor_grid(6, 8), 64, (56, 56))
    check_call(
        make_call(layout, tokens=tokens, rank=8, activation=activation, residual=residual,
                  device=device, dtype=torch.bfloat16)
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", CURVED)
def test_nan_reaches_the_gradient(device, dtype, activation):
    mlp = PixelflyMLP(64, 128, activation=activation, block_size=32, rank=0, device=device,
                      dtype=dtype)  # fmt: skip
    x = torch.randn(300, 64, device=device, dtype=dtype)
    x[7] = torch.nan
    x.requires_grad_()
    # The gradient of y is finite: NaN comes from the slopes alone.
    mlp(x).backward(torch.ones_like(x))
    assert x.grad[7].isnan().all()
    assert x.grad[:7].isfinite().all() and x.grad[8:].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_bad_slopes(device):
    call = _call(device, torch.bfloat16, "gelu")
    (y, _, slope), shared = _forward(call)
    i = call.inputs

    def backward(slope, x_slope=None, relu=False):
        torch.ops.pixelfly.backward(
            call.dy, i["x"], i["blocks"], None, None, None, slope, *shared, relu, False, False,
            True, True, False, False, True, x_slope, False,
        )  # fmt: skip

    backward(slope)
    backward(y, relu=True)
    with pytest.raises(RuntimeError, match="slope must be .*uint8, as pixelfly::forward saves it"):
        backward(y)
    with pytest.raises(RuntimeError, match="x_slope must be .*uint8"):
        backward(slope, x_slope=torch.ones_like(i["x"]))
    with pytest.raises(RuntimeError, match="slope must"):
        backward(y.float(), relu=True)
