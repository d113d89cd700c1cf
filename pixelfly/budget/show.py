"""A plan as text, as rich's table and as a figure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .._table import aligned

if TYPE_CHECKING:
    from .result import LayerPlan, Plan

_HEADERS = ("type", "layers", "in", "out", "tokens", "b", "nnz", "rank", "density", "MACs", "was")


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """Returns the cells of the table: equal layers share a row."""
    counts: Counter[tuple] = Counter()
    for x in plan.layers:
        if not x.reason:
            shape = (x.type, x.in_features, x.out_features, x.tokens)
            counts[(*shape, x.block_size, x.nnz, x.rank, x.weights)] += 1
    cells = []
    for (kind, k, n, tokens, b, nnz, rank, weights), many in counts.items():
        form = ("dense", "", "") if b is None else (str(b), str(nnz), str(rank))
        macs = (short(many * tokens * weights), short(many * tokens * k * n))
        numbers = (many, k, n, tokens)
        cells.append((kind, *map(str, numbers), *form, f"{weights / (k * n):.4f}", *macs))
    return cells


def remarks(plan: Plan) -> list[str]:
    """Returns the lines below the table."""
    lines = [
        f"budget: {plan.budget}={plan.value:g}, allocation {plan.allocation}",
        f"density of these layers {plan.density:.4f}; model: {short(plan.rest.params)} -> "
        f"{short(plan.params)} parameters, {short(plan.dense_flops)} -> {short(plan.flops)} FLOPs",
    ]
    if plan.cost is not None:
        dense, ours = plan.predicted_step(dense=True), plan.predicted_step()
        what = "step" if plan.training else "forward"
        what += " under autocast" if plan.autocast else ""
        lines.append(
            f"predicted {what} on {plan.cost.device} ({plan.cost.source}): "
            f"{1e3 * dense.total:.3g} -> {1e3 * ours.total:.3g} ms, "
            f"{dense.total / ours.total:.2f}x"
        )
        parts = (f"{k} {1e3 * v:.3g}" for k, v in ours.parts.items())
        lines.append(f"of which, in ms: {', '.join(parts)}")
    dense_layers: dict[str, list[LayerPlan]] = {}
    for x in plan.layers:
        if x.reason:
            dense_layers.setdefault(x.reason, []).append(x)
    for reason, layers in dense_layers.items():
        names = ", ".join(x.name for x in layers[:3])
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        lines.append(f"left dense: {names}{more}: {reason}")
    return lines


def text(plan: Plan) -> str:
    """Returns the table as plain text."""
    lines = aligned([_HEADERS, *rows(plan)])
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, *remarks(plan)])


def rich_parts(plan: Plan, width: int) -> Iterator[Any]:
    """Yields what rich draws on `width` columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells, columns = rows(plan), list(range(len(_HEADERS)))
    sizes = [max(map(len, column)) for column in zip(_HEADERS, *cells, strict=True)]
    for header in ("was", "tokens", "layers"):  # a narrow terminal goes without
        if sum(sizes[i] + 3 for i in columns) > width:
            columns.remove(_HEADERS.index(header))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in columns:
        table.add_column(_HEADERS[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[i] for i in columns))
    yield table
    for line in remarks(plan):
        yield Text(line)


def plot(plan: Plan, path: str | os.PathLike[str] | None) -> Any:
    """Returns the figure of `Plan.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plan.plot: needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(9 if plan.cost else 5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if plan.cost else 1, squeeze=False)[0]
    dense: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for x in plan.candidates:
        dense[x.type] += x.dense_weights
        kept[x.type] += x.weights
    kinds = list(dense)
    axes[0].bar(kinds, [kept[kind] / dense[kind] for kind in kinds], color="tab:blue")
    axes[0].axhline(plan.density, color="black", linewidth=0.8, linestyle="--")
    axes[0].set(title="density", ylim=(0, 1))
    axes[0].tick_params(axis="x", rotation=30)
    if plan.cost is not None:
        before, after = plan.predicted_step(dense=True).parts, plan.predicted_step().parts
        for place, parts in ((0, before), (1, after)):
            bottom = 0.0
            for i, (kind, seconds) in enumerate(parts.items()):
                label = kind if place == 0 else None
                axes[1].bar(place, 1e3 * seconds, bottom=bottom, color=f"C{i}", label=label)
                bottom += 1e3 * seconds
        axes[1].set_xticks([0, 1], ["dense", "plan"])
        axes[1].set(title=f"predicted ms, {plan.cost.device}", xlim=(-0.6, 2.6))
        axes[1].legend(fontsize=7, loc="center right")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def short(count: float) -> str:
    """Returns a count with three digits and a unit."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)
