"""Writes the README's tables from the results files, and from nothing else.

    python benchmarks/report.py            # rewrite README.md in place
    python benchmarks/report.py --check    # exit 1 if README.md is out of date

A table lives between `<!-- results:NAME -->` and `<!-- /results -->`; NAME is a file of
benchmarks/results without its ending. `<!-- results:NAME profile -->`: what its steps consist of.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import statistics

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- results:(\w+)( profile)? -->\n)(.*?)(<!-- /results -->)", re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(meta: dict) -> str:
    cuda = f", CUDA {meta['cuda']}" if meta["cuda"] else ""
    return f"Measured on {meta['device']}, torch {meta['torch']}{cuda}, commit {meta['sha']}.\n\n"


def ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def operator_table(data: dict) -> str:
    """One row per shape and kind: forward, and forward + backward, beside dense and the floor."""
    cases: dict[tuple, dict[str, dict]] = {}
    for r in data["records"]:
        if r.get("study", "table") not in ("table", "own"):
            continue
        cases.setdefault((r["T"], r["K"], r["N"], r["kind"]), {})[r["direction"]] = r
    floors = any(r["floor_ms"] for r in data["records"])  # a CPU has none
    rows = []
    for (tokens, k, n, kind), found in cases.items():
        cells = [f"{tokens}, {k}→{n}", kind, f"{100 * next(iter(found.values()))['density']:.0f} %"]
        for direction in ("forward", "forward_backward"):
            r = found.get(direction)
            if r is None or r["ratio"] is None:
                cells += ["–"] * (4 if floors else 3)
                continue
            floor = [ms(r["floor_ms"])] if floors else []
            cells += [ms(r["dense_ms"]), *floor, ms(r["ours_ms"]), f"**{r['ratio']:.2f}×**"]
        rows.append(cells)
    header = ["T, K→N", "pattern", "density"]
    for name in ("forward", "fwd + bwd"):
        header += [f"{name}: dense ms", *(["floor"] if floors else []), "ours", "speed-up"]
    return source(data["meta"]) + markdown(header, rows)


def few_tokens_table(data: dict) -> str:
    """One row per layer and pattern, a column per number of tokens: both speed-ups."""
    found: dict[tuple, dict[tuple, float]] = {}
    for r in data["records"]:
        row = found.setdefault((r["K"], r["N"], r["kind"]), {})
        row[r["T"], r["direction"]] = r["ratio"]
    tokens = sorted({t for row in found.values() for t, _ in row})

    def cell(row: dict[tuple, float], t: int) -> str:
        ratios = [row.get((t, direction)) for direction in ("forward", "forward_backward")]
        return "–" if None in ratios else ", ".join(f"{ratio:.2f}" for ratio in ratios)

    rows = [
        [f"{k}→{n}", kind, *(cell(row, t) for t in tokens)] for (k, n, kind), row in found.items()
    ]
    header = ["K→N", "pattern", *(f"{t} token{'s' * (t > 1)}" for t in tokens)]
    return source(data["meta"]) + markdown(header, rows)


def model_order(record: dict) -> tuple[int, int, str]:
    """Where a row of models.py stands: by model, then mode, then form."""
    models = ("vit", "mixer", "gpt2", "stack2048", "stack4096")
    modes = ("eager", "compile", "reduce-overhead")
    return models.index(record["model"]), modes.index(record["mode"]), record["form"]


def per_second(batch: str, milliseconds: float) -> str:
    """Images or tokens a second: of a batch such as "128 images" or "8 x 1024 tokens"."""
    count = math.prod(int(number) for number in re.findall(r"\d+", batch))
    return f"{1e3 * count / milliseconds:,.0f}"


def model_table(data: dict) -> str:
    """One row per model, mode and form. "In a graph": the whole step replayed as a CUDA graph;
    "ideal": the floor of benchmarks/ideal.py."""
    rows = []
    for r in sorted(data["records"], key=model_order):
        graph = r.get("graph_ratio")
        joules = [r.get("dense_joules"), r.get("ours_joules")]
        rows.append(
            [
                f"{r['model']} ({r['batch']})",
                r["mode"],
                r["form"],
                f"{r['dense_params'] / 1e6:.1f} → {r['ours_params'] / 1e6:.1f} M",
                f"{r['dense_ms']:.1f}",
                f"{r['ours_ms']:.1f}",
                f"**{r['ratio']:.2f}×**",
                " → ".join(per_second(r["batch"], r[f"{side}_ms"]) for side in ("dense", "ours")),
                "–" if graph is None else f"{graph:.2f}×",
                f"{r['dense_ideal_ms']:.1f} → {r['ours_ideal_ms']:.1f}",
                f"{r['dense_mem_gb']:.1f} → {r['ours_mem_gb']:.1f} GB",
                "–" if None in joules else f"{joules[0]:.1f} → {joules[1]:.1f} J",
            ]
        )
    header = ["model", "mode", "form", "parameters", "dense ms", "ours ms", "speed-up"]
    header += ["a second", "in a graph", "ideal ms", "peak memory", "energy a step"]
    return source(data["meta"]) + markdown(header, rows)


def profile_table(data: dict) -> str:
    """One row per model, mode and form: ms of a step's kernels by kind, dense and ours."""
    kinds = ("gemm", "pixelfly", "attention", "pointwise", "optimizer", "other")
    rows = []
    for r in sorted(data["records"], key=model_order):
        dense, ours = r["dense_profile_ms"], r["ours_profile_ms"]
        cells = [f"{dense.get(kind, 0):.1f} → {ours.get(kind, 0):.1f}" for kind in kinds]
        rows.append([r["model"], r["mode"], r["form"], *cells])
    names = ["GEMM", "pixelfly", "attention", "pointwise, norms, loss", "optimizer", "other"]
    return source(data["meta"]) + markdown(["model", "mode", "form", *names], rows)


def training_table(data: dict) -> str:
    rows = [
        [
            r["name"],
            f"{100 * r['accuracy']:.2f} %",
            f"{r['params'] / 1e6:.2f} M",
            f"{r['macs'] / 1e6:.0f} M",
            f"{r['step_ms']:.2f}",
        ]
        for r in data["records"]
    ]
    header = ["model", "test accuracy", "parameters", "MACs", "step ms"]
    return source(data["meta"]) + markdown(header, rows)


def recipe_table(data: dict) -> str:
    """One row per task and pattern, those of a task by their test loss; means over the seeds."""
    runs: dict[tuple[str, str], list[dict]] = {}
    for r in data["records"]:
        runs.setdefault((r["task"], r["pattern"]), []).append(r)
    tasks = list(dict.fromkeys(task for task, _ in runs))

    def mean(found: list[dict], key: str) -> float:
        return statistics.mean(r[key] for r in found)

    rows = []
    for (task, pattern), found in sorted(
        runs.items(), key=lambda run: (tasks.index(run[0][0]), mean(run[1], "test_loss"))
    ):
        right = sorted(100 * r["test_accuracy"] for r in found)
        spread = f" ({right[0]:.2f}–{right[-1]:.2f})" if len(right) > 1 else ""
        timed = all(r["step_ms"] for r in found)
        rows.append(
            [
                task,
                pattern,
                f"{found[0]['params'] / 1e6:.2f} M",
                ", ".join(str(r["seed"]) for r in found),
                f"{statistics.mean(right):.2f} %{spread}",
                f"{mean(found, 'test_loss'):.3f}",
                f"{mean(found, 'step_ms'):.2f}" if timed else "–",
            ]
        )
    header = ["task", "pattern", "parameters", "seeds", "test accuracy", "test loss", "step ms"]
    return source(data["meta"]) + markdown(header, rows)


def scaling_table(data: dict) -> str:
    """One row per configuration that has dense beside it."""
    rows = [
        [
            f"{r['model']} {r['form']}",
            f"{r['processes']} {r['parallel'] or ''}".strip(),
            f"{r['ms']:.1f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{100 * r['efficiency']:.0f} %",
            f"{r['ratio_to_dense']:.2f}×",
            f"{r['mem_gb']:.1f} GB",
        ]
        for r in data["records"]
        if r.get("efficiency") and r.get("ratio_to_dense")
    ]
    header = ["model", "GPUs", "step ms", "tokens/s", "efficiency", "to dense", "peak memory"]
    return source(data["meta"]) + markdown(header, rows)


def between_table(data: dict) -> str:
    rows = [
        [
            r["case"],
            r["direction"].replace("_", " + "),
            ms(r["torch"]["median"]),
            ms(r["floor_ms"]),
            ms(r["pixelfly"]["median"]),
            f"**{r['torch']['median'] / r['pixelfly']['median']:.2f}×**",
        ]
        for r in data["records"]
    ]
    header = ["case", "direction", "torch ms", "floor", "ours", "speed-up"]
    return source(data["meta"]) + markdown(header, rows)


def attention_table(data: dict) -> str:
    """One row per length and direction that was compared with dense attention."""
    rows = [
        [
            f"{r['length']} x {r['head_features']}",
            r["direction"].replace("_", " + "),
            f"{100 * r['density'][r['ours']]:.1f} %",
            ms(r["peers"].get("cudnn")),
            ms(r["peers"].get("flash")),
            ms(r["peers"].get("window")),
            f"{ms(r['ours_ms'])} ({r['ours'].removeprefix('butterfly ')})",
            f"**{r['ratio']:.2f}×**",
        ]
        for r in data["records"]
        if r.get("ratio")
    ]
    header = ["tokens x features of a head", "direction", "density", "cuDNN ms", "flash ms"]
    header += ["window ms", "ours (blocks of)", "to the faster dense"]
    return source(data["meta"]) + markdown(header, rows)


def lra_table(data: dict) -> str:
    """Speed: a row per task; training: a row per task and seed."""
    rows = []
    if data["records"][0]["mode"] == "train":
        for r in data["records"]:
            found = [r["kinds"].get(kind) for kind in ("sdpa", "pixelfly")]
            right = ["–" if f is None else f"{100 * f['accuracy']:.2f} %" for f in found]
            samples = f"{r['train_samples']:,} / {r['test_samples']:,}"
            steps = f"{r.get('steps_done', r['steps'])} x {r['batch']}"
            rows.append([r["data"], str(r["seed"]), samples, steps, *right])
        header = ["data", "seed", "samples: training / test", "steps x batch", "dense", "pixelfly"]
        return source(data["meta"]) + markdown(header, rows)
    kinds = [kind for kind in LRA_KINDS if any(kind in r["kinds"] for r in data["records"])]
    dense = [kind for kind in kinds if kind != "pixelfly"]
    eager = "scores_eager" in kinds
    graphs = any("graph_ms" in found for r in data["records"] for found in r["kinds"].values())
    for r in data["records"]:
        cells = [f"{r['task']} ({r['batch']} x {r['length']})"]
        cells += [lra_cell(r["kinds"].get(kind, {}), graphs) for kind in kinds]
        rows.append([*cells, *(lra_ratio(r, kind, graphs) for kind in dense)])
    if len(rows) > 1 and "means" in data:
        found = [data["means"].get(kind) for kind in dense]
        cells = ["–" if m is None else f"**{m['ratio']:.2f}×** ({m['tasks']})" for m in found]
        rows.append(["mean (of tasks)", *[""] * len(kinds), *cells])
    names = [LRA_KINDS[kind] for kind in kinds]
    if eager:
        names = [names[0], *(f"{name}, compiled" for name in names[1:])]
    names[0] += ": ms a step, in a graph" if graphs else ": ms a step"
    to = [f"to {LRA_RATIOS[kind]}" for kind in dense]
    return source(data["meta"]) + markdown(["task (batch x tokens)", *names, *to], rows)


LRA_KINDS = {
    "scores_eager": "dense, scores in memory, eager (as published)",
    "scores": "dense, scores in memory",
    "sdpa": "dense, fused",
    "sdpa_cudnn": "dense, cuDNN",
    "pixelfly": "ours",
}
LRA_RATIOS = {
    "scores_eager": "eager scores",
    "scores": "scores",
    "sdpa": "fused",
    "sdpa_cudnn": "cuDNN",
}


def lra_cell(found: dict, graphs: bool) -> str:
    """A kind's step, and the same as a CUDA graph if there are such times, and its memory."""
    if "ms" not in found:
        return "–"
    graph = found.get("graph_ms")
    graph = (" → –" if graph is None else f" → {graph:.1f}") if graphs else ""
    return f"{found['ms']:.1f}{graph}, {found['peak_gb']:.1f} GB"


def lra_ratio(record: dict, kind: str, graphs: bool) -> str:
    """Times a kind takes as long as ours; marked if it is of steps where others are of graphs."""
    ratio = record.get(f"ratio_{kind}")
    if ratio is None:
        return "–"
    steps = graphs and kind not in record.get("graphed", [])
    return f"**{ratio:.2f}×**" + (" (steps)" if steps else "")


def plan_table(data: dict) -> str:
    """One row per model, dense and planned: predicted and real steps."""
    rows = []
    for r in data["records"]:
        for side in ("dense", "pixelfly"):
            found = r[side]
            row = [f"{r['model']} {side}"]
            for mode in ("bfloat16", "autocast"):
                row.append(f"{found[f'{mode}_predicted_ms']:.1f}")
                row.append(f"{found[f'{mode}_ms']:.1f} ({100 * found[f'{mode}_error']:+.0f} %)")
            rows.append([*row, f"{r['plan_seconds']:.1f}"])
    header = ["model", "bf16: predicted ms", "real ms (predicted is off by)"]
    header += ["autocast: predicted ms", "real ms (predicted is off by)"]
    return source(data["meta"]) + markdown([*header, "plan() s"], rows)


def release_table(data: dict) -> str:
    """One row per torch and Python that a release was tried with."""
    rows = [
        [
            *(r[key] for key in ("torch", "python", "from", "tests")),
            str(r["passed"]),
            str(r["failed"] + r["errors"]) + (f": {r['note']}" if "note" in r else ""),
        ]
        for r in data["records"]
    ]
    header = ["torch", "CPython", "installed from", "tests", "passed", "failed"]
    meta = data["meta"]
    return f"Tried {meta['date']} on {meta['device']}: {meta['sha']}.\n\n" + markdown(header, rows)


TABLES = {
    "releases": release_table,
    "attention": attention_table,
    "lra": lra_table,
    "plan": plan_table,
    "op": operator_table,
    "few": few_tokens_table,
    "models": model_table,
    "train": training_table,
    "recipe": recipe_table,
    "scaling": scaling_table,
    "between": between_table,
}


def render(text: str) -> str:
    """Returns `text` with every marked table rewritten; a missing file leaves its table empty."""

    def fill(match: re.Match) -> str:
        begin, name, profile, _, end = match.groups()
        path = RESULTS / f"{name}.json"
        if not path.exists():
            return begin + end
        table = profile_table if profile else TABLES[name.split("_")[0]]
        return begin + table(json.loads(path.read_text())) + end

    return MARKED.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if args.check:
        raise SystemExit(0 if before == after else "README.md is out of date: run report.py")
    readme.write_text(after)


if __name__ == "__main__":
    main()
