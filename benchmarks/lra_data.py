"""Long Range Arena's tasks as data sets: ListOps and Pathfinder by rule, images from real ones.

ListOps follows the published generator step by step. Pathfinder follows the published rules (two
snakes of dashes that turn by a cosine law and never touch, two markers on one snake or on one each,
shorter snakes to distract) with the sizes that the benchmark gives for 32 x 32, its hard set of 14
dashes; dashes are drawn exactly instead of through an image library, with one brightness: the same
task, not the published pictures.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import pathlib
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from data import Batch, DataMissing, cifar10, fashion_mnist

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = ("", *OPERATORS, "]", *map(str, range(10)))  # the first is padding
TOKEN_IDS = {token: i for i, token in enumerate(TOKENS)}
BRANCH_PROBABILITY = 0.25
MAX_DEPTH, MAX_ARGUMENTS = 10, 10


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Integer sequences of one length and their classes, held in memory: `[n, length]`, `[n]`."""

    train: Batch
    test: Batch
    classes: int

    def save(self, path: pathlib.Path) -> None:
        """Writes tokens below 256 and labels to a file, whole or not at all."""
        arrays = {
            f"{part}_{name}": values.to(torch.uint8).numpy()
            for part, batch in (("train", self.train), ("test", self.test))
            for name, values in zip("xy", batch, strict=True)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, classes=self.classes, **arrays)
        os.replace(unfinished, path)

    @classmethod
    def read(cls, path: pathlib.Path) -> Sequences:
        with np.load(path) as arrays:
            parts = [
                tuple(torch.from_numpy(arrays[f"{part}_{name}"]) for name in "xy")
                for part in ("train", "test")
            ]
            return cls(*parts, int(arrays["classes"]))


def listops_tree(draw: random.Random, depth: int = 1) -> list[str]:
    """Draws an expression as tokens: below the root a node branches with probability 1/4."""
    if depth >= MAX_DEPTH or draw.random() > BRANCH_PROBABILITY:
        return [str(draw.randrange(10))]
    parts = [listops_tree(draw, depth + 1) for _ in range(draw.randint(2, MAX_ARGUMENTS))]
    return [draw.choice(OPERATORS), *(token for part in parts for token in part), "]"]


def listops_value(tokens: list[str]) -> int:
    """Evaluates an expression: minimum, maximum, median rounded down, or sum modulo 10.

    >>> listops_value("[MAX 2 9 [MIN 4 7 ] 0 ]".split())
    9
    """
    stack: list[list] = [[]]
    for token in tokens:
        if token in OPERATORS:
            stack.append([token])
        elif token == "]":
            operator, *values = stack.pop()
            value = {
                "[MIN": min,
                "[MAX": max,
                "[MED": lambda v: int(np.median(v)),
                "[SM": lambda v: sum(v) % 10,
            }[operator](values)
            stack[-1].append(value)
        else:
            stack[-1].append(int(token))
    return stack[0][0]


def listops(
    num_train: int, num_test: int, seed: int, length: int = 2000, shortest: int = 500
) -> Sequences:
    """Distinct expressions of more than `shortest` and fewer than `length` tokens."""
    draw, seen = random.Random(seed), set()
    ids = np.zeros((num_train + num_test, length), dtype=np.uint8)
    values = np.zeros(num_train + num_test, dtype=np.int64)
    while len(seen) < len(values):
        tokens = listops_tree(draw)
        if not shortest < len(tokens) < length:
            continue
        row = bytes(TOKEN_IDS[token] for token in tokens)
        if row not in seen:
            ids[len(seen), : len(row)] = list(row)
            values[len(seen)] = listops_value(tokens)
            seen.add(row)
    x, y = torch.from_numpy(ids), torch.from_numpy(values)
    return Sequences((x[:num_train], y[:num_train]), (x[num_train:], y[num_train:]), 10)


@dataclasses.dataclass(frozen=True)
class Paths:
    """How Pathfinder pictures are drawn; lengths in pixels."""

    size: int = 32
    padding: float = 1.0
    dashes: int = 14  # of each of the two snakes that may be marked
    distractor_dashes: int = 4
    distractors: int = 5
    dash: float = 2.0
    gap: float = 2.0  # between the dashes of a snake; snakes keep this far apart too
    thickness: float = 0.5
    continuity: float = 1.0  # a turn of t radians has weight cos(min(continuity t, pi / 2))**2
    seed_distance: float = 7.0  # between the two snakes' first ends; twice that from the border
    marker_radius: float = 1.5
    retrials: int = 20


Snake = np.ndarray  # [dashes, 2 ends, (y, x)]
ALONG = np.linspace(0, 1, 5)[:, None]  # a dash, where it is compared with others


def turn(draw: random.Random, continuity: float) -> float:
    """Draws a turn in radians with density proportional to cos(min(continuity |t|, pi/2))**2."""
    limit = min(math.pi, math.pi / 2 / continuity)
    while True:
        t = draw.uniform(-limit, limit)
        if draw.random() <= math.cos(continuity * t) ** 2:
            return t


def _points(dashes: np.ndarray) -> np.ndarray:
    """Points `[dashes * 5, 2]` along dashes `[dashes, 2 ends, 2]`, dense enough for distances."""
    return (dashes[:, :1] * (1 - ALONG) + dashes[:, 1:] * ALONG).reshape(-1, 2)


def grow(
    draw: random.Random, p: Paths, start: np.ndarray, count: int, taken: np.ndarray
) -> Snake | None:
    """A snake of `count` dashes from `start` that touches neither the points `taken` nor itself, or
    None."""
    angle, (y, x) = draw.uniform(-math.pi, math.pi), start
    low, high = p.padding, p.size - p.padding
    dashes: list[list[tuple[float, float]]] = []
    own = np.empty((0, 2))
    for _ in range(count):
        for _ in range(p.retrials):
            heading = angle + (turn(draw, p.continuity) if dashes else 0.0)
            step_y, step_x = math.sin(heading), math.cos(heading)
            gap = p.gap if dashes else 0.0
            begin = y + gap * step_y, x + gap * step_x
            end = begin[0] + p.dash * step_y, begin[1] + p.dash * step_x
            if min(*begin, *end) < low or max(*begin, *end) > high:
                continue
            points = _points(np.array([[begin, end]]))
            # Its own last dash is a gap away by construction, rounded turns nearer.
            if _apart(points, taken, p.gap + p.thickness) and _apart(points, own, 0.75 * p.gap):
                break
        else:
            return None
        dashes.append([begin, end])
        own = np.concatenate([own, points])
        angle, (y, x) = heading, end
    return np.array(dashes)


def _apart(points: np.ndarray, others: np.ndarray, least: float) -> bool:
    if not len(others):
        return True
    between = points[:, None] - others
    return bool(np.einsum("ijk,ijk->ij", between, between).min() >= least**2)


def draw_picture(snakes: list[Snake], markers: list[np.ndarray], p: Paths) -> np.ndarray:
    """Grey values in [0, 1], `[size, size]`: dashes of a thickness, and discs."""
    centre = np.arange(p.size) + 0.5
    pixel = np.stack(np.meshgrid(centre, centre, indexing="ij"), -1)[:, :, None]
    dashes = np.concatenate(snakes)
    begin, along = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
    part = ((pixel - begin) * along).sum(-1) / (along**2).sum(-1)
    nearest = begin + np.clip(part, 0, 1)[..., None] * along
    distance = np.sqrt(((pixel - nearest) ** 2).sum(-1)).min(-1)
    image = np.clip(0.5 + p.thickness / 2 - distance, 0, 1)
    to_marker = np.sqrt(((pixel - np.stack(markers)) ** 2).sum(-1)).min(-1)
    return np.maximum(image, np.clip(0.5 + p.marker_radius - to_marker, 0, 1))


def path_example(draw: random.Random, p: Paths) -> tuple[list[Snake], list[np.ndarray], int]:
    """Snakes (the two that may be marked come first), the two marked ends and the label."""
    label = draw.randrange(2)
    low, high = p.padding, p.size - p.padding
    edge = min(2 * p.seed_distance, p.size / 2)
    while True:
        start = np.array([draw.uniform(edge, p.size - edge) for _ in range(2)])
        around = draw.uniform(0, 2 * math.pi)
        other = start + p.seed_distance * np.array([math.sin(around), math.cos(around)])
        first = grow(draw, p, start, p.dashes, np.empty((0, 2)))
        second = None if first is None else grow(draw, p, other, p.dashes, _points(first))
        if second is not None:
            break
    snakes = [first, second]
    for _ in range(p.distractors):
        taken = np.concatenate([_points(snake) for snake in snakes])
        place = np.array([draw.uniform(low, high), draw.uniform(low, high)])
        short = grow(draw, p, place, p.distractor_dashes, taken)
        if short is not None:  # no room there: one distractor fewer, as in the published rule
            snakes.append(short)
    one = draw.randrange(2)
    end = one if label else 1 - one
    return snakes, [snakes[one][0, 0], snakes[end][-1, 1]], label


def _pictures(seed: int, part: int, count: int, p: Paths) -> tuple[np.ndarray, np.ndarray]:
    draw = random.Random(f"{seed} {part}")
    x = np.zeros((count, p.size**2), dtype=np.uint8)
    y = np.zeros(count, dtype=np.int64)
    for i in range(count):
        snakes, markers, y[i] = path_example(draw, p)
        x[i] = np.round(255 * draw_picture(snakes, markers, p)).reshape(-1)
    return x, y


def pathfinder(num_train: int, num_test: int, seed: int, paths: Paths | None = None) -> Sequences:
    """Pictures as sequences of grey values; label 1: the markers are the ends of one snake.

    Parts of 500 with seeds of their own, so that several processes draw what one would.
    """
    count = num_train + num_test
    sizes = [min(500, count - begin) for begin in range(0, count, 500)]
    jobs = [(seed, part, size, paths or Paths()) for part, size in enumerate(sizes)]
    if len(jobs) == 1:
        parts = [_pictures(*jobs[0])]
    else:
        workers = min(len(jobs), os.cpu_count() or 1)
        # Not forked: the parent may hold a CUDA context and threads.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_pictures, *zip(*jobs, strict=True)))
    x, y = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return Sequences((x[:num_train], y[:num_train]), (x[num_train:], y[num_train:]), 2)


def grey_images(folder: pathlib.Path, num_train: int, num_test: int) -> tuple[Sequences, str]:
    """Grey values of 32 x 32 real images, and the set's name: CIFAR-10 where it lies in `folder`,
    else Fashion-MNIST with a black border."""
    if (folder / "cifar-10-batches-py").is_dir():
        images, name = cifar10(folder), "CIFAR-10, grey"
    else:
        images, name = fashion_mnist(folder), "Fashion-MNIST, padded to 32x32"
    parts = []
    train = images._train[0]
    low, high = train.amin((0, 2, 3), keepdim=True), train.amax((0, 2, 3), keepdim=True)
    for (x, y), count in ((images._train, num_train), (images._test, num_test)):
        x = (x[:count] - low) / (high - low)  # what normalisation did is undone
        if x.shape[1] == 3:
            x = (x * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        side = (32 - x.shape[-1]) // 2
        x = F.pad(x, (side, side, side, side)).flatten(1)
        parts.append(((255 * x).round().to(torch.uint8), y[:count]))
    return Sequences(*parts, 10), name


GENERATED = {  # task -> generator, name of the data, beginning of its file's name
    "listops": (listops, "ListOps, generated", "listops"),
    "pathfinder": (pathfinder, "Pathfinder 32x32, hard, generated", "pathfinder-hard"),
}


def load(task: str, folder: str, num_train: int, num_test: int, seed: int) -> tuple[Sequences, str]:
    """A task's data and what it is called; raises DataMissing with the cure.

    What is generated (minutes of a processor) stays in `folder`/lra for the next time.
    """
    if task in GENERATED:
        generate, name, stem = GENERATED[task]
        path = pathlib.Path(folder) / "lra" / f"{stem}-{num_train}-{num_test}-{seed}.npz"
        if path.exists():
            return Sequences.read(path), name
        data = generate(num_train, num_test, seed)
        data.save(path)
        return data, name
    if task == "image":
        return grey_images(pathlib.Path(folder), num_train, num_test)
    raise DataMissing(f"--tasks {task}: has no data here; it can be timed with --mode speed")
