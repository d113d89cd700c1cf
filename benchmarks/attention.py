"""Butterfly attention against dense attention and a sliding window, over sequence lengths.

    python benchmarks/attention.py                     # 1k to 64k tokens, heads of 64
    python benchmarks/attention.py --lengths 1024 4096 16384 --head-features 128
    python benchmarks/attention.py --device cpu --lengths 256 --tokens 512 --block-sizes 32

Every length has as many tokens in all, so dense attention's work grows with the length. Baselines:
torch's scaled_dot_product_attention by backend (cuDNN, flash) and FlexAttention with a sliding
window of equal density. On a GPU the first length also tries every way to a kernel (`KERNELS`) with
every block size, and records the time or the error's text; and our faster one is timed eager too,
call after call, which shows whether the host keeps up (the other times are of CUDA graphs). Writes
attention_<device>.json to benchmarks/results after every row, and a plot beside it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from display import pyplot
from timing import Timing, environment, results_path, time_all, time_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixelfly.masks import AttentionLayout, butterfly_attention_layout
from pixelfly.ops import butterfly_attention
from pixelfly.ops.attention import _flex

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
TILES = {"BLOCK_M": 64, "BLOCK_N": 64}
TILES_BACKWARD = {"BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64}
KERNELS: dict[str, dict] = {
    "default": {"autotune": False},
    "tiles of 64": {"autotune": False, "options": TILES | TILES_BACKWARD},
    "autotuned": {"autotune": True},
}
EAGER_CALLS = 50
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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


def dense(backend: SDPBackend | None) -> Call:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def through(layout: AttentionLayout, **kernel) -> Call:
    """FlexAttention over a layout with a kernel chosen by hand."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _flex(q, k, v, layout, False, q.shape[-1] ** -0.5, None, **kernel)

    return call


def candidates(length: int, args: argparse.Namespace, probe: bool) -> dict[str, Call]:
    """Everything to be timed at one length, by name."""
    calls: dict[str, Call] = {}
    for b in args.block_sizes:
        layout = butterfly_attention_layout(length, block_size=b)
        calls[f"butterfly {b}"] = functools.partial(butterfly_attention, layout=layout)
        if probe:
            calls |= {f"butterfly {b}, {k}": through(layout, **o) for k, o in KERNELS.items()}
    layout = butterfly_attention_layout(length, block_size=args.block_sizes[0])
    local = window(length, args.block_sizes[0], layout.density)
    calls["window"] = functools.partial(butterfly_attention, layout=local)
    backends = BACKENDS if args.device == "cuda" else {"sdpa": None}
    return calls | {name: dense(backend) for name, backend in backends.items()}


def make_runs(
    calls: dict[str, Call], direction: str, shape: tuple[int, ...], device: str
) -> dict[str, Callable[[int], object]]:
    """Functions of the buffer set's index that run one direction of every call."""
    make = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    sets = [torch.randn((3, *shape), **make).unbind(0) for _ in range(2)]
    grads = [torch.randn(shape, **make) for _ in range(2)]

    def forward(call: Call, i: int) -> torch.Tensor:
        with torch.no_grad():
            return call(*sets[i])

    def both(call: Call, i: int) -> tuple[torch.Tensor, ...]:
        qkv = [t.detach().requires_grad_() for t in sets[i]]
        return torch.autograd.grad(call(*qkv), qkv, grads[i])

    one = forward if direction == "forward" else both
    return {name: functools.partial(one, call) for name, call in calls.items()}


def attempt(run: Callable[[int], object], device: str) -> str | None:
    """Runs a candidate once (which compiles it); returns its error's text."""
    try:
        run(0)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # one that cannot run is a row of the record, not the end
        return f"{type(error).__name__}: {str(error).strip()[:600]}"
    return None


def measure(length: int, features: int, direction: str, probe: bool, args) -> dict:
    """One record: every candidate at one length, in one direction."""
    batch = max(1, args.tokens // length)
    shape = (batch, args.heads, length, features)
    runs = make_runs(candidates(length, args, probe), direction, shape, args.device)
    errors = {name: attempt(run, args.device) for name, run in runs.items()}
    working = {name: run for name, run in runs.items() if errors[name] is None}
    timings = time_all(working, 2, rounds=args.rounds, device=args.device)
    ms = {n: t.median if isinstance(t, Timing) else t for n, t in timings.items()}
    ms |= {name: error for name, error in errors.items() if error is not None}
    density = {
        f"butterfly {b}": butterfly_attention_layout(length, block_size=b).density
        for b in args.block_sizes
    }
    local = window(length, args.block_sizes[0], next(iter(density.values())))

    def fastest(names) -> str | None:
        timed = {n: ms[n] for n in names if isinstance(ms[n], float)}
        return min(timed, key=timed.get, default=None)

    baseline, ours = fastest(BACKENDS if args.device == "cuda" else ["sdpa"]), fastest(density)
    found = baseline is not None and ours is not None
    eager = None
    if args.device == "cuda" and ours is not None:
        eager = time_cuda(functools.partial(runs[ours], 0), EAGER_CALLS)["ms"]
    return {
        "length": length,
        "batch": batch,
        "heads": args.heads,
        "head_features": features,
        "density": density,
        "window_density": local.density,
        "direction": direction,
        "dense": baseline,
        "dense_ms": ms.get(baseline),
        "ours": ours,
        "ours_ms": ms.get(ours),
        "ours_eager_ms": eager,
        "ratio": ms[baseline] / ms[ours] if found else None,
        "peers": ms,
    }


def plot(path: pathlib.Path, records: list[dict], device: str) -> None:
    """Time over length, a panel for each direction and number of head features."""
    panels: dict[tuple[int, str], dict[str, list[tuple[int, float]]]] = {}
    for r in records:
        lines = panels.setdefault((r["head_features"], r["direction"]), {})
        for name, ms in r.get("peers", {}).items():
            if isinstance(ms, float) and "," not in name:  # neither errors nor ways to a kernel
                lines.setdefault(name, []).append((r["length"], ms))
    plt = pyplot()
    if plt is None or not panels:
        return
    size = (4.5 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, ((features, direction), lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            dash = "o-" if name.startswith("butterfly") else "s--"
            axis.plot(*zip(*sorted(points), strict=True), dash, label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        title = f"{direction.replace('_', ' + ')}, heads of {features}"
        axis.set(title=title, xlabel=f"tokens of a sequence ({device})", ylabel="ms")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[2**i for i in range(10, 17)])
    add("--head-features", type=int, nargs="*", default=[64])
    add("--heads", type=int, default=8)
    add("--tokens", type=int, default=65536, help="in all: batch x length")
    add("--block-sizes", type=int, nargs="*", default=[128, 64])
    add("--rounds", type=int, default=5)
    add("--no-probe", action="store_true", help="do not try every kernel at the first length")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py: torch sees no CUDA device; use --device cpu")
    meta = environment(args.device)
    out = args.out or results_path("attention", meta["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    probe = args.device == "cuda" and not args.no_probe
    for features in args.head_features:
        for length in args.lengths:
            for direction in ("forward", "forward_backward"):
                first = probe and length == args.lengths[0]
                try:
                    record = measure(length, features, direction, first, args)
                except Exception as error:  # out of memory, say: the other lengths still count
                    record = {"length": length, "head_features": features, "direction": direction}
                    record["error"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
                records.append(record)
                print(json.dumps(record), flush=True)
                out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    plot(out.with_suffix(".png"), records, meta["device"])
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
