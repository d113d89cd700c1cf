"""Trains a dense model and its pixelfly version side by side on real data and compares them.

    python benchmarks/train.py                                  # digits, a small Mixer, any CPU
    python benchmarks/train.py --data fashion-mnist --model vit_tiny_patch16_224 --patch-size 4
    python benchmarks/train.py --data imagefolder:PATH --model mixer_b16_224 --amp --compile
    python benchmarks/train.py --text PATH --steps 2000         # a GPT-2 over bytes
    torchrun --nproc-per-node 4 benchmarks/train.py             # 4 processes, one GPU each

Ctrl-C leaves a checkpoint, as does every evaluation; the same command with --resume goes on with
nothing lost, on any number of processes, and after a kill from the last evaluation. Without
--resume the checkpoint of an unfinished run is never overwritten. --batch is what
all processes take together. Writes results.json, curves.png and checkpoint.pt to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import time
import types

import torch
from data import Data, DataMissing, load
from display import SilentProgress, progress_bar
from networks import build, sparsify
from ranks import PARALLEL, Ranks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_results import plot, results, show
from training import Learner, Settings, read_checkpoint, save_checkpoint, train, unfinished

from pixelfly.distributed import check_same_layouts
from pixelfly.report import Report

# May differ when a run is resumed.
NOT_SAVED = ("resume", "out", "device", "stop_after", "parallel")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits | fashion-mnist | cifar10 | imagefolder:PATH")
    add("--data-dir", default="data", help="where fashion-mnist and cifar10 lie")
    add("--text", default=None, metavar="PATH", help="train a GPT-2 on the text files of a folder")
    add("--model", default="mixer", help="mixer (built in) or any timm name")
    add("--patch-size", type=int, default=None, help="of the mixer or of a timm ViT or Mixer")
    add("--image-size", type=int, default=None, help="of an imagefolder's images (default 224)")
    add("--width", type=int, default=256, help="of the mixer or the GPT-2")
    add("--layers", type=int, default=3, help="of the mixer or the GPT-2")
    add("--length", type=int, default=256, help="bytes of text in a sample")
    add("--density", type=float, default=0.25, help="weights kept, low rank included")
    add("--block-size", type=int, default=32, help="16 | 32 | 64 | 128")
    add("--rank", type=int, default=None, help="of the low-rank term; 0: none; default: chosen")
    add("--lowrank", default="factored", choices=["factored", "global"], help="its form")
    add("--steps", type=int, default=400)
    add("--batch", type=int, default=32, help="samples of a step, over all processes")
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--eval-every", type=int, default=None, help="steps (default: a tenth of all)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu | cuda[:i]")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile both models")
    add("--parallel", default="ddp", choices=PARALLEL, help="under torchrun: copies or shards")
    add("--deterministic", action="store_true", help="deterministic algorithms only")
    add("--out", type=pathlib.Path, default=None, help="folder (default runs/<data>-<model>)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--stop-after", type=int, default=None, help="stop and save after so many steps in all")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "width", "layers", "length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    for name in ("patch_size", "image_size", "eval_every", "stop_after"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device: expected cpu, cuda or cuda:<number>, got {args.device}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    if args.text is not None and args.width % 64:
        parser.error(f"--width: a GPT-2 has heads of 64, expected a multiple, got {args.width}")
    if args.out is None:
        kind = "text-gpt2" if args.text else f"{args.data.split(':')[0]}-{args.model}"
        args.out = pathlib.Path("runs") / kind
    return args


def settings_of(args: argparse.Namespace, device: str | None = None) -> Settings:
    """What the training loop takes from the command line; `device` is this process's, if given."""
    return Settings(
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup=max(1, args.steps // 20),
        eval_every=args.eval_every or max(1, args.steps // 10),
        seed=args.seed,
        device=device or args.device,
        amp="bfloat16" if args.amp else None,
        compile=args.compile,
    )


def saved_options(args: argparse.Namespace) -> dict[str, object]:
    return {k: v for k, v in vars(args).items() if k not in NOT_SAVED}


def check_same_run(saved: dict[str, object], args: argparse.Namespace) -> None:
    """Exits if the checkpoint belongs to a run with other options."""
    mine = saved_options(args)
    other = [
        f"--{name.replace('_', '-')} was {saved.get(name)}, now {value}"
        for name, value in mine.items()
        if saved.get(name) != value
    ]
    if other:
        raise SystemExit(f"--resume: not the options of that run: {'; '.join(other)}")


def count_macs(model: nn.Module, report: Report, data: Data) -> tuple[int, int]:
    """Multiply-accumulates of one sample through the dense model and its pixelfly version."""
    tokens: dict[str, int] = {}
    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda m, inputs, layer=layer: tokens.update(
                {layer.name: inputs[0].numel() // layer.in_features}
            )
        )
        for layer in report.layers
    ]
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(data.test(torch.arange(1))[0])
    for hook in hooks:
        hook.remove()
    dense = counter.get_total_flops() // 2
    saved = sum((x.macs_before - x.macs_after) * tokens.get(x.name, 0) for x in report.layers)
    return dense, dense - saved


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a request; the second one interrupts at once.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun, which ends what
    does not stop in time by itself: there every signal is the same request.
    """

    def __init__(self, once: bool) -> None:
        self.asked, self._once = False, once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked and not self._once:
            raise KeyboardInterrupt
        self.asked = True


def load_data(args: argparse.Namespace, ranks: Ranks) -> Data:
    """Returns the data set; exits if it is not here or cannot be shared evenly."""
    try:
        with ranks.main_first():
            data = load(args.data, args.text, args.data_dir, args.image_size, args.length)
    except DataMissing as missing:
        ranks.fail(str(missing))
    size = min(args.batch, data.num_train)
    if size % ranks.world:
        ranks.fail(f"--batch: expected a multiple of the {ranks.world} processes, got {size}")
    return data


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    ranks = Ranks(args.device, args.parallel)
    try:
        return run(args, ranks)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            ranks.fail(stop.code)  # once, not once a rank
        raise
    finally:
        ranks.close()


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    progress = progress_bar() if ranks.main else SilentProgress()
    stop = StopRequest(once=ranks.parallel is not None)
    console = progress.console
    data = load_data(args, ranks)
    settings = settings_of(args, ranks.device)
    checkpoint = args.out / "checkpoint.pt"
    saved = read_checkpoint(checkpoint) if args.resume else None
    if saved is not None:
        check_same_run(saved["options"], args)
    elif (steps := unfinished(checkpoint)) is not None:
        raise SystemExit(
            f"--out: {checkpoint} is of a run that was interrupted after {steps[0]} of {steps[1]} "
            "steps; go on with it by --resume, choose another --out, or delete it"
        )
    dense, ours = build(args, data.shape, data.classes), build(args, data.shape, data.classes)
    report = sparsify(ours, args)
    if ranks.main:
        report.print()
    if ranks.parallel is not None:
        check_same_layouts(ours)
    macs = dict(zip(("dense", "pixelfly"), count_macs(dense, report, data), strict=True))
    learners = [
        Learner("dense", dense, settings, ranks),
        Learner("pixelfly", ours, settings, ranks),
    ]
    if ranks.parallel is not None:
        console.print(f"{ranks.world} processes, {ranks.parallel}")
    start = 0
    if saved is not None:
        start = saved["step"]
        for learner in learners:
            learner.load(saved["learners"][learner.name])
        console.print(f"resumed at step {start} of {settings.steps}")

    done, begin = start, time.perf_counter()
    with progress:
        bar = progress.add_task("training", total=settings.steps, completed=start)

        def on_step(step: int, losses: dict[str, float]) -> None:
            nonlocal done
            done = step
            text = "  ".join(f"{name} loss {value:.3f}" for name, value in losses.items())
            progress.update(bar, completed=step, description=text)

        def on_eval(step: int) -> None:
            last = {x.name: x.history[-1] for x in learners}
            judged = (
                f"{name} loss {h['test_loss']:.3f}"
                if args.text
                else f"{name} {100 * h['accuracy']:.2f} %"
                for name, h in last.items()
            )
            console.print(f"step {step}: {', '.join(judged)}")
            save_checkpoint(checkpoint, learners, step, saved_options(args))

        def stopped() -> bool:
            return stop.asked or (args.stop_after is not None and done >= args.stop_after)

        done = train(learners, data, settings, start, stopped, on_step, on_eval)
    if done < settings.steps:
        save_checkpoint(checkpoint, learners, done, saved_options(args))
        console.print(f"stopped after step {done}; the same command with --resume goes on")
        return 130
    if not ranks.main:
        return 0
    outcome = results(saved_options(args), learners, macs)
    show(console, outcome, text=args.text is not None)
    (args.out / "results.json").write_text(json.dumps(outcome, indent=1) + "\n")
    plot(args.out / "curves.png", learners, f"{args.text or args.data}, {args.steps} steps")
    spent = time.perf_counter() - begin
    console.print(f"{spent:.0f} s; wrote results.json and curves.png to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
