"""The plots of a report: small panels as inline SVG, in colours that the page defines.

A panel is drawn in sentinel colours, which become CSS variables in its SVG, so that one drawing serves light
and dark pages. Text stays text, in the font of the page. Points carry their figures as `<title>`.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from . import figures, tables
from .results import FLOOR, OURS, Accuracy, Line, Results, ours, quartiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "paper": ("#fdfdfb", "#161614"),
    "ink": ("#1d1c1a", "#eceae4"),
    "soft": ("#5f5c56", "#aaa69c"),
    "grid": ("#e4e2dc", "#33322e"),
    "band": ("#f3f1ec", "#21201d"),
    "ours-1": ("#cf1c13", "#ff6a1a"),
    "ours-2": ("#8a1538", "#ff9aa8"),
    "ours-3": ("#d2600a", "#ffc27a"),
    "series-1": ("#476dd8", "#3e7cfe"),
    "series-2": ("#007426", "#7bb99d"),
    "series-3": ("#864678", "#d64dc3"),
    "series-4": ("#ad8757", "#e2ab50"),
    "series-5": ("#1294b6", "#98d7f2"),
    "series-6": ("#473566", "#c78bff"),
    "series-7": ("#5c1f0a", "#f5ff99"),
    "floor": ("#77756f", "#8f8d86"),
}
"""On light and dark paper. The series differ for the colour-blind too, and have a contrast of 3:1 or more."""

_SENTINELS = {name: f"#fe01{i:02x}" for i, name in enumerate(PALETTE)}
_MARKERS = (
    ("s", 6.5),  # and the sizes at which they look equally large
    ("^", 8.0),
    ("D", 6.5),
    ("v", 8.0),
    ("P", 9.0),
    ("X", 8.5),
    ("8", 7.5),
    ("*", 11.0),
    ("h", 8.0),
    ("<", 8.0),
    (">", 8.0),
)
_KNOWN = ("eager", "torch.compile", "pytorch-metric-learning", "lightly", "linear_cross_entropy")
_EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

_WIDTH = 380.0
_LEFT, _RIGHT, _BOTTOM, _TOP = 58.0, 14.0, 40.0, 26.0
_RAIL = 14.0  # the height of a row above the axes
_TEXT = 11.5


@dataclass(frozen=True)
class Style:
    color: str  # of PALETTE
    marker: str
    width: float
    size: float
    dashes: str = "-"
    order: int = 3

    @property
    def sentinel(self) -> str:
        return _SENTINELS[self.color]


@dataclass(frozen=True)
class Panel:
    title: str
    svg: str
    variants: frozenset[str]  # that it shows


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    variant: str
    svg: str


def styles(variants: Iterable[str]) -> dict[str, Style]:
    """One colour and marker a variant. Well-known peers have the same ones in every report."""
    found: dict[str, Style] = {}
    mine, others = 0, len(_KNOWN)
    for variant in variants:
        if variant.split(" ")[0] == OURS:
            found[variant] = Style(f"ours-{mine % 3 + 1}", ("o", "H", "p")[mine % 3], 2.8, 8.5, order=5)
            mine += 1
        elif variant == FLOOR:
            found[variant] = Style("floor", "d", 1.3, 6.5, "--", 2)
        else:
            slot = _KNOWN.index(variant) if variant in _KNOWN else others
            others += variant not in _KNOWN
            marker, size = _MARKERS[slot % len(_MARKERS)]
            found[variant] = Style(f"series-{slot % 7 + 1}", marker, 1.5, size)
    return found


def legend(variants: Iterable[str], all_styles: dict[str, Style], name: str) -> list[Key]:
    keys: list[Key] = []
    for variant in variants:
        style = all_styles[variant]
        canvas = _Canvas(34, 14, (0, 0, 34, 14))
        canvas.axes.set(xlim=(0, 34), ylim=(0, 14))
        canvas.axes.set_axis_off()
        canvas.line([2, 32], [7, 7], style, markers=False)
        canvas.line([17], [7], style)
        keys.append(Key(variant, canvas.svg(f"{name}-key-{len(keys)}", "")))
    return keys


# Curves over the rows


@dataclass(frozen=True)
class _Quantity:
    """What a curve shows of a line; `note` is what a tooltip adds."""

    name: str
    value: Callable[[Line], float | None]
    text: Callable[[float | None], str]
    note: Callable[[Line], str]


_TIME = _Quantity(
    "forward + backward",
    lambda line: line.seconds if line.timed else None,
    figures.time,
    lambda line: f" (middle half {figures.times(*quartiles(line.both))})",
)
_MEMORY = _Quantity(
    "peak memory",
    lambda line: None if line.memory is None else max(line.memory, 4096.0),  # a page, where the peak stayed
    figures.size,
    lambda line: "",
)


def times(results: Results) -> list[Panel]:
    """Forward and backward against rows, a panel a loss and dtype that was timed at two sizes or more."""
    return _curves(results, "time", _TIME, None)


def memories(results: Results) -> list[Panel]:
    """Peak memory against rows, the machine's memory, and where eager's growth meets it."""
    return _curves(results, "memory", _MEMORY, results.machine.get("memory_bytes"))


def _curves(results: Results, name: str, quantity: _Quantity, limit: float | None) -> list[Panel]:
    all_styles = styles(tables.variants(results))
    return [
        _curve(f"{name}-{i}", title, lines, all_styles, quantity, limit)
        for i, (title, lines) in enumerate(_sweeps(results, quantity.value))
    ]


def _sweeps(results: Results, value: Callable[[Line], float | None]) -> list[tuple[str, list[Line]]]:
    groups: dict[tuple[str, str, int], list[Line]] = {}
    for line in results.lines:
        groups.setdefault((line.loss, line.dtype, line.width), []).append(line)
    dtypes = list(dict.fromkeys(line.dtype for line in results.lines))
    dtypes.sort(key=lambda dtype: dtype != "float32")
    found = []
    for _, lines in sorted(groups.items(), key=lambda item: dtypes.index(item[0][1])):
        if len({x.rows for x in lines if value(x) is not None}) > 1:
            found.append((f"{lines[0].title}, {lines[0].dtype}, D = {lines[0].width}", lines))
    return found


def _out_of_memory(line: Line) -> bool:
    return "out of memory" in line.status.lower()


def _curve(
    name: str,
    title: str,
    lines: Sequence[Line],
    all_styles: dict[str, Style],
    quantity: _Quantity,
    limit: float | None,
) -> Panel:
    value, text = quantity.value, quantity.text
    lost = [x for x in lines if _out_of_memory(x)]
    rails = [x for x in all_styles if any(y.variant == x for y in lost)]
    canvas = _Canvas.panel(quantity.name, "rows N", rails=len(rails))
    at = sorted({x.rows for x in lines if value(x) is not None or x in lost})
    values = [v for x in lines if (v := value(x)) is not None]
    end = _meets(lines, limit)
    highest = max(at[-1], end[1] if end else 0)
    canvas.x_axis(at[0], highest, _rows_ticks(at[0], highest), "{:d}".format)
    canvas.y_axis(min(values), max([*values, 2 * limit if limit else 0]), text)
    shown = []
    for variant, style in all_styles.items():
        points = {x.rows: x for x in reversed(lines) if x.variant == variant and value(x) is not None}
        if not points:
            continue
        chosen = [points[n] for n in sorted(points)]
        notes = [f"{variant}, N = {x.rows}: {text(value(x))}{quantity.note(x)}" for x in chosen]
        canvas.line([x.rows for x in chosen], [value(x) or 0.0 for x in chosen], style, notes)
        shown.append((variant, notes[-1]))
    for i, variant in enumerate(rails):
        where = [x.rows for x in lost if x.variant == variant]
        notes = [f"{variant}, N = {n}: out of memory" for n in where]
        canvas.rail(i, "out of memory" if i == 0 else "", where, all_styles[variant], notes, marker="x")
        shown += [(variant, note) for note in notes]
    if limit:
        canvas.level(limit, f"this machine’s memory, {figures.size(limit)}")
    if end:
        canvas.extrapolate(end, all_styles["eager"])
        shown.append(("eager", f"eager runs out at N ≈ {_about(end[1])}, extrapolated"))
    return _panel(canvas, name, title, f"{title}: {quantity.name} against rows", shown)


def _panel(canvas: _Canvas, name: str, title: str, label: str, shown: Sequence[tuple[str, str]]) -> Panel:
    """`shown` are variants and what the label for those who cannot see the panel says of them."""
    svg = canvas.svg(name, f"{label}. {'; '.join(note for _, note in shown)}.")
    return Panel(title, svg, frozenset(variant for variant, _ in shown))


def _meets(lines: Sequence[Line], limit: float | None) -> tuple[float, float, float, float] | None:
    """The last measured N of eager and the N where its growth meets the limit, with the memory at both."""
    chosen = [x for x in lines if x.variant == "eager" and x.memory and x.rows == x.columns]
    rate = tables.growth(chosen)
    if not limit or rate is None:
        return None
    last, end = max(x.rows for x in chosen), math.sqrt(limit / rate)
    return (last, end, rate * last**2, limit) if end > last else None


def _about(n: float) -> str:
    """Two digits are as many as an extrapolation is worth."""
    return f"{float(f'{n:.1e}'):.0f}"


# Ratios


def speedups(results: Results) -> list[Panel]:
    """Each variant's time over ours, a panel a workload of the headlines."""
    all_styles = styles(tables.variants(results))
    works = [(lines, mine) for lines in results.headlines() if (mine := ours(lines)) is not None]
    works = [(lines, mine) for lines, mine in works if len(lines) > 1]
    found = [tables.paired(x, mine) for lines, mine in works for x in lines if x.timed and x is not mine]
    if not found:
        return []
    low = min(1.0, *(x[0] for x in found)) / 1.15
    high = max(1.0, *(x[2] for x in found)) * 1.15
    panels = []
    for i, (lines, mine) in enumerate(works):
        title = f"{mine.work}, {mine.dtype}"
        panels.append(_ratios(f"speed-{i}", title, lines, mine, all_styles, (low, high)))
    return panels


def _ratios(
    name: str,
    title: str,
    lines: Sequence[Line],
    mine: Line,
    all_styles: dict[str, Style],
    span: tuple[float, float],
) -> Panel:
    rows = [x for variant in all_styles for x in lines if x.variant == variant and x is not mine]
    left, right, top, step = 160.0, 58.0, 8.0, 24.0
    height = top + step * len(rows) + _BOTTOM
    canvas = _Canvas(_WIDTH, height, (left, _BOTTOM, _WIDTH - left - right, step * len(rows)))
    canvas.dress(f"time ÷ time of {mine.variant}")
    canvas.axes.spines["left"].set_visible(False)
    canvas.axes.set_ylim(len(rows) - 0.5, -0.5)
    canvas.axes.set_yticks([])
    canvas.x_axis(*span, _ticks(*span, 5), figures.ratio, pad=0.0)
    canvas.axes.axvline(1.0, color=_SENTINELS["ink"], linewidth=1.1, zorder=2)
    shown = []
    for i, line in enumerate(rows):
        style = all_styles[line.variant]
        canvas.text(left - 10, canvas.row(i, len(rows), step), _shortened(line.variant), "right", "ink")
        if not line.timed:
            reason = tables.reason(line).split(":")[0]
            canvas.text(canvas.x_pixel(1.0) + 8, canvas.row(i, len(rows), step), reason, "left", "soft")
            shown.append((line.variant, f"{line.variant} {reason}"))
            continue
        low, middle, high = tables.paired(line, mine)
        spread = f"middle half {figures.ratio(low)} to {figures.ratio(high)}"
        spread += f"; {line.note}" if line.note else ""
        note = f"{line.variant}: {figures.ratio(middle)} ({spread})"
        canvas.axes.plot([1.0, middle], [i, i], color=_SENTINELS["grid"], linewidth=1.0, zorder=1)
        canvas.axes.plot([low, high], [i, i], color=style.sentinel, linewidth=2.2, zorder=2)
        canvas.line([middle], [i], style, [note])
        canvas.text(_WIDTH - 4, canvas.row(i, len(rows), step), figures.ratio(middle), "right", "ink")
        shown.append((line.variant, note))
    return _panel(canvas, name, title, f"{title}: time over that of {mine.variant}", shown)


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# The roofline


def rooflines(results: Results) -> list[Panel]:
    """Rates on the fewest operations against operations a byte, under what this machine reached; a panel a
    dtype."""
    all_styles = styles(tables.variants(results))
    groups: dict[str, list[Line]] = {}
    for lines in results.headlines():
        for line in lines:
            if line.timed and figures.known(line.flops) and figures.known(line.bytes) and line.bytes > 0:
                groups.setdefault(line.dtype, []).append(line)
    order = sorted(groups, key=lambda dtype: dtype != "float32")
    return [
        _roofline(f"roofline-{i}", dtype, groups[dtype], results.ceilings, all_styles)
        for i, dtype in enumerate(order)
    ]


def _roofline(
    name: str, dtype: str, lines: Sequence[Line], ceilings: dict[str, float], all_styles: dict[str, Style]
) -> Panel:
    peak, copy = ceilings.get(dtype), ceilings.get("copy")
    works = {(x.intensity, x.work): x for x in sorted(lines, key=lambda x: x.intensity)}
    labels = _work_labels([work.title for work in works.values()], list(works.values()))
    xs = [x.intensity for x in lines]
    ys = [x.flops_per_second for x in lines]
    low, high = min(xs) / 2, max(xs) * 2
    if peak and copy:
        low = min(low, peak / copy / 10)
        ys.append(low * copy * 1.5)
    unit = 1e12 if max([*ys, peak or 0]) >= 1e12 else 1e9
    canvas = _Canvas.panel(
        f"{'T' if unit == 1e12 else 'G'}FLOP/s, on the fewest operations", "operations a byte", height=330
    )
    canvas.x_axis(low, high, _ticks(low, high, 6), figures.number, pad=0.0)
    levels = _staggered([canvas.x_pixel(x) for x, _ in works], labels)
    room = 14.0 * (max(levels) + 1) + 8
    top = max([*ys, peak or 0]) * 1.5
    bottom = min(ys) / 1.4
    share = room / canvas.box[3]
    bottom = top * (bottom / top) ** (1 / (1 - share))
    canvas.y_axis(bottom, top, lambda x: figures.number(x / unit), pad=0.0, least=min(ys) / 1.4)
    canvas.roof(low, high, peak, copy, bottom)
    for (x, _), level, label in zip(works, levels, labels, strict=True):
        under = [line.flops_per_second for line in lines if line.intensity == x]
        canvas.drop(x, max(under), 14.0 * level + 8, label)
    shown = []
    for variant, style in all_styles.items():
        chosen = [x for x in lines if x.variant == variant]
        if not chosen:
            continue
        notes = [
            f"{variant}, {x.work}: {figures.rate(x.flops_per_second)} at {figures.number(x.intensity)} "
            "operations a byte"
            for x in chosen
        ]
        canvas.points([x.intensity for x in chosen], [x.flops_per_second for x in chosen], style, notes)
        shown += [(variant, note) for note in notes]
    return _panel(canvas, name, dtype, f"Roofline, {dtype}", shown)


def _work_labels(titles: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """The title of a loss, with its rows where the panel has several workloads of it."""
    return [
        title if titles.count(title) == 1 else f"{title} {line.rows}"
        for title, line in zip(titles, lines, strict=True)
    ]


def _staggered(xs: Sequence[float], labels: Sequence[str]) -> list[int]:
    """For labels centred at `xs`, in order, the lowest row in which each is clear of the others."""
    ends: list[float] = []
    found = []
    for x, label in zip(xs, labels, strict=True):
        half = 3.4 * len(label) + 5
        level = next((i for i, end in enumerate(ends) if x - half >= end), len(ends))
        ends[level : level + 1] = [x + half]
        found.append(level)
    return found


# Errors


def errors(results: Results, which: str) -> list[tuple[str, list[Panel]]]:
    """Panels of `which`, "gradient" or "loss", by kind of inputs and dtype: the error against temperature."""
    all_styles = styles(tables.variants(results))
    dtypes = list(dict.fromkeys(x.dtype for x in results.accuracy))
    dtypes.sort(key=lambda dtype: dtype != "float32")
    kinds = sorted({x.inputs for x in results.accuracy}, key=lambda kind: (kind != "random", kind))
    found = []
    for kind in kinds:
        panels = []
        for dtype in dtypes:
            every = [x for x in results.accuracy if x.dtype == dtype]
            here = [x for x in every if x.inputs == kind]
            if here:
                name = f"error-{which}-{kind}-{dtype}"
                panels.append(_errors(name, which, f"{dtype}, {kind} inputs", here, every, all_styles))
        found.append((kind, panels))
    return found


def _error(x: Accuracy, which: str) -> float | None:
    value = x.gradient_error if which == "gradient" else x.loss_error
    return value if figures.known(value) else None


def _errors(
    name: str,
    which: str,
    title: str,
    here: Sequence[Accuracy],
    every: Sequence[Accuracy],
    all_styles: dict[str, Style],
) -> Panel:
    lost = [x for x in all_styles if any(y.variant == x and _error(y, which) is None for y in here)]
    finite = [v for x in every if (v := _error(x, which))]
    epsilon = _EPSILON.get(here[0].dtype)
    least = min([*finite, epsilon or 1.0])
    canvas = _Canvas.panel(f"relative error of the {which}", "temperature", rails=len(lost))
    at = sorted({x.temperature for x in every})
    canvas.x_axis(at[0], at[-1], _spaced(at, canvas), figures.number)
    canvas.y_axis(least, max([*finite, epsilon or least]), _power, pad=0.1)
    if epsilon:
        canvas.level(epsilon, f"unit roundoff of {here[0].dtype}", dashes=":", above=False)
    shown = []
    for variant, style in all_styles.items():
        mine = [x for x in here if x.variant == variant]
        losses: dict[str, list[Accuracy]] = {}
        for x in mine:
            losses.setdefault(x.title, []).append(x)
        if len(losses) > 1:
            for found in losses.values():
                points = [(x.temperature, v) for x in found if (v := _error(x, which)) is not None]
                canvas.faint(sorted(points), style, least)
        xs, ys, notes = [], [], []
        for t in at:
            values = [
                (v, x.title) for x in mine if x.temperature == t and (v := _error(x, which)) is not None
            ]
            if not values:
                continue
            xs.append(t)
            worst, loss = max(values)
            ys.append(max(worst, least))
            middle = statistics.median(v for v, _ in values)
            at_most = f"at most {figures.error(worst)} ({loss}), median {figures.error(middle)}"
            notes.append(f"{variant}, temperature {_plain(t)}: {at_most}")
        if xs:
            canvas.line(xs, ys, style, notes)
            shown.append((variant, notes[0]))
    for i, variant in enumerate(lost):
        bad = [x for x in here if x.variant == variant and _error(x, which) is None]
        where = sorted({x.temperature for x in bad})
        notes = []
        for t in where:
            names = figures.listed(sorted({x.title for x in bad if x.temperature == t}))
            notes.append(f"{variant}, temperature {_plain(t)}: not finite ({names})")
        canvas.rail(i, "NaN" if i == 0 else "", where, all_styles[variant], notes, at_right=True)
        shown += [(variant, note) for note in notes]
    return _panel(canvas, name, here[0].dtype, f"{title}: error of the {which}", shown)


def _spaced(at: Sequence[float], canvas: _Canvas) -> list[float]:
    """Of the measured temperatures, from the lowest on, those whose labels are clear of each other."""
    lowest, highest = math.log(at[0]), math.log(at[-1])
    kept: list[float] = []
    for t in at:
        gap = (math.log(t) - math.log(kept[-1])) / (highest - lowest) * canvas.box[2] if kept else math.inf
        if gap > 34:
            kept.append(t)
    return kept


def _plain(value: float) -> str:
    return figures.short(figures.number(value))


def _power(value: float) -> str:
    """1e-7 rather than 1e-07."""
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


# Ticks


def _rows_ticks(low: float, high: float) -> list[float]:
    """Powers of two, all of them or every second or third."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 7))
    return [2**k for k in range(first, last + 1, step)]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers on a log axis: powers of ten; with 3, or 2 and 5, where those are few; every second or
    third where they are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    choices = [[m * 10.0**k for k in range(first, last + 1) for m in ms] for ms in ((1,), (1, 3), (1, 2, 5))]
    choices += [[10.0**k for k in range(first, last + 1) if k % step == 0] for step in (2, 3, 4, 6)]
    inside = [[x for x in choice if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)] for choice in choices]
    few = [choice for choice in inside if len(choice) <= most]
    return next((choice for choice in few if len(choice) > 2), max(few, key=len)) or [math.sqrt(low * high)]


# Drawing


class _Canvas:
    """A figure whose unit is a CSS pixel, and what the panels draw on it."""

    def __init__(self, width: float, height: float, box: tuple[float, float, float, float]) -> None:
        figure_class = _figure_class()
        self.width, self.height, self.box = width, height, box
        self.figure: Figure = figure_class(figsize=(width / 72, height / 72))
        self.figure.patch.set_visible(False)
        left, bottom, w, h = box
        self.axes: Axes = self.figure.add_axes((left / width, bottom / height, w / width, h / height))
        self.axes.patch.set_visible(False)
        self.notes: dict[str, Sequence[str]] = {}

    @classmethod
    def panel(cls, what: str, x_label: str, rails: int = 0, height: float = 290) -> _Canvas:
        above = _TOP + rails * _RAIL + (4 if rails else 0)
        box = (_LEFT, _BOTTOM, _WIDTH - _LEFT - _RIGHT, height - _BOTTOM - above)
        canvas = cls(_WIDTH, height, box)
        canvas.dress(x_label)
        canvas.text(2, height - 10, what, "left", "soft")
        return canvas

    def dress(self, x_label: str) -> None:
        for side in ("top", "right"):
            self.axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            self.axes.spines[side].set(color=_SENTINELS["soft"], linewidth=0.9)
        self.axes.set_axisbelow(True)
        self.text(self.box[0] + self.box[2] / 2, 9, x_label, "center", "soft")

    def x_axis(
        self, low: float, high: float, ticks: Sequence[float], text: Callable[[Any], str], pad: float = 0.04
    ) -> None:
        self.axes.set_xscale("log")
        self._axis(self.axes.xaxis, ticks, text)
        extra = (high / low) ** pad if high > low else 1.5
        self.axes.set_xlim(low / extra, high * extra)

    def y_axis(
        self,
        low: float,
        high: float,
        text: Callable[[float], str],
        pad: float = 0.06,
        least: float = 0.0,
    ) -> None:
        self.axes.set_yscale("log")
        extra = max((high / low) ** pad, 1.15) if pad else 1.0
        low, high = low / extra, high * extra
        self._axis(self.axes.yaxis, [x for x in _ticks(low, high, 7) if x >= least], text)
        self.axes.set_ylim(low, high)
        self.axes.grid(axis="y", color=_SENTINELS["grid"], linewidth=0.8)

    def _axis(self, axis: Any, ticks: Sequence[float], text: Callable[[Any], str]) -> None:
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([figures.short(text(x)) for x in ticks]))
        axis.set_minor_locator(NullLocator())
        axis.set_tick_params(
            labelsize=_TEXT, labelcolor=_SENTINELS["soft"], color=_SENTINELS["soft"], width=0.9, length=3
        )

    def x_pixel(self, x: float) -> float:
        low, high = self.axes.get_xlim()
        return self.box[0] + self.box[2] * math.log(x / low) / math.log(high / low)

    def y_pixel(self, y: float) -> float:
        low, high = self.axes.get_ylim()
        return self.box[1] + self.box[3] * math.log(y / low) / math.log(high / low)

    def row(self, i: int, rows: int, step: float) -> float:
        return self.box[1] + step * (rows - i - 0.5)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        align: str,
        color: str,
        turn: float = 0.0,
        vertical: str = "center_baseline",
        paper: bool = False,
    ) -> None:
        """At a place in pixels from the lower left corner of the canvas."""
        self.figure.text(
            x / self.width,
            y / self.height,
            text,
            ha=align,
            va=vertical,
            color=_SENTINELS[color],
            fontsize=_TEXT,
            rotation=turn,
            rotation_mode="anchor",
            parse_math=False,
            gid="on-paper" if paper else None,
        )

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        style: Style,
        notes: Sequence[str] = (),
        markers: bool = True,
    ) -> None:
        name = f"points-{len(self.notes)}"
        self.notes[name] = notes
        self.axes.plot(
            xs,
            ys,
            color=style.sentinel,
            linewidth=style.width,
            linestyle=style.dashes,
            marker=style.marker if markers else "",
            markersize=style.size,
            markeredgecolor=_SENTINELS["paper"],
            markeredgewidth=0.7,
            zorder=style.order,
            clip_on=False,
            gid=name,
        )

    def points(self, xs: Sequence[float], ys: Sequence[float], style: Style, notes: Sequence[str]) -> None:
        self.line(xs, ys, Style(style.color, style.marker, 0.0, style.size, "", style.order), notes)

    def faint(self, points: Sequence[tuple[float, float]], style: Style, least: float) -> None:
        xs, ys = [x for x, _ in points], [max(y, least) for _, y in points]
        self.axes.plot(xs, ys, color=style.sentinel, linewidth=0.8, alpha=0.4, zorder=1)

    def rail(
        self,
        i: int,
        label: str,
        xs: Sequence[float],
        style: Style,
        notes: Sequence[str],
        marker: str = "",
        at_right: bool = False,
    ) -> None:
        """A row above the axes for what has no place in them."""
        from matplotlib.patches import Rectangle
        from matplotlib.transforms import blended_transform_factory

        y = self.box[1] + self.box[3] + _RAIL * (i + 0.5) + 4
        band = Rectangle(
            (self.box[0] / self.width, (y - _RAIL / 2) / self.height),
            self.box[2] / self.width,
            _RAIL / self.height,
            transform=self.figure.transFigure,
            facecolor=_SENTINELS["band"],
            edgecolor="none",
            zorder=0,
        )
        self.figure.add_artist(band)
        if label:
            edge = self.box[0] + self.box[2] - 4 if at_right else self.box[0] + 4
            self.text(edge, y, label, "right" if at_right else "left", "soft")
        name = f"points-{len(self.notes)}"
        self.notes[name] = notes
        cross = marker == "x"
        self.axes.plot(
            xs,
            [y / self.height] * len(xs),
            transform=blended_transform_factory(self.axes.transData, self.figure.transFigure),
            linestyle="",
            color=style.sentinel,
            marker=marker or style.marker,
            markersize=style.size,
            markeredgecolor=style.sentinel if cross else _SENTINELS["paper"],
            markeredgewidth=2.0 if cross else 0.7,
            clip_on=False,
            zorder=6,
            gid=name,
        )

    def level(self, y: float, label: str, dashes: str = "-", above: bool = True) -> None:
        self.axes.axhline(y, color=_SENTINELS["soft"], linewidth=1.0, linestyle=dashes, zorder=1)
        at = self.y_pixel(y) + (8 if above else -8)
        self.text(self.box[0] + 4, at, label, "left", "soft", paper=True)

    def extrapolate(self, end: tuple[float, float, float, float], style: Style) -> None:
        last, n, at_last, limit = end
        ink = style.sentinel
        self.axes.plot([last, n], [at_last, limit], color=ink, linewidth=1.5, linestyle=":", zorder=2)
        self.axes.plot([n], [limit], "o", markersize=7, markerfacecolor="none", markeredgecolor=ink, zorder=3)
        if self.x_pixel(n) - self.x_pixel(last) < 72:  # no room beside the line
            text = f"eager runs out at N ≈ {_about(n)}, extrapolated"
            self.text(self.width - _RIGHT, self.height - 10, text, "right", "ink")
            return
        y = self.y_pixel(at_last)
        for i, text in enumerate(("eager runs out", f"at N ≈ {_about(n)},", "extrapolated")):
            self.text(self.width - _RIGHT, y - 6 - 14 * i, text, "right", "ink", paper=True)

    def roof(self, low: float, high: float, peak: float | None, copy: float | None, bottom: float) -> None:
        ink = _SENTINELS["ink"]
        ridge = peak / copy if peak and copy else low
        if peak:
            self.axes.plot([ridge, high], [peak, peak], color=ink, linewidth=1.3, zorder=2)
            label = f"torch.mm, {figures.rate(peak)}"
            left, right = self.x_pixel(ridge) + 2, self.box[0] + self.box[2] - 2
            x, align = (left, "left") if right - left > 160 else (right, "right")
            self.text(x, self.y_pixel(peak) + 9, label, align, "ink", paper=True)
        if peak and copy:
            start = max(low, bottom / copy)
            self.axes.plot([start, ridge], [start * copy, peak], color=ink, linewidth=1.3, zorder=2)
            rise = self.y_pixel(peak) - self.y_pixel(start * copy)
            run = self.x_pixel(ridge) - self.x_pixel(start)
            turn = math.atan2(rise, run)
            x, y = self.x_pixel(start) + 0.12 * run, self.y_pixel(start * copy) + 0.12 * rise
            x, y = x + 12 * math.sin(turn), y - 12 * math.cos(turn)
            label = f"copy, {figures.bandwidth(copy)}"
            self.text(x, y, label, "left", "ink", turn=math.degrees(turn), vertical="baseline")

    def drop(self, x: float, y: float, height: float, label: str) -> None:
        """A hairline from a point down to its label at the foot of the axes."""
        foot = (height + 8) / self.box[3]
        top = (self.y_pixel(y) - self.box[1]) / self.box[3]
        self.axes.axvline(x, foot, top, color=_SENTINELS["grid"], linewidth=1.0, zorder=0)
        half = 3.2 * len(label)
        place = min(max(self.x_pixel(x), self.box[0] + half), self.width - half)
        self.text(place, self.box[1] + height, label, "center", "soft", paper=True)

    def svg(self, name: str, label: str) -> str:
        import matplotlib

        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            self.figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
        return _inline(text.getvalue(), name, label, self.notes)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plots of a report need matplotlib: pip install 'cl_kernels[bench]'") from error
    return Figure


def _inline(document: str, name: str, label: str, notes: dict[str, Sequence[str]]) -> str:
    """A matplotlib SVG document as an element of an HTML page: without namespaces and styles of its own, ids
    after `name`, sentinels as CSS variables, titles on points, and described by `label`."""
    root = ElementTree.fromstring(document)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.attrib = {key.split("}")[-1]: value for key, value in element.attrib.items()}
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if "style" in element.attrib:
            element.set("style", _themed(element.attrib["style"]))
    for group in root.iter("g"):
        found = notes.get(group.get("id", ""), ())
        marks = list(group.iter("use"))
        if len(marks) == len(found):
            for mark, note in zip(marks, found, strict=True):
                ElementTree.SubElement(mark, "title").text = note
    _rename(root, name)
    for key in ("version", "width", "height"):
        root.attrib.pop(key, None)
    if label:
        root.set("role", "img")
        root.set("aria-label", label)
    else:
        root.set("aria-hidden", "true")
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    style = re.sub(r"font(?:-family)?: [^;]*?((?:\d|\.)+px)?[^;]*(;|$)", _only_size, style)
    for name, sentinel in _SENTINELS.items():
        style = style.replace(sentinel, f"var(--{name})")
    return style.strip("; ")


def _only_size(found: re.Match[str]) -> str:
    return f"font-size: {found[1]};" if found[1] else ""


def _rename(root: ElementTree.Element, name: str) -> None:
    """Ids that are referred to, after the panel's name; the others go."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own == "on-paper":
            element.set("class", own)
        elif own in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)
            element.set(key, f"#{name}-{value[1:]}" if key == "href" else value)
