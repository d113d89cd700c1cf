"""The empirical neural tangent kernel of a model, and the distance between two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..nn.linear import PixelflyLinear
from ..ops.reference import butterfly_lowrank_mm_reference


@dataclass(frozen=True)
class Distance:
    """How far apart two kernels are.

    Attributes:
        relative: `|K - L| / |K|` in Frobenius norms; the paper's measure.
        aligned: the same with L in its best scale, `sqrt(1 - cos²)`, in [0, 1]. A learning rate
            makes up for a scale, so this is what no learning rate can repair.
    """

    relative: float
    aligned: float

    @classmethod
    def between(cls, dense: torch.Tensor, other: torch.Tensor) -> Distance:
        """Returns the distance of a kernel from the dense model's."""
        if dense.shape != other.shape:
            raise ValueError(
                f"kernels must have one shape, got {list(dense.shape)} and {list(other.shape)}"
            )
        k, l = dense.double(), other.double()  # noqa: E741
        norm, tiny = k.norm(), torch.finfo(torch.float64).tiny
        cosine = (k * l).sum() / (norm * l.norm()).clamp(min=tiny)
        relative = (k - l).norm() / norm.clamp(min=tiny)
        return cls(relative.item(), (1 - cosine**2).clamp(min=0).sqrt().item())


def kernel(
    model: nn.Module,
    data: torch.Tensor,
    *,
    output: Callable[[torch.Tensor], torch.Tensor] | None = None,
    full: bool = False,
    max_bytes: int = 2**30,
) -> torch.Tensor:
    """Returns a model's empirical neural tangent kernel on a sample of inputs.

    `K[i, j] = Σ_c <∂f_c(x_i)/∂θ, ∂f_c(x_j)/∂θ>` over all parameters θ that require a gradient. The
    model is taken in eval mode; Pixelfly layers run through the reference operator.

    Args:
        model: any module of one input whose operators torch.func can batch.
        data: `[n, ...]`, a batch of inputs on the model's device.
        output: takes the model's output for one input to what is differentiated, such as the last
            token's logits; None is all of it.
        full: keeps the outputs apart, for a kernel `[n·C, n·C]` with C outputs.
        max_bytes: bounds the two Jacobian pieces that live at a time; smaller means more work.

    Returns:
        `[n, n]` or `[n·C, n·C]` in float64 on the CPU.

    Raises:
        TypeError: `model` is not a module or `data` not a tensor.
        ValueError: no parameter requires a gradient, or `data` or `max_bytes` is out of range.

    Source: Jacot et al., NeurIPS 2018; Pixelated Butterfly (Chen et al., ICLR 2022), appendix.

    Example:
        >>> kernel(nn.Linear(4, 3, bias=False), torch.eye(4)).diagonal()
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kernel: model must be a Module, got {type(model).__name__}")
    if not isinstance(data, torch.Tensor):
        raise TypeError(f"kernel: data must be a tensor, got {type(data).__name__}")
    if data.dim() < 1 or len(data) < 1:
        raise ValueError(f"kernel: data must hold at least one input, got {list(data.shape)}")
    if max_bytes < 1:
        raise ValueError(f"kernel: max_bytes must be positive, got {max_bytes}")
    model = _batchable(model).eval()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= dict(model.named_buffers())
    if not parameters:
        raise ValueError("kernel: no parameter of the model requires a gradient")

    def apply(theta: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y = functional_call(model, {**theta, **frozen}, (x[None],))[0]
        return (y if output is None else output(y)).reshape(-1)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        outputs = apply(parameters, data[0]).numel()
    size = sum(p.nbytes for p in parameters.values()) * outputs
    chunks = data.split(max(1, max_bytes // (2 * size)))
    jacobian = vmap(jacrev(apply), in_dims=(None, 0), randomness="error")

    def piece(x: torch.Tensor) -> list[torch.Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be batched
            parts = jacobian(parameters, x).values()
        return [p.detach().flatten(2) for p in parts]

    count = outputs if full else 1
    result = torch.zeros(len(data) * count, len(data) * count, dtype=torch.float64)
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + count * len(chunk))
    for a, rows in enumerate(chunks):
        left = piece(rows)
        for b in range(a, len(chunks)):
            right = left if a == b else piece(chunks[b])
            product = sum(_product(x, y, full) for x, y in zip(left, right, strict=True)).cpu()
            result[starts[a] : starts[a + 1], starts[b] : starts[b + 1]] = product
            result[starts[b] : starts[b + 1], starts[a] : starts[a + 1]] = product.T
    return result


def distance(
    dense: nn.Module,
    candidate: nn.Module,
    data: torch.Tensor,
    *,
    output: Callable[[torch.Tensor], torch.Tensor] | None = None,
    full: bool = False,
    max_bytes: int = 2**30,
) -> Distance:
    """Returns how far a candidate's neural tangent kernel is from the dense model's.

    Args:
        dense: the dense model.
        candidate: its sparse version, of any parameters but with the same outputs.
        data: `[n, ...]`, a batch of inputs.
        output: as in `kernel`, like the arguments after it.
        full: as above.
        max_bytes: as above.

    Raises:
        TypeError: as `kernel`.
        ValueError: as `kernel`.

    Example:
        >>> model = nn.Linear(16, 4)
        >>> distance(model, model, torch.randn(3, 16)).relative
        0.0
    """
    options = {"output": output, "full": full, "max_bytes": max_bytes}
    return Distance.between(kernel(dense, data, **options), kernel(candidate, data, **options))


def _product(x: torch.Tensor, y: torch.Tensor, full: bool) -> torch.Tensor:
    # x, y: [samples, outputs, size of the parameter]; float32 sums within a parameter.
    if full:
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).double()
    return (x.flatten(1) @ y.flatten(1).T).double()


class _Reference(nn.Module):
    """A PixelflyLinear's parameters, applied by operators that torch.func can batch."""

    def __init__(self, layer: PixelflyLinear) -> None:
        super().__init__()
        self.layout, self.kind, self.activation = layer.layout, layer.gate_kind, layer.activation
        for name in ("blocks", "u", "v", "bias", "gate", "gate_bias"):
            self.register_parameter(name, getattr(layer, name))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        parts = (self.layout, self.u, self.v, self.bias)
        options = {"activation": self.activation, "residual": residual}
        if self.kind is None:
            return butterfly_lowrank_mm_reference(x, self.blocks, *parts, **options)
        if self.kind == "scalar":
            u = self.u * (1 - self.gate)
            return butterfly_lowrank_mm_reference(
                x, self.blocks * self.gate, self.layout, u, self.v, self.bias, **options
            )
        raise ValueError("kernel: a PixelflyLinear with gate='token' is not supported")


def _batchable(model: nn.Module) -> nn.Module:
    """A copy of the model whose Pixelfly layers torch.func can batch."""
    model = copy.deepcopy(model)
    if isinstance(model, PixelflyLinear):
        return _Reference(model)
    made: dict[int, _Reference] = {}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, PixelflyLinear):
                parent._modules[key] = made.setdefault(id(child), _Reference(child))
    return model
