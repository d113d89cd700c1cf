"""Does it hold accuracy? Sparsity patterns at one density, trained alike on real data.

    python benchmarks/recipe.py                                   # Fashion-MNIST, all patterns
    python benchmarks/recipe.py --tasks gpt2-text --patterns dense butterfly+low-rank
    python benchmarks/recipe.py --seeds 0 1 2 --lr 5e-4 1e-3 2e-3 --time-limit 540

Same steps and same batches for all; with several learning rates each pattern gets the one that is
best on validation data, and only that one is tested. Every finished run is written to --out at
once; the same command goes on where it was stopped (a run that was cut short starts again).
--time-limit ends between runs, before one that would not fit. Writes a plot per task beside --out.
Text is made ready by benchmarks/text.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import pathlib
import time
from collections.abc import Callable

import torch
from data import DataMissing
from display import make_console, progress_bar
from feeds import Feed
from loop import Settings, train
from recipe_patterns import NAMES, convert
from recipe_show import plot, show
from recipe_tasks import TASKS
from timing import environment

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
USUAL = ("steps", "batch", "weight_decay", "block_size", "width", "layers", "length")
OnSteps = Callable[[int, float], None]
VISION = ["vit-fashion-mnist", "mixer-fashion-mnist"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        default=VISION,
        choices=list(TASKS),
        metavar="TASK",
        help=", ".join(TASKS),
    )
    add(
        "--patterns",
        nargs="+",
        default=list(NAMES),
        choices=NAMES,
        metavar="PATTERN",
        help=", ".join(NAMES),
    )
    add("--seeds", nargs="+", type=int, default=[0])
    add("--lr", nargs="+", type=float, default=None, help="several: the best on validation counts")
    add(
        "--lr-rule",
        choices=["structure", "plain"],
        default="structure",
        help="pixelfly.param_groups, or one rate for all",
    )
    add("--density", type=float, default=0.25, help="weights kept, low rank included")
    add("--block-size", type=int, default=None, help="16 | 32 | 64 | 128")
    for name in ("steps", "batch", "width", "layers"):
        add(f"--{name}", type=int, default=None)
    add("--length", type=int, default=None, help="tokens in a sample of text")
    add("--weight-decay", type=float, default=None)
    add("--evals", type=int, default=15, help="points of a curve")
    add("--moves", type=int, default=15, help="how often rigl may move blocks")
    add("--data-dir", default="data", help="where Fashion-MNIST and gpt2-text/ lie")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu | cuda[:i]")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--save", type=pathlib.Path, metavar="FOLDER", help="keeps the dense models' weights")
    add("--time-limit", type=float, default=None, metavar="SECONDS")
    add("--out", type=pathlib.Path, default=None, help="default results/recipe_<device>.json")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "width", "layers", "length", "evals", "moves"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if args.width is not None and args.width % 64:
        parser.error(f"--width: heads have 64 features, expected a multiple, got {args.width}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    if args.out is None:
        args.out = RESULTS / f"recipe_{args.device.split(':')[0]}.json"
    return args


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeSettings(Settings):
    """And what its model is made of, besides the task and the pattern."""

    density: float
    block_size: int
    width: int
    layers: int
    length: int


def settings_of(task: str, args: argparse.Namespace) -> tuple[RecipeSettings, argparse.Namespace]:
    """The task's usual settings with what the command line changes, and both for the builders."""
    usual = TASKS[task].usual
    values = {
        name: usual[name] if getattr(args, name) is None else getattr(args, name) for name in USUAL
    }
    settings = RecipeSettings(
        **values,
        density=args.density,
        lr_rule=args.lr_rule,
        compile=args.compile,
        evals=min(args.evals, values["steps"]),
        moves=args.moves,
    )
    return settings, argparse.Namespace(**{**vars(args), **values})


@dataclasses.dataclass(frozen=True)
class Key:
    """What tells runs of the same settings apart."""

    task: str
    pattern: str
    seed: int
    lr: float

    def __str__(self) -> str:
        return f"{self.task} {self.pattern} seed {self.seed} lr {self.lr:g}"


class Ledger:
    """The results file: read at the start, written whole after every run."""

    def __init__(self, path: pathlib.Path, device: str) -> None:
        self.path, self.meta = path, environment(device)
        self.records: list[dict] = []
        if path.exists():
            saved = json.loads(path.read_text())
            if saved["meta"]["device"] != self.meta["device"]:
                raise SystemExit(
                    f"--out {path}: measured on {saved['meta']['device']}, this is "
                    f"{self.meta['device']}; give another --out"
                )
            self.records = saved["records"]

    def check(self, task: str, settings: dict) -> None:
        """Exits if the file holds runs of the task that cannot be compared with these."""
        for record in self.records:
            if record["task"] == task and record["settings"] != settings:
                changed = [
                    f"{key} was {record['settings'].get(key)}, now {value}"
                    for key, value in settings.items()
                    if record["settings"].get(key) != value
                ]
                raise SystemExit(f"--out {self.path}: {task}: {'; '.join(changed)}; give another")

    def has(self, key: Key) -> bool:
        wanted = dataclasses.asdict(key)
        return any(all(r[k] == v for k, v in wanted.items()) for r in self.records)

    def add(self, record: dict) -> None:
        self.records.append(record | {"sha": self.meta["sha"]})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        content = {"meta": self.meta, "records": self.records}
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)


def train_one(key: Key, args: argparse.Namespace, feed: Feed, on_steps: OnSteps) -> dict:
    """One run; its record."""
    task = TASKS[key.task]
    settings, options = settings_of(key.task, args)
    torch.manual_seed(key.seed)
    model = task.build(feed, options)
    dense_params = sum(p.numel() for p in model.parameters())
    torch.manual_seed(key.seed + 1)
    density = convert(
        model, key.pattern, settings.density, settings.block_size, task.chosen, key.seed
    )
    outcome = train(model, feed, settings, key.lr, key.seed, torch.device(args.device), on_steps)
    if args.save is not None and key.pattern == "dense":
        args.save.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.save / f"{key.task}-seed{key.seed}-lr{key.lr:g}.pt")
    record = {**dataclasses.asdict(key), "density": density, "dense_params": dense_params}
    record |= {"params": sum(p.numel() for p in model.parameters())}
    record |= {"settings": dataclasses.asdict(settings), **outcome}
    if task.text:
        bits = outcome["test_loss"] / math.log(2)
        record["test_bits_per_byte"] = bits * feed.tokens_per_byte["test"]
    return _finite(record)


def _finite(value):
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def summary(key: Key, record: dict, seconds: float) -> str:
    final = record["curve"][-1]
    if record["diverged"]:
        judged = "diverged"
    elif TASKS[key.task].text:
        judged = f"val loss {final['val_loss']:.3f}"
    else:
        judged = f"val {100 * final['val_accuracy']:.2f} %"
    return f"{key}: {judged}, {record['step_ms']:.2f} ms a step, {seconds:.0f} s in all"


class Feeds:
    """Every task's data on the device; tasks of the same data share it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._made = args, {}

    def of(self, task: str) -> Feed:
        settings, options = settings_of(task, self._args)
        kind = (TASKS[task].feed, settings.length)
        if kind not in self._made:
            try:
                self._made[kind] = TASKS[task].feed(options, torch.device(self._args.device))
            except DataMissing as missing:
                raise SystemExit(str(missing)) from None
        return self._made[kind]


def run_all(keys: list[Key], args: argparse.Namespace, ledger: Ledger, begin: float) -> int:
    """Runs what is not in the ledger; returns how many runs the time limit left over."""
    feeds, longest, left, done = Feeds(args), {}, 0, 0
    todo = [key for key in keys if not ledger.has(key)]
    total = sum(settings_of(key.task, args)[0].steps for key in todo)
    with progress_bar() as progress:
        bar = progress.add_task("training", total=max(1, total))
        for key in todo:
            start = time.perf_counter()
            need = longest.get(key.task, 0.0)
            if args.time_limit is not None and start - begin + need > args.time_limit:
                left += 1
                continue

            def on_steps(step: int, loss: float, key: Key = key, before: int = done) -> None:
                text = f"{key}: val loss {loss:.3f}"
                progress.update(bar, completed=before + step, description=text)

            record = train_one(key, args, feeds.of(key.task), on_steps)
            ledger.add(record)
            spent = time.perf_counter() - start
            longest[key.task] = max(need, spent)
            done += record["settings"]["steps"]
            progress.console.print(summary(key, record, spent))
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return left


def main(argv: list[str] | None = None) -> int:
    begin = time.perf_counter()
    args = parse(argv)
    if args.compile:
        # A graph for every pattern: beyond 8 of them dynamo would train the rest eagerly.
        torch._dynamo.config.recompile_limit = 8 * len(NAMES)
    ledger, console = Ledger(args.out, args.device), make_console()
    keys = [
        Key(task, pattern, seed, lr)
        for seed in args.seeds
        for task in args.tasks
        for lr in args.lr or [TASKS[task].usual["lr"]]
        for pattern in args.patterns
    ]
    for task in args.tasks:
        ledger.check(task, dataclasses.asdict(settings_of(task, args)[0]))
    left = run_all(keys, args, ledger, begin)
    for task in args.tasks:
        records = [r for r in ledger.records if r["task"] == task]
        if records:
            show(console, task, records, TASKS[task].text)
            name = f"{args.out.stem}_{task}.png"
            if plot(args.out.with_name(name), task, records, TASKS[task].text):
                console.print(f"wrote {name} to {args.out.parent}")
    console.print(f"{time.perf_counter() - begin:.0f} s; results in {args.out}")
    if left:
        console.print(f"the time limit left {left} runs over; the same command goes on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
