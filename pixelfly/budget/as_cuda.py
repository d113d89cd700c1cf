"""Makes a run on the CPU's fake tensors choose the operators that CUDA would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..masks import AttentionLayout
from ..ops import butterfly_attention
from .operators import block_attention
from .rate import Work

# What CUDA's autocast runs in float32 (AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE of torch's
# ATen/autocast_mode.h), by the names of the functions that call it. The CPU's autocast leaves most
# of these alone.
_FLOAT32 = frozenset(
    """
    __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh
    cosine_embedding_loss cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1
    group_norm hinge_embedding_loss huber_loss interpolate kl_div l1_loss layer_norm log log10
    log1p log2 log_softmax logsumexp margin_ranking_loss mse_loss multi_margin_loss
    multilabel_margin_loss nll_loss norm normalize pdist poisson_nll_loss pow prod reciprocal
    renorm rms_norm rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin softplus sum tan
    triplet_margin_loss
    """.split()
)


class AsCUDA(TorchFunctionMode):
    """Dropout as one operator, attention fused with dropout or a layout too, and CUDA's autocast
    list.

    The CPU's own autocast, where the caller or the model enters it, casts the inputs of matmuls as
    CUDA's does.

    Args:
        attended: gets the MACs and the work of every `butterfly_attention`, which here computes
            nothing: on the CPU it would be many operators.
    """

    def __init__(self, attended: Callable[[int, Work], None]) -> None:
        super().__init__()
        self.attended = attended

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            kwargs = {name: value for name, value in kwargs.items() if name != "dropout_p"}
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            return func(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is butterfly_attention:
            return self._attention(*args, **kwargs)
        if getattr(func, "__name__", "") in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _float, (args, kwargs))
        return func(*args, **kwargs)

    def _attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: AttentionLayout,
        *,
        is_causal: bool,
        **unseen: Any,
    ) -> torch.Tensor:
        y = _Attention.apply(q, k, v)
        with _disable_current_modes():  # a layout has values
            kept = layout.causal() if is_causal else layout
            macs_and_work = block_attention(q, k, v, y, kept)
        self.attended(*macs_and_work)
        return y


class _Attention(torch.autograd.Function):
    """Tensors of the shapes of an attention and its gradients, heads beside features as CUDA's."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return _empty(q, v.shape[3])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_empty(t, t.shape[3]) for t in ctx.saved_tensors)


def _empty(t: torch.Tensor, features: int) -> torch.Tensor:
    batch, heads, tokens, _ = t.shape
    return t.new_empty(batch, tokens, heads, features).transpose(1, 2)


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _float(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t
