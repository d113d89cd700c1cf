"""The training loop of benchmarks/train.py: models in step with each other, resumable at any step.

Everything random is a function of (seed, step): the order of samples, augmentation, dropout. So a
checkpoint needs no generator states, every model sees the same batches, and a resumed run computes
what an unbroken one computes. Several processes share each batch; a checkpoint holds whole tensors
by name, so that any number of them goes on from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from data import Data
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

CHECKPOINT_VERSION = 2
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the loop needs to know."""

    steps: int
    batch: int
    lr: float
    weight_decay: float
    warmup: int
    eval_every: int
    seed: int
    device: str
    amp: str | None
    compile: bool


class Learner:
    """One model with its optimizer and its measurements."""

    def __init__(
        self, name: str, model: nn.Module, settings: Settings, ranks: Ranks | None = None
    ) -> None:
        self.name, self.settings = name, settings
        self.device = torch.device(settings.device)
        self.ranks = ranks or Ranks(settings.device)
        self.model = model.to(self.device)
        wrapped = self.ranks.wrap(self.model)
        # No weight decay on biases, norms and gates.
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), fused=fused)
        self.call: Callable = torch.compile(wrapped) if settings.compile else wrapped
        self.step_seconds: list[float] = []
        self.peak_bytes = 0
        self.history: list[dict[str, float]] = []

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _loss(self, call: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits = call(x)
        return F.cross_entropy(logits.float().flatten(0, -2), y.flatten())

    def _own_bytes(self) -> int:
        """Weights and optimizer state (what stays between steps)."""
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(local(t).nbytes for t in tensors if isinstance(t, torch.Tensor))

    def update(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A step's work on the device, which nothing here waits for; returns the loss."""
        loss = self._loss(self.call, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def step(self, x: torch.Tensor, y: torch.Tensor, step: int) -> float:
        """One training step on this rank's samples; returns the loss of the whole batch."""
        cuda = self.device.type == "cuda"
        # Dropout: another mask on every rank.
        torch.manual_seed(self.settings.seed * 1_000_003 + step + 0x9E3779B9 * self.ranks.rank)
        self.model.train()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, own = torch.cuda.memory_allocated(), self._own_bytes()
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * schedule(step, self.settings)
        loss = self.update(x, y)
        if cuda:
            torch.cuda.synchronize()
            # The other model's weights are allocated too: count from what was there before.
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before + own)
        self.step_seconds.append(time.perf_counter() - begin)
        value = self.ranks.sum(loss.item())[0] / self.ranks.world
        if not math.isfinite(value):
            self.ranks.fail(f"{self.name}: the loss is {value} at step {step}; lower --lr")
        return value

    def count_memory(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Without a GPU's counter: weights, gradients, AdamW's two moments and what autograd saves
        for the backward pass, in bytes of this process. Changes nothing that is trained."""
        weights = [local(p) for p in self.model.parameters()]
        own = {p.untyped_storage().data_ptr() for p in weights}
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        self.model.train()
        with torch.random.fork_rng(devices=[]):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = self._loss(self.model, x, y)
        del loss
        self.peak_bytes = 4 * sum(p.nbytes for p in weights) + sum(saved.values())

    @torch.no_grad()
    def evaluate(self, data: Data) -> tuple[float, float]:
        """Returns test accuracy and mean loss."""
        self.model.eval()
        right, loss, count = 0, 0.0, 0
        # The uncompiled model: evaluation would compile every odd last batch anew.
        for indices in torch.arange(data.num_test).split(self.settings.batch):
            mine = self.ranks.share(indices)
            # A rank without a sample takes part all the same: a sharded model gathers its weights.
            x, y = (t.to(self.device) for t in data.test(mine if len(mine) else indices[:1]))
            with self._autocast():
                logits = self.model(x).float()
            if not len(mine):
                continue
            right += int((logits.argmax(-1) == y).sum())
            loss += F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum").item()
            count += y.numel()
        right, loss, count = self.ranks.sum(right, loss, count)
        return right / count, loss / count

    def step_ms(self) -> float:
        """Median step time; the first steps, which warm up and compile, are left out if others
        follow."""
        times = self.step_seconds[5:] or self.step_seconds
        return 1e3 * statistics.median(times) if times else float("nan")

    def state(self) -> dict:
        """What a checkpoint keeps, whole tensors on the CPU; every rank must call it."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        return {
            "model": model,
            "optimizer": optimizer,
            "history": self.history,
            "step_seconds": self.step_seconds,
            "peak_bytes": self.peak_bytes,
        }

    def load(self, state: dict) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        self.history, self.step_seconds = state["history"], state["step_seconds"]
        self.peak_bytes = state["peak_bytes"]


def local(t: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, sharded or not."""
    return t.to_local() if isinstance(t, DTensor) else t


def schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then cosine to zero; a factor of the learning rate."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def batch_at(
    data: Data, settings: Settings, step: int, rank: int = 0, world: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's part of the training batch of a step: epochs are permutations, cut into whole
    batches."""
    size = min(settings.batch, data.num_train)
    per_epoch = data.num_train // size
    epoch, place = divmod(step, per_epoch)
    order = torch.Generator().manual_seed(settings.seed * 7919 + epoch)
    indices = torch.randperm(data.num_train, generator=order)[place * size : (place + 1) * size]
    augment = torch.Generator().manual_seed(settings.seed * 104729 + step + 1)
    x, y = data.train(indices, augment, slice(rank * size // world, (rank + 1) * size // world))
    return x.to(settings.device), y.to(settings.device)


def save_checkpoint(
    path: pathlib.Path, learners: list[Learner], step: int, options: dict[str, object]
) -> None:
    """Writes a checkpoint from rank 0; every rank must call it."""
    content = {
        "version": CHECKPOINT_VERSION,
        "step": step,
        "options": options,
        "learners": {learner.name: learner.state() for learner in learners},
    }
    ranks = learners[0].ranks
    if ranks.main:
        write_whole(path, content)
    ranks.barrier()  # torchrun ends every process when one returns from a stopped run


def write_whole(path: pathlib.Path, content: dict) -> None:
    """Writes a file whole or not at all; the previous one stays until the new one is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # before the rename: a power cut must not leave an empty file
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(path: pathlib.Path) -> dict:
    """Reads a checkpoint; exits with a clear message if it is none of ours."""
    if not path.exists():
        raise SystemExit(f"--resume: there is no checkpoint at {path}; start without --resume")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on where the file ends
        raise SystemExit(f"--resume: {path} is damaged or no checkpoint ({error})") from None
    if not isinstance(content, dict) or content.get("version") != CHECKPOINT_VERSION:
        raise SystemExit(f"--resume: {path} was written by another version of this program")
    return content


def unfinished(path: pathlib.Path) -> tuple[int, int] | None:
    """Steps done and wanted of the interrupted run whose checkpoint this is; None if it is none.

    A damaged file is none either: nothing could go on from it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        done, wanted = content["step"], content["options"]["steps"]
    except Exception:  # no file, or what torch raises for one that is no checkpoint
        return None
    return (done, wanted) if done < wanted else None


def train(
    learners: list[Learner],
    data: Data,
    settings: Settings,
    start: int,
    stopped: Callable[[], bool],
    on_step: Callable[[int, dict[str, float]], None],
    on_eval: Callable[[int], None],
) -> int:
    """Runs steps `start`.. until the last one or until `stopped()`; returns the steps done.

    A stop is heeded between steps, when every model has taken the same number of them.
    """
    ranks = learners[0].ranks
    for step in range(start, settings.steps):
        if ranks.any(stopped()):
            return step
        x, y = batch_at(data, settings, step, ranks.rank, ranks.world)
        if step == 0 and settings.device == "cpu":
            for learner in learners:
                learner.count_memory(x, y)
        losses = {learner.name: learner.step(x, y, step) for learner in learners}
        done = step + 1
        if done % settings.eval_every == 0 or done == settings.steps:
            for learner in learners:
                accuracy, loss = learner.evaluate(data)
                learner.history.append(
                    {
                        "step": done,
                        "train_loss": losses[learner.name],
                        "test_loss": loss,
                        "accuracy": accuracy,
                    }
                )
            on_eval(done)
        on_step(done, losses)
    return settings.steps
