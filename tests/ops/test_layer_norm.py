"""add_layer_norm: values, gradients, dtypes and what it refuses, on the CPU and on CUDA."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pixelfly.ops import add_layer_norm
from pixelfly.ops.layer_norm import MAX_FEATURES, _AddLayerNorm, _kernels_serve

from .helpers import DEVICES

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("x", "delta", "weight", "bias")
# x, delta (None: no delta), y, weight
COMBINATIONS = [
    (F32, F32, F32, F32),
    (F32, BF16, BF16, F32),
    (F32, F16, F16, F32),
    (F32, BF16, F32, F32),
    (F32, F32, BF16, F32),
    (F32, None, F32, F32),
    (F32, None, BF16, F32),
    (BF16, BF16, BF16, F32),
    (BF16, BF16, BF16, BF16),
    (F16, F16, F16, F32),
    (F16, None, F16, F16),
]


def make(shape, dtypes, device="cpu"):
    """Inputs and the gradients of y and h; the mean of x is far from 0."""
    stream, branch, out, weights = dtypes
    features = shape[-1]

    def normal(size, dtype, mean=0.0):
        values = torch.randn(size, dtype=F32, device=device) + mean
        return values.to(dtype)

    inputs = {
        "x": normal(shape, stream, 2),
        "delta": None if branch is None else normal(shape, branch),
        "weight": normal((features,), weights, 1),
        "bias": normal((features,), weights),
    }
    return inputs, (normal(shape, out), normal(shape, stream))


def specification(x, delta, weight, bias, eps=1e-5):
    """In float64; the sum is rounded to x's dtype first, as it is kept in that."""
    h = x.double() if delta is None else (x.double() + delta.double())
    h = h + (h.to(x.dtype).double() - h).detach()
    return F.layer_norm(h, weight.shape, weight.double(), bias.double(), eps), h


def run(fn, inputs, grads):
    """The outputs and the gradients of what is not None."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in inputs.items()}
    outputs = fn(**leaves)
    wanted = {k: t for k, t in leaves.items() if t is not None}
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    got = torch.autograd.grad([o for o, _ in pairs], [*wanted.values()], [g for _, g in pairs])
    named = zip(("y", "h", *(f"d{k}" for k in wanted)), (*outputs, *got), strict=True)
    return {name: t.detach() for name, t in named}


def check(fn, inputs, grads, rounds_once=None):
    """Compares with the specification. The kernels round once; torch's operators, which serve the
    CPU, add 16-bit gradients in 16 bits."""
    if rounds_once is None:
        rounds_once = inputs["x"].is_cuda
    got, want = run(fn, inputs, grads), run(specification, inputs, grads)
    for name, exact in want.items():
        value = got[name]
        assert value.shape == exact.shape and value.isfinite().all(), name
        if exact.numel() == 0:
            continue
        eps = max(torch.finfo(value.dtype).eps, torch.finfo(F32).eps * 16)
        error = (value.double() - exact).abs()
        # One rounding, and a few of float32 that grow with the largest value.
        few = torch.finfo(F32).eps * 32 if rounds_once else 4 * eps
        bound = eps * exact.abs() + few * exact.abs().amax()
        assert (error <= bound).all(), f"{name}: {(error - bound).max():.2e} beyond the bound"
    return got


def with_dtype(dtype):
    return lambda **inputs: add_layer_norm(**inputs, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("features", [8, 200, 768, 1000, 1024])
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=str)
def test_values_and_gradients(device, dtypes, features):
    inputs, grads = make((37, features), dtypes, device)
    got = check(with_dtype(dtypes[2]), inputs, grads)
    assert [got["y"].dtype, got["h"].dtype] == [dtypes[2], dtypes[0]]
    for name, t in inputs.items():
        assert t is None or got[f"d{name}"].dtype == t.dtype, name
    if device == "cuda":
        assert _kernels_serve(**inputs, dtype=dtypes[2])


@pytest.mark.gpu
@pytest.mark.parametrize("features", [2048, 3072, 4096, 5000, 8192, MAX_FEATURES])
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=str)
def test_wide_rows(dtypes, features):
    check(with_dtype(dtypes[2]), *make((301, features), dtypes, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("features", [256, 768, 1024, 2048, 4096])
def test_many_rows(features):
    check(with_dtype(BF16), *make((5003, features), (F32, BF16, BF16, F32), "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (2, 0, 64), (64,), (2, 3, 5, 64)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, BF16, BF16, F32), (F16, None, F16, F16)], ids=str)
def test_shapes(device, shape, dtypes):
    got = check(with_dtype(dtypes[2]), *make(shape, dtypes, device))
    if 0 in shape:
        assert not got["dweight"].any() and not got["dbias"].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=str)
@pytest.mark.parametrize("used", ["y", "h"])
def test_one_output_used(device, dtypes, used):
    inputs, (dy, dh) = make((9, 64), dtypes, device)
    leaves = {k: None if t is None else t.requires_grad_() for k, t in inputs.items()}
    y, h = add_layer_norm(**leaves, dtype=dtypes[2])
    wanted = {k: t for k, t in leaves.items() if t is not None and (used == "y" or k in NAMES[:2])}
    output, gradient = (y, dy) if used == "y" else (h, dh)
    got = torch.autograd.grad(output, [*wanted.values()], gradient)
    exact = specification(**leaves)[0 if used == "y" else 1]
    want = torch.autograd.grad(exact, [*wanted.values()], gradient.double())
    for name, a, b in zip(wanted, got, want, strict=True):
        bound = 2 * torch.finfo(a.dtype).eps + 4e-6
        assert (a - b).abs().max() <= bound * b.abs().max(), name


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=str)
def test_function_and_cpu_kernels(dtypes):
    """What serves CUDA, with the operators' CPU kernels below it."""

    def function(**inputs):
        return _AddLayerNorm.apply(*inputs.values(), 1e-5, dtypes[2])

    inputs, grads = make((3, 5, 64), dtypes)
    check(function, inputs, grads, rounds_once=True)
    check(function, inputs, (grads[0], None), rounds_once=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("delta", [True, False])
def test_opcheck(device, delta):
    inputs, (dy, dh) = make((4, 6, 64), (F32, BF16 if delta else None, BF16, F32), device)
    ops = torch.ops.pixelfly
    torch.library.opcheck(ops.add_layer_norm.default, (*inputs.values(), 1e-5, BF16))
    _, h, mean, rstd = ops.add_layer_norm(*inputs.values(), 1e-5, BF16)
    h = inputs["x"] if h is None else h
    for narrow, need_weights, given in ((BF16, True, dh), (None, False, None)):
        torch.library.opcheck(
            ops.add_layer_norm_backward.default,
            (dy, given, h, inputs["weight"], mean, rstd, narrow, need_weights),
        )


def test_gradcheck():
    shapes = ((3, 8), (3, 8), (8,), (8,))
    leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(add_layer_norm, leaves)
    assert torch.autograd.gradgradcheck(add_layer_norm, leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", [*itertools.product([False, True], repeat=3)], ids=str)
def test_frozen_inputs(device, trained):
    inputs, (dy, dh) = make((7, 64), (F32, BF16, BF16, F32), device)
    everything = run(with_dtype(BF16), inputs, (dy, dh))
    x, delta, weight, bias = inputs.values()
    wanted = [t for t, wants in zip((x, delta, weight), trained, strict=True) if wants]
    for t in wanted:
        t.requires_grad_()
    y, h = add_layer_norm(x, delta, weight, bias, dtype=BF16)
    assert y.requires_grad == any(trained)
    torch.testing.assert_close(y.detach(), everything["y"])
    if wanted:
        loss = (y.float() * dy.float()).sum() + (h * dh).sum()
        grads = torch.autograd.grad(loss, wanted)
        names = [n for n, wants in zip(("dx", "ddelta", "dweight"), trained, strict=True) if wants]
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(grad, everything[name])


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_chooses_the_dtype_of_y(device):
    inputs, _ = make((5, 64), (F32, BF16, BF16, F32), device)
    assert add_layer_norm(**inputs)[0].dtype == F32
    with torch.autocast(device, dtype=BF16):
        y, h = add_layer_norm(**inputs)
        assert (y.dtype, h.dtype) == (BF16, F32)
        assert torch.equal(y, add_layer_norm(**inputs, dtype=BF16)[0])
        assert add_layer_norm(**inputs, dtype=F32)[0].dtype == F32


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_of_a_network(device):
    """Two norms on one stream: gradients meet at h, or at x where there is no delta."""
    weights = [torch.randn(64, device=device, requires_grad=True) for _ in range(4)]
    linear = torch.randn(64, 64, device=device, requires_grad=True)
    leaves = [torch.randn(6, 64, device=device, requires_grad=True), linear, *weights]

    def block(norm):
        x = leaves[0]
        y, h = norm(x, None, *weights[:2])
        y, h = norm(h, y @ linear, *weights[2:])
        return torch.autograd.grad((y @ linear + h).square().mean(), leaves)

    def plain(x, delta, weight, bias):
        h = x if delta is None else x + delta
        return F.layer_norm(h, weight.shape, weight, bias), h

    for a, b in zip(block(add_layer_norm), block(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(device, backend):
    torch._dynamo.reset()
    inputs, grads = make((33, 64), (F32, BF16, BF16, F32), device)
    compiled = torch.compile(with_dtype(BF16), backend=backend, fullgraph=True)
    check(compiled, inputs, grads)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernels_do_not_take(device):
    """Strided and expanded tensors, other C: torch's operators, with the same results."""
    dtypes = (F32, BF16, BF16, F32)
    for features in (7, 12, 20, MAX_FEATURES + 8):
        check(with_dtype(BF16), *make((3, features), dtypes, device))
    inputs, grads = make((6, 64), dtypes, device)
    inputs["x"] = torch.randn(64, 6, device=device).t()
    assert not _kernels_serve(**inputs, dtype=BF16)
    check(with_dtype(BF16), inputs, grads)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_expanded_strided_or_unaligned(device):
    inputs, (dy, dh) = make((6, 64), (F32, BF16, BF16, F32), device)
    flat = torch.randn(6 * 64 + 1, device=device, dtype=BF16)
    for gradient in (dy[:1].expand(6, 64), dy.t().contiguous().t(), flat[1:].view(6, 64)):
        check(with_dtype(BF16), inputs, (gradient, dh[:1].expand(6, 64)))
    inputs["x"] = torch.randn(6 * 64 + 1, device=device)[1:].view(6, 64)
    inputs["weight"] = torch.randn(65, device=device)[1:]
    check(with_dtype(BF16), inputs, (dy, dh))


def test_torch_func():
    inputs, _ = make((5, 8), (F32, F32, F32, F32))
    loss = lambda x: add_layer_norm(**inputs | {"x": x})[0].square().sum()  # noqa: E731
    want = torch.autograd.functional.jacobian(loss, inputs["x"])
    torch.testing.assert_close(torch.func.grad(loss)(inputs["x"]), want)


CASES = {
    "x type": ({"x": [1.0]}, TypeError, ["x must be a Tensor", "got list"]),
    "x dtype": ({"x": torch.zeros(3, 8).long()}, TypeError, ["x.dtype", "got torch.int64"]),
    "x 0-d": ({"x": torch.zeros(())}, ValueError, ["x must have shape [..., C]", "0-d"]),
    "delta type": ({"delta": 1.0}, TypeError, ["delta must be a Tensor or None", "float"]),
    "delta shape": ({"delta": torch.zeros(8)}, ValueError, ["delta.shape", "[3, 8]", "got [8]"]),
    "delta dtype": (
        {"delta": torch.zeros(3, 8).double()}, TypeError, ["delta.dtype", "float32", "float64"]),
    "delta device": (
        {"delta": torch.zeros(3, 8, device="meta")}, ValueError, ["delta.device", "got meta"]),
    "weight none": ({"weight": None}, TypeError, ["weight must be a Tensor", "NoneType"]),
    "weight shape": ({"weight": torch.zeros(4)}, ValueError, ["weight.shape", "[8]", "got [4]"]),
    "weight dtype": (
        {"weight": torch.zeros(8).half()}, TypeError, ["weight.dtype", "float32", "float16"]),
    "bias shape": ({"bias": torch.zeros(1, 8)}, ValueError, ["bias.shape", "got [1, 8]"]),
    "bias dtype": ({"bias": torch.zeros(8).double()}, TypeError, ["bias.dtype", "float64"]),
    "dtype": ({"dtype": torch.int8}, TypeError, ["dtype must be bfloat16", "got torch.int8"]),
    "dtype type": ({"dtype": "bf16"}, TypeError, ["dtype must be bfloat16", "got 'bf16'"]),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_argument_expected_and_got(device, case):
    inputs, _ = make((3, 8), (F32, F32, F32, F32))
    change, error, words = CASES[case]
    call = {
        k: t.to(device) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t
        for k, t in (inputs | change).items()
    }
    with pytest.raises(error) as caught:
        add_layer_norm(**call)
    assert str(caught.value).startswith("add_layer_norm: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("delta", [BF16, None])
def test_graph_capture_and_replay(delta):
    inputs, grads = make((256, 768), (F32, delta, BF16, F32), "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(with_dtype(BF16), inputs, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(with_dtype(BF16), inputs, grads)
    for scale in (1.0, -2.0):
        inputs["x"].mul_(scale)
        graph.replay()
        for name, value in run(with_dtype(BF16), inputs, grads).items():
            assert torch.equal(captured[name], value), name


@pytest.mark.gpu
def test_side_stream():
    inputs, grads = make((4096, 768), (F32, BF16, BF16, F32), "cuda")
    expected = run(with_dtype(BF16), inputs, grads)
    late = {k: torch.zeros_like(t) for k, t in inputs.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, t in late.items():
            t.copy_(inputs[name])
        got = run(with_dtype(BF16), late, grads)
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name  # deterministic, too


@pytest.mark.gpu
def test_double_backward_is_refused():
    inputs, grads = make((4, 64), (F32, None, F32, F32), "cuda")
    x = inputs["x"].requires_grad_()
    y, _ = add_layer_norm(**inputs)
    (dx,) = torch.autograd.grad(y, x, grads[0].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="add_layer_norm: double backward is not implemented"):
        dx.sum().backward()
