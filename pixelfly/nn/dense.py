"""What the conversion must know about dense modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.activations import ACTIVATIONS, apply_activation
from ..ops.dense_linear import dense_linear
from ..ops.device import has_kernels, plain_on_cuda


def has_hooks(module: nn.Module) -> bool:
    """Tells whether a module has hooks, which another one in its place would not run.

    Example:
        >>> has_hooks(nn.Linear(8, 8))
        False
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def call_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns `layer(x)`; a plain `nn.Linear` in eager training under autocast costs less host.

    Example:
        >>> call_linear(nn.Linear(8, 16), torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """
    if (
        type(layer) is not nn.Linear
        or not torch.is_grad_enabled()
        or has_hooks(layer)
        or "forward" in vars(layer)
    ):
        return layer(x)
    weight = layer.weight
    served = (
        plain_on_cuda([x, weight])
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled("cuda")
        and x.dtype == torch.get_autocast_dtype("cuda") != torch.float32
        and has_kernels(x.device)
    )
    return dense_linear(x, weight, layer.bias) if served else layer(x)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Gives one module a forward of its own, `forward(module, ...)`; its class and hooks stay.

    Example:
        >>> layer = nn.Identity()
        >>> replace_forward(layer, double := lambda self, x: 2 * x)
        >>> layer(3), restore_forward(layer, double), layer(3)
        (6, None, 3)
    """
    # Copies are bound anew. Not a method: pickle would look for it by name in the module.
    module.forward = functools.partial(forward, module)


def restore_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Undoes `replace_forward` with this `forward`; other modules stay as they are."""
    own = vars(module).get("forward")
    if isinstance(own, functools.partial) and own.func is forward:
        del module.forward


def check_not_parallel(model: nn.Module, caller: str) -> None:
    """Raises ValueError if processes share the model already, so that replacing layers is too late.

    DistributedDataParallel would not average the new parameters' gradients, without a word.

    Example:
        >>> check_not_parallel(nn.Linear(8, 8), "sparsify_")
    """
    for name, module in model.named_modules():
        kind, where = type(module).__name__, f" in {name!r}" if name else ""
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"{caller}: expected a model before {kind} wraps it, got one{where}; call it "
                "on the module and wrap that afterwards"
            )
        # By name: torch.distributed.tensor would double the time that `import pixelfly` takes.
        if any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{caller}: expected whole parameters, got DTensors{where}; call it before "
                "fully_shard and parallelize_module"
            )


def is_conv1d(module: nn.Module) -> bool:
    """Tells transformers' `Conv1D`, a linear layer with a transposed weight, without importing it.

    Example:
        >>> is_conv1d(nn.Linear(8, 8))
        False
    """
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def dense_parameters(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns a dense layer's weight as `[N, K]` and its bias; raises TypeError for other modules.

    Example:
        >>> weight, bias = dense_parameters(nn.Linear(8, 16))
        >>> weight.shape
        torch.Size([16, 8])
    """
    if is_conv1d(module):
        return module.weight.T, module.bias
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    raise TypeError(
        f"linear must be nn.Linear or transformers' Conv1D, got {type(module).__name__}"
    )


@torch.no_grad()
def match_activation(module: nn.Module) -> str | None:
    """Returns the operator's name of an activation module, or None if the operator lacks it.

    Libraries wrap the same few functions in classes of many names, so what counts is what the
    module computes.

    Example:
        >>> match_activation(nn.GELU(approximate="tanh")), match_activation(nn.Tanh())
        ('gelu_tanh', None)
    """
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 241, dtype=torch.float64, device="cpu")
    try:
        y = module(x.clone())
    except Exception:  # whatever it is, it is not one of ours
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    for name, kind in ACTIVATIONS.items():
        # Closer than the 5e-4 between GELU and its tanh form, wider than float32 constants.
        if name is not None and torch.allclose(y, apply_activation(x, kind), rtol=0, atol=1e-6):
            return name
    return None
