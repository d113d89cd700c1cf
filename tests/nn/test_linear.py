"""What PixelflyLinear computes, and its way from dense and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelfly.masks import block_diagonal, flat_block_butterfly
from pixelfly.nn import PixelflyLinear
from pixelfly.nn.project import blocks_of, dense_weight, project, truncated_svd

DTYPE = torch.float64
FORMS = {
    "blocks": {"rank": 0},
    "low rank": {"rank": 24},
    "scalar gate": {"rank": 24, "gate": "scalar"},
    "token gate": {"rank": 24, "gate": "token"},
    "global": {"rank": 32, "lowrank": "global"},
}


def make(form: str, in_features=200, out_features=136, **options) -> PixelflyLinear:
    options = {"block_size": 32, "dtype": DTYPE, **FORMS[form], **options}
    layer = PixelflyLinear(in_features, out_features, **options)
    if layer.gate is not None:  # away from one half
        nn.init.normal_(layer.gate, 0.3, 0.05)
    return layer


def expected(layer: PixelflyLinear, x, residual=None):
    """The formula of the docstring with dense matrices."""
    blocks = dense_weight(layer.blocks, layer.layout)
    bx = x @ blocks.T
    low = 0 if layer.u is None else (x @ layer.v.T) @ layer.u.T
    if layer.gate_kind == "scalar":
        y = layer.gate * bx + (1 - layer.gate) * low
    elif layer.gate_kind == "token":
        g = torch.sigmoid(x @ layer.gate.T + layer.gate_bias)
        y = g * bx + (1 - g) * low
    else:
        y = bx + low
    if layer.bias is not None:
        y = y + layer.bias
    if layer.activation == "gelu":
        y = F.gelu(y)
    return y if residual is None else y + residual


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradients(form, with_residual, activation):
    layer = make(form, activation=activation)
    x = torch.randn(2, 5, 200, dtype=DTYPE, requires_grad=True)
    residual = torch.randn(2, 5, 136, dtype=DTYPE, requires_grad=True) if with_residual else None
    inputs = [x, *layer.parameters()] + ([residual] if with_residual else [])
    dy = torch.randn(2, 5, 136, dtype=DTYPE)
    y, y_expected = layer(x, residual), expected(layer, x, residual)
    torch.testing.assert_close(y, y_expected)
    grads = torch.autograd.grad(y, inputs, dy)
    torch.testing.assert_close(grads, torch.autograd.grad(y_expected, inputs, dy))


def test_without_bias():
    layer = make("low rank", bias=False)
    x = torch.randn(3, 200, dtype=DTYPE)
    assert layer.bias is None and layer.to_dense().bias is None
    torch.testing.assert_close(layer(x), expected(layer, x))


def test_no_tokens():
    layer = make("scalar gate")
    y = layer(torch.zeros(0, 200, dtype=DTYPE))
    assert y.shape == (0, 136)
    y.sum().backward()
    assert all(p.grad.abs().max() == 0 for p in layer.parameters())


@pytest.mark.parametrize("form", [f for f in FORMS if f != "token gate"])
def test_to_dense_is_exact(form):
    layer = make(form)
    dense = layer.to_dense()
    x = torch.randn(7, 200, dtype=DTYPE)
    torch.testing.assert_close(dense(x), layer(x))
    assert type(dense) is nn.Linear and dense.weight.requires_grad
    with torch.no_grad():
        dense.weight.zero_(), dense.bias.zero_()
    assert layer.blocks.abs().max() > 0 and layer.bias.abs().max() > 0, "shares memory"


def test_to_dense_of_a_token_gate():
    with pytest.raises(ValueError, match="gate='token'"):
        make("token gate").to_dense()


@pytest.mark.parametrize("form", FORMS)
def test_from_a_dense_layer_that_fits(form):
    """A weight that the structure can represent comes back exactly."""
    options = dict(FORMS[form])
    if form == "blocks":
        source = make("blocks")
        dense = source.to_dense()
    else:
        dense = nn.Linear(200, 136, dtype=DTYPE)
        if form == "global":
            source = make("global")
            dense = source.to_dense()
        else:  # low rank alone fits
            with torch.no_grad():
                dense.weight.copy_(torch.randn(136, 8) @ torch.randn(8, 200))
            options["layout"] = block_diagonal(136, 200, block_size=32)
    layer = PixelflyLinear.from_dense(dense, **{"block_size": 32, **options}, iterations=200)
    x = torch.randn(64, 200, dtype=DTYPE)
    error = (layer(x) - dense(x)).norm() / dense(x).norm()
    assert error < (1e-6 if form in ("blocks", "global") else 0.05)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("gate", [None, "scalar", "token"])
def test_from_dense_is_the_best_of_its_kind(gate):
    dense = nn.Linear(256, 256)
    layer = PixelflyLinear.from_dense(dense, density=0.25, block_size=16, gate=gate)
    x = torch.randn(4096, 256)
    error = (layer(x) - dense(x)).square().mean() / dense(x).square().mean()
    blocks = layer.layout
    # Copied blocks alone leave 1 - their density of a random weight; low rank must help.
    assert error < 1 - blocks.density
    layout, rank = layer.layout, layer.rank
    one = _error(dense.weight, layout, rank, iterations=0)
    many = _error(dense.weight, layout, rank, iterations=10)
    simple = dense.weight - dense_weight(blocks_of(dense.weight, layout), layout)
    u, v = truncated_svd(simple.detach(), rank)
    assert many <= one <= (simple - u @ v).norm()


def _error(weight, layout, rank, iterations):
    blocks, u, v = project(weight.detach(), layout, rank, iterations=iterations)
    return (weight - dense_weight(blocks, layout) - u @ v).norm()


@pytest.mark.parametrize("shape", [(40, 72), (72, 40), (64, 64)])
def test_truncated_svd(shape):
    matrix = torch.randn(shape, dtype=DTYPE)
    u, v = truncated_svd(matrix, 8)
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(u @ v, left[:, :8] * s[:8] @ right[:8])
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))  # balanced
    zero_u, zero_v = truncated_svd(torch.zeros(shape), 8)
    assert torch.isfinite(zero_u).all() and (zero_u @ zero_v).abs().max() == 0


def test_from_dense_keeps_device_dtype_and_mode():
    dense = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).eval()
    layer = PixelflyLinear.from_dense(dense, block_size=16, rank=16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.bias is None and not layer.training
    with pytest.raises(TypeError, match="must be nn.Linear or transformers' Conv1D, got Conv2d"):
        PixelflyLinear.from_dense(nn.Conv2d(8, 8, 1))


def test_repr_says_nominal_and_actual_density():
    text = repr(PixelflyLinear(768, 3072, density=0.25, gate="scalar", activation="gelu"))
    assert "768, 3072, bias=True, block_size=64, nnz=96, rank=48" in text
    assert "gate='scalar'" in text and "activation='gelu'" in text
    assert "density=0.2448 (nominal 0.25)" in text
    assert "lowrank='global'" in repr(make("global"))


def test_autocast():
    layer = make("scalar gate", dtype=torch.float32)
    x = torch.randn(4, 200)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    token = make("token gate", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = token(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in token.parameters())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gate": "vector"}, ValueError, "gate must be None, 'scalar' or 'token', got 'vector'"),
        ({"gate": "scalar", "rank": 0}, ValueError, "rank above 0"),
        ({"gate": "token", "lowrank": "global", "rank": 64}, ValueError, "lowrank='factored'"),
        ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu'"),
        ({"density": 2}, ValueError, "density must be in"),
        ({"density": 0.001}, ValueError, "nearest reachable"),
        ({"activation": ["gelu"]}, ValueError, "activation must be one of None, 'relu'"),
        ({"block_size": 8}, ValueError, "block_size must be 16"),
        ({"block_size": 64.0}, ValueError, "block_size must be 16.*got 64.0"),
        ({"layout": flat_block_butterfly(128, 128)}, ValueError, "layout must be for"),
    ],
)
def test_bad_construction(options, error, match):
    with pytest.raises(error, match=match):
        PixelflyLinear(256, 256, **options)


@pytest.mark.parametrize("form", FORMS)
def test_bad_input(form):
    layer = make(form)
    with pytest.raises((ValueError, RuntimeError), match="200|136"):
        layer(torch.randn(3, 136, dtype=DTYPE))
    with pytest.raises(ValueError, match="residual"):
        layer(torch.randn(3, 200, dtype=DTYPE), torch.randn(3, 8, dtype=DTYPE))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.ones(3, 200, dtype=torch.int64), TypeError, "x.dtype must be .*got torch.int64"),
        (torch.ones(3, 200, dtype=torch.float16), TypeError, "outside autocast"),
        (torch.ones(3, 200, dtype=DTYPE, device="meta"), ValueError, "device must be x.device"),
        (torch.ones((), dtype=DTYPE), ValueError, "x must have shape"),
        ([1.0] * 200, TypeError, "x must be a Tensor, got list"),
    ],
)
def test_inputs_of_another_kind(form, x, error, match):
    with pytest.raises(error, match=match):
        make(form)(x)


def test_weight_is_refused_with_advice():
    layer = make("blocks")
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="to_dense"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="wieght"):
        _ = layer.wieght
