"""round_weights: what `.to` makes of weights, as they lie or in the blocks of a dense layout."""

from __future__ import annotations

import pytest
import torch

from pixelfly.ops.rounding import round_weights

from .helpers import DEVICES

SHAPES = (
    (3, 16, 16),
    (20,),
    (40, 72),
    (1,),
    (0, 8),
    (70, 130),
    (5, 3),
    (9, 9, 9),
    (196, 384),
    (7,),
)


def weights(source: torch.dtype, device: str) -> list[torch.Tensor]:
    made = [torch.randn(shape, device=device).to(source) for shape in SHAPES]
    made[0][0, 0] = torch.nan
    made[2][0] = torch.finfo(source).max
    made.append(torch.randn(12, 40, device=device).to(source).mT)
    made.append(torch.randn(90, device=device).to(source)[1:])
    return made


def tiled(weight: torch.Tensor, tile: int) -> torch.Tensor:
    n, k = weight.shape
    rows, cols = -(-n // tile), -(-k // tile)
    tiles = weight.new_zeros(rows * cols, tile, tile)
    for i in range(n):
        for j in range(0, k, tile):
            part = weight[i, j : j + tile]
            tiles[i // tile * cols + j // tile, i % tile, : len(part)] = part
    return tiles


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [0, 16, 64])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_what_to_makes(device, tile, source, dtype):
    given = weights(source, device)
    results = round_weights(dtype, *given, None, tile=tile)
    assert results.pop() is None
    for weight, result in zip(given, results, strict=True):
        expected = weight.to(dtype)
        expected = tiled(expected, tile) if tile and weight.dim() == 2 else expected
        torch.testing.assert_close(result, expected, atol=0, rtol=0, equal_nan=True)
        assert result.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [0, 16])
def test_opcheck(device, tile):
    given = [w.contiguous() for w in weights(torch.float32, device)[1:]]
    operator = torch.ops.pixelfly.round_weights.default
    torch.library.opcheck(operator, (given, torch.bfloat16, tile))


def test_weights_that_need_no_change_are_passed_on():
    blocks, bias = torch.randn(2, 16, 16), torch.randn(16)
    same = round_weights(torch.float32, blocks, None, bias)
    assert same[0] is blocks and same[1] is None and same[2] is bias


@pytest.mark.gpu
def test_operator_refuses():
    weight = torch.randn(16, 24, device="cuda")
    for given, dtype, tile, message in [
        ([weight], torch.float32, 0, "dtype must be bfloat16 or float16"),
        ([weight.half()], torch.bfloat16, 0, "float32 or have the given dtype"),
        ([weight.mT], torch.bfloat16, 0, "contiguous"),
        ([weight], torch.bfloat16, 12, "multiple of 8"),
        ([weight, weight.cpu()], torch.bfloat16, 0, "one CUDA device"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pixelfly.round_weights(given, dtype, tile)
