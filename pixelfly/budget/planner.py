"""`plan`: spends a budget on the linear layers of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..nn.dense import is_conv1d
from ..sparsify import FilterFn, PixelflyConfig, find_obstacles
from .allocate import fastest, proportional
from .candidates import Candidate, Group, candidates, dense_layer_seconds
from .cost import CostModel
from .count import Tally, beside_matmuls, count
from .kinds import layer_type
from .operators import MOVED
from .rate import Work, add, resized
from .result import LayerPlan, Plan, Rest, check_autocast, rest_seconds

BUDGETS = ("density", "flops", "params", "speedup")
_SPENDS: dict[str, Callable[[Candidate], float]] = {
    "density": lambda c: c.density,
    "flops": lambda c: c.macs,
    "params": lambda c: c.params,
    "speedup": lambda c: c.seconds,
}


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    density: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    speedup: float | None = None,
    cost: CostModel | None = None,
    allocation: str = "proportional",
    block_sizes: Sequence[int] = (64, 32),
    like: PixelflyConfig | None = None,
    filter_fn: FilterFn | str | None = None,
    training: bool = True,
    autocast: bool = False,
    type_fn: Callable[[str], str] = layer_type,
    fake: bool = True,
) -> Plan:
    """Chooses block size, stride and rank of every linear layer so that a budget is met.

    The model runs once on fake tensors, forward and in training backward, under a counter of every
    operator. Exactly one of `density`, `flops`, `params` and `speedup` says what may be spent.
    Convolutions, attention and embeddings are counted and left as they are; attention that is
    already over a layout by its kept blocks.

    Times are of eager PyTorch in a CUDA graph. With a cost model the whole model, inputs too, is
    counted in the model's dtype; with `autocast` it keeps its float32 weights, and operators run in
    the dtypes that CUDA's autocast gives them. The backward starts at the first scalar that the
    model returns (a loss) or else at its first tensor (a loss outside the model is not counted),
    and all parameters are trained.

    allocation="proportional" is the paper's rule: the compute of every layer type shrinks in
    proportion, so that all have one density, up to what their shapes allow. "time" spends where a
    kept weight costs least predicted time: it takes the largest sum of `dense MACs · log density`
    (of which the proportional rule is the optimum where time is FLOPs) that the time buys, up to
    the budget; layers that are faster dense may stay dense. Inside a layer, a quarter to a third
    of the weights goes to the low rank (see `pixelfly.nn.choose`).

    Args:
        model: a dense model, on any device, the meta device included; is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the
            batch that is to be trained: times depend on its size.
        density: weights / dense weights of the layers that can be converted, in (0, 1].
        flops: FLOPs of the whole model's forward: at most 1 is a part of the dense model's, more
            is a number of FLOPs.
        params: parameters of the whole model, likewise.
        speedup: predicted time of the dense model's step / of the plan's, at least 1; needs `cost`.
        cost: predicts times; also picks among block sizes. See `CostModel`.
        allocation: "proportional" or "time", which needs `cost`.
        block_sizes: b that layers may get; without a cost model the largest that fits the density.
        like: what all layers have in common: `lowrank`, `gate`, `init`, `projection_steps`,
            `fuse_mlp`, and `rank` or `max_stride` where they are fixed; its density and block
            size do not count.
        filter_fn: which layers may be converted, as for `sparsify_`.
        training: times are of forward + backward + optimizer; False: of forward alone.
        autocast: times are of float32 weights under autocast to the cost model's dtype.
        type_fn: a layer's name -> its type; layers of one type and shape become alike.
        fake: False runs the model for real, in its own dtype, for models whose Python looks at
            values.

    Returns:
        The plan; it never spends more than the budget. Where the dense model keeps the budget,
        the plan converts nothing.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the budget is not reachable; the message says
            what is.
        RuntimeError: the model does not run on the example inputs.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3.

    Example:
        >>> from pixelfly import sparsify_
        >>> model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
        >>> result = plan(model, torch.zeros(32, 256), density=0.25, block_sizes=(32,))
        >>> [(x.block_size, x.nnz, x.rank, x.density) for x in result.layers]
        [(32, 32, 16, 0.203125), (32, 32, 16, 0.203125)]
        >>> report = sparsify_(model, result)
        >>> len(report.layers)
        2
    """
    like = PixelflyConfig() if like is None else like
    given = {"density": density, "flops": flops, "params": params, "speedup": speedup}
    budget, value = _check(model, given, cost, allocation, like, block_sizes)
    if not isinstance(autocast, bool):
        raise TypeError(
            "plan: autocast must be a bool, the dtype being the cost model's, "
            f"got {type(autocast).__name__}"
        )
    if autocast and cost is not None:
        check_autocast("plan", cost)
    target = torch.bfloat16 if cost is None else getattr(torch, cost.dtype)
    run = _Run(
        training=training,
        dtype=target if fake and cost is not None and not autocast else None,
        autocast=target if autocast else None,
    )
    tallies = count(model, example_inputs, **asdict(run), fake=fake)
    layers = _linear_layers(model, tallies, filter_fn, type_fn, run)
    rest = _rest(model, tallies, layers, run)
    scale = 1.0 if cost is None else rest.scale(cost, autocast)
    groups, layers = _groups(layers, like, block_sizes, given["density"], cost, run, scale)
    if not groups:
        reasons = "; ".join(sorted({f"{x.name}: {x.reason}" for x in layers})[:3])
        raise ValueError(f"plan: model has no layer that can be converted ({reasons or 'none'})")
    kept = [x for x in layers if x.reason]

    def totals(selection: Sequence[Candidate]) -> dict[str, float]:
        many = [len(g.names) for g in groups]
        spent = list(zip(many, groups, selection, strict=True))
        weights = sum(m * c.density * g.k * g.n for m, g, c in spent)
        out = {
            "density": weights / sum(m * g.k * g.n for m, g, _ in spent),
            "flops": 2.0 * (rest.macs + sum(x.tokens * x.dense_weights for x in kept))
            + 2.0 * sum(m * c.macs for m, _, c in spent),
            "params": rest.params - sum(m * (g.k * g.n - c.params) for m, g, c in spent),
        }
        if cost is not None:
            seconds = sum(m * c.seconds for m, _, c in spent) + sum(
                dense_layer_seconds(
                    *(cost, x.tokens, x.in_features, x.out_features),
                    resized(x.beside, scale),
                    training,
                )
                for x in kept
            )
            out["seconds"] = seconds + sum(
                rest_seconds(rest, cost, out["params"], training, autocast).values()
            )
        return out

    dense = totals([g.dense for g in groups])
    limit = _limit(budget, value, dense)
    key = "seconds" if budget == "speedup" else budget

    def measure(selection: Sequence[Candidate]) -> float:
        return totals(selection)[key]

    if allocation == "proportional":
        smallest = [g.candidates[0] for g in groups]
        selection = proportional(groups, measure, limit)
    else:
        smallest = [min(g.candidates, key=_SPENDS[budget]) for g in groups]
        selection = fastest(groups, measure, limit, smallest)
    if selection is None:
        raise ValueError(_unreachable(budget, value, measure(smallest), dense))
    chosen = {name: c for g, c in zip(groups, selection, strict=True) for name in g.names}
    final = tuple(_with(x, chosen.get(x.name), like.max_stride is not None) for x in layers)
    return Plan(budget, float(value), allocation, final, rest, like, training, cost, autocast)


@dataclass(frozen=True)
class _Run:
    """How the model is counted; see `count`."""

    training: bool
    dtype: torch.dtype | None
    autocast: torch.dtype | None


def _check(
    model: Any,
    given: dict[str, float | None],
    cost: Any,
    allocation: str,
    like: Any,
    block_sizes: Sequence[int],
) -> tuple[str, float]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan: model must be a Module, got {type(model).__name__}")
    if cost is not None and not isinstance(cost, CostModel):
        raise TypeError(f"plan: cost must be a CostModel or None, got {type(cost).__name__}")
    if not isinstance(like, PixelflyConfig):
        raise TypeError(f"plan: like must be a PixelflyConfig or None, got {type(like).__name__}")
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        got = ", ".join(asked) or "none"
        raise ValueError(f"plan: exactly one of {', '.join(BUDGETS)} must be given, got {got}")
    ((budget, value),) = asked.items()
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"plan: {budget} must be a number, got {type(value).__name__}")
    ranges = {"density": (0 < value <= 1, "in (0, 1]"), "speedup": (value >= 1, "at least 1")}
    ok, wanted = ranges.get(budget, (value > 0, "above 0"))
    if not ok:
        raise ValueError(f"plan: {budget} must be {wanted}, got {value}")
    if allocation not in ("proportional", "time"):
        raise ValueError(f"plan: allocation must be 'proportional' or 'time', got {allocation!r}")
    if cost is None and (budget == "speedup" or allocation == "time"):
        what = "speedup" if budget == "speedup" else "allocation='time'"
        raise ValueError(
            f"plan: {what} needs cost=CostModel.measure(device) or CostModel.roofline(gpu)"
        )
    known = (16, 32, 64, 128) if cost is None else cost.block_sizes
    if not block_sizes or any(b not in known for b in block_sizes):
        whose = "" if cost is None else f" (what the cost model of {cost.device} knows)"
        raise ValueError(f"plan: block_sizes must be among {known}{whose}, got {block_sizes}")
    return budget, value


def _linear_layers(
    model: nn.Module,
    tallies: dict[str, Tally],
    filter_fn: FilterFn | str | None,
    type_fn: Callable[[str], str],
    run: _Run,
) -> list[LayerPlan]:
    """Returns all linear layers as dense ones, with the reason of those that stay so."""
    obstacles = find_obstacles(model, filter_fn)
    found = []
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        k, n = module.weight.shape if is_conv1d(module) else module.weight.shape[::-1]
        macs = tallies.get(name, Tally()).macs
        reason = obstacles.get(name, "")
        if not reason and macs == 0:
            reason = "the example inputs do not reach it"
        tokens = macs // (k * n)
        dtype = run.dtype or module.weight.dtype
        beside = {}
        if tokens:
            bias = module.bias is not None
            beside = beside_matmuls(k, n, tokens, bias, dtype, run.autocast, run.training)
        layer = LayerPlan(
            name, type_fn(name), k, n, tokens, weights=k * n, reason=reason, beside=dict(beside)
        )
        found.append(layer)
    return found


def _rest(
    model: nn.Module, tallies: dict[str, Tally], layers: Sequence[LayerPlan], run: _Run
) -> Rest:
    """Returns the sum of all tallies less what the layers are."""
    linear = {x.name for x in layers}
    works: dict[str, Work] = {}
    for name, tally in tallies.items():
        kinds = MOVED if name in linear else tally.works
        add(works, {kind: work for kind, work in tally.works.items() if kind in kinds})
    for x in layers:
        for kind, work in x.beside.items():
            works[kind] = works.get(kind, Work(0, 0, 0)).less(work)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    dtype = run.dtype or (floats[0].dtype if floats else torch.float32)
    return Rest(
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(tally.macs for name, tally in tallies.items() if name not in linear),
        works=works,
        itemsize=dtype.itemsize,
    )


def _groups(
    layers: list[LayerPlan],
    like: PixelflyConfig,
    block_sizes: Sequence[int],
    density: float | None,
    cost: CostModel | None,
    run: _Run,
    scale: float,
) -> tuple[list[Group], list[LayerPlan]]:
    """Returns the groups of layers to plan, and all layers with the reasons found on the way."""
    together: dict[tuple, list[str]] = {}
    for x in layers:
        if not x.reason:
            beside = tuple(sorted(x.beside.items()))
            key = (x.type, x.in_features, x.out_features, x.tokens, beside)
            together.setdefault(key, []).append(x.name)
    groups, reasons = [], {}
    autocast = run.autocast is not None
    for (kind, k, n, tokens, beside), names in together.items():
        wanted = () if density is None else (density,)
        try:
            forms = candidates(
                *(k, n, tokens, like, block_sizes, wanted, cost),
                training=run.training,
                autocast=autocast,
                beside=resized(dict(beside), scale),
            )
        except ValueError as error:
            reasons.update(dict.fromkeys(names, str(error)))
            continue
        groups.append(Group(kind, k, n, tokens, tuple(names), forms))
    return groups, [replace(x, reason=reasons.get(x.name, x.reason)) for x in layers]


def _with(layer: LayerPlan, candidate: Candidate | None, fixed_stride: bool) -> LayerPlan:
    """Returns the layer in its chosen form."""
    if candidate is None or candidate.choice is None:
        return layer
    choice = candidate.choice
    # With its rank, the density that was reached gives the same layout again; rank and stride
    # together would exclude it.
    return replace(
        layer,
        block_size=choice.layout.block_size,
        nnz=choice.layout.nnz,
        rank=choice.rank,
        weights=choice.block_weights + choice.lowrank_weights,
        requested=choice.requested if fixed_stride else choice.density,
    )


def _limit(budget: str, value: float, dense: dict[str, float]) -> float:
    if budget == "speedup":
        return dense["seconds"] / value
    if budget == "density" or value > 1:
        return value
    return value * dense[budget]


def _unreachable(budget: str, value: float, least: float, dense: dict[str, float]) -> str:
    """Says what the smallest plan reaches, rounded so that it can be asked for."""
    if budget == "speedup":
        nearest = f"{math.floor(100 * dense['seconds'] / least) / 100:.2f}"
    elif budget == "density" or value <= 1:
        share = least if budget == "density" else least / dense[budget]
        nearest = f"{math.ceil(share * 1e4) / 1e4:.4f}"
    else:
        nearest = f"{math.ceil(least)}"
    return (
        f"plan: {budget}={value:g} is not reachable with the layers and block sizes that may be "
        f"used; the nearest reachable is {nearest}"
    )
