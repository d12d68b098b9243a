"""The benchmark's table and progress in a terminal: by `rich` where it is installed, else plain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..tools.text import aligned
from . import tables
from .results import FLOOR, OURS, Results
from .run import Progress


def _print(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """What tells a person how far the run is, on standard error."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _print
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print
        return
    with Progress(
        BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def show(results: Results) -> None:
    """The headline table and the variants without a time."""
    header = ("", *tables.time_columns(results), *tables.REST_COLUMNS)
    blocks = [
        (f"{table.work} {table.dtype}", [_cells(row) for row in table.rows if not row.status])
        for table in tables.headlines(results)
    ]
    right = range(1, len(header))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, rows in blocks:
            print("\n".join(["", title, *aligned(header, rows, right)]))
        _show_untimed(results)
        return
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for title, rows in blocks:
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i in right else "left", no_wrap=i == 0)
        for cells in rows:
            ours = cells[0].split(" ")[0] == OURS
            table.add_row(*cells, style="bold" if ours else "dim" if cells[0] == FLOOR else None)
        console.print(table)
    _show_untimed(results)


def _cells(row: tables.Row) -> list[str]:
    return [row.line.variant, *(cell.text for cell in (*row.times, *row.rest))]


def _show_untimed(results: Results) -> None:
    for variant, reason, works in tables.untimed(results):
        print(f"no time for {variant} ({works}): {reason}")
