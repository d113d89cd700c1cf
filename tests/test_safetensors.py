"""safetensors keeps the layouts, because they are tensors in the state dict."""

import pytest
import torch

from pixelfly import PixelflyLinear

safetensors_torch = pytest.importorskip("safetensors.torch")


def model(**options) -> torch.nn.Module:
    return torch.nn.Sequential(
        PixelflyLinear(96, 160, block_size=16, rank=16, **options), torch.nn.Linear(160, 4)
    )


def test_round_trip(tmp_path):
    saved, loaded = model(), model()
    safetensors_torch.save_model(saved, str(tmp_path / "m.safetensors"))
    safetensors_torch.load_model(loaded, str(tmp_path / "m.safetensors"))
    x = torch.randn(3, 96)
    assert torch.equal(saved(x), loaded(x))


def test_another_layout_is_refused_and_nothing_is_copied(tmp_path):
    saved, other = model(max_stride=2), model(max_stride=4)
    safetensors_torch.save_model(saved, str(tmp_path / "m.safetensors"))
    before = other[0].blocks.clone()
    with pytest.raises(RuntimeError, match="layout is another one"):
        safetensors_torch.load_model(other, str(tmp_path / "m.safetensors"))
    assert torch.equal(before, other[0].blocks)
