"""Other people's block-sparse products on one pattern: no low rank, no bias, forward alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case


def forward_peers(
    case: Case, dtype: torch.dtype, device: str, xs: list[torch.Tensor]
) -> dict[str, Callable[[int], torch.Tensor]]:
    """Returns name -> callable of the buffer-set index.

    torch_bsr: `F.linear` with a BSR weight (torch's Triton kernel), as it is tuned out of the box.
    torch_bsr_tuned: the same after torch's own tuner has looked at this shape.
    gather_bmm: index the blocks of x, one batched matmul (layouts with equally long rows).
    stk: the block-sparse kernels of STK, where it is installed (blocks of 128 only).
    """
    layout, size = case.layout(), case.block_size
    weight = torch.randn(case.out_features, case.in_features, device=device, dtype=dtype)
    weight *= layout.to_dense().to(device)
    bsr = weight.to_sparse_bsr((size, size))
    peers = {"torch_bsr": lambda i: F.linear(xs[i], bsr)}
    if device == "cuda":
        tuned = _tuned_bsr(bsr, xs)
        if tuned is not None:
            peers["torch_bsr_tuned"] = tuned

    rows, cols = layout.grid.shape
    index = [layout.grid[r].nonzero().flatten() for r in range(rows)]
    if len({len(c) for c in index}) == 1:
        columns = torch.stack(index).to(device)
        packed = torch.randn(rows, columns.shape[1] * size, size, device=device, dtype=dtype)

        def gather_bmm(i: int) -> torch.Tensor:
            tiles = xs[i].view(-1, cols, size)[:, columns]  # [T, rows, per row, b]
            return torch.bmm(tiles.flatten(2).transpose(0, 1), packed)

        peers["gather_bmm"] = gather_bmm
    try:
        import stk
    except ImportError:
        return peers
    if size == 128:
        sparse = stk.ops.to_sparse(weight, 128)
        peers["stk"] = lambda i: stk.ops.dds(xs[i], sparse.t())
    return peers


def _tuned_bsr(bsr: torch.Tensor, xs: list[torch.Tensor]) -> Callable[[int], torch.Tensor] | None:
    """`bsr_dense_addmm` with tuned launch parameters; None where torch has no such tuner."""
    try:
        from torch.sparse._triton_ops import bsr_dense_addmm
        from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm
    except ImportError:
        return None
    bias = torch.zeros(bsr.shape[0], xs[0].shape[0], device=bsr.device, dtype=bsr.dtype)
    columns = [x.detach().t() for x in xs]
    try:
        meta = tune_bsr_dense_addmm(bias, bsr, columns[0], beta=0)
    except Exception as error:  # private code of torch: a peer that cannot be tuned is left out
        print(f"torch_bsr_tuned: {type(error).__name__}: {error}")
        return None
    return lambda i: bsr_dense_addmm(bias, bsr, columns[i], beta=0, meta=meta)
