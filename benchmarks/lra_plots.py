"""Plots of the Long Range Arena's results: steps and memory by task, or accuracy while training.

    python benchmarks/lra_plots.py benchmarks/results/lra_speed_h100.json [more of the same mode]

Writes a .png beside the first file; of a task, seed and kind that several files have, the first
counts. lra.py calls it for what it has measured.
"""

from __future__ import annotations

import json
import pathlib
import sys

from display import pyplot
from report import LRA_KINDS

COLORS = {kind: f"C{i}" for i, kind in enumerate(LRA_KINDS)}
Found = dict[str, dict[str, dict]]  # by task (and seed), then by kind: what was measured


def merged(records: list[dict]) -> Found:
    """What the records hold, the first of each."""
    out: Found = {}
    for r in records:
        key = f"{r['task']} {r['seed']}" if "seed" in r else r["task"]
        for kind, found in r["kinds"].items():
            if "error" not in found:
                out.setdefault(key, {}).setdefault(kind, found)
    return out


def milliseconds(found: dict) -> float:
    """Of a step as a CUDA graph, if there is one, else of the step."""
    return found.get("graph_ms") or found["ms"]


def bars(axis, tasks: Found, height) -> None:
    """A bar for each kind of each task that has this height."""
    kinds = [kind for kind in LRA_KINDS if any(kind in found for found in tasks.values())]
    for i, kind in enumerate(kinds):
        values = [(at, height(f[kind])) for at, f in enumerate(tasks.values()) if kind in f]
        values = [(at + 0.8 * i / len(kinds), value) for at, value in values if value is not None]
        if values:
            places, heights = zip(*values, strict=True)
            axis.bar(places, heights, 0.75 / len(kinds), label=LRA_KINDS[kind], color=COLORS[kind])
    middle = 0.4 * (len(kinds) - 1) / max(1, len(kinds))
    axis.set_xticks([at + middle for at in range(len(tasks))], list(tasks), fontsize=8)
    axis.set_yscale("log")


def plot_speed(plt, tasks: Found):
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    bars(axes[0], tasks, milliseconds)
    axes[0].set_ylabel("ms of a training step")
    axes[0].legend(fontsize=7)
    bars(axes[1], tasks, lambda found: found.get("peak_gb"))
    axes[1].set_ylabel("peak memory, GB")
    return figure


def plot_training(plt, runs: Found):
    """A panel for each task, a line for each kind and seed."""
    tasks = list(dict.fromkeys(run.split()[0] for run in runs))
    size = (4.5 * len(tasks), 3.8)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        of_task = {run: kinds for run, kinds in runs.items() if run.split()[0] == task}
        for run, dash in zip(of_task, ("-", "--", ":", "-.") * len(of_task), strict=False):
            for kind, found in of_task[run].items():
                points = [(p["step"], p.get("val_accuracy")) for p in found.get("curve", [])]
                points = [(step, 100 * right) for step, right in points if right is not None]
                if points:
                    label = f"{LRA_KINDS[kind]}, seed {run.split()[1]}"
                    axis.plot(*zip(*points, strict=True), dash, color=COLORS[kind], label=label)
        axis.set(title=task, xlabel="steps", ylabel="validation accuracy, %")
        axis.legend(fontsize=7)
    return figure


def plot(path: pathlib.Path, files: list[dict]) -> None:
    """Draws what the files hold, of one mode, into `path`."""
    records = [record for data in files for record in data["records"]]
    modes = {r["mode"] for r in records}
    if len(modes) != 1:
        raise SystemExit(f"lra_plots.py: expected files of one mode, got {sorted(modes)}")
    plt = pyplot()
    if plt is None:
        return
    draw = plot_training if modes == {"train"} else plot_speed
    figure = draw(plt, merged(records))
    devices = dict.fromkeys(data["meta"]["device"] for data in files)
    figure.suptitle(f"Long Range Arena on {', '.join(devices)}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    if not argv:
        raise SystemExit(__doc__)
    paths = [pathlib.Path(arg) for arg in argv]
    plot(paths[0].with_suffix(".png"), [json.loads(path.read_text()) for path in paths])


if __name__ == "__main__":
    main(sys.argv[1:])
