"""One run of recipe.py or lra.py: a model trained with no word between host and device in a step.

On CUDA the first steps run as they are, the step is then captured into a CUDA graph and replayed;
batches, learning rates and losses are all read from and written to tensors by a step counter on the
device. Time is that of the training steps alone: start-up, capture and evaluation do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from feeds import Feed
from recipe_patterns import groups_of, move_blocks, plain_groups
from structures import RiglLinear
from torch import nn

EAGER_STEPS = 3  # before the capture


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of, besides its model, data, seed and learning rate."""

    steps: int
    batch: int
    weight_decay: float
    lr_rule: str  # "structure" (pixelfly.param_groups) or "plain", one rate for all
    compile: bool
    evals: int  # points of the curve
    moves: int = 1  # of RigL's blocks


def rates(steps: int) -> torch.Tensor:
    """Linear warm-up over a twentieth, then cosine to zero; factors of the learning rate."""
    warmup = max(1, steps // 20)
    t = torch.arange(steps, dtype=torch.float64)
    cosine = 0.5 * (1 + torch.cos(math.pi * (t - warmup) / max(1, steps - warmup)))
    return torch.where(t < warmup, (t + 1) / warmup, cosine).float()


class Run:
    """A model in training."""

    def __init__(
        self, model: nn.Module, feed: Feed, settings: Settings, lr: float, device: torch.device
    ) -> None:
        self.model, self.feed, self.settings, self.device = model.to(device), feed, settings, device
        self.cuda = device.type == "cuda"
        make = groups_of if settings.lr_rule == "structure" else plain_groups
        groups = make(self.model, lr, settings.weight_decay)
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), fused=True, capturable=self.cuda
        )
        # What each group's rate is times the schedule.
        self._lrs = [(g["lr"], float(g["lr"])) for g in self.optimizer.param_groups]
        self._rates = rates(settings.steps).to(device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self.losses = torch.zeros(settings.steps, device=device)
        self._call = torch.compile(model) if settings.compile else model
        self._parameters = list(model.parameters())
        self._replay: Callable[[], None] | None = None
        self._done = 0

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else contextlib.nullcontext()

    def _step(self) -> None:
        for lr, full in self._lrs:
            lr.copy_(self._rates[self._position][0] * full)
        x, y = self.feed.batch(self._position)
        with self._autocast():
            logits = self._call(x)
        loss = F.cross_entropy(logits.float().flatten(0, -2), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.index_copy_(0, self._position, loss.detach()[None])
        self._position.add_(1)

    def _capture(self) -> Callable[[], None]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def advance(self, count: int) -> float:
        """Takes steps; returns the seconds of each, or NaN if too few could be timed."""
        self.model.train()
        eager = min(count, max(0, EAGER_STEPS - self._done)) if self.cuda else 0
        if eager:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(eager):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
        self._done += count
        count -= eager
        if count == 0:
            return math.nan
        if self.cuda and self._replay is None:
            self._replay = self._capture()
        step = self._replay or self._step
        self._wait()
        begin = time.perf_counter()
        for _ in range(count):
            step()
        self._wait()
        return (time.perf_counter() - begin) / count

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @torch.no_grad()
    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns mean loss and accuracy of a part."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.long, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for x, y in self.feed.batches(part):
            with self._autocast():
                logits = self.model(x)
            logits = logits.float().flatten(0, -2)
            right += (logits.argmax(-1) == y.flatten()).sum()
            loss += F.cross_entropy(logits, y.flatten(), reduction="sum")
            count += y.numel()
        return loss.item() / count, right.item() / count


def train(
    model: nn.Module,
    feed: Feed,
    settings: Settings,
    lr: float,
    seed: int,
    device: torch.device,
    on_steps: Callable[[int, float], None],
) -> dict[str, Any]:
    """Trains and returns the curve, the final figures and the step time."""
    feed.plan(settings.steps, settings.batch, seed)
    run = Run(model, feed, settings, lr, device)
    stops = {round(settings.steps * i / settings.evals) for i in range(1, settings.evals + 1)}
    moves = {round(settings.steps * i / settings.moves) for i in range(1, settings.moves)}
    moves = moves if any(isinstance(m, RiglLinear) for m in model.modules()) else set()
    step, last, times = 0, 0, []
    curve: list[dict[str, float]] = []
    for stop in sorted(stops | moves):
        times.append(run.advance(stop - step))
        step = stop
        if step in moves:
            move_blocks(model, run.optimizer, step, settings.steps)
        if step in stops:
            loss, accuracy = run.evaluate("val")
            train_loss = run.losses[last:step].mean().item()
            curve.append(
                {"step": step, "train_loss": train_loss, "val_loss": loss, "val_accuracy": accuracy}
            )
            last = step
            on_steps(step, loss)
            if not math.isfinite(loss):
                break
    timed = [t for t in times[1:] if t == t] or [t for t in times if t == t]
    each = statistics.median(timed)
    for point in curve:
        point["seconds"] = point["step"] * each
    test_loss, test_accuracy = run.evaluate("test")
    return {
        "step_ms": 1e3 * each,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "diverged": not math.isfinite(curve[-1]["val_loss"]),
        "curve": curve,
    }
