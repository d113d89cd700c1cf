"""Microseconds the host needs to issue a call, pixelfly beside nn.Linear.

    python benchmarks/host.py --out host.json

With so little work per call that the GPU waits for the host. "stack" rows are per layer and step
of training 24 layers: forward, backward, no optimizer.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
from timing import environment
from torch import nn

from pixelfly.masks import flat_block_butterfly
from pixelfly.nn import PixelflyLinear
from pixelfly.ops.plan import device_plan, plan_header

LAYERS = 24


def microseconds(call: Callable[[], object], device: str, calls: int) -> float:
    """Median over ten rounds of the time per call, the GPU idle at the start of each."""
    for _ in range(10):
        call()
    rounds = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(rounds)


def operators(device: str, width: int, tokens: int) -> dict[str, Callable[[], object]]:
    """The dispatcher operators alone, blocks and a bias."""
    layout = flat_block_butterfly(width, width, block_size=64)
    dtype = torch.bfloat16
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    blocks = torch.randn(layout.nnz, 64, 64, device=device, dtype=dtype)
    bias = torch.randn(width, device=device, dtype=dtype)
    plan, header = device_plan(layout, 0, x.device), plan_header(layout, 0, x.device)
    return {
        "operator forward": lambda: torch.ops.pixelfly.forward(
            x, blocks, None, None, bias, None, plan, header, 0, False, False
        ),
        "operator backward": lambda: torch.ops.pixelfly.backward(
            x, x, blocks, None, None, None, None, plan, header, False, False, False,
            True, True, False, False, True, None, False,
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="the stacks compiled, too")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/host.py needs a CUDA device, or --device cpu")
    options = {"device": args.device, "dtype": torch.bfloat16}
    x = torch.randn(args.tokens, args.width, requires_grad=True, **options)
    calls = operators(args.device, args.width, args.tokens)
    for name, make in (("dense", nn.Linear), ("pixelfly", PixelflyLinear)):
        sizes = {"density": 0.25, "rank": 0} if make is PixelflyLinear else {}
        layer = make(args.width, args.width, **sizes, **options)
        calls[f"{name} layer forward"] = lambda layer=layer: layer(x)
        stack = nn.Sequential(
            *(make(args.width, args.width, **sizes, **options) for _ in range(LAYERS))
        )
        calls[f"{name} stack"] = lambda stack=stack: stack(x).backward(x.detach())
        if args.compile:
            compiled = torch.compile(stack)
            calls[f"{name} stack compiled"] = lambda f=compiled: f(x).backward(x.detach())
    records = []
    for name, call in calls.items():
        stacked = "stack" in name
        times = max(1, args.calls // LAYERS) if stacked else args.calls
        spent = microseconds(call, args.device, times)
        records.append({"call": name, "us": spent / LAYERS if stacked else spent})
        print(f"{name:26} {records[-1]['us']:8.1f} us", flush=True)
    if args.out is not None:
        meta = environment() if args.device == "cuda" else {"device": "cpu"}
        args.out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
