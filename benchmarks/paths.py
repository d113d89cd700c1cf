"""Which kernel serves a layer best: every path forced in turn, in one run.

    python benchmarks/paths.py                                    # needs a GPU
    python benchmarks/paths.py --paths auto sm90 split --shapes 512x1024x4096

For each layer and direction the paths that `PIXELFLY_KERNEL` can force, interleaved as
benchmarks/timing.py does it; a path that cannot serve the call is left out. The choices of
csrc/launch/heuristics.cpp are fitted to such figures. Writes results/paths_<device>.json: medians
in microseconds, and the kernel that would be chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib

import torch
from cases import KINDS, Case
from op import Layer, candidate
from timing import environment, num_buffer_sets, results_path, time_all

from pixelfly.ops import explain

# Layers that narrow, and the widths that ViT-B, GPT-2 medium and their neighbours have.
SHAPES = [
    *((25216, k, 768) for k in (1536, 2304, 3072, 4096, 4608)),
    *((tokens, 3072, 768) for tokens in (4096, 8448, 12288, 16384, 20000, 32768, 50432)),
    *((25216, k, n) for k, n in ((2048, 512), (2560, 640), (2048, 384), (1536, 384), (768, 768))),
    *((16384, k, 1024) for k in (1024, 2048, 3072, 4096, 8192)),
    (25216, 3456, 864),
]
OUTPUT = {"forward": "y", "dx": "dx"}  # what `explain` calls it


def forced(path: str, call):
    """`call` with that path forced: what a CUDA graph records keeps the choice."""

    def run(i: int):
        os.environ["PIXELFLY_KERNEL"] = path
        try:
            return call(i)
        finally:
            del os.environ["PIXELFLY_KERNEL"]

    return run


def measure(case: Case, direction: str, paths: list[str], rounds: int) -> dict:
    t, k, n = case.tokens, case.in_features, case.out_features
    sets = num_buffer_sets(2 * t * (k + n))
    make = {"device": "cuda", "dtype": torch.bfloat16}
    xs = [torch.randn(t, k, requires_grad=True, **make) for _ in range(sets)]
    dys = [torch.randn(t, n, **make) for _ in range(sets)] if direction != "forward" else []
    layer = Layer(case, torch.bfloat16, "cuda", dense=False)
    calls = {
        path: forced(path, candidate(layer, lambda layer: layer, xs, dys, direction))
        for path in paths
    }
    times = time_all(calls, sets, rounds=rounds)
    us = {p: round(1e3 * t.median, 1) for p, t in times.items() if not isinstance(t, str)}
    chosen = dict(explain(xs[0], layer.layout, rank=case.factored_rank).kernels)
    record = {"tokens": t, "in": k, "out": n, "block_size": case.block_size, "kind": case.kind}
    record |= {"direction": direction, "us": us}
    if direction in OUTPUT:
        record["chosen"] = chosen[OUTPUT[direction]]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", nargs="+", default=["sm90", "all_rows"])
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--directions", nargs="+", default=["forward"])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    meta = environment()
    records = []
    for shape in args.shapes:
        t, k, n = map(int, shape.split("x"))
        for kind in args.kinds:
            for direction in args.directions:
                case = Case(t, k, n, kind=kind, block_size=args.block_size)
                record = measure(case, direction, args.paths, args.rounds)
                records.append(record)
                times = "  ".join(f"{path} {us}" for path, us in record["us"].items())
                print(f"{t} {k}->{n} {kind} {direction}: {times}", flush=True)
    path = args.out or results_path("paths", meta["device"])
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
