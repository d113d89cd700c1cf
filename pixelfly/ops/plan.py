"""The plan of a layout as an operator argument: a device tensor and a header for the host.

`torch.compile` must neither trace the planner nor upload the plan at every call. So the functions
below are marked as constants of the traced program: dynamo runs them once while tracing, keeps the
tensor as a constant of the graph, and guards on the layout. `BlockLayout` is registered with
`torch.utils._pytree.register_constant`, which makes that guard an equality: layers with equal
layouts share one compiled graph.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .. import _C
from ..masks import BlockLayout
from .device import check_device, thread_blocks
from .tracing import traced_constant

HEADER_SIZE = 245

if not pytree.is_constant_class(BlockLayout):
    pytree.register_constant(BlockLayout)


def named_constants(
    prefix: str, make: Callable[[Any], Any]
) -> tuple[types.SimpleNamespace, Callable[[Any], str]]:
    """Returns a namespace of what `make(key)` made, once a key, and a function from key to name.

    For values that a traced program takes as inputs: `getattr(values, name_of(key))`. Attributes,
    not a dict: dynamo copies a dict's keys when it first meets it and would miss what is made while
    it traces; an attribute it looks up when asked. None is ever dropped: a captured CUDA graph
    holds the addresses, so values must outlive every module and layout that used them.
    """
    values = types.SimpleNamespace()
    names: dict[Any, str] = {}
    lock = threading.Lock()

    @traced_constant
    def name_of(key):
        name = names.get(key)
        if name is None:
            with lock:
                if key not in names:
                    name = f"{prefix}_{len(names)}"
                    setattr(values, name, make(key))
                    names[key] = name
                name = names[key]
        return name

    return values, name_of


class Header(NamedTuple):
    """The scalar fields that open a plan (PlanHeader in csrc/include/pixelfly/schedule.h)."""

    magic: int
    version: int
    size: int
    out_features: int
    in_features: int
    block_size: int
    num_rows: int
    num_cols: int
    nnz: int
    rank: int
    rank_tiles: int
    row_ptr_offset: int
    col_idx_offset: int
    row_idx_offset: int
    col_ptr_offset: int
    t_row_offset: int
    t_block_offset: int
    max_row_blocks: int
    max_col_blocks: int

    @classmethod
    def parse(cls, text: str) -> Header:
        header = cls(*map(int, text.split(maxsplit=len(cls._fields))[: len(cls._fields)]))
        if (header.magic, header.version) != _planner_stamp():
            raise RuntimeError(
                "pixelfly: header was not written by this version's planner; a program exported by "
                "another version must be exported anew"
            )
        return header


@contextlib.contextmanager
def _outside_transforms() -> Iterator[None]:
    """Makes plain tensors with data, whatever the caller is in: exporting, torch.func's levels."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with _disable_current_modes(), torch.inference_mode(False):
        if torch._C._are_functorch_transforms_active():
            with temporarily_clear_interpreter_stack():
                yield
        else:
            yield


@functools.cache
def _planner_stamp() -> tuple[int, int]:
    """Magic number and version of the plans that this build makes and reads."""
    one = np.zeros(1, np.int32)
    magic, version = _C.build_plan(16, 16, 16, 0, one, one)[:2].tolist()
    return magic, version


@functools.cache
def host_plan(layout: BlockLayout, rank: int, balanced_for: int) -> np.ndarray:
    """Returns the planner's int32 array for a layout and a rank, for so many thread blocks."""
    with _outside_transforms():
        rows, cols = (
            torch.as_tensor(index, device="cpu").numpy().astype(np.int32)
            for index in (layout.row_indices, layout.col_indices)
        )
    return _C.build_plan(
        layout.out_features, layout.in_features, layout.block_size, rank, rows, cols, balanced_for
    )


_headers: dict[tuple[BlockLayout, int, torch.device], str] = {}


def _upload(layout: BlockLayout, rank: int, device: torch.device) -> torch.Tensor:
    check_device(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "butterfly_lowrank_mm: the first call with a layout, rank and device uploads the "
            "layout's plan, which a CUDA graph cannot capture; make one warm-up call before the "
            f"capture (layout {layout.out_features}x{layout.in_features}, rank {rank}, {device})"
        )
    # The plan must be a tensor that later calls in other modes can use.
    with _outside_transforms():
        plan = torch.from_numpy(host_plan(layout, rank, thread_blocks(device)).copy()).to(device)
        # The address never changes, so torch.compile's CUDA graphs need not copy the plan at each
        # replay. This is torch._dynamo.mark_static_address(guard=False) without importing dynamo.
        plan._dynamo_static_input_type = "unguarded"
    return plan


# One plan takes tens of KB.
_uploaded, _plan_name = named_constants("plan", lambda key: _upload(*key))


def device_plan(layout: BlockLayout, rank: int, device: torch.device) -> torch.Tensor:
    """Returns the layout's plan as an int32 tensor on `device`, uploaded at the first call."""
    return getattr(_uploaded, _plan_name((layout, rank, device)))


def plan_header(layout: BlockLayout, rank: int, device: torch.device) -> str:
    """Returns the plan's header as the operators take it: integers with spaces between."""
    return _plan_header((layout, rank, device))


@traced_constant
def _plan_header(key: tuple[BlockLayout, int, torch.device]) -> str:
    header = _headers.get(key)
    if header is None:
        layout, rank, device = key
        plan = host_plan(layout, rank, thread_blocks(device))
        header = _headers[key] = " ".join(map(str, plan[:HEADER_SIZE]))
    return header


def layout_sizes(layout: BlockLayout) -> tuple[int, int, int, int]:
    """Returns `(out_features, in_features, block_size, nnz)` as constants of a traced program."""
    return _layout_sizes((layout,))


@traced_constant
def _layout_sizes(key: tuple[BlockLayout]) -> tuple[int, int, int, int]:
    (layout,) = key
    return layout.out_features, layout.in_features, layout.block_size, layout.nnz
