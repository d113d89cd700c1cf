"""Pathfinder's pictures: the published rules, a hand-checked example, and how they are drawn."""

from __future__ import annotations

import itertools
import math
import random

import lra_data
import numpy as np
import pathfinder
import pytest
import torch


def along(snake: pathfinder.Snake) -> np.ndarray:
    """Where a snake's dashes begin and end, unrounded: `[dashes, 2, (y, x)]`, first end first."""
    ends = []
    for i, ((y, x), angle) in enumerate(snake.dashes):
        other = (y + pathfinder.DASH * math.sin(angle), x + pathfinder.DASH * math.cos(angle))
        ends.append([(y, x), other] if i == 0 else [other, (y, x)])  # drawn from the far end on
    return np.array(ends)


def test_pathfinder_keeps_the_rules():
    draw, p = random.Random(0), pathfinder.Paths()
    labels, all_gaps = [], []
    for _ in range(20):
        example = pathfinder.example(draw, p)
        labels.append(example.label)
        # Hand check of the label: which snake does each marker lie on the end of?
        on = [next(i for i in (0, 1) if m in example.snakes[i].ends()) for m in example.markers]
        assert (on[0] == on[1]) == bool(example.label)
        assert example.markers[0] == example.snakes[on[0]].dashes[0][0]
        assert example.markers[1] == example.snakes[on[1]].dashes[-1][0]
        first, second = (snake.dashes[0][0] for snake in example.snakes)
        assert math.dist(first, second) == pytest.approx(p.seed_distance, abs=1)
        # Where the dash lies, a pixel beside it, is what the rule keeps from the border.
        beside = pathfinder.DASH + pathfinder.MARGIN + 1
        low, high = 2 * p.seed_distance - beside, p.size - 2 * p.seed_distance + beside
        assert all(low <= v < high for v in first)
        assert [len(snake.dashes) for snake in example.snakes] == [p.dashes] * 2
        assert all(len(snake.dashes) == p.distractor_dashes for snake in example.distractors)
        for snake in (*example.snakes, *example.distractors):
            ends = along(snake)
            gaps = np.linalg.norm(ends[1:, 0] - ends[:-1, 1], axis=-1)
            # Twice the margin but for bends, and that pivots follow each other and are rounded up.
            assert gaps.min() > 0 and gaps.max() < 5
            all_gaps += gaps.tolist()
            turns = np.diff([a if i == 0 else pathfinder.reversed_angle(a)
                             for i, (_, a) in enumerate(snake.dashes)])  # fmt: skip
            assert np.abs((turns + math.pi) % (2 * math.pi) - math.pi).max() < math.pi / 2
    assert 4 < sum(labels) < 16 and np.mean(all_gaps) == pytest.approx(1.7, abs=0.2)


def test_pathfinder_follows_the_published_generator():
    # Given the same random numbers, that draws the same picture.
    example = pathfinder.example(random.Random(1), pathfinder.Paths())
    assert example.label == 1 and example.markers == [(14, 14), (23, 13)]
    dashes = [[at for at, _ in s.dashes] for s in (*example.snakes, *example.distractors)]
    assert dashes == [
        [(14, 14), (10, 12), (7, 11), (5, 8), (7, 5), (10, 5), (14, 4), (18, 5), (22, 6), (26, 7),
         (29, 10), (29, 14), (26, 16), (23, 13)],
        [(12, 7), (10, 12), (7, 13), (5, 15), (4, 19), (2, 23), (2, 26), (4, 29), (8, 29), (12, 29),
         (16, 29), (20, 28), (24, 27), (28, 26)],
        [(24, 19), (20, 18), (18, 20), (18, 25)],
    ]  # fmt: skip


def test_dashes_of_pathfinder_do_not_touch():
    draw, p = random.Random(2), pathfinder.Paths()

    def room(dash) -> np.ndarray:
        mask = pathfinder.Mask(p)
        mask.values[:] = 0
        mask.keep_free(dash[0], pathfinder.stamp(dash[1])[1])
        return mask.values

    distractors = 0
    for _ in range(6):
        example = pathfinder.example(draw, p)
        distractors += len(example.distractors)
        first, second = ([room(d) for d in snake.dashes] for snake in example.snakes)
        for a, b in ((first, first), (second, second), (first, second)):
            for i, j in itertools.product(range(p.dashes), repeat=2):
                if abs(i - j) >= 2:  # the last dash of a snake is not yet in the mask
                    assert (a[i] + b[j]).max() < pathfinder.FULL
        for dash in (d for snake in example.distractors for d in snake.dashes[1:]):
            assert all((room(dash) + other).max() < pathfinder.FULL for other in second)
    assert distractors > 2


def told_by_distance(p: pathfinder.Paths) -> float:
    """Of pictures whose markers are on two snakes, the part that are not as far apart as those of
    nine in ten on one."""
    draw = random.Random(1)
    apart: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(300):
        example = pathfinder.example(draw, p)
        apart[example.label].append(math.dist(*example.markers))
    low, high = np.quantile(apart[1], [0.05, 0.95])
    return 1 - np.mean([low <= distance <= high for distance in apart[0]])


def test_the_distance_of_pathfinders_markers_does_not_tell_the_label():
    assert told_by_distance(pathfinder.Paths()) < 0.25
    assert told_by_distance(pathfinder.Paths(dashes=3, continuity=2.5)) > 0.5  # short and straight


def test_turns_follow_the_cosine_law():
    weights = pathfinder.turn_weights(0.0, 1.0)
    for angle, weight in zip(pathfinder.ANGLES, weights, strict=True):
        ahead = abs(angle) < math.pi / 2
        assert weight == pytest.approx(math.cos(angle) ** 2 if ahead else 0, abs=1e-12)
    # Ends of the next dash surround the pivot, coordinates rounded down.
    assert np.abs(pathfinder.ENDS).max() == pathfinder.REACH
    assert (np.linalg.norm(pathfinder.ENDS, axis=1) <= pathfinder.REACH + 2**0.5).all()
    # Drawn in the middle of an empty picture.
    draw, p, count = random.Random(0), pathfinder.Paths(), 3000
    drawn = []
    for _ in range(count):
        snake = pathfinder.begin(pathfinder.Mask(p), (16, 12), 0.0)
        assert pathfinder.extend(draw, pathfinder.Mask(p), snake)
        drawn.append(snake.angle)
    for angle in set(pathfinder.ANGLES):  # two ends may lie at the same
        part = weights[pathfinder.ANGLES == angle].sum() / weights.sum()
        spread = math.sqrt(part * (1 - part) / count)
        assert np.mean(np.isclose(drawn, angle)) == pytest.approx(part, abs=4 * spread + 1e-9)


def test_stamps_and_markers_of_pathfinder():
    # By hand, on the fine grid: five points to the right of the middle, four of them on pixels.
    fine = pathfinder.line((8, 12), 17)
    assert list(zip(*fine.nonzero(), strict=True)) == [(8, x) for x in range(8, 13)]
    slanted = pathfinder.line((6, 12), 17)
    assert list(zip(*slanted.nonzero(), strict=True)) == [(6, 11), (6, 12), (7, 9), (7, 10), (8, 8)]
    dash, room = pathfinder.stamp(0.0)
    assert dash.shape == room.shape == (9, 9)
    assert dash[4, 4:7].min() > 0.3 and dash[:3].max() < 0.1 and dash[4, :3].max() < 0.1
    assert room[3:6, 4:7].min() > 0.6 and room[4, 3] > 0.6 and room[4, 0] < 0.1  # a pixel around
    snake = pathfinder.Snake((0, 0), 0.0, [((16, 16), 0.0)])
    far = pathfinder.Snake((0, 0), 0.0, [((25, 8), 0.0)])
    p = pathfinder.Paths()
    picture = pathfinder.picture([snake], [far], [(8, 8)], p).astype(float)
    dash = dash[4, 5]
    assert picture[25, 9] == 255
    assert picture[16, 17] == pytest.approx(255 * p.brightness / p.distractor_brightness, abs=1)
    assert picture[8, 8] == pytest.approx(255 / (p.distractor_brightness * dash), abs=1)


def test_lanczos_keeps_what_is_even():
    assert (pathfinder.lanczos(np.full((17, 17), 200.0), 9) == 200).all()


def test_pathfinder_set_is_seeded():
    a, b = (lra_data.pathfinder(3, 2, seed=5) for _ in range(2))
    (xa, ya), (xb, yb) = a.train, b.train
    assert torch.equal(xa, xb) and torch.equal(ya, yb)
    assert xa.shape == (3, 1024) and 200 < xa.max() <= 255
