"""What the processes of the distributed tests run; each function is called once per rank."""

from __future__ import annotations

import copy
import pathlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pixelfly import PixelflyLinear, masks
from pixelfly.distributed import check_checkpoint_layouts, check_same_layouts

BATCH, FEATURES, HIDDEN = 16, 48, 112  # 112 / 16 rows: nnz is odd, shards are unequal
EPS = 1e-4  # gradients that are rounding alone must not become whole steps


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        PixelflyLinear(FEATURES, HIDDEN, block_size=16, rank=8, activation="gelu"),
        nn.LayerNorm(HIDDEN),
        PixelflyLinear(HIDDEN, FEATURES, block_size=16, rank=8, gate="scalar"),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(2, BATCH, FEATURES, generator=generator, device="cpu")
    return tuple(both.to(torch.get_default_device()))


def share(t: torch.Tensor) -> torch.Tensor:
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean-square loss and its gradients."""
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def whole_run(steps: int = 3) -> tuple[list[float], nn.Module]:
    """The losses and the model of one process that sees the whole batch."""
    model, (x, y) = make_model(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    losses = []
    for _ in range(steps):
        losses.append(step(model, x, y).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


def parallel_run(model: nn.Module, steps: int = 3) -> list[float]:
    """The losses, averaged over ranks, of a model that sees this rank's share."""
    x, y = map(share, batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    losses = []
    for _ in range(steps):
        loss = step(model, x, y)
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(model: nn.Module, expected: nn.Module, rtol: float = 1e-4) -> None:
    """Parameters, gathered if they are sharded, equal those of one process."""
    whole = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(value, whole[name.removeprefix("module.")], rtol=rtol, atol=1e-5)


def ddp(folder: pathlib.Path) -> None:
    losses, expected = whole_run()
    model = DistributedDataParallel(make_model(seed=dist.get_rank()))  # rank 0's weights win
    torch.testing.assert_close(parallel_run(model), losses)
    assert_same(model, expected)


def ddp_accumulation(folder: pathlib.Path) -> None:
    """Two half batches under no_sync, then one exchange, are one whole batch."""
    x, y = batch()
    expected = make_model()
    step(expected, x, y)
    model = DistributedDataParallel(make_model())
    halves = list(zip(share(x).chunk(2), share(y).chunk(2), strict=True))
    with model.no_sync():
        ((model(halves[0][0]) - halves[0][1]).square().mean() / 2).backward()
    ((model(halves[1][0]) - halves[1][1]).square().mean() / 2).backward()
    whole = dict(expected.named_parameters())
    for name, parameter in model.module.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name].grad, rtol=1e-4, atol=1e-6)


def ddp_compiled(folder: pathlib.Path) -> None:
    losses, expected = whole_run()
    model = torch.compile(DistributedDataParallel(make_model()), backend="aot_eager")
    torch.testing.assert_close(parallel_run(model), losses)


def sharded(model: nn.Module, **options: object) -> nn.Module:
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp(folder: pathlib.Path) -> None:
    losses, expected = whole_run()
    model = sharded(make_model())
    torch.testing.assert_close(parallel_run(model), losses)
    assert_same(model, expected)
    buffers = dict(model.named_buffers())
    assert not any(hasattr(b, "full_tensor") for b in buffers.values()), "indices are replicated"


def fsdp_from_meta(folder: pathlib.Path) -> None:
    """A model that no process ever held whole: built without memory, sharded, then loaded."""
    expected = make_model()
    with torch.device("meta"):
        model = sharded(make_model(seed=3))
    model.to_empty(device=torch.get_default_device())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    first = dist.get_rank() == 0
    set_model_state_dict(model, expected.state_dict() if first else {}, options=options)
    assert_same(model, expected)
    x, _ = batch()
    torch.testing.assert_close(model(x), expected(x))


def fsdp_mixed_precision(folder: pathlib.Path) -> None:
    """Parameters are gathered in the policy's dtype; the operator runs in it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(make_model(), mp_policy=policy)
    x, y = map(share, batch())
    out = model(x)
    assert out.dtype == torch.bfloat16
    (out.float() - y).square().mean().backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32


def checkpoint(folder: pathlib.Path) -> None:
    """A sharded model saved by every rank loads into a fresh sharded one, and into one process."""
    model = sharded(make_model())
    parallel_run(model)
    x, _ = batch()
    expected = model(x).detach()
    state = get_model_state_dict(model)
    dcp.save({"model": state}, checkpoint_id=folder / "dcp")
    fresh = sharded(make_model(seed=5))
    state = get_model_state_dict(fresh)
    dcp.load({"model": state}, checkpoint_id=folder / "dcp")
    set_model_state_dict(fresh, state)
    torch.testing.assert_close(fresh(x), expected)

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        single = make_model(seed=9)
        single.load_state_dict(copy.deepcopy(full))
        torch.testing.assert_close(single(x), expected)
    dist.barrier()


def other_layout(folder: pathlib.Path) -> None:
    """A checkpoint of another layout is refused, and nothing is overwritten."""
    model = sharded(make_model())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
    full = get_model_state_dict(model, options=options)
    other = make_model()
    torch.manual_seed(0)
    other[0] = PixelflyLinear(
        FEATURES, HIDDEN, block_size=16, max_stride=2, rank=8, activation="gelu"
    )
    before = other[0].blocks.detach().clone()
    if dist.get_rank() == 0:
        try:
            other.load_state_dict(full)
        except RuntimeError as error:
            assert "layout" in str(error)
        else:
            raise AssertionError("a checkpoint of another layout was loaded")
        torch.testing.assert_close(other[0].blocks.detach(), before)
    dist.barrier()


def layouts_over_ranks(folder: pathlib.Path) -> None:
    """Equal layouts pass; layouts of equal size but other blocks are refused on every rank."""
    check_same_layouts(make_model())
    first = dist.get_rank() == 0
    diagonal = torch.eye(3, dtype=torch.bool, device="cpu")
    layout = masks.BlockLayout.from_grid(diagonal if first else diagonal.flip(0), 16)
    other = nn.Sequential(nn.Linear(4, 4), PixelflyLinear(FEATURES, FEATURES, layout=layout))
    for model in (other, make_model()[: 1 if first else 3]):
        try:
            check_same_layouts(model)
        except ValueError as error:
            assert "rank 0 has" in str(error) and "rank 1 has" in str(error)
        else:
            raise AssertionError("layouts that differ between ranks were accepted")


def checkpoint_of_another_layout(folder: pathlib.Path) -> None:
    """check_checkpoint_layouts refuses equal shapes with other blocks before anything is loaded."""
    diagonal = torch.eye(3, dtype=torch.bool, device="cpu")

    def build(grid: torch.Tensor) -> nn.Module:
        layout = masks.BlockLayout.from_grid(grid, 16)
        return sharded(nn.Sequential(PixelflyLinear(FEATURES, FEATURES, layout=layout)))

    model, other = build(diagonal), build(diagonal.flip(0))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    check_checkpoint_layouts(model, folder / "dcp")
    before = other[0].blocks.full_tensor()
    try:
        check_checkpoint_layouts(other, folder / "dcp")
    except ValueError as error:
        assert "but other blocks" in str(error)
    else:
        raise AssertionError("a checkpoint of another layout was accepted")
    torch.testing.assert_close(other[0].blocks.full_tensor(), before)
