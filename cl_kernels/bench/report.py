"""The report of a benchmark: one HTML file that needs nothing else, and Markdown without plots."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import figures, plots, tables
from .panels import PALETTE, Panel, key, styles
from .results import Results


def html(results: Results) -> str:
    return _written("report.html.j2", results, palette=PALETTE, sections=_sections(results))


def markdown(results: Results) -> str:
    return _written("report.md.j2", results, finalize=_escaped)


def _written(template: str, results: Results, finalize: Any = None, **more: object) -> str:
    environment = Environment(
        loader=PackageLoader(__package__ or "", ""), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=True, finalize=finalize, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["plain"] = figures.plain
    found = tables.lines(results)
    errors = tables.errors(tables.accuracy(results))
    text, timed, rest = tables.measured(found)
    everything = [work.to_dict("records") for _, work in text.groupby("key", sort=False)]
    return environment.get_template(template).render(
        summary=tables.summary(found),
        machine=tables.machine(results),
        busy=tables.busy(results),
        timed=timed,
        rest=rest,
        headlines=[work for work in everything if work[0]["headline"]],
        everything=everything,
        untimed=tables.untimed(found),
        temperatures=list(errors.columns),
        errors=errors.reset_index().to_numpy().tolist(),
        cuda=results.machine.get("kind") == "cuda",
        **more,
    )


def _escaped(value: object) -> Markup:
    """A cell in one line, as text wherever Markdown would see a mark in it."""
    if isinstance(value, Markup):
        return value
    text, _, spread = str(value).partition("\n")
    text = " ".join(f"{text} ({spread})".split() if spread else text.split())
    return Markup(re.sub(r"([\\|*_`<\[])", r"\\\1", text))


def _sections(results: Results) -> list[dict[str, Any]]:
    """Panels by heading, and the entries of a legend by variant; the template has what is said of them."""
    found, known = tables.lines(results), styles(tables.variants(results))
    limit = results.machine.get("memory_bytes")
    sections: list[tuple[str, str, dict[str, list[Panel]]]] = [
        ("speed", "Speed at the headline workloads", {"": plots.speedups(found, known)}),
        ("time", "Time", {"": plots.times(found, known)}),
        ("memory", "Memory", {"": plots.memories(found, known, limit)}),
        ("roofline", "Roofline", {"": plots.rooflines(found, known, results.ceilings)}),
        ("errors", "Accuracy", plots.errors(tables.accuracy(results), known)),
    ]
    filled = []
    for name, title, groups in sections:
        if panels := [panel for group in groups.values() for panel in group]:
            shown = {style for panel in panels for style in panel.styles}
            legend = {variant: key(style) for variant, style in known.items() if style in shown}
            filled.append({"name": name, "title": title, "groups": groups, "legend": legend})
    return filled
