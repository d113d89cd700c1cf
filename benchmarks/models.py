"""One training step of whole models, dense against pixelfly, eager and compiled, in one run.

    python benchmarks/models.py                       # every model, both modes
    python benchmarks/models.py --models vit gpt2 --modes compile
    python benchmarks/models.py --models tiny --device cpu --block-size 16 --rank 16 --steps 2

A step is forward, backward and fused AdamW under bf16 autocast. Dense and pixelfly models are timed
one after the other in one process; each mode also as a CUDA graph of the whole step, which shows
what is left when the host no longer counts. Writes benchmarks/results/models_<device>.json (after
every model, so that a run that is cut short keeps what it measured) and a plot beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn as nn
from display import pyplot
from ideal import ideal
from timing import captured, earlier, environment, results_path, time_cpu, time_cuda
from workloads import WORKLOADS, Loss

from pixelfly import PixelflyConfig, sparsify_
from pixelfly.nn import AttentionConfig

KINDS = {  # kernels by words of their names, the first match counts
    "attention": ("attention", "flash", "fmha", "mha", "cudnn::fusion"),  # ours is one too
    "pixelfly": ("pixelfly",),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "pointwise": ("triton", "elementwise", "layer_norm", "reduce", "copy", "cat", "memset"),
}
LIKE = {"recompute": "blocks", "attention": "blocks"}  # forms whose ideal is another's
LONGEST = 16  # kernels of a step that are named
HOST_STEPS = 9


def make_step(
    model: nn.Module,
    loss: Loss,
    device: str,
    call: nn.Module | None = None,
    capturable: bool = False,
) -> Callable[[], None]:
    """Returns a function that takes one training step under bf16 autocast.

    `call` is what the loss calls, if it is not the model (DDP around it); a capturable step may go
    into a CUDA graph.
    """
    kind = torch.device(device).type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=capturable)

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16):
            value = loss(model if call is None else call)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(model: nn.Module, loss: Loss, args: argparse.Namespace, graph: bool) -> dict:
    """Time, energy, memory and profile of a step; with `graph` also replayed as a CUDA graph."""
    step = make_step(model, loss, args.device, capturable=args.device == "cuda")
    params = sum(p.numel() for p in model.parameters())
    if args.device == "cpu":
        return time_cpu(step, args.steps) | {"params": params}
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    out = time_cuda(step, args.steps)
    out |= {"params": params, "mem_gb": torch.cuda.max_memory_allocated() / 2**30}
    out["profile_ms"], out["kernels"], out["host_ms"] = profile(step)
    if not graph:
        return out
    try:
        graphed = time_cuda(captured(step), args.steps)
        out |= {"graph_ms": graphed["ms"], "graph_joules": graphed["joules"]}
    except RuntimeError as error:  # a model may do what a graph cannot hold: a row without it
        torch.cuda.synchronize()
        out |= {"graph_ms": None, "graph_error": str(error).splitlines()[0]}
    return out


def profile(step: Callable[[], None]) -> tuple[dict[str, float], list[tuple], float]:
    """One step's milliseconds by kind of kernel, its longest kernels, and the host's milliseconds.

    The longest kernels are (name, calls, milliseconds); the host's time is what it needs to issue
    the step.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    longest = [(e.key[:160], e.count, e.self_device_time_total / 1e3) for e in events[:LONGEST]]
    for event in events:
        key = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in key for w in words)), "other")
        total[kind] = total.get(kind, 0.0) + event.self_device_time_total / 1e3
    return total, longest, host_ms(step)


def host_ms(step: Callable[[], None]) -> float:
    """Milliseconds the host needs to issue a step, the GPU idle at its start: a median."""
    times = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def run(name: str, form: str, mode: str, args: argparse.Namespace) -> dict:
    """Measures one model in one form: dense, or pixelfly's blocks | factored | global | recompute |
    attention.

    recompute: blocks, with MLPs that keep nothing of their hidden width. attention: blocks, and
    attention over butterfly blocks of 128.
    """
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    with torch.device(args.device):  # where drawing the weights of large models takes no time
        model, loss, batch = workload.build(args.device)
    if form != "dense":
        config = PixelflyConfig(
            density=args.density,
            block_size=args.block_size,
            rank=args.rank if form in ("factored", "global") else 0,
            lowrank="global" if form == "global" else "factored",
            fuse_mlp=args.fuse_mlp or form == "recompute",
            recompute_mlp=form == "recompute",
            fuse_blocks=args.fuse_blocks,
            fuse_loss=args.fuse_loss,
            attention=AttentionConfig(block_size=128) if form == "attention" else None,
        )
        report = sparsify_(model, config, workload.chosen)
        if not report.layers:
            raise SystemExit(f"{name}: no layer could be converted:\n{report}")
    model = model.to(args.device).train()
    if mode != "eager":
        torch._dynamo.reset()
        model = torch.compile(model, mode=None if mode == "compile" else mode)
    begin = time.perf_counter()
    try:
        return measure(model, loss, args, mode != "reduce-overhead") | {"batch": batch}
    finally:
        print(f"{name} {form} {mode}: {time.perf_counter() - begin:.0f} s", flush=True)
        del model, loss
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def record(
    name: str, form: str, mode: str, args: argparse.Namespace, dense: dict, ours: dict
) -> dict:
    """One row of the results: every figure of both models, and the ratios of their times."""
    row = {"model": name, "mode": mode, "form": form, "batch": dense["batch"]}
    row["density"] = args.density
    options = {"density": args.density, "block_size": args.block_size, "rank": args.rank}
    for side, kind in (("dense", "dense"), ("ours", LIKE.get(form, form))):
        costs = ideal(name, kind, **options).values()
        row[f"{side}_ideal_ms"] = 1e3 * sum(cost.seconds for cost in costs)
    for side, figures in (("dense", dense), ("ours", ours)):
        row |= {f"{side}_{key}": value for key, value in figures.items() if key != "batch"}
    row["ratio"] = dense["ms"] / ours["ms"]
    if dense.get("graph_ms") and ours.get("graph_ms"):
        row["graph_ratio"] = dense["graph_ms"] / ours["graph_ms"]
    return row


def plot(path: pathlib.Path, records: list[dict]) -> None:
    """Stacked bars: where the time of each step goes."""
    rows = [r for r in records if r.get("ours_profile_ms")]
    if not rows:
        return
    plt = pyplot()
    if plt is None:
        return

    bars: dict[str, dict[str, float]] = {}
    for r in rows:
        bars[f"{r['model']} {r['mode']}\ndense"] = r["dense_profile_ms"]
        bars[f"{r['model']} {r['mode']}\n{r['form']}"] = r["ours_profile_ms"]
    figure, axis = plt.subplots(figsize=(1 + 0.7 * len(bars), 4.5), layout="constrained")
    bottom = [0.0] * len(bars)
    for kind in (*KINDS, "other"):
        heights = [profile.get(kind, 0.0) for profile in bars.values()]
        axis.bar(range(len(bars)), heights, bottom=bottom, label=kind)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(bars)), list(bars), rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("ms of kernels in a step")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [name for name in WORKLOADS if name != "tiny"]
    parser.add_argument("--models", nargs="*", default=every, choices=list(WORKLOADS))
    modes = ["eager", "compile", "reduce-overhead"]  # the last two of torch.compile
    parser.add_argument("--modes", nargs="*", default=modes[:2], choices=modes)
    parser.add_argument("--forms", nargs="*", default=["blocks", "factored", "global"])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--fuse-mlp", action="store_true", help="PixelflyMLP in place of MLPs")
    parser.add_argument("--fuse-blocks", action="store_true", help="fewer passes around layers")
    parser.add_argument("--fuse-loss", action="store_true", help="GPT-2's loss without its logits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=pathlib.Path, default=None)
    parser.add_argument("--add", action="store_true", help="keep the rows of --out, of this commit")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/models.py needs a CUDA device; torch sees none")
    meta = environment(args.device)
    print(meta, flush=True)
    out = args.out or results_path("models", meta["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    records = earlier(out, meta) if args.add else []
    for name in args.models:
        for mode in args.modes:
            dense = run(name, "dense", mode, args)
            for form in args.forms:
                ours = run(name, form, mode, args)
                records.append(record(name, form, mode, args, dense, ours))
                print(json.dumps(records[-1]), flush=True)
                out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    plot(out.with_suffix(".png"), records)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
