"""Times layers and what stands between them over a grid of shapes and fits rates to that."""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch
import torch.nn.functional as F

from ..nn.choice import choose
from ..ops import butterfly_lowrank_mm
from .cost import dense_work, sparse_work
from .operators import norm_work
from .rate import Rate, Work, fit

Call = Callable[[int], object]  # of the index of a buffer set
MODES = {"forward": 1, "step": 3}  # name -> matmuls as large as the forward's
_WARM_SECONDS = 0.1  # under load before a timing: a cool chip flatters
_POINTWISE_SIZES = (1 << 12, 1 << 23, 1 << 24)  # elements: a launch alone, and memory alone
_HEAD = 64  # features of an attention head
_L2_BYTES = 128 << 20  # a walk over the buffer sets is larger than any GPU's L2


@dataclass(frozen=True)
class _Case:
    """One operation to time."""

    kind: str
    work: Work
    call: Call
    sets: int


def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    densities: Sequence[float],
    block_sizes: Sequence[int],
    repeats: int,
) -> tuple[dict[str, Rate], str]:
    """Returns the fitted rates and the device's name; see `CostModel.measure` for the arguments."""
    grids = {"tokens": tokens, "shapes": shapes, "densities": densities, "block_sizes": block_sizes}
    for name, values in grids.items():
        if len(values) == 0:
            raise ValueError(f"CostModel.measure: {name} must not be empty")
    if repeats < 1:
        raise ValueError(f"CostModel.measure: repeats must be at least 1, got {repeats}")
    samples: dict[str, tuple[list[Work], list[float]]] = defaultdict(lambda: ([], []))
    layers = (
        _cases(device, dtype, t, k, n, densities, block_sizes)
        for t, (k, n) in product(tokens, shapes)
    )
    widths = sorted({n for _, n in shapes})
    between = (
        _unaligned_cases(device, dtype, tokens, shapes[-2:]),
        _attention_cases(device, dtype, tokens),
        _convolution_cases(device, dtype, tokens),
        _norm_cases(device, dtype, tokens, widths),
        _column_cases(device, dtype, tokens, widths),
        _pointwise_cases(device, dtype),
    )
    for case in chain(chain.from_iterable(layers), chain.from_iterable(between)):
        works, seconds = samples[case.kind]
        works.append(case.work)
        seconds.append(_time(case.call, case.sets, device, repeats))
    missing = [b for b in block_sizes if f"b{b}/forward" not in samples]
    if missing:
        raise ValueError(
            f"CostModel.measure: no density of {tuple(densities)} is reachable at block_sizes "
            f"{missing} for the shapes {list(shapes)}"
        )
    return {kind: fit(*timed) for kind, timed in samples.items()}, _device_name(device)


def _cases(
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    k: int,
    n: int,
    densities: Sequence[float],
    block_sizes: Sequence[int],
) -> Iterator[_Case]:
    itemsize = dtype.itemsize
    sets = _sets(device, itemsize * t * (k + n))
    xs = [_normal(device, dtype, t, k) for _ in range(sets)]
    dys = [_normal(device, dtype, t, n) for _ in range(sets)]
    for mode, call in _calls(F.linear, xs, dys, [_normal(device, dtype, n, k)]):
        yield _Case(f"dense/{mode}", dense_work(t, k, n, itemsize, MODES[mode]), call, sets)

    for b, density, rank in product(block_sizes, densities, (None, 0)):
        try:
            choice = choose(n, k, block_size=b, density=density, rank=rank)
        except ValueError:
            continue  # sparser than this shape can be
        if rank is None and choice.rank == 0:
            continue  # the next rank is the same layer
        layout, r = choice.layout, choice.rank
        # With a bias: unlike a dense layer's, its gradient is the kernels' own work.
        sizes = [(n,), (layout.nnz, b, b), *([(n, r), (r, k)] if r else [])]
        parameters = [_normal(device, dtype, *size) for size in sizes]

        def apply(x, bias, blocks, u=None, v=None, layout=layout):
            return butterfly_lowrank_mm(x, blocks, layout, u, v, bias)

        for mode, call in _calls(apply, xs, dys, parameters):
            work = sparse_work(t, k, n, b, layout.nnz, r, itemsize, MODES[mode])
            yield _Case(f"b{b}/{mode}", work, call, sets)


def _unaligned_cases(
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int]],
) -> Iterator[_Case]:
    """Dense layers with an odd number of outputs, as a language model's vocabulary may be."""
    for t, (k, n) in product(tokens, shapes):
        sets = _sets(device, dtype.itemsize * t * (k + n))
        xs = [_normal(device, dtype, t, k) for _ in range(sets)]
        dys = [_normal(device, dtype, t, n + 1) for _ in range(sets)]
        for mode, call in _calls(F.linear, xs, dys, [_normal(device, dtype, n + 1, k)]):
            work = dense_work(t, k, n + 1, dtype.itemsize, MODES[mode])
            yield _Case(f"unaligned/{mode}", work, call, sets)


def _attention_cases(
    device: torch.device, dtype: torch.dtype, tokens: Sequence[int]
) -> Iterator[_Case]:
    """Fused attention of tokens that are cut into sequences of several lengths.

    Of one number of tokens alone, no length would tell launches from bytes.
    """
    cuda = device.type == "cuda"
    heads, lengths = (12, (197, 512, 1024, 2048)) if cuda else (4, (32, 64))
    for t, length, causal in product(_ends(tokens), lengths, (False, True)):
        batch = max(1, t // length)
        numel = batch * length * heads * _HEAD
        sets = _sets(device, dtype.itemsize * 3 * numel)

        def tensor(batch=batch, length=length) -> torch.Tensor:  # [B, H, S, D], H beside D
            return _normal(device, dtype, batch, length, heads, _HEAD).transpose(1, 2)

        def apply(q, k, v, causal=causal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        qs, dys = [tensor() for _ in range(sets)], [tensor() for _ in range(sets)]
        flops = (2 if causal else 4) * numel * length
        for mode, call in _calls(apply, qs, dys, [tensor(), tensor()]):
            passes = MODES[mode]
            work = Work(passes * flops, passes * dtype.itemsize * 4 * numel, passes)
            yield _Case(f"attention/{mode}", work, call, sets)


def _convolution_cases(
    device: torch.device, dtype: torch.dtype, tokens: Sequence[int]
) -> Iterator[_Case]:
    """A vision transformer's patches, whose images get no gradient, and 3 x 3 convolutions."""
    patches = [(3, cout, 16, 16, 0, 224) for cout in (192, 768)]
    middle = [(64, 64, 3, 1, 1, 56), (256, 256, 3, 1, 1, 14)]
    for t, (cin, cout, kernel, stride, padding, side) in product(
        _ends(tokens), (*patches, *middle)
    ):
        first = cin == 3
        kind = "unaligned convolution" if first else "convolution"
        out = (side + 2 * padding - kernel) // stride + 1
        batch = max(1, t // out**2)
        sets = _sets(device, dtype.itemsize * batch * (cin * side**2 + cout * out**2))
        xs = [_normal(device, dtype, batch, cin, side, side) for _ in range(sets)]
        dys = [_normal(device, dtype, batch, cout, out, out) for _ in range(sets)]
        if first:  # the gradients of tokens have their features side by side
            dys = [dy.to(memory_format=torch.channels_last) for dy in dys]
        weight = _normal(device, dtype, cout, cin, kernel, kernel)

        def apply(x, w, stride=stride, padding=padding):
            return F.conv2d(x, w, stride=stride, padding=padding)

        x, y, w = xs[0].numel(), dys[0].numel(), weight.numel()
        flops, forward = 2 * y * cin * kernel**2, x + w + y
        passes, backward = (2, x + y + 2 * w) if first else (3, 2 * x + y + 2 * w)
        works = {
            "forward": Work(flops, dtype.itemsize * forward),
            "step": Work(passes * flops, dtype.itemsize * (forward + backward), 2),
        }
        for mode, call in _calls(apply, xs, dys, [weight], inputs=not first):
            yield _Case(f"{kind}/{mode}", works[mode], call, sets)


def _norm_cases(
    device: torch.device, dtype: torch.dtype, tokens: Sequence[int], features: Sequence[int]
) -> Iterator[_Case]:
    """LayerNorms, in float32 too, as autocast runs them; their backward is most of their time."""
    kinds = sorted({dtype, torch.float32}, key=str)
    for kind, t, n in product(kinds, _ends(tokens), _ends(features)):
        sets = _sets(device, 2 * kind.itemsize * t * n)
        xs, dys = ([_normal(device, kind, t, n) for _ in range(sets)] for _ in range(2))
        parameters = [_normal(device, kind, n), _normal(device, kind, n)]

        def apply(x, weight, bias):
            return F.layer_norm(x, weight.shape, weight, bias)

        for mode, call in _calls(apply, xs, dys, parameters):
            work = norm_work(t * n, kind.itemsize, training=mode == "step")
            yield _Case("normalization", work, call, sets)


def _column_cases(
    device: torch.device, dtype: torch.dtype, tokens: Sequence[int], features: Sequence[int]
) -> Iterator[_Case]:
    """The sum of a bias gradient; heads that change places with tokens, and the gradients of q, k
    and v that are put together and then side by side."""
    for t, n in product(tokens, features):
        size = dtype.itemsize * t * n
        sets = _sets(device, size)
        xs = [_normal(device, dtype, t, n) for _ in range(sets)]
        yield _Case("reduction", Work(0, size), lambda i, xs=xs: xs[i].sum(0), sets)
        head = min(_HEAD, n // 2)  # narrow layers have small heads, but two of them
        length, heads = min(t, 256), n // head
        split = [
            x[: t // length * length, : heads * head].reshape(-1, length, heads, head) for x in xs
        ]
        split = [x.transpose(1, 2) for x in split]
        threes = [torch.stack((x, x, x)).permute(1, 3, 0, 2, 4) for x in split[:2]]
        work = Work(0, 2 * dtype.itemsize * split[0].numel())
        calls = (
            (1, lambda i, xs=split: xs[i].contiguous()),
            (3, lambda i, xs=split: torch.stack([xs[(i + j) % len(xs)] for j in range(3)])),
            (3, lambda i, xs=threes: xs[i % len(xs)].contiguous()),
        )
        for many, call in calls:
            yield _Case("strided", Work(0, many * work.bytes), call, sets)


def _pointwise_cases(device: torch.device, dtype: torch.dtype) -> Iterator[_Case]:
    """What stands between the layers, small or larger than caches: one tensor read and written,
    and with another dtype, as autocast has it, a tensor rounded, widened or added."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for numel in _POINTWISE_SIZES:
        x = torch.randn(2, numel, device=device, dtype=dtype)
        y = x.to(other)
        size = numel * dtype.itemsize
        both = size + numel * other.itemsize
        calls = (
            ("pointwise", 2 * size, lambda i, x=x: x[i].mul(2)),
            ("mixed", both, lambda i, x=x: x[i].to(other)),
            ("mixed", both, lambda i, y=y: y[i].to(dtype)),
            (
                "mixed",
                both + numel * torch.promote_types(dtype, other).itemsize,
                lambda i, x=x, y=y: torch.add(x[i], y[i]),
            ),
        )
        for kind, moved, call in calls:
            yield _Case(kind, Work(0, moved), call, len(x))


def _ends(values: Sequence[int]) -> list[int]:
    return sorted({min(values), max(values)})


def _calls(
    apply: Callable[..., torch.Tensor],
    xs: Sequence[torch.Tensor],
    dys: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    inputs: bool = True,
) -> Iterator[tuple[str, Call]]:
    """Yields forward, and forward + backward to the parameters and, if `inputs`, to x."""

    def forward(i: int) -> object:
        with torch.no_grad():
            return apply(xs[i], *parameters)

    def step(i: int) -> object:
        leaves = [p.detach().requires_grad_() for p in parameters]
        x = xs[i].detach().requires_grad_(inputs)
        return torch.autograd.grad(apply(x, *leaves), [x, *leaves][not inputs :], dys[i])

    yield from {"forward": forward, "step": step}.items()


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _sets(device: torch.device, walk: int) -> int:
    """How many buffer sets of `walk` bytes a timing goes through."""
    return max(2, min(8, -(-_L2_BYTES // walk))) if device.type == "cuda" else 2


def _time(call: Call, sets: int, device: torch.device, repeats: int) -> float:
    """Returns the median seconds of a call."""
    if device.type != "cuda":
        call(0)
        samples = []
        for i in range(repeats):
            begin = time.perf_counter()
            call(i % sets)
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)
    with torch.cuda.device(device):
        return _time_graph(call, sets, repeats)


def _time_graph(call: Call, sets: int, repeats: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph, count = torch.cuda.CUDAGraph(), max(sets, 8)
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            call(i % sets)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / count

    begin = time.perf_counter()
    while time.perf_counter() - begin < _WARM_SECONDS:
        replay()
    return statistics.median(replay() for _ in range(repeats))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
