"""Long Range Arena: dense transformers against Pixelfly ones, in speed and in accuracy.

    python benchmarks/lra.py --mode speed --compile --graph          # all five sizes, one GPU
    python benchmarks/lra.py --mode train --tasks listops --steps 2000 --seeds 0 1
    python benchmarks/lra.py --mode speed --tasks toy --device cpu --steps 2   # does it work?

`speed` times training steps on random tokens without padding: dense attention with its scores in
memory, dense with torch's fused attention, Pixelfly; and their peak memory. With --compile all of
them are compiled, and dense attention with its scores in memory is there uncompiled too, as
publications have it. A step of a small model is bound by the host: --graph also replays it as a
CUDA graph, and ratios are then those of the graphs. `train` gives fused
dense and Pixelfly the same batches for the same number of steps and reports test accuracy, a row
for each seed of weights and batches (--data-seed is the data's own); on a GPU its steps are always
replays of a graph. Writes lra_<mode>_<device>.json to benchmarks/results after every kind, prints
a table and draws a plot (lra_plots.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import loop
import lra_plots
import torch
import torch._inductor.config
from data import DataMissing
from display import make_console, print_table
from feeds import SequenceFeed
from lra_data import Sequences, listops, load
from lra_model import SIZES, Size, build, z_order
from timing import captured, earlier, environment, results_path, time_cuda
from training import Learner, Settings

DENSE = ("scores_eager", "scores", "sdpa", "sdpa_cudnn")  # what Pixelfly is compared with
WARM = 5  # steps that compile and warm up: Learner.step_ms leaves them out
EVALS = 8  # of a training run
REPLAYS = 100  # of a graph: the GPU's energy counter moves every tenth of a second
# Attention over blocks of 64 has no kernel but the tuned ones.
TUNED = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN", "triton.cudagraphs": False}


def make(kind: str, size: Size, args: argparse.Namespace) -> Learner:
    """A model whose steps can be timed, with its optimizer."""
    torch.manual_seed(0)
    model = build(kind.removesuffix("_eager"), size, args.density, args.attention_block)
    settings = Settings(
        steps=args.steps,
        batch=args.batch or size.batch,
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup=max(1, args.steps // 20),
        eval_every=args.steps,
        seed=0,
        device=args.device,
        amp="bf16" if args.device == "cuda" else None,
        compile=args.compile and not kind.endswith("_eager"),
    )
    return Learner(kind, model, settings)


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def described(task: str, size: Size, args: argparse.Namespace) -> dict:
    keys = ("density", "attention_block", "compile", "steps")
    row = {"task": task, "mode": args.mode, **{key: getattr(args, key) for key in keys}}
    return row | dataclasses.asdict(size) | {"batch": args.batch or size.batch}


def record_of(row: dict, records: list[dict]) -> dict:
    """The record of an earlier run that this row describes, else a new one."""
    record = next((r for r in records if row.items() <= r.items()), None)
    if record is None:
        record = row | {"kinds": {}}
        records.append(record)
    return record


def problem(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:400]}"


def kinds_of(args: argparse.Namespace) -> list[str]:
    """The kinds that `speed` measures. Without --compile "scores" itself is the uncompiled one."""
    kinds = args.kinds or ["scores_eager", "scores", "sdpa", "pixelfly"]
    return [kind for kind in kinds if args.compile or kind != "scores_eager"]


def finished(found: dict | None, args: argparse.Namespace) -> bool:
    """Whether a kind of an earlier run has all that this one would measure."""
    return found is not None and "error" not in found and (not args.graph or "graph_ms" in found)


def replayed(learner: Learner, x: torch.Tensor, y: torch.Tensor) -> dict:
    """Milliseconds and joules of the step as a CUDA graph, or why there is none."""
    for group in learner.optimizer.param_groups:
        group["capturable"] = True
    stream = torch.cuda.current_stream()
    torch.cuda.empty_cache()  # the steps so far ran on another stream and share no memory with it
    try:
        graph = time_cuda(captured(lambda: learner.update(x, y)), REPLAYS)
    except Exception as error:  # whatever a capture stumbles over: the step's own time stays
        torch.cuda.synchronize()
        torch.cuda.set_stream(stream)  # a capture that breaks off leaves its own
        # The end of a broken capture raises too, and says less than what broke it.
        told = [problem(e) for e in (error, error.__context__) if e is not None]
        return {"graph_ms": None, "graph_error": " after ".join(told)}
    return {"graph_ms": graph["ms"], "graph_joules": graph["joules"]}


def measure(kind: str, size: Size, args: argparse.Namespace) -> dict:
    """One kind's step: milliseconds, peak memory, seconds of compiling; or its error."""
    batch = args.batch or size.batch
    x = torch.randint(1, size.vocabulary, (batch, size.length), device=args.device)
    y = torch.randint(0, size.classes, (batch,), device=args.device)
    try:
        learner = make(kind, size, args)
        if args.device == "cpu":
            learner.count_memory(x, y)
        for step in range(WARM + args.steps):
            learner.step(x, y, step)
        found = {
            "ms": learner.step_ms(),
            "peak_gb": learner.peak_bytes / 2**30,
            "params": sum(p.numel() for p in learner.model.parameters()),
        }
        if learner.settings.compile:
            warm = sum(learner.step_seconds[:WARM]) - WARM * found["ms"] / 1e3
            found["compile_s"] = max(0.0, warm)
        return found | (replayed(learner, x, y) if args.graph else {})
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        return {"error": problem(error)}


def compare(record: dict) -> None:
    """Writes every dense kind's ratio to Pixelfly into the record: of the graphs' times where both
    have one ("graphed" names these), else of the steps'."""
    ours = record["kinds"].get("pixelfly", {})
    record["graphed"] = []
    for kind in DENSE:
        found = record["kinds"].get(kind)
        if found is None:
            continue
        both = [(found.get(key), ours.get(key)) for key in ("graph_ms", "ms")]
        times = next((pair for pair in both if None not in pair), None)
        record[f"ratio_{kind}"] = times[0] / times[1] if times else None
        if times is not None and times == both[0]:
            record["graphed"].append(kind)


def means(records: list[dict]) -> dict[str, dict]:
    """Every dense kind's mean ratio, over how many tasks, and how many of these were graphs."""
    out = {}
    for kind in DENSE:
        having = [r for r in records if r.get(f"ratio_{kind}")]
        if having:
            out[kind] = {
                "ratio": statistics.mean(r[f"ratio_{kind}"] for r in having),
                "tasks": len(having),
                "graphed": sum(kind in r.get("graphed", []) for r in having),
            }
    return out


def speed(
    task: str, args: argparse.Namespace, records: list[dict], write: Callable[[], None]
) -> None:
    """Measures the kinds that the task's record lacks, one after the other, and writes each."""
    # Full sequences: without a padding mask every kind runs its fastest kernels.
    size = dataclasses.replace(SIZES[task], padded=False)
    record = record_of(described(task, size, args), records)
    for kind in kinds_of(args):
        if finished(record["kinds"].get(kind), args):
            print(f"{task} {kind}: kept", flush=True)
            continue
        begin = time.perf_counter()
        found = record["kinds"][kind] = measure(kind, size, args)
        free()
        compare(record)
        write()
        spent = f"{time.perf_counter() - begin:.0f} s, {found.get('compile_s', 0):.0f} compiling"
        print(f"{task} {kind}: {spent}; {json.dumps(found)}", flush=True)


def task_data(task: str, args: argparse.Namespace) -> tuple[Sequences, str]:
    if task == "toy":
        return listops(64, 16, args.data_seed, SIZES[task].length, 8), "ListOps, short"
    data, name = load(task, args.data_dir, args.train_samples, args.test_samples, args.data_seed)
    size = SIZES[task]
    return data.reordered(z_order(size.length)) if size.picture else data, name


def trained(kind: str, task: str, feed: SequenceFeed, seed: int, args: argparse.Namespace) -> dict:
    """One kind's test accuracy, curve, step time and peak memory (the data's is not counted)."""
    size = SIZES[task]
    torch.manual_seed(seed)
    model = build(kind, size, args.density, args.attention_block, args.dropout)
    settings = loop.Settings(
        steps=args.steps,
        batch=args.batch or size.batch,
        weight_decay=args.weight_decay,
        lr_rule="plain",
        compile=args.compile,
        evals=min(EVALS, args.steps),
    )
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

    def show(step: int, loss: float) -> None:
        print(f"{task} seed {seed} {kind} step {step}: validation loss {loss:.3f}", flush=True)

    outcome = loop.train(model, feed, settings, args.lr, seed, torch.device(args.device), show)
    found = {"accuracy": outcome["test_accuracy"], "test_loss": outcome["test_loss"]}
    found |= {"ms": outcome["step_ms"], "params": sum(p.numel() for p in model.parameters())}
    if cuda:
        found["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found | {"curve": outcome["curve"], "diverged": outcome["diverged"]}


def accuracy(
    task: str, args: argparse.Namespace, records: list[dict], write: Callable[[], None]
) -> None:
    """Trains the kinds that the task's records lack, one after the other, and writes each."""
    try:
        data, name = task_data(task, args)
    except DataMissing as error:
        raise SystemExit(f"benchmarks/lra.py: {error}") from None
    feed = SequenceFeed(data.train, data.test, torch.device(args.device))
    samples = {"train_samples": len(data.train[1]), "test_samples": len(data.test[1])}
    options = {"data": name, "data_seed": args.data_seed, "lr": args.lr}
    options |= {"weight_decay": args.weight_decay, "dropout": args.dropout}
    for seed in args.seeds:
        row = described(task, SIZES[task], args) | options | samples | {"seed": seed}
        record = record_of(row, records)
        for kind in args.kinds or ["sdpa", "pixelfly"]:
            if kind in record["kinds"]:
                print(f"{task} seed {seed} {kind}: kept", flush=True)
                continue
            found = record["kinds"][kind] = trained(kind, task, feed, seed, args)
            free()
            write()
            print(f"{task} seed {seed} {kind}: {100 * found['accuracy']:.2f} %", flush=True)


def table(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what was measured."""
    header = ["task", "kind", "ms / step", "in a graph", "compiling s", "peak GB", "params"]
    rows = []
    for r in records:
        for kind, found in r.get("kinds", {}).items():
            if "error" in found:
                rows.append([r["task"], kind, found["error"][:40], *[""] * 6])
                continue
            graph, compiling = found.get("graph_ms"), found.get("compile_s")
            ratio, right = r.get(f"ratio_{kind}"), found.get("accuracy")
            row = [r["task"], kind, f"{found['ms']:.2f}", "" if graph is None else f"{graph:.2f}"]
            row.append("" if compiling is None else f"{compiling:.0f}")
            row.append(f"{found['peak_gb']:.2f}" if "peak_gb" in found else "")
            row += [str(found["params"]), "" if right is None else f"{100 * right:.2f} %"]
            rows.append([*row, "" if ratio is None else f"{ratio:.2f}x"])
    return [*header, "accuracy", "vs pixelfly"], rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=("speed", "train"), default="speed")
    add("--tasks", nargs="*", choices=tuple(SIZES), default=None)
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=None, help="default: the task's")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--dropout", type=float, default=0.0, help="train: of embeddings, attention and MLPs")
    add("--density", type=float, default=0.5, help="of the linear layers")
    add("--attention-block", type=int, default=64, help="tokens; on a GPU 64 or 128")
    add("--compile", action="store_true", help="torch.compile every model, with its autotuner")
    add("--kinds", nargs="*", choices=(*DENSE, "pixelfly"), default=None,
        help="default: all but sdpa_cudnn; train: sdpa and pixelfly")  # fmt: skip
    add("--graph", action="store_true", help="speed: also the step replayed as a CUDA graph")
    add("--add", action="store_true",
        help="keep what --out has, of this commit, and measure only what it lacks")  # fmt: skip
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
    if args.graph and (args.device == "cpu" or args.mode != "speed"):
        parser.error("--graph needs --mode speed and --device cuda")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout: expected at least 0 and less than 1, got {args.dropout:g}")
    if args.mode == "speed" and args.dropout:
        parser.error("--dropout needs --mode train: steps are timed without it")
    if args.mode == "speed" and not kinds_of(args):
        parser.error("--kinds scores_eager needs --compile: without it that is scores")
    if args.mode == "train" and "scores_eager" in (args.kinds or []):
        parser.error("--kinds scores_eager: --mode train trains scores instead")
    tuned = torch._inductor.config.patch(TUNED) if args.compile else contextlib.nullcontext()
    with tuned:
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measures every task, and prints and writes what came out."""
    trained = ["listops", "image", "pathfinder"]
    tasks = args.tasks or (trained if args.mode == "train" else [t for t in SIZES if t != "toy"])
    meta = environment(args.device)
    out = args.out or results_path(f"lra_{args.mode}", meta["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    records = earlier(out, meta) if args.add else []

    def write() -> None:
        content = {"meta": meta, "records": records}
        content |= {"means": means(records)} if args.mode == "speed" else {}
        out.write_text(json.dumps(content, indent=1) + "\n")

    for task in tasks:
        (speed if args.mode == "speed" else accuracy)(task, args, records, write)
    print_table(make_console(), f"Long Range Arena, {args.mode}", *table(records))
    for kind, mean in means(records).items():
        of = f"{mean['tasks']} tasks, {mean['graphed']} of them in graphs"
        print(f"{kind} / pixelfly: {mean['ratio']:.2f}x on average over {of}")
    print(f"wrote {out}")
    lra_plots.plot(out.with_suffix(".png"), [{"meta": meta, "records": records}])


if __name__ == "__main__":
    main()
