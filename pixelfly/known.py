"""What `sparsify_` knows of the modules of torch, timm and transformers."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from torch import nn

from .nn.dense import has_hooks
from .nn.linear import PixelflyLinear


@dataclass(frozen=True)
class KnownMLP:
    """An MLP of a library that computes `fc2(act(fc1(x)))` and dropouts."""

    names: tuple[str, str]
    dropouts: tuple[str, ...]

    def obstacle(self, module: nn.Module) -> str | None:
        """Returns why a PixelflyMLP would not do what this module does, or None."""
        for name in self.dropouts:
            if getattr(module, name).p > 0:
                return f"its dropout is {getattr(module, name).p:g}, not 0"
        if not isinstance(getattr(module, "norm", None), (nn.Identity, type(None))):
            return "it has a norm between its layers"
        if has_hooks(module):
            return "it has hooks, which a new module would lose"
        return None


# By the class that defines the forward: a subclass may do something else.
KNOWN_MLPS = {
    ("timm.layers.mlp", "Mlp"): KnownMLP(("fc1", "fc2"), ("drop1", "drop2")),
    ("transformers.models.gpt2.modeling_gpt2", "GPT2MLP"): KnownMLP(
        ("c_fc", "c_proj"), ("dropout",)
    ),
}


def turn_off_fast_paths(model: nn.Module) -> None:
    """Keeps torch's encoder layers from reading the dense weights of linear1 and linear2, as their
    inference fast paths do."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if isinstance(module.linear1, PixelflyLinear) or isinstance(
                module.linear2, PixelflyLinear
            ):
                module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def module_places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Returns, by a module's id, the parents that hold it and under which names."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, key))
    return places


def reads_weight(parent: type[nn.Module], key: str) -> bool:
    """Tells whether a module's forward names the weight of its child `key`."""
    if parent is nn.TransformerEncoderLayer:
        return False  # in its inference fast path only, which `finish` turns off
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):
        return False  # no source: called interactively, or compiled
    return re.search(rf"\bself\.{re.escape(key)}\.weight\b", source) is not None
