"""Checkpoints, copies and devices."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from pixelfly.masks import BlockLayout, flat_block_butterfly
from pixelfly.nn import PixelflyLinear, PixelflyMLP
from pixelfly.nn.state import decode_layout, encode_layout


def make(**options) -> PixelflyLinear:
    return PixelflyLinear(128, 96, **{"block_size": 16, "rank": 16, "gate": "scalar", **options})


def outputs_match(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(5, 128)
    return torch.equal(a(x), b(x))


def test_keys():
    keys = ["blocks", "u", "v", "bias", "gate", "_extra_state"]
    assert list(make().state_dict()) == keys
    assert "u" not in make(rank=0, gate=None).state_dict()
    assert list(dict(make(gate="token").named_parameters()))[-2:] == ["gate", "gate_bias"]


def test_round_trip_through_a_weights_only_file():
    layer, other = make(), make()
    assert not outputs_match(layer, other)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert outputs_match(layer, other)


def test_safetensors(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    layer, other = make(), make()
    torch_files.save_model(layer, tmp_path / "layer.safetensors")
    torch_files.load_model(other, tmp_path / "layer.safetensors")
    assert outputs_match(layer, other)


def test_another_layout_is_refused_and_nothing_overwritten():
    grid = torch.eye(6, 8, dtype=torch.bool)
    layer = make(layout=BlockLayout.from_grid(grid, 16))
    model = nn.Sequential(layer)
    # As many blocks at other places: shapes alone would not tell.
    other = nn.Sequential(make(layout=BlockLayout.from_grid(grid.roll(1, 1), 16)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="0.blocks: the checkpoint's layout is another one"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="other blocks"):
        model.load_state_dict(other.state_dict(), strict=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    with pytest.raises(RuntimeError, match="another one"):
        layer.set_extra_state(other[0].get_extra_state())


def test_damaged_layouts():
    state = encode_layout(flat_block_butterfly(96, 128, block_size=16))
    assert decode_layout(state) == flat_block_butterfly(96, 128, block_size=16)
    for bad, match in (
        (None, "uint8 tensor"),
        ({"block_size": 16}, "uint8 tensor"),
        (state[:10], "cut off"),
        (state[:-1], "damaged"),
        (torch.full_like(state, 255), "version"),
    ):
        with pytest.raises(ValueError, match=match):
            decode_layout(bad)
    with pytest.raises(RuntimeError, match="PixelflyLinear: .*uint8"):
        make().set_extra_state(None)


def test_a_dense_checkpoint_is_refused():
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight"'):
        make().load_state_dict(nn.Linear(128, 96).state_dict())


def test_deepcopy_and_pickle():
    layer = make(activation="gelu")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert outputs_match(layer, twin)
        assert twin.layout == layer.layout and repr(twin) == repr(layer)
        assert twin.blocks.data_ptr() != layer.blocks.data_ptr()


@pytest.mark.parametrize("gate", [None, "scalar", "token"])
def test_meta_device(gate):
    layer = make(device="meta", gate=gate)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    for p in layer.parameters():
        nn.init.constant_(p, float("nan"))
    layer.reset_parameters()
    y = layer(torch.randn(4096, 128))
    assert y.var().item() == pytest.approx(1 / 3 + 1 / (3 * 128), rel=0.1)


def test_meta_device_then_assign():
    source = make()
    layer = make(device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert outputs_match(layer, source)


def test_dtype_conversion():
    layer = make().to(torch.bfloat16)
    assert layer(torch.randn(3, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert make().double()(torch.randn(3, 128).double()).dtype == torch.float64


def test_weight_averaging():
    layer = make()
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    assert outputs_match(layer, average)


def test_mlp_and_plain_layers_share_keys():
    mlp = PixelflyMLP(128, 256, block_size=16, rank=16, names=("c_fc", "c_proj"))
    plain = nn.ModuleDict(
        {
            "c_fc": PixelflyLinear(128, 256, block_size=16, rank=16),
            "c_proj": PixelflyLinear(256, 128, block_size=16, rank=16),
        }
    )
    plain.load_state_dict(mlp.state_dict())
    mlp.load_state_dict(plain.state_dict())
