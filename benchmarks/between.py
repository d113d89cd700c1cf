"""What lies between the sparse layers of a ViT, a Mixer and a GPT-2, in eager code, bf16 autocast.

    python benchmarks/between.py                       # all of it, on a GPU
    python benchmarks/between.py --cases attention qkv # those whose names begin so
    python benchmarks/between.py --device cpu --tokens 64

Residual addition + LayerNorm (`pixelfly.ops.add_layer_norm`), float32 stream and bf16 branches, a
Mixer's MLP over tokens (`pixelfly.nn.TokenMLP`), the patch embedding (`PatchConv2d`) and the last
layer with its loss (`pixelfly.ops.linear_cross_entropy`), each beside torch's own operators as timm
and transformers call them, forward and forward + backward. And a sparse qkv layer with the
gradients that attention hands back (`pixelfly.ops.butterfly_qkv`), beside the same layer whose
output torch takes apart, so that it puts them side by side. And attention on such an output, with
the gradient of all of it (`pixelfly.ops.short_attention`). The floor is bytes at 3.0 TB/s, of a
pass that reads and writes every operand once; for the loss its products at 790 TFLOP/s, one reading
of the logits and, with the backward, one writing. Writes between_<device>.json to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from display import make_console, print_table
from timing import Timing, environment, num_buffer_sets, results_path, time_all

from pixelfly import PixelflyLinear
from pixelfly.nn import TokenMLP
from pixelfly.nn.patches import PatchConv2d
from pixelfly.ops import (
    Weights,
    add_layer_norm,
    butterfly_qkv,
    linear_cross_entropy,
    short_attention,
)

BYTES_PER_SECOND, FLOPS_PER_SECOND = 3.0e12, 790e12
SHAPES = [(25216, 768), (8192, 1024), (8192, 4096)]  # ViT-B/16, GPT-2 medium, a wide model
ATTENTION = [(128, 197, 12), (64, 197, 16), (256, 50, 12)]  # ViT-B/16, ViT-L/16, ViT-B/32
Call = Callable[[int], object]


def both_ways(make: Callable[[int], tuple], grads: Callable[[int], tuple]) -> dict[str, Call]:
    """A forward alone and one with its backward; `make` gives outputs, `grads` what they meet."""

    def forward(i: int) -> None:
        with torch.no_grad():
            make(i)

    def forward_backward(i: int) -> None:
        outputs = make(i)
        inputs, dys = grads(i)
        torch.autograd.grad(outputs, inputs, dys)

    return {"forward": forward, "forward_backward": forward_backward}


def norm(tokens: int, features: int, device: str) -> tuple[dict[str, dict[str, Call]], dict, int]:
    """Candidates by name and direction, the floor's bytes of each direction, the buffer sets."""
    elements = tokens * features
    sets = num_buffer_sets(24 * elements) if device == "cuda" else 1
    bf16 = {"device": device, "dtype": torch.bfloat16}
    x = [torch.randn(tokens, features, device=device, requires_grad=True) for _ in range(sets)]
    delta = [torch.randn(tokens, features, **bf16).requires_grad_() for _ in range(sets)]
    dy = [torch.randn(tokens, features, **bf16) for _ in range(sets)]
    dh = [torch.randn(tokens, features, device=device) for _ in range(sets)]
    weight = torch.ones(features, device=device, requires_grad=True)
    bias = torch.zeros(features, device=device, requires_grad=True)

    def ours(i: int) -> tuple:
        return add_layer_norm(x[i], delta[i], weight, bias, dtype=torch.bfloat16)

    def theirs(i: int) -> tuple:
        h = x[i] + delta[i]
        return F.layer_norm(h, (features,), weight, bias).to(torch.bfloat16), h

    def grads(i: int) -> tuple:
        return (x[i], delta[i], weight, bias), (dy[i], dh[i])

    forward = 12 * elements  # reads x and delta, writes h and y
    backward = 16 * elements  # reads dy, dh and h, writes dx and ddelta
    candidates = {"torch": both_ways(theirs, grads), "pixelfly": both_ways(ours, grads)}
    return candidates, {"forward": forward, "forward_backward": forward + backward}, sets


def token_mlp(batch: int, device: str) -> tuple[dict[str, dict[str, Call]], dict, int]:
    tokens, hidden, channels = 196, 384, 768
    sets = num_buffer_sets(4 * batch * hidden * channels) if device == "cuda" else 1
    bf16 = {"device": device, "dtype": torch.bfloat16}
    mlp = TokenMLP(tokens, hidden, device=device)
    x = [torch.randn(batch, tokens, channels, **bf16).requires_grad_() for _ in range(sets)]
    dy = [torch.randn(batch, tokens, channels, **bf16) for _ in range(sets)]

    def ours(i: int) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            return (mlp(x[i]),)

    def theirs(i: int) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            h = F.gelu(F.linear(x[i].transpose(1, 2), mlp.fc1.weight, mlp.fc1.bias))
            return (F.linear(h, mlp.fc2.weight, mlp.fc2.bias).transpose(1, 2),)

    def grads(i: int) -> tuple:
        return (x[i], *mlp.parameters()), (dy[i],)

    outer, inner = 2 * batch * tokens * channels, 2 * batch * hidden * channels
    # Forward: x, y, h once and twice; backward: dy, x, dx, h, z, dz twice.
    forward, backward = 2 * outer + 2 * inner, 3 * outer + 4 * inner
    candidates = {"torch": both_ways(theirs, grads), "pixelfly": both_ways(ours, grads)}
    return candidates, {"forward": forward, "forward_backward": forward + backward}, sets


def patches(batch: int, device: str) -> tuple[dict[str, dict[str, Call]], dict, int]:
    side, patch, features = 224, 16, 768
    pixels = batch * 3 * side**2
    sets = num_buffer_sets(4 * pixels) if device == "cuda" else 1
    conv = torch.nn.Conv2d(3, features, patch, patch, device=device)
    product = PatchConv2d.from_conv(conv)
    tokens = batch * (side // patch) ** 2
    x = [torch.randn(batch, 3, side, side, device=device) for _ in range(sets)]
    shape = (batch, tokens // batch, features)
    dy = [torch.randn(*shape, device=device, dtype=torch.bfloat16) for _ in range(sets)]

    def embed(layer: torch.nn.Module) -> Callable[[int], tuple]:
        def call(i: int) -> tuple:
            with torch.autocast(device, torch.bfloat16):
                return (layer(x[i]).flatten(2).transpose(1, 2).contiguous(),)

        return call

    def grads(i: int) -> tuple:
        return (*conv.parameters(),), (dy[i],)

    # Forward: images, their patches in 16 bits twice, y; backward: dy, the patches.
    outputs = 2 * tokens * features
    forward, backward = (4 + 2 + 2) * pixels + outputs, outputs + 2 * pixels
    candidates = {
        "torch": both_ways(embed(conv), grads),
        "pixelfly": both_ways(embed(product), grads),
    }
    return candidates, {"forward": forward, "forward_backward": forward + backward}, sets


def qkv(batch: int, device: str) -> tuple[dict[str, dict[str, Call]], dict, int]:
    tokens, features, heads = 197, 768, 12
    elements = batch * tokens * features
    sets = num_buffer_sets(16 * elements) if device == "cuda" else 1
    bf16 = {"device": device, "dtype": torch.bfloat16}
    layer = PixelflyLinear(features, 3 * features, density=0.25, rank=0, device=device)
    weights = Weights(layer.blocks, layer.layout, bias=layer.bias)
    x = [torch.randn(batch, tokens, features, **bf16).requires_grad_() for _ in range(sets)]
    shape = (batch, tokens, heads, features // heads)
    dy = [[torch.randn(shape, **bf16).transpose(1, 2) for _ in range(3)] for _ in range(sets)]

    def ours(i: int) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            return butterfly_qkv(x[i], weights, heads)

    def theirs(i: int) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            thirds = layer(x[i]).unflatten(2, (3, heads, -1)).unbind(2)
            return tuple(third.transpose(1, 2) for third in thirds)

    def grads(i: int) -> tuple:
        return (x[i], *layer.parameters()), dy[i]

    # Forward: x, y, three times as wide; backward: dy, x, dx.
    forward, backward = 8 * elements, 10 * elements
    candidates = {"torch": both_ways(theirs, grads), "pixelfly": both_ways(ours, grads)}
    return candidates, {"forward": forward, "forward_backward": forward + backward}, sets


def attention(
    batch: int, tokens: int, heads: int, device: str
) -> tuple[dict[str, dict[str, Call]], dict, int]:
    features = 64 * heads
    elements = batch * tokens * features
    sets = num_buffer_sets(16 * elements) if device == "cuda" else 1
    bf16 = {"device": device, "dtype": torch.bfloat16}
    shape = (batch, tokens, 3 * features)
    qkv = [torch.randn(shape, **bf16).requires_grad_() for _ in range(sets)]
    dy = [torch.randn(batch, tokens, features, **bf16) for _ in range(sets)]

    def ours(i: int) -> tuple:
        return (short_attention(qkv[i], heads),)

    def theirs(i: int) -> tuple:
        q, k, v = qkv[i].unflatten(2, (3, heads, 64)).permute(2, 0, 3, 1, 4).unbind(0)
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)

    def grads(i: int) -> tuple:
        return (qkv[i],), (dy[i],)

    # Forward: qkv, y; backward: those, dy, dqkv.
    forward, backward = 8 * elements, 16 * elements
    candidates = {"torch": both_ways(theirs, grads), "pixelfly": both_ways(ours, grads)}
    return candidates, {"forward": forward, "forward_backward": forward + backward}, sets


def loss(tokens: int, device: str) -> tuple[dict[str, dict[str, Call]], dict, int]:
    features, classes = 1024, 50257
    x = torch.randn(tokens, features, device=device, requires_grad=True)
    weight = torch.randn(classes, features, device=device).div_(32).requires_grad_()
    target = torch.randint(0, classes, (tokens,), device=device)

    def ours(i: int) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            return (linear_cross_entropy(x, weight, target),)

    def theirs(i: int) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            return (F.cross_entropy(F.linear(x, weight).float(), target),)

    def grads(i: int) -> tuple:
        return (x, weight), (torch.ones((), device=device),)

    logits = 2 * tokens * classes
    product = 2 * tokens * classes * features / FLOPS_PER_SECOND * BYTES_PER_SECOND
    candidates = {"torch": both_ways(theirs, grads), "pixelfly": both_ways(ours, grads)}
    floors = {"forward": product + logits, "forward_backward": 3 * product + 2 * logits}
    return candidates, floors, 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=[""], help="what their names begin with")
    parser.add_argument("--tokens", type=int, default=None, help="instead of the usual numbers")
    parser.add_argument("--batch", type=int, default=None, help="images, instead of the usual")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/between.py: torch sees no CUDA device; use --device cpu")
    meta = environment(args.device)
    out = args.out or results_path("between", meta["device"])
    device, batch = args.device, args.batch or 128
    cases = {
        f"add + norm {args.tokens or tokens} x {features}": functools.partial(
            norm, args.tokens or tokens, features, device
        )
        for tokens, features in SHAPES
    }
    cases[f"token MLP {batch} x 196 x 768"] = functools.partial(token_mlp, batch, device)
    cases[f"patches {batch} x 3 x 224 x 224"] = functools.partial(patches, batch, device)
    cases[f"qkv {batch} x 197 x 768"] = functools.partial(qkv, batch, device)
    for images, tokens, heads in ATTENTION:
        shape = args.batch or images, args.tokens or tokens, heads
        name = "attention {} x {} x {} heads".format(*shape)
        cases[name] = functools.partial(attention, *shape, device)
    tokens = args.tokens or 8192
    cases[f"loss {tokens} x 1024, 50257"] = functools.partial(loss, tokens, device)
    chosen = {name: make for name, make in cases.items() if name.startswith(tuple(args.cases))}
    if not chosen:
        raise SystemExit(f"benchmarks/between.py: --cases must begin one of {list(cases)}")
    records, rows = [], []
    for case, make in chosen.items():
        candidates, floors, sets = make()
        for direction in ("forward", "forward_backward"):
            calls = {name: both[direction] for name, both in candidates.items()}
            times = time_all(calls, sets, device=args.device)
            record = {"case": case, "direction": direction}
            record["floor_ms"] = 1e3 * floors[direction] / BYTES_PER_SECOND
            for name, time in times.items():
                record[name] = time.as_dict() if isinstance(time, Timing) else time
            records.append(record)
            shown = [t.median if isinstance(t, Timing) else float("nan") for t in times.values()]
            cells = [f"{value:.4f}" for value in (*shown, record["floor_ms"])]
            rows.append([case, direction, *cells, f"{shown[0] / shown[1]:.2f}x"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    header = ["case", "direction", "torch ms", "pixelfly ms", "floor ms", "speed-up"]
    print_table(make_console(), "between the layers", header, rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
