"""How the panels of a report are drawn: the colours and marks of the variants, on light and on dark paper."""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from .results import FLOOR, OURS

PALETTE = {
    "paper": ("#fdfdfb", "#161614"), "ink": ("#1d1c1a", "#eceae4"),
    "soft": ("#5f5c56", "#aaa69c"), "grid": ("#e4e2dc", "#33322e"),
    "band": ("#f3f1ec", "#21201d"), "ours-1": ("#cf1c13", "#ff6a1a"),
    "ours-2": ("#8a1538", "#ff9aa8"), "ours-3": ("#d2600a", "#ffc27a"),
    "series-1": ("#476dd8", "#3e7cfe"), "series-2": ("#007426", "#7bb99d"),
    "series-3": ("#864678", "#d64dc3"), "series-4": ("#ad8757", "#e2ab50"),
    "series-5": ("#1294b6", "#98d7f2"), "series-6": ("#473566", "#c78bff"),
    "series-7": ("#5c1f0a", "#f5ff99"), "floor": ("#77756f", "#8f8d86"),
}  # fmt: skip
"""On light and dark paper. The series differ for the colour-blind too, and have a contrast of 3:1 or more."""

# Markers and the sizes at which they look equally large.
_MARKERS = (("s", 6.5), ("^", 8.0), ("D", 6.5), ("v", 8.0), ("P", 9.0), ("X", 8.5), ("8", 7.5), ("*", 11.0),
            ("h", 8.0), ("<", 8.0), (">", 8.0))  # fmt: skip
_KNOWN = ("eager", "torch.compile", "pytorch-metric-learning", "lightly", "linear_cross_entropy")
_TOP, _RAIL = 1.02, 0.065  # where rows above the axes begin, and how high one is, of the axes' height

Ink = Mapping[str, str]  # the palette on one kind of paper
Draw = Callable[[Axes, Ink], None]


@dataclass(frozen=True)
class Style:
    color: str  # of PALETTE
    marker: str
    size: float
    width: float = 1.5
    dashes: str = "-"
    order: int = 3

    def line(self, ink: Ink, **other: Any) -> dict[str, Any]:
        return {
            "color": ink[self.color], "linestyle": self.dashes, "linewidth": self.width,
            "marker": self.marker, "markersize": self.size, "markeredgecolor": ink["paper"],
            "markeredgewidth": 0.7, "zorder": self.order, "clip_on": False, **other,
        }  # fmt: skip

    def mark(self, ink: Ink, **other: Any) -> dict[str, Any]:
        return self.line(ink, linestyle="", **other)


Styles = Mapping[str, Style]  # by variant


def styles(variants: Sequence[str]) -> dict[str, Style]:
    """One colour and marker a variant. Well-known peers have the same ones in every report."""
    ours = [x for x in variants if x.split(" ")[0] == OURS]
    others = [*_KNOWN, *(x for x in variants if x not in (*ours, *_KNOWN, FLOOR))]
    found = {FLOOR: Style("floor", "d", 6.5, 1.3, "--", 2)}
    for i, variant in enumerate(ours):
        found[variant] = Style(f"ours-{i % 3 + 1}", "oHp"[i % 3], 8.5, 2.8, order=5)
    for i, variant in enumerate(others):
        found[variant] = Style(f"series-{i % 7 + 1}", *_MARKERS[i % len(_MARKERS)])
    return {variant: found[variant] for variant in variants}


class Panel:
    """One figure, as SVG images on light and on dark paper; a point of it is a pixel of the page. `styles`
    are those that a legend has to name."""

    def __init__(
        self, title: str, what: str, draw: Draw, styles: Iterable[Style] = (),
        size: tuple[float, float] = (380, 290),
    ) -> None:  # fmt: skip
        self.title, self.styles = title, frozenset(styles)
        self.description = f"{what}. The tables have its figures." if what else ""
        inks = ({name: colors[i] for name, colors in PALETTE.items()} for i in range(2))
        self.images = [_image(draw, ink, *size) for ink in inks]


def _image(draw: Draw, ink: Ink, width: float, height: float) -> str:
    """A URI with the figure in it."""
    file = io.BytesIO()
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "cl_kernels", "text.parse_math": False, "font.size": 11.5,
        "text.color": ink["soft"], "axes.edgecolor": ink["soft"], "axes.labelcolor": ink["soft"],
        "xtick.color": ink["soft"], "ytick.color": ink["soft"], "axes.titlesize": "medium",
        "axes.titlelocation": "left", "axes.titley": _TOP, "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
        "axes.grid.axis": "y", "grid.color": ink["grid"],
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure((width / 72, height / 72), layout="constrained")
        draw(figure.add_subplot(), ink)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


@functools.cache
def key(style: Style) -> Panel:
    """An entry of a legend."""

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set_axis_off()
        axes.set_position((0, 0, 1, 1))  # and not as the layout would have it
        axes.plot([0, 1, 2], [0, 0, 0], **style.line(ink), markevery=[1])

    return Panel("", "", draw, size=(34, 14))


def log_axis(axis: Any, low: float, high: float, text: Any) -> None:
    """Powers of ten as ticks, and round numbers between them where those are few."""
    decades = math.log10(high / low) if high > low > 0 else 0.0
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(text)


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **other: Any) -> None:
    """Words at a share of the width and a height of the data, unless `xycoords` says otherwise."""
    usual = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center_baseline"}
    axes.annotate(text, at, offset, **(usual | other))


def heading(
    axes: Axes, text: str, rails: Mapping[Style, Sequence[float]], label: str, x: float, ink: Ink,
    **mark: Any,
) -> None:  # fmt: skip
    """Says above the y axis what it shows; between them are rows for what has no place in the axes: where
    each of `rails` was lost, and from `x` on why."""
    for i, (style, xs) in enumerate(rails.items()):
        low = _TOP + _RAIL * i
        band: dict[str, Any] = {"transform": axes.transAxes, "color": ink["band"], "clip_on": False}
        axes.add_patch(Rectangle((0, low), 1, _RAIL, linewidth=0, **band))
        if mark:
            mark["markeredgecolor"] = ink[style.color]
        where = [low + _RAIL / 2] * len(xs)
        axes.plot(xs, where, transform=axes.get_xaxis_transform(), **style.mark(ink, **mark))
    if rails:
        axes.text(x, _TOP + _RAIL / 2, label, transform=axes.transAxes, va="center_baseline")
    axes.set_title(text, y=_TOP + _RAIL * len(rails))
