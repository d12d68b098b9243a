"""The panels of a report: ratios, curves over the rows, the roofline, errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from . import figures
from .panels import Ink, Panel, Style, Styles, heading, log_axis, note

_EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def _by_style(lines: pd.DataFrame, styles: Styles) -> dict[Style, pd.DataFrame]:
    """The lines of each variant, in the order of the styles."""
    return {style: found for v, style in styles.items() if len(found := lines[lines.variant == v])}


def _dtypes(found: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = found.groupby("dtype", sort=False, observed=True)
    return sorted(groups, key=lambda group: group[0] != "float32")


def speedups(found: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Each variant's time over ours, a panel a workload of the headlines."""
    groups = found[found.headline].groupby("key", sort=False)
    works = [work for _, work in groups if work.mine.any() and len(work) > 1]
    every = pd.concat([found[:0], *works])
    if every.ratio.isna().all():
        return []
    span = min(1.0, every.low.min()) / 1.15, max(1.0, every.high.max()) * 1.15
    return [_ratios(work, styles, span) for work in works]


def _ratios(work: pd.DataFrame, styles: Styles, span: tuple[float, float]) -> Panel:
    mine, others = work[work.mine].iloc[0], _by_style(work[~work.mine], styles)
    title = f"{mine.work}, {mine['dtype']}"

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", xlim=span, ylim=(len(others) - 0.5, -0.5))
        axes.set_xlabel(f"time ÷ time of {mine.variant}")
        log_axis(axes.xaxis, *span, "{x:g}×")
        axes.axvline(1.0, color=ink["ink"], linewidth=1.1, zorder=2)
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        names = [x.variant.iloc[0] for x in others.values()]
        axes.set_yticks(range(len(names)), [x if len(x) <= 24 else x[:23] + "…" for x in names])
        axes.tick_params("y", length=0, labelcolor=ink["ink"])
        for i, (style, lines) in enumerate(others.items()):
            (x,) = lines.itertuples()
            if x.why:
                note(axes, x.why.split(":")[0], (1.0, i), (8, 0), xycoords="data")
                continue
            axes.plot([1.0, x.ratio], [i, i], color=ink["grid"], linewidth=1.0, zorder=1)
            axes.plot([x.low, x.high], [i, i], color=ink[style.color], linewidth=2.2, zorder=2)
            axes.plot([x.ratio], [i], **style.mark(ink))
            note(axes, figures.ratio(x.ratio), (1.2, i), (0, 0), ha="right", color=ink["ink"])

    what = f"{title}: time over that of {mine.variant}"
    return Panel(title, what, draw, size=(380, 48 + 24.0 * len(others)))


def times(found: pd.DataFrame, styles: Styles) -> list[Panel]:
    """Forward and backward against rows, a panel a loss and dtype that was timed at two sizes or more."""
    return _curves("forward + backward", found.assign(value=found.seconds), styles, EngFormatter("s"))


def memories(found: pd.DataFrame, styles: Styles, limit: float | None) -> list[Panel]:
    """Peak memory against rows, the machine's memory, and where eager's growth meets it."""
    found = found.assign(value=found.memory.clip(lower=4096.0))  # a page, where the peak stayed
    return _curves("peak memory", found, styles, EngFormatter("B"), limit)


def _curves(
    name: str, found: pd.DataFrame, styles: Styles, ticks: EngFormatter, limit: float | None = None
) -> list[Panel]:
    groups = [
        group.sort_values("rows")
        for _, lines in _dtypes(found)
        for _, group in lines.groupby(["loss", "width"], sort=False)
    ]
    several = [group for group in groups if group.rows[group.value.notna()].nunique() > 1]
    return [_curve(name, group, styles, ticks, limit) for group in several]


def _curve(name: str, lines: pd.DataFrame, styles: Styles, ticks: EngFormatter, limit: float | None) -> Panel:
    series = _by_style(lines[lines.value.notna()], styles)
    lost = lines[lines.why.str.lower().str.contains("out of memory")]
    rails = {style: x.rows.tolist() for style, x in _by_style(lost, styles).items()}
    first, end = lines.iloc[0], _end(lines, limit)
    title = f"{first.title}, {first['dtype']}, D = {first.width}"
    about = f"{name}\neager runs out at N ≈ {float(f'{end[0]:.1e}'):.0f}, extrapolated" if end else name

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", yscale="log", xlabel="rows N")
        axes.margins(0.04, 0.08)
        for style, points in series.items():
            axes.plot(points.rows, points.value, **style.line(ink))
        if end:
            n, last, at_last = end
            eager = ink[styles["eager"].color]
            axes.plot([last, n], [at_last, limit or 0.0], color=eager, linewidth=1.5, linestyle=":")
            axes.plot([n], [limit or 0.0], "o", markersize=7, markerfacecolor="none", color=eager)
        heading(axes, about, rails, "out of memory", 0.02, ink, marker="x", markeredgewidth=2.0)
        if limit:
            axes.axhline(limit, color=ink["soft"], linewidth=1.0, zorder=1)
            note(axes, f"this machine’s memory, {figures.size(limit)}", (0, limit), (4, 3), va="bottom")
            axes.set_ylim(top=max(axes.get_ylim()[1], 3 * limit))
        log_axis(axes.yaxis, *axes.get_ylim(), ticks)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")

    return Panel(title, f"{title}: {name} against rows", draw, [*series, *rails])


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


def rooflines(found: pd.DataFrame, styles: Styles, ceilings: Mapping[str, float]) -> list[Panel]:
    """Rates on the fewest operations against operations a byte, under what this machine reached; a panel a
    dtype."""
    found = found[found.headline & found.rate.notna() & found.intensity.notna()]
    return [_roofline(dtype, lines, ceilings, styles) for dtype, lines in _dtypes(found)]


def _roofline(dtype: str, lines: pd.DataFrame, ceilings: Mapping[str, float], styles: Styles) -> Panel:
    peak, copy = ceilings.get(dtype, 0.0), ceilings.get("copy", 0.0)
    low, high = lines.intensity.min() / 2, lines.intensity.max() * 2
    if peak and copy:
        low = min(low, peak / copy / 10)
    works = lines.drop_duplicates("key").sort_values("intensity")
    several = works.title.duplicated(keep=False)
    labels = works.title.mask(several, works.title + " " + works.rows.astype(str))
    levels = _staggered([math.log(x) for x in works.intensity], labels, math.log(high / low) / 300)
    top, least = max(lines.rate.max(), peak) * 1.5, min(lines.rate.min() / 1.4, low * copy or math.inf)
    bottom = top * (least / top) ** (1 / (1 - (14 * max(levels) + 22) / 240))  # with room for the labels
    series = _by_style(lines, styles)

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top), xlabel="operations a byte")
        axes.set_title("FLOP/s, on the fewest operations")
        log_axis(axes.xaxis, low, high, lambda x, _: figures.plain(x))
        log_axis(axes.yaxis, least, top, EngFormatter())
        if peak and copy:
            roof = [low * copy, peak, peak]
            axes.plot([low, peak / copy, high], roof, color=ink["ink"], linewidth=1.3, zorder=2)
            label = f"torch.mm, {figures.rate(peak)}"
            note(axes, label, (1.0, peak), (0, 4), ha="right", va="bottom", color=ink["ink"])
            label, at = f"copy, {figures.bandwidth(copy)}", (2 * low, 2 * low * copy)
            note(axes, label, at, (8, -4), va="top", xycoords="data", color=ink["ink"])
        for x, row, label in zip(works.intensity, levels, labels, strict=True):
            where = ("data", "axes fraction")
            note(axes, label, (x, 0), (0, 14 * row + 4), ha="center", va="bottom", xycoords=where)
            axes.axvline(x, color=ink["grid"], linewidth=1.0, zorder=0)
        for style, points in series.items():
            axes.plot(points.intensity, points.rate, **style.mark(ink))

    return Panel(dtype, f"Roofline, {dtype}", draw, series, size=(380, 330))


def _staggered(xs: Sequence[float], labels: Sequence[str], pixel: float) -> list[int]:
    """For labels centred at `xs`, in order, the lowest row in which each is clear of the others."""
    ends: list[float] = []
    found = []
    for x, label in zip(xs, labels, strict=True):
        half = (3.6 * len(label) + 5) * pixel
        row = next((i for i, end in enumerate(ends) if x - half >= end), len(ends))
        ends[row : row + 1] = [x + half]
        found.append(row)
    return found


def errors(found: pd.DataFrame, styles: Styles) -> dict[str, list[Panel]]:
    """Errors against temperature: of gradients and losses, by kind of inputs, a panel a dtype."""
    panels: dict[str, list[Panel]] = {}
    for which in ("gradient", "loss"):
        for _, every in _dtypes(found.assign(error=found[f"{which}_error"])):
            for kind, here in every.groupby("inputs", observed=True):
                panel = _errors(f"error of the {which}", here, every, styles)
                panels.setdefault(f"The {which}, {kind} inputs", []).append(panel)
    return panels


def _power(value: float, _: int) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def _errors(name: str, here: pd.DataFrame, every: pd.DataFrame, styles: Styles) -> Panel:
    dtype, kind = here["dtype"].iloc[0], here.inputs.iloc[0]
    epsilon = _EPSILON.get(dtype)
    shown = [*every.error[every.error > 0], epsilon or 1.0]
    least, most = min(shown), max(shown)
    here = here.assign(shown=here.error.clip(lower=least)).sort_values("temperature")
    series, lost = _by_style(here, styles), _by_style(here[here.error.isna()], styles)
    rails = {style: x.temperature.unique().tolist() for style, x in lost.items()}

    def draw(axes: Axes, ink: Ink) -> None:
        axes.set(xscale="log", yscale="log", xlabel="temperature", ylim=(least / 1.6, most * 1.6))
        for style, points in series.items():
            for _, loss in points.groupby("title"):
                color = ink[style.color]
                axes.plot(loss.temperature, loss.shown, color=color, linewidth=0.8, alpha=0.4, zorder=1)
            worst = points.groupby("temperature").shown.max().dropna()
            axes.plot(worst.index, worst, **style.line(ink))
        if epsilon:
            axes.axhline(epsilon, color=ink["soft"], linewidth=1.0, linestyle=":", zorder=1)
            note(axes, f"unit roundoff of {dtype}", (0, epsilon), (4, -3), va="top")
        heading(axes, f"relative {name}", rails, "NaN", 0.9, ink)
        log_axis(axes.yaxis, *axes.get_ylim(), _power)
        log_axis(axes.xaxis, every.temperature.min(), every.temperature.max(), lambda x, _: figures.plain(x))

    return Panel(dtype, f"{dtype}, {kind} inputs: {name}", draw, series)
