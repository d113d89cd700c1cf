"""The processes of one training run: one alone, or those that torchrun started.

Alone, everything here costs nothing and `torch.distributed` is never touched.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

PARALLEL = ("ddp", "fsdp2")
GROUP_PARAMS = 40_000_000  # 160 MB in float32: gathered at once, so all the memory sharding costs


class Ranks:
    """This process among those of the run; starts the process group if torchrun asks for one.

    Args:
        device: "cpu" or "cuda[:i]"; with several processes each takes the GPU of its local rank.
        parallel: "ddp" or "fsdp2"; says nothing if there is no torchrun.

    Attributes:
        rank: 0 prints and writes.
        world: number of processes.
        device: the device of this process.
        parallel: "ddp", "fsdp2", or None where torchrun did not start the program.
    """

    def __init__(self, device: str, parallel: str = "ddp") -> None:
        self.rank, self.world, self.device = 0, 1, device
        launched = dist.is_available() and dist.is_torchelastic_launched()
        self.parallel = parallel if launched else None
        if self.parallel is None:
            return
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo"
        if device.startswith("cuda"):
            local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if ":" in device:
                raise SystemExit(f"--device {device}: torchrun gives every process a GPU; use cuda")
            if int(os.environ["LOCAL_WORLD_SIZE"]) > count:
                raise SystemExit(
                    f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: this machine has "
                    f"{count} GPUs, and every process needs its own"
                )
            self.device = f"cuda:{local}"
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def fail(self, message: str) -> NoReturn:
        """Ends the program; every rank must come here, one of them says why."""
        if not self.main:
            time.sleep(1)  # torchrun ends the others when the first one fails: let rank 0 speak
            raise SystemExit(1)
        raise SystemExit(message)

    def share(self, indices: torch.Tensor) -> torch.Tensor:
        """This rank's part of a batch's indices; the parts differ by one at most."""
        return indices.tensor_split(self.world)[self.rank]

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over the ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Waits for every rank; on the CPU, where a stream of work does not matter."""
        self.any(False)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The others wait until rank 0 is through: it may download what they then find."""
        if not self.main:
            self.barrier()
        try:
            yield
        finally:
            if self.main:
                self.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns what to call in training; the model itself if the process is alone."""
        if self.parallel is None:
            return model
        if self.parallel == "fsdp2":
            return shard(model, self.device)
        devices = [torch.device(self.device)] if self.device.startswith("cuda") else None
        return nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def close(self) -> None:
        if self.parallel is not None and dist.is_initialized():
            dist.destroy_process_group()


def shard(
    model: nn.Module, device: str, group_params: int = GROUP_PARAMS, **options: object
) -> nn.Module:
    """Shards a model in place with FSDP2, its repeated blocks in groups.

    A block is a child with parameters of an outermost ModuleList or Sequential; neighbours share a
    group until it has `group_params` parameters, as every group costs the host a few milliseconds
    a step. What lies outside the blocks is one group of its own. `options` go to `fully_shard`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and id(module) not in inside:
            inside.update(id(m) for m in module.modules())
            group: list[nn.Module] = []
            for block in (b for b in module if any(True for _ in b.parameters())):
                group.append(block)
                if sum(p.numel() for b in group for p in b.parameters()) >= group_params:
                    fully_shard(group, mesh=mesh, **options)
                    group = []
            if group:
                fully_shard(group, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)
