"""Products whose weights stay in registers in part (csrc/README.md, product_sm90 version 15)."""

from __future__ import annotations

import pytest
import torch

from pixelfly.masks import flat_block_butterfly, global_

from .helpers import check_call, make_call

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [130, 1000, 5000])
@pytest.mark.parametrize(
    ("k", "n", "b", "rank", "activation", "dense"),
    [
        (2048, 512, 64, 0, None, False),  # eight steps of rows alone; of pairs in dx
        (2048, 512, 64, 40, "gelu", False),
        (512, 2048, 64, 72, "silu", False),
        (1000, 4000, 64, 0, "gelu", True),  # steps of pairs, beside a dense row
        (2048, 2048, 64, 72, "relu", False),  # rows alone without other weights
        (512, 2048, 128, 8, None, False),
    ],
)
def test_weights_in_registers(k, n, b, rank, activation, dense, tokens, dtype, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm90")
    layout = flat_block_butterfly(n, k, block_size=b)
    if dense:
        layout = layout | global_(n, k, block_size=b)
    call = make_call(
        layout, tokens=tokens, rank=rank, activation=activation, residual=tokens == 1000,
        device="cuda", dtype=dtype,
    )  # fmt: skip
    check_call(call)
