"""Whether power bounds forwards that are repeated without a pause.

    python benchmarks/power.py                                  # needs a GPU
    python benchmarks/power.py --shapes 16384x4096x4096

Each forward of the operator's table, and its dense counterpart, alone for a second or so: once with
x from a normal distribution and once with zeros, which hardly switch a wire of the tensor cores.
Where zeros take less time, power bounds the other. Writes benchmarks/results/power_<device>.json:
microseconds; the multiprocessors' clock in MHz and watts, as NVML says meanwhile.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import time
from collections.abc import Callable

import torch
from cases import KINDS, TABLE, Case
from op import Layer, candidate
from timing import capture, environment, num_buffer_sets, results_path

CALLS = 20  # in a graph
WARM_SECONDS = 0.4
ANSWER_SECONDS = 0.3  # NVML takes a tenth of it


def clock_and_watts() -> tuple[float, float]:
    fields = "clocks.sm,power.draw"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    clock, watts = map(float, answer.split(","))
    return clock, watts


def measure(call: Callable[[int], object], sets: int, seconds: float) -> dict[str, float]:
    """Runs a forward for so many seconds, and then until NVML has answered."""
    graph = capture(call, sets, CALLS)

    def replay(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    replay(2)
    once = replay(10) / 10
    replay(int(WARM_SECONDS / once))
    times = max(1, int(seconds / once))
    us = replay(times) / times / CALLS * 1e6
    for _ in range(int(ANSWER_SECONDS / once)):
        graph.replay()
    clock, watts = clock_and_watts()
    torch.cuda.synchronize()
    return {"us": us, "sm_mhz": clock, "watts": watts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in TABLE])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    meta = environment()
    records = []
    for shape in args.shapes:
        t, k, n = map(int, shape.split("x"))
        for data, fill in (("normal", torch.randn), ("zeros", torch.zeros)):
            sets = num_buffer_sets(2 * t * (k + n))
            xs = [fill(t, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
            for kind in ("dense", *KINDS):
                case = Case(t, k, n, kind="blocks" if kind == "dense" else kind)
                layer = Layer(case, torch.bfloat16, "cuda", dense=kind == "dense")
                forward = candidate(layer, lambda layer: layer, xs, [], "forward")
                record = {"tokens": t, "in": k, "out": n, "kind": kind, "x": data}
                record |= measure(forward, sets, args.seconds)
                records.append(record)
                print(
                    f"{t} {k}->{n} {kind:9} x {data:6} {record['us']:7.1f} us "
                    f"{record['sm_mhz']:.0f} MHz {record['watts']:.0f} W",
                    flush=True,
                )
    path = args.out or results_path("power", meta["device"])
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
