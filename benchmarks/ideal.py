"""The least a training step must move and compute: what whole models are measured against.

    python benchmarks/ideal.py                  # every model of models.py, no GPU needed

Runs forward and backward on the meta device and counts the operators that no compiler can fuse
away: products (dense and pixelfly), attention, norms, the loss, embeddings. Each reads its operands
once and writes its results once, in bf16 (and the slopes of activations in a byte, as pixelfly does
beside bf16); everything elementwise between them is taken as free. The optimizer reads and writes
its state once. An operator takes the longer of its bytes and its FLOPs at the ceilings of cases.py.
The sum is a floor for this set of operators, not a prediction.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from cases import PEAK_BYTES, PEAK_FLOPS
from display import make_console, print_table
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from workloads import WORKLOADS

from pixelfly import PixelflyConfig, sparsify_

KINDS = {  # kind -> packets of the dispatcher's operators
    "product": ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"),
    "pixelfly": ("pixelfly::forward", "pixelfly::backward"),
    "attention": ("attention", "attention_backward"),
    "norm": ("native_layer_norm", "native_layer_norm_backward"),
    "loss": ("_log_softmax", "_log_softmax_backward_data"),
    "embedding": ("embedding", "embedding_dense_backward"),
}
# Saved activations and gradients are bf16; AdamW keeps fp32 weights and two moments, reads and
# writes them, reads a bf16 gradient and writes the bf16 weight of the next step.
OPTIMIZER_BYTES = 6 * 4 + 2 + 2


@dataclasses.dataclass
class Cost:
    """Bytes, FLOPs, and the seconds of a roofline summed operator by operator."""

    bytes: float = 0
    flops: float = 0
    seconds: float = 0

    def add(self, bytes_moved: float, flops: float) -> None:
        self.bytes += bytes_moved
        self.flops += flops
        self.seconds += max(bytes_moved / PEAK_BYTES, flops / PEAK_FLOPS)


@torch.library.custom_op("pixelfly_bench::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    raise NotImplementedError("for counting on the meta device only")


@torch.library.custom_op("pixelfly_bench::attention_backward", mutates_args=())
def attention_backward(
    dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    raise NotImplementedError("for counting on the meta device only")


attention.register_fake(lambda q, k, v, causal: torch.empty_like(q))
attention_backward.register_fake(
    lambda dy, q, k, v, y, causal: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx, dy):
    return (*attention_backward(dy, *ctx.saved_tensors, ctx.causal), None)


attention.register_autograd(_differentiate, setup_context=_save)


class OneAttention(TorchFunctionMode):
    """Makes scaled_dot_product_attention one operator, as the fused kernels are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args[:3], bool(kwargs.get("is_causal", False)))
        return func(*args, **kwargs)


def _attention_flops(args: tuple, backward: bool) -> float:
    q = args[1] if backward else args[0]
    products = 5 if backward else 2  # q k', p v; again q k', and dv, dp, dq, dk
    full = products * 2.0 * q.shape[:-2].numel() * q.shape[-2] ** 2 * q.shape[-1]
    return full / 2 if args[-1] else full


def _slopes(func, args: tuple, outs: tuple) -> set[int]:
    """Ids of the slopes among a pixelfly operator's tensors, whatever dtype the model is in."""
    names = [a.name for a in func._schema.arguments]
    named = dict(zip([*names, *(r.name for r in func._schema.returns)],
                     [*args, *[None] * (len(names) - len(args)), *outs], strict=True))  # fmt: skip
    if named.get("relu"):  # read off the layer's output
        named["slope"] = None
    return {id(named[n]) for n in ("slope", "x_slope") if named.get(n) is not None}


class Count(TorchDispatchMode):
    """Adds up the costs of the operators in KINDS, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = {kind: Cost() for kind in (*KINDS, "optimizer")}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        name = f"pixelfly::{name}" if space == "pixelfly" else name
        kind = next((k for k, names in KINDS.items() if name in names), None)
        if kind is None:
            return out
        outs = out if isinstance(out, tuple) else (out,)
        tensors = [t for t in (*args, *outs) if isinstance(t, torch.Tensor)]
        if kind == "loss":  # fused: the logits are read forwards, their gradient is written back
            tensors = [args[0]] if name == "_log_softmax" else [outs[0]]
        elif name.startswith("embedding"):  # rows, not the table
            tensors = [outs[0]] * 2 if name == "embedding" else [args[0]] * 2
        flops = 0.0
        if kind == "attention":
            flops = _attention_flops(args, name.endswith("backward"))
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        slopes = _slopes(func, args, outs) if kind == "pixelfly" else set()
        unique = {id(t): t.numel() * (1 if id(t) in slopes else 2) for t in tensors}
        self.costs[kind].add(sum(unique.values()), flops)
        return out


def ideal_step(model: nn.Module, loss) -> dict[str, Cost]:
    """Costs of one training step by kind; model and batch are on the meta device."""
    with OneAttention(), Count() as count:
        loss(model).backward()
    params = sum(p.numel() for p in model.parameters())
    count.costs["optimizer"].add(OPTIMIZER_BYTES * params, 0)
    return count.costs


def ideal(name: str, form: str, *, density: float, block_size: int, rank: int) -> dict[str, Cost]:
    """The ideal step of a model of workloads.py, dense or in one of pixelfly's forms."""
    workload = WORKLOADS[name]
    with torch.device("meta"):
        model, loss, _ = workload.build("meta")
    if form != "dense":
        config = PixelflyConfig(
            density=density,
            block_size=block_size,
            rank=0 if form == "blocks" else rank,
            lowrank="global" if form == "global" else "factored",
        )
        sparsify_(model, config, workload.chosen)
    return ideal_step(model.to("meta").train(), loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[n for n in WORKLOADS if n != "tiny"])
    parser.add_argument("--forms", nargs="*", default=["dense", "blocks", "factored", "global"])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    header = ["model", "form", "GB", "TFLOP", "ideal ms"]
    header += [f"{kind} ms" for kind in (*KINDS, "optimizer")]
    rows = []
    options = {"density": args.density, "block_size": args.block_size, "rank": args.rank}
    for name in args.models:
        for form in args.forms:
            costs = ideal(name, form, **options)
            total = [sum(getattr(c, f) for c in costs.values()) for f in ("bytes", "flops")]
            parts = [f"{1e3 * c.seconds:.2f}" for c in costs.values()]
            ms = 1e3 * sum(c.seconds for c in costs.values())
            sizes = [f"{total[0] / 1e9:.1f}", f"{total[1] / 1e12:.2f}", f"{ms:.1f}"]
            rows.append([name, form, *sizes, *parts])
    print_table(make_console(), "the ideal training step", header, rows)


if __name__ == "__main__":
    main()
