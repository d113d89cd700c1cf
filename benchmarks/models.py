"""One training step of whole models, dense against pixelfly, eager and compiled, in one run.

    python benchmarks/models.py                       # every model, both modes
    python benchmarks/models.py --models vit gpt2 --modes compile --profile

A step is forward, backward and fused AdamW under bf16 autocast. Dense and pixelfly models are timed
in turn in one process. Writes benchmarks/results/models_<gpu>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import re
import statistics
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timing import environment

from pixelfly import PixelflyConfig, sparsify_

Loss = Callable[[nn.Module], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its batch, and which of its linear layers the publication made sparse."""

    build: Callable[[], tuple[nn.Module, Loss, str]]
    sparse: Callable[[nn.Module, str], bool]


def vision(name: str, batch: int = 128) -> tuple[nn.Module, Loss, str]:
    import timm

    model = timm.create_model(name)
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    return model, lambda m: F.cross_entropy(m(images), labels), f"{batch} images"


def gpt2(width: int, layers: int, batch: int, length: int = 1024) -> tuple[nn.Module, Loss, str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        n_positions=length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    ids = torch.randint(0, config.vocab_size, (batch, length), device="cuda")
    model = GPT2LMHeadModel(config)
    return model, lambda m: m(input_ids=ids, labels=ids).loss, f"{batch} x {length} tokens"


class Stack(nn.Module):
    """GPT-style blocks alone (no embedding, no head): what a wider model spends its time on."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from transformers import GPT2Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        config = GPT2Config(
            n_embd=width,
            n_layer=layers,
            n_head=width // 128,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
        self.h = nn.ModuleList(GPT2Block(config, layer_idx=i) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


def stack(width: int, layers: int, batch: int, length: int = 1024) -> tuple[nn.Module, Loss, str]:
    x = torch.randn(batch, length, width, device="cuda")
    return (
        Stack(width, layers),
        lambda m: m(x).float().square().mean(),
        f"{batch} x {length} tokens",
    )


def vit_layers(module: nn.Module, name: str) -> bool:
    return name.endswith(("mlp.fc1", "mlp.fc2", "attn.qkv"))


def mixer_layers(module: nn.Module, name: str) -> bool:
    return name.endswith(("mlp_channels.fc1", "mlp_channels.fc2"))


def gpt2_layers(module: nn.Module, name: str) -> bool:
    return name.endswith(("mlp.c_fc", "mlp.c_proj"))


def block_layers(module: nn.Module, name: str) -> bool:
    return name.endswith(("c_fc", "c_proj", "c_attn"))


WORKLOADS = {
    "vit": Workload(lambda: vision("vit_base_patch16_224"), vit_layers),
    "mixer": Workload(lambda: vision("mixer_b16_224"), mixer_layers),
    "gpt2": Workload(lambda: gpt2(1024, 24, batch=8), gpt2_layers),
    "stack2048": Workload(lambda: stack(2048, 8, batch=8), block_layers),
    "stack4096": Workload(lambda: stack(4096, 4, batch=8), block_layers),
}


def step_times(model: nn.Module, loss: Loss, steps: int, profile: bool) -> dict:
    """Runs training steps: median step time, peak memory and, if asked, where the time went."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        step()
        marks[i + 1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    out = {
        "ms": statistics.median(times),
        "mem_gb": torch.cuda.max_memory_allocated() / 2**30,
        "params": sum(p.numel() for p in model.parameters()),
    }
    if profile:
        out["profile_ms"] = split(step)
    return out


def split(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by kind of kernel."""
    kinds = {
        "pixelfly": ("pixelfly",),
        "gemm": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas"),
        "attention": ("flash", "fmha", "attention", "mha"),
        "optimizer": ("adam", "multi_tensor"),
        "pointwise": ("triton", "elementwise", "layer_norm", "reduce", "copy", "cat"),
    }
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in profiler.key_averages():
        key = event.key.lower()
        if event.self_device_time_total <= 0:
            continue
        kind = next((k for k, words in kinds.items() if any(w in key for w in words)), "other")
        total[kind] = total.get(kind, 0.0) + event.self_device_time_total / 1e3
    return total


def run(name: str, form: str, mode: str, args: argparse.Namespace) -> dict:
    """Step time of one model in one form: dense, or pixelfly's blocks | factored | global."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    model, loss, batch = workload.build()
    if form != "dense":
        rank = 0 if form == "blocks" else args.rank
        lowrank = "global" if form == "global" else "factored"
        config = PixelflyConfig(
            density=args.density, block_size=args.block_size, rank=rank, lowrank=lowrank
        )
        sparsify_(model, config, workload.sparse)
    model = model.cuda().train()
    if mode == "compile":
        torch._dynamo.reset()
        model = torch.compile(model)
    try:
        return step_times(model, loss, args.steps, args.profile) | {"batch": batch}
    finally:
        del model, loss
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--modes", nargs="*", default=["eager", "compile"])
    parser.add_argument("--forms", nargs="*", default=["blocks", "factored", "global"])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/models.py needs a CUDA device; torch sees none")
    meta, records = environment(), []
    print(meta, flush=True)
    for name in args.models:
        for mode in args.modes:
            dense = run(name, "dense", mode, args)
            for form in args.forms:
                ours = run(name, form, mode, args)
                records.append(
                    {
                        "model": name,
                        "mode": mode,
                        "form": form,
                        "batch": dense["batch"],
                        "density": args.density,
                        "dense_ms": dense["ms"],
                        "ours_ms": ours["ms"],
                        "ratio": dense["ms"] / ours["ms"],
                        "dense_params": dense["params"],
                        "ours_params": ours["params"],
                        "dense_mem_gb": dense["mem_gb"],
                        "ours_mem_gb": ours["mem_gb"],
                        "dense_profile_ms": dense.get("profile_ms"),
                        "ours_profile_ms": ours.get("profile_ms"),
                    }
                )
                print(json.dumps(records[-1]), flush=True)
    gpu = re.sub(r"[^a-z0-9]+", "_", meta["device"].lower().removeprefix("nvidia ")).split("_")[0]
    out = args.out or pathlib.Path(__file__).parent / "results" / f"models_{gpu}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
