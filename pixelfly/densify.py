"""Turns Pixelfly layers back into dense ones, for export.

`torch.export` and AOTInductor take Pixelfly layers as they are. A program that loads what they
wrote needs the operators: in Python `import pixelfly`, or `torch.ops.load_library` with the path
`pixelfly._C.__file__` alone. That library holds the CUDA kernels; those of the CPU are Python. It
is a Python module too, so a program in C++ must first load libpython, with RTLD_GLOBAL.

ONNX has no such operator, and neither has C++ on the CPU: there, export a dense copy,
`densify_(copy.deepcopy(model))`.
"""

from __future__ import annotations

import torch
from torch import nn

from .convert_attention import restore_attention
from .convert_blocks import restore_blocks
from .nn.attention import PixelflySelfAttention
from .nn.causal_loss import restore_loss
from .nn.dense import check_not_parallel, is_conv1d
from .nn.linear import PixelflyLinear
from .nn.mlp import PixelflyMLP
from .ops.activations import ACTIVATIONS, apply_activation


class DenseMLP(nn.Module):
    """`second(act(first(x)))` under the names of the `PixelflyMLP` that it replaces."""

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        names: tuple[str, str],
        activations: tuple[str | None, str | None],
    ) -> None:
        super().__init__()
        self.names, self.activations = names, activations
        self.add_module(names[0], first)
        self.add_module(names[1], second)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        for name, activation in zip(self.names, self.activations, strict=True):
            x = apply_activation(getattr(self, name)(x), ACTIVATIONS[activation])
        return x if residual is None else x + residual


def densify_(model: nn.Module) -> list[str]:
    """Replaces every `PixelflyLinear` by the dense layer with the same weight, in place.

    The dense layers keep the names and, where `sparsify_` made the Pixelfly ones, the type of the
    layers they once were (`Conv1D` in transformers' GPT-2), so the state dict is again what the
    model's library saves and loads; nothing of pixelfly is needed to run it. The weight is computed
    in float32 and rounded once to the layer's dtype. An attention that `sparsify_` converted
    becomes its library's again, which computes all scores: its outputs are then other ones.

    Args:
        model: any module; must not be a Pixelfly layer itself.

    Returns:
        The names of the layers that became dense, then those of the attentions.

    Raises:
        TypeError: `model` is not a module, or is itself a Pixelfly layer.
        ValueError: a layer has a token gate or, outside a `PixelflyMLP`, a fused activation: no
            single dense layer does what it does; or the model is wrapped in
            DistributedDataParallel or sharded. Nothing was changed then.

    Example:
        >>> import pixelfly
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.GELU())
        >>> _ = pixelfly.sparsify_(model, pixelfly.PixelflyConfig(block_size=16))
        >>> x = torch.randn(2, 256)
        >>> y = model(x)
        >>> densify_(model)
        ['0']
        >>> torch.allclose(model(x), y, atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"densify_: model must be a Module, got {type(model).__name__}")
    check_not_parallel(model, "densify_")
    if isinstance(model, PixelflyLinear | PixelflyMLP | PixelflySelfAttention):
        raise TypeError(
            f"densify_: model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; use the to_dense of the module or of its layers"
        )
    inside = {
        id(layer): module
        for module in model.modules()
        if isinstance(module, PixelflyMLP)
        for layer in module.children()
    }
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PixelflyLinear)}
    for name, layer in layers.items():
        if layer.gate_kind == "token":
            raise ValueError(f"densify_: {name} has gate='token', a weight for every token")
        if layer.activation is not None and id(layer) not in inside:
            raise ValueError(
                f"densify_: {name} has the activation {layer.activation!r} fused into it, which a "
                "dense layer has not; set its `activation` to None and apply it after the layer"
            )
    dense = {id(layer): _dense(layer) for layer in layers.values()}
    mlps: dict[int, DenseMLP] = {}
    for module in model.modules():
        if isinstance(module, PixelflyMLP):
            parts = [getattr(module, name) for name in module.names]
            mlps[id(module)] = DenseMLP(
                *(dense[id(part)] for part in parts),
                module.names,
                tuple(part.activation for part in parts),
            ).train(module.training)
    new = dense | mlps
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    restore_blocks(model)
    restore_loss(model)
    return [*layers, *restore_attention(model)]


@torch.no_grad()
def _dense(layer: PixelflyLinear) -> nn.Module:
    linear = layer.to_dense()
    linear.weight.requires_grad_(layer.blocks.requires_grad)
    if layer.bias is not None:
        linear.bias.requires_grad_(layer.bias.requires_grad)
    if layer.dense_type is nn.Linear:
        return linear
    n, k = linear.weight.shape
    # transformers' Conv1D: the weight lies transposed, and there is always a bias.
    module = layer.dense_type(n, k)
    assert is_conv1d(module)
    module.weight = nn.Parameter(linear.weight.T.contiguous(), linear.weight.requires_grad)
    module.bias = linear.bias
    return module.train(layer.training)
