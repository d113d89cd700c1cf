"""What bounds attention: Nsight Compute's counters of FlexAttention over butterfly blocks and of
cuDNN's dense attention.

    python benchmarks/attention_profile.py                    # needs ncu on PATH and a GPU
    python benchmarks/attention_profile.py --lengths 4096 --head-features 128

Starts itself under ncu, as kernel_profile.py does. Writes attention_profile_<device>.json to
benchmarks/results: for each length, direction and engine the kernels' counters, and the products
that the kept scores need (FLOP).
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import torch
from attention import BACKENDS, Call, dense
from kernel_profile import METRICS, Metrics, counters, recorded
from timing import environment, results_path

from pixelfly.masks import butterfly_attention_layout
from pixelfly.ops import butterfly_attention

ENGINES = {"cudnn": None, "butterfly 128": 128, "butterfly 64": 64}  # blocks of the layout
DIRECTIONS = ("forward", "backward")
# Of both engines' kernels; the last two stand before and behind cuDNN's backward.
NAMES = "triton|cudnn|sdpa|flash|fmha|compute_dot_do_o|convert_dq"
PRODUCTS = {"forward": 2, "backward": 5}  # matrix products over the kept scores
STALLS = ("long_scoreboard", "short_scoreboard", "gmma", "math_pipe_throttle", "barrier", "wait")
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COUNTERS: Metrics = METRICS | {
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "instructions_per_cycle": ("sm__inst_executed.avg.per_cycle_active", 1),
    "exp_unit_percent": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", 1),
    **{f"stalled_{reason}": (STALLED.format(reason), 1) for reason in STALLS},  # warps, an issue
}


def call_of(engine: str, length: int) -> tuple[Call, float]:
    """An engine's attention at one length, and the share of the scores that it keeps."""
    block_size = ENGINES[engine]
    if block_size is None:
        return dense(BACKENDS[engine]), 1.0
    layout = butterfly_attention_layout(length, block_size=block_size)
    return functools.partial(butterfly_attention, layout=layout), layout.density


def shapes_of(args: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """Batch, heads, length and features of a head of every case."""
    return [
        (max(1, args.tokens // length), args.heads, length, features)
        for features in args.head_features
        for length in args.lengths
    ]


def run_cases(args: argparse.Namespace) -> None:
    """The process under ncu: every case runs once to compile and once recorded."""
    for shape in shapes_of(args):
        make = {"device": "cuda", "dtype": torch.bfloat16}
        qkv = [torch.randn(shape, **make).requires_grad_() for _ in range(3)]
        dy = torch.randn(shape, **make)
        for engine in args.engines:
            call, _ = call_of(engine, shape[2])
            torch.autograd.grad(call(*qkv), qkv, dy)
            with torch.no_grad():
                call(*qkv)
                with recorded():
                    call(*qkv)
            y = call(*qkv)
            with recorded():
                torch.autograd.grad(y, qkv, dy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[1024, 4096, 16384])
    add("--head-features", type=int, nargs="*", default=[64, 128])
    add("--heads", type=int, default=8)
    add("--tokens", type=int, default=65536, help="in all: batch x length")
    add("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    add("--out", type=pathlib.Path, default=None)
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_cases(args)
    child = [__file__, "--child", "--engines", *args.engines]
    child += ["--heads", str(args.heads), "--tokens", str(args.tokens)]
    child += ["--lengths", *map(str, args.lengths)]
    child += ["--head-features", *map(str, args.head_features)]
    groups = iter(counters(child, NAMES, COUNTERS))
    records = []
    for batch, heads, length, features in shapes_of(args):
        for engine in args.engines:
            density = call_of(engine, length)[1]
            for direction in DIRECTIONS:
                kept = batch * heads * density * length**2
                records.append({
                    "length": length, "batch": batch, "heads": heads, "head_features": features,
                    "engine": engine, "density": density, "direction": direction,
                    "flop": 2 * PRODUCTS[direction] * kept * features, "kernels": next(groups),
                })  # fmt: skip
    meta = environment("cuda")
    out = args.out or results_path("attention_profile", meta["device"])
    out.write_text(json.dumps({"meta": meta, "metrics": COUNTERS, "records": records}, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
