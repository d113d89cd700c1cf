"""Optimizer groups with a learning rate for each structure: blocks, u, v, dense weights, gates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .nn.choice import kept_fan_in
from .nn.dense import is_conv1d
from .nn.linear import PixelflyLinear

GATE_START = 0.5  # γ begins there, so blocks and u are twice as large as what they stand for


@dataclass(frozen=True)
class _Rule:
    """How one parameter is trained: its group, factor of the learning rate and decay."""

    role: str
    scale: float = 1.0
    decay: bool = False


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    base: nn.Module | None = None,
    no_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Returns groups for an Adam-like optimizer in which every structure learns as fast as dense.

    Adam moves each entry of a weight by about its learning rate, so the output of a matrix with
    `d` inputs moves by about `lr · d`. Blocks of `d` kept inputs in place of a dense matrix of K
    therefore get `lr · K / d`:

    | parameter | learning rate | weight decay |
    | --- | --- | --- |
    | blocks | `lr · K / f`, f the mean number of kept inputs of a non-empty block row | yes |
    | u, v | `lr` | yes |
    | dense, convolution and embedding weights | `lr` | yes |
    | bias, norm, gates, other vectors | `lr` | no |

    By the same count u would get `lr · K / r`, which moves it by a large part of itself in a step.
    When the three shared one layer's movement by that count (each a third of it), GPT-2 small with
    butterfly + low rank ended at a test loss of 3.38 instead of 3.10 (README).

    Where a layer has a gate, which starts at one half, blocks and u get twice that. `lr` is then
    the learning rate of the dense model. With `base`, the same model at another width, `lr` is the
    one found there: hidden and output matrices get it times `K of base / K` (μP), and inputs whose
    number does not grow (pixels, vocabulary) keep it. The decay per step, `lr · weight_decay`, is
    the one that was asked for in every group, whatever its learning rate.

    A caller who gives `model.parameters()` to the optimizer trains soundly too: the initial output
    has a dense layer's variance, and only the best learning rate differs.

    Args:
        model: any model; may hold dense and Pixelfly layers.
        lr: learning rate of the dense layers at `base`'s width (without `base`: the model's own).
        weight_decay: decoupled weight decay (AdamW) at `lr`.
        base: the model at the width `lr` was found at, dense or Pixelfly, with the same module
            names; may be on the meta device. Its output layer should start at zero or small.
        no_decay: names of further parameters without decay, besides those that the model's
            own `no_weight_decay()` (timm) names.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, `role` (what they hold), `scale` (lr / the given
        lr). Frozen parameters are in none of them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `lr` or `weight_decay` is out of range, a name is unknown, or `base` lacks a
            layer of the model.

    Source: Qiu et al., "Compute Better Spent" (ICML 2024), section 3: `lr ∝ 1/d_in` of every dense
    factor, here of the blocks; Yang et al., "Tensor Programs V" (2022), table 3.

    Example:
        >>> from torch import nn, optim
        >>> from pixelfly import PixelflyLinear
        >>> model = nn.Sequential(PixelflyLinear(256, 256, density=0.25, block_size=32))
        >>> groups = param_groups(model, lr=1e-3, weight_decay=0.1)
        >>> [(g["role"], round(g["scale"], 2), round(g["weight_decay"], 4)) for g in groups]
        [('blocks', 8.0, 0.0125), ('u', 1.0, 0.1), ('v', 1.0, 0.1), ('vector', 1.0, 0.0)]
        >>> optimizer = optim.AdamW(groups)
    """
    _check(model, lr, weight_decay, base)
    exempt = _exempt(model, no_decay)
    base_fan_in = None if base is None else dict(_fan_ins(base))
    groups: dict[tuple[_Rule, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    # Embeddings first: one that is tied to the head learns as an embedding.
    modules = sorted(model.named_modules(), key=lambda m: not isinstance(m[1], nn.Embedding))
    for name, module in modules:
        width = _width_scale(name, module, base_fan_in)
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if is_lazy(parameter):
                raise ValueError(f"param_groups: {name} is lazy: run the model once first")
            if not parameter.requires_grad:
                continue
            rule = _rule(module, key, parameter, width)
            if f"{name}.{key}".lstrip(".") in exempt:
                rule = _Rule(rule.role, rule.scale, False)
            # Optimizers that work on a whole group at once do not take DTensors beside others.
            place = (rule, hasattr(parameter, "placements"))
            if place not in groups:
                groups[place] = {
                    "params": [],
                    "lr": lr * rule.scale,
                    # AdamW multiplies the decay by the group's rate; undone here.
                    "weight_decay": weight_decay / rule.scale if rule.decay else 0.0,
                    "role": rule.role,
                    "scale": rule.scale,
                }
            groups[place]["params"].append(parameter)
    return list(groups.values())


def _rule(module: nn.Module, key: str, parameter: nn.Parameter, width: float) -> _Rule:
    if isinstance(module, PixelflyLinear):
        return _pixelfly_rule(module, key, width)
    if isinstance(module, nn.Embedding):
        return _Rule("embedding", 1.0, True)
    if parameter.ndim < 2:
        return _Rule("vector")
    return _Rule("weight", width if key == _weight_key(module) else 1.0, True)


def _pixelfly_rule(layer: PixelflyLinear, key: str, width: float) -> _Rule:
    if key == "gate" and layer.gate_kind == "token":
        return _Rule("gate", width)  # a row of K weights
    key = key.removesuffix("_by_column")  # of a row-parallel layer
    if key not in ("blocks", "u", "v"):
        return _Rule("gate" if key.startswith("gate") else "vector")
    if key == "v":
        return _Rule(key, width, True)
    gain = 1.0 if layer.gate is None else 1 / GATE_START
    if key == "blocks":
        gain *= layer.in_features / _mean_kept_inputs(layer)
    return _Rule(key, gain * width, True)


def _mean_kept_inputs(layer: PixelflyLinear) -> float:
    """Returns the mean number of inputs of the block rows that read any."""
    fan_in = kept_fan_in(layer.layout)
    kept = fan_in[fan_in > 0]
    return float(kept.mean()) if len(kept) else float(layer.in_features)


def _weight_key(module: nn.Module) -> str:
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def _fan_in(module: nn.Module) -> int | None:
    """Returns how many inputs each output of a module's weight sums, or None without such."""
    if isinstance(module, (PixelflyLinear, nn.Linear)):
        return module.in_features
    if is_conv1d(module):
        return module.weight.shape[0]
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    if isinstance(module, _ConvNd):
        taps = torch.Size(module.kernel_size).numel()
        return module.in_channels // module.groups * taps
    return None


def _fan_ins(model: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        fan_in = _fan_in(module)
        if fan_in is not None:
            yield name, fan_in


def _width_scale(name: str, module: nn.Module, base: dict[str, int] | None) -> float:
    """Returns μP's factor, the base's number of inputs / this one's."""
    fan_in = _fan_in(module)
    if base is None or fan_in is None:
        return 1.0
    if name not in base:
        raise ValueError(
            f"param_groups: base must have the model's layers, got one without {name!r}; build it "
            "as the model, at the width that lr was found at"
        )
    return base[name] / fan_in


def _exempt(model: nn.Module, no_decay: Iterable[str]) -> set[str]:
    if isinstance(no_decay, str):
        raise TypeError("param_groups: no_decay must be names in a list or set, got a str")
    names, known = set(no_decay), {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := sorted(names - known):
        raise ValueError(f"param_groups: no_decay must name parameters, got {', '.join(unknown)}")
    own = getattr(model, "no_weight_decay", None)
    return names | (set(own()) if callable(own) else set())


def _check(model: nn.Module, lr: float, weight_decay: float, base: nn.Module | None) -> None:
    for name, value, kind in (("model", model, nn.Module), ("base", base, nn.Module)):
        if not isinstance(value, kind) and not (name == "base" and value is None):
            raise TypeError(f"param_groups: {name} must be a Module, got {type(value).__name__}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"param_groups: {name} must be a number, got {type(value).__name__}")
        if not 0 <= value < float("inf") or (name == "lr" and value == 0):
            bound = "above 0" if name == "lr" else "0 or above"
            raise ValueError(f"param_groups: {name} must be {bound} and finite, got {value}")
