"""Data, sharded and tensor parallel training on 2 and 4 processes: what one process computes."""

from __future__ import annotations

import datetime
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import captures, tensor_workers, workers

RUNS = (
    workers.ddp,
    workers.ddp_accumulation,
    workers.ddp_compiled,
    workers.fsdp,
    workers.fsdp_from_meta,
    workers.fsdp_mixed_precision,
    workers.checkpoint,
    workers.other_layout,
    workers.layouts_over_ranks,
    workers.checkpoint_of_another_layout,
    *tensor_workers.RUNS,
)


def _main(rank: int, runs: tuple, backend: str, world: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        for run in runs:
            own = folder / run.__name__
            own.mkdir(exist_ok=True)
            try:
                run(own)
            except Exception as error:
                raise AssertionError(f"{run.__name__}, rank {rank}: {error}") from error
    finally:
        dist.destroy_process_group()
    # Without destructors: in one of many runs a process whose work was done ended in "terminate
    # called without an active exception", a C++ thread that nobody had joined.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_processes(tmp_path, monkeypatch, world):
    """All of the workers in one set of processes: starting them takes most of the time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(_main, (RUNS, "gloo", world, tmp_path), nprocs=world)


def on_gpus(runs: tuple, world: int, folder: pathlib.Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    mp.spawn(_main, (runs, "nccl", world, folder), nprocs=world)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_gpus(tmp_path, world):
    on_gpus(RUNS, world, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_captured_steps(tmp_path, monkeypatch, world):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # torch's condition for a capture
    on_gpus(captures.RUNS, world, tmp_path)
