"""The operator and every gradient against the reference, over layouts, dtypes and options."""

from __future__ import annotations

import itertools

import pytest
import torch

from .helpers import (
    ACTIVATIONS,
    BLOCK_SIZES,
    DEVICES,
    check_call,
    make_call,
    make_layout,
    named_grids,
    xor_grid,
)

GRIDS = named_grids()
RANKS = (0, 8, 64, 72)
# Above 256 tokens the forward's kernels for throughput have taken over from those for latency;
# above 4096 their plans are others.
TOKENS = {
    "cpu": (7, 129, (2, 3, 11)),
    "cuda": (7, 1025, 129, (2, 3, 67), 300, 4200, (2, 2100)),
}
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = CPU_DTYPES[1:]


def _cases():
    """Every layout x block size x dtype; the other options take turns at mutually prime periods."""
    for device, dtypes in (("cpu", CPU_DTYPES), ("cuda", CUDA_DTYPES)):
        turn = itertools.count()
        for name, b, dtype in itertools.product(GRIDS, BLOCK_SIZES, dtypes):
            i = next(turn)
            options = {
                "rank": RANKS[i % 4],
                "activation": ACTIVATIONS[i % 5],
                "residual": i % 3 == 0,
                "bias": i % 7 != 0,
                "tokens": TOKENS[device][(i // 2) % len(TOKENS[device])],
            }
            # Features that are multiples of 8 but not of the block size, every other case.
            tail = ((8, b - 8), (0, 0), (b - 8, 8), (0, 8))[(i // 3) % 4]
            marks = [pytest.mark.gpu] if device == "cuda" else []
            label = f"{device}-{name}-b{b}-{str(dtype).removeprefix('torch.')}-{i}"
            yield pytest.param(device, name, b, dtype, tail, options, id=label, marks=marks)


@pytest.mark.parametrize(("device", "name", "b", "dtype", "tail", "options"), list(_cases()))
def test_matches_reference(device, name, b, dtype, tail, options):
    layout = make_layout(GRIDS[name], b, tail)
    check_call(make_call(layout, device=device, dtype=dtype, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
def test_every_epilogue(device, activation, residual, bias, rank):
    layout = make_layout(GRIDS["butterfly"], 32)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    check_call(
        make_call(
            layout, tokens=65, rank=rank, bias=bias, activation=activation, residual=residual,
            device=device, dtype=dtype,
        )
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 129, 4097])
@pytest.mark.parametrize("rank", [0, 64])
def test_token_counts(device, tokens, rank):
    layout = make_layout(GRIDS["butterfly"], 64)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    call = make_call(layout, tokens=tokens, rank=rank, activation="gelu", residual=True,
                     device=device, dtype=dtype)  # fmt: skip
    if tokens:
        check_call(call)
        return
    results = call.run()
    assert results["y"].shape == (0, layout.out_features)
    for name, value in results.items():
        assert torch.count_nonzero(value) == 0, f"{name} must be zero when there are no tokens"
        if name != "y":
            assert value.shape == call.inputs[name[1:]].shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [8, 24, 40, 136, 200])
def test_ranks(device, rank):
    layout = make_layout(GRIDS["ragged"], 32, (8, 16))
    dtype = torch.float32 if device == "cpu" else torch.float16
    check_call(make_call(layout, tokens=33, rank=rank, device=device, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["sm80", "sm90", "few", "split", "all_rows"])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("b", BLOCK_SIZES)
def test_every_kernel(path, name, b, monkeypatch):
    """Each family of kernels over every layout, whatever the heuristics would choose."""
    monkeypatch.setenv("PIXELFLY_KERNEL", path)
    i = list(GRIDS).index(name)
    tail = ((0, 0), (8, b - 8), (b - 8, 0))[i % 3]
    layout = make_layout(GRIDS[name], b, tail)
    for j, dtype in enumerate((torch.bfloat16, torch.float16)):
        tokens = (1, 17, 64, 200) if path == "few" else (64, 1000, 333, 4230, 200)
        call = make_call(
            layout, tokens=tokens[(i + j) % len(tokens)], rank=(64, 0, 32, 72)[(i + 2 * j) % 4],
            activation=ACTIVATIONS[(i + j) % 5], residual=j == 1, device="cuda", dtype=dtype,
        )  # fmt: skip
        try:
            check_call(call)
        except RuntimeError as error:
            if "cannot serve" not in str(error):
                raise
            pytest.skip(f"{path} does not serve {name}, b={b}, rank {call.rank}")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize("tokens", [4096, 8192])
def test_whole_token_tiles(tokens, rank, activation):
    """Numbers of tokens for which the plan shares the work out in another way than for others."""
    grid = xor_grid(16, 16)
    grid[0] = grid[:, 0] = True
    call = make_call(make_layout(grid, 64), tokens=tokens, rank=rank, activation=activation,
                     device="cuda", dtype=torch.bfloat16)  # fmt: skip
    check_call(call)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "full"), [(96, 24, False), (128, 32, True)])
@pytest.mark.parametrize("tokens", [65, 200, 1000, 2500, 4000])
def test_wide_layers(tokens, rows, columns, full):
    """Layers whose plans list groups of rows in another way for fewer tokens than 4096."""
    grid = xor_grid(rows, columns)
    grid[0] |= full
    grid[:, 0] |= full
    layout = make_layout(grid, 64)
    check_call(make_call(layout, tokens=tokens, rank=0, device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [20, 40])
@pytest.mark.parametrize("tokens", [1, 30, 47, 64, 130])
def test_few_tokens_of_wide_layers(tokens, rows, monkeypatch):
    """16 features for most of 132 multiprocessors or for more, and the last block half empty."""
    monkeypatch.setenv("PIXELFLY_KERNEL", "few")
    layout = make_layout(xor_grid(rows, 4), 64, (24, 8))
    for rank, residual in ((0, True), (40, False)):
        call = make_call(layout, tokens=tokens, rank=rank, activation="gelu", residual=residual,
                         device="cuda", dtype=torch.bfloat16)  # fmt: skip
        check_call(call)


@pytest.mark.parametrize("device", DEVICES)
def test_each_gradient_alone(device):
    """needs_input_grad decides what runs; what runs must not depend on what else is wanted."""
    layout = make_layout(GRIDS["ragged"], 16, (8, 0))
    call = make_call(layout, tokens=19, rank=8, activation="silu", residual=True,
                     device=device, dtype=torch.float32)  # fmt: skip
    for name in ("x", "blocks", "u", "v", "bias", "residual"):
        check_call(call, needs=(name,))
    check_call(call, needs=("x", "u"))
    check_call(call, needs=("blocks", "v"))


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_mode(device):
    """Deterministic mode also fills torch.empty with NaN: what nobody writes is seen."""
    layout = make_layout(GRIDS["global"], 32, (8, 8))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.use_deterministic_algorithms(True)
    try:
        call = make_call(layout, tokens=700, rank=24, activation="gelu_tanh", device=device,
                         dtype=dtype)  # fmt: skip
        check_call(call)
        first, second = call.run(), call.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two equal runs"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(device, bad):
    """As with a dense layer, what reads a NaN or an Inf is not finite, and nothing else is."""
    layout = make_layout(GRIDS["butterfly"], 32)
    call = make_call(layout, tokens=40, rank=0, device=device, dtype=torch.float32, grad=False)
    call.inputs["x"][3, 70] = bad
    finite = call.run()["y"].isfinite()
    reads = layout.grid[:, 70 // 32].repeat_interleave(32).to(finite.device)
    assert not finite[3][reads].any()
    others = finite.clone()
    others[3] = True
    assert others.all()
    assert finite[3][~reads].all()
