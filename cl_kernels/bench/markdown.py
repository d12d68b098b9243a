"""The report of a benchmark as Markdown, without plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import figures, tables
from .results import Results

_LEGEND = (
    "Medians, the middle half of the rounds in brackets. Speed-up: of cl_kernels over the variant, the "
    "median of the ratios round by round. Rates count the fewest operations that loss and gradients can be "
    "had with; peak memory is beyond inputs and gradients; errors are relative to float64."
)
_ACCURACY_LEGEND = (
    "The largest relative error of a gradient over the losses, against float64, by temperature. Converged "
    "inputs have positives at a cosine of 0.99."
)


def render(results: Results) -> str:
    parts = ["# Benchmark of cl_kernels", _escaped(tables.summary(results))]
    if warning := tables.busy(results):
        parts.append(f"**{warning}**")
    parts += ["## Machine", _table(("", ""), tables.machine(results))]
    if results.headlines():
        parts += ["## Headline workloads", _LEGEND, _headlines(results)]
    if untimed := tables.untimed(results):
        parts += ["## Not timed, and why", _table(("variant", "reason", "work"), untimed)]
    if results.accuracy:
        parts += ["## Accuracy", _ACCURACY_LEGEND, _accuracy(results)]
    return "\n\n".join(parts) + "\n"


def _headlines(results: Results) -> str:
    columns = ("work", "dtype", "variant", *tables.time_columns(results), *tables.REST_COLUMNS)
    rows = []
    for table in tables.headlines(results):
        for row in table.rows:
            name = f"{row.line.variant} ({row.note})" if row.note else row.line.variant
            times = [_cell(cell) for cell in row.times]
            if row.status:
                times = [row.status, *[""] * (len(times) - 1)]
            rows.append((table.work, table.dtype, name, *times, *map(_cell, row.rest)))
    return _table(columns, rows, left=3)


def _accuracy(results: Results) -> str:
    at = [f"τ = {figures.short(figures.number(t))}" for t in tables.temperatures(results)]
    rows = [(x.dtype, x.inputs, x.variant, *map(_cell, x.cells)) for x in tables.accuracy(results)]
    return _table(("dtype", "inputs", "variant", *at), rows, left=3)


def _cell(cell: tables.Cell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    count = len(columns) if left is None else left
    lines = [columns, ["---"] * count + ["---:"] * (len(columns) - count)]
    body = [[_escaped(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *body])


def _escaped(text: str) -> str:
    """As text, wherever Markdown would see a mark in it."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|*_`<[":
        text = text.replace(mark, "\\" + mark)
    return text
