"""`PixelflySelfAttention` with the call of transformers' `GPT2Attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from ..ops.attention import attend_rows
from .attention import AttentionConfig, PixelflySelfAttention


class PixelflyGPT2Attention(PixelflySelfAttention):
    """A drop-in for transformers' `GPT2Attention`; made by `PixelflySelfAttention.from_module`.

    Causal. With a cache (`DynamicCache`) the first call fills it and later ones compute the rows of
    the same layout that their queries have, so decoding sees what a whole pass sees. Attention
    weights are never formed: `output_attentions` is refused here, and a model that is asked for
    them (which collects what its own class of attention returns) answers with an empty tuple.
    """

    def _take(self, module: nn.Module, attention: AttentionConfig | None) -> None:
        names = ("c_attn", "c_proj")
        heads, width = module.num_heads, module.head_dim
        self._settle(names, heads, width, attention, True, float(module.scaling))
        self.layer_idx = module.layer_idx
        for name in (*names, "resid_dropout"):
            self.add_module(name, getattr(module, name))

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Applies the attention.

        Args:
            hidden_states: `[B, N, C]`.
            past_key_values: a transformers cache that grows by the keys it is given, or None.
            attention_mask: `[B, keys]`, not zero where a key takes part; or what transformers makes
                of it, `[B, 1, N, keys]`, which must be causal masking and padding and nothing else.
            cache: what transformers calls past_key_values from 5.24 on.

        Returns:
            (`[B, N, C]`, None): no attention weights.
        """
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("PixelflyGPT2Attention: cross-attention is not supported")
        if output_attentions:
            raise ValueError(
                "PixelflyGPT2Attention: output_attentions=True needs all attention weights, which "
                "are never formed"
            )
        self._check(hidden_states)
        batch, length, _ = hidden_states.shape
        q, k, v = self._project(hidden_states)
        past = 0
        past_key_values = past_key_values if cache is None else cache
        if past_key_values is not None:
            past = int(past_key_values.get_seq_length(self.layer_idx))
            k, v = past_key_values.update(k, v, self.layer_idx)
            if k.shape[2] != past + length:
                raise ValueError(
                    "PixelflyGPT2Attention: past_key_values must grow by what it is given "
                    f"(DynamicCache): expected {past + length} keys, got {k.shape[2]} from "
                    f"{type(past_key_values).__name__}"
                )
        hidden = None
        if attention_mask is not None:
            hidden = _hidden_keys(attention_mask, batch, length, past)
        if past:
            layout = self.attention.layout(past + length, True)
            y = attend_rows(q, k, v, layout, past, scale=self.scale, key_padding_mask=hidden)
        else:
            y = self._attend(q, k, v, True, hidden)
        return self.resid_dropout(self.c_proj(self._merge(y))), None


def _hidden_keys(mask: torch.Tensor, batch: int, length: int, past: int) -> torch.Tensor:
    """The padding in a mask of transformers, as bool `[B, keys]`; refuses what is not padding."""
    keys = past + length
    if mask.dim() == 2 and list(mask.shape) == [batch, keys]:
        return mask == 0
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or list(mask.shape[1:]) != [
        1, length, keys,
    ]:  # fmt: skip
        raise ValueError(
            f"PixelflyGPT2Attention: attention_mask.shape must be {[batch, keys]} or "
            f"{[batch, 1, length, keys]}, got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2
        _require((mask == 0) | ~seen)
    visible = seen[:, 0, -1]  # the last query sees every key that is not padding
    causal = torch.ones(length, keys, dtype=torch.bool, device=mask.device).tril(past)
    expected = causal & visible[:, None, None]
    # Rows that see nothing may be opened, against NaN: they are padding themselves.
    _require((seen == expected) | ~expected.any(-1, keepdim=True))
    return ~visible.expand(batch, -1)


def _require(holds: torch.Tensor) -> None:
    message = "PixelflyGPT2Attention: attention_mask must be causal masking and padding alone"
    if torch.compiler.is_compiling() or is_fake(holds):
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)
