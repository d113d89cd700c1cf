"""Products of few tokens whose contraction the thread blocks of a cluster share."""

from __future__ import annotations

import pytest
import torch

from pixelfly.masks import flat_block_butterfly, global_
from pixelfly.ops import explain

from .helpers import check_call, make_call

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def split(monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("PIXELFLY_KERNEL", "split")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 70, 130, 300, 1100])
@pytest.mark.parametrize(
    ("k", "n", "b", "rank", "activation"),
    [
        (4096, 1024, 64, 0, None),
        (1024, 4096, 64, 64, "gelu"),
        (2040, 1000, 64, 136, "relu"),
        (2048, 1024, 128, 8, "silu"),
        (1000, 2000, 128, 0, "gelu_tanh"),
    ],
)
def test_every_tile(k, n, b, rank, activation, tokens, dtype):
    layout = flat_block_butterfly(-(-n // b) * b, -(-k // b) * b, block_size=b)
    layout = layout | global_(layout.out_features, layout.in_features, block_size=b, width=b)
    layout = type(layout).from_grid(layout.grid, b, n, k)
    call = make_call(
        layout, tokens=tokens, rank=rank, activation=activation, residual=tokens % 4 == 2,
        device="cuda", dtype=dtype,
    )  # fmt: skip
    kernels = dict(explain(call.inputs["x"], layout, rank=rank, activation=activation).kernels)
    assert "product_split_sm90" in kernels["y"] and "product_split_sm90" in kernels["dx"]
    check_call(call)


@pytest.mark.parametrize("tokens", [70, 200])
@pytest.mark.parametrize(("b", "rank"), [(64, 0), (64, 40), (128, 72)])
def test_clusters_for_long_rows(b, rank, tokens):
    layout = flat_block_butterfly(2944, 3072, block_size=b)  # others fill no whole clusters
    layout = layout | global_(2944, 3072, block_size=b, width=b)
    call = make_call(
        layout, tokens=tokens, rank=rank, activation="gelu", device="cuda", dtype=torch.bfloat16
    )
    kernels = dict(explain(call.inputs["x"], layout, rank=rank, activation="gelu").kernels)
    assert "for long rows" in kernels["y"]
    check_call(call)


def test_sums_over_a_cluster_are_added_in_order():
    layout = flat_block_butterfly(1024, 4096, block_size=64)
    call = make_call(layout, tokens=100, rank=64, device="cuda", dtype=torch.bfloat16)
    assert "clusters" in dict(explain(call.inputs["x"], layout, rank=64).kernels)["y"]
    first = call.run()
    for _ in range(30):
        again = call.run()
        assert all(torch.equal(first[name], again[name]) for name in ("y", "dx"))
