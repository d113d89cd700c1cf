"""A convolution over patches that do not overlap, as one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose kernel and stride are equal, without padding: a patch embedding.

    Computes what the convolution does, by one pass that lays the patches out, in autocast's dtype,
    and one matrix product. Parameters have the convolution's names and shapes. The output is
    `[B, C, H', W']` with the features of a patch side by side in memory, as the transposition of
    its patches to tokens wants it.

    Example:
        >>> import torch
        >>> conv = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        >>> patches = PatchConv2d.from_conv(conv)
        >>> x = torch.randn(2, 3, 9, 8)
        >>> torch.allclose(patches(x), conv(x), atol=1e-5)
        True
    """

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> PatchConv2d:
        """Returns the same function with the convolution's own parameters.

        Raises:
            ValueError: patches overlap, or have padding, gaps or groups.
        """
        reason = obstacle(conv)
        if reason is not None:
            raise ValueError(f"PatchConv2d: {reason}")
        return _copy(conv, cls)

    def to_conv(self) -> nn.Conv2d:
        """Returns the convolution, with the same parameters."""
        return _copy(self, nn.Conv2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the convolution to `[B, C_in, H, W]` or `[C_in, H, W]`."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        (rows, columns), (_, _, height, width) = self.kernel_size, x.shape
        x = x[:, :, : height // rows * rows, : width // columns * columns]
        x = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)
        kind, dtype = x.device.type, x.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype, memory_format=torch.contiguous_format)
        y = F.linear(x.flatten(3), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


def obstacle(conv: nn.Conv2d) -> str | None:
    """Returns why a convolution is not one over patches, or None."""
    if conv.kernel_size != conv.stride:
        return f"kernel_size must be stride={conv.stride}, got {conv.kernel_size}"
    # "valid" is no padding, "same" pads nothing where the stride is 1, the only one it allows.
    if conv.padding not in ((0, 0), "valid"):
        return f"padding must be 0, got {conv.padding}"
    if conv.dilation != (1, 1) or conv.groups != 1:
        return f"dilation and groups must be 1, got {conv.dilation} and {conv.groups}"
    return None


def _copy(conv: nn.Conv2d, kind: type[nn.Conv2d]) -> nn.Conv2d:
    module = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        bias=conv.bias is not None,
        device="meta",
    )
    module.weight, module.bias = conv.weight, conv.bias
    return module.train(conv.training)
