"""Runs every kernel once on small ragged shapes, for compute-sanitizer; checks the results too.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

Without torch's caching allocator every tensor is an allocation of its own, so that reads past the
end and of uninitialised memory are seen. Prints "sanitize: N calls" and exits with 1 on a mismatch.
racecheck is slow: give it a part of the calls, as in --paths sm90 --dtypes bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys

import torch

from pixelfly import masks
from pixelfly.nn import TokenMLP
from pixelfly.ops import (
    Weights,
    add_layer_norm,
    butterfly_lowrank_mm,
    butterfly_lowrank_mm_reference,
    butterfly_qkv,
    linear_cross_entropy,
    short_attention,
)

N, K = 200, 328
WIDE = 2568  # more groups of 16 outputs than a GPU has multiprocessors; a wide contraction of dx
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}  # of the largest value


def operands(n: int, block_size: int, dtype: torch.dtype, tokens: int, rank: int) -> dict:
    """A ragged layout with dense rows, and tensors that want gradients."""
    pattern = {"block_size": block_size}
    layout = masks.flat_block_butterfly(n, K, **pattern) | masks.global_(
        n, K, width=block_size, **pattern
    )

    def normal(*shape: int, scale: float) -> torch.Tensor:
        values = torch.randn(*shape, device="cuda") * scale
        return values.to(dtype).requires_grad_()

    return {
        "x": normal(tokens, K, scale=1),
        "blocks": normal(layout.nnz, block_size, block_size, scale=K**-0.5),
        "layout": layout,
        "u": normal(n, rank, scale=max(rank, 1) ** -0.5) if rank else None,
        "v": normal(rank, K, scale=K**-0.5) if rank else None,
        "bias": normal(n, scale=1),
    }


def on_cpu(value):
    return value.detach().cpu().requires_grad_() if isinstance(value, torch.Tensor) else value


def gradients(operator, call: dict, dy: torch.Tensor, **options) -> list[torch.Tensor]:
    tensors = [t for t in call.values() if isinstance(t, torch.Tensor)]
    y = operator(**call, **options)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def differs(name: str, ours: list[torch.Tensor], exact: list[torch.Tensor], dtype) -> int:
    """Prints and counts the outputs that differ."""
    wrong = 0
    for i, (a, e) in enumerate(zip(ours, exact, strict=True)):
        error = (a.cpu().float() - e.float()).abs().max() / e.float().abs().max()
        if not error <= TOLERANCE[dtype]:
            wrong += 1
            print(f"{name} output {i}: {error:.2e}")
    return wrong


def layer_norm_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs add_layer_norm on every size of kernel; returns the calls and the wrong outputs."""
    calls = wrong = 0
    for stream, branch, tokens, features in itertools.product(
        {torch.float32, *dtypes}, dtypes, (1, 37), (8, 760, 1000, 2040, 4096, 6000, 16384)
    ):
        if stream != torch.float32 and stream != branch:
            continue
        for delta in (True, False):
            shapes = ((tokens, features), (tokens, features), (features,), (features,))
            kinds = (stream, branch, torch.float32, torch.float32)
            tensors = [
                torch.randn(s, device="cuda").to(k).requires_grad_()
                for s, k in zip(shapes, kinds, strict=True)
            ]
            dh, dy = torch.randn(2, tokens, features).to(stream).unbind()

            def results(x, branch_values, *weights, delta=delta, branch=branch, dh=dh, dy=dy):
                leaves = [x, *weights] + [branch_values] * delta
                outputs = add_layer_norm(
                    x, branch_values if delta else None, *weights, dtype=branch
                )
                up = (dy.to(x.device, branch), dh.to(x.device))
                return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, up)]

            calls += 1
            name = f"layer norm {stream} {branch} T={tokens} C={features} delta={delta}"
            exact = results(*map(on_cpu, tensors))
            wrong += differs(name, results(*tensors), exact, branch)
    return calls, wrong


def token_mlp_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs TokenMLP where column_product serves it; returns the calls and the wrong outputs."""
    calls = wrong = 0
    for dtype, (tokens, hidden, channels), activation in itertools.product(
        [d for d in dtypes if d != torch.float32],
        ((196, 384, 144), (20, 40, 16), (70, 130, 272)),
        (None, "gelu"),
    ):
        mlp = TokenMLP(tokens, hidden, activation=activation).to(dtype)
        x, dy = torch.randn(2, 3, tokens, channels).to(dtype).unbind()
        results = []
        for device in ("cuda", "cpu"):
            mlp.to(device)
            leaf = x.to(device).requires_grad_()
            y = mlp(leaf)
            grads = torch.autograd.grad(y, [leaf, *mlp.parameters()], dy.to(device))
            results.append([y.detach(), *grads])
        calls += 1
        wrong += differs(f"token MLP {dtype} {tokens} {hidden} {activation}", *results, dtype)
    return calls, wrong


def qkv_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs butterfly_qkv, whose backward reads three gradients; returns calls, wrong outputs."""
    calls = wrong = 0
    for dtype, b, rank in itertools.product(
        [d for d in dtypes if d != torch.float32], (32, 64, 128), (0, 16)
    ):
        layout = masks.flat_block_butterfly(384, 128, block_size=b)
        shapes = ((layout.nnz, b, b), (384, rank), (rank, 128), (384,), (2, 140, 128))
        *tensors, x = (torch.randn(s).div_(8).to(dtype) for s in shapes)
        dys = [torch.randn(2, 140, 2, 64).to(dtype) for _ in range(3)]
        results = []
        for device in ("cuda", "cpu"):
            blocks, u, v, bias = (t.to(device).requires_grad_() for t in tensors)
            leaf = x.to(device).requires_grad_()
            low_rank = (u, v) if rank else (None, None)
            outputs = butterfly_qkv(leaf, Weights(blocks, layout, *low_rank, bias), 2)
            leaves = [leaf, blocks, bias] + [u, v] * bool(rank)
            up = [dy.to(device).transpose(1, 2) for dy in dys]
            results.append(
                [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, up)]
            )
        calls += 1
        wrong += differs(f"qkv {dtype} b={b} r={rank}", *results, dtype)
    return calls, wrong


def larger_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs what layers as small as the others lack: plans with rows alone, weights in registers,
    dense rows that clusters share, t by 128 tokens a thread block, and all rows at once; returns
    the calls and the wrong outputs."""
    calls = wrong = 0
    sizes = (
        ("sm90", 1024, 1024, 300, 16),
        ("sm90", 512, 2048, 600, 8),
        ("split", 1536, 1536, 200, 0),
        ("sm90", 256, 256, 12900, 72),
        ("all_rows", 384, 768, 700, 64),
        ("all_rows", 832, 256, 300, 0),
    )
    for dtype, (path, n, k, tokens, rank) in itertools.product(
        [d for d in dtypes if d != torch.float32], sizes
    ):
        os.environ["PIXELFLY_KERNEL"] = path
        layout = masks.flat_block_butterfly(n, k, block_size=64)
        if path == "split":
            layout |= masks.global_(n, k, block_size=64)
        shapes = ((layout.nnz, 64, 64), (n, rank), (rank, k), (n,), (tokens, k), (tokens, n))
        *tensors, x, dy = (torch.randn(s).div_(8).to(dtype) for s in shapes)
        results = []
        for device in ("cuda", "cpu"):
            blocks, u, v, bias, leaf = (t.to(device).requires_grad_() for t in (*tensors, x))
            low_rank = (u, v) if rank else (None, None)
            y = butterfly_lowrank_mm(leaf, blocks, layout, *low_rank, bias)
            leaves = [leaf, blocks, bias] + [u, v] * bool(rank)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(device))])
        calls += 1
        wrong += differs(f"{path} {dtype} {k}->{n} T={tokens} r={rank}", *results, dtype)
    os.environ["PIXELFLY_KERNEL"] = "auto"
    return calls, wrong


def attention_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs short_attention where its kernels serve it; returns the calls and the wrong outputs."""
    calls = wrong = 0
    for dtype, (batch, tokens, heads) in itertools.product(
        [d for d in dtypes if d != torch.float32], ((2, 7, 1), (1, 197, 2), (3, 50, 2))
    ):
        qkv = torch.randn(batch, tokens, 3 * heads * 64).to(dtype)
        dy = torch.randn(batch, tokens, heads * 64).to(dtype)
        results = []
        for device in ("cuda", "cpu"):
            leaf = qkv.to(device).requires_grad_()
            y = short_attention(leaf, heads)
            (dqkv,) = torch.autograd.grad(y, leaf, dy.to(device))
            results.append([y.detach(), *dqkv.chunk(3, 2)])
        calls += 1
        wrong += differs(f"attention {dtype} B={batch} T={tokens} H={heads}", *results, dtype)
    return calls, wrong


def loss_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs linear_cross_entropy, rows kept and read twice; returns the calls and wrong outputs."""
    calls = wrong = 0
    for dtype, (tokens, classes) in itertools.product(
        [d for d in dtypes if d != torch.float32], ((1, 3), (9, 200), (5, 4099), (3, 120001))
    ):
        x, weight = (torch.randn(n, 16).to(dtype) for n in (tokens, classes))
        target = torch.randint(0, classes, (tokens,))
        target[1::3] = -100
        results = []
        for device in ("cuda", "cpu"):
            leaves = [t.to(device).requires_grad_() for t in (x, weight)]
            loss = linear_cross_entropy(*leaves, target.to(device), reduction="sum")
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        calls += 1
        wrong += differs(f"loss {dtype} T={tokens} V={classes}", *results, dtype)
    return calls, wrong


def rounding_calls(dtypes: list[torch.dtype]) -> tuple[int, int]:
    """Runs round_weights, flat and tiled; returns the calls and the wrong outputs."""
    calls = wrong = 0
    for dtype, tile in itertools.product([d for d in dtypes if d != torch.float32], (0, 16, 64)):
        for source, offset in ((torch.float32, 0), (torch.float32, 1), (dtype, 0), (dtype, 1)):
            shapes = ((200, 328), (3, 64, 64), (37,), (8,), (70, 130))
            flat = [torch.randn(offset + math.prod(s), device="cuda").to(source) for s in shapes]
            weights = [w[offset:].view(s) for w, s in zip(flat, shapes, strict=True)]
            # The operator itself: where nothing is to be rounded round_weights passes weights on.
            ours = torch.ops.pixelfly.round_weights(weights, dtype, tile)
            exact = torch.ops.pixelfly.round_weights([w.cpu() for w in weights], dtype, tile)
            calls += 1
            wrong += differs(f"round_weights {source} {dtype} tile={tile}", ours, exact, dtype)
    return calls, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--paths", nargs="*", default=["sm80", "auto", "few", "split", "all_rows", "sm90"]
    )
    parts = ["linear", "larger", "layer-norm", "token-mlp", "qkv", "attention", "loss", "rounding"]
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--block-sizes", nargs="*", type=int, default=[16, 32, 64, 128])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tests/sanitize.py needs a CUDA device; torch sees none")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    calls = wrong = 0
    runs = {
        "layer-norm": layer_norm_calls,
        "token-mlp": token_mlp_calls,
        "qkv": qkv_calls,
        "larger": larger_calls,
        "attention": attention_calls,
        "loss": loss_calls,
        "rounding": rounding_calls,
    }
    for part, run in runs.items():
        if part in args.parts:
            more = run(dtypes)
            calls, wrong = calls + more[0], wrong + more[1]
    for path in args.paths if "linear" in args.parts else []:
        os.environ["PIXELFLY_KERNEL"] = path
        sizes = ((N, 7, 16, None), (N, 300, 0, "gelu"), (N, 257, 64, "silu"))
        if path == "few":
            sizes = ((N, 7, 16, None), (N, 30, 40, "gelu"), (N, 63, 0, "silu"))
            sizes += ((N, 150, 16, "gelu"), (WIDE, 30, 0, "gelu"), (WIDE, 63, 40, None))
        if path == "split":
            sizes += ((WIDE, 130, 40, "gelu"),)  # dx by clusters
        for dtype, b, (n, tokens, rank, activation) in itertools.product(
            dtypes, args.block_sizes, sizes
        ):
            call = operands(n, b, dtype, tokens, rank)
            dy = torch.randn(tokens, n, device="cuda").to(dtype)
            try:
                ours = gradients(butterfly_lowrank_mm, call, dy, activation=activation)
            except RuntimeError as error:
                if "cannot serve" in str(error):
                    continue  # this path does not cover the case; another one does
                raise
            calls += 1
            # On the CPU: the tools are to watch our kernels, not cuBLAS.
            host = {name: on_cpu(value) for name, value in call.items()}
            exact = gradients(butterfly_lowrank_mm_reference, host, dy.cpu(), activation=activation)
            wrong += differs(f"{path} {dtype} b={b} N={n} T={tokens} r={rank}", ours, exact, dtype)
    torch.cuda.synchronize()
    print(f"sanitize: {calls} calls, {wrong} outputs wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
