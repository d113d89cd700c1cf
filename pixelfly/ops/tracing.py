"""What `torch.compile` is told of functions that it must not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def traced_constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function whose result is a constant of a traced program.

    It is torch.compiler.assume_constant_result without importing dynamo, which would double the
    time `import pixelfly` takes.
    """
    fn._dynamo_marked_constant = True
    return fn


@traced_constant
def exporting() -> bool:
    """torch.compiler.is_exporting(), which dynamo of torch 2.11 takes for true in every trace."""
    return torch.compiler.is_exporting()


@traced_constant
def transformed() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation surround the call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
