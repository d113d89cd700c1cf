"""What `sparsify_` does with the loss of a language model."""

from __future__ import annotations

from torch import nn

from .nn.causal_loss import fuse_loss, is_causal_model, obstacle
from .report import Report


def fuse_losses(model: nn.Module, report: Report) -> None:
    """Fuses the last layer and the loss of every GPT2LMHeadModel."""
    known = [(n or "the model", m) for n, m in model.named_modules() if is_causal_model(m)]
    if not known:
        report.notes.append("loss not fused: the model has no GPT2LMHeadModel of transformers")
    for name, module in known:
        reason = obstacle(module)
        if reason is None:
            fuse_loss(module)
            report.fused_losses.append(name)
        else:
            report.notes.append(f"{name}: loss not fused: {reason}")
