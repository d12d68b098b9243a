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
    parts += ["## Machine", table(("", ""), _safe(tables.machine(results)), left=2)]
    if any(line.headline for line in results.lines):
        parts += ["## Headline workloads", _LEGEND, _headlines(results)]
    if untimed := tables.untimed(results):
        parts += ["## Not timed, and why", table(("variant", "reason", "work"), _safe(untimed), left=3)]
    if results.accuracy:
        parts += ["## Accuracy", _ACCURACY_LEGEND, _accuracy(results)]
    return "\n\n".join(parts) + "\n"


def _headlines(results: Results) -> str:
    found, timed, rest = tables.measured(results)
    rows = []
    for row in found.to_dict("records"):
        name = f"{row['variant']} ({row['note']})" if row["note"] else row["variant"]
        times = [row["why"], *[""] * (len(timed) - 1)] if row["why"] else [row[x] for x in timed]
        rows.append([row["work"], row["dtype"], name, *times, *(row[x] for x in rest)])
    return table(["work", "dtype", "variant", *timed, *rest], _safe(rows), left=3)


def _accuracy(results: Results) -> str:
    found = tables.errors(results)
    at = [f"τ = {figures.plain(t)}" for t in found.columns]
    return table(["dtype", "inputs", "variant", *at], _safe(found.reset_index().to_numpy()), left=3)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """The first `left` columns are words, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def _safe(rows: Iterable[Iterable[str]]) -> list[list[str]]:
    return [[_escaped(_in_brackets(cell)) for cell in row] for row in rows]


def _in_brackets(cell: str) -> str:
    text, _, spread = cell.partition("\n")
    return f"{text} ({spread})" if spread else text


def _escaped(text: str) -> str:
    """As text, wherever Markdown would see a mark in it."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|*_`<[":
        text = text.replace(mark, "\\" + mark)
    return text
