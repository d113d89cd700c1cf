"""Pathfinder pictures by the published rules, on the published lattice (Long Range Arena, 32 x 32).

Two snakes of dashes, two markers at ends of one snake (label 1) or of one each (label 0), shorter
snakes to distract. The rules are those of the generator that the benchmark names, snakes2.py of
drewlinsley/pathfinder, with the benchmark's parameters: ends of dashes lie on pixels, a dash is
one of a few stamps (a line on a grid twice as fine, brought to pixels by a Lanczos filter), turns
have weights, and brightness differs: distractors 2, dashes of the two snakes 1.5, markers 1, then
all is scaled to 255. The difference is another random generator.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

Pixel = tuple[int, int]  # y, x
FINE = 2  # stamps are drawn on a grid so many times as fine
FULL = 1.8  # of two masks' sum: a dash there would touch another
DASH, MARGIN = 2, 1  # pixels: a dash's length, and what it leaves free before and behind
REACH = DASH + MARGIN  # from the pivot to the end of a dash
HALF = DASH + MARGIN + 1  # of a stamp's side: 1 for half a pixel of thickness


@dataclasses.dataclass(frozen=True)
class Paths:
    """The benchmark's parameters, lengths in pixels."""

    size: int = 32
    padding: int = 1
    dashes: int = 14  # of each of the two snakes that may be marked: 14 is the hard set
    distractor_dashes: int = 4
    distractors: int = 5  # at most: on average one finds room
    continuity: float = 1.0  # a turn of t radians has weight cos(min(continuity t, pi / 2))**2
    seed_distance: int = 7  # between the two snakes' first ends; twice that from the border
    marker_radius: float = 1.5
    brightness: float = 1.5  # of the two snakes; markers have 1
    distractor_brightness: float = 2.0
    retrials: int = 2  # of a dash
    distractor_retrials: int = 4  # of a whole distractor


def moved(at: Pixel, angle: float, distance: float) -> Pixel:
    """The pixel at a distance, coordinates rounded up."""
    y, x = at[0] + distance * math.sin(angle), at[1] + distance * math.cos(angle)
    return math.ceil(y), math.ceil(x)


def reversed_angle(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


def lanczos(image: np.ndarray, size: int) -> np.ndarray:
    """A square image of values up to 255 brought to `size` pixels a side, rounded after each of
    the two passes as an image library's 8 bits are."""

    def kernel(t: np.ndarray) -> np.ndarray:
        return np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0.0)

    scale = len(image) / size
    weights = np.zeros((size, len(image)))
    for i in range(size):
        centre, support = (i + 0.5) * scale, 3 * scale
        low = max(0, int(centre - support + 0.5))
        high = min(len(image), int(centre + support + 0.5))
        row = kernel((np.arange(low, high) - centre + 0.5) / scale)
        weights[i, low:high] = row / row.sum()
    for _ in range(2):
        image = np.clip(np.floor(image @ weights.T + 0.5), 0, 255).T
    return image


def disc(radius: float, side: int, centre: Pixel | None = None) -> np.ndarray:
    """Which of `side` x `side` points are within a radius, of the middle unless told otherwise."""
    y, x = centre or (side // 2, side // 2)
    at = np.arange(side)
    return (at[:, None] - y) ** 2 + (at[None] - x) ** 2 <= radius**2


def dilated(image: np.ndarray, struct: np.ndarray) -> np.ndarray:
    """The largest value under a struct of odd side, at every pixel; -inf where all of it lies
    outside."""
    half = len(struct) // 2
    padded = np.pad(image, half, constant_values=-np.inf)
    out = np.full_like(image, -np.inf)
    for y, x in zip(*np.nonzero(struct), strict=True):
        np.maximum(out, padded[y : y + len(image), x : x + len(image)], out=out)
    return out


def line(end: Pixel, side: int) -> np.ndarray:
    """A line from the middle to a point, Bresenham's."""
    image = np.zeros((side, side))
    y = x = side // 2
    step_y, step_x = (1 if end[0] > y else -1), (1 if end[1] > x else -1)
    long_y, long_x = abs(end[0] - y), abs(end[1] - x)
    steep = long_y >= long_x
    long, short = (long_y, long_x) if steep else (long_x, long_y)
    error = 2 * short - long
    image[y, x] = 255
    for _ in range(long):
        if error >= 0:
            y, x = (y, x + step_x) if steep else (y + step_y, x)
            error -= 2 * long
        error += 2 * short
        y, x = (y + step_y, x) if steep else (y, x + step_x)
        image[y, x] = 255
    return image


@functools.cache
def _stamp(end: Pixel) -> tuple[np.ndarray, np.ndarray]:
    """A dash from the middle of a stamp on, and its mask: `[2 HALF + 1]**2` of values up to 1."""
    side = 2 * HALF * FINE + 1
    fine = line(end, side)
    room = dilated(fine, disc(MARGIN * FINE, 2 * MARGIN * FINE + 1))
    # Single precision, as in the published generator: it decides whether two masks reach FULL.
    return tuple((lanczos(image, 2 * HALF + 1) / 255).astype(np.float32) for image in (fine, room))


def stamp(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The stamp of a dash that runs at an angle from its first end, and its mask."""
    middle = HALF * FINE
    return _stamp(moved((middle, middle), angle, DASH * FINE))


def _around() -> tuple[np.ndarray, np.ndarray]:
    """Where the end of the next dash may lie, relative to the pivot, and at which angles."""
    angles = np.deg2rad(np.arange(0, 360, 360 / (2 * math.pi * REACH)))
    points = REACH * np.stack([np.sin(angles), np.cos(angles)], -1)
    ends = np.unique(np.floor(points).astype(int), axis=0)
    return ends, np.arctan2(ends[:, 0], ends[:, 1])


ENDS, ANGLES = _around()
EDGE = HALF + REACH  # pixels past the border, so that stamps need not be cut


@functools.cache
def turn_weights(angle: float, continuity: float) -> np.ndarray:
    """How likely each of ANGLES is after an angle, where nothing is in the way."""
    turn = np.abs(ANGLES - angle)
    turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * continuity, math.pi / 2)
    return np.cos(turn) ** 2


class Mask:
    """What is taken of a picture, 0 to 1, with EDGE pixels past the border."""

    def __init__(self, p: Paths) -> None:
        self.p, self.side = p, p.size + 2 * EDGE
        self.values = np.zeros((self.side, self.side), np.float32)
        inner = self.inner()
        inner[:] = 1
        inner[p.padding : -p.padding, p.padding : -p.padding] = 0

    def inner(self) -> np.ndarray:
        return self.values[EDGE:-EDGE, EDGE:-EDGE]

    def copy(self) -> Mask:
        other = object.__new__(Mask)
        other.p, other.side, other.values = self.p, self.side, self.values.copy()
        return other

    def contains(self, at: Pixel) -> bool:
        return 0 <= at[0] < self.p.size and 0 <= at[1] < self.p.size

    def window(self, at: Pixel) -> np.ndarray:
        return window(self.values, at)

    def keep_free(self, at: Pixel, room: np.ndarray) -> None:
        part = self.window(at)
        np.maximum(part, room, out=part)

    def taken(self, ends: np.ndarray) -> np.ndarray:
        """The most that is taken of these pixels and their four neighbours."""
        y, x = ends.T + EDGE
        at = y * self.side + x
        flat = self.values.reshape(-1)
        around = (at, at - 1, at + 1, at - self.side, at + self.side)
        return functools.reduce(np.maximum, (flat[a] for a in around))


def window(array: np.ndarray, at: Pixel) -> np.ndarray:
    """A stamp's part of an array with EDGE pixels past the border."""
    y, x = at[0] + EDGE, at[1] + EDGE
    return array[y - HALF : y + HALF + 1, x - HALF : x + HALF + 1]


@dataclasses.dataclass
class Snake:
    """A growing snake; of its last dash the mask does not know yet."""

    pivot: Pixel
    angle: float
    dashes: list[tuple[Pixel, float]]  # an end and the angle from there; ends[0] is the first end

    def ends(self) -> tuple[Pixel, Pixel]:
        return self.dashes[0][0], self.dashes[-1][0]

    def last_room(self) -> tuple[Pixel, np.ndarray]:
        at, angle = self.dashes[-1]
        return at, stamp(angle)[1]


def begin(mask: Mask, tail: Pixel, angle: float) -> Snake | None:
    """A snake's first dash, or None if that or its pivot lies outside."""
    head = moved(tail, angle, DASH)
    pivot = moved(head, reversed_angle(angle), REACH)
    if not (mask.contains(head) and mask.contains(pivot)):
        return None
    return Snake(pivot, angle, [(tail, angle)])


def extend(draw: random.Random, mask: Mask, snake: Snake) -> bool:
    """Adds a dash to a snake; False if none has room."""
    pivot = moved(snake.pivot, snake.angle, DASH + 2 * MARGIN)
    ends = ENDS + pivot
    inside = ((ends >= 0) & (ends < mask.p.size)).all(1)
    if not inside.any():
        return False
    ends, weights = ends[inside], turn_weights(snake.angle, mask.p.continuity)[inside]
    weights = ((1 - mask.taken(ends)) * weights).cumsum()
    if weights[-1] < 1e-4:
        return False
    for _ in range(mask.p.retrials + 1):
        i = int(np.argmax(weights > draw.random() * weights[-1]))
        head, angle = (int(ends[i, 0]), int(ends[i, 1])), float(ANGLES[inside][i])
        back = reversed_angle(angle)
        if (mask.window(head) + stamp(back)[1]).max() >= FULL:
            continue
        mask.keep_free(*snake.last_room())
        snake.pivot, snake.angle = pivot, angle
        snake.dashes.append((head, back))
        return True
    return False


def free_pixels(mask: Mask, angle: float, border: int) -> np.ndarray:
    """The pixels `[n, 2]` where a dash can begin, so far from the border at least.

    There are none for most angles, as in the published generator: what is looked at lies a pixel
    beside the dash, and must include the dash's first pixel."""
    blocked = mask.inner().copy()
    blocked[:border] = blocked[-border:] = 1
    blocked[:, :border] = blocked[:, -border:] = 1
    room = stamp(angle)[1]
    # The stamp's middle lies one past that of the struct.
    struct = room[HALF - REACH - 1 : HALF + REACH, HALF - REACH - 1 : HALF + REACH] >= 1
    room = dilated(blocked, struct)
    return np.argwhere(room <= 0.3) if room.min() >= 0 else np.empty((0, 2), int)


@functools.cache
def first_pixels(p: Paths, angle: float) -> np.ndarray:
    """Where the first of two snakes can begin, on an empty picture."""
    return free_pixels(Mask(p), angle, 2 * p.seed_distance)


def chosen(draw: random.Random, pixels: np.ndarray) -> Pixel:
    y, x = pixels[draw.randrange(len(pixels))]
    return int(y), int(x)


def degrees(draw: random.Random) -> float:
    return math.radians(draw.randrange(-180, 180))


def begin_anywhere(
    draw: random.Random, mask: Mask, pixels: Callable[[float], np.ndarray]
) -> Snake | None:
    """A snake's first dash at one of the pixels for a random angle, or None: there are none, or the
    dash lies outside, every time."""
    for _ in range(mask.p.retrials + 1):
        angle = degrees(draw)
        places = pixels(angle)
        if len(places) == 0:
            return None
        snake = begin(mask, chosen(draw, places), angle)
        if snake is not None:
            return snake
    return None


def two_snakes(draw: random.Random, p: Paths) -> tuple[Mask, Snake, Snake] | None:
    """The two snakes that may be marked, or None if one of them runs into something."""
    mask = Mask(p)
    first = begin_anywhere(draw, mask, lambda angle: first_pixels(p, angle))
    if first is None:
        return None
    for _ in range(p.retrials + 1):
        angle, around = degrees(draw), math.radians(draw.randrange(360))
        (y, x), _ = first.ends()
        y, x = y + p.seed_distance * math.sin(around), x + p.seed_distance * math.cos(around)
        second = begin(mask, (round(y), round(x)), angle)
        if second is not None:
            break
    else:
        return None
    for _ in range(p.dashes - 1):
        if not (extend(draw, mask, first) and extend(draw, mask, second)):
            return None
    mask.keep_free(*second.last_room())
    return mask, first, second


def distractor(draw: random.Random, mask: Mask) -> tuple[Mask, Snake] | None:
    """One more short snake and the mask with it, or None if it has no room."""
    p, mask = mask.p, mask.copy()
    if (mask.inner() <= 0.3).mean() < 0.01:
        return None
    snake = begin_anywhere(draw, mask, lambda angle: free_pixels(mask, angle, 1))
    if snake is None:
        return None
    for _ in range(p.distractor_dashes - 1):
        if not extend(draw, mask, snake):
            return None
    mask.keep_free(*snake.last_room())
    return mask, snake


@functools.cache
def _marker(at: Pixel, size: int, radius: float) -> np.ndarray:
    centre = (at[0] * FINE, at[1] * FINE)
    return lanczos(255.0 * disc(radius * FINE, size * FINE, centre), size) / 255


def picture(
    snakes: list[Snake], distractors: list[Snake], markers: list[Pixel], p: Paths
) -> np.ndarray:
    """Grey values, uint8 `[size, size]`."""
    image = np.zeros((p.size + 2 * EDGE, p.size + 2 * EDGE))
    for some, brightness in ((snakes, p.brightness), (distractors, p.distractor_brightness)):
        for at, angle in (dash for snake in some for dash in snake.dashes):
            part = window(image, at)
            np.maximum(part, brightness * stamp(angle)[0], out=part)
    image = image[EDGE:-EDGE, EDGE:-EDGE]
    for at in markers:
        image = np.maximum(image, _marker(at, p.size, p.marker_radius))
    return (image * (255 / image.max()) + 0.5).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Example:
    snakes: tuple[Snake, Snake]
    distractors: list[Snake]
    markers: list[Pixel]
    label: int  # 1: both markers are on one snake


def example(draw: random.Random, p: Paths) -> Example:
    found = None
    while found is None:
        found = two_snakes(draw, p)
    mask, *snakes = found
    distractors = []
    for _ in range(p.distractors):
        for _ in range(p.distractor_retrials + 1):
            more = distractor(draw, mask)
            if more is not None:
                mask = more[0]
                distractors.append(more[1])
                break
    label, one = draw.randrange(2), draw.randrange(2)
    end = one if label else 1 - one
    markers = [snakes[one].ends()[0], snakes[end].ends()[1]]
    return Example(tuple(snakes), distractors, markers, label)


def _pictures(seed: int, part: int, count: int, p: Paths) -> tuple[np.ndarray, np.ndarray]:
    draw = random.Random(f"{seed} {part}")
    x = np.zeros((count, p.size**2), dtype=np.uint8)
    y = np.zeros(count, dtype=np.int64)
    for i in range(count):
        e = example(draw, p)
        x[i] = picture(list(e.snakes), e.distractors, e.markers, p).reshape(-1)
        y[i] = e.label
    return x, y


def pictures(count: int, seed: int, p: Paths) -> tuple[np.ndarray, np.ndarray]:
    """Grey values `[count, size**2]` and labels; 1: the markers are the ends of one snake.

    Parts of 500 with seeds of their own, so that several processes draw what one would.
    """
    sizes = [min(500, count - begin) for begin in range(0, count, 500)]
    jobs = [(seed, part, size, p) for part, size in enumerate(sizes)]
    if len(jobs) == 1:
        parts = [_pictures(*jobs[0])]
    else:
        workers = min(len(jobs), os.cpu_count() or 1)
        # Not forked: the parent may hold a CUDA context and threads.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_pictures, *zip(*jobs, strict=True)))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
