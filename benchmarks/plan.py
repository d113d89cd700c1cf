"""Does `pixelfly.budget` predict step times? Measured rates, predicted and real steps.

    python benchmarks/plan.py                                    # GPT-2 medium and ViT-B, a GPU
    python benchmarks/plan.py --models tiny --device cpu --quick  # does the script work?

Measures `CostModel.measure` on the device, plans every model to --density, and compares the
predicted step (forward, backward, AdamW) of the dense and of the planned model with a real one: on
CUDA a graph of the eager step, so that launches from the host do not count. "bfloat16" trains in
bf16 alone; "autocast" keeps float32 weights and casts them; each is predicted by a plan of its own.
Writes results/plan_<device>.json, after every model.
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
from display import make_console, print_table
from timing import captured, environment
from torch import nn
from workloads import WORKLOADS

from pixelfly import sparsify_
from pixelfly.budget import CostModel, Plan, plan

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
MODES = ("bfloat16", "autocast")


def _text(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


INPUTS: dict[str, Callable[[], object]] = {  # the shapes of workloads.py
    "gpt2": lambda: _text(8, 1024),
    "vit": lambda: torch.zeros(128, 3, 224, 224),
    "mixer": lambda: torch.zeros(128, 3, 224, 224),
    "tiny": lambda: _text(2, 32),
}


def measured_cost(device: str, quick: bool) -> CostModel:
    if quick:
        small = {"shapes": [(256, 256)], "densities": (0.25,), "block_sizes": (32,)}
        return CostModel.measure(device, tokens=(64, 256), repeats=1, **small)
    if device == "cpu":
        return CostModel.measure(device)
    return CostModel.measure(device, tokens=(8192, 32768))


def step_ms(name: str, made: Plan | None, mode: str, device: str, steps: int) -> float:
    """Median milliseconds of a real training step, dense or as planned."""
    with torch.device(device):  # initial weights are drawn where they stay
        model, loss, _ = WORKLOADS[name].build(device)
    if made is not None:
        sparsify_(model, made)
    model = model.to(device, torch.bfloat16 if mode == "bfloat16" else None).train()
    cuda = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=cuda)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
            value = loss(_Cast(model) if mode == "bfloat16" else model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run = captured(step) if cuda else step
    for _ in range(3):
        run()
    times = []
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


class _Cast:
    """Calls a bf16 model on float32 images."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor):
        args = tuple(a.bfloat16() if a.is_floating_point() else a for a in args)
        return self.model(*args, **kwargs)


def record_of(name: str, cost: CostModel, args: argparse.Namespace) -> dict:
    """Predicted and real step times of one model."""
    with torch.device("meta"):
        model, _, batch = WORKLOADS[name].build("meta")
    plans, seconds = {}, {}
    for mode in args.modes:
        begin = time.perf_counter()
        plans[mode] = plan(
            model,
            INPUTS[name](),
            density=args.density,
            cost=cost,
            block_sizes=[b for b in (64, 32) if b in cost.block_sizes],
            filter_fn=WORKLOADS[name].chosen,
            autocast=mode == "autocast" and cost.dtype != "float32",  # the CPU's rates are
        )
        seconds[mode] = time.perf_counter() - begin
    first = args.modes[0]
    record = {
        "model": name,
        "batch": batch,
        "density": plans[first].density,
        "plan_seconds": seconds[first],  # the others find its layouts made
    }
    for side in ("dense", "pixelfly"):
        record[side] = {}
        for mode, made in plans.items():
            predicted = made.predicted_step(dense=side == "dense")
            total = 1e3 * predicted.total
            real = step_ms(name, None if side == "dense" else made, mode, args.device, args.steps)
            record[side] |= {
                f"{mode}_predicted_ms": total,
                f"{mode}_parts_ms": {part: 1e3 * s for part, s in predicted.parts.items()},
                f"{mode}_ms": real,
                f"{mode}_error": total / real - 1,
            }
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return record


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["gpt2", "vit"], choices=list(INPUTS))
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--density", type=float, default=0.25)
    add("--steps", type=int, default=20)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--cost", type=pathlib.Path, default=None, help="a saved CostModel, instead of measuring")
    add("--quick", action="store_true", help="measure almost nothing: a try of the script")
    add("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = make_console()
    begin = time.perf_counter()
    cost = CostModel.load(args.cost) if args.cost else measured_cost(args.device, args.quick)
    fits = {kind: rate.error for kind, rate in cost.rates.items()}
    console.print(f"rates of {cost.device}: {time.perf_counter() - begin:.0f} s, fits within")
    console.print(", ".join(f"{kind} {100 * error:.0f} %" for kind, error in fits.items()))
    out = args.out or RESULTS / f"plan_{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    cost.save(out.with_name(f"{out.stem}_cost.json"))
    meta = {**environment(args.device), "fit_errors": fits, "density": args.density}
    records: list[dict] = []
    for name in args.models:
        records.append(record_of(name, cost, args))
        out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    rows = []
    for r in records:
        for side in ("dense", "pixelfly"):
            cells = []
            for mode in args.modes:
                found = r[side]
                error = 100 * found[f"{mode}_error"]
                cells.append(f"{found[f'{mode}_predicted_ms']:.2f}")
                cells.append(f"{found[f'{mode}_ms']:.2f} ({error:+.0f} %)")
            rows.append([f"{r['model']} {side}", *cells, f"{r['plan_seconds']:.1f}"])
    header = ["model"]
    for mode in args.modes:
        header += [f"{mode}: predicted ms", "real (predicted is off by)"]
    header.append("plan s")
    print_table(console, "training steps", header, rows)
    console.print(f"{time.perf_counter() - begin:.0f} s; wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
