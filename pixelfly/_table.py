"""Tables of reports as plain text, and the choice of rich where it is installed."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def print_rich(report: object) -> None:
    """Prints a report, through its `__rich_console__` if rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(report)
    else:
        Console().print(report)
