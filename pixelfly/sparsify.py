"""Converts the linear layers of a model, and its attention, to Pixelfly layers, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .convert_attention import attention_config, convert_attention
from .convert_blocks import fuse_blocks
from .convert_loss import fuse_losses
from .known import KNOWN_MLPS, module_places, reads_weight, turn_off_fast_paths
from .masks import BLOCK_SIZES, BlockLayout
from .masks.layout import is_int
from .nn.attention import AttentionConfig
from .nn.choice import LOWRANK_FORMS, Choice, choose
from .nn.dense import (
    check_not_parallel,
    dense_parameters,
    has_hooks,
    is_conv1d,
    match_activation,
)
from .nn.linear import GATES, PixelflyLinear
from .nn.mlp import PixelflyMLP
from .nn.project import fitted_layout
from .nn.split import fitted_split
from .report import LayerReport, Report, SkippedLayer

FilterFn = Callable[[nn.Module, str], bool]

# Which layers the published models made sparse, by the last parts of their names.
PRESETS: dict[str, tuple[str, ...]] = {
    "vit": ("attn.qkv", "mlp.fc1", "mlp.fc2"),
    "mixer": ("mlp_channels.fc1", "mlp_channels.fc2"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
}


@dataclass(frozen=True)
class PixelflyConfig:
    """How `sparsify_` converts a layer.

    Args:
        density: weights of the layer / weights of the dense layer, low rank included, in (0, 1].
            None leaves it to `max_stride` and `rank`.
        block_size: b, 16, 32, 64 or 128.
        rank: width of the low-rank term; 0 is none, None picks it (see `pixelfly.nn.choose`).
        lowrank: "factored" or "global".
        max_stride: fixes the butterfly's stride, a power of two.
        gate: None, "scalar" or "token".
        init: "scratch" draws fresh weights with the variance that the dense weight has, which
            keeps what the model's own initialisation meant (GPT-2's scaled projections, layers that
            start at zero); "project" keeps the function as well as the structure can, for trained
            weights. Both copy the bias.
        projection_iterations: how often init="project" fits low rank and blocks to each other at
            most; 0 is the one-shot answer.
        pattern: "butterfly", or "fitted" with init="project": blocks where each weight needs them
            most (see `pixelfly.nn.fitted_layout`). With a density alone (no rank, stride or gate)
            each weight also gets its best split between blocks and low rank (see
            `pixelfly.nn.fitted_split`); else it has as many blocks as the butterfly.
        fuse_mlp: puts a `PixelflyMLP` in place of timm's `Mlp` and GPT-2's MLP, where both layers
            are converted and dropout is 0.
        recompute_mlp: fused MLPs keep their input alone for the backward, which runs their forward
            again: less memory for a little more time.
        fuse_blocks: runs timm's ViT and Mixer blocks and transformers' GPT-2 blocks with fewer
            passes over activations: residual additions within the norms' kernels, the MLP over a
            Mixer's tokens (it stays dense) without transposing copies, one copy for the gradients
            of q, k and v, or none (a sparse qkv layer on Hopper, 16 bits); there also
            `pixelfly.ops.short_attention` where it has kernels; the patch embedding in front of the
            blocks as a matrix product.
        fuse_loss: in training, with labels, transformers' GPT-2 computes its loss by
            `pixelfly.ops.linear_cross_entropy`: the answer's `logits` are None then.
        attention: a `pixelfly.nn.AttentionConfig` makes timm's `Attention` and GPT-2's compute
            these blocks of the scores only, whichever linear layers are converted; None leaves
            them. Their dropout of attention weights must be 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> PixelflyConfig(density=0.25, rank=0).block_size
        64
    """

    density: float | None = 0.25
    block_size: int = 64
    rank: int | None = None
    lowrank: str = "factored"
    max_stride: int | None = None
    gate: str | None = None
    init: str = "scratch"
    projection_iterations: int = 50
    pattern: str = "butterfly"
    fuse_mlp: bool = False
    recompute_mlp: bool = False
    fuse_blocks: bool = False
    fuse_loss: bool = False
    attention: AttentionConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", attention_config(self.attention))
        if self.recompute_mlp and not self.fuse_mlp:
            raise ValueError("recompute_mlp=True needs fuse_mlp=True, got fuse_mlp=False")
        # What depends on a layer's size is found when the layer is converted.
        if self.density is not None:
            if not isinstance(self.density, (int, float)) or isinstance(self.density, bool):
                raise TypeError(f"density must be a number or None, got {self.density!r}")
            if not 0 < self.density <= 1:
                raise ValueError(f"density must be in (0, 1] or None, got {self.density}")
        if not is_int(self.block_size) or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be 16, 32, 64 or 128, got {self.block_size!r}")
        if self.lowrank not in LOWRANK_FORMS:
            raise ValueError(f"lowrank must be 'factored' or 'global', got {self.lowrank!r}")
        if self.gate not in GATES:
            raise ValueError(f"gate must be None, 'scalar' or 'token', got {self.gate!r}")
        if self.gate is not None and (self.lowrank != "factored" or self.rank == 0):
            raise ValueError(f"gate={self.gate!r} needs lowrank='factored' and a rank above 0")
        if self.init not in ("scratch", "project"):
            raise ValueError(f"init must be 'scratch' or 'project', got {self.init!r}")
        if not isinstance(self.projection_iterations, int) or self.projection_iterations < 0:
            raise ValueError(
                "projection_iterations must be a non-negative int, got "
                f"{self.projection_iterations!r}"
            )
        if self.pattern not in ("butterfly", "fitted"):
            raise ValueError(f"pattern must be 'butterfly' or 'fitted', got {self.pattern!r}")
        if self.pattern == "fitted" and (self.init != "project" or self.lowrank != "factored"):
            raise ValueError(
                "pattern='fitted' follows the dense weights, so it needs init='project' and "
                f"lowrank='factored', got init={self.init!r}, lowrank={self.lowrank!r}"
            )
        if self.rank is not None and (not is_int(self.rank) or self.rank < 0):
            raise ValueError(f"rank must be a non-negative int or None, got {self.rank!r}")
        if self.lowrank == "global" and self.rank and self.rank % self.block_size:
            raise ValueError(
                f"rank must be a multiple of block_size={self.block_size} with lowrank='global', "
                f"got {self.rank}"
            )
        stride = self.max_stride
        if stride is not None and (not is_int(stride) or stride < 1 or stride & (stride - 1)):
            raise ValueError(f"max_stride must be a power of two or None, got {stride!r}")
        if None not in (self.density, self.max_stride, self.rank):
            raise ValueError(
                "density, max_stride and rank cannot all be given: two fix the third (density is "
                "0.25 unless set to None)"
            )

    def for_layer(self, name: str) -> PixelflyConfig:
        """Returns itself: every layer is converted alike."""
        return self

    def choose(self, out_features: int, in_features: int) -> Choice:
        """Returns the layout and rank of a layer; raises ValueError where there is none."""
        return choose(
            out_features,
            in_features,
            block_size=self.block_size,
            density=self.density,
            max_stride=self.max_stride,
            rank=self.rank,
            lowrank=self.lowrank,
        )


@runtime_checkable
class LayerConfigs(Protocol):
    """A config for each layer: what `pixelfly.budget.Plan` is."""

    like: PixelflyConfig

    def for_layer(self, name: str) -> PixelflyConfig | None: ...
    def check(self, model: nn.Module) -> None: ...


def sparsify_(
    model: nn.Module,
    config: PixelflyConfig | LayerConfigs | None = None,
    filter_fn: FilterFn | str | None = None,
) -> Report:
    """Replaces a model's `nn.Linear` and `Conv1D` (transformers) by `PixelflyLinear`, in place.

    Build the optimizer, wrap and shard afterwards: the parameters are new ones. A layer that cannot
    be converted stays dense and is listed in the report with its reason. A module used in several
    places is converted once; a layer whose weight another module holds too (GPT-2's head and
    embedding) stays dense, so that the two stay tied.

    Args:
        model: any module that contains linear layers; must not be one itself.
        config: how to convert; None is `PixelflyConfig()`. A `pixelfly.budget.Plan` says it for
            each layer by itself and chooses the layers.
        filter_fn: `filter_fn(module, name) -> bool` says which layers to convert; None is all.
            A name in `pixelfly.sparsify.PRESETS` ("vit", "mixer", "gpt2") takes the layers that the
            published models made sparse.

    Returns:
        The report: per layer its shape, layout, rank, parameters before and after, and MACs per
        token. Prints as a table.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `filter_fn` names no preset, the plan is another model's, or the model is
            wrapped in DistributedDataParallel or sharded. Nothing was changed then.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 10))
        >>> report = sparsify_(model, PixelflyConfig(density=0.25, block_size=32))
        >>> type(model[0]).__name__, type(model[2]).__name__
        ('PixelflyLinear', 'Linear')
        >>> report.skipped[0].reason
        'out_features must be a positive multiple of 8, got 10'
    """
    config = PixelflyConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify_: model must be a Module, got {type(model).__name__}")
    planned = isinstance(config, LayerConfigs)
    if not planned and not isinstance(config, PixelflyConfig):
        raise TypeError(
            "sparsify_: config must be a PixelflyConfig or a Plan, got " + type(config).__name__
        )
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise TypeError(
            "sparsify_: model is itself a linear layer, which cannot be replaced in place; use "
            "PixelflyLinear.from_dense"
        )
    check_not_parallel(model, "sparsify_")
    if planned:
        config.check(model)
    wanted = _filter(filter_fn)
    conversion = _Conversion(model)
    for name, module in list(model.named_modules()):
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and wanted(module, name):
            layer_config = config.for_layer(name)
            if layer_config is not None:
                conversion.convert(module, name, layer_config)
    common = config.like if planned else config
    if common.fuse_mlp:
        conversion.fuse_mlps(common.recompute_mlp)
    if common.attention is not None:
        convert_attention(model, common.attention, module_places(model), conversion.report)
    if common.fuse_blocks:
        fuse_blocks(model, module_places(model), conversion.report)
    if common.fuse_loss:
        fuse_losses(model, conversion.report)
    return conversion.finish()


def find_obstacles(model: nn.Module, filter_fn: FilterFn | str | None) -> dict[str, str]:
    """Returns, by name, the linear layers that `sparsify_` would leave dense, and why."""
    wanted, conversion = _filter(filter_fn), _Conversion(model)
    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            if module is model:
                reason = "it is the model itself, which cannot be replaced in place"
            elif not wanted(module, name):
                reason = "not chosen by filter_fn"
            else:
                reason = conversion.obstacle(module, name)
            if reason is not None:
                reasons[name] = reason
    return reasons


def _filter(filter_fn: FilterFn | str | None) -> FilterFn:
    if filter_fn is None:
        return lambda module, name: True
    if isinstance(filter_fn, str):
        if filter_fn not in PRESETS:
            names = ", ".join(map(repr, PRESETS))
            raise ValueError(f"sparsify_: filter_fn must be one of {names}, got {filter_fn!r}")
        endings = PRESETS[filter_fn]
        return lambda module, name: ("." + name).endswith(tuple("." + e for e in endings))
    if not callable(filter_fn):
        raise TypeError(
            "sparsify_: filter_fn must be a function of (module, name), a preset's name or None, "
            f"got {type(filter_fn).__name__}"
        )
    return filter_fn


class _Conversion:
    """One run of `sparsify_` over a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report(params_before=_count(model))
        # Every place, name and holder, of shared modules and parameters too.
        self.places = module_places(model)
        self.module_names: dict[int, list[str]] = {}
        self.holders: dict[int, set[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.module_names.setdefault(id(module), []).append(name)
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), set()).add(name)

    def convert(self, module: nn.Module, name: str, config: PixelflyConfig) -> None:
        reason = self.obstacle(module, name)
        if is_conv1d(module):
            k, n = module.weight.shape
        else:
            k, n = module.in_features, module.out_features
        if reason is None and config.init == "project" and module.weight.is_meta:
            reason = "its weight is on the meta device, so init='project' has nothing to project"
        if reason is None:
            try:
                choice = config.choose(n, k)
                if config.gate and choice.factored_rank == 0:
                    reason = f"gate={config.gate!r} needs a low rank, and none fits"
                elif choice.density >= 1:
                    reason = "not smaller than the dense layer"
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            self.report.skipped.append(SkippedLayer(name, k, n, reason))
            return
        layer, error = self.make_layer(module, config, choice)
        for parent, key in self.places[id(module)]:
            parent._modules[key] = layer
        also = self.module_names[id(module)][1:]
        notes = [choice.note, f"shared with {', '.join(also)}" if also else ""]
        note = "; ".join(filter(None, notes))
        self.report.layers.append(LayerReport.of(name, layer, _count(module), note, error))

    def obstacle(self, module: nn.Module, name: str) -> str | None:
        """Returns why a layer must stay dense whatever the config, or None."""
        if nn.utils.parametrize.is_parametrized(module):
            return "its parameters are parametrized"
        if is_lazy(module.weight):
            return "a lazy layer without features yet: run the model once first"
        if type(module) is not nn.Linear and not is_conv1d(module):
            return f"{type(module).__name__} is a subclass of nn.Linear that may do something else"
        for parameter in module.parameters():
            others = sorted(self.holders[id(parameter)] - {name})
            if others:
                return f"its weights are tied to {', '.join(others)}"
        if has_hooks(module):
            return "it has hooks, which a new layer would lose"
        for parent, key in self.places[id(module)]:
            # Such a forward would not call the new layer (timm's BEiT, transformers' T5).
            if reads_weight(type(parent), key):
                return f"{type(parent).__name__}.forward reads its weight instead of calling it"
        if not module.weight.is_floating_point():
            return f"its weight is {module.weight.dtype}"
        return None

    def make_layer(
        self, module: nn.Module, config: PixelflyConfig, choice: Choice
    ) -> tuple[PixelflyLinear, float | None]:
        """Returns the new layer and, if it was projected, its relative error."""
        weight, bias = dense_parameters(module)
        error = None
        project = config.init == "project"
        sizes = {"block_size": config.block_size, "max_stride": config.max_stride}
        sizes |= {"density": config.density, "rank": config.rank}
        if project and config.pattern == "fitted":
            layout, rank = _fitted(weight, config, choice)
            sizes = {"layout": layout, "rank": rank}
        layer = PixelflyLinear(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            **sizes,
            lowrank=config.lowrank,
            gate=config.gate,
            device="meta",
            dtype=weight.dtype,
        )
        layer = layer.to_empty(device=weight.device)
        # A fitted layout is given as it is: what was asked for is written down for the report.
        layer.choice = replace(layer.choice, requested=choice.requested)
        layer.dense_type = type(module)
        with torch.no_grad():
            if project:
                error = layer.copy_dense_(weight, bias, iterations=config.projection_iterations)
            else:
                if not weight.is_meta:
                    layer.init_std = weight.float().square().mean().sqrt().item()
                layer.reset_parameters()
                if bias is not None:
                    layer.bias.copy_(bias)
        for parameter in (layer.blocks, layer.u, layer.v, layer.gate, layer.gate_bias):
            if parameter is not None:
                parameter.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(module.training), error

    def fuse_mlps(self, recompute: bool) -> None:
        """Puts a PixelflyMLP in the place of known MLPs whose two layers are converted."""
        places = module_places(self.model)
        for name, module in list(self.model.named_modules()):
            mlp = KNOWN_MLPS.get((type(module).__module__, type(module).__name__))
            if mlp is None:
                continue
            layers = [getattr(module, n) for n in mlp.names]
            if not all(isinstance(layer, PixelflyLinear) for layer in layers):
                continue
            activation, reason = match_activation(module.act), mlp.obstacle(module)
            if activation is None:
                reason = f"its activation {type(module.act).__name__} is not one of the operator's"
            elif id(module) not in places:
                reason = "it is the model itself, which cannot be replaced in place"
            elif any(len(places[id(layer)]) > 1 for layer in layers):
                reason = "one of its layers is used elsewhere too"
            if reason is not None:
                self.report.notes.append(f"{name}: MLP not fused: {reason}")
                continue
            layers[0].activation = activation
            fused = PixelflyMLP.from_layers(*layers, mlp.names, recompute).train(module.training)
            for parent, key in places[id(module)]:
                parent._modules[key] = fused
            self.report.fused.append(name)

    def finish(self) -> Report:
        turn_off_fast_paths(self.model)
        self.report.params_after = _count(self.model)
        return self.report


def _fitted(
    weight: torch.Tensor, config: PixelflyConfig, choice: Choice
) -> tuple[BlockLayout, int]:
    """Returns the layout and the rank that pattern="fitted" gives a weight."""
    if (config.rank, config.max_stride, config.gate) == (None, None, None) and config.density:
        return fitted_split(weight, config.density * weight.numel(), config.block_size)
    rank = choice.factored_rank
    return fitted_layout(weight, choice.layout.nnz, rank, config.block_size), rank


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not is_lazy(p))
