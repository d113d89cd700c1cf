"""`PixelflyLinear`: a drop-in for `nn.Linear` whose weight is `block butterfly + low rank`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..masks import BlockLayout
from ..ops import Weights, butterfly_lowrank_mm
from ..ops.activations import ACTIVATIONS, apply_activation, check_activation
from ..ops.functional import check_arguments
from .choice import choose
from .dense import dense_parameters, has_hooks
from .init import init_weights_
from .project import dense_weight, project, relative_error
from .state import decode_layout, describe, encode_layout

GATES = (None, "scalar", "token")
_LAYOUT_KEY = "_extra_state"  # torch's name for what get_extra_state returns


class PixelflyLinear(nn.Module):
    """Applies a linear layer whose weight is `block butterfly + low rank`.

    Computes `act(x · Wᵀ + bias) + residual`. Without a gate `W = B + u v`; with gate="scalar"
    `W = γB + (1−γ) u v` with one learned γ; with gate="token" γ becomes `sigmoid(x · w + c)`, one
    scalar per token. B is zero outside the layout's blocks.

    Args:
        in_features: K, a multiple of 8.
        out_features: N, a multiple of 8.
        bias: whether the layer has a bias.
        layout: the kept blocks; None takes the flat block butterfly that `density` or `max_stride`
            asks for. Brings its own block size.
        block_size: b, 16, 32, 64 or 128.
        max_stride: the butterfly's largest stride, a power of two; None leaves it to `density`, or
            takes the full butterfly.
        density: weights of the layer / weights of a dense layer, in (0, 1], low rank included.
            Reached exactly where blocks beside that rank can, else the nearest below it is taken.
        rank: r, width of the low-rank term; 0 is none. None picks it by the paper's rule: a quarter
            to a third of the weights (see `pixelfly.nn.choose`).
        lowrank: "factored" (`u` and `v`) or "global" (the first `rank` outputs and inputs dense in
            the layout; a multiple of the block size).
        gate: None, "scalar" or "token"; the last two need a factored low rank.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu", fused into the kernel.
        device: where the parameters are made.
        dtype: their dtype.

    Attributes:
        blocks: `[nnz, b, b]` Parameter, row-major over the layout, out x in inside a block.
        u: `[N, r]` Parameter or None.
        v: `[r, K]` Parameter or None.
        bias: `[N]` Parameter or None.
        gate: γ `[1]` or w `[1, K]`, Parameter, or None.
        gate_bias: c `[1]` Parameter of a token gate, or None.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range or the density is not reachable; the message names
            the nearest that is.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.

    Example:
        >>> import torch
        >>> layer = PixelflyLinear(1024, 4096, density=0.25, activation="gelu")
        >>> layer.rank, layer.layout.block_size, layer.density
        (48, 64, 0.24609375)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: BlockLayout | None = None,
        block_size: int = 64,
        max_stride: int | None = None,
        density: float | None = None,
        rank: int | None = None,
        lowrank: str = "factored",
        gate: str | None = None,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate must be None, 'scalar' or 'token', got {gate!r}")
        check_activation("", activation)
        choice = choose(
            out_features,
            in_features,
            block_size=block_size,
            density=density,
            max_stride=max_stride,
            rank=rank,
            lowrank=lowrank,
            layout=layout,
        )
        if gate is not None and choice.factored_rank == 0:
            raise ValueError(
                f"gate={gate!r} weighs blocks against u and v, so it needs lowrank='factored' "
                f"and a rank above 0, got lowrank={lowrank!r}, rank={choice.rank}"
                + (f" ({choice.note})" if choice.note else "")
            )
        self.in_features, self.out_features = in_features, out_features
        self.choice, self.layout = choice, choice.layout
        self.gate_kind, self.activation = gate, activation
        # Standard deviation of the dense weight this layer stands for; None: nn.Linear's.
        self.init_std: float | None = None
        # What `densify_` puts back; sparsify_ writes down transformers' Conv1D here.
        self.dense_type: type[nn.Module] = nn.Linear

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        b, r = self.layout.block_size, choice.factored_rank
        self.blocks = parameter(self.layout.nnz, b, b)
        self.u = parameter(out_features, r) if r else None
        self.v = parameter(r, in_features) if r else None
        self.bias = parameter(out_features) if bias else None
        shapes = {None: None, "scalar": (1,), "token": (1, in_features)}
        self.gate = parameter(*shapes[gate]) if gate else None
        self.gate_bias = parameter(1) if gate == "token" else None
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """r of u and v, or the width in features of the global low rank."""
        return self.choice.rank

    @property
    def density(self) -> float:
        """Weights of the layer / weights of a dense layer; gates and biases are not counted."""
        return self.choice.density

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws fresh weights; the output then has the variance that `nn.Linear` gives it."""
        gate = None if self.gate is None else 0.5
        init_weights_(self.blocks, self.layout, self.u, self.v, std=self.init_std, gate=gate)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_gate()

    @torch.no_grad()
    def _reset_gate(self) -> None:
        if self.gate_kind == "scalar":
            self.gate.fill_(0.5)
        elif self.gate_kind == "token":
            # Half for every token; the gradient of w is not zero, so the gate learns.
            self.gate.zero_()
            self.gate_bias.zero_()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Applies the layer.

        Args:
            x: `[..., K]`.
            residual: `[..., N]`, added after the activation, or None.

        Returns:
            `[..., N]`.
        """
        if self.gate_kind == "token":
            return self._forward_token_gate(x, residual)
        return butterfly_lowrank_mm(
            x, *self._weights(), activation=self.activation, residual=residual
        )

    def _weights(self) -> Weights:
        blocks, u = self.blocks, self.u
        if self.gate_kind == "scalar":
            # Folded into the weights: one pass over them instead of one over the activations.
            blocks, u = blocks * self.gate, u * (1 - self.gate)
        return Weights(blocks, self.layout, u, self.v, self.bias)

    def _forward_token_gate(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        # The gate meets x before the operator does.
        optional = {"u": self.u, "v": self.v, "bias": self.bias, "residual": residual}
        check_arguments(x, self.blocks, self.layout, optional, self.activation)
        g = torch.sigmoid(F.linear(x, self.gate, self.gate_bias))  # [..., 1]
        # The gate scales x and the thin t, and the operator adds the low rank as its residual, so
        # that no [T, N] tensor is scaled.
        lowrank = F.linear(F.linear(x, self.v) * (1 - g), self.u)
        fused = self.activation is None
        if fused and residual is not None:
            lowrank = lowrank + residual
        y = butterfly_lowrank_mm(x * g, self.blocks, self.layout, bias=self.bias, residual=lowrank)
        if fused:
            return y
        y = apply_activation(y, ACTIVATIONS[self.activation])
        return y if residual is None else y + residual

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        *,
        layout: BlockLayout | None = None,
        block_size: int = 64,
        max_stride: int | None = None,
        density: float | None = None,
        rank: int | None = None,
        lowrank: str = "factored",
        gate: str | None = None,
        activation: str | None = None,
        iterations: int = 50,
        input_scale: torch.Tensor | None = None,
    ) -> PixelflyLinear:
        """Returns the layer nearest to a dense one: blocks and low rank fitted to each other.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`.
            layout: as in the constructor, like all but the last two arguments.
            block_size: as above.
            max_stride: as above.
            density: as above.
            rank: as above.
            lowrank: as above.
            gate: as above; starts at one half, which the weights make up for.
            activation: as above; what follows the dense layer, for the kernel to fuse.
            iterations: how often low rank and blocks are fitted to each other at most; 0 is the
                one-shot answer (see `pixelfly.nn.project`).
            input_scale: `[K]` root mean square of the inputs, to weigh the error by, or None.

        Returns:
            A layer on the dense layer's device, in its dtype, with a copy of its bias.

        Raises:
            TypeError: `linear` is not a linear layer.
            ValueError: as the constructor.

        Example:
            >>> import torch
            >>> dense = torch.nn.Linear(128, 128)
            >>> layer = PixelflyLinear.from_dense(dense, density=1.0, block_size=16, rank=0)
            >>> x = torch.randn(3, 128)
            >>> torch.allclose(layer(x), dense(x), atol=1e-5)
            True
        """
        weight, bias = dense_parameters(linear)
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            layout=layout,
            block_size=block_size,
            max_stride=max_stride,
            density=density,
            rank=rank,
            lowrank=lowrank,
            gate=gate,
            activation=activation,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        layer.copy_dense_(weight, bias, iterations=iterations, input_scale=input_scale)
        return layer.train(linear.training)

    @torch.no_grad()
    def copy_dense_(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        iterations: int = 50,
        input_scale: torch.Tensor | None = None,
    ) -> float:
        """Sets the parameters to the nearest ones to a dense `weight` `[N, K]` and its bias.

        Returns:
            The relative error of the weight, `|W - B - u v| / |W|` in Frobenius norms.
        """
        blocks, u, v = project(
            weight,
            self.layout,
            self.choice.factored_rank,
            iterations=iterations,
            input_scale=input_scale,
        )
        self._reset_gate()
        gain = 1.0 if self.gate is None else 2.0  # the gate starts at one half
        self.blocks.copy_(blocks * gain)
        if u is not None:
            self.u.copy_(u * gain)
            self.v.copy_(v)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)
        return relative_error(weight, blocks, self.layout, u, v)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Returns the dense layer with the same weight and bias, copied; without the activation.

        Raises:
            ValueError: the layer has a token gate, so no single weight does what it does.

        Example:
            >>> import torch
            >>> layer = PixelflyLinear(64, 64, block_size=16, rank=16)
            >>> x = torch.randn(3, 64)
            >>> torch.allclose(layer(x), layer.to_dense()(x), atol=1e-5)
            True
        """
        if self.gate_kind == "token":
            raise ValueError("to_dense: a layer with gate='token' has a weight for every token")
        dtype = self.blocks.dtype
        work = dtype if dtype == torch.float64 else torch.float32
        blocks = self.blocks.to(work)
        if self.gate is not None:
            blocks = blocks * self.gate.to(work)
        weight = dense_weight(blocks, self.layout)
        if self.u is not None:
            u = self.u.to(work)
            if self.gate is not None:
                u = u * (1 - self.gate.to(work))
            weight = weight + u @ self.v.to(work)
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=dtype,
        )
        dense.weight = nn.Parameter(weight.to(dtype).contiguous())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def get_extra_state(self) -> torch.Tensor:
        return encode_layout(self.layout)

    def set_extra_state(self, state: Any) -> None:
        problem = self._layout_problem(state)
        if problem:
            raise RuntimeError(f"PixelflyLinear: {problem}")

    def _layout_problem(self, state: Any) -> str | None:
        try:
            stored = decode_layout(state)
        except ValueError as error:
            return str(error)
        if stored == self.layout:
            return None
        ours, theirs = describe(self.layout), describe(stored)
        if ours == theirs:
            theirs += ", but other blocks"
        return (
            f"the checkpoint's layout is another one: this layer keeps {ours}, the checkpoint "
            f"{theirs}; build the layer with the layout that it was saved with "
            "(pixelfly.nn.state.decode_layout reads it from the `_extra_state` entry)"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch would copy the parameters first; blocks of another layout may well have our shape.
        key = prefix + _LAYOUT_KEY
        if key in state_dict:
            problem = self._layout_problem(state_dict[key])
            if problem:
                error_msgs.append(f"{prefix or 'PixelflyLinear.'}blocks: {problem}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "PixelflyLinear has no dense `weight`: code that reads it needs `to_dense().weight`"
                " (a copy), `blocks` for device and dtype, or this layer left dense (filter_fn of "
                "sparsify_)"
            )
        # What nn.Module does, without its detour: every call asks for blocks and bias.
        parameters = self.__dict__.get("_parameters")
        if parameters is not None and name in parameters:
            return parameters[name]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        layout, choice = self.layout, self.choice
        parts = [
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}",
            f"block_size={layout.block_size}, nnz={layout.nnz}, rank={choice.rank}",
        ]
        if choice.rank and choice.lowrank != "factored":
            parts.append(f"lowrank={choice.lowrank!r}")
        if self.gate_kind is not None:
            parts.append(f"gate={self.gate_kind!r}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        nominal = choice.requested
        if nominal is None:
            nominal = choice.density + layout.nominal_density - layout.density
        parts.append(f"density={choice.density:.4g} (nominal {nominal:.4g})")
        return ", ".join(parts)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does no more than a `PixelflyLinear`'s weights and activation say.

    Example:
        >>> is_plain(PixelflyLinear(64, 64, block_size=16)), is_plain(nn.Linear(64, 64))
        (True, False)
    """
    # Parametrisations and sharding make subclasses; accelerate's hooks are a forward of the object.
    return (
        type(layer) is PixelflyLinear
        and "forward" not in vars(layer)
        and layer.gate_kind != "token"
        and not has_hooks(layer)
        and not _has_any_global_hook()
    )
