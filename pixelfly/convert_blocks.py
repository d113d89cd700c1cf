"""What `sparsify_` and `densify_` do with the residual blocks of a model."""

from __future__ import annotations

from torch import nn

from .convert_attention import Places
from .nn.attention import FullSelfAttention, PixelflySelfAttention, known_kind, obstacle
from .nn.blocks import FusedBlock, FusedMixerBlock, FusedTransformerBlock
from .nn.dense import has_hooks, match_activation
from .nn.gpt2_block import fuse_gpt2_block, is_gpt2_block, restore_gpt2_block
from .nn.patches import PatchConv2d
from .nn.patches import obstacle as patches_obstacle
from .report import Report

# By the class that defines the forward: a subclass may do something else.
_KNOWN: dict[tuple[str, str], type[FusedBlock]] = {
    ("timm.models.vision_transformer", "Block"): FusedTransformerBlock,
    ("timm.models.mlp_mixer", "MixerBlock"): FusedMixerBlock,
}
_PATCH_EMBED = ("timm.layers.patch_embed", "PatchEmbed")


def fuse_blocks(model: nn.Module, places: Places, report: Report) -> None:
    """Puts fused blocks in the place of timm's, and what suits them in the place of their parts.

    Patch embeddings in front of them become matrix products. GPT-2's blocks change in place.
    """
    known = [(n, m, _kind(m)) for n, m in model.named_modules() if _kind(m) is not None]
    gpt2 = [(n, m) for n, m in model.named_modules() if is_gpt2_block(m)]
    if not known and not gpt2:
        report.notes.append(
            "blocks not fused: the model has no Block and no MixerBlock of timm and no GPT2Block"
        )
    for name, module in gpt2:
        if "forward" in vars(module):
            report.notes.append(f"{name}: block not fused: its forward was replaced")
        else:
            fuse_gpt2_block(module)
            report.fused_blocks.append(name)
    for name, module, kind in known:
        reason = _obstacle(module)
        if id(module) not in places:
            reason = "it is the model itself, which cannot be replaced in place"
        if reason is not None:
            report.notes.append(f"{name}: block not fused: {reason}")
            continue
        block = kind.from_module(module)
        if kind is FusedTransformerBlock:
            attention = block.attn
            if known_kind(attention) is PixelflySelfAttention and obstacle(attention) is None:
                block.attn = FullSelfAttention.from_module(attention)
        for parent, key in places[id(module)]:
            parent._modules[key] = block
        report.fused_blocks.append(name)
    if known and report.fused_blocks:
        _convert_patches(model, places, report)


def _convert_patches(model: nn.Module, places: Places, report: Report) -> None:
    for name, module in list(model.named_modules()):
        if (type(module).__module__, type(module).__name__) != _PATCH_EMBED:
            continue
        conv = module.proj
        if type(conv) is nn.Conv2d and patches_obstacle(conv) is None and not has_hooks(conv):
            patches = PatchConv2d.from_conv(conv)
            for parent, key in places[id(conv)]:
                parent._modules[key] = patches
            report.fused_blocks.append(f"{name}.proj")


def restore_blocks(model: nn.Module) -> None:
    """Undoes `fuse_blocks`."""
    restored: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        restore_gpt2_block(parent)
        for key, child in parent._modules.items():
            if isinstance(child, FusedBlock | PatchConv2d):
                if id(child) not in restored:
                    back = child.to_original if isinstance(child, FusedBlock) else child.to_conv
                    restored[id(child)] = back()
                parent._modules[key] = restored[id(child)]


def _kind(module: nn.Module) -> type[FusedBlock] | None:
    return _KNOWN.get((type(module).__module__, type(module).__name__))


def _obstacle(block: nn.Module) -> str | None:
    """Returns why a known block cannot be replaced, or None."""
    if has_hooks(block):
        return "it has hooks, which a new module would lose"
    if _kind(block) is FusedTransformerBlock:
        return None
    mlp = block.mlp_tokens
    if (type(mlp).__module__, type(mlp).__name__) != ("timm.layers.mlp", "Mlp"):
        return f"its mlp_tokens is a {type(mlp).__name__}, not timm's Mlp"
    if has_hooks(mlp):
        return "its mlp_tokens has hooks, which a new module would lose"
    for layer in (mlp.fc1, mlp.fc2):
        if type(layer) is not nn.Linear:
            return f"its mlp_tokens has a {type(layer).__name__}, not nn.Linear"
        if has_hooks(layer):
            return "a layer of its mlp_tokens has hooks, which would not be called"
    if mlp.drop1.p or mlp.drop2.p or not isinstance(mlp.norm, nn.Identity):
        return "its mlp_tokens has dropout or a norm"
    if match_activation(mlp.act) is None:
        return f"the activation {type(mlp.act).__name__} of its mlp_tokens is unknown"
    return None
