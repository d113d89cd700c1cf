"""What `sparsify_` did, layer by layer, as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ._table import aligned, print_rich
from .nn.attention import PixelflySelfAttention
from .nn.linear import PixelflyLinear

_HEADERS = ("layer", "in", "out", "b", "nnz", "rank", "density", "params", "was", "MACs", "was")


@dataclass(frozen=True)
class LayerReport:
    """One converted layer.

    Attributes:
        name: the layer's name in the model.
        in_features: K.
        out_features: N.
        block_size: b.
        nnz: kept blocks.
        rank: r of the factored low rank, or the width of the global one.
        lowrank: "factored" or "global".
        density: weights of the layer / weights of the dense layer.
        requested: the density that was asked for, or None.
        params_before: parameters of the dense layer, bias included.
        params_after: parameters of the new one, bias and gate included.
        macs_before: multiply-accumulates per token of the dense layer.
        macs_after: the same of the new one.
        note: what is worth knowing, or "".
        error: relative Frobenius error of a projected weight, or None.
    """

    name: str
    in_features: int
    out_features: int
    block_size: int
    nnz: int
    rank: int
    lowrank: str
    density: float
    requested: float | None
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    note: str = ""
    error: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        layer: PixelflyLinear,
        params_before: int,
        note: str,
        error: float | None = None,
    ) -> LayerReport:
        """Returns the record of a layer that has just been made."""
        choice = layer.choice
        return cls(
            name=name,
            in_features=layer.in_features,
            out_features=layer.out_features,
            block_size=layer.layout.block_size,
            nnz=layer.layout.nnz,
            rank=choice.rank,
            lowrank=choice.lowrank,
            density=choice.density,
            requested=choice.requested,
            params_before=params_before,
            params_after=sum(p.numel() for p in layer.parameters()),
            macs_before=layer.in_features * layer.out_features,
            macs_after=choice.block_weights + choice.lowrank_weights,
            note=note,
            error=error,
        )

    def _cells(self) -> tuple[str, ...]:
        rank = f"{self.rank} global" if self.rank and self.lowrank == "global" else str(self.rank)
        sizes = (self.in_features, self.out_features, self.block_size, self.nnz)
        counts = (self.params_after, self.params_before, self.macs_after, self.macs_before)
        return (
            self.name,
            *map(str, sizes),
            rank,
            f"{self.density:.4f}",
            *map(_short, counts),
        )


@dataclass(frozen=True)
class AttentionReport:
    """One attention that now computes butterfly blocks of its scores.

    Attributes:
        name: its name in the model.
        heads: H.
        head_features: D.
        causal: whether it always is.
        block_size, max_stride, global_blocks, local_blocks: see `pixelfly.nn.AttentionConfig`.
    """

    name: str
    heads: int
    head_features: int
    causal: bool
    block_size: int
    max_stride: int | None
    global_blocks: int
    local_blocks: int

    @classmethod
    def of(cls, name: str, module: PixelflySelfAttention) -> AttentionReport:
        """Returns the record of an attention that has just been made."""
        kept = asdict(module.attention)
        return cls(name, module.num_heads, module.head_dim, module.is_causal, **kept)

    def _what(self) -> str:
        stride = "whole grid" if self.max_stride is None else f"stride {self.max_stride}"
        parts = [f"{self.heads} heads of {self.head_features}", f"blocks of {self.block_size}"]
        parts += [stride, f"{self.global_blocks} global"]
        parts += [f"{self.local_blocks} local"] * bool(self.local_blocks)
        return ", ".join(parts + ["causal"] * self.causal)


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that stayed dense, and why."""

    name: str
    in_features: int
    out_features: int
    reason: str


@dataclass
class Report:
    """What `sparsify_` did.

    Attributes:
        layers: the converted layers.
        skipped: the layers that were wanted but stayed dense.
        fused: names of the MLPs that became a `PixelflyMLP`.
        fused_blocks: names of the residual blocks that were fused, and of their patch embedding.
        fused_losses: names of the models whose loss was fused.
        attentions: the attentions that became a `PixelflySelfAttention`.
        notes: other remarks.
        params_before: parameters of the whole model before, shared ones counted once.
        params_after: the same after.

    Example:
        >>> print(Report(params_before=2048, params_after=2048))
        nothing was converted
        model: 2.05K -> 2.05K parameters
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    fused_blocks: list[str] = field(default_factory=list)
    fused_losses: list[str] = field(default_factory=list)
    attentions: list[AttentionReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0

    @property
    def macs_before(self) -> int:
        """Multiply-accumulates per token of the converted layers, dense."""
        return sum(layer.macs_before for layer in self.layers)

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates per token of the converted layers now."""
        return sum(layer.macs_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data, for JSON."""
        return {**asdict(self), "macs_before": self.macs_before, "macs_after": self.macs_after}

    @property
    def _without_layers(self) -> str:
        return "no linear layer was converted" if self.attentions else "nothing was converted"

    def _total(self) -> tuple[str, ...]:
        before = sum(layer.params_before for layer in self.layers)
        after = sum(layer.params_after for layer in self.layers)
        density = f"{self.macs_after / self.macs_before:.4f}"
        counts = map(_short, (after, before, self.macs_after, self.macs_before))
        return (f"{len(self.layers)} layers", "", "", "", "", "", density, *counts)

    def _remarks(self) -> list[str]:
        lines = self._missed() + [
            f"{layer.name}: {layer.note}" for layer in self.layers if layer.note
        ]
        lines += self._projected()
        if self.fused:
            lines.append(f"fused MLPs: {', '.join(self.fused)}")
        if self.fused_blocks:
            lines.append(f"fused blocks: {', '.join(self.fused_blocks)}")
        if self.fused_losses:
            lines.append(f"fused losses: {', '.join(self.fused_losses)}")
        alike: dict[str, list[str]] = {}
        for attention in self.attentions:
            alike.setdefault(attention._what(), []).append(attention.name)
        lines += [
            f"butterfly attention: {', '.join(names)} ({what})" for what, names in alike.items()
        ]
        lines += self.notes
        dense: dict[tuple[int, int, str], list[str]] = {}
        for s in self.skipped:
            dense.setdefault((s.in_features, s.out_features, s.reason), []).append(s.name)
        lines += [
            f"left dense: {', '.join(names)} ({k}->{n}): {reason}"
            for (k, n, reason), names in dense.items()
        ]
        before, after = _short(self.params_before), _short(self.params_after)
        return [*lines, f"model: {before} -> {after} parameters"]

    def _projected(self) -> list[str]:
        """Says how far the projected weights are from the dense ones, layer by layer."""
        errors = [(layer.name, layer.error) for layer in self.layers if layer.error is not None]
        if not errors:
            return []
        mean = sum(error for _, error in errors) / len(errors)
        each = ", ".join(f"{name} {error:.3f}" for name, error in errors)
        return [f"relative error of the projected weights: mean {mean:.3f} ({each})"]

    def _missed(self) -> list[str]:
        """Says which densities were taken where the requested one cannot be reached."""
        missed: Counter[tuple[float, float, int]] = Counter()
        for layer in self.layers:
            if layer.requested is not None and layer.density < layer.requested * (1 - 1e-6):
                missed[layer.requested, layer.density, layer.rank] += 1
        return [
            f"density {asked:g} is not met exactly in {count} layers: {taken:.4f} is the nearest "
            "not above it" + (f" with rank {rank}" if rank else "")
            for (asked, taken, rank), count in sorted(missed.items())
        ]

    def __str__(self) -> str:
        if not self.layers:
            return "\n".join([self._without_layers, *self._remarks()])
        rows = [_HEADERS, *(layer._cells() for layer in self.layers), self._total()]
        lines = aligned(rows)
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *self._remarks()])

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """Makes `rich.print(report)` draw a table."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        if self.layers:
            rows, total = [layer._cells() for layer in self.layers], self._total()
            widths = [max(map(len, cells)) for cells in zip(_HEADERS, total, *rows, strict=True)]
            columns = list(range(len(_HEADERS)))
            if sum(widths) + 3 * len(widths) > options.max_width:
                columns = [i for i in columns if _HEADERS[i] != "was"]
            table = Table(show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False)
            for i in columns:
                # A narrow terminal folds the names and keeps the numbers whole.
                style = (
                    {"overflow": "fold", "min_width": 12}
                    if i == 0
                    else {"justify": "right", "no_wrap": True}
                )
                table.add_column(_HEADERS[i], total[i], **style)
            for row in rows:
                table.add_row(*(row[i] for i in columns))
            yield table
        else:
            yield Text(self._without_layers)
        for line in self._remarks():
            yield Text(line)

    def print(self) -> None:
        """Prints the table, with rich if it is installed."""
        print_rich(self)


def _short(count: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)
