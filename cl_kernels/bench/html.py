"""The report of a benchmark as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import figures, plots, tables
from .results import Results


@dataclass(frozen=True)
class Section:
    """Panels by heading; `keys` are a legend's entries by variant."""

    name: str
    title: str
    groups: dict[str, list[plots.Panel]]
    keys: dict[str, plots.Panel]


def render(results: Results) -> str:
    environment = Environment(
        loader=PackageLoader(__package__ or "", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = figures.plain
    headlines, timed, rest = tables.measured(results)
    everything = tables.measured(results, everything=True)[0]
    errors = tables.errors(results)
    return environment.get_template("report.html.j2").render(
        summary=tables.summary(results),
        machine=tables.machine(results),
        busy=tables.busy(results),
        timed=timed,
        rest=rest,
        headlines=[x.to_dict("records") for _, x in headlines.groupby("key", sort=False)],
        everything=[x.to_dict("records") for _, x in everything.groupby("key", sort=False)],
        untimed=tables.untimed(results),
        temperatures=list(errors.columns),
        errors=errors.reset_index().to_numpy().tolist(),
        sections=[section for section in _sections(results) if section.groups],
        palette=plots.PALETTE,
        cuda=results.machine.get("kind") == "cuda",
    )


def _sections(results: Results) -> list[Section]:
    """The template has what is said about them."""
    errors = {
        f"The {which}, {kind} inputs": panels
        for which in ("gradient", "loss")
        for kind, panels in plots.errors(results, which).items()
    }
    return [
        _section(results, "speed", "Speed at the headline workloads", {"": plots.speedups(results)}),
        _section(results, "time", "Time", {"": plots.times(results)}),
        _section(results, "memory", "Memory", {"": plots.memories(results)}),
        _section(results, "roofline", "Roofline", {"": plots.rooflines(results)}),
        _section(results, "errors", "Accuracy", errors),
    ]


def _section(results: Results, name: str, title: str, groups: dict[str, list[plots.Panel]]) -> Section:
    filled = {heading: panels for heading, panels in groups.items() if panels}
    shown = {variant for panels in filled.values() for panel in panels for variant in panel.variants}
    styles = plots.styles(tables.variants(results))
    named = name == "speed"  # there, names stand beside the marks
    keys = {} if named else {v: plots.key(style) for v, style in styles.items() if v in shown}
    return Section(name, title, filled, keys)
