"""Training on 1, 2, 4 ... GPUs: tokens/s, scaling efficiency, communication and memory.

    python benchmarks/scaling.py                              # every model on all GPUs
    python benchmarks/scaling.py --models stack2048 --parallel ddp --steps 10
    python benchmarks/scaling.py --batch 16 --fixed total     # the same batch on any number
    python benchmarks/scaling.py --models tiny --device cpu --block-size 16 --rank 8 --steps 2

Starts one torchrun for every number of processes, model, form and engine, so that a failure costs
its own row alone. Dense and pixelfly train on the same batch: forward, backward and fused AdamW
under bf16 autocast. DDP exchanges float32 gradients; FSDP2 gathers bfloat16 weights and reduces
float32 gradients; tp splits the MLPs of mlp4096 over the processes, which then share the tokens.
Efficiency is tokens/s over those of as many single processes. The communication share is the part
of a step in which NCCL's kernels run and no other does; on the CPU, for DDP, what a step without
the exchange saves. --graph replays a step as one CUDA graph, so that no host sets its pace.

Writes benchmarks/results/scaling_<device>.json after every row, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
from display import make_console, print_table, pyplot
from scaling_worker import ENGINES, FORMS, MODELS, add_options
from timing import environment, results_path

GRAPH_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}  # torch's condition for a capture
HERE = pathlib.Path(__file__).resolve().parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    every = [name for name in MODELS if name != "tiny"]
    add("--models", nargs="+", default=every, choices=list(MODELS))
    add("--forms", nargs="+", default=["dense", "factored"], choices=FORMS)
    add("--parallel", nargs="+", default=list(ENGINES), choices=ENGINES)
    add("--processes", nargs="+", type=int, default=None, help="default: 1, 2, 4 ... GPUs")
    add("--batch", type=int, default=8, help="samples of a step")
    add(
        "--fixed", default="each", choices=["each", "total"], help="--batch is a process's or all's"
    )
    add("--limit", type=int, default=180, help="seconds one configuration may take")
    add("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    count = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count()
    if args.graph and args.device != "cuda":
        parser.error("--graph: CUDA graphs need --device cuda")
    if args.device == "cuda" and not count:
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if args.processes is None:
        args.processes = [n for n in (1, 2, 4, 8) if n <= count]
    for n in args.processes:
        if n < 1 or (args.device == "cuda" and n > count):
            parser.error(f"--processes: expected 1 to {count}, the GPUs here, got {n}")
        if args.fixed == "total" and args.batch % n:
            parser.error(f"--batch: expected a multiple of {n} processes, got {args.batch}")
    return args


def configurations(args: argparse.Namespace) -> list[dict]:
    """Rows in an order that compares as early as possible: form by form, then more processes."""
    return [
        {"model": model, "processes": n, "parallel": parallel, "form": form}
        for model in args.models
        for n in args.processes
        for parallel in (MODELS[model].engines if n > 1 else [None])
        if parallel is None or parallel in args.parallel
        for form in args.forms
    ]


def run(row: dict, args: argparse.Namespace) -> dict:
    """The row with its measurements, or with an `error`."""
    n = row["processes"]
    shares = 1 if row["parallel"] == "tp" else n
    batch = args.batch // shares if args.fixed == "total" else args.batch
    row = row | {"batch": batch * shares}
    start = [sys.executable]
    if n > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    with tempfile.TemporaryDirectory() as folder:
        record = pathlib.Path(folder) / "record.json"
        options = {
            "--model": row["model"],
            "--form": row["form"],
            "--parallel": row["parallel"] or "ddp",
            "--batch": batch,
            "--record": record,
            "--steps": args.steps,
            "--density": args.density,
            "--block-size": args.block_size,
            "--rank": args.rank,
            "--device": args.device,
        }
        command = [*start, str(HERE / "scaling_worker.py")]
        command += [str(word) for option in options.items() for word in option]
        command += ["--compile"] * args.compile + ["--graph"] * args.graph
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | GRAPH_ENVIRONMENT if args.graph else None,
            text=True,
            errors="replace",
        )
        try:
            output = process.communicate(timeout=args.limit)[0]
        except BaseException as error:
            end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return row | {"error": f"took longer than {args.limit} s"}
        if record.exists():
            return row | json.loads(record.read_text())
    return row | {"error": cause(output)}


def end(process: subprocess.Popen) -> None:
    """Ends a configuration; torchrun, asked politely, ends its processes, by force after 30 s."""
    process.terminate()
    try:
        process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def cause(output: str) -> str:
    """The line of a failed program's output that says most: its first error."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in output.splitlines()]
    errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b.*:", x)]
    return (errors or [x for x in lines if x] or ["it wrote nothing"])[0][:300]


def compare(records: list[dict]) -> None:
    """Adds efficiency and the ratio to dense to the rows that have what to compare with."""
    rate = {
        (r["model"], r["processes"], r["parallel"], r["form"]): r["tokens_per_s"]
        for r in records
        if "tokens_per_s" in r
    }
    for r in records:
        if "tokens_per_s" not in r:
            continue
        one = rate.get((r["model"], 1, None, r["form"]))
        dense = rate.get((r["model"], r["processes"], r["parallel"], "dense"))
        r["efficiency"] = r["tokens_per_s"] / (r["processes"] * one) if one else None
        r["ratio_to_dense"] = r["tokens_per_s"] / dense if dense else None


def show(records: list[dict]) -> None:
    columns = {  # header -> (key, format, scale); narrow, for a terminal of 80 columns
        "M": ("params", "{:.1f}", 1e-6),
        "ms": ("ms", "{:.1f}", 1),
        "tokens/s": ("tokens_per_s", "{:,.0f}", 1),
        "eff %": ("efficiency", "{:.0f}", 100),
        "× dense": ("ratio_to_dense", "{:.2f}", 1),
        "comm %": ("communication_share", "{:.0f}", 100),
        "GB": ("mem_gb", "{:.1f}", 1),
    }
    rows, failures = [], []
    for r in records:
        name = [f"{r['model']} {r['form']}", f"{r['processes']} {r['parallel'] or ''}"]
        if "error" in r:
            failures.append(f"{' on '.join(name)} failed: {r['error']}")
            continue
        cells = (
            "-" if r.get(key) is None else text.format(scale * r[key])
            for key, text, scale in columns.values()
        )
        rows.append([*name, *cells])
    console = make_console()
    print_table(console, "training over processes", ["model", "on", *columns], rows)
    for failure in failures:
        console.print(failure)


def plot(path: pathlib.Path, records: list[dict]) -> None:
    """Tokens/s over processes, one panel a model; dotted: as many single processes."""
    done = [r for r in records if "tokens_per_s" in r]
    if not done:
        return
    plt = pyplot()
    if plt is None:
        return

    names = list(dict.fromkeys(r["model"] for r in done))
    size = (4.5 * len(names), 3.5)
    figure, axes = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [r for r in done if r["model"] == name]
        counts = sorted({r["processes"] for r in mine})
        for i, form in enumerate(dict.fromkeys(r["form"] for r in mine)):
            one = [r for r in mine if r["form"] == form and r["processes"] == 1]
            if one:
                ideal = [n * one[0]["tokens_per_s"] for n in counts]
                axis.plot(counts, ideal, ":", color=f"C{i}", linewidth=1)
            for parallel, style in zip(ENGINES, ("o-", "s--", "^-."), strict=True):
                rows = [r for r in mine if r["form"] == form and r["parallel"] == parallel]
                points = sorted((r["processes"], r["tokens_per_s"]) for r in one + rows)
                if rows:
                    label = f"{form}, {parallel}"
                    axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
        axis.set(title=name, xlabel="processes", ylabel="tokens/s", xticks=counts, ylim=(0, None))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    meta = environment(args.device) | {
        "options": {
            key: getattr(args, key)
            for key in (
                "steps",
                "density",
                "block_size",
                "rank",
                "compile",
                "graph",
                "batch",
                "fixed",
            )
        }
    }
    out = args.out or results_path("scaling", meta["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    for row in configurations(args):
        records.append(run(row, args))
        compare(records)
        print(json.dumps(records[-1]), flush=True)
        out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    show(records)
    plot(out.with_suffix(".png"), records)
    print(f"wrote {out}")
    return int(any("error" in r for r in records))


if __name__ == "__main__":
    raise SystemExit(main())
