"""transformers' GPT-2 block with fewer passes over its activations."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .blocks import add_and_norm, add_mlp
from .dense import replace_forward, restore_forward

# By the class that defines the forward: a subclass may do something else.
_KNOWN = ("transformers.models.gpt2.modeling_gpt2", "GPT2Block")


def is_gpt2_block(module: nn.Module) -> bool:
    """Tells transformers' `GPT2Block`, without importing it.

    Example:
        >>> is_gpt2_block(nn.Linear(8, 8))
        False
    """
    return (type(module).__module__, type(module).__name__) == _KNOWN


def fuse_gpt2_block(block: nn.Module) -> None:
    """Joins the addition that ends the attention's path with the norm behind it, in place.

    The block keeps its class, which transformers asks for (recorded outputs), and its hooks.
    Cross-attention and gradient checkpointing are the class's own.
    """
    _arguments[type(block)] = tuple(inspect.signature(type(block).forward).parameters)[2:]
    replace_forward(block, _forward)


def restore_gpt2_block(block: nn.Module) -> None:
    """Undoes `fuse_gpt2_block`; other modules stay as they are."""
    restore_forward(block, _forward)


# The positional arguments behind `self` and `hidden_states`: their names depend on the version.
_arguments: dict[type[nn.Module], tuple[str, ...]] = {}


def _arguments_of(cls: type[nn.Module]) -> tuple[str, ...]:
    for base in cls.__mro__:  # FSDP2 derives a class of its own from a module's
        if base in _arguments:
            return _arguments[base]
    raise TypeError(f"fuse_gpt2_block has not seen {cls.__name__}")


def _forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    options = dict(zip(_arguments_of(type(self)), args, strict=False)) | kwargs
    crossed = options.pop("encoder_hidden_states", None) is not None
    # New versions checkpoint in the class's forward, earlier ones around it.
    if crossed or (self.training and getattr(self, "gradient_checkpointing", False)):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    options.pop("encoder_attention_mask", None)
    part = self._modules
    y, x = add_and_norm(part["ln_1"], hidden_states, None)
    y = part["attn"](y, **options)[0]
    y, x = add_and_norm(part["ln_2"], x, y)
    return add_mlp(x, part["mlp"], y)
