"""The panels of a report: small matplotlib figures, each drawn for light and for dark paper."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from . import figures, tables
from .results import FLOOR, OURS, Results

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

# Markers and the sizes at which they look equally large.
_MARKERS = (("s", 6.5), ("^", 8.0), ("D", 6.5), ("v", 8.0), ("P", 9.0), ("X", 8.5), ("8", 7.5), ("*", 11.0),
            ("h", 8.0), ("<", 8.0), (">", 8.0))  # fmt: skip
_KNOWN = ("eager", "torch.compile", "pytorch-metric-learning", "lightly", "linear_cross_entropy")
_EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

_WIDTH, _HEIGHT = 380.0, 290.0
_TEXT = 11.5
_RAIL = 0.065  # of the height of the axes: a row above them

Ink = Mapping[str, str]
"""The palette on one kind of paper."""
Draw = Callable[[Axes, Ink], None]


@dataclass(frozen=True)
class Style:
    color: str  # of PALETTE
    marker: str
    width: float
    size: float
    dashes: str = "-"
    order: int = 3

    def mark(self, ink: Ink) -> dict[str, Any]:
        return {"color": ink[self.color], "marker": self.marker, "markersize": self.size, "zorder": self.order,
                "markeredgecolor": ink["paper"], "markeredgewidth": 0.7, "linestyle": "", "clip_on": False}  # fmt: skip

    def line(self, ink: Ink) -> dict[str, Any]:
        return self.mark(ink) | {"linestyle": self.dashes, "linewidth": self.width}


@dataclass(frozen=True)
class Panel:
    title: str
    description: str  # for those who cannot see it: all of its figures
    variants: frozenset[str]  # that it shows
    images: tuple[str, str]  # on light and dark paper, as URIs


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


def key(style: Style) -> Panel:
    """An entry of a legend."""

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set_axis_off()
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        axes.plot([0, 1, 2], [0, 0, 0], **style.line(ink), markevery=[1])

    return Panel("", "", frozenset(), _images(draw, 34, 14))


def _images(draw: Draw, width: float = _WIDTH, height: float = _HEIGHT) -> tuple[str, str]:
    """One SVG image for each kind of paper; a point of a figure is a pixel of the page."""
    light, dark = ({name: colors[i] for name, colors in PALETTE.items()} for i in range(2))
    return _image(draw, light, width, height), _image(draw, dark, width, height)


def _image(draw: Draw, ink: Ink, width: float, height: float) -> str:
    soft, file = ink["soft"], io.BytesIO()
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "cl_kernels", "text.parse_math": False, "font.size": _TEXT,
        "axes.titlesize": _TEXT, "axes.labelsize": _TEXT, "axes.titlelocation": "left", "axes.titlepad": 8.0,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": ink["grid"],
        **dict.fromkeys(("text.color", "axes.titlecolor", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                         "ytick.color"), soft),
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure((width / 72, height / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)  # type: ignore[union-attr]
        draw(figure.add_subplot(), ink)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


# What the panels have in common


def _log(axis: Any, low: float, high: float, text: Callable[[float], str] | EngFormatter) -> None:
    """Powers of ten as ticks, and round numbers between them where those are few."""
    decades = math.log10(high / low) if high > low > 0 else 0.0
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(text if isinstance(text, EngFormatter) else lambda x, _: text(x))


def _level(axes: Axes, y: float, label: str, ink: Ink, dashes: str = "-", above: bool = True) -> None:
    axes.axhline(y, color=ink["soft"], linewidth=1.0, linestyle=dashes, zorder=1)
    _note(axes, label, (0, y), (4, 3 if above else -3), ink["soft"], "left", "bottom" if above else "top")


def _note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str, align: str,
    vertical: str, coordinates: str = "axes",
) -> None:  # fmt: skip
    """Words at a height of the data; `coordinates` "axes": x is a share of the width, "data": a place on it."""
    where: Any = ("axes fraction" if coordinates == "axes" else "data", "data")
    axes.annotate(text, at, offset, where, "offset points", color=color, ha=align, va=vertical)


def _rails(
    axes: Axes, rails: Mapping[str, Sequence[float]], label: str, align: str, all_styles: Mapping[str, Style],
    ink: Ink, marker: str | None = None,
) -> None:  # fmt: skip
    """Rows above the axes for what has no place in them: where each variant was lost."""
    for i, (variant, xs) in enumerate(rails.items()):
        low = 1.02 + _RAIL * i
        axes.add_patch(Rectangle((0, low), 1, _RAIL, transform=axes.transAxes, color=ink["band"], clip_on=False, linewidth=0))
        mark = all_styles[variant].mark(ink)
        if marker:
            mark |= {"marker": marker, "markeredgewidth": 2.0, "markeredgecolor": mark["color"]}
        axes.plot(xs, [low + _RAIL / 2] * len(xs), transform=axes.get_xaxis_transform(), **mark)
    if rails:
        x = 0.98 if align == "right" else 0.02
        axes.text(x, 1.02 + _RAIL / 2, label, transform=axes.transAxes, ha=align, va="center_baseline")


def _title(axes: Axes, text: str, rails: int = 0) -> None:
    axes.set_title(text, y=1.02 + _RAIL * rails, pad=6.0)


# Curves over the rows


def times(results: Results) -> list[Panel]:
    """Forward and backward against rows, a panel a loss and dtype that was timed at two sizes or more."""
    return _curves(results, "seconds", "forward + backward", EngFormatter("s"), figures.time)


def memories(results: Results) -> list[Panel]:
    """Peak memory against rows, the machine's memory, and where eager's growth meets it."""
    limit = results.machine.get("memory_bytes")
    return _curves(results, "memory", "peak memory", EngFormatter("B"), figures.size, limit)


def _curves(
    results: Results, column: str, name: str, ticks: EngFormatter, text: Callable[[float], str],
    limit: float | None = None,
) -> list[Panel]:  # fmt: skip
    all_styles, panels = styles(tables.variants(results)), []
    found = tables.lines(results).sort_values("rows", kind="stable")
    found["value"] = found[column].clip(lower=4096.0 if column == "memory" else None)  # a page, where it stayed
    found["lost"] = found.why.str.lower().str.contains("out of memory")
    dtypes = sorted(dict.fromkeys(x.dtype for x in results.lines), key=lambda dtype: dtype != "float32")
    losses = list(dict.fromkeys(x.loss for x in results.lines))
    groups = found.groupby(["dtype", "loss", "width"], sort=False)
    for (dtype, _, width), lines in sorted(groups, key=lambda x: (dtypes.index(x[0][0]), losses.index(x[0][1]))):
        if lines.rows[lines.value.notna()].nunique() > 1:
            title = f"{lines.title.iloc[0]}, {dtype}, D = {width}"
            panels.append(_curve(title, name, lines, all_styles, ticks, text, limit))
    return panels


def _curve(
    title: str, name: str, lines: pd.DataFrame, all_styles: Mapping[str, Style], ticks: EngFormatter,
    text: Callable[[float], str], limit: float | None,
) -> Panel:  # fmt: skip
    found, lost = lines[lines.value.notna()], lines[lines.lost]
    series = {v: found[found.variant == v] for v in all_styles if (found.variant == v).any()}
    rails = {v: lost.rows[lost.variant == v].tolist() for v in all_styles if (lost.variant == v).any()}
    end = _end(lines, limit)
    about = f"eager runs out at N ≈ {float(f'{end[0]:.1e}'):.0f}, extrapolated" if end else ""
    says = [f"{v}: " + ", ".join(f"N = {n}: {text(y)}" for n, y in zip(x.rows, x.value, strict=True)) for v, x in series.items()]
    says += [f"{v}, N = {n}: out of memory" for v, rows in rails.items() for n in rows]

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", yscale="log", xlabel="rows N")
        axes.margins(0.04, 0.08)
        axes.grid(axis="y")
        _title(axes, name, len(rails))
        for variant, points in series.items():
            axes.plot(points.rows, points.value, **all_styles[variant].line(ink))
        if end:
            n, last, at_last = end
            axes.plot([last, n], [at_last, limit], color=ink[all_styles["eager"].color], linewidth=1.5, linestyle=":")
            axes.plot([n], [limit], "o", markersize=7, markerfacecolor="none", color=ink[all_styles["eager"].color])
            axes.set_title(about, loc="right", color=ink["ink"], y=1.02 + _RAIL * len(rails), pad=6.0)
        _rails(axes, rails, "out of memory", "left", all_styles, ink, "x")
        if limit:
            _level(axes, limit, f"this machine’s memory, {figures.size(limit)}", ink)
            axes.set_ylim(top=max(axes.get_ylim()[1], 3 * limit))
        _log(axes.yaxis, *axes.get_ylim(), ticks)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")

    says += [about] if end else []
    return Panel(title, f"{title}: {name} against rows. {'; '.join(says)}.", frozenset([*series, *rails]), _images(draw))


def growth(lines: pd.DataFrame) -> float | None:
    """Bytes a row and a column, by least squares: memory = growth · N², for workloads of N × N."""
    square = lines[(lines.memory > 0) & (lines.rows == lines["columns"])]
    if square.rows.nunique() < 2:
        return None
    return float((square.memory * square.rows**2.0).sum() / (square.rows**4.0).sum())


def _end(lines: pd.DataFrame, limit: float | None) -> tuple[float, float, float] | None:
    """The N where eager's growth meets the limit, the last measured N, and the memory there."""
    eager = lines[(lines.variant == "eager") & lines.memory.notna()]
    rate = growth(eager)
    if not limit or rate is None:
        return None
    last, end = float(eager.rows.max()), math.sqrt(limit / rate)
    return (end, last, rate * last**2) if end > last else None


# Ratios


def speedups(results: Results) -> list[Panel]:
    """Each variant's time over ours, a panel a workload of the headlines."""
    all_styles, found = styles(tables.variants(results)), tables.lines(results)
    works = [work for _, work in found[found.headline].groupby("key", sort=False) if work.mine.any() and len(work) > 1]
    if not works or pd.concat(works).ratio.isna().all():
        return []
    every = pd.concat(works)
    span = min(1.0, every.low.min()) / 1.15, max(1.0, every.high.max()) * 1.15
    return [_ratios(work, all_styles, span) for work in works]


def _ratios(work: pd.DataFrame, all_styles: Mapping[str, Style], span: tuple[float, float]) -> Panel:
    mine = work[work.mine].iloc[0]
    others = work[~work.mine].sort_values("variant", key=lambda x: x.map(list(all_styles).index), kind="stable")
    rows = [(i, row) for i, row in enumerate(others.itertuples())]
    title = f"{mine.work}, {mine['dtype']}"
    says = [
        f"{x.variant}: {figures.ratio(x.ratio)} (middle half {figures.ratio(x.low)} to {figures.ratio(x.high)})"
        + (f", {x.note}" if x.note else "") if not x.why else f"{x.variant} {x.why}"
        for _, x in rows
    ]  # fmt: skip

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", xlim=span, ylim=(len(rows) - 0.5, -0.5), xlabel=f"time ÷ time of {mine.variant}")
        _log(axes.xaxis, *span, lambda x: f"{x:g}×")
        axes.axvline(1.0, color=ink["ink"], linewidth=1.1, zorder=2)
        axes.spines["left"].set_visible(False)
        names = [x.variant if len(x.variant) <= 24 else x.variant[:23] + "…" for _, x in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params("y", length=0, labelcolor=ink["ink"])
        for i, x in rows:
            if x.why:
                _note(axes, x.why.split(":")[0], (1.0, i), (8, 0), ink["soft"], "left", "center_baseline", "data")
                continue
            style = all_styles[x.variant]
            axes.plot([1.0, x.ratio], [i, i], color=ink["grid"], linewidth=1.0, zorder=1)
            axes.plot([x.low, x.high], [i, i], color=ink[style.color], linewidth=2.2, zorder=2)
            axes.plot([x.ratio], [i], **style.mark(ink))
            _note(axes, figures.ratio(x.ratio), (1.17, i), (0, 0), ink["ink"], "right", "center_baseline")

    text = f"{title}: time over that of {mine.variant}. {'; '.join(says)}."
    return Panel(title, text, frozenset(others.variant), _images(draw, height=48 + 24.0 * len(rows)))


# The roofline


def rooflines(results: Results) -> list[Panel]:
    """Rates on the fewest operations against operations a byte, under what this machine reached; a panel a
    dtype."""
    all_styles, found = styles(tables.variants(results)), tables.lines(results)
    found = found[found.headline & found.rate.notna() & found.intensity.notna()]
    groups = sorted(found.groupby("dtype", sort=False), key=lambda group: group[0] != "float32")
    return [_roofline(str(dtype), lines, results.ceilings, all_styles) for dtype, lines in groups]


def _roofline(dtype: str, lines: pd.DataFrame, ceilings: Mapping[str, float], all_styles: Mapping[str, Style]) -> Panel:
    peak, copy = ceilings.get(dtype), ceilings.get("copy")
    low, high = lines.intensity.min() / 2, lines.intensity.max() * 2
    if peak and copy:
        low = min(low, peak / copy / 10)
    works = lines.drop_duplicates("key").sort_values("intensity")
    several = works.title.duplicated(keep=False)
    labels = works.title.where(~several, works.title + " " + works.rows.astype(str)).tolist()
    levels = _staggered([math.log(x) for x in works.intensity], labels, math.log(high / low) / 300)
    top = max(lines.rate.max(), peak or 0.0) * 1.5
    least = min([lines.rate.min() / 1.4, *([low * copy] if peak and copy else [])])
    bottom = top * (least / top) ** (1 / (1 - (14 * max(levels) + 22) / 240))  # with room for the labels
    ordered = {v: lines[lines.variant == v] for v in all_styles if (lines.variant == v).any()}
    says = [
        f"{v}, {x.work}: {figures.rate(x.rate)} at {figures.number(x.intensity)} operations a byte"
        for v, points in ordered.items() for x in points.itertuples()
    ]  # fmt: skip

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top), xlabel="operations a byte")
        _title(axes, "FLOP/s, on the fewest operations")
        axes.grid(axis="y")
        _log(axes.xaxis, low, high, figures.plain)
        _log(axes.yaxis, least, top, EngFormatter(sep=""))
        if peak:
            ridge = peak / copy if copy else low
            axes.plot([low, ridge, high], [low * copy if copy else peak, peak, peak], color=ink["ink"], linewidth=1.3, zorder=2)
            _note(axes, f"torch.mm, {figures.rate(peak)}", (1.0, peak), (0, 4), ink["ink"], "right", "bottom")
        if peak and copy:
            _note(axes, f"copy, {figures.bandwidth(copy)}", (2 * low, 2 * low * copy), (8, -4), ink["ink"], "left", "top", "data")
        for x, level, label in zip(works.intensity, levels, labels, strict=True):
            foot = axes.get_xaxis_transform()
            axes.annotate(label, (x, 0), (0, 14 * level + 4), foot, "offset points", ha="center", va="bottom", color=ink["soft"])
            axes.axvline(x, color=ink["grid"], linewidth=1.0, zorder=0)
        for variant, points in ordered.items():
            axes.plot(points.intensity, points.rate, **all_styles[variant].mark(ink))

    return Panel(dtype, f"Roofline, {dtype}. {'; '.join(says)}.", frozenset(ordered), _images(draw, height=330))


def _staggered(xs: Sequence[float], labels: Sequence[str], pixel: float) -> list[int]:
    """For labels centred at `xs`, in order, the lowest row in which each is clear of the others."""
    ends: list[float] = []
    found = []
    for x, label in zip(xs, labels, strict=True):
        half = (3.6 * len(label) + 5) * pixel
        level = next((i for i, end in enumerate(ends) if x - half >= end), len(ends))
        ends[level : level + 1] = [x + half]
        found.append(level)
    return found


# Errors


def errors(results: Results, which: str) -> dict[str, list[Panel]]:
    """Panels of `which`, "gradient" or "loss", by kind of inputs, one a dtype: the error against temperature."""
    all_styles, found = styles(tables.variants(results)), tables.accuracy(results)
    found["error"] = found[f"{which}_error"]
    panels: dict[str, list[Panel]] = {str(kind): [] for kind in found.inputs.cat.categories}
    for dtype, every in sorted(found.groupby("dtype", observed=True), key=lambda group: group[0] != "float32"):
        for kind, here in every.groupby("inputs", observed=True):
            panels[str(kind)].append(_errors(which, str(dtype), str(kind), here, every, all_styles))
    return panels


def _errors(
    which: str, dtype: str, kind: str, here: pd.DataFrame, every: pd.DataFrame, all_styles: Mapping[str, Style]
) -> Panel:
    epsilon = _EPSILON.get(dtype)
    floor = min([*every.error[every.error > 0], epsilon or 1.0])
    here = here.assign(shown=here.error.clip(lower=floor)).sort_values("temperature")
    series = {v: here[here.variant == v] for v in all_styles if (here.variant == v).any()}
    worst = {v: x.groupby("temperature").shown.max().dropna() for v, x in series.items()}
    lost = {v: x[x.error.isna()] for v, x in series.items() if x.error.isna().any()}
    says = [
        f"{v}: " + ", ".join(f"at most {figures.error(y)} at temperature {figures.plain(t)}" for t, y in x.items())
        for v, x in worst.items() if len(x)
    ]  # fmt: skip
    says += [
        f"{v}, temperature {figures.plain(t)}: not finite ({figures.listed(sorted(x.unique()))})"
        for v, bad in lost.items() for t, x in bad.groupby("temperature").title
    ]  # fmt: skip

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", yscale="log", xlabel="temperature")
        axes.margins(0.04, 0.1)
        axes.grid(axis="y")
        _title(axes, f"relative error of the {which}", len(lost))
        axes.update_datalim([(t, y) for t, y in zip(every.temperature, every.error, strict=True) if y > 0])  # one scale
        if epsilon:
            _level(axes, epsilon, f"unit roundoff of {dtype}", ink, ":", above=False)
        for variant, points in series.items():
            if points.title.nunique() > 1:
                for _, loss in points.groupby("title"):
                    axes.plot(loss.temperature, loss.shown, color=ink[all_styles[variant].color], linewidth=0.8, alpha=0.4, zorder=1)
            axes.plot(worst[variant].index, worst[variant], **all_styles[variant].line(ink))
        _rails(axes, {v: x.temperature.unique().tolist() for v, x in lost.items()}, "NaN", "right", all_styles, ink)
        _log(axes.yaxis, *axes.get_ylim(), lambda y: f"{y:.0e}".replace("e-0", "e-").replace("e+00", ""))
        _log(axes.xaxis, every.temperature.min(), every.temperature.max(), figures.plain)

    text = f"{dtype}, {kind} inputs: error of the {which}. {'; '.join(says)}."
    return Panel(dtype, text, frozenset(series), _images(draw))
