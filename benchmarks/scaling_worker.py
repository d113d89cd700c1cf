"""One configuration of benchmarks/scaling.py: a model, dense or pixelfly, on these processes.

scaling.py starts it, under torchrun if there is more than one process; rank 0 writes the record.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from models import make_step
from networks import Mlp
from ranks import PARALLEL, Ranks, shard
from timing import captured, time_cpu, time_cuda
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from workloads import WORKLOADS, Loss, gpt2, stack

from pixelfly import PixelflyConfig, PixelflyLinear, sparsify_
from pixelfly.distributed import check_same_layouts
from pixelfly.tensor_parallel import ColwisePixelfly, RowwisePixelfly

ENGINES = (*PARALLEL, "tp")
FORMS = ("dense", "blocks", "factored", "global")
EAGER_STEPS = 11  # that DDP asks for before a capture
Interval = tuple[float, float]


def tiny(batch: int, length: int, device: str) -> tuple[nn.Module, Loss, str]:
    """For a try on the CPU: nobody's model, and no library needed."""
    x = torch.randn(batch, length, 128, device=device)
    model = nn.Sequential(Mlp(128, 256), Mlp(128, 256))
    return model, lambda m: m(x).float().square().mean(), f"{batch} x {length} tokens"


def mlps(width: int, layers: int, batch: int, device: str) -> tuple[nn.Module, Loss, str]:
    """MLPs one after the other, as wide as those of a large language model."""
    x = torch.randn(batch, 1024, width, device=device)
    model = nn.Sequential(*(Mlp(width, 4 * width) for _ in range(layers)))
    return model, lambda m: m(x).float().square().mean(), f"{batch} x 1024 tokens"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, which of its layers become sparse, and the engines it is measured with."""

    build: Callable[[int, str], tuple[nn.Module, Loss, str]]  # of batch and device
    sparse: tuple[str, ...]  # by the end of their names
    length: int  # tokens of a sample
    engines: tuple[str, ...] = PARALLEL


MODELS = {
    "gpt2-medium": Model(
        lambda batch, device: gpt2(1024, 24, batch, 1024, device), WORKLOADS["gpt2"].sparse, 1024
    ),
    "stack2048": Model(
        lambda batch, device: stack(2048, 8, batch, 1024, device),
        WORKLOADS["stack2048"].sparse,
        1024,
    ),
    "mlp4096": Model(
        lambda batch, device: mlps(4096, 4, batch, device), ("fc1", "fc2"), 1024, ("tp",)
    ),
    "tiny": Model(
        lambda batch, device: tiny(batch, 16, device), ("fc1", "fc2"), 16, (*PARALLEL, "tp")
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a configuration shares with the whole run."""
    add = parser.add_argument
    add("--steps", type=int, default=20)
    add("--density", type=float, default=0.25)
    add("--block-size", type=int, default=64)
    add("--rank", type=int, default=64)
    add("--compile", action="store_true", help="torch.compile the models")
    add("--graph", action="store_true", help="replay the step as one CUDA graph")
    add("--device", default="cuda", choices=["cuda", "cpu"])


def make_model(args: argparse.Namespace, device: str) -> tuple[nn.Module, Loss]:
    spec = MODELS[args.model]
    torch.manual_seed(0)
    with torch.device(device):  # large weights are drawn faster there
        model, loss, _ = spec.build(args.batch, device)
    if args.form != "dense":
        config = PixelflyConfig(
            density=args.density,
            block_size=args.block_size,
            rank=0 if args.form == "blocks" else args.rank,
            lowrank="global" if args.form == "global" else "factored",
            fuse_mlp=True,
            fuse_blocks=True,
            fuse_loss=True,
        )
        if not sparsify_(model, config, lambda m, name: name.endswith(spec.sparse)).layers:
            raise ValueError(f"no layer of {args.model} could be converted")
    return model.to(device), loss


def split(model: nn.Module, device: str) -> nn.Module:
    """Splits every MLP's first layer by outputs and its second by inputs, in place."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, Mlp):
            pixelfly = isinstance(module.fc1, PixelflyLinear)
            first, second = (
                (ColwisePixelfly(), RowwisePixelfly())
                if pixelfly
                else (ColwiseParallel(), RowwiseParallel())
            )
            parallelize_module(module, mesh, {"fc1": first, "fc2": second})
    return model


def union(intervals: list[Interval]) -> list[Interval]:
    """Merges intervals that overlap."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def exposed(communication: list[Interval], compute: list[Interval]) -> float:
    """How long there is communication and no computation."""

    def length(intervals: list[Interval]) -> float:
        return sum(end - begin for begin, end in union(intervals))

    return length(communication + compute) - length(compute)


def profile(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step's NCCL kernels, in all and while nothing else ran on the GPU.

    A kernel that waits for another process counts, so the figures hold what ranks differ by.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    parts: dict[bool, list[Interval]] = {True: [], False: []}
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not getattr(event, "is_user_annotation", False):
            times = event.time_range
            parts["nccl" in event.name.lower()].append((times.start / 1e3, times.end / 1e3))
    return {
        "communication_ms": exposed(parts[True], []),
        "exposed_ms": exposed(parts[True], parts[False]),
    }


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Returns what to call in training on these processes."""
    if ranks.parallel is None:
        return model
    check_same_layouts(model)
    if ranks.parallel == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return shard(model, ranks.device, mp_policy=policy)
    return split(model, ranks.device) if ranks.parallel == "tp" else ranks.wrap(model)


def measure(args: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    device, cuda = ranks.device, args.device == "cuda"
    if args.graph:  # DDP must be made on the stream on which its step is captured
        torch.cuda.set_stream(torch.cuda.Stream())
    model, loss = make_model(args, device)
    params = sum(p.numel() for p in model.parameters())
    wrapped = wrap(model, ranks)
    call = torch.compile(wrapped) if args.compile else wrapped
    eager = make_step(model, loss, device, call, capturable=args.graph)

    def ready(step: Callable[[], None]) -> Callable[[], None]:
        if not args.graph:
            return step
        return captured(step, EAGER_STEPS, torch.cuda.current_stream())

    timer = time_cuda if cuda else time_cpu
    if not args.graph:
        eager()  # compiles, makes the optimizer's state
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    step = ready(eager)
    out: dict[str, object] = {"params": params, **timer(step, args.steps)}
    if ranks.parallel in PARALLEL:
        out["gradient_mb"] = 4 * params / 2**20  # float32, exchanged in every step
    if cuda:
        memory = torch.tensor(torch.cuda.max_memory_allocated() / 2**30)
        if ranks.parallel is not None:
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        out["mem_gb"] = memory.item()
    shares = 1 if ranks.parallel == "tp" else ranks.world  # there all work on the same tokens
    tokens = args.batch * shares * MODELS[args.model].length
    out["tokens_per_s"] = 1e3 * tokens / out["ms"]
    if ranks.parallel is not None:
        if cuda:
            out |= profile(step)
            out["communication_share"] = out["exposed_ms"] / out["ms"]
        if ranks.parallel == "ddp" and not args.compile:
            # Last: without the exchange the copies part ways.
            def step_alone() -> None:
                with wrapped.no_sync():
                    eager()

            alone = timer(ready(step_alone), args.steps)
            out["no_sync_ms"] = alone["ms"]
            out.setdefault("communication_share", max(0.0, 1 - alone["ms"] / out["ms"]))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--model", required=True, choices=list(MODELS))
    parser.add_argument("--form", required=True, choices=FORMS)
    parser.add_argument("--parallel", default="ddp", choices=ENGINES)
    parser.add_argument("--batch", type=int, required=True, help="samples of one process")
    parser.add_argument("--record", type=pathlib.Path, required=True)
    args = parser.parse_args()
    ranks = Ranks(args.device, args.parallel)
    try:
        record = measure(args, ranks)
        if ranks.main:
            args.record.write_text(json.dumps(record))
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
