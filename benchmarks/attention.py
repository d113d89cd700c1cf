"""Butterfly attention against dense attention and a sliding window, over sequence lengths.

    python benchmarks/attention.py                              # 1k to 64k tokens, heads of 64, 128
    python benchmarks/attention.py --device cpu --lengths 256 --tokens 512 --block-size 32

Every length has as many tokens in all, so dense attention's work grows with the length. Baselines:
torch's scaled_dot_product_attention (the fastest backend that runs it, named in the record) and
FlexAttention with a sliding window of equal density. Writes attention_<device>.json to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re

import torch
import torch.nn.functional as F
from timing import Timing, environment, time_all
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixelfly.masks import AttentionLayout, butterfly_attention_layout
from pixelfly.ops import butterfly_attention

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def window(length: int, block_size: int, density: float) -> AttentionLayout:
    """The widest sliding window of blocks that keeps no more than `density` of the scores."""
    count = -(-length // block_size)
    distance = (torch.arange(count)[:, None] - torch.arange(count)[None, :]).abs()
    best = AttentionLayout.from_grid(distance < 1, block_size, length, length)
    for width in range(2, count + 1):
        wider = AttentionLayout.from_grid(distance < width, block_size, length, length)
        if wider.density > density:
            break
        best = wider
    return best


def dense(backend: SDPBackend | None):
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def run(length: int, features: int, args: argparse.Namespace) -> list[dict]:
    """Forward, and forward + backward, of every candidate at one length."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    batch = max(1, args.tokens // length)
    layout = butterfly_attention_layout(length, block_size=args.block_size)
    local = window(length, args.block_size, layout.density)
    make = {"device": args.device, "dtype": dtype}
    shape = (3, batch, args.heads, length, features)
    sets = [torch.randn(shape, **make).unbind(0) for _ in range(2)]
    grads = [torch.randn(shape[1:], **make) for _ in range(2)]
    calls = {
        "butterfly": lambda q, k, v: butterfly_attention(q, k, v, layout),
        "window": lambda q, k, v: butterfly_attention(q, k, v, local),
    }
    backends = BACKENDS if args.device == "cuda" else {"sdpa": None}
    calls |= {name: dense(backend) for name, backend in backends.items()}

    def forward(call):
        def one(i: int) -> torch.Tensor:
            with torch.no_grad():
                return call(*sets[i])

        return one

    def both(call):
        def one(i: int) -> tuple[torch.Tensor, ...]:
            qkv = [t.detach().requires_grad_() for t in sets[i]]
            return torch.autograd.grad(call(*qkv), qkv, grads[i])

        return one

    records = []
    for direction, wrap in (("forward", forward), ("forward_backward", both)):
        runs = {name: wrap(call) for name, call in calls.items()}
        timings = time_all(runs, 2, rounds=args.rounds, device=args.device)
        ms = {n: t.median if isinstance(t, Timing) else t for n, t in timings.items()}
        dense_ms = {n: v for n, v in ms.items() if n in backends and isinstance(v, float)}
        fastest = min(dense_ms, key=dense_ms.get, default=None)
        ours = ms["butterfly"]
        measured = fastest is not None and isinstance(ours, float)
        records.append(
            {
                "length": length,
                "batch": batch,
                "heads": args.heads,
                "head_features": features,
                "block_size": args.block_size,
                "density": layout.density,
                "window_density": local.density,
                "direction": direction,
                "dense": fastest,
                "dense_ms": dense_ms.get(fastest),
                "ours_ms": ours,
                "ratio": dense_ms[fastest] / ours if measured else None,
                "peers": ms,
            }
        )
        print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[2**i for i in range(10, 17)])
    add("--head-features", type=int, nargs="*", default=[64, 128])
    add("--heads", type=int, default=8)
    add("--tokens", type=int, default=65536, help="in all: batch x length")
    add("--block-size", type=int, default=128)
    add("--rounds", type=int, default=9)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py: torch sees no CUDA device; use --device cpu")
    meta = environment(args.device)
    name = re.sub(r"[^a-z0-9]+", "_", str(meta["device"]).lower().removeprefix("nvidia "))
    label = name.split("_")[0] if args.device == "cuda" else "cpu"
    out = args.out or pathlib.Path(__file__).parent / "results" / f"attention_{label}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    for features in args.head_features:
        for length in args.lengths:
            records += run(length, features, args)
            out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
