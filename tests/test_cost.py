"""Cost models: work, fits, data sheets, measurement, files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelfly.budget import GPUS, CostModel, Rate, Work
from pixelfly.budget.cost import dense_work, sparse_work
from pixelfly.budget.operators import MATMULS, MOVED
from pixelfly.budget.rate import fit

GRID = {
    "tokens": (64, 256),
    "shapes": ((256, 256), (256, 512)),
    "densities": (0.25, 0.5),
    "repeats": 2,
}


def works() -> list[Work]:
    sizes = [(t, k, n) for t in (128, 4096) for k in (256, 4096) for n in (256, 2048)]
    return [dense_work(*size, 2) for size in sizes] + [Work(1.0, 1e9), Work(1e12, 1.0)]


def test_work_of_a_dense_layer():
    assert dense_work(10, 8, 16, 2) == Work(2 * 10 * 8 * 16, 2 * (80 + 160 + 128), 1)
    step, forward = dense_work(10, 8, 16, 2, 3), dense_work(10, 8, 16, 2)
    assert (step.flops, step.bytes, step.count) == (3 * forward.flops, 3 * forward.bytes, 3)


def test_work_of_a_sparse_layer():
    work = sparse_work(10, 64, 128, 16, nnz=4, rank=8, itemsize=4, passes=1)
    weights = 4 * 256 + 8 * 192
    assert work == Work(2 * 10 * weights, 4 * (10 * (64 + 128 + 16) + weights), 2)
    full = sparse_work(10, 64, 128, 16, nnz=32, rank=0, itemsize=4, passes=3)
    assert full == dense_work(10, 64, 128, 4, 3)


def test_rate_forms():
    work = Work(3e9, 2e9, 4)
    assert Rate(1.0, 1e-9, 1e-9).seconds(work) == pytest.approx(4 + 3)
    assert Rate(1.0, 1e-9, 1e-9, "sum").seconds(work) == pytest.approx(4 + 5)


@settings(max_examples=30, deadline=None)
@given(
    launch=st.sampled_from([0.0, 1e-6, 1e-4]),
    flop=st.sampled_from([1e-15, 1e-13, 1e-11]),
    byte=st.sampled_from([3e-13, 1e-11]),
    form=st.sampled_from(["max", "sum"]),
)
def test_fit_finds_what_made_the_timings(launch, flop, byte, form):
    truth = Rate(launch, flop, byte, form)
    found = fit(works(), [truth.seconds(w) for w in works()])
    assert found.error < 0.02
    assert min(found.launch, found.flop, found.byte) >= 0


@pytest.mark.parametrize("grows", [lambda n: Work(3 * n, n, 2), lambda n: Work(0, n, 2)])
def test_timings_of_one_size_go_to_the_work_and_not_to_the_launch(grows):
    found = fit([grows(1e6)] * 3, [1e-3] * 3)
    assert found.seconds(grows(2e6)) == pytest.approx(2e-3)


def test_fit_says_how_far_it_is_off():
    timings = [1e-3, 2e-3] * 5
    found = fit([Work(1e6, 1e6)] * 10, timings)
    assert 0.2 < found.error < 0.5
    with pytest.raises(ValueError, match="a timing for each work, got 0, 0"):
        fit([], [])


@pytest.mark.parametrize("gpu", GPUS)
def test_rooflines(gpu):
    cost = CostModel.roofline(gpu)
    sheet = GPUS[gpu]
    large = cost.dense_seconds(65536, 8192, 8192, training=False)
    assert large == pytest.approx(2 * 65536 * 8192**2 / (sheet.tflops * 1e12))
    small = cost.dense_seconds(1, 8192, 8192, training=False)
    assert small == pytest.approx(2 * (2 * 8192 + 8192**2) / (sheet.gbps * 1e9))
    assert cost.dense_seconds(4096, 1024, 1024) == pytest.approx(
        3 * cost.dense_seconds(4096, 1024, 1024, training=False)
    )
    assert "NVIDIA" in cost.source


def test_unknown_names():
    with pytest.raises(ValueError, match=r"gpu must be one of .*'h100'.*got 'cpu'.*measure"):
        CostModel.roofline("cpu")
    with pytest.raises(ValueError, match="got 'v100'"):
        CostModel.roofline("v100")
    with pytest.raises(ValueError, match="block_size must be one .* got 48"):
        CostModel.roofline("h100").sparse_seconds(8, 64, 64, block_size=48, nnz=1, rank=0)


def test_rows_of_odd_length_have_a_rate_of_their_own():
    slow = Rate(0.0, 1.0, 0.0)
    cost = CostModel("x", "bfloat16", {**CostModel.roofline("h100").rates, "unaligned/step": slow})
    assert cost.dense_seconds(8, 64, 129) == 3 * 2 * 8 * 64 * 129
    assert cost.dense_seconds(8, 64, 136) < 1
    with pytest.raises(ValueError, match=r"no rate 'attention/step', only .*'pointwise'"):
        CostModel("x", "bfloat16", {"pointwise": slow}).seconds({"attention": Work(1, 1)})


def test_seconds_of_a_step_hold_the_backward_once():
    cost, work = CostModel.roofline("h100"), Work(1e12, 1e9)
    for kind, times in (("attention", 3), ("dense", 3), ("convolution", 1), ("mixed", 1)):
        forward = cost.seconds({kind: work}, training=False)
        assert cost.seconds({kind: work}) == pytest.approx(times * forward)


def check_measured(cost: CostModel, path) -> None:
    assert cost.block_sizes == (32,)
    assert set(cost.rates) == {
        *(f"{kind}/{mode}" for kind in (*MATMULS, "b32") for mode in ("forward", "step")),
        *MOVED,
    }
    for rate in cost.rates.values():
        assert rate.launch >= 0 and rate.flop >= 0 and rate.byte >= 0
        assert rate.launch + rate.flop + rate.byte > 0
        assert 0 <= rate.error < float("inf")
    assert "measured" in cost.source
    cost.save(path)
    assert CostModel.load(path) == cost


def test_measures_the_cpu(tmp_path):
    check_measured(CostModel.measure("cpu", block_sizes=(32,), **GRID), tmp_path / "cost.json")


def test_narrow_layers_alone_give_every_rate(tmp_path):
    grid = {"tokens": (16,), "shapes": ((64, 64),), "densities": (0.75,), "repeats": 1}
    check_measured(CostModel.measure("cpu", block_sizes=(32,), **grid), tmp_path / "cost.json")


@pytest.mark.gpu
def test_measures_a_gpu(tmp_path):
    grid = {**GRID, "tokens": (1024, 8192), "shapes": ((1024, 1024), (1024, 4096))}
    cost = CostModel.measure("cuda", block_sizes=(32,), **grid)
    assert cost.dtype == "bfloat16" and cost.device == torch.cuda.get_device_name()
    check_measured(cost, tmp_path / "cost.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, "tokens must not be empty"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"densities": (0.01,)}, r"no density .* is reachable at block_sizes \[64\]"),
    ],
)
def test_bad_grids(options, message):
    with pytest.raises(ValueError, match=message):
        CostModel.measure("cpu", block_sizes=(64,), **{**GRID, **options})


def test_bad_devices():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'meta'"):
        CostModel.measure("meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device here for device='cuda:1'"):
            CostModel.measure("cuda:1")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "cost.json"
    CostModel.roofline("h200").save(path)
    data = json.loads(path.read_text())
    for change, message in (
        ({"version": 9}, "version must be 3, got 9.*measure again"),
        ({"format": "x"}, "file of x"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            CostModel.load(path)
