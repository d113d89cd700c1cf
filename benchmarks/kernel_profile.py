"""What bounds the kernels: Nsight Compute's counters of every kernel of the operator's table.

    python benchmarks/kernel_profile.py                       # needs ncu on PATH and a GPU
    python benchmarks/kernel_profile.py --shapes 25216x3072x768 --kinds blocks

Starts itself under ncu, which replays each kernel with cold caches and leaves the clocks alone.
Writes benchmarks/results/kernel_profile_<device>.json: time, bytes that left memory (DRAM), bytes
that went from L2 to the multiprocessors, L2's hit rate, and how busy the tensor cores were.
attention_profile.py does the same for attention.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch
from cases import KINDS, TABLE, Case
from op import Layer
from timing import environment, results_path

DIRECTIONS = ("forward", "dx", "dw")
MARK = "spin_kernel"  # torch.cuda._sleep: stands before each case's kernels
OURS = "product_(sm90|split_sm90|sm80|few_sm80)|low_rank|weight_grad_(sm80|sm90)"
Metrics = dict[str, tuple[str, float]]
METRICS: Metrics = {  # name in the results: metric, how many of its units are one of the results'
    "us": ("gpu__time_duration.sum", 1e3),
    "dram_read_mb": ("dram__bytes_read.sum", 1e6),
    "dram_write_mb": ("dram__bytes_write.sum", 1e6),
    "l2_to_sm_mb": ("l1tex__m_xbar2l1tex_read_bytes.sum", 1e6),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct", 1),
    "tensor_percent": (
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
        1,
    ),
}


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """What runs inside is seen by the recorder, after a marker."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run_case(layer: Layer, x: torch.Tensor, dy: torch.Tensor, direction: str, record: bool) -> None:
    """One direction of a layer; the recorder sees its kernels alone."""
    layer = layer.wanting(direction)
    x = x.detach().requires_grad_(direction == "dx")
    backward = direction != "forward"
    with torch.set_grad_enabled(backward):
        y = layer(x) if backward else None
        with recorded() if record else contextlib.nullcontext():
            if backward:
                torch.autograd.grad(y, layer.inputs(x, direction), dy)
            else:
                layer(x)


def run_cases(cases: list[Case], directions: list[str]) -> None:
    """The process under ncu: every case and direction, once to warm up and once recorded."""
    for case in cases:
        layer = Layer(case, torch.bfloat16, "cuda", dense=False)
        x = torch.randn(case.tokens, case.in_features, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(case.tokens, case.out_features, device="cuda", dtype=torch.bfloat16)
        for direction in directions:
            for record in (False, True):
                run_case(layer, x, dy, direction, record)


def parse(text: str, names: str, metrics: Metrics) -> list[list[dict]]:
    """ncu's raw CSV -> the kernels after each marker, each named by what `names` finds."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise SystemExit("ncu printed no table; its last lines:\n" + "\n".join(lines[-20:]))
    groups: list[list[dict]] = []
    rows = csv.DictReader(lines[start:])
    next(rows)  # the units; --print-units base makes them ns, bytes and percent
    for row in rows:
        name = re.search(rf"\w*(?:{names}|{MARK})\w*", row["Kernel Name"])[0]
        if name == MARK:
            groups.append([])
            continue
        kernel: dict = {"kernel": name}
        for key, (metric, unit) in metrics.items():
            kernel[key] = float(row[metric].replace(",", "")) / unit
        groups[-1].append(kernel)
    if not all(groups):
        raise SystemExit(f"ncu saw no kernel named {names} in a case")
    return groups


def counters(child: list[str], names: str, metrics: Metrics) -> list[list[dict]]:
    """Runs a Python script and its arguments under ncu; what `parse` makes of it."""
    if shutil.which("ncu") is None:
        raise SystemExit(f"{child[0]}: ncu (Nsight Compute) is not on PATH")
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--print-units", "base"]
    command += ["--metrics", ",".join(metric for metric, _ in metrics.values())]
    command += ["--kernel-name", f"regex:{names}|{MARK}", sys.executable, *child]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ncu failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return parse(done.stdout, names, metrics)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="*", default=["x".join(map(str, shape)) for shape in TABLE])
    add("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    add("--directions", nargs="*", default=list(DIRECTIONS), choices=DIRECTIONS)
    add("--out", type=pathlib.Path, default=None)
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [Case(*map(int, s.split("x")), kind=kind) for s in args.shapes for kind in args.kinds]
    if args.child:
        return run_cases(cases, args.directions)
    child = [__file__, "--child", "--shapes", *args.shapes, "--kinds", *args.kinds]
    groups = counters([*child, "--directions", *args.directions], OURS, METRICS)
    meta = environment("cuda")
    labels = [(case, direction) for case in cases for direction in args.directions]
    records = [
        {
            "T": case.tokens,
            "K": case.in_features,
            "N": case.out_features,
            "kind": case.kind,
            "direction": direction,
            "kernels": kernels,
        }
        for (case, direction), kernels in zip(labels, groups, strict=True)
    ]
    out = args.out or results_path("kernel_profile", meta["device"])
    out.write_text(json.dumps({"meta": meta, "metrics": METRICS, "records": records}, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
