"""The report of a benchmark: one HTML file that needs nothing else, and Markdown without plots."""

from __future__ import annotations

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
    headlines, timed, rest = tables.measured(results)
    everything, errors = tables.measured(results, everything=True)[0], tables.errors(results)
    return environment.get_template(template).render(
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
        cuda=results.machine.get("kind") == "cuda",
        **more,
    )


def _escaped(value: object) -> Markup:
    """A cell in one line, as text wherever Markdown would see a mark in it."""
    if isinstance(value, Markup):
        return value
    text, _, spread = str(value).partition("\n")
    text = " ".join(f"{text} ({spread})".split() if spread else text.split()).replace("\\", "\\\\")
    for mark in "|*_`<[":
        text = text.replace(mark, "\\" + mark)
    return Markup(text)


def _sections(results: Results) -> list[dict[str, Any]]:
    """Panels by heading, and the entries of their legend by variant; the template has what is said of them."""
    errors = {
        f"The {which}, {kind} inputs": panels
        for which in ("gradient", "loss")
        for kind, panels in plots.errors(results, which).items()
    }
    found = [
        _section(results, "speed", "Speed at the headline workloads", {"": plots.speedups(results)}),
        _section(results, "time", "Time", {"": plots.times(results)}),
        _section(results, "memory", "Memory", {"": plots.memories(results)}),
        _section(results, "roofline", "Roofline", {"": plots.rooflines(results)}),
        _section(results, "errors", "Accuracy", errors),
    ]
    return [section for section in found if section["groups"]]


def _section(results: Results, name: str, title: str, groups: dict[str, list[Panel]]) -> dict[str, Any]:
    filled = {heading: panels for heading, panels in groups.items() if panels}
    shown = {variant for panels in filled.values() for panel in panels for variant in panel.variants}
    known = styles(tables.variants(results)).items()
    legend = {} if name == "speed" else {v: key(style) for v, style in known if v in shown}
    return {"name": name, "title": title, "groups": filled, "legend": legend}
