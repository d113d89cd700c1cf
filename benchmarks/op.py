"""Operator benchmark: dense, peers, the roofline floor and pixelfly, in one run.

    python benchmarks/op.py                     # the shapes of the README table
    python benchmarks/op.py --shapes 16384x1024x4096 --kinds blocks --peers

Writes benchmarks/results/op_<gpu>.json; `python benchmarks/report.py` turns it into tables.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pathlib
import re

import torch
import torch.nn.functional as F
from timing import Timing, environment, num_buffer_sets, time_all

from pixelfly import masks
from pixelfly.ops import butterfly_lowrank_mm

# Measured ceilings of an H100 SXM, see csrc/README.md: the roofline floor is stated against these.
PEAK_FLOPS = 790e12
PEAK_BYTES = 3.0e12

# T x K x N: ViT/Mixer-B (batch 128), GPT-2 medium widths, and wider.
SHAPES = [
    (25216, 768, 768),
    (25216, 768, 3072),
    (25216, 3072, 768),
    (16384, 1024, 1024),
    (16384, 1024, 4096),
    (16384, 4096, 1024),
    (16384, 2048, 8192),
    (16384, 4096, 4096),
    (8192, 8192, 8192),
]
KINDS = ("blocks", "factored", "global")
DIRECTIONS = ("forward", "dx", "dw", "forward_backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One pixelfly layer to time: a shape, a pattern and its low-rank form."""

    tokens: int
    in_features: int
    out_features: int
    block_size: int
    max_stride: int | None
    kind: str  # blocks | factored | global
    rank: int
    activation: str | None = None

    def layout(self) -> masks.BlockLayout:
        layout = masks.flat_block_butterfly(
            self.out_features,
            self.in_features,
            block_size=self.block_size,
            max_stride=self.max_stride,
        )
        if self.kind == "global":
            layout = layout | masks.global_(
                self.out_features, self.in_features, block_size=self.block_size, width=self.rank
            )
        return layout

    @property
    def factored_rank(self) -> int:
        return self.rank if self.kind == "factored" else 0

    def floor_ms(self, direction: str) -> float:
        """Roofline floor: the larger of the FLOP time and the bytes-touched-once time."""
        t, k, n, r = self.tokens, self.in_features, self.out_features, self.factored_rank
        kept = self.layout().nnz * self.block_size**2
        flops = 2.0 * t * (kept + r * (k + n))
        weights = 2.0 * (kept + r * (k + n))
        extra = 2.0 * t * n if self.activation else 0.0  # the pre-activation: written, then read
        one_pass = max(flops / PEAK_FLOPS, (2.0 * t * (k + n) + weights + extra) / PEAK_BYTES)
        passes = 3 if direction == "forward_backward" else 1
        return 1e3 * passes * one_pass


class Layer:
    """The weights of one candidate, dense or pixelfly."""

    def __init__(self, case: Case, dtype: torch.dtype, dense: bool) -> None:
        k, n, r = case.in_features, case.out_features, case.factored_rank
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)
            return (values * scale).requires_grad_()

        self.case = case
        self.bias = normal(n)
        if dense:
            self.weights = (normal(n, k, scale=k**-0.5),)
        else:
            self.layout = case.layout()
            kept_per_row = self.layout.nnz / self.layout.grid.shape[0] * case.block_size
            blocks = normal(
                self.layout.nnz, case.block_size, case.block_size, scale=kept_per_row**-0.5
            )
            factors = (normal(n, r, scale=r**-0.5), normal(r, k, scale=k**-0.5)) if r else ()
            self.weights = (blocks, *factors)
        self.dense = dense

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dense:
            return butterfly_lowrank_mm(
                x,
                self.weights[0],
                self.layout,
                *(self.weights[1:] or (None, None)),
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


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def compiled_dense(layer: Layer):
    """The same dense layer and epilogue through torch.compile."""
    case = layer.case

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return y if case.activation is None else ACTIVATIONS[case.activation](y)

    compiled = torch.compile(run, fullgraph=True)
    return lambda x: compiled(x, layer.weights[0], layer.bias)


def forward_peers(case: Case, dtype: torch.dtype, xs: list[torch.Tensor]) -> dict:
    """Other people's block-sparse forward on the same pattern (no low rank, no bias)."""
    layout = case.layout()
    mask = layout.to_dense().to("cuda")
    weight = torch.randn(mask.shape, device="cuda", dtype=dtype) * mask
    size = case.block_size
    peers = {}

    bsr = weight.to_sparse_bsr((size, size))
    peers["torch_bsr"] = lambda i: F.linear(xs[i], bsr)

    rows, cols = layout.grid.shape
    index = [layout.grid[r].nonzero().flatten() for r in range(rows)]
    if len({len(c) for c in index}) == 1:
        columns = torch.stack(index).to("cuda")
        packed = torch.randn(rows, columns.shape[1] * size, size, device="cuda", dtype=dtype)

        def gather_bmm(i: int) -> torch.Tensor:
            tiles = xs[i].view(-1, cols, size)[:, columns]  # [T, rows, per row, b]
            return torch.bmm(tiles.flatten(2).transpose(0, 1), packed)

        peers["gather_bmm"] = gather_bmm
    try:
        import stk

        if size == 128:
            sparse = stk.ops.to_sparse(weight, 128)
            peers["stk"] = lambda i: stk.ops.dds(xs[i], sparse.t())
    except ImportError:
        pass
    return peers


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


def run_shape(shape, args, dtype) -> list[dict]:
    tokens, k, n = shape
    size = 2 * tokens * (k + n)
    sets = num_buffer_sets(size)
    xs = [
        torch.randn(tokens, k, device="cuda", dtype=dtype, requires_grad=True) for _ in range(sets)
    ]
    dys = [torch.randn(tokens, n, device="cuda", dtype=dtype) for _ in range(sets)]
    cases = [
        Case(tokens, k, n, args.block_size, args.max_stride, kind, args.rank, args.activation)
        for kind in args.kinds
    ]
    dense = Layer(cases[0], dtype, dense=True)
    layers = {case.kind: Layer(case, dtype, dense=False) for case in cases}
    records = []
    for direction in args.directions:
        runs = {"dense": candidate(dense, lambda layer: layer, xs, dys, direction)}
        if args.activation or args.peers:
            runs["dense_compiled"] = candidate(dense, compiled_dense, xs, dys, direction)
        for kind, layer in layers.items():
            runs[kind] = candidate(layer, lambda layer: layer, xs, dys, direction)
        peers = forward_peers(cases[0], dtype, xs) if args.peers and direction == "forward" else {}
        timings = time_all(runs | peers, sets, rounds=args.rounds)
        for case in cases:
            records.append(record(case, direction, dtype, timings, peers))
            print(row(records[-1]), flush=True)
    return records


def record(case: Case, direction: str, dtype, timings: dict, peers: dict) -> dict:
    ours, dense = timings[case.kind], timings["dense"]
    floor = case.floor_ms(direction)
    ok = isinstance(ours, Timing) and isinstance(dense, Timing)
    layout = case.layout()
    return {
        "T": case.tokens,
        "K": case.in_features,
        "N": case.out_features,
        "block_size": case.block_size,
        "max_stride": case.max_stride,
        "kind": case.kind,
        "rank": case.rank if case.kind != "blocks" else 0,
        "density": layout.density
        + case.factored_rank
        * (case.in_features + case.out_features)
        / (case.in_features * case.out_features),
        "epilogue": "bias" + (f"+{case.activation}" if case.activation else ""),
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "dense_ms": dense.median if isinstance(dense, Timing) else None,
        "ours_ms": ours.median if isinstance(ours, Timing) else None,
        "floor_ms": floor,
        "ratio": dense.median / ours.median if ok else None,
        "floor_fraction": floor / ours.median if isinstance(ours, Timing) else None,
        "spread": {k: v.as_dict() for k, v in timings.items() if isinstance(v, Timing)},
        "peers": {
            name: t.median if isinstance(t, Timing) else t
            for name, t in timings.items()
            if name in peers or name == "dense_compiled"
        },
        "error": None if ok else f"ours: {ours}; dense: {dense}",
    }


def row(r: dict) -> str:
    name = f"{r['T']:6d} {r['K']:5d}->{r['N']:5d} {r['kind']:9s} {r['direction']:17s}"
    if r["error"]:
        return f"{name} {r['error']}"
    peers = "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} -" for k, v in r["peers"].items()
    )
    return (
        f"{name} dense {r['dense_ms']:.4f}  ours {r['ours_ms']:.4f}  x{r['ratio']:.2f}  "
        f"floor {r['floor_ms']:.4f} ({100 * r['floor_fraction']:.0f}%)  {peers}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", help="TxKxN, default: the README table")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--directions", nargs="*", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--max-stride", type=int, default=None)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default=None)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--peers", action="store_true", help="also time peers (slower)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/op.py needs a CUDA device; torch sees none")
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes or []] or SHAPES
    meta = environment()
    print(meta, flush=True)
    records = []
    for shape in shapes:
        records += run_shape(shape, args, getattr(torch, args.dtype))
        torch.cuda.empty_cache()
    gpu = re.sub(r"[^a-z0-9]+", "_", meta["device"].lower().removeprefix("nvidia ")).strip("_")
    default = pathlib.Path(__file__).parent / "results" / f"op_{gpu.split('_')[0]}.json"
    out = args.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
