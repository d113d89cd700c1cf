"""`PixelflySelfAttention`: multi-head self-attention over the kept blocks of the scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..masks.attention import ATTENTION_BLOCK_SIZES, AttentionLayout, butterfly_attention_layout
from ..ops import butterfly_qkv, short_attention
from ..ops.attention import butterfly_attention
from ..ops.functional import products_dtype
from ..ops.short_attention import serves
from .dense import call_linear, has_hooks
from .linear import is_plain


@dataclass(frozen=True)
class AttentionConfig:
    """Which scores an attention keeps, for sequences of any length.

    Args:
        block_size: 16, 32, 64 or 128 tokens; on CUDA 64 or 128.
        max_stride: of the flat butterfly, a power of two; None: the whole grid.
        global_blocks: leading blocks that see and are seen by everybody.
        local_blocks: neighbours on either side of the diagonal.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> AttentionConfig(block_size=64).layout(1000, causal=True)
        AttentionLayout(1000x1000, block_size=64, heads=1, grid 16x16, density 23.1%)
    """

    block_size: int = 128
    max_stride: int | None = None
    global_blocks: int = 1
    local_blocks: int = 0

    def __post_init__(self) -> None:
        if self.block_size not in ATTENTION_BLOCK_SIZES:
            raise ValueError(
                f"AttentionConfig: block_size must be one of {ATTENTION_BLOCK_SIZES}, "
                f"got {self.block_size!r}"
            )
        stride = self.max_stride
        if stride is not None and (stride < 1 or stride & (stride - 1)):
            raise ValueError(
                f"AttentionConfig: max_stride must be a power of two or None, got {stride}"
            )
        for name in ("global_blocks", "local_blocks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(
                    f"AttentionConfig: {name} must be a non-negative int, "
                    f"got {getattr(self, name)!r}"
                )

    def layout(
        self, length: int, causal: bool = False, device: torch.device | None = None
    ) -> AttentionLayout:
        """Returns the layout of one length; made once. Strides stop at the grid of a short one.

        Under `torch.compile` everything that `device` needs is made while tracing.
        """
        if torch.compiler.is_compiling():
            fields = self.block_size, self.max_stride, self.global_blocks, self.local_blocks
            length = len(range(length))  # a length that dynamo traces as a symbol becomes a number
            return getattr(_STORE, _stored(str(device), length, causal, *fields))
        return _layout(length, causal, *astuple(self))


@functools.lru_cache(maxsize=256)
def _layout(
    length: int, causal: bool, block_size: int, stride: int | None, global_: int, local: int
) -> AttentionLayout:
    full = 1 << (-(-length // block_size) - 1).bit_length()
    # Whatever mode the caller is in, a layout is of plain tensors that later calls can use.
    with _disable_current_modes(), torch.inference_mode(False):
        return butterfly_attention_layout(
            length,
            block_size=block_size,
            max_stride=None if stride is None else min(stride, full),
            global_blocks=global_,
            local_blocks=local,
            causal=causal,
        )


class _Store:
    """Layouts by name: dynamo cannot make one (it needs the grid's values) but can read one."""


_STORE = _Store()


@torch.compiler.assume_constant_result
def _stored(device: str, length: int, causal: bool, *fields: int | None) -> str:
    layout = _layout(length, causal, *fields)
    if not device.startswith("cuda"):
        _ = layout.row_groups
    name = "layout_" + "_".join(map(str, (length, causal, *fields)))
    setattr(_STORE, name, layout)
    return name


class PixelflySelfAttention(nn.Module):
    """Self-attention with butterfly + global blocks of scores, a drop-in for timm's `Attention`.

    Computes `proj(attention(q, k, v))` with q, k, v the thirds of `qkv(x)`. The layout follows the
    sequence length and is made once for each; lengths need not be multiples of the block size.

    Args:
        features: C, of the input and the output.
        num_heads: H; must divide `features`.
        attention: which scores are kept; None is `AttentionConfig()`.
        is_causal: whether a query sees no later key.
        bias: whether the projections have biases.
        proj_drop: dropout after the output projection. There is none on the attention weights.
        linear: makes a projection of (in, out, bias): `nn.Linear`, or a partial `PixelflyLinear`.

    Raises:
        ValueError: sizes do not fit.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3.

    Example:
        >>> from functools import partial
        >>> from pixelfly import PixelflyLinear
        >>> sparse = partial(PixelflyLinear, density=0.5, block_size=16)
        >>> attention = PixelflySelfAttention(64, 4, linear=sparse)
        >>> attention(torch.randn(2, 300, 64)).shape
        torch.Size([2, 300, 64])
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        attention: AttentionConfig | None = None,
        is_causal: bool = False,
        bias: bool = True,
        proj_drop: float = 0.0,
        linear: Callable[[int, int, bool], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        if num_heads <= 0 or features % num_heads:
            raise ValueError(
                f"PixelflySelfAttention: num_heads must divide features={features}, got {num_heads}"
            )
        self._settle(("qkv", "proj"), num_heads, features // num_heads, attention, is_causal)
        self.qkv = linear(features, 3 * features, bias)
        self.proj = linear(features, features, bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def _settle(
        self,
        names: tuple[str, str],
        num_heads: int,
        head_dim: int,
        attention: AttentionConfig | None,
        is_causal: bool,
        scale: float | None = None,
    ) -> None:
        self.names, self.num_heads, self.head_dim = names, num_heads, head_dim
        self.attention = AttentionConfig() if attention is None else attention
        self.is_causal = is_causal
        self.scale = head_dim**-0.5 if scale is None else scale
        # The module that `from_module` replaced, without its projections, for `to_dense`.
        self._original: list[nn.Module] = []

    @classmethod
    def from_module(
        cls, module: nn.Module, attention: AttentionConfig | None = None
    ) -> PixelflySelfAttention:
        """Returns the attention of timm's `Attention` or transformers' `GPT2Attention`.

        Projections, norms and dropouts are taken over as they are, under their names, so the state
        dict's keys stay. The replaced module is left without them.

        Args:
            module: its projections may be `nn.Linear`, `Conv1D` or `PixelflyLinear`.
            attention: which scores are kept; None is `AttentionConfig()`.

        Raises:
            TypeError: another kind of module.
            ValueError: it does something that this attention cannot do; the message says what.
        """
        kind = known_kind(module)
        if kind is None:
            raise TypeError(
                "PixelflySelfAttention: module must be timm's Attention or transformers' "
                f"GPT2Attention, got {type(module).__name__}"
            )
        reason = obstacle(module)
        if reason is not None:
            raise ValueError(f"PixelflySelfAttention: {type(module).__name__}: {reason}")
        return kind._adopt(module, attention)

    @classmethod
    def _adopt(cls, module: nn.Module, attention: AttentionConfig | None) -> PixelflySelfAttention:
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        own._take(module, attention)
        own.train(module.training)
        own._original = [module]
        for name in own._modules:
            module._modules[name] = None
        return own

    def _take(self, module: nn.Module, attention: AttentionConfig | None) -> None:
        heads, width = module.num_heads, module.head_dim
        self._settle(("qkv", "proj"), heads, width, attention, False, float(module.scale))
        for name in ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"):
            child = getattr(module, name, None)
            if child is not None:
                self.add_module(name, child)

    @property
    def replaces_another(self) -> bool:
        """Whether `to_dense` has a module to go back to."""
        return bool(self._original)

    def to_dense(self) -> nn.Module:
        """Gives the projections back to the module that this one replaced, and returns it.

        It computes every score again, so its outputs are other ones.

        Raises:
            ValueError: this attention was not made from another module.
        """
        if not self._original:
            raise ValueError("PixelflySelfAttention.to_dense: was not made from another module")
        module = self._original[0]
        for name, child in self._modules.items():
            module._modules[name] = child
        return module.train(self.training)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Applies the attention.

        Args:
            x: `[B, N, C]`.
            attn_mask: bool `[B, N]` or `[B, 1, 1, N]`, True where a key takes part; or None.
            is_causal: makes this call causal even if the module is not.

        Returns:
            `[B, N, C]`.
        """
        self._check(x)
        causal = self.is_causal or is_causal
        hidden = None if attn_mask is None else ~_visible_keys(attn_mask, *x.shape[:2])
        q, k, v = self._project(x)
        return self._output(x, self._merge(self._attend(q, k, v, causal, hidden)))

    def _output(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What follows the heads side by side, `y [B, N, H * D]`."""
        parts = self._modules  # to miss one there costs no search and no message
        if "norm" in parts:
            y = parts["norm"](y)
        if "gate" in parts:
            y = y * parts["gate"](x).sigmoid()
        return parts["proj_drop"](call_linear(parts["proj"], y))

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 3:
            raise ValueError(f"{type(self).__name__}: x must be [B, N, C], got {list(x.shape)}")

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v, each `[B, H, N, D]`."""
        parts = self._modules
        layer = parts[self.names[0]]
        if is_plain(layer) and layer.activation is None:
            q, k, v = butterfly_qkv(x, layer._weights(), self.num_heads)
        else:
            qkv = layer(x)
            # Taken apart in memory's order: the gradients then meet in one copy.
            qkv = qkv.reshape(*qkv.shape[:-1], 3, self.num_heads, self.head_dim).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in qkv)
        if "q_norm" in parts:  # a norm under autocast may widen its output
            q, k = parts["q_norm"](q).to(v.dtype), parts["k_norm"](k).to(v.dtype)
        return q, k, v

    def _attend(self, q, k, v, causal: bool, hidden: torch.Tensor | None) -> torch.Tensor:
        return butterfly_attention(
            q,
            k,
            v,
            self.attention.layout(q.shape[2], causal, q.device),
            is_causal=causal,
            scale=self.scale,
            key_padding_mask=hidden,
        )

    @staticmethod
    def _merge(y: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}, {self.attention}"


class FullSelfAttention(PixelflySelfAttention):
    """Every score: timm's `Attention` with fewer copies in its backward.

    Sequences that `pixelfly.ops.short_attention` has kernels for go to those, packed as the qkv
    layer makes them; others, and calls with a mask or norms of q and k, to torch's fused kernels.

    Example:
        >>> import timm
        >>> attention = timm.create_model("vit_tiny_patch16_224").blocks[0].attn
        >>> FullSelfAttention.from_module(attention)(torch.randn(2, 5, 192)).shape
        torch.Size([2, 5, 192])
    """

    @classmethod
    def from_module(cls, module: nn.Module) -> FullSelfAttention:
        """Returns the attention of timm's `Attention`, as `PixelflySelfAttention.from_module`."""
        if known_kind(module) is not PixelflySelfAttention:
            raise TypeError(
                f"FullSelfAttention: module must be timm's Attention, got {type(module).__name__}"
            )
        reason = obstacle(module)
        if reason is not None:
            raise ValueError(f"FullSelfAttention: {type(module).__name__}: {reason}")
        return cls._adopt(module, None)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Applies the attention to `[B, N, C]`; a mask is scaled_dot_product_attention's."""
        self._check(x)
        causal = self.is_causal or is_causal
        if attn_mask is None and not causal and self._takes_packed(x):
            qkv = call_linear(self._modules[self.names[0]], x)
            return self._output(x, short_attention(qkv, self.num_heads, scale=self.scale))
        q, k, v = self._project(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal, scale=self.scale)
        return self._output(x, self._merge(y))

    def _takes_packed(self, x: torch.Tensor) -> bool:
        """Whether q, k and v may stay in one tensor: nothing changes them, and kernels read it."""
        if not serves(products_dtype(x), x.shape[1], self.head_dim, x.device):
            return False
        norms = [self._modules[name] for name in ("q_norm", "k_norm") if name in self._modules]
        return all(type(n) is nn.Identity and not has_hooks(n) for n in norms)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, is_causal={self.is_causal}"


def _visible_keys(mask: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """A mask of keys as bool `[B, N]`; refuses masks that say more."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"PixelflySelfAttention: attn_mask must be bool (True: takes part), got {mask.dtype}"
        )
    if tuple(mask.shape) not in ((batch, length), (batch, 1, 1, length)):
        raise ValueError(
            "PixelflySelfAttention: attn_mask may only say which keys take part: its shape must be "
            f"{[batch, length]} or {[batch, 1, 1, length]}, got {list(mask.shape)}"
        )
    return mask.reshape(batch, length)


_TIMM = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}
_GPT2 = ("transformers.models.gpt2.modeling_gpt2", "GPT2Attention")


def known_kind(module: nn.Module) -> type[PixelflySelfAttention] | None:
    """Returns the class that can take a module's place; a subclass may do something else."""
    from .gpt2_attention import PixelflyGPT2Attention

    kind: Any = (type(module).__module__, type(module).__name__)
    if kind in _TIMM:
        return PixelflySelfAttention
    return PixelflyGPT2Attention if kind == _GPT2 else None


def obstacle(module: nn.Module) -> str | None:
    """Returns why a known attention cannot be replaced, or None."""
    dropout = module.attn_drop if hasattr(module, "attn_drop") else module.attn_dropout
    if dropout.p > 0:
        return f"its dropout of attention weights is {dropout.p:g}, not 0"
    if getattr(module, "is_cross_attention", False):
        return "it is cross-attention"
    if has_hooks(module):
        return "it has hooks, which a new module would lose"
    return None
