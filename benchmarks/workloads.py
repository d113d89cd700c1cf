"""The whole models whose training steps are measured, and which of their layers become sparse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

Loss = Callable[[nn.Module], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its batch, and which of its linear layers the publication made sparse."""

    build: Callable[[str], tuple[nn.Module, Loss, str]]  # of the device
    sparse: tuple[str, ...]  # by the end of their names

    def chosen(self, module: nn.Module, name: str) -> bool:
        return name.endswith(self.sparse)


def vision(name: str, batch: int, device: str) -> tuple[nn.Module, Loss, str]:
    """A timm model, cross entropy over random images."""
    import timm

    model = timm.create_model(name)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    return model, lambda m: F.cross_entropy(m(images), labels), f"{batch} images"


def causal_attention(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
    """transformers' attention interface over torch's fused causal kernels, [B, H, S, D] inputs.

    Its own "sdpa" builds a mask of S x S when it is compiled, for sequences that might be packed,
    and so keeps the fused causal kernels from being chosen.
    """
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


def gpt2_config(width: int, layers: int, head: int, length: int):
    """A GPT-2 without dropout (as the attention above has none), heads of `head` features."""
    from transformers import AttentionInterface, GPT2Config

    AttentionInterface.register("fused_causal", causal_attention)
    return GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=width // head,
        n_positions=length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="fused_causal",
    )


def gpt2(
    width: int, layers: int, batch: int, length: int, device: str
) -> tuple[nn.Module, Loss, str]:
    """transformers' GPT-2 without dropout, next-token loss over random ids."""
    from transformers import GPT2LMHeadModel

    config = gpt2_config(width, layers, 64, length)
    model = GPT2LMHeadModel(config)
    # Unset, the first forward logs a warning, at which torch.compile breaks the graph.
    model.loss_type = "ForCausalLM"
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
    return model, lambda m: m(input_ids=ids, labels=ids).loss, f"{batch} x {length} tokens"


class Stack(nn.Module):
    """GPT-2 blocks alone (no embedding, no head): what a wider model spends its time on."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        config = gpt2_config(width, layers, min(128, width), 1024)
        self.h = nn.ModuleList(GPT2Block(config, layer_idx=i) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


def stack(
    width: int, layers: int, batch: int, length: int, device: str
) -> tuple[nn.Module, Loss, str]:
    """A stack of GPT-2 blocks under a mean-square loss."""
    x = torch.randn(batch, length, width, device=device)
    model = Stack(width, layers)
    return model, lambda m: m(x).float().square().mean(), f"{batch} x {length} tokens"


VIT = ("mlp.fc1", "mlp.fc2", "attn.qkv")
MIXER = ("mlp_channels.fc1", "mlp_channels.fc2")
GPT2 = ("mlp.c_fc", "mlp.c_proj")
BLOCK = ("c_fc", "c_proj", "c_attn")

WORKLOADS = {
    "vit": Workload(lambda device: vision("vit_base_patch16_224", 128, device), VIT),
    "mixer": Workload(lambda device: vision("mixer_b16_224", 128, device), MIXER),
    "gpt2": Workload(lambda device: gpt2(1024, 24, 8, 1024, device), GPT2),
    "stack2048": Workload(lambda device: stack(2048, 8, 8, 1024, device), BLOCK),
    "stack4096": Workload(lambda device: stack(4096, 4, 8, 1024, device), BLOCK),
    # For a try on the CPU: nobody's model.
    "tiny": Workload(lambda device: gpt2(256, 2, 2, 32, device), GPT2),
}
