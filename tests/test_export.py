"""torch.export of models with PixelflyLinear, run in Python."""

import pytest
import torch

from pixelfly import PixelflyLinear


@pytest.mark.parametrize("gate", [None, "scalar", "token"])
def test_export_runs_and_survives_a_file(gate, tmp_path):
    layer = PixelflyLinear(96, 160, block_size=16, rank=16, gate=gate, activation="gelu").eval()
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (torch.randn(5, 96),), dynamic_shapes=({0: tokens},))
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    x = torch.randn(9, 96)
    torch.testing.assert_close(loaded(x), layer(x))
