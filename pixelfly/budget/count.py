"""Counts what a model computes, operator by operator, and says which module asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..nn.linear import PixelflyLinear

_aten = torch.ops.aten
# torch's counter knows the attention of GPUs alone; the CPU's computes the same.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
}
_FREE = {_aten._unsafe_view, _aten.lift_fresh, _aten.detach, _aten.alias}  # move nothing


@dataclass
class Tally:
    """What ran inside one module, its children not included.

    Attributes:
        macs: multiply-accumulates of matmuls, convolutions and attention.
        matmul_bytes: what those read and wrote.
        matmuls: how many of them ran.
        pointwise_bytes: what all other operators read and wrote.
        pointwise: how many of those ran.
    """

    macs: int = 0
    matmul_bytes: int = 0
    matmuls: int = 0
    pointwise_bytes: int = 0
    pointwise: int = 0


def count(model: nn.Module, example_inputs: Any, *, fake: bool = True) -> dict[str, Tally]:
    """Runs a model's forward once and returns what every module computed.

    The run is on fake tensors: nothing is computed, and no memory is taken for activations.

    Args:
        model: any module; its state does not change.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        fake: False runs the model for real, which models need whose Python looks at values.

    Returns:
        name of a module -> its tally, for modules that ran anything; a module in several places
        appears under its first name.

    Raises:
        TypeError: `model` is not a Module.
        ValueError: it has lazy parameters.
        RuntimeError: the model does not run on fake tensors; the message says what to do.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> {name: tally.macs for name, tally in count(model, torch.zeros(4, 8)).items()}
        {'0': 512, '1': 0, '2': 512}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count: model must be a Module, got {type(model).__name__}")
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError("count: model has lazy parameters: run it once first")
    counter = _Counter({id(m): name for name, m in reversed(list(model.named_modules()))})
    with torch.no_grad(), _without_fast_path():
        if not fake:
            args, kwargs = _arguments(example_inputs)
            with counter.hooks(), counter:
                model(*args, **kwargs)
            return counter.tallies
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with mode:  # all on the CPU, wherever the model is: one choice of operators
            state, example_inputs = tree_map_only(
                torch.Tensor,
                lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"),
                (state, example_inputs),
            )
        args, kwargs = _arguments(example_inputs)
        try:
            with mode, counter.hooks(), counter:
                torch.func.functional_call(model, state, args, kwargs)
        except Exception as error:
            raise RuntimeError(
                f"count: {type(model).__name__} did not run on fake tensors of the example inputs "
                f"({type(error).__name__}: {error}); if it looks at values, use fake=False, which "
                "runs it for real"
            ) from error
    return counter.tallies


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Makes torch's transformer layers call their linear layers in evaluation too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@dataclass
class _Counter(TorchDispatchMode):
    """Tallies every operator under the innermost module that is running."""

    names: dict[int, str]
    tallies: dict[str, Tally] = field(default_factory=dict)
    stack: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follows which module is running."""

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) not in self.names:
                return
            self.stack.append(module)
            if isinstance(module, PixelflyLinear) and args:
                # torch's counter does not know our operators.
                tally = self._tally()
                tokens = args[0].numel() // module.in_features
                weights = module.choice.block_weights + module.choice.lowrank_weights
                tally.macs += tokens * weights
                features = module.in_features + module.out_features
                tally.matmul_bytes += (tokens * features + weights) * args[0].element_size()
                tally.matmuls += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.stack and self.stack[-1] is module:
                self.stack.pop()

        handles = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tally(self) -> Tally:
        name = self.names[id(self.stack[-1])] if self.stack else ""
        return self.tallies.setdefault(name, Tally())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in _FLOPS and func is not torch.ops.prim.device.default:
            with self:  # composite operators hide matmuls
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        inside = self.stack and isinstance(self.stack[-1], PixelflyLinear)
        if inside or func.is_view or packet in _FREE or func.namespace == "prim":
            return out
        read = (args[1:], kwargs, out) if packet is _aten.embedding else (args, kwargs)
        tally, moved = self._tally(), _bytes((read, out))  # a table is read where it is looked up
        if packet in _FLOPS:
            tally.macs += _FLOPS[packet](*args, **kwargs, out_val=out) // 2
            tally.matmul_bytes += moved
            tally.matmuls += 1
        else:
            tally.pointwise_bytes += moved
            tally.pointwise += 1
        return out


def _bytes(tree: Any) -> int:
    tensors = (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
