"""Conversions of models that processes share already: refused, nothing changed."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

from pixelfly import PixelflyConfig, PixelflyLinear, densify_, sparsify_

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def test_ddp(process_group_of_one):
    """New layers would train apart: DDP knows the parameters that it was given."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64)))
    for convert in (sparsify_, densify_):
        with pytest.raises(ValueError, match="before DistributedDataParallel wraps it"):
            convert(nn.Sequential(wrapped))
    assert type(wrapped.module[0]) is nn.Linear


@pytest.mark.parametrize("convert", [sparsify_, densify_])
def test_fsdp2(process_group_of_one, convert):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sparse = convert is densify_
    layer = PixelflyLinear(64, 64, block_size=16) if sparse else nn.Linear(64, 64)
    model = fully_shard(nn.Sequential(layer), mesh=init_device_mesh("cpu", (1,)))
    arguments = () if sparse else (PixelflyConfig(block_size=16),)
    with pytest.raises(ValueError, match=r"got DTensors in '0'; call it before fully_shard"):
        convert(model, *arguments)
    assert model[0] is layer
