"""t = x vᵀ and s = dz u formed by thread blocks that run beside the product that reads them."""

from __future__ import annotations

import pytest
import torch

from pixelfly.masks import flat_block_butterfly
from pixelfly.ops import explain

from .helpers import check_call, check_in_a_graph, check_repeats, make_call

pytestmark = pytest.mark.gpu
AHEAD = "low_rank_ahead_sm90, beside the product"


def call_ahead(k: int, n: int, *, tokens: int, rank: int, dtype=torch.bfloat16, **options):
    """Returns a call whose t, at least, is formed beside the product; skips elsewhere."""
    layout = flat_block_butterfly(n, k, block_size=options.pop("block_size", 64))
    call = make_call(layout, tokens=tokens, rank=rank, device="cuda", dtype=dtype, **options)
    kernels = dict(explain(call.inputs["x"], layout, rank=rank).kernels)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    assert kernels["t"] == AHEAD
    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [4097, 5000, 9000])
@pytest.mark.parametrize(
    ("k", "n", "rank", "block_size"),
    [(768, 768, 64, 64), (1024, 3072, 64, 64), (1000, 1000, 24, 64), (512, 512, 8, 32)],
)
def test_against_the_oracle(k, n, rank, block_size, tokens, dtype):
    call = call_ahead(k, n, tokens=tokens, rank=rank, block_size=block_size, dtype=dtype)
    check_call(call)


@pytest.mark.parametrize("tokens", [65, 129, 1000])
def test_few_tokens(tokens, monkeypatch):
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm90")  # up to 256 tokens others would be chosen
    check_call(call_ahead(1024, 3072, tokens=tokens, rank=64))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activation_and_residual(activation):
    call = call_ahead(768, 768, tokens=6000, rank=64, activation=activation, residual=True)
    check_call(call)


def test_repeats_are_equal_whatever_else_runs():
    """A product that read t too early would differ from run to run; one that waited for thread
    blocks without a place to run would not end."""
    call = call_ahead(1024, 1024, tokens=16384, rank=64)
    check_repeats(call)


def test_in_a_graph():
    call = call_ahead(768, 768, tokens=5000, rank=64, grad=False)
    check_in_a_graph(call)
