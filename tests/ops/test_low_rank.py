"""t = x vᵀ and s = dz u before the product, where few tokens leave multiprocessors to share."""

from __future__ import annotations

import pytest
import torch

from pixelfly.masks import block_diagonal
from pixelfly.ops import explain

from .helpers import check_call, make_call

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [70, 300, 1100])
@pytest.mark.parametrize(
    ("k", "n", "rank"), [(4096, 1024, 64), (1000, 4032, 136), (512, 2560, 8), (2048, 512, 72)]
)
def test_features_shared_by_a_cluster(k, n, rank, tokens, dtype, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm90")  # up to 256 tokens others would be chosen
    layout = block_diagonal(n, k, block_size=64)
    call = make_call(layout, tokens=tokens, rank=rank, device="cuda", dtype=dtype)
    kernels = dict(explain(call.inputs["x"], layout, rank=rank).kernels)
    assert "clusters" in kernels["t"] + kernels["s"]
    check_call(call)


def test_sums_over_a_cluster_are_added_in_order():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    layout = block_diagonal(4096, 4096, block_size=64)
    call = make_call(layout, tokens=700, rank=72, device="cuda", dtype=torch.bfloat16)
    first = call.run()
    for _ in range(30):
        again = call.run()
        assert all(torch.equal(first[name], again[name]) for name in ("y", "dx", "du", "dv"))
