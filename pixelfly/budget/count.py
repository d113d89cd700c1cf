"""Counts what a model computes, operator by operator, and says which module asked for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from ..nn.linear import PixelflyLinear
from .as_cuda import AsCUDA
from .operators import CONVOLUTIONS, MOVED, is_matmul, matmul, moved
from .rate import Work, add


@dataclass
class Tally:
    """What ran inside one module, its children not included.

    Attributes:
        macs: multiply-accumulates of matmuls, convolutions and attention in the forward; of
            `butterfly_attention`, those of its kept blocks.
        works: work by the kind of its rate (see `CostModel`). Matmuls ("dense", "unaligned") and
            "attention" count in the forward alone; convolutions and operators that only move
            bytes ("pointwise", "mixed", "normalization", "reduction", "strided") also in the
            backward, all of which counts under the model itself, "".
    """

    macs: int = 0
    works: dict[str, Work] = field(default_factory=dict)


def count(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    fake: bool = True,
) -> dict[str, Tally]:
    """Runs a model's forward once, and its backward if asked, and returns what modules computed.

    The run is on fake tensors: nothing is computed, and no memory is taken for activations. The
    operators are the CPU's, with CUDA's dropout, attention (`butterfly_attention` too is one
    operator) and list of what autocast runs in float32. Matmuls that a checkpoint computes again in
    the backward do not count.

    Args:
        model: any module; its state does not change, but for `fake=False`, with which buffers and
            random numbers move on as in any forward.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: run the backward too, from the first scalar that the model returns or else from
            its first tensor, to all parameters.
        dtype: cast floating-point state and inputs to it, or None; needs `fake`.
        autocast: the dtype of an autocast region around the forward, or None.
        fake: False runs the model for real, which models need whose Python looks at values; all
            operators are then the device's, those inside of `butterfly_attention` too.

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
    if not fake:
        args, kwargs = _arguments(example_inputs)
        leaves = [p for p in model.parameters() if p.requires_grad]
        device = next(iter(leaves), torch.empty(0)).device.type
        _run(counter, functools.partial(model, *args, **kwargs), leaves, device, training, autocast)
        return counter.tallies

    def like(t: torch.Tensor) -> torch.Tensor:
        kept = dtype is None or not t.is_floating_point()
        return torch.empty(t.shape, dtype=t.dtype if kept else dtype, device="cpu")

    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # All on the CPU, wherever the model is: one choice of operators.
        parameters, buffers, example_inputs = tree_map_only(
            torch.Tensor, like, (parameters, buffers, example_inputs)
        )
    leaves = [p.requires_grad_() for p in parameters.values() if p.is_floating_point()]
    args, kwargs = _arguments(example_inputs)
    call = functools.partial(
        torch.func.functional_call, model, {**parameters, **buffers}, args, kwargs
    )
    try:
        with mode:
            _run(counter, call, leaves, "cpu", training, autocast, AsCUDA(counter.attended))
    except Exception as error:
        raise RuntimeError(
            f"count: {type(model).__name__} did not run on fake tensors of the example inputs "
            f"({type(error).__name__}: {error}); if it looks at values, use fake=False, which "
            "runs it for real"
        ) from error
    return counter.tallies


def _run(
    counter: _Counter,
    call: functools.partial,
    leaves: list[torch.Tensor],
    device: str,
    training: bool,
    autocast: torch.dtype | None,
    functions: Any = None,
) -> None:
    """Calls the model under the counter, and autograd on what it returns."""
    cast = torch.autocast(device, autocast) if autocast else nullcontext()
    with torch.set_grad_enabled(training), _without_fused_layers():
        with counter.hooks(), counter, cast, functions or nullcontext():
            out = call()
        tensors = [t for t in tree_iter(out) if isinstance(t, torch.Tensor) and t.requires_grad]
        target = next((t for t in tensors if t.numel() == 1), tensors[0] if tensors else None)
        if target is None or not leaves:
            return
        gradient = torch.ones_like(target)
        counter.backward = True
        with counter, functions or nullcontext():
            # .grad stays as it is: what accumulates there was not there before. torch.autograd.grad
            # would put `functions` away, but a checkpoint's forward, which runs here again, must
            # choose the same operators.
            _engine_run_backward(
                (target,), (gradient,), False, False, tuple(leaves), True, accumulate_grad=False
            )


@functools.lru_cache(maxsize=256)
def beside_matmuls(
    k: int,
    n: int,
    tokens: int,
    bias: bool,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    training: bool,
) -> dict[str, Work]:
    """Returns what weight and bias of a dense layer move beside its matmuls: sums, casts."""
    with torch.device("meta"):
        layer = nn.Linear(k, n, bias, dtype=dtype)
        x = torch.empty(tokens, k, dtype=autocast or dtype)
    tallies = count(layer, x, training=training, autocast=autocast)
    works: dict[str, Work] = {}
    for tally in tallies.values():
        add(works, {kind: work for kind, work in tally.works.items() if kind in MOVED})
    return works


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Makes torch's transformer layers call their linear layers in evaluation too, and the CPU's
    LSTM, one operator of oneDNN else, run as matmuls."""
    # Not torch.backends.mkldnn.flags, which sets the precision of float32 too, with a warning.
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch._C._set_mkldnn_enabled(before[1])


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
    backward: bool = False

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
                # By what the layer keeps: blocks at the edge hold more.
                tally = self._tally()
                tokens = args[0].numel() // module.in_features
                weights = module.choice.block_weights + module.choice.lowrank_weights
                features = module.in_features + module.out_features
                moved = (tokens * features + weights) * args[0].element_size()
                tally.macs += tokens * weights
                add(tally.works, {"dense": Work(2 * tokens * weights, moved)})

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

    def attended(self, macs: int, work: Work) -> None:
        """Tallies attention over a layout, which `AsCUDA` reports."""
        if not self.backward:
            tally = self._tally()
            tally.macs += macs
            add(tally.works, {"attention": work})

    def _tally(self) -> Tally:
        name = self.names[id(self.stack[-1])] if self.stack else ""
        return self.tallies.setdefault(name, Tally())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        multiplies = is_matmul(func._overloadpacket)
        if not multiplies:
            with self:  # composite operators hide matmuls
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if self.stack and isinstance(self.stack[-1], PixelflyLinear):
            return out
        if not multiplies:
            if works := moved(func, args, kwargs, out):
                add(self._tally().works, works)
            return out
        kind, macs, work = matmul(func, args, kwargs, out)
        if kind in CONVOLUTIONS or not self.backward:
            tally = self._tally()
            tally.macs += 0 if self.backward else macs
            add(tally.works, {kind: work})
        return out
