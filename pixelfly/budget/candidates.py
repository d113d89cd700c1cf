"""What each group of equal layers can become, from sparse to dense."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..nn.choice import Choice, choose
from ..sparsify import PixelflyConfig
from .cost import CostModel
from .rate import Work

_STEPS = 40  # densities tried a shape, in equal ratios
_SPARSEST = 1 / 128


@dataclass(frozen=True)
class Candidate:
    """One form of a layer.

    Attributes:
        choice: layout and rank, or None where the layer stays dense.
        density: weights / dense weights.
        params: weights that are stored, those at the edge's blocks included, and gates.
        macs: of all tokens, in one forward.
        seconds: predicted, or None without a cost model.
    """

    choice: Choice | None
    density: float
    params: int
    macs: int
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Group:
    """Layers of one type and shape, which the plan treats alike.

    Attributes:
        type: see `layer_type`.
        k: in_features.
        n: out_features.
        tokens: rows that pass through a layer in one forward.
        names: the layers.
        candidates: what each of them can become, the densest last; the last one is dense.
    """

    type: str
    k: int
    n: int
    tokens: int
    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    @property
    def dense(self) -> Candidate:
        return self.candidates[-1]


def candidates(
    k: int,
    n: int,
    tokens: int,
    like: PixelflyConfig,
    block_sizes: Sequence[int],
    densities: Sequence[float],
    cost: CostModel | None,
    training: bool,
    autocast: bool,
    beside: dict[str, Work],
) -> tuple[Candidate, ...]:
    """Returns what a layer can become; the last candidate is the dense layer.

    `beside` is what the dense layer's weight and bias move (see `LayerPlan`).

    Raises:
        ValueError: the features are not multiples of 8, or nothing is smaller than dense.
    """
    found = []
    for b in block_sizes:
        for choice in choices(k, n, b, like, tuple(densities)):
            # Blocks at the edge are stored and multiplied whole.
            factored = choice.factored_rank * (n + k)
            params = choice.layout.nnz * b * b + factored + gate_params(like.gate, k)
            seconds = None
            if cost is not None:
                seconds = sparse_layer_seconds(
                    cost,
                    tokens,
                    k,
                    n,
                    block_size=b,
                    nnz=choice.layout.nnz,
                    rank=choice.factored_rank,
                    stored=params,
                    autocast=autocast,
                    training=training,
                )
            macs = tokens * (choice.block_weights + choice.lowrank_weights)
            found.append(Candidate(choice, choice.density, params, macs, seconds))
    if not found:
        gate = f" with gate={like.gate!r}" if like.gate else ""
        raise ValueError(f"no form at block_sizes {tuple(block_sizes)}{gate} is below dense")
    seconds = None
    if cost is not None:
        seconds = dense_layer_seconds(cost, tokens, k, n, beside, training)
    dense = Candidate(None, 1.0, k * n, tokens * k * n, seconds)
    return (*sorted(found, key=lambda c: c.density), dense)


def dense_layer_seconds(
    cost: CostModel, tokens: int, k: int, n: int, beside: dict[str, Work], training: bool
) -> float:
    """Returns the seconds of a dense layer with what it moves beside its matmuls."""
    return cost.dense_seconds(tokens, k, n, training=training) + cost.seconds(beside)


def sparse_layer_seconds(
    cost: CostModel,
    tokens: int,
    k: int,
    n: int,
    *,
    block_size: int,
    nnz: int,
    rank: int,
    stored: int,
    autocast: bool,
    training: bool,
) -> float:
    """Returns the seconds of a Pixelfly layer.

    Its kernels sum the bias gradient and write gradients in the weights' dtype; under autocast one
    more rounds the `stored` float32 weights.
    """
    seconds = cost.sparse_seconds(
        tokens, k, n, block_size=block_size, nnz=nnz, rank=rank, training=training
    )
    if autocast:
        moved = (torch.float32.itemsize + cost.itemsize) * stored
        seconds += cost.seconds({"mixed": Work(0, moved)})
    return seconds


@functools.lru_cache(maxsize=256)
def choices(
    k: int, n: int, block_size: int, like: PixelflyConfig, densities: tuple[float, ...]
) -> tuple[Choice, ...]:
    """Returns the distinct forms that `choose` gives for many densities, all below dense."""
    ratio = (1 / _SPARSEST) ** (1 / _STEPS)
    tried = {_SPARSEST * ratio**i for i in range(_STEPS)} | set(densities)
    found: dict[tuple[int, int], Choice] = {}
    for density in sorted(tried):
        try:
            choice = choose(
                n,
                k,
                block_size=block_size,
                density=density,
                max_stride=like.max_stride,
                rank=like.rank,
                lowrank=like.lowrank,
            )
        except ValueError as error:
            if "nearest reachable" not in str(error):
                raise
            continue
        if choice.density < 1 and not (like.gate and choice.factored_rank == 0):
            found.setdefault((choice.layout.nnz, choice.rank), choice)
    return tuple(found.values())


def gate_params(gate: str | None, k: int) -> int:
    return {None: 0, "scalar": 1, "token": k + 1}[gate]


def utility(group: Group, candidate: Candidate) -> float:
    """What a candidate's density is worth: dense compute · log density, for all its layers.

    Its largest sum under a budget of compute is the same density for all: the paper's rule.
    """
    return len(group.names) * group.dense.macs * math.log(candidate.density)
