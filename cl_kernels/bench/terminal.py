"""The benchmark's tables and progress in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from . import tables
from .results import FLOOR, Results


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Tells a person how far the run is, on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: print(f"{done}/{total} {what}", file=sys.stderr, flush=True)
        return
    columns = bars.BarColumn(bar_width=28), bars.MofNCompleteColumn(), bars.TimeElapsedColumn()
    with bars.Progress(*columns, bars.TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def table(text: pd.DataFrame, left: Collection[str], title: str = "", styles: Sequence[str] = ()) -> None:
    """`left` are the columns of words."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(text.columns):
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=i == 0)
    for i, cells in enumerate(text.itertuples(index=False)):
        shown.add_row(*cells, style=styles[i] if styles else None)
    Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False).print(shown)


def show(results: Results) -> None:
    """The headline table and the variants without a time."""
    lines = tables.lines(results)
    found, timed, rest = tables.measured(lines)
    for _, work in found[found.headline].groupby("key", sort=False):
        title, work = f"{work.work.iloc[0]} {work['dtype'].iloc[0]}", work[work.why == ""]
        text = work[["variant", *timed, *rest]].map(lambda cell: cell.partition("\n")[0])
        styles = ["bold" if x.ours else "dim" if x.variant == FLOOR else "" for x in work.itertuples()]
        table(text.rename(columns={"variant": ""}), [""], title, styles)
    for variant, reason, works in tables.untimed(lines):
        print(f"no time for {variant} ({works}): {reason}")
