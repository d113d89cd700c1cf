"""linear_cross_entropy: values, gradients and what it refuses, on the CPU and on CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pixelfly.ops import linear_cross_entropy
from pixelfly.ops.cross_entropy import _kernels_serve, _LinearCrossEntropy

from .helpers import DEVICES

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
IGNORE = -100


def make(rows, features, classes, x_dtype, weight_dtype, device="cpu"):
    x = torch.randn(*rows, features, device=device).to(x_dtype).requires_grad_()
    weight = (torch.randn(classes, features, device=device) * 3 / features**0.5).to(weight_dtype)
    target = torch.randint(0, classes, rows, device=device)
    target.view(-1)[::3] = IGNORE
    target.view(-1)[1:2] = classes - 1
    return x, weight.requires_grad_(), target


def specification(x, weight, target, reduction="mean", dtype=None):
    """In float64, of operands rounded to the products' dtype."""
    rounded = [t.double() + (t.to(dtype or t.dtype) - t).double().detach() for t in (x, weight)]
    logits = F.linear(*rounded)
    return F.cross_entropy(
        logits.flatten(0, -2), target.flatten(), ignore_index=IGNORE, reduction=reduction
    )


def compare(loss, want, leaves, eps):
    torch.testing.assert_close(loss.double(), want, rtol=4 * eps, atol=1e-5)
    dloss = torch.rand_like(want)
    got = torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))
    for mine, exact in zip(got, torch.autograd.grad(want, leaves, dloss), strict=True):
        assert mine.dtype == exact.dtype
        error = (mine - exact).norm() / exact.norm().clamp_min(1e-9)
        assert error < 4 * eps + 1e-5, float(error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [10, 64, 1001])
def test_values_and_gradients(device, dtype, reduction, classes):
    x, weight, target = make((3, 17), 48, classes, dtype, dtype, device)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction)
    assert loss.dtype == F32 and loss.shape == (target.shape if reduction == "none" else ())
    want = specification(x, weight, target, reduction).view(loss.shape)
    compare(loss, want, (x, weight), torch.finfo(dtype).eps if dtype != F32 else 1e-5)
    if device == "cuda":
        assert _kernels_serve(x, weight, dtype) == (dtype != F32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("classes", [50257, 128256])  # the second one's rows are read twice
def test_vocabularies(dtype, classes):
    x, weight, target = make((301,), 64, classes, dtype, F32, "cuda")
    with torch.autocast("cuda", dtype):
        loss = linear_cross_entropy(x, weight, target, reduction="none")
    want = specification(x, weight, target, "none", dtype)
    compare(loss, want, (x, weight), torch.finfo(dtype).eps)


@pytest.mark.parametrize("weight_dtype", [BF16, F32], ids=str)
def test_the_function_itself_on_the_cpu(weight_dtype):
    """What CUDA runs, with the operator's CPU kernel."""
    x, weight, target = make((29,), 48, 70, BF16, weight_dtype)
    loss = _LinearCrossEntropy.apply(x, weight, target, IGNORE)
    want = specification(x, weight, target, "none", BF16)
    compare(loss, want, (x, weight), torch.finfo(BF16).eps)
    frozen = weight.detach()
    (dx,) = torch.autograd.grad(_LinearCrossEntropy.apply(x, frozen, target, IGNORE).sum(), x)
    assert dx.shape == x.shape
    with torch.no_grad():
        again = _LinearCrossEntropy.apply(x, weight, target, IGNORE)
    torch.testing.assert_close(again, loss.detach())


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    x, weight, target = make((2, 9), 32, 50, F32, F32, device)
    with torch.autocast(device, BF16):
        loss = linear_cross_entropy(x, weight, target)
    assert loss.dtype == F32
    want = specification(x, weight, target, dtype=BF16)
    compare(loss, want, (x, weight), torch.finfo(BF16).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_two_backwards_of_one_graph(device):
    x, weight, target = make((21,), 32, 50, BF16, BF16, device)
    loss = linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_edges(device):
    x, weight, target = make((0,), 32, 50, BF16, BF16, device)
    loss = linear_cross_entropy(x, weight, target, reduction="sum")
    assert loss == 0
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert dx.shape == x.shape and not dweight.any()
    x, weight, target = make((5,), 32, 50, BF16, BF16, device)
    nothing = linear_cross_entropy(x, weight, target.fill_(IGNORE))
    assert nothing.isnan()  # as torch's mean over nothing
    with torch.no_grad():
        x[2] = torch.nan
        x[3] = torch.inf
    losses = linear_cross_entropy(x, weight, target.fill_(7), reduction="none")
    assert losses.isnan().tolist() == [False, False, True, True, False]


@pytest.mark.gpu
def test_targets_that_are_no_classes_are_nan():
    x, weight, target = make((4,), 32, 50, BF16, BF16, "cuda")
    target.copy_(torch.tensor([50, -1, IGNORE, 0]))
    losses = linear_cross_entropy(x, weight, target, reduction="none")
    assert losses.isnan().tolist() == [True, True, False, False] and losses[2] == 0
    (dx,) = torch.autograd.grad(losses.nan_to_num().sum(), x)
    assert dx.isnan().any(1).tolist() == [True, True, False, False] and not dx[2].any()


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device):
    torch._dynamo.reset()
    x, weight, target = make((2, 33), 32, 77, F32, F32, device)

    def step(x, weight, target):
        with torch.autocast(device, BF16):
            return linear_cross_entropy(x, weight, target)

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    loss = compiled(x, weight, target)
    want = specification(x, weight, target, dtype=BF16)
    compare(loss, want, (x, weight), torch.finfo(BF16).eps)


@pytest.mark.gpu
def test_operator_checks():
    logits = torch.randn(5, 64, device="cuda", dtype=BF16)
    target = torch.zeros(5, dtype=torch.int64, device="cuda")
    op = torch.ops.pixelfly.softmax_minus_target_.default
    torch.library.opcheck(
        op, (logits, target, 50, IGNORE, True), test_utils=("test_schema", "test_faketensor")
    )
    for wrong, message in [
        ((logits[:, :60], target, 50, IGNORE, True), "multiples of 8"),
        ((logits, target[:4], 50, IGNORE, True), "target must have shape"),
        ((logits, target.int(), 50, IGNORE, True), "int64"),
        ((logits, target, 65, IGNORE, True), "classes must be between"),
        ((logits.float(), target, 50, IGNORE, True), "bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "x.dtype must be"),
        ({"weight": torch.ones(5, 8, dtype=F64)}, TypeError, "weight.dtype must be x.dtype"),
        ({"target": torch.zeros(3)}, TypeError, "target.dtype must be int64"),
        ({"weight": torch.ones(5, 7)}, ValueError, r"K=8.*got \[5, 7\]"),
        ({"weight": torch.ones(0, 8)}, ValueError, "V above 0"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"\[3\], got \[4\]"),
        ({"reduction": "max"}, ValueError, "'mean', 'sum' or 'none', got 'max'"),
        ({"x": torch.tensor(1.0)}, ValueError, "0-d"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "x": torch.ones(3, 8),
        "weight": torch.ones(5, 8),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**good | change)
