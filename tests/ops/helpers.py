"""Layouts, inputs and the oracle that the operator's tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from pixelfly.masks import BlockLayout
from pixelfly.ops import butterfly_lowrank_mm, butterfly_lowrank_mm_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_SIZES = (16, 32, 64, 128)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
INPUT_NAMES = ("x", "blocks", "u", "v", "bias", "residual")


def xor_grid(rows: int, cols: int) -> torch.Tensor:
    """Returns the flat butterfly on the smaller side, stretched along the larger."""
    size = min(rows, cols)
    i = torch.arange(rows)[:, None] * size // rows
    j = torch.arange(cols)[None, :] * size // cols
    distance = i ^ j
    return distance & (distance - 1) == 0


def named_grids() -> dict[str, torch.Tensor]:
    """Returns small boolean grids, one for each way a layout can be special."""
    ragged = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 1]])
    empty_rows = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]])
    global_ = torch.eye(4, dtype=torch.int64)
    global_[0] = global_[:, 0] = 1
    single = torch.zeros(3, 3, dtype=torch.int64)
    single[1, 2] = 1
    grids = {
        "butterfly": xor_grid(8, 8),
        "wide": xor_grid(2, 6),
        "tall": xor_grid(6, 2),
        "ragged": ragged,
        "empty_rows": empty_rows,
        "empty_columns": empty_rows.t().contiguous(),
        "full": torch.ones(3, 2),
        "single_block": single,
        "global": global_,
        "no_blocks": torch.zeros(2, 3),
    }
    return {name: grid.bool() for name, grid in grids.items()}


def make_layout(grid: torch.Tensor, block_size: int, tail: tuple[int, int] = (0, 0)) -> BlockLayout:
    """Returns a layout whose last block row and column stick out by `tail` features."""
    rows, cols = grid.shape
    return BlockLayout.from_grid(
        grid, block_size, rows * block_size - tail[0], cols * block_size - tail[1]
    )


@dataclass
class Call:
    """One call of the operator: a layout, float64 inputs and options."""

    layout: BlockLayout
    inputs: dict[str, torch.Tensor]
    activation: str | None = None
    dy: torch.Tensor | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        return self.inputs["u"].shape[1] if "u" in self.inputs else 0

    def to(self, dtype: torch.dtype, device: str | None = None) -> Call:
        def cast(t):
            return None if t is None else t.to(dtype=dtype, device=device)

        inputs = {name: cast(t) for name, t in self.inputs.items()}
        return Call(self.layout, inputs, self.activation, cast(self.dy))

    def run(self, fn=butterfly_lowrank_mm, needs=INPUT_NAMES) -> dict[str, torch.Tensor]:
        """Returns y and, if `dy` is set, the gradients of the inputs named in `needs`."""
        inputs = {
            name: t.detach().clone().requires_grad_(self.dy is not None and name in needs)
            for name, t in self.inputs.items()
        }
        options = dict(inputs)
        x, blocks = options.pop("x"), options.pop("blocks")
        y = fn(x, blocks, self.layout, activation=self.activation, **options)
        results = {"y": y.detach()}
        if self.dy is not None:
            wanted = {name: t for name, t in inputs.items() if t.requires_grad}
            grads = torch.autograd.grad(y, list(wanted.values()), self.dy)
            results |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
        return results


def make_call(
    layout: BlockLayout,
    *,
    tokens: int | tuple[int, ...] = 7,
    rank: int = 0,
    bias: bool = True,
    activation: str | None = None,
    residual: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> Call:
    """Returns a call with random inputs of about unit scale, rounded to `dtype`."""
    lead = (tokens,) if isinstance(tokens, int) else tokens
    n, k, b = layout.out_features, layout.in_features, layout.block_size
    work = torch.float64 if device == "cpu" else torch.float32

    def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=work) * scale).to(dtype)

    per_row = max(1.0, layout.nnz / max(1, layout.grid.shape[0])) * b
    inputs = {"x": rand(*lead, k), "blocks": rand(layout.nnz, b, b, scale=per_row**-0.5)}
    if rank:
        inputs |= {"u": rand(n, rank, scale=rank**-0.5), "v": rand(rank, k, scale=k**-0.5)}
    if bias:
        inputs["bias"] = rand(n)
    if residual:
        inputs["residual"] = rand(*lead, n)
    return Call(layout, inputs, activation, rand(*lead, n) if grad else None)


def _tiles(t: torch.Tensor, b: int) -> torch.Tensor:
    """Returns `t [rows, cols]` as `[tiles, b · b]`, zero where the last tiles stick out."""
    rows, cols = t.shape
    t = torch.nn.functional.pad(t, (0, -cols % b, 0, -rows % b))
    return t.unflatten(0, (-1, b)).unflatten(2, (-1, b)).transpose(1, 2).flatten(0, 1).flatten(1)


def check_against(
    got: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, name: str, block_size: int
) -> None:
    """Checks a result against the oracle, globally and tile by tile.

    Args:
        got: the operator's result.
        same: the reference computed in the operator's dtype.
        exact: the reference computed in float64 from the same (rounded) inputs.
        name: for messages.
        block_size: side of the tiles; each tile's error counts, so that one wrong tile shows.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert got.dtype == same.dtype, f"{name}: {got.dtype}, not {same.dtype}"
    if exact.numel() == 0:
        return
    if exact.dim() == 1:
        got, same, exact = got[None], same[None], exact[None]
    elif exact.dim() > 2 and name.endswith("dblocks"):
        got, same, exact = (t.reshape(-1, t.shape[-1]) for t in (got, same, exact))
    elif exact.dim() > 2:
        got, same, exact = (t.flatten(0, -2) for t in (got, same, exact))
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} elements not finite"
    exact = exact.double()
    error = _tiles((got.double() - exact).abs(), block_size)
    allowed = _tiles((same.double() - exact).abs(), block_size)
    eps = torch.finfo(got.dtype).eps
    if got.dtype == torch.float64:
        eps *= 64  # here `exact` has the same rounding errors
    # A tile of few elements may be lucky in `same`: let it have a rounding of its largest value.
    rounding = eps * _tiles(exact.abs(), block_size).amax(1)
    bound = 2 * allowed.amax() + eps * exact.abs().max()
    assert error.max() <= bound, f"{name}: max error {error.max():.3g}, bound {bound:.3g}"
    rms, rms_bound = error.square().mean(1).sqrt(), 2 * allowed.square().mean(1).sqrt() + rounding
    worst = int((rms - rms_bound).argmax())
    assert rms[worst] <= rms_bound[worst], (
        f"{name}: tile {worst} of {len(rms)} has rms error {rms[worst]:.3g}, "
        f"bound {rms_bound[worst]:.3g}"
    )


def _without_kinks(call: Call) -> Call:
    """Zeroes dy where rounding decides on which side of ReLU's kink a pre-activation falls."""
    inputs = {name: t for name, t in call.inputs.items() if name != "residual"}
    linear = Call(call.layout, inputs).to(torch.float64)
    z = linear.run(butterfly_lowrank_mm_reference)["y"]
    sure = z.abs() > 16 * torch.finfo(call.dy.dtype).eps * z.abs().amax() if z.numel() else z > 0
    return Call(call.layout, call.inputs, call.activation, call.dy * sure)


def check_call(call: Call, needs=INPUT_NAMES) -> None:
    """Runs a call and its two references and compares y and every gradient."""
    if call.activation == "relu" and call.dy is not None:
        call = _without_kinks(call)
    got = call.run(needs=needs)
    same = call.run(butterfly_lowrank_mm_reference, needs)
    exact = call.to(torch.float64).run(butterfly_lowrank_mm_reference, needs)
    for name, value in got.items():
        check_against(value, same[name], exact[name], name, call.layout.block_size)


def check_repeats(call: Call) -> None:
    """Checks that a call on a GPU gives the same bits again, whatever else runs there."""
    first = call.run()
    other, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for i in range(30):
        if i % 2:
            with torch.cuda.stream(side):
                other = (other @ other).clamp_(-1, 1)
        torch.full((1 << 22,), float("nan"), device="cuda")  # what the next outputs lie on
        again = call.run()
        assert all(torch.equal(first[name], again[name]) for name in ("y", "dx", "du", "dv"))
    torch.cuda.synchronize()


def check_in_a_graph(call: Call) -> None:
    """Checks that a CUDA graph of a call without gradients gives what the call gives."""
    want = call.run()["y"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call.run()["y"]
    for _ in range(5):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)
