"""Long Range Arena's tasks as data sets: ListOps and Pathfinder by rule, images from real ones.

ListOps follows the published generator step by step, Pathfinder (pathfinder.py) its published one.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random

import numpy as np
import torch
import torch.nn.functional as F
from data import Batch, DataMissing, cifar10, fashion_mnist
from pathfinder import Paths, pictures

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

    def reordered(self, order: torch.Tensor) -> Sequences:
        """The same with token `order[i]` of each sequence in place i."""
        parts = [(x[:, order], y) for x, y in (self.train, self.test)]
        return Sequences(*parts, self.classes)

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


def pathfinder(num_train: int, num_test: int, seed: int) -> Sequences:
    """Pictures as sequences of grey values; label 1: the markers are the ends of one snake."""
    x, y = (torch.from_numpy(a) for a in pictures(num_train + num_test, seed, Paths()))
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
    "pathfinder": (pathfinder, "Pathfinder 32x32, hard, generated", "pathfinder-14"),
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
