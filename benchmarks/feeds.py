"""Data that stays on the device: a batch is a function of the step, with no word from the host.

The order of samples, their shifts and mirrors are drawn before training from the seed alone, so all
patterns see the same batches, and a step that reads them can be captured into a CUDA graph.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from data import Batch, Images, fashion_mnist
from text import load_tokens

VALIDATION_IMAGES, VALIDATION_SEQUENCES = 5000, 2000  # at most
EVAL_IMAGES, EVAL_WINDOWS, EVAL_SEQUENCES = 1000, 16, 50  # at a time


def orders(count: int, batch: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Returns `[steps, batch]` sample numbers: epochs are permutations, cut into whole batches."""
    per_epoch = count // batch
    if per_epoch == 0:
        raise SystemExit(f"--batch: expected at most {count}, the training samples, got {batch}")
    epochs = -(-steps // per_epoch)
    rows = [
        torch.randperm(count, generator=generator)[: per_epoch * batch].view(per_epoch, batch)
        for _ in range(epochs)
    ]
    return torch.cat(rows)[:steps]


def hold_out(count: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which samples train and which validate, in a fixed order: at most `most`, and never
    more than a tenth of `count`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held = min(most, max(1, count // 10))
    return order[held:], order[:held]


class Feed(abc.ABC):
    """Training batches by step, and evaluation batches by part ("val" or "test")."""

    @abc.abstractmethod
    def plan(self, steps: int, batch: int, seed: int) -> None:
        """Draws the order of a run."""

    @abc.abstractmethod
    def batch(self, step: torch.Tensor) -> Batch:
        """Returns the batch of a step; `step` is `[1]` on the device."""

    @abc.abstractmethod
    def batches(self, part: str) -> Iterator[Batch]:
        """Yields a part, as it is."""


class ImageFeed(Feed):
    """Images, shifted by up to two pixels and mirrored; the last of a fixed order validate."""

    SHIFT = 2

    def __init__(self, images: Images, device: torch.device) -> None:
        (x, y), test = images.tensors()
        train, val = hold_out(len(y), VALIDATION_IMAGES)
        self._parts = {
            "val": (x[val].to(device), y[val].to(device)),
            "test": (test[0].to(device), test[1].to(device)),
        }
        self._x = F.pad(x[train], (self.SHIFT,) * 4, mode="replicate").to(device)
        self._y = y[train].to(device)
        self._rows = torch.arange(x.shape[2], device=device)
        self._cols = torch.arange(x.shape[3], device=device)
        self.shape, self.classes = images.shape, images.classes

    def plan(self, steps: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(7919 * seed + 1)
        device = self._y.device
        self._order = orders(len(self._y), batch, steps, generator).to(device)
        shifts = torch.randint(0, 2 * self.SHIFT + 1, (2, steps, batch), generator=generator)
        self._dy, self._dx = shifts.to(device)
        self._mirror = (torch.rand(steps, batch, generator=generator) < 0.5).to(device)

    def batch(self, step: torch.Tensor) -> Batch:
        index = self._order[step][0]
        rows = self._dy[step][0][:, None] + self._rows
        cols = self._dx[step][0][:, None] + self._cols
        cols = torch.where(self._mirror[step][0][:, None], cols.flip(1), cols)
        x = self._x[index[:, None, None], :, rows[:, :, None], cols[:, None, :]]
        return x.permute(0, 3, 1, 2).contiguous(), self._y[index]

    def batches(self, part: str) -> Iterator[Batch]:
        x, y = self._parts[part]
        yield from zip(x.split(EVAL_IMAGES), y.split(EVAL_IMAGES), strict=True)


class TextFeed(Feed):
    """Windows of tokens; every run shifts their grid by a number of its own."""

    EVAL_TOKENS = 1 << 18  # of a part, at most

    def __init__(self, arrays: dict[str, np.ndarray], length: int, device: torch.device) -> None:
        self.length, self.vocabulary = length, int(arrays["vocabulary"])
        self._tokens = {
            part: torch.from_numpy(arrays[part].astype(np.int32)).to(device)
            for part in ("train", "val", "test")
        }
        self.tokens_per_byte = {
            part: len(arrays[part]) / int(arrays[f"{part}_bytes"]) for part in ("val", "test")
        }
        for part, tokens in self._tokens.items():
            if len(tokens) < 2 * length + 1:
                raise SystemExit(
                    f"--length: expected less than half of the {part} part's {len(tokens)} tokens, "
                    f"got {length}"
                )
        self._window = torch.arange(length + 1, device=device)

    def plan(self, steps: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(7919 * seed + 1)
        tokens = self._tokens["train"]
        shift = int(torch.randint(0, self.length, (1,), generator=generator))
        count = (len(tokens) - shift - 1) // self.length
        starts = orders(count, batch, steps, generator) * self.length + shift
        self._starts = starts.to(tokens.device)

    def _windows(self, part: str, starts: torch.Tensor) -> Batch:
        windows = self._tokens[part][starts[:, None] + self._window].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def batch(self, step: torch.Tensor) -> Batch:
        return self._windows("train", self._starts[step][0])

    def batches(self, part: str) -> Iterator[Batch]:
        tokens = self._tokens[part]
        count = min((len(tokens) - 1) // self.length, self.EVAL_TOKENS // self.length)
        starts = torch.arange(count, device=tokens.device) * self.length
        for some in starts.split(EVAL_WINDOWS):
            yield self._windows(part, some)


class SequenceFeed(Feed):
    """Sequences of bytes and their classes; the last of a fixed order validate."""

    def __init__(self, train: Batch, test: Batch, device: torch.device) -> None:
        (x, y), parts = train, hold_out(len(train[1]), VALIDATION_SEQUENCES)
        self._x, self._y = x[parts[0]].to(device), y[parts[0]].to(device).long()
        self._parts = {"val": (x[parts[1]], y[parts[1]]), "test": test}

    def plan(self, steps: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(7919 * seed + 1)
        self._order = orders(len(self._y), batch, steps, generator).to(self._y.device)

    def batch(self, step: torch.Tensor) -> Batch:
        index = self._order[step][0]
        return self._x[index].long(), self._y[index]

    def batches(self, part: str) -> Iterator[Batch]:
        for some in zip(*(t.split(EVAL_SEQUENCES) for t in self._parts[part]), strict=True):
            x, y = (t.to(self._y.device).long() for t in some)
            yield x, y


def fashion_feed(data_dir: pathlib.Path, device: torch.device) -> ImageFeed:
    return ImageFeed(fashion_mnist(data_dir), device)


def text_feed(data_dir: pathlib.Path, length: int, device: torch.device) -> TextFeed:
    folder = data_dir / "gpt2-text"
    return TextFeed(load_tokens(folder), length, device)
