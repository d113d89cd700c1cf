"""Times dense and Pixelfly layers over a grid of shapes and fits rates to them."""

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
from .rate import Rate, Work, fit

Call = Callable[[int], object]  # of the index of a buffer set
MODES = {"forward": 1, "step": 3}  # name -> matmuls as large as the forward's
_WARM_SECONDS = 0.1  # under load before a timing: a cool chip flatters
_POINTWISE_SIZES = (1 << 12, 1 << 23, 1 << 24)  # elements: a launch alone, and memory alone
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
    for case in chain(chain.from_iterable(layers), _pointwise_cases(device, dtype)):
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
    walk = itemsize * t * (k + n)
    sets = max(2, min(8, -(-_L2_BYTES // walk))) if device.type == "cuda" else 2

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    xs, dys = [tensor(t, k) for _ in range(sets)], [tensor(t, n) for _ in range(sets)]

    def calls(
        apply: Callable[..., torch.Tensor], parameters: list[torch.Tensor]
    ) -> Iterator[tuple[str, Call]]:
        def forward(i: int) -> object:
            with torch.no_grad():
                return apply(xs[i], *parameters)

        def step(i: int) -> object:
            leaves = [p.detach().requires_grad_() for p in (xs[i], *parameters)]
            return torch.autograd.grad(apply(*leaves), leaves, dys[i])

        yield from {"forward": forward, "step": step}.items()

    for mode, call in calls(F.linear, [tensor(n, k)]):
        yield _Case(f"dense/{mode}", dense_work(t, k, n, itemsize, MODES[mode]), call, sets)

    for b, density, rank in product(block_sizes, densities, (None, 0)):
        try:
            choice = choose(n, k, block_size=b, density=density, rank=rank)
        except ValueError:
            continue  # sparser than this shape can be
        if rank is None and choice.rank == 0:
            continue  # the next rank is the same layer
        layout, r = choice.layout, choice.rank
        parameters = [tensor(layout.nnz, b, b)] + ([tensor(n, r), tensor(r, k)] if r else [])

        def apply(x, blocks, *lowrank, layout=layout):
            return butterfly_lowrank_mm(x, blocks, layout, *lowrank)

        for mode, call in calls(apply, parameters):
            work = sparse_work(t, k, n, b, layout.nnz, r, itemsize, MODES[mode])
            yield _Case(f"b{b}/{mode}", work, call, sets)


def _pointwise_cases(device: torch.device, dtype: torch.dtype) -> Iterator[_Case]:
    """What stands between the layers: reads and writes one tensor, small or larger than caches."""
    for numel in _POINTWISE_SIZES:
        x = torch.randn(2, numel, device=device, dtype=dtype)
        work = Work(0, 2 * dtype.itemsize * numel)
        yield _Case("pointwise", work, lambda i, x=x: x[i].mul(2), len(x))


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
