"""Operator benchmark: dense, peers, the roofline floor and pixelfly, in one run.

    python benchmarks/op.py                                # every study (benchmarks/cases.py)
    python benchmarks/op.py --studies table epilogue
    python benchmarks/op.py --shapes 16384x1024x4096 --kinds blocks --directions forward dx
    python benchmarks/op.py --device cpu --shapes 512x4096x4096 --max-stride 64 --dtype float32

Writes benchmarks/results/op_<device>.json after every shape; `python benchmarks/report.py` turns it
into tables, `python benchmarks/op_plots.py` into plots.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib

import torch
import torch.nn.functional as F
from cases import DIRECTIONS, KINDS, STUDIES, Case, Group
from peers import forward_peers
from timing import Timing, environment, num_buffer_sets, results_path, time_all

from pixelfly.ops import butterfly_lowrank_mm, butterfly_lowrank_mm_reference

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


class Layer:
    """The weights of one candidate, dense or pixelfly."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, dense: bool) -> None:
        k, n, r = case.in_features, case.out_features, case.factored_rank
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, device=device, dtype=dtype, generator=generator)
            return (values * scale).requires_grad_()

        self.case, self.dense, self.bias = case, dense, normal(n)
        if dense:
            self.weights = (normal(n, k, scale=k**-0.5),)
            return
        self.layout = case.layout()
        b = case.block_size
        kept_per_row = self.layout.nnz / self.layout.grid.shape[0] * b
        blocks = normal(self.layout.nnz, b, b, scale=kept_per_row**-0.5)
        factors = (normal(n, r, scale=r**-0.5), normal(r, k, scale=k**-0.5)) if r else ()
        self.weights = (blocks, *factors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dense:
            factors = self.weights[1:] or (None, None)
            return butterfly_lowrank_mm(
                x,
                self.weights[0],
                self.layout,
                *factors,
                self.bias,
                activation=self.case.activation,
            )
        y = F.linear(x, self.weights[0], self.bias)
        return y if self.case.activation is None else ACTIVATIONS[self.case.activation](y)

    def wanting(self, direction: str) -> Layer:
        """This layer with gradients switched on for what a direction asks for, and off elsewhere.

        The operator computes what requires a gradient, so asking for a subset is not enough.
        """
        other = copy.copy(self)
        wanted = direction != "dx"
        other.weights = tuple(w.detach().requires_grad_(wanted) for w in self.weights)
        other.bias = self.bias.detach().requires_grad_(wanted)
        return other

    def inputs(self, x: torch.Tensor, direction: str) -> tuple[torch.Tensor, ...]:
        """The tensors whose gradients a direction asks for."""
        if direction == "dx":
            return (x,)
        return (*self.weights, self.bias) if direction == "dw" else (x, *self.weights, self.bias)


@torch.no_grad()
def error_ratio(layer: Layer, x: torch.Tensor) -> float:
    """RMS error of the operator / RMS error of torch in x's dtype, both against a wider dtype."""
    x = x[:2048]
    factors = layer.weights[1:] or (None, None)
    operands = (x, layer.weights[0], *factors, layer.bias)
    wide_dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    wide = [None if t is None else t.to(wide_dtype) for t in operands]

    def reference(x, blocks, u, v, bias):
        return butterfly_lowrank_mm_reference(
            x, blocks, layer.layout, u, v, bias, activation=layer.case.activation
        ).to(wide_dtype)

    exact = reference(*wide)
    ours = (layer(x).to(wide_dtype) - exact).square().mean().sqrt()
    torchs = (reference(*operands) - exact).square().mean().sqrt()
    return (ours / torchs).item() if torchs > 0 else float("nan")


def compiled_dense(layer: Layer):
    """The same dense layer and epilogue through torch.compile."""
    case = layer.case

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return y if case.activation is None else ACTIVATIONS[case.activation](y)

    compiled = torch.compile(run, fullgraph=True)
    return lambda x: compiled(x, layer.weights[0], layer.bias)


def candidate(layer: Layer, call, xs, dys, direction: str):
    """A callable of the buffer-set index that runs one direction of a layer.

    `call` makes the function to time from a layer (the layer itself, or a compiled version).
    """
    layer = layer.wanting(direction)
    call = call(layer)
    if direction == "forward":

        def forward(i: int) -> torch.Tensor:
            with torch.no_grad():
                return call(xs[i])

        return forward
    if direction == "forward_backward":
        return lambda i: torch.autograd.grad(call(xs[i]), layer.inputs(xs[i], direction), dys[i])
    graphs: dict[int, torch.Tensor] = {}
    inputs = [x.detach().requires_grad_(direction == "dx") for x in xs]

    def backward(i: int):
        if i not in graphs:
            graphs[i] = call(inputs[i])
        wanted = layer.inputs(inputs[i], direction)
        return torch.autograd.grad(graphs[i], wanted, dys[i], retain_graph=True)

    return backward


def run_group(group: Group, dtype: torch.dtype, device: str, rounds: int) -> list[dict]:
    """Times every case of a group against dense, direction by direction."""
    first = group.cases[0]
    t, k, n = first.tokens, first.in_features, first.out_features
    sets = num_buffer_sets(dtype.itemsize * t * (k + n))
    make = {"device": device, "dtype": dtype}
    xs = [torch.randn(t, k, requires_grad=True, **make) for _ in range(sets)]
    dys = [torch.randn(t, n, **make) for _ in range(sets)]
    dense = Layer(first, dtype, device, dense=True)
    layers = {case: Layer(case, dtype, device, dense=False) for case in group.cases}
    errors = {c: error_ratio(layers[c], xs[0]) if group.accuracy else None for c in layers}
    records = []
    for direction in group.directions:
        runs = {"dense": candidate(dense, lambda layer: layer, xs, dys, direction)}
        if first.activation or group.peers:
            runs["dense_compiled"] = candidate(dense, compiled_dense, xs, dys, direction)
        for case, layer in layers.items():
            runs[case.kind] = candidate(layer, lambda layer: layer, xs, dys, direction)
        if group.peers and direction == "forward":
            runs |= forward_peers(first, dtype, device, xs)
        timings = time_all(runs, sets, rounds=rounds, device=device)
        for case in group.cases:
            entry = record(group.study, case, direction, dtype, timings, device)
            if direction == "forward" and errors[case] is not None:
                entry["error_ratio"] = errors[case]
            records.append(entry)
            print(row(entry), flush=True)
    return records


def record(study: str, case: Case, direction: str, dtype, timings: dict, device: str) -> dict:
    ours, dense = timings[case.kind], timings["dense"]
    floor = case.floor_ms(direction) if device == "cuda" else None
    ok = isinstance(ours, Timing) and isinstance(dense, Timing)
    peers = {name: t for name, t in timings.items() if name != "dense" and name not in KINDS}
    return {
        "study": study,
        "T": case.tokens,
        "K": case.in_features,
        "N": case.out_features,
        "block_size": case.block_size,
        "max_stride": case.max_stride,
        "kind": case.kind,
        "rank": case.rank if case.kind != "blocks" else 0,
        "density": case.density,
        "epilogue": "bias" + (f"+{case.activation}" if case.activation else ""),
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "dense_ms": dense.median if isinstance(dense, Timing) else None,
        "ours_ms": ours.median if isinstance(ours, Timing) else None,
        "floor_ms": floor,
        "ratio": dense.median / ours.median if ok else None,
        "floor_fraction": floor / ours.median if floor and isinstance(ours, Timing) else None,
        "spread": {k: v.as_dict() for k, v in timings.items() if isinstance(v, Timing)},
        "peers": {k: t.median if isinstance(t, Timing) else t for k, t in peers.items()},
        "error": None if ok else f"ours: {ours}; dense: {dense}",
    }


def row(r: dict) -> str:
    name = f"{r['T']:6d} {r['K']:5d}->{r['N']:5d} b{r['block_size']:<3d} {r['density']:4.0%} "
    name += f"{r['kind']:9s} {r['direction']:17s}"
    if r["error"]:
        return f"{name} {r['error']}"
    floor = f"floor {r['floor_ms']:.4f} ({100 * r['floor_fraction']:.0f}%)" if r["floor_ms"] else ""
    peers = "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} -" for k, v in r["peers"].items()
    )
    return (
        f"{name} dense {r['dense_ms']:.4f}  ours {r['ours_ms']:.4f}  x{r['ratio']:.2f}  "
        f"{floor}  {peers}"
    )


def groups_of(args: argparse.Namespace) -> list[Group]:
    """The groups the command line asks for: named studies, or shapes of the caller's own."""
    if not args.shapes:
        return [group for name in args.studies for group in STUDIES[name]()]
    options = {
        "block_size": args.block_size,
        "max_stride": args.max_stride,
        "rank": args.rank,
        "activation": args.activation,
    }
    return [
        Group(
            "own",
            tuple(Case(*map(int, shape.split("x")), kind=kind, **options) for kind in args.kinds),
            tuple(args.directions),
            peers=args.peers,
            accuracy=True,
        )
        for shape in args.shapes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    add("--shapes", nargs="*", help="TxKxN instead of studies; the next seven options go with it")
    add("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    add("--directions", nargs="*", default=list(DIRECTIONS), choices=DIRECTIONS)
    add("--block-size", type=int, default=64)
    add("--max-stride", type=int, default=None)
    add("--rank", type=int, default=64)
    add("--activation", choices=sorted(ACTIVATIONS), default=None)
    add("--peers", action="store_true", help="also time peers (slower)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--rounds", type=int, default=9)
    add("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/op.py: torch sees no CUDA device; use --device cpu")
    meta = environment(args.device)
    print(meta, flush=True)
    out = args.out or results_path("op", meta["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    for group in groups_of(args):
        records += run_group(group, getattr(torch, args.dtype), args.device, args.rounds)
        out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
