"""The structure of a converted model as data, and Hugging Face folders that keep it.

A state dict carries each layer's layout, but loads only into a model that has these layers already.
`structure` writes down which layers they are; `restore_structure_` makes them in a freshly built
dense model. `save_pretrained` and `from_pretrained` do both for transformers' models:

    save_pretrained(model, "folder")
    model = from_pretrained(GPT2LMHeadModel, "folder")

The folder is an ordinary one, whose config.json has an entry `pixelfly`. transformers' own
`from_pretrained` knows nothing of that entry and would leave the converted layers untrained.
"""

from __future__ import annotations

import base64
import inspect
import json
import os
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn

from .known import module_places, turn_off_fast_paths
from .nn.dense import dense_parameters, is_conv1d
from .nn.linear import PixelflyLinear
from .nn.mlp import PixelflyMLP
from .nn.state import decode_layout, describe, encode_layout

__all__ = ["from_pretrained", "restore_structure_", "save_pretrained", "structure"]

_VERSION = 1
_ENTRY = "pixelfly"  # in config.json


def structure(model: nn.Module) -> dict[str, Any]:
    """Returns which layers of a model are Pixelfly layers, and of what kind, as JSON has it.

    Args:
        model: any module that contains Pixelfly layers; must not be one itself.

    Raises:
        TypeError: `model` is itself a Pixelfly layer.
        ValueError: it has none.

    Example:
        >>> import pixelfly
        >>> def build():
        ...     return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> model = build()
        >>> _ = pixelfly.sparsify_(model, pixelfly.PixelflyConfig(block_size=16))
        >>> entry = structure(model)
        >>> other = build()
        >>> restore_structure_(other, entry)
        ['0']
        >>> other.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """
    if isinstance(model, PixelflyLinear | PixelflyMLP):
        raise TypeError(f"structure: model is itself a {type(model).__name__}")
    layers, mlps = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, PixelflyMLP):
            mlps[name] = list(module.names)
        elif isinstance(module, PixelflyLinear):
            layers[name] = {
                "layout": base64.b64encode(encode_layout(module.layout).numpy()).decode(),
                "rank": module.rank,
                "lowrank": module.choice.lowrank,
                "bias": module.bias is not None,
                "gate": module.gate_kind,
                "activation": module.activation,
                "init_std": module.init_std,
            }
    if not layers:
        raise ValueError("structure: model must contain a PixelflyLinear, got none")
    return {"version": _VERSION, "layers": layers, "mlps": mlps}


def restore_structure_(model: nn.Module, entry: dict[str, Any]) -> list[str]:
    """Puts untrained Pixelfly layers in the place of a dense model's layers, in place.

    Args:
        model: the dense model, as its library builds it.
        entry: what `structure` returned.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: the entry has another version, or the model lacks a layer that it names or has
            another one there. Nothing was changed then.
    """
    if not isinstance(entry, dict) or entry.get("version") != _VERSION:
        found = entry.get("version") if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"restore_structure_: entry must have version {_VERSION}, got {found}")
    modules = dict(model.named_modules())
    new = {name: _layer(name, modules.get(name), kind) for name, kind in entry["layers"].items()}
    missing = [
        name
        for name, parts in entry["mlps"].items()
        if name not in modules or not all(f"{name}.{part}" in new for part in parts)
    ]
    if missing:
        raise ValueError(f"restore_structure_: the model must have the MLPs {missing}")
    places = module_places(model)
    for name, layer in new.items():
        for parent, key in places[id(modules[name])]:
            parent._modules[key] = layer
    for name, parts in entry["mlps"].items():
        first, second = (new[f"{name}.{part}"] for part in parts)
        mlp = PixelflyMLP.from_layers(first, second, tuple(parts)).train(modules[name].training)
        for parent, key in places[id(modules[name])]:
            parent._modules[key] = mlp
    turn_off_fast_paths(model)
    return list(new)


def _layer(name: str, dense: nn.Module | None, kind: dict[str, Any]) -> PixelflyLinear:
    """The untrained layer that stood in a dense one's place."""
    data = np.frombuffer(base64.b64decode(kind["layout"]), np.uint8).copy()
    layout = decode_layout(torch.from_numpy(data))
    expected = f"a linear layer {layout.in_features}->{layout.out_features}"
    if not isinstance(dense, nn.Linear) and not (dense is not None and is_conv1d(dense)):
        found = "none" if dense is None else type(dense).__name__
        raise ValueError(f"restore_structure_: {name} must be {expected}, got {found}")
    weight, _ = dense_parameters(dense)
    if tuple(weight.shape) != (layout.out_features, layout.in_features):
        found = f"{weight.shape[1]}->{weight.shape[0]}"
        raise ValueError(f"restore_structure_: {name} must be {expected}, got {found}")
    layer = PixelflyLinear(
        layout.in_features,
        layout.out_features,
        kind["bias"],
        layout=layout,
        rank=kind["rank"],
        lowrank=kind["lowrank"],
        gate=kind["gate"],
        activation=kind["activation"],
        device=weight.device,
        dtype=weight.dtype,
    )
    if layer.layout != layout:  # a layout made by hand, beside lowrank="global"
        raise ValueError(
            f"restore_structure_: {name} must keep {describe(layout)}, got {describe(layer.layout)}"
        )
    layer.init_std, layer.dense_type = kind["init_std"], type(dense)
    layer.requires_grad_(weight.requires_grad)
    return layer.train(dense.training)


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Saves a converted transformers model with the structure of its layers.

    Args:
        model: a `PreTrainedModel` with Pixelfly layers.
        folder: where to; made if it does not exist.
        options: passed to the model's own `save_pretrained`. Names in the files are the model's,
            not those of its class's earlier versions (`save_original_format`).

    Raises:
        TypeError: `model` is none of transformers' models.
        ValueError: it has no Pixelfly layer.
    """
    if not callable(getattr(model, "save_pretrained", None)) or not hasattr(model, "config"):
        raise TypeError(
            f"save_pretrained: model must be a transformers model, got {type(model).__name__}; for "
            "others keep `structure(model)` beside the state dict"
        )
    # What transformers renames or joins on the way to a file it would have to undo on the way back.
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        options.setdefault("save_original_format", False)
    # In the file alone: a config that outlived densify_ would describe another model.
    setattr(model.config, _ENTRY, structure(model))
    try:
        model.save_pretrained(folder, **options)
    finally:
        delattr(model.config, _ENTRY)


def from_pretrained(model_class: type, folder: str | os.PathLike[str]) -> nn.Module:
    """Loads what `save_pretrained` saved: the same layers with the same weights, in eval mode.

    Args:
        model_class: the class that was saved (`GPT2LMHeadModel`), or an Auto class.
        folder: a local folder; weights in safetensors files, one or many.

    Raises:
        FileNotFoundError: the folder has no config or no weights.
        ValueError: its config has no structure, or structure and weights do not belong together.
    """
    from transformers import AutoConfig

    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"from_pretrained: there is no config.json in {folder}")
    config = AutoConfig.from_pretrained(folder)
    entry = getattr(config, _ENTRY, None)
    if entry is None:
        raise ValueError(
            f"from_pretrained: config.json in {folder} must have an entry {_ENTRY!r}, which "
            "pixelfly.pretrained.save_pretrained writes; got none"
        )
    delattr(config, _ENTRY)
    automatic = hasattr(model_class, "from_config")
    model = model_class.from_config(config) if automatic else model_class(config)
    if isinstance(dtype := getattr(config, "dtype", None), torch.dtype):
        model.to(dtype)
    restore_structure_(model, entry)
    missing, unexpected = model.load_state_dict(_weights(folder), strict=False)
    held = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(p) for name, p in held.items() if name not in missing}
    # Of tied parameters the files hold one.
    missing = [name for name in missing if name not in held or id(held[name]) not in loaded]
    if missing or unexpected:
        raise ValueError(
            f"from_pretrained: the weights in {folder} must be those of its structure; missing "
            f"{missing[:5]}, unexpected {unexpected[:5]}"
        )
    return model.eval()


def _weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.is_file():
        files = [single.name]
    else:
        raise FileNotFoundError(f"from_pretrained: there is no model.safetensors in {folder}")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= load_file(folder / file)
    return state
