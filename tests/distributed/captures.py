"""Workers whose training step, exchange and all, is one CUDA graph."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import torch
from timing import captured
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .workers import EPS, assert_same, batch, make_model, sharded, share, step, whole_run

EAGER, REPLAYS = 11, 3  # torch asks for eleven eager steps under DDP


def train_captured(model: nn.Module) -> None:
    """Trains on this rank's share, the last steps as replays of a graph."""
    x, y = map(share, batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS, capturable=True)

    def train() -> None:
        step(model, x, y)
        optimizer.step()
        optimizer.zero_grad()

    replay = captured(train, EAGER, torch.cuda.current_stream())
    for _ in range(REPLAYS):
        replay()
    torch.cuda.synchronize()


def check_captured(wrap: Callable[[nn.Module], nn.Module]) -> None:
    _, expected = whole_run(EAGER + REPLAYS)
    with torch.cuda.stream(torch.cuda.Stream()):  # DDP must be made on the capture's stream
        model = wrap(make_model())
        train_captured(model)
    assert_same(model, expected, rtol=1e-3)


def ddp_captured(folder: pathlib.Path) -> None:
    check_captured(DistributedDataParallel)


def fsdp_captured(folder: pathlib.Path) -> None:
    check_captured(sharded)


RUNS = (ddp_captured, fsdp_captured)
