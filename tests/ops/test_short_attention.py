"""short_attention: values, gradients, who serves a call and what is refused, on the CPU and on
Hopper GPUs. Where the CPU is to take the operators' path it passes for a Hopper GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pixelfly.ops import short_attention
from pixelfly.ops.device import has_hopper_kernels

from .helpers import DEVICES

# Not the function, which hides the module of its name.
MODULE = importlib.import_module("pixelfly.ops.short_attention")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
WIDTH = 64
SHAPES = [  # samples, tokens, heads
    (2, 197, 3),
    (1, 1, 1),
    (3, 16, 2),
    (2, 17, 2),
    (2, 64, 1),
    (1, 208, 4),
    (5, 50, 2),
    (150, 33, 1),
]
FORWARD = torch.ops.pixelfly.short_attention.default
BACKWARD = torch.ops.pixelfly.short_attention_backward.default


@pytest.fixture
def hopper() -> None:
    if not has_hopper_kernels(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("the kernels are for Hopper GPUs")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    """One on which the operators serve what they can."""
    if request.param == "cpu":
        monkeypatch.setattr(MODULE, "has_hopper_kernels", lambda device: True)
    else:
        request.getfixturevalue("hopper")
    return request.param


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(shape, dtype, device="cpu", width=WIDTH):
    """qkv and the gradient of y."""
    batch, tokens, heads = shape
    qkv = torch.randn(batch, tokens, 3 * heads * width, device=device).to(dtype)
    return qkv, torch.randn(batch, tokens, heads * width, device=device).to(dtype)


def specification(qkv, heads, *, scale=None):
    """In float64."""
    q, k, v = qkv.double().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return ((scale * q @ k.mT).softmax(3) @ v).transpose(1, 2).flatten(2)


def plain(qkv, heads, *, scale=None):
    """By torch's operator."""
    thirds = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    q, k, v = (third.transpose(1, 2) for third in thirds)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def run(function, qkv, heads, dy, **options):
    """y, and the gradients of q, k and v."""
    leaf = qkv.detach().requires_grad_()
    y = function(leaf, heads, **options)
    (dqkv,) = torch.autograd.grad(y, leaf, dy.to(y.dtype))
    assert dqkv.shape == qkv.shape and dqkv.dtype == qkv.dtype
    return [y.detach(), *dqkv.chunk(3, 2)]


def check(function, qkv, heads, dy, eps=None, **options):
    """Compares with the specification, as a whole and in every element."""
    got, want = (run(f, qkv, heads, dy, **options) for f in (function, specification))
    eps = torch.finfo(qkv.dtype).eps if eps is None else eps
    assert got[0].dtype == qkv.dtype
    # One token has no gradients of q and k: what is left there are rounding errors of dv's size.
    small = 0.05 * eps
    for name, mine, exact in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        whole = want[0] if name == "y" else torch.cat(want[1:])
        error = mine.double() - exact.double()
        assert error.norm() <= eps * exact.norm() + small * whole.norm(), name
        bound = 3 * eps * exact.abs().max() + small * whole.abs().max()
        assert error.abs().max() <= bound, name
    return got


def served(y) -> bool:
    return "ShortAttention" in y.grad_fn.name()


@HALVES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device, dtype, shape):
    qkv, dy = make(shape, dtype, device)
    assert served(short_attention(qkv.requires_grad_(), shape[2]))
    got = check(short_attention, qkv, shape[2], dy)
    with torch.no_grad():
        assert torch.equal(short_attention(qkv, shape[2]), got[0])
    check(short_attention, qkv, shape[2], dy, scale=0.3)


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_off_than_torch(hopper, dtype, shape):
    qkv, dy = make(shape, dtype, "cuda")
    eps = torch.finfo(dtype).eps
    results = [run(f, qkv, shape[2], dy) for f in (short_attention, plain, specification)]
    for mine, theirs, exact in zip(*results, strict=True):
        errors = [(t.double() - exact).norm() for t in (mine, theirs)]
        assert errors[0] <= 1.5 * errors[1] + 0.02 * eps * dy.double().norm(), errors


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_cpu_kernels(dtype, shape):
    """The function that serves CUDA, with the operators' CPU kernels below it."""

    def function(qkv, heads, scale=0.2):
        return MODULE._ShortAttention.apply(qkv, heads, scale)

    qkv, dy = make(shape, dtype, width=24)
    check(function, qkv, shape[2], dy, eps=1e-5, scale=0.2)  # log_sum is float32 for both
    y, log_sum = FORWARD(qkv, shape[2], 0.2)
    q, k, _ = qkv.double().unflatten(2, (3, shape[2], -1)).permute(2, 0, 3, 1, 4)
    want = (0.2 * q @ k.mT).logsumexp(3)
    torch.testing.assert_close(log_sum.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [24, WIDTH])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("place", DEVICES)
def test_what_torch_serves(place, dtype, width):
    """Whatever the GPU: other dtypes, other heads; and every call on the CPU."""
    if place == "cuda" and dtype == BF16 and width == WIDTH:
        pytest.skip("may be served")
    qkv, dy = make((2, 9, 3), dtype, place, width)
    assert not served(short_attention(qkv.requires_grad_(), 3))
    check(short_attention, qkv, 3, dy, eps={F64: 1e-12, F32: 1e-3, BF16: 0.02}[dtype])


@pytest.mark.parametrize(("tokens", "width"), [(209, WIDTH), (300, WIDTH), (50, 32), (50, 128)])
def test_lengths_and_heads_beyond_the_kernels(device, tokens, width):
    qkv, dy = make((2, tokens, 2), BF16, device, width)
    assert not served(short_attention(qkv.requires_grad_(), 2))
    check(short_attention, qkv, 2, dy, eps=0.02)


@pytest.mark.parametrize("scale", [0.0, -0.1, 1e-60])
def test_scales_beyond_the_kernels(device, scale):
    qkv, dy = make((2, 50, 2), BF16, device)
    assert not served(short_attention(qkv.requires_grad_(), 2, scale=scale))
    check(short_attention, qkv, 2, dy, eps=0.02, scale=scale)


def test_gradcheck():
    qkv = torch.randn(2, 5, 3 * 2 * 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: short_attention(t, 2, scale=0.7), qkv)


@pytest.mark.parametrize("shape", [(0, 7, 2), (2, 0, 2), (0, 0, 1)], ids=str)
def test_nothing_to_attend_to(device, shape):
    batch, tokens, heads = shape
    qkv = make(shape, BF16, device)[0].requires_grad_()
    y = short_attention(qkv, heads)
    (dqkv,) = torch.autograd.grad(y.sum(), qkv)
    assert y.shape == (batch, tokens, heads * WIDTH) and dqkv.shape == qkv.shape
    y, log_sum = FORWARD(qkv.detach(), heads, 0.125)
    assert log_sum.shape == (batch, heads, tokens) and log_sum.dtype == F32
    assert BACKWARD(y, qkv.detach(), y, log_sum, heads, 0.125).shape == qkv.shape


@HALVES
def test_gradients_and_inputs_of_any_strides(device, dtype):
    qkv, dy = make((3, 21, 2), dtype, device)
    for gradient in (dy.mT.contiguous().mT, dy[:1, :1].expand(dy.shape), unaligned(dy)):
        check(short_attention, qkv, 2, gradient)
    for given in (qkv.mT.contiguous().mT, unaligned(qkv), torch.cat([qkv, qkv], 2)[..., :384]):
        check(short_attention, given, 2, dy)


def unaligned(t):
    """The same values, beginning 2 bytes behind a multiple of 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@HALVES
@pytest.mark.parametrize("tokens", [50, 197, 208])
def test_samples_and_heads_are_apart(device, dtype, tokens):
    """What is NaN in one changes no bit of another."""
    qkv, dy = make((3, tokens, 3), dtype, device)
    clean = run(short_attention, qkv, 3, dy)
    bad, bad_dy = (t.clone().unflatten(2, (-1, 3, WIDTH)) for t in (qkv, dy))
    bad[1] = bad_dy[1] = torch.nan
    bad[..., 1, :] = bad_dy[..., 1, :] = torch.nan
    spoiled = run(short_attention, bad.flatten(2), 3, bad_dy.flatten(2))
    for a, b in zip(clean, spoiled, strict=True):
        a, b = (t.unflatten(2, (3, WIDTH)) for t in (a, b))
        for sample, head in ((0, 0), (0, 2), (2, 0), (2, 2)):
            assert torch.equal(a[sample, :, head], b[sample, :, head])
        assert b[1].isnan().all() and b[..., 1, :].isnan().all()


@HALVES
@pytest.mark.parametrize("spread", ["one key", "all keys"])
def test_large_scores(device, dtype, spread):
    """Of about 80, whose exponentials fp16 cannot hold."""
    qkv, dy = make((2, 100, 2), dtype, device)
    parts = qkv.unflatten(2, (3, 2, WIDTH))
    if spread == "one key":
        parts[:, :, :2] *= 4
    else:  # equal for all keys of a query
        parts[:, :, 0] = parts[:, :, 1] = 3.16
    heads = parts[:, :, :2].double().permute(2, 0, 3, 1, 4)
    top = (heads[0] @ heads[1].mT / 8).max()
    assert 50 < top < 120, top
    for t in run(short_attention, qkv, 2, dy):
        assert t.isfinite().all()
    got, want = (run(f, qkv, 2, dy)[0] for f in (short_attention, specification))
    assert (got - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


@HALVES
def test_deterministic(device, dtype):
    qkv, dy = make((5, 197, 3), dtype, device)
    leaf = qkv.requires_grad_()
    y = short_attention(leaf, 3)
    grads = [torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads) and torch.equal(y, short_attention(leaf, 3))


@HALVES
@pytest.mark.parametrize("source", [F32, F64], ids=str)
def test_autocast(device, dtype, source):
    qkv, dy = make((2, 33, 2), source, device)
    with torch.autocast(device, dtype):
        y = short_attention(qkv.requires_grad_(), 2)
        assert y.dtype == (dtype if source == F32 else F64)  # which autocast leaves alone
        got = run(short_attention, qkv, 2, dy)
    assert got[1].dtype == source
    if source == F32:
        rounded = run(short_attention, qkv.detach().to(dtype), 2, dy.to(dtype))
        torch.testing.assert_close(got[0], rounded[0], rtol=0, atol=0)
        torch.testing.assert_close(got[1:], [t.float() for t in rounded[1:]], rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(device, autocast):
    """In one graph, of any number of samples and tokens."""

    def function(qkv, heads):
        with torch.autocast(device, BF16, enabled=autocast):
            return short_attention(2 * qkv, heads)

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for shape in ((2, 33, 2), (3, 50, 2), (1, 197, 2), (2, 230, 2)):
        qkv, dy = make(shape, F32 if autocast else BF16, device)
        ours, theirs = (run(f, qkv, 2, dy) for f in (compiled, function))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(qkv, 2), theirs[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_torchs_operator(device, strict):
    """They may run elsewhere, on any number of tokens, and train."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 3 * WIDTH, device=device, dtype=BF16)

        def forward(self, x):
            return short_attention(self.qkv(x), 1)

    module, tokens = Module(), torch.export.Dim("tokens", min=2)
    x = torch.randn(2, 7, 16, device=device, dtype=BF16)
    program = torch.export.export(module, (x,), strict=strict, dynamic_shapes=({1: tokens},))
    x = torch.randn(2, 300, 16, device=device, dtype=BF16)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-2, atol=1e-2)
    program.module()(x).sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_func(device, compiled):
    qkv, _ = make((2, 9, 2), BF16, device)

    def loss(t):
        return short_attention(t, 2).float().square().sum()

    leaf = qkv.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    gradient = torch.func.grad(loss)
    if compiled:
        gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(qkv), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_that_the_kernels_lack(device, compiled):
    """Right, by torch's operator, or refused: never a derivative that is silently zero."""
    qkv, tangent = make((2, 9, 2), BF16, device)[0], make((2, 9, 2), BF16, device)[0]

    def loss(t, attend=short_attention):
        return attend(t, 2).float().square().sum()

    calls = {
        "jvp": lambda f: torch.func.jvp(f, (qkv,), (tangent,))[1],
        "vmap": lambda f: torch.func.vmap(torch.func.grad(f))(qkv[:, None]),
        "second": lambda f: torch.func.grad(lambda t: torch.func.grad(f)(t).float().sum())(qkv),
    }
    for name, call in calls.items():
        function = call
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(call, backend="aot_eager")
        try:
            got = function(loss)
        except (RuntimeError, NotImplementedError):
            continue
        want = call(lambda t: loss(t, specification))
        assert (got.double() - want.double()).norm() <= 0.05 * want.double().norm(), name


def test_gradients_of_gradients_are_refused(device):
    qkv, dy = make((2, 9, 2), BF16, device)
    leaf = qkv.requires_grad_()
    (dqkv,) = torch.autograd.grad(
        short_attention(leaf, 2), leaf, dy.requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dqkv.sum().backward()


@HALVES
def test_opcheck(device, dtype):
    qkv, dy = make((3, 17, 2), dtype, device)
    torch.library.opcheck(FORWARD, (qkv, 2, 0.125))
    y, log_sum = FORWARD(qkv, 2, 0.125)
    torch.library.opcheck(BACKWARD, (dy, qkv, y, log_sum, 2, 0.125))


def test_flops():
    qkv, dy = make((2, 50, 3), F32)
    with FlopCounterMode(display=False) as counter:
        y, log_sum = FORWARD(qkv, 3, 0.125)
    shape = (2, 3, 50, WIDTH)
    assert counter.get_total_flops() == sdpa_flop_count(shape, shape, shape)
    with FlopCounterMode(display=False) as counter:
        BACKWARD(dy, qkv, y, log_sum, 3, 0.125)
    assert counter.get_total_flops() == sdpa_backward_flop_count(shape, shape, shape, shape)


@pytest.mark.gpu
def test_what_the_kernels_refuse(hopper):
    qkv, dy = make((2, 17, 2), BF16, "cuda")
    y, log_sum = FORWARD(qkv, 2, 0.125)
    for wrong, message in [
        ((qkv[0], 2, 0.125), r"qkv must be \[B, T, 3 \* heads \* 64\], got \[17, 384\]"),
        ((qkv, 0, 0.125), "heads must be between 1 and 2147483647, got 0"),
        ((qkv, 3, 0.125), r"qkv must have shape \[2, 17, 576\], got \[2, 17, 384\]"),
        ((qkv.mT.contiguous().mT, 2, 0.125), "qkv must be contiguous"),
        ((qkv.float(), 2, 0.125), "at most 208 tokens; got .* float32 and 17 tokens"),
        ((make((1, 209, 2), BF16, "cuda")[0], 2, 0.125), "bfloat16 and 209 tokens"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            FORWARD(*wrong)
    good = {"dy": dy, "qkv": qkv, "y": y, "log_sum": log_sum}
    for change, message in [
        ({"dy": dy.half()}, "dy must have the other operands' dtype"),
        ({"dy": dy[:1]}, r"dy must have shape \[2, 17, 128\], got \[1, 17, 128\]"),
        ({"dy": dy.cpu()}, "dy must be on the other operands' device"),
        ({"y": y.mT.contiguous().mT}, "y must be contiguous"),
        ({"log_sum": log_sum.mT}, r"log_sum must have shape \[2, 2, 17\], got \[2, 17, 2\]"),
        ({"log_sum": log_sum.bfloat16()}, "log_sum must be contiguous float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            BACKWARD(*(good | change).values(), 2, 0.125)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": [1.0]}, TypeError, "qkv must be a Tensor, got list"),
        ({"qkv": torch.ones(2, 3, 12).int()}, TypeError, "qkv.dtype must be .* got torch.int32"),
        ({"qkv": torch.ones(3, 12)}, ValueError, r"\[B, T, 3 \* H \* D\], got \[3, 12\]"),
        ({"num_heads": 5}, ValueError, r"a third of qkv.shape\[2\]=12, got 5"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
        ({"num_heads": 0}, ValueError, r"a third of qkv.shape\[2\]=12, got 0"),
        ({"qkv": torch.ones(2, 3, 0)}, ValueError, r"qkv.shape\[2\]=0"),
    ],
)
def test_bad_input(change, error, message):
    good = {"qkv": torch.ones(2, 3, 12), "num_heads": 2}
    with pytest.raises(error, match=f"short_attention: .*{message}"):
        short_attention(**good | change)


@pytest.mark.gpu
def test_graph_capture_and_replay(hopper):
    qkv, dy = make((4, 197, 3), BF16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(short_attention, qkv, 3, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(short_attention, qkv, 3, dy)
    for scale in (1.0, -2.0):
        qkv.mul_(scale)
        graph.replay()
        for a, b in zip(captured, run(short_attention, qkv, 3, dy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_side_stream(hopper):
    qkv, dy = make((64, 197, 3), BF16, "cuda")
    expected = run(short_attention, qkv, 3, dy)
    late = torch.zeros_like(qkv)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(qkv)
        got = run(short_attention, late, 3, dy)
    stream.synchronize()
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
