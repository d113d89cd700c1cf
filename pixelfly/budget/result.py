"""`Plan`: what every layer of a model becomes, and what that costs."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._table import print_rich
from ..nn.dense import dense_parameters, is_conv1d
from ..sparsify import PixelflyConfig
from . import show
from .candidates import dense_layer_seconds, gate_params, sparse_layer_seconds
from .cost import CostModel
from .rate import Work, resized

VERSION = 3
_FORMAT = "pixelfly.Plan"
_ADAMW_PASSES = 7  # over a parameter: weight, gradient and two moments read, three written
_PARTS = {  # of what is not a linear layer, by the kind of its rate
    "dense": "other matmuls",
    "unaligned": "other matmuls",
    "attention": "attention",
    "convolution": "convolutions",
    "unaligned convolution": "convolutions",
    "pointwise": "pointwise",
    "mixed": "mixed dtypes",
    "normalization": "normalizations",
    "reduction": "reductions",
    "strided": "strided copies",
}


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer of the model.

    Attributes:
        name: its name in the model.
        type: see `layer_type`.
        in_features: K.
        out_features: N.
        tokens: rows that pass through it in one forward of the example inputs.
        block_size: b, or None where it stays dense.
        nnz: kept blocks.
        rank: r of a factored low rank, or the width of a global one.
        weights: weights inside the layer's features, low rank included.
        requested: the density that `pixelfly.nn.choose` gets.
        reason: why it stays dense, or "".
        beside: what the dense layer's weight and bias move beside its matmuls (the sum of the
            bias gradient, autocast's casts), by the kind of its rate.
    """

    name: str
    type: str
    in_features: int
    out_features: int
    tokens: int
    block_size: int | None = None
    nnz: int = 0
    rank: int = 0
    weights: int = 0
    requested: float = 1.0
    reason: str = ""
    beside: dict[str, Work] = field(default_factory=dict, hash=False)

    @property
    def dense_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def density(self) -> float:
        """Weights of the layer / weights of the dense layer."""
        return self.weights / self.dense_weights


@dataclass(frozen=True)
class Rest:
    """What the model computes beside its linear layers.

    Attributes:
        params: parameters of the whole dense model, shared ones once.
        macs: of convolutions, attention and other matmuls, in one forward.
        works: work by the kind of its rate (see `count`).
        itemsize: bytes of an element of what was counted.
    """

    params: int
    macs: int
    works: dict[str, Work] = field(hash=False)
    itemsize: int

    def scale(self, cost: CostModel, autocast: bool) -> float:
        """Returns bytes in the cost model's dtype / counted bytes."""
        return 1.0 if autocast else cost.itemsize / self.itemsize


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step, in parts.

    Attributes:
        parts: seconds by what takes them: the layer types, "other matmuls", "attention",
            "convolutions", "pointwise", "mixed dtypes" (casts, sums of two dtypes),
            "normalizations", "reductions" (sums over rows), "strided copies" and, in training,
            "optimizer". A layer's bias gradient and autocast's casts of its weight are
            in its type's part.
    """

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What every layer of a model becomes; `sparsify_` takes it in place of a `PixelflyConfig`.

    Prints as a table; `print()` draws it with rich where that is installed.

    Attributes:
        budget: what was asked for: "density", "flops", "params" or "speedup".
        value: how much of it, as it was given.
        allocation: "proportional" or "time".
        layers: all linear layers, those that stay dense included.
        rest: what else the model computes.
        like: what the layers have in common: low-rank form, gate, initialisation.
        training: whether times are of forward + backward + optimizer, or of forward alone.
        cost: the cost model, or None.
        autocast: whether times are of float32 weights under autocast.
    """

    budget: str
    value: float
    allocation: str
    layers: tuple[LayerPlan, ...]
    rest: Rest
    like: PixelflyConfig
    training: bool = True
    cost: CostModel | None = None
    autocast: bool = False

    @property
    def planned(self) -> tuple[LayerPlan, ...]:
        """The layers that become sparse."""
        return tuple(layer for layer in self.layers if layer.block_size is not None)

    @property
    def candidates(self) -> tuple[LayerPlan, ...]:
        """The layers that could, over which the budget of density is counted."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def density(self) -> float:
        """Weights / dense weights of all layers that the plan may convert."""
        dense = sum(layer.dense_weights for layer in self.candidates)
        return sum(layer.weights for layer in self.candidates) / dense if dense else 1.0

    @property
    def flops(self) -> int:
        """FLOPs of one forward of the example inputs, all matmuls of the model included."""
        return 2 * (self.rest.macs + sum(x.tokens * x.weights for x in self.layers))

    @property
    def dense_flops(self) -> int:
        """The same of the dense model."""
        return 2 * (self.rest.macs + sum(x.tokens * x.dense_weights for x in self.layers))

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        saved = sum(x.dense_weights - self.stored(x) for x in self.planned)
        return self.rest.params - saved

    def stored(self, layer: LayerPlan) -> int:
        """Returns how many weights and gates a sparse layer stores."""
        factored = self._factored_rank(layer) * (layer.in_features + layer.out_features)
        gates = gate_params(self.like.gate, layer.in_features)
        return layer.nnz * layer.block_size**2 + factored + gates

    def _factored_rank(self, layer: LayerPlan) -> int:
        return layer.rank if self.like.lowrank == "factored" else 0

    def predicted_step(self, cost: CostModel | None = None, *, dense: bool = False) -> Prediction:
        """Predicts the time of a step with the example inputs.

        A matmul's time is a measured rate's, in training with its two gradients. All other
        operators of forward and backward count one by one with the bytes that they read and write,
        as eager PyTorch runs them; torch.compile fuses many. Launches from the host cost nothing,
        as in a CUDA graph. AdamW passes over every parameter in the dtype of the parameters.

        Args:
            cost: the cost model; None takes the plan's own. One of another dtype gets the counted
                bytes in proportion.
            dense: predict the dense model instead.

        Raises:
            ValueError: there is no cost model, or it is not of a dtype that autocast casts to.
        """
        cost = self.cost if cost is None else cost
        if cost is None:
            raise ValueError(
                "predicted_step: cost must be a CostModel, since the plan was made without one"
            )
        if self.autocast:
            check_autocast("predicted_step", cost)
        scale = self.rest.scale(cost, self.autocast)
        parts: dict[str, float] = {}
        for x in self.layers:
            if dense or x.block_size is None:
                beside = resized(x.beside, scale)
                seconds = dense_layer_seconds(
                    cost, x.tokens, x.in_features, x.out_features, beside, self.training
                )
            else:
                seconds = sparse_layer_seconds(
                    cost,
                    x.tokens,
                    x.in_features,
                    x.out_features,
                    block_size=x.block_size,
                    nnz=x.nnz,
                    rank=self._factored_rank(x),
                    stored=self.stored(x),
                    autocast=self.autocast,
                    training=self.training,
                )
            parts[x.type] = parts.get(x.type, 0.0) + seconds
        params = self.rest.params if dense else self.params
        rest = rest_seconds(self.rest, cost, params, self.training, self.autocast)
        return Prediction({**parts, **rest})

    @property
    def predicted_speedup(self) -> float | None:
        """Predicted time of the dense model / of the plan, or None without a cost model."""
        if self.cost is None:
            return None
        return self.predicted_step(dense=True).total / self.predicted_step().total

    def for_layer(self, name: str) -> PixelflyConfig | None:
        """Returns how to convert a layer, or None if it stays dense."""
        layer = self._by_name.get(name)
        if layer is None:
            return None
        # Rank and stride together would exclude the density.
        rank = layer.rank if self.like.max_stride is None else self.like.rank
        return replace(self.like, density=layer.requested, block_size=layer.block_size, rank=rank)

    @property
    def _by_name(self) -> dict[str, LayerPlan]:
        if "_names" not in self.__dict__:
            object.__setattr__(self, "_names", {x.name: x for x in self.planned})
        return self.__dict__["_names"]

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if the model is not one the plan was made for."""
        modules = dict(model.named_modules())
        for x in self.planned:
            module, wanted = modules.get(x.name), (x.out_features, x.in_features)
            if isinstance(module, nn.Linear) or module is not None and is_conv1d(module):
                shape = tuple(dense_parameters(module)[0].shape)
                if shape == wanted:
                    continue
                what = f"one of {shape}"
            else:
                what = "none" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                "Plan: model must be the dense model that the plan was made for, with a linear "
                f"layer {x.name!r} of (out_features, in_features) = {wanted}, got {what}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data, for JSON."""
        data = {"format": _FORMAT, "version": VERSION, **asdict(self)}
        data["layers"] = [asdict(layer) for layer in self.layers]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Returns the plan of plain data; raises ValueError for other data."""
        data = dict(data)
        found = data.pop("format", None)
        if found != _FORMAT:
            raise ValueError(f"Plan.load: format must be {_FORMAT!r}, got {found!r}")
        if (version := data.pop("version", None)) != VERSION:
            raise ValueError(
                f"Plan.load: version must be {VERSION}, got {version!r}: written by another "
                "pixelfly; make the plan again"
            )
        layers = [{**x, "beside": _works(x["beside"])} for x in data["layers"]]
        data["layers"] = tuple(LayerPlan(**layer) for layer in layers)
        rest = {**data["rest"], "works": _works(data["rest"]["works"])}
        data["rest"], data["like"] = Rest(**rest), PixelflyConfig(**data["like"])
        cost = data["cost"]
        data["cost"] = None if cost is None else CostModel.from_dict(cost)
        return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        pathlib.Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote; raises ValueError for anything else."""
        return cls.from_dict(json.loads(pathlib.Path(path).read_text()))

    def __str__(self) -> str:
        return show.text(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        return show.rich_parts(self, options.max_width)

    def print(self) -> None:
        """Prints the table, with rich if it is installed."""
        print_rich(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws density and, with a cost model, time by layer type; returns matplotlib's figure.

        Args:
            path: where to save it too, or None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return show.plot(self, path)


def _works(data: dict[str, dict[str, float]]) -> dict[str, Work]:
    return {kind: Work(**work) for kind, work in data.items()}


def check_autocast(caller: str, cost: CostModel) -> None:
    """Raises ValueError if autocast does not cast to the cost model's dtype."""
    if cost.dtype not in ("bfloat16", "float16"):
        raise ValueError(
            f"{caller}: autocast=True needs a cost model in bfloat16 or float16, got one in "
            f"{cost.dtype} of {cost.device}"
        )


def rest_seconds(
    rest: Rest, cost: CostModel, params: int, training: bool, autocast: bool
) -> dict[str, float]:
    """Returns the parts of a step that are not linear layers."""
    parts = {"other matmuls": 0.0}
    for kind, work in resized(rest.works, rest.scale(cost, autocast)).items():
        seconds = cost.seconds({kind: work}, training=training)
        parts[_PARTS[kind]] = parts.get(_PARTS[kind], 0.0) + seconds
    if training:
        moved = _ADAMW_PASSES * (torch.float32.itemsize if autocast else cost.itemsize) * params
        parts["optimizer"] = cost.seconds({"pointwise": Work(0, moved)})
    return {part: seconds for part, seconds in parts.items() if seconds}
