"""Sustained, interleaved timing.

On a GPU every candidate is captured into a CUDA graph that walks over several buffer sets (so that
inputs do not sit in L2), all candidates are loaded for 0.3 s first (a cool chip flatters), and then
replayed in turn, so that drift in clocks and temperature falls on all of them alike. On a CPU the
candidates are called in turn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from energy import EnergyCounter

L2_ROTATION_BYTES = 256 * 2**20  # several times the 50 MB of an H100's L2
WARM_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median over replays, and the quartiles as its spread."""

    median: float
    low: float
    high: float
    samples: int

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def num_buffer_sets(bytes_per_set: int) -> int:
    """How many buffer sets make one walk larger than L2 (2 at least, 8 at most)."""
    return max(2, min(8, -(-L2_ROTATION_BYTES // max(bytes_per_set, 1))))


def capture(
    call: Callable[[int], object], sets: int, calls: int, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """Returns a graph of `calls` calls, the i-th on buffer set `i % sets`, after a warm-up."""
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local: NCCL's watchdog asks for its events whenever it likes.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for i in range(calls):
            call(i % sets)
    return graph


def captured(
    step: Callable[[], None], warm_up: int = 3, stream: torch.cuda.Stream | None = None
) -> Callable[[], None]:
    """Returns a step, which is warmed up first, as one CUDA graph."""
    return capture(lambda _: step(), warm_up, 1, stream).replay


def time_cuda(step: Callable[[], None], steps: int) -> dict[str, float | None]:
    """Median milliseconds of a step, its quartiles, and joules a step."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    counter = EnergyCounter(torch.cuda.get_device_properties().uuid)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    before = counter.read()
    marks[0].record()
    for i in range(steps):
        step()
        marks[i + 1].record()
    torch.cuda.synchronize()
    after = counter.read()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    low, _, high = statistics.quantiles(times, n=4)
    energy = None if before is None or after is None else (after - before) / 1e3 / steps
    return {"ms": statistics.median(times), "low_ms": low, "high_ms": high, "joules": energy}


def time_cpu(step: Callable[[], None], steps: int) -> dict[str, float | None]:
    step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return {"ms": statistics.median(times), "low_ms": min(times), "high_ms": max(times)}


def time_all(
    candidates: dict[str, Callable[[int], object]],
    sets: int,
    *,
    rounds: int = 9,
    device: str = "cuda",
) -> dict[str, Timing | str]:
    """Times every candidate in one sustained, interleaved run.

    Args:
        candidates: name -> callable of the buffer-set index.
        sets: number of buffer sets the callables accept.
        rounds: replays per candidate that are timed.
        device: "cuda" or "cpu".

    Returns:
        name -> `Timing`, or the error text of a candidate that could not run.
    """
    replay = _cuda_replays if device == "cuda" else _cpu_replays
    runs, out = replay(candidates, sets)
    warm_until = time.perf_counter() + WARM_SECONDS
    while runs and time.perf_counter() < warm_until:
        for run in runs.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
    for name, values in samples.items():
        quartiles = statistics.quantiles(values, n=4) if rounds > 1 else values * 3
        out[name] = Timing(statistics.median(values), quartiles[0], quartiles[2], len(values))
    return out


Runs = tuple[dict[str, Callable[[], float]], dict[str, Timing | str]]


def _problem(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _cpu_replays(candidates: dict[str, Callable[[int], object]], sets: int) -> Runs:
    """Functions that time one call each, and the errors of candidates that cannot run."""
    runs: dict[str, Callable[[], float]] = {}
    out: dict[str, Timing | str] = {}
    for name, call in candidates.items():
        turn = iter(range(1 << 62))

        def run(call: Callable[[int], object] = call, turn=turn) -> float:
            i = next(turn) % sets
            begin = time.perf_counter()
            call(i)
            return 1e3 * (time.perf_counter() - begin)

        try:
            run()
        except Exception as error:  # a peer that cannot run is a row in the table, not a crash
            out[name] = _problem(error)
        else:
            runs[name] = run
    return runs, out


def _cuda_replays(candidates: dict[str, Callable[[int], object]], sets: int) -> Runs:
    """Functions that replay a graph and return milliseconds a call, and the errors."""
    runs: dict[str, Callable[[], float]] = {}
    out: dict[str, Timing | str] = {}
    calls = max(sets, 8)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for name, call in candidates.items():
        try:
            graph = capture(call, sets, calls)
        except Exception as error:  # a peer that cannot run is a row in the table, not a crash
            torch.cuda.synchronize()
            out[name] = _problem(error)
            continue

        def run(graph: torch.cuda.CUDAGraph = graph) -> float:
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / calls

        runs[name] = run
    return runs, out


def environment(device: str = "cuda") -> dict[str, object]:
    """What a results file says about where it was measured."""
    if device == "cpu":
        return {
            "device": f"{cpu_name()}, {torch.get_num_threads()} threads",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cuda": None,
            "sha": git_sha(),
        }
    properties = torch.cuda.get_device_properties(0)

    def query(field: str) -> str:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", "0"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return done.stdout.strip()

    return {
        "device": properties.name,
        "sms": properties.multi_processor_count,
        "driver": query("driver_version"),
        "sm_clock_max": query("clocks.max.sm"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sha": git_sha(),
    }


def earlier(path: pathlib.Path, meta: dict) -> list[dict]:
    """The rows of an earlier run, each measured beside its own dense model; [] without a file."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    if data["meta"] != meta:
        raise SystemExit(f"{path} is of {data['meta']}, not of {meta}: its rows cannot be kept")
    return data["records"]


def results_path(study: str, device: object) -> pathlib.Path:
    """Where a study's results go unless told otherwise: by the GPU's short name, or "cpu"."""
    name = str(device).lower().removeprefix("nvidia ")
    label = re.split(r"[^a-z0-9]+", name)[0] if str(device).startswith("NVIDIA") else "cpu"
    folder = pathlib.Path(__file__).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{study}_{label}.json"


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else f"{platform.machine()} CPU"


def git_sha() -> str:
    """Short commit id: PIXELFLY_SHA if set (for copies of the tree), git's, or "unknown"."""
    if os.environ.get("PIXELFLY_SHA"):
        return os.environ["PIXELFLY_SHA"]
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        command = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
