"""Long Range Arena: dense transformers against Pixelfly ones, in speed and in accuracy.

    python benchmarks/lra.py --mode speed                            # all five sizes, one GPU
    python benchmarks/lra.py --mode train --tasks listops --steps 2000 --seeds 0 1
    python benchmarks/lra.py --mode speed --tasks toy --device cpu --steps 2   # does it work?

`speed` times training steps on random tokens without padding: dense attention with its scores in
memory, dense with torch's fused attention, Pixelfly; and their peak memory. `train` gives fused
dense and Pixelfly the same batches for the same number of steps and reports test accuracy, a row
for each seed of weights and batches (--data-seed is the data's own). Writes
lra_<mode>_<device>.json to benchmarks/results after every row and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import time

import torch
import torch._inductor.config
from data import Data, DataMissing
from display import make_console, print_table
from lra_data import listops, load
from lra_model import KINDS, SIZES, Size, build
from timing import environment, results_path
from training import Learner, Settings, train


def settings(args: argparse.Namespace, size: Size, seed: int) -> Settings:
    return Settings(
        steps=args.steps,
        batch=args.batch or size.batch,
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup=max(1, args.steps // 20),
        eval_every=max(1, args.steps // 4),
        seed=seed,
        device=args.device,
        amp="bf16" if args.device == "cuda" else None,
        compile=args.compile,
    )


def make(kind: str, size: Size, args: argparse.Namespace, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    model = build(kind, size, args.density, args.attention_block)
    return Learner(kind, model, settings(args, size, seed))


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def described(task: str, size: Size, args: argparse.Namespace) -> dict:
    keys = ("density", "attention_block", "compile", "steps")
    row = {"task": task, "mode": args.mode, **{key: getattr(args, key) for key in keys}}
    return row | dataclasses.asdict(size) | {"batch": args.batch or size.batch}


def speed(task: str, args: argparse.Namespace) -> dict:
    """Milliseconds of a training step and peak memory of every kind, one after the other."""
    size = SIZES[task]
    batch = args.batch or size.batch
    # Full sequences: without a padding mask every kind runs its fastest kernels.
    size = dataclasses.replace(size, padded=False)
    x = torch.randint(1, size.vocabulary, (batch, size.length), device=args.device)
    y = torch.randint(0, size.classes, (batch,), device=args.device)
    kinds: dict[str, dict] = {}
    for kind in KINDS:
        try:
            learner = make(kind, size, args)
            if args.device == "cpu":
                learner.count_memory(x, y)
            for step in range(5 + args.steps):  # step_ms leaves the first five out
                learner.step(x, y, step)
            kinds[kind] = {
                "ms": learner.step_ms(),
                "peak_gb": learner.peak_bytes / 2**30,
                "params": sum(p.numel() for p in learner.model.parameters()),
            }
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            kinds[kind] = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
        learner = None
        free()
    ms = {kind: result.get("ms") for kind, result in kinds.items()}
    ours = ms["pixelfly"]
    ratios = {
        f"ratio_{kind}": ms[kind] / ours if ours and ms[kind] else None
        for kind in ("scores", "sdpa")
    }
    return described(task, size, args) | {"kinds": kinds} | ratios


def task_data(task: str, args: argparse.Namespace) -> tuple[Data, str]:
    if task == "toy":
        return listops(64, 16, args.data_seed, SIZES[task].length, 8), "ListOps, short"
    return load(task, args.data_dir, args.train_samples, args.test_samples, args.data_seed)


def accuracy(task: str, data: Data, name: str, seed: int, args: argparse.Namespace) -> dict:
    """Test accuracy after equal steps on equal batches."""
    size = SIZES[task]
    learners = [make(kind, size, args, seed) for kind in ("sdpa", "pixelfly")]
    until = time.perf_counter() + args.seconds

    def show(done: int) -> None:
        found = {lr.name: f"{100 * lr.history[-1]['accuracy']:.2f} %" for lr in learners}
        print(f"{task} seed {seed} step {done}: {found}", flush=True)

    done = train(
        learners, data, settings(args, size, seed), 0, lambda: time.perf_counter() > until,
        lambda step, losses: None, show,
    )  # fmt: skip
    kinds = {}
    for learner in learners:
        if not learner.history or learner.history[-1]["step"] != done:
            right, loss = learner.evaluate(data)
            learner.history.append({"step": done, "accuracy": right, "test_loss": loss})
        kinds[learner.name] = {
            "accuracy": learner.history[-1]["accuracy"],
            "history": learner.history,
            "ms": learner.step_ms(),
            "peak_gb": learner.peak_bytes / 2**30,
            "params": sum(p.numel() for p in learner.model.parameters()),
        }
    free()
    row = described(task, size, args) | {"data": name, "steps_done": done}
    row |= {"seed": seed, "data_seed": args.data_seed, "kinds": kinds}
    return row | {"train_samples": data.num_train, "test_samples": data.num_test}


def table(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what was measured."""
    header, rows = ["task", "kind", "ms / step", "peak GB", "params", "accuracy", "vs pixelfly"], []
    for r in records:
        for kind, found in r.get("kinds", {}).items():
            if "error" in found:
                rows.append([r["task"], kind, found["error"][:40], "", "", "", ""])
                continue
            ratio, right = r.get(f"ratio_{kind}"), found.get("accuracy")
            row = [r["task"], kind, f"{found['ms']:.2f}", f"{found['peak_gb']:.2f}"]
            row += [str(found["params"]), "" if right is None else f"{100 * right:.2f} %"]
            rows.append([*row, "" if ratio is None else f"{ratio:.2f}x"])
    return header, rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=("speed", "train"), default="speed")
    add("--tasks", nargs="*", choices=tuple(SIZES), default=None)
    add("--steps", type=int, default=20)
    add("--seconds", type=float, default=600, help="of training, for each task")
    add("--batch", type=int, default=None, help="default: the task's")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--density", type=float, default=0.5, help="of the linear layers")
    add("--attention-block", type=int, default=64, help="tokens; on a GPU 64 or 128")
    add("--compile", action="store_true", help="torch.compile every model, with its autotuner")
    add("--train-samples", type=int, default=20000)
    add("--test-samples", type=int, default=2000)
    add("--data-dir", default="data", help="images, and what was generated")
    add("--seeds", type=int, nargs="+", default=[0], help="of weights and batches: train")
    add("--data-seed", type=int, default=0, help="of generated data")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/lra.py: torch sees no CUDA device; use --device cpu")
    if args.compile:  # attention over blocks of 64 has no kernel but the tuned ones
        torch._inductor.config.max_autotune = True
        torch._inductor.config.max_autotune_gemm_backends = "ATEN"
    trained = ["listops", "image", "pathfinder"]
    tasks = args.tasks or (trained if args.mode == "train" else [t for t in SIZES if t != "toy"])
    meta = environment(args.device)
    out = args.out or results_path(f"lra_{args.mode}", meta["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []

    def keep(record: dict) -> None:
        records.append(record)
        print(json.dumps(record), flush=True)
        out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")

    for task in tasks:
        if args.mode == "speed":
            keep(speed(task, args))
            continue
        try:
            data, name = task_data(task, args)
        except DataMissing as error:
            raise SystemExit(f"benchmarks/lra.py: {error}") from None
        for seed in args.seeds:
            keep(accuracy(task, data, name, seed, args))
    print_table(make_console(), f"Long Range Arena, {args.mode}", *table(records))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
