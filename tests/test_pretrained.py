"""Converted models that come back from a folder with their structure."""

from __future__ import annotations

import json

import pytest
import torch
import vision_ops  # noqa: F401  before transformers
from torch import nn

from pixelfly import PixelflyConfig, PixelflyLinear, densify_, masks, sparsify_
from pixelfly.nn import PixelflyMLP
from pixelfly.pretrained import from_pretrained, restore_structure_, save_pretrained, structure

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def gpt2(**options: object) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0.0, **options
    )
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config).eval()


IDS = torch.arange(20)[None]
CONFIGS = [
    {},
    {"lowrank": "global"},
    {"gate": "scalar", "rank": 16},
    {"fuse_mlp": True, "rank": 0},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_gpt2_comes_back(options, tmp_path):
    model = gpt2()
    sparsify_(model, PixelflyConfig(density=0.75, block_size=16, **options), "gpt2")
    y = model(input_ids=IDS).logits
    save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "pixelfly")
    for kind in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        loaded = from_pretrained(kind, tmp_path)
        assert type(loaded) is type(model) and not loaded.training
        assert torch.equal(loaded(input_ids=IDS).logits, y)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert structure(loaded) == structure(model)
    kinds = {type(m) for m in loaded.modules()}
    assert PixelflyLinear in kinds and (PixelflyMLP in kinds) == ("fuse_mlp" in options)
    densify_(loaded)  # Conv1D again
    torch.testing.assert_close(loaded(input_ids=IDS).logits, y, rtol=1e-4, atol=1e-4)


def test_many_files_and_half_precision(tmp_path):
    model = gpt2()
    sparsify_(model, PixelflyConfig(density=0.75, block_size=16), "gpt2")
    model.to(torch.bfloat16)
    save_pretrained(model, tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = from_pretrained(transformers.GPT2LMHeadModel, tmp_path)
    for name, value in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == value.dtype and torch.equal(other, value), name


def test_what_does_not_belong_together_is_refused(tmp_path):
    model = gpt2()
    with pytest.raises(ValueError, match="must contain a PixelflyLinear"):
        save_pretrained(model, tmp_path)
    with pytest.raises(TypeError, match="must be a transformers model, got Sequential"):
        save_pretrained(nn.Sequential(PixelflyLinear(64, 64, block_size=16)), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path / "nowhere")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="must have an entry 'pixelfly'"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path / "dense")

    sparsify_(model, PixelflyConfig(density=0.75, block_size=16), "gpt2")
    save_pretrained(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="missing .*blocks.*unexpected .*weight"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="(?i)incomplete|header|deserializ"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path)


def test_another_layout_in_the_config_is_refused(tmp_path):
    """Equal shapes with other blocks: the weights' own layouts are compared."""
    saved = gpt2()
    sparsify_(saved, PixelflyConfig(density=0.5, block_size=16, rank=0), "gpt2")
    save_pretrained(saved, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layout = saved.transformer.h[0].mlp.c_fc.layout
    flipped = masks.BlockLayout.from_grid(layout.grid.flip(0), 16)
    other = structure(nn.Sequential(PixelflyLinear(64, 256, layout=flipped, rank=0)))
    layer = config["pixelfly"]["layers"]["transformer.h.0.mlp.c_fc"]
    layer["layout"] = other["layers"]["0"]["layout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="layout is another one"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path)


def test_a_structure_of_another_model_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    sparsify_(model, PixelflyConfig(density=0.5, block_size=16))
    entry = structure(model)
    for other, message in (
        (nn.Sequential(nn.Linear(64, 128)), "1 must be a linear layer 128->64, got none"),
        (nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32)), "got 128->32"),
        (nn.Sequential(nn.Linear(64, 128), nn.ReLU()), "got ReLU"),
    ):
        with pytest.raises(ValueError, match=message):
            restore_structure_(other, entry)
        assert not any(isinstance(m, PixelflyLinear) for m in other.modules())
    with pytest.raises(ValueError, match="version 1, got 7"):
        restore_structure_(nn.Sequential(), entry | {"version": 7})


SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 128}
# transformers renames their weights, or joins several, between model and file.
RENAMED = {
    "ViTForImageClassification": ("ViTConfig", {"image_size": 16, "patch_size": 8}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {"vocab_size": 96}),
    "MixtralForCausalLM": (
        "MixtralConfig", {"vocab_size": 96, "num_local_experts": 2, "num_key_value_heads": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(RENAMED))
def test_names_in_the_files_are_the_models(name, tmp_path):
    config, options = RENAMED[name]
    kind = getattr(transformers, name)
    model = kind(getattr(transformers, config)(**SMALL, **options)).eval()
    report = sparsify_(
        model,
        PixelflyConfig(density=0.75, block_size=16, rank=0),
        lambda module, name: not name.endswith(("classifier", "lm_head", "embed_out")),
    )
    assert report.layers
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(kind, tmp_path)
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    call = images if "image_size" in options else {"input_ids": IDS}
    assert torch.equal(loaded(**call).logits, model(**call).logits)
