"""Models of benchmarks/train.py: a small Mixer of its own, any timm model, a GPT-2."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from types import ModuleType
from unittest import mock

import torch
from torch import nn

from pixelfly import PixelflyConfig, sparsify_
from pixelfly.report import Report
from pixelfly.sparsify import PRESETS


def library(name: str, wanted_by: str) -> ModuleType:
    """Imports timm or transformers, or exits with what to do.

    Both import torchvision, which fails oddly beside another torch than its own.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise SystemExit(
            f"{wanted_by} needs {name.partition('.')[0]}, which does not import here ({error}). "
            'Run pip install ".[train]"; if torchvision is what fails, install the one built for '
            f"torch {torch.__version__}"
        ) from error


class Mlp(nn.Module):
    """Two linear layers with GELU between; named as timm names them."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(features, hidden), nn.GELU()
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MixerBlock(nn.Module):
    """Mixes tokens, then channels (MLP-Mixer, Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp_tokens, self.mlp_channels = Mlp(tokens, 2 * tokens), Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, tokens, width]
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    """A Mixer for small images: it needs no library and trains in a minute on a CPU."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, patch: int, width: int, layers: int
    ) -> None:
        super().__init__()
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.stem = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, channels, height, width]
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class GPT2(nn.Module):
    """transformers' GPT-2 over bytes, from ids to logits."""

    def __init__(self, length: int, width: int, layers: int) -> None:
        super().__init__()
        # By its full name: transformers itself imports nothing until a class is asked for.
        gpt2 = library("transformers.models.gpt2.modeling_gpt2", "--text")
        config = gpt2.GPT2Config(
            vocab_size=256,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=max(1, width // 64),
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        self.gpt2 = gpt2.GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [batch, length]
        return self.gpt2(input_ids=ids).logits


def _create(timm: ModuleType, name: str, **options: int) -> nn.Module:
    """timm.create_model; without img_size for models that know none, as convolutions take any."""
    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        if "img_size" in str(error) and "img_size" in options:
            del options["img_size"]
            return _create(timm, name, **options)
        module = sys.modules[timm.model_entrypoint(name).__module__]
        if "multiple values" not in str(error) or not hasattr(module, "MlpMixer"):
            raise
    # timm's Mixers name their patch size themselves and take no other: set it on the way.
    mixer, patch = module.MlpMixer, options.pop("patch_size")
    with mock.patch.object(module, "MlpMixer", lambda **own: mixer(**own | {"patch_size": patch})):
        return timm.create_model(name, **options)


def _timm(args: argparse.Namespace, shape: tuple[int, ...], classes: int) -> nn.Module:
    timm = library("timm", f"--model {args.model}")
    if not timm.is_model(args.model):
        names = ["mixer", *timm.list_models()]
        close = [name for name in names if name.startswith(args.model)][:5]
        close = close or difflib.get_close_matches(args.model, names, 5, cutoff=0.5)
        hint = f"near it: {', '.join(close)}" if close else "timm.list_models() returns them"
        raise SystemExit(f"--model: expected mixer or a timm name ({hint}), got {args.model}")
    options = {"in_chans": shape[0], "num_classes": classes, "img_size": shape[1]}
    if args.patch_size:
        options["patch_size"] = args.patch_size
    # What a model cannot take is known only once it is built, or even once it is run.
    try:
        model = _create(timm, args.model, **options).eval()
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except Exception as error:
        patch = args.patch_size or "not set"
        cure = "set --patch-size to a divisor of the image's side"
        if args.patch_size:
            cure = "leave --patch-size out or try another"
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(
            f"--model {args.model} does not work on images of {shape[1]}x{shape[2]} with "
            f"--patch-size {patch} ({type(error).__name__}: {reason}); {cure}, or choose another "
            "model or larger images"
        ) from error
    return model.train()


def build(args: argparse.Namespace, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Returns the dense model of the command line, freshly initialised from its seed."""
    torch.manual_seed(args.seed)
    if args.text is not None:
        return GPT2(args.length, args.width, args.layers)
    patch = args.patch_size or (2 if shape[1] <= 16 else 4 if shape[1] <= 64 else 16)
    if (args.patch_size or args.model == "mixer") and (shape[1] % patch or shape[2] % patch):
        raise SystemExit(
            f"--patch-size: expected a divisor of the image's side {shape[1]}, got {patch}"
        )
    if args.model != "mixer":
        return _timm(args, shape, classes)
    return Mixer(shape, classes, patch, args.width, args.layers)


def _wanted(model: str) -> tuple[str, ...] | None:
    """Which layers become sparse, by the end of their names: the published choice if there is one,
    else all but the head (None)."""
    if "mixer" in model:
        return PRESETS["mixer"]
    if model == "gpt2":
        return PRESETS["gpt2"]
    if model.startswith(("vit_", "deit")):
        return PRESETS["vit"]
    return None


def sparsify(model: nn.Module, args: argparse.Namespace) -> Report:
    """Converts the model in place as the command line says; exits if nothing could be converted."""
    names = _wanted("gpt2" if args.text is not None else args.model)

    def chosen(module: nn.Module, name: str) -> bool:
        return name.endswith(names) if names else not name.endswith(("head", "classifier"))

    torch.manual_seed(args.seed + 1)
    try:
        config = PixelflyConfig(
            density=args.density, block_size=args.block_size, rank=args.rank, lowrank=args.lowrank
        )
    except ValueError as error:
        raise SystemExit(f"--density, --block-size or --rank: {error}") from None
    report = sparsify_(model, config, chosen)
    if not report.layers:
        raise SystemExit(f"no layer of {args.model} could be converted:\n{report}")
    return report
