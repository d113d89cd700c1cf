"""Products of layers that narrow: all output rows of a token tile at once, t formed on the way."""

from __future__ import annotations

import pytest
import torch

from pixelfly.masks import BlockLayout, flat_block_butterfly, global_
from pixelfly.ops import explain

from .helpers import (
    check_call,
    check_in_a_graph,
    check_repeats,
    make_call,
    make_layout,
    named_grids,
)

pytestmark = pytest.mark.gpu
ALL_ROWS = "product_all_rows_sm90"
IN_THE_PRODUCT = f"{ALL_ROWS}, in the product"


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("PIXELFLY_KERNEL", "all_rows")


def narrowing(k: int, n: int, b: int, *, dense: bool) -> BlockLayout:
    """A butterfly of n x k features, which need not be whole blocks; `dense`: with a dense block
    row and column."""
    rows, cols = -(-n // b) * b, -(-k // b) * b
    layout = flat_block_butterfly(rows, cols, block_size=b)
    if dense:
        layout = layout | global_(rows, cols, block_size=b, width=b)
    return BlockLayout.from_grid(layout.grid, b, n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 129, 8500, 20000])
@pytest.mark.parametrize(
    ("k", "n", "b", "rank", "dense"),
    [
        (3072, 768, 64, 0, False),
        (3072, 768, 64, 64, False),
        (1536, 768, 64, 40, True),
        (1000, 328, 64, 8, False),
        (2048, 1024, 64, 0, True),
        (2040, 1096, 64, 0, False),
        (1536, 512, 128, 64, False),
        (1992, 1128, 128, 0, True),
    ],
)
def test_against_the_oracle(k, n, b, rank, dense, tokens, dtype, forced):
    layout = narrowing(k, n, b, dense=dense)
    call = make_call(layout, tokens=tokens, rank=rank, device="cuda", dtype=dtype)
    kernels = dict(explain(call.inputs["x"], layout, rank=rank).kernels)
    assert kernels["y"] == ALL_ROWS
    assert rank == 0 or kernels["t"] == IN_THE_PRODUCT
    check_call(call)


@pytest.mark.parametrize("tokens", [200, 9000])
@pytest.mark.parametrize(("k", "n", "rank"), [(768, 3072, 64), (768, 2304, 0), (1000, 2000, 0)])
def test_dx_of_layers_that_widen(k, n, rank, tokens, forced):
    layout = narrowing(k, n, 64, dense=rank == 0)
    call = make_call(layout, tokens=tokens, rank=rank, device="cuda", dtype=torch.bfloat16)
    kernels = dict(explain(call.inputs["x"], layout, rank=rank).kernels)
    assert kernels["dx"] == ALL_ROWS
    assert rank == 0 or kernels["s"] == IN_THE_PRODUCT
    check_call(call)


@pytest.mark.parametrize("name", named_grids())
@pytest.mark.parametrize("rank", [0, 16])
def test_small_layouts(name, rank, forced):
    layout = make_layout(named_grids()[name], 64, (8, 56))
    call = make_call(layout, tokens=300, rank=rank, device="cuda", dtype=torch.bfloat16)
    try:
        check_call(call)
    except RuntimeError as error:
        if "cannot serve" not in str(error):
            raise
        assert rank == 0 and "empty" in name or name in ("single_block", "no_blocks")


def test_chosen_where_it_is_quick():
    x = torch.empty(25216, 3072, device="cuda", dtype=torch.bfloat16)
    layout = narrowing(3072, 768, 64, dense=False)
    for rank in (0, 64):
        kernels = dict(explain(x, layout, rank=rank).kernels)
        assert kernels["y"] == ALL_ROWS and kernels["dx"] == "product_sm90"
    # What it does not do: activations, more ranks, other dtypes.
    assert dict(explain(x, layout, activation="gelu").kernels)["y"] == "product_sm90"
    assert dict(explain(x, layout, rank=72).kernels)["y"] == "product_sm90"
    assert dict(explain(x.float(), layout).kernels)["y"] == "product_sm80"


def test_repeats_are_equal_whatever_else_runs():
    """A thread block that read t too early, or its neighbour's half of it, would differ from run to
    run."""
    layout = narrowing(1536, 768, 64, dense=False)
    call = make_call(layout, tokens=16384, rank=64, device="cuda", dtype=torch.bfloat16)
    kernels = dict(explain(call.inputs["x"], layout, rank=64).kernels)
    assert kernels["y"] == ALL_ROWS
    check_repeats(call)


def test_in_a_graph():
    layout = narrowing(3072, 768, 64, dense=False)
    call = make_call(layout, tokens=8448, rank=64, device="cuda", dtype=torch.bfloat16, grad=False)
    check_in_a_graph(call)


def test_refusals(forced):
    layout = narrowing(768, 768, 64, dense=False)
    for options in ({"activation": "relu"}, {"residual": True}, {"rank": 72}):
        call = make_call(layout, tokens=65, device="cuda", dtype=torch.bfloat16, **options)
        if "rank" in options:  # neither y nor dx
            with pytest.raises(RuntimeError, match="all_rows cannot serve this product"):
                call.run()
        else:  # dx can be served: y runs as it would
            check_call(call)
