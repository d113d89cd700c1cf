"""Markers, seeds and poisoned memory for every test."""

from __future__ import annotations

import pytest
import torch

SEED = 20211130  # the day the paper appeared


def _gpu_problem() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    from pixelfly import build_info

    if not build_info().get("cuda"):
        return "pixelfly was built without CUDA"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    problem = _gpu_problem()
    if problem is not None:
        skip = pytest.mark.skip(reason=f"GPU test: {problem}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    if "slow" not in config.getoption("-m"):
        skip = pytest.mark.skip(reason="slow test: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def process_group_of_one(tmp_path):
    """torch.distributed with this process alone, on the CPU."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("GPU test:" in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(
            f"WARNING: {count} GPU tests did not run ({_gpu_problem()}): the CUDA kernels are "
            "untested here",
            yellow=True,
        )


@pytest.fixture(autouse=True)
def seed() -> None:
    """Makes every test's random numbers its own, whatever ran before."""
    torch.manual_seed(SEED)


def poison_cuda_memory(megabytes: int = 256) -> None:
    """Fills freed CUDA memory with NaN, so that an element nobody wrote is seen."""
    # The caching allocator serves small tensors (< 1 MiB) from a pool of their own.
    small = [torch.full((1 << 17,), float("nan"), device="cuda") for _ in range(16)]
    large = torch.full((megabytes << 18,), float("nan"), device="cuda")
    del small, large


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> None:
    """Runs every GPU test on poisoned memory."""
    if request.node.get_closest_marker("gpu") and _gpu_problem() is None:
        poison_cuda_memory()
