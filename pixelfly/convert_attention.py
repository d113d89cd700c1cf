"""What `sparsify_` and `densify_` do with the attention modules of a model."""

from __future__ import annotations

from torch import nn

from .nn.attention import (
    AttentionConfig,
    FullSelfAttention,
    PixelflySelfAttention,
    known_kind,
    obstacle,
)
from .report import AttentionReport, Report

Places = dict[int, list[tuple[nn.Module, str]]]


def attention_config(value: object) -> AttentionConfig | None:
    """Returns what `PixelflyConfig(attention=...)` was given; a dict is one read from JSON."""
    if isinstance(value, dict):
        return AttentionConfig(**value)
    if value is None or isinstance(value, AttentionConfig):
        return value
    kind = type(value).__name__
    raise TypeError(f"attention must be an AttentionConfig or None, got {kind}")


def convert_attention(
    model: nn.Module, config: AttentionConfig, places: Places, report: Report
) -> None:
    """Puts a `PixelflySelfAttention` in the place of every attention of timm and GPT-2."""
    known = [(n, m) for n, m in model.named_modules() if known_kind(m) is not None]
    if not known:
        report.notes.append(
            "attention not converted: the model has no Attention of timm and no GPT2Attention"
        )
    for name, module in known:
        reason = obstacle(module)
        if id(module) not in places:
            reason = "it is the model itself, which cannot be replaced in place"
        if reason is not None:
            report.notes.append(f"{name}: attention not converted: {reason}")
            continue
        new = PixelflySelfAttention.from_module(module, config)
        for parent, key in places[id(module)]:
            parent._modules[key] = new
        report.attentions.append(AttentionReport.of(name, new))


def restore_attention(model: nn.Module) -> list[str]:
    """Puts the modules back that `sparsify_` replaced; returns the names of the sparse ones."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PixelflySelfAttention) and module.replaces_another
    }
    dense = {id(module): module.to_dense() for module in found.values()}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in dense:
                parent._modules[key] = dense[id(child)]
    return [name for name, module in found.items() if not isinstance(module, FullSelfAttention)]
