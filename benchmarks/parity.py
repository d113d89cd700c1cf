"""Does speed change the maths? One pixelfly model trained three times on the same real data.

    python benchmarks/parity.py                       # digits, a small Mixer, any CPU
    python benchmarks/parity.py --data fashion-mnist --width 512 --block-size 64 --amp

From one initialisation and with the same batches: with the kernels; with the dense reference
operator in the same dtype; with the reference in float32. The distance between the two references
is what rounding alone does, so it is the measure for the distance between kernels and reference.
Exits with 1 if the kernels are more than twice as far away. Takes the options of train.py.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from unittest import mock

import torch
from data import DataMissing, load
from display import print_table, progress_bar
from networks import build, sparsify
from timing import environment
from train import parse, settings_of
from training import Learner, Settings, batch_at

from pixelfly.nn import linear
from pixelfly.ops import butterfly_lowrank_mm_reference

LAST = 20  # steps the final losses are averaged over


class ReferenceLearner(Learner):
    """Trains the same modules with the dense reference in place of the operator."""

    exact = False  # in float32, whatever --amp says

    def _autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.exact else super()._autocast()

    def step(self, x: torch.Tensor, y: torch.Tensor, step: int) -> float:
        with mock.patch.object(linear, "butterfly_lowrank_mm", butterfly_lowrank_mm_reference):
            return super().step(x, y, step)


def make_learner(name: str, args, data, settings: Settings) -> Learner:
    """A freshly built and converted model; the seed makes all of them equal."""
    model = build(args, data.shape, data.classes)
    sparsify(model, args)
    kind = Learner if name == "kernels" else ReferenceLearner
    learner = kind(name, model, settings)
    if name == "reference float32":
        learner.exact = True
    return learner


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square difference of two loss curves."""
    return statistics.fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not any(option.startswith("--steps") for option in argv):
        argv = [*argv, "--steps", "200"]
    args = parse(argv)
    try:
        data = load(args.data, args.text, args.data_dir, args.image_size, args.length)
    except DataMissing as missing:
        raise SystemExit(str(missing)) from None
    settings = settings_of(args)
    torch.backends.cuda.matmul.allow_tf32 = False
    names = ("kernels", "reference", "reference float32")
    learners = [make_learner(name, args, data, settings) for name in names]
    curves: dict[str, list[float]] = {name: [] for name in names}
    with progress_bar() as progress:
        bar = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            x, y = batch_at(data, settings, step)
            for learner in learners:
                curves[learner.name].append(learner.step(x, y, step))
            progress.update(bar, completed=step + 1, description="training")
    console = progress.console
    rows = [[name, f"{statistics.fmean(c[-LAST:]):.4f}"] for name, c in curves.items()]
    print_table(console, f"train loss, mean of the last {LAST} steps", ["run", "loss"], rows)
    ours = distance(curves["kernels"], curves["reference"])
    noise = distance(curves["reference"], curves["reference float32"])
    console.print(f"kernels to reference {ours:.2e}, reference to float32 {noise:.2e} (RMS)")
    args.out.mkdir(parents=True, exist_ok=True)
    options = ("data", "model", "width", "block_size", "steps", "amp")
    meta = environment(args.device) | {name: getattr(args, name) for name in options}
    outcome = {"meta": meta}
    outcome |= {"kernels_to_reference": ours, "reference_to_float32": noise, "curves": curves}
    (args.out / "parity.json").write_text(json.dumps(outcome, indent=1) + "\n")
    # In float32 both references are one: what is left is the order of sums.
    return 0 if ours <= 2 * max(noise, 1e-3) else 1


if __name__ == "__main__":
    raise SystemExit(main())
