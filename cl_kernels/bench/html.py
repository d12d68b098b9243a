"""The report of a benchmark as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import figures, plots, tables
from .results import Results


@dataclass(frozen=True)
class Group:
    """Panels under a heading of their own, or under none."""

    title: str
    panels: list[plots.Panel]


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    keys: list[plots.Key]
    groups: list[Group]


def render(results: Results) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cl_kernels.bench", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: figures.short(figures.number(value))
    return environment.get_template("report.html.j2").render(**_content(results))


def _content(results: Results) -> dict[str, Any]:
    return {
        "summary": tables.summary(results),
        "machine": tables.machine(results),
        "busy": tables.busy(results),
        "time_columns": tables.time_columns(results),
        "rest_columns": tables.REST_COLUMNS,
        "headlines": tables.headlines(results),
        "everything": tables.everything(results),
        "untimed": tables.untimed(results),
        "temperatures": tables.temperatures(results),
        "accuracy": tables.accuracy(results),
        "sections": [section for section in _sections(results) if section.groups],
        "palette": plots.PALETTE,
        "cuda": results.machine.get("kind") == "cuda",
    }


def _sections(results: Results) -> list[Section]:
    """The template has what is said about them."""
    errors = [
        Group(f"The {which}, {kind} inputs", panels)
        for which in ("gradient", "loss")
        for kind, panels in plots.errors(results, which)
    ]
    return [
        _section(results, "speed", "Speed at the headline workloads", [Group("", plots.speedups(results))]),
        _section(results, "time", "Time", [Group("", plots.times(results))]),
        _section(results, "memory", "Memory", [Group("", plots.memories(results))]),
        _section(results, "roofline", "Roofline", [Group("", plots.rooflines(results))]),
        _section(results, "errors", "Accuracy", errors),
    ]


def _section(results: Results, name: str, title: str, groups: list[Group]) -> Section:
    filled = [group for group in groups if group.panels]
    order = tables.variants(results)
    shown = frozenset[str]().union(*(panel.variants for group in filled for panel in group.panels))
    keys = plots.legend([x for x in order if x in shown], plots.styles(order), name)
    return Section(
        name, title, keys if name != "speed" else [], filled
    )  # there, names stand beside the marks
