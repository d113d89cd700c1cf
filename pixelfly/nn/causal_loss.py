"""The loss of transformers' GPT-2 without its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import linear_cross_entropy
from .dense import has_hooks, replace_forward, restore_forward

# By the class that defines the forward: a subclass may do something else.
_KNOWN = ("transformers.models.gpt2.modeling_gpt2", "GPT2LMHeadModel")


def is_causal_model(module: nn.Module) -> bool:
    """Tells transformers' `GPT2LMHeadModel`, without importing it.

    Example:
        >>> is_causal_model(nn.Linear(8, 8))
        False
    """
    return (type(module).__module__, type(module).__name__) == _KNOWN


def obstacle(model: nn.Module) -> str | None:
    """Returns why such a model's loss cannot be fused, or None."""
    if "forward" in vars(model):
        return "its forward was replaced"
    if type(model.lm_head) is not nn.Linear or model.lm_head.bias is not None:
        return "its lm_head is no nn.Linear without a bias"
    if has_hooks(model.lm_head):
        return "its lm_head has hooks, which would not be called"
    return None


def fuse_loss(model: nn.Module) -> None:
    """Lets a model in training that is given `labels` answer with the loss alone.

    `logits` are None in that answer. Evaluation, generation and calls without labels are the
    class's own.
    """
    replace_forward(model, _forward)


def restore_loss(model: nn.Module) -> None:
    """Undoes `fuse_loss` in a model and whatever it holds."""
    for module in model.modules():
        restore_forward(module, _forward)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    whole = (
        not self.training
        or kwargs.get("labels") is None
        or len(args) > 1  # the base model's second argument may not be the model's
        or not isinstance(kwargs.get("logits_to_keep", 0), int)
        or kwargs.get("logits_to_keep", 0) != 0
        or kwargs.get("return_dict", getattr(self.config, "return_dict", True)) is False
    )
    if whole:
        return type(self).forward(self, *args, **kwargs)
    options = dict(kwargs)
    labels, shifted = options.pop("labels"), options.pop("shift_labels", None)
    count = options.pop("num_items_in_batch", None)
    ignore = options.pop("ignore_index", -100)
    for name in ("logits_to_keep", "return_dict"):
        options.pop(name, None)
    base = self.transformer(*args, **options)
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=ignore)[..., 1:]
    loss = linear_cross_entropy(
        base.last_hidden_state,
        self.lm_head.weight,
        shifted.to(base.last_hidden_state.device),
        ignore_index=ignore,
        reduction="mean" if count is None else "sum",
    )
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    fields = {f: base.get(f) for f in base.keys() if f != "last_hidden_state"}
    return CausalLMOutputWithCrossAttentions(loss=loss, **fields)
