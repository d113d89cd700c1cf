"""How long an operation of so many FLOPs and bytes takes, and how that is fitted to timings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """What an operation does.

    Attributes:
        flops: floating-point operations.
        bytes: read from and written to memory, each tensor once.
        count: how many operations these are together.
    """

    flops: float
    bytes: float
    count: int = 1

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.count + other.count)

    def less(self, part: Work) -> Work:
        """Returns what is left without a part; never below zero."""
        return Work(
            max(self.flops - part.flops, 0.0),
            max(self.bytes - part.bytes, 0.0),
            max(self.count - part.count, 0),
        )

    def scaled(self, factor: float) -> Work:
        """Returns the work of so many operations like it."""
        return Work(factor * self.flops, factor * self.bytes, round(factor * self.count))


def add(works: dict[str, Work], more: dict[str, Work]) -> None:
    """Adds work by kind to `works`."""
    for kind, work in more.items():
        works[kind] = works[kind] + work if kind in works else work


def resized(works: dict[str, Work], scale: float) -> dict[str, Work]:
    """Returns the works of tensors whose elements are so many times as large."""
    return {kind: Work(w.flops, scale * w.bytes, w.count) for kind, w in works.items()}


@dataclass(frozen=True)
class Rate:
    """Seconds of a kind of operation.

    Attributes:
        launch: seconds an operation takes whatever its size.
        flop: seconds per FLOP.
        byte: seconds per byte.
        form: how the last two terms meet: "max" (they overlap) or "sum" (the paper's).
        error: root mean square relative error of the fit; 0 for data sheets.
    """

    launch: float
    flop: float
    byte: float
    form: str = "max"
    error: float = 0.0

    def seconds(self, work: Work) -> float:
        terms = (self.flop * work.flops, self.byte * work.bytes)
        return self.launch * work.count + (max(terms) if self.form == "max" else sum(terms))


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Rate:
    """Returns the rate that is nearest to timings, in relative error, of either form.

    Args:
        works: what was timed.
        seconds: how long each took.

    Raises:
        ValueError: there are no timings, or not one for each work.

    Example:
        >>> works = [Work(1e9, 1e6), Work(1e6, 1e9), Work(1e3, 1e3), Work(1e9, 1e9)]
        >>> truth = Rate(1e-5, 1e-12, 1e-11)
        >>> found = fit(works, [truth.seconds(w) for w in works])
        >>> found.form, found.error < 1e-6
        ('max', True)
    """
    if not works or len(works) != len(seconds):
        raise ValueError(f"fit: needs a timing for each work, got {len(works)}, {len(seconds)}")
    times = torch.tensor(seconds, dtype=torch.float64)
    # In relative error: every row is divided by its time.
    rows = torch.tensor([[w.count, w.flops, w.bytes] for w in works], dtype=torch.float64)
    rows = rows / times[:, None]
    candidates = [Rate(*_nonnegative(rows), "sum")]
    for start in (rows[:, 1] / rows[:, 1].max(), rows[:, 2] / rows[:, 2].max()):
        weights = (1.0, 1.0)
        bound_by_flops = start > start.median()
        for _ in range(20):
            # Each timing counts towards the term that bounds it, until none changes sides.
            active = rows.clone()
            active[:, 1] *= bound_by_flops
            active[:, 2] *= ~bound_by_flops
            launch, *weights = _nonnegative(active)
            again = rows[:, 1] * weights[0] >= rows[:, 2] * weights[1]
            if bool((again == bound_by_flops).all()):
                break
            bound_by_flops = again
        candidates.append(Rate(launch, *weights, "max"))

    def error(rate: Rate) -> float:
        off = [rate.seconds(w) / t - 1 for w, t in zip(works, seconds, strict=True)]
        return math.sqrt(sum(x * x for x in off) / len(off))

    best = min(candidates, key=error)
    return Rate(best.launch, best.flop, best.byte, best.form, error(best))


def _nonnegative(rows: torch.Tensor) -> list[float]:
    """Returns nonnegative weights with rows @ weights nearest to 1: three columns, all subsets.

    Where several fit alike, time goes to what grows with the work, not to the launch.
    """
    scale = rows.abs().amax(0).clamp(min=1e-300)
    scaled, ones = rows / scale, torch.ones(len(rows), 1, dtype=rows.dtype)
    best, best_error = [0.0, 0.0, 0.0], float("inf")
    for subset in ([1], [2], [1, 2], [0], [0, 1], [0, 2], [0, 1, 2]):
        part = scaled[:, subset]
        weights = torch.linalg.lstsq(part, ones, driver="gelsd").solution
        error = float((part @ weights - ones).square().sum())
        if bool((weights >= 0).all()) and error < best_error * (1 - 1e-12):
            best_error, best = error, [0.0, 0.0, 0.0]
            for i, weight in zip(subset, weights[:, 0].tolist(), strict=True):
                best[i] = weight / float(scale[i])
    return best
