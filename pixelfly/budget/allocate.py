"""Spends a budget over the groups of layers: by the paper's rule, or by predicted time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .candidates import Candidate, Group, utility

Selection = list[Candidate]  # one for each group
Measure = Callable[[Sequence[Candidate]], float]
_NEAR = 0.9  # a candidate of this part of the wanted density will do if it is the preferred one
_TIED = 1.01  # times as close as this are no reason for smaller blocks
_SLACK = 1 + 1e-9


def proportional(groups: Sequence[Group], measure: Measure, budget: float) -> Selection | None:
    """Returns the plan with one density for all groups that spends most of the budget, or None.

    In proportion to dense compute means that every group keeps the same part of its own. A group
    that cannot be as sparse takes its sparsest form, and the others less than their part.
    """
    densities = sorted({c.density for group in groups for c in group.candidates})
    best, spent = None, -1.0
    for density in densities:
        selection = [_at_density(group, density) for group in groups]
        amount = measure(selection)
        if spent < amount <= budget * _SLACK:
            best, spent = selection, amount
    return best


def _at_density(group: Group, density: float) -> Candidate:
    densest: dict[int, Candidate] = {}  # by block size; candidates come from sparse to dense
    for c in group.candidates:
        if c.density <= density * _SLACK:
            densest[_block_size(c)] = c
    if not densest:
        return group.candidates[0]
    top = max(c.density for c in densest.values())
    near = [c for c in densest.values() if c.density >= _NEAR * top]
    if near[0].seconds is not None:
        least = min(c.seconds for c in near)
        near = [c for c in near if c.seconds <= _TIED * least]
    return max(near, key=_block_size)  # larger blocks are the faster ones, if all else is equal


def _block_size(candidate: Candidate) -> int:
    """The block size; a dense layer is one block, larger than all."""
    return 1 << 30 if candidate.choice is None else candidate.choice.layout.block_size


def fastest(
    groups: Sequence[Group], measure: Measure, budget: float, smallest: Selection
) -> Selection | None:
    """Returns the plan of largest utility a second that fits the budget, or None.

    From every group's fastest candidate on, the step that adds most utility for its time is taken
    while the budget lasts: the optimum along the convex hull of time and utility. What is then left
    of the budget goes to candidates off the hull. With few groups the paper's rule may fill the
    budget better; the better one is returned.
    """
    for allow_dense in (True, False):
        hulls = [_hull(group, allow_dense) for group in groups]
        selection = [hull[0] for hull in hulls]
        if measure(selection) <= budget * _SLACK:
            break
    else:
        # Even the fastest forms are above a budget of weights: there is no time to trade.
        fair = proportional(groups, measure, budget)
        if fair is None and measure(smallest) <= budget * _SLACK:
            return smallest
        return fair
    steps = []
    for i, (group, hull) in enumerate(zip(groups, hulls, strict=True)):
        for place, (low, high) in enumerate(zip(hull, hull[1:], strict=False)):
            steps.append((_slope(group, low, high), i, place + 1))
    closed: set[int] = set()
    for _, i, place in sorted(steps):
        if i in closed:
            continue
        trial = [*selection[:i], hulls[i][place], *selection[i + 1 :]]
        if measure(trial) <= budget * _SLACK:
            selection = trial
        else:
            closed.add(i)
    fair = proportional(groups, measure, budget)
    filled = [_fill(groups, measure, budget, s) for s in (selection, fair) if s is not None]
    return max(filled, key=lambda s: _worth(groups, s))


def _fill(
    groups: Sequence[Group], measure: Measure, budget: float, selection: Selection
) -> Selection:
    """Changes one group after another, the one that gains most first, while the budget lasts."""
    while True:
        gains = sorted(
            (
                (utility(group, c) - utility(group, chosen), i, place)
                for i, (group, chosen) in enumerate(zip(groups, selection, strict=True))
                for place, c in enumerate(group.candidates)
            ),
            reverse=True,
        )
        for gain, i, place in gains:
            if gain <= 0:
                return selection
            trial = [*selection[:i], groups[i].candidates[place], *selection[i + 1 :]]
            if measure(trial) <= budget * _SLACK:
                selection = trial
                break
        else:
            return selection


def _worth(groups: Sequence[Group], selection: Selection) -> float:
    return sum(utility(group, c) for group, c in zip(groups, selection, strict=True))


def _slope(group: Group, low: Candidate, high: Candidate) -> float:
    """Seconds a unit of utility."""
    seconds = len(group.names) * (high.seconds - low.seconds)
    return seconds / (utility(group, high) - utility(group, low))


def _hull(group: Group, allow_dense: bool) -> list[Candidate]:
    """Returns the candidates that are the best for some price of time, from fast to dense."""
    pool = [c for c in group.candidates if allow_dense or c.choice is not None]
    hull = [min(pool, key=lambda c: (c.seconds, -c.density))]
    while True:
        denser = [c for c in pool if c.density > hull[-1].density]
        if not denser:
            return hull
        last = hull[-1]
        hull.append(min(denser, key=lambda c: (_slope(group, last, c), -c.density)))
