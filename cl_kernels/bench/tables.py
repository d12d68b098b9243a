"""What the reports say in words and tables, as text: HTML and Markdown differ only in how they set it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import figures
from .results import (
    FLOOR,
    OURS,
    PHASES,
    Accuracy,
    Line,
    Results,
    median,
    named,
    ours,
    quartiles,
    ratio,
)

BUSY = 0.25
"""The load a core, before the first measurement, from which on a machine counts as busy."""


@dataclass(frozen=True)
class Cell:
    text: str
    detail: str = ""  # the spread, in smaller type or brackets


@dataclass(frozen=True)
class Row:
    """`status` stands in place of the times of a variant that has none."""

    line: Line
    times: tuple[Cell, ...]
    rest: tuple[Cell, ...]
    status: str
    note: str


@dataclass(frozen=True)
class Table:
    """The variants of one workload."""

    work: str
    dtype: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class AccuracyRow:
    dtype: str
    inputs: str
    variant: str
    cells: tuple[Cell, ...]  # one a temperature


_FIRST = (
    "device",
    "kind",
    "cores",
    "threads",
    "memory_bytes",
    "governor",
    "load_before",
    "load_after",
    "torch",
)
TIME_COLUMNS = ("forward", "backward", "both", "speed-up", "rate", "of torch.mm")
REST_COLUMNS = ("peak memory", "loss error", "gradient error")


def summary(results: Results) -> str:
    """The first workload that we have a time for, in a sentence: against eager, torch.compile, and whichever
    peer was fastest."""
    for lines in results.headlines():
        mine = ours(lines)
        if mine is None:
            continue
        peers = [x for x in lines if x.timed and not x.is_ours and x.variant != FLOOR]
        chosen = [x for x in peers if x.variant in ("eager", "torch.compile")]
        fastest = min(peers, key=lambda x: x.seconds, default=None)
        if fastest is not None and fastest not in chosen:
            chosen.append(fastest)
        text = f"{mine.work} {mine.dtype}: {figures.time(mine.seconds)} forward and backward"
        than = [f"{figures.ratio(ratio(x.both, mine.both))} of {_noted(x)}" for x in chosen]
        if than:
            text += ", " + figures.listed(than).replace("× of", "× the speed of", 1)
        share = _share(mine, named(lines, FLOOR))
        if figures.known(share):
            text += f", at {figures.number(share)} of the rate of torch.mm"
        return text + "."
    return f"No headline workload has a time of {OURS}."


def _noted(line: Line) -> str:
    return f"{line.variant} ({line.note})" if line.note else line.variant


def machine(results: Results) -> list[tuple[str, str]]:
    """Names and values of what is known about the machine and the run. Keys that are not known come last."""
    facts = results.machine
    order = [key for key in _FIRST if key in facts] + [key for key in facts if key not in _FIRST]
    found = [(_label(key), _value(key, facts[key])) for key in order if _filled(facts[key])]
    rates = [f"{dtype} {figures.rate(x)}" for dtype, x in results.ceilings.items() if dtype != "copy"]
    if rates:
        found.append(("torch.mm here", ", ".join(rates)))
    if "copy" in results.ceilings:
        found.append(("copy here", f"{figures.bandwidth(results.ceilings['copy'])} read and written"))
    if results.date:
        found.append(("date", results.date.replace("T", " ")))
    if results.command:
        found.append(("command", results.command))
    if results.seconds:
        found.append(("took", figures.duration(results.seconds)))
    return found


def busy(results: Results) -> str:
    """A warning where other programs were running when the benchmark began; else nothing."""
    before, cores = results.machine.get("load_before"), results.machine.get("cores")
    load = before[0] if isinstance(before, Sequence) and before and not isinstance(before, str) else before
    if not isinstance(load, (int, float)) or not isinstance(cores, int) or load <= BUSY * cores:
        return ""
    return (
        f"This machine was busy: its load was {figures.short(figures.number(load))} on {cores} cores before "
        "the first measurement. Trust the ratios more than the times, and neither very far."
    )


def has_graphs(results: Results) -> bool:
    return any(line.graph for lines in results.headlines() for line in lines)


def time_columns(results: Results) -> tuple[str, ...]:
    if not has_graphs(results):
        return TIME_COLUMNS
    return (*TIME_COLUMNS[:3], "CUDA graph", *TIME_COLUMNS[3:])


def headlines(results: Results) -> list[Table]:
    return [_table(lines, has_graphs(results)) for lines in results.headlines()]


def everything(results: Results) -> list[Table]:
    graphs = has_graphs(results)
    return [_table(lines, graphs) for lines in results.workloads().values()]


def untimed(results: Results) -> list[tuple[str, str, str]]:
    """Variant, reason and works of what has no time, together where variant and reason are the same."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in results.lines:
        if why := reason(line):
            groups.setdefault((line.variant, why), []).append(line)
    return [(variant, why, _works(lines)) for (variant, why), lines in groups.items()]


def temperatures(results: Results) -> list[float]:
    return sorted({x.temperature for x in results.accuracy})


def accuracy(results: Results) -> list[AccuracyRow]:
    """The largest gradient error over the losses, by dtype, inputs, variant and temperature; the cell says of
    how many losses it is not finite."""
    groups: dict[tuple[str, str, str], list[Accuracy]] = {}
    for x in results.accuracy:
        groups.setdefault((x.dtype, x.inputs, x.variant), []).append(x)
    order = list(dict.fromkeys(x.dtype for x in results.accuracy))
    found = []
    for dtype, inputs, variant in sorted(groups, key=lambda key: (order.index(key[0]), key[1] != "random")):
        at = groups[dtype, inputs, variant]
        cells = tuple(_worst([x for x in at if x.temperature == t]) for t in temperatures(results))
        found.append(AccuracyRow(dtype, inputs, variant, cells))
    return found


def reason(line: Line) -> str:
    """Why a line has no time; empty where it has one."""
    if line.status != "ok":
        return line.status
    return "" if line.timed else "no samples"


def _works(lines: Sequence[Line]) -> str:
    """float32, N = 512, 1024: SupCon, NT-Xent; float32, 512 × 65537: SCE."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        size = f"N = {line.rows}" if line.rows == line.columns else f"{line.rows} × {line.columns}"
        sizes.setdefault((line.title, line.dtype), []).append(size)
    titles: dict[str, list[str]] = {}
    for (title, dtype), found in sizes.items():
        several = ", ".join(dict.fromkeys(found)).replace(", N = ", ", ")
        titles.setdefault(f"{dtype}, {several}", []).append(title)
    return "; ".join(f"{where}: {', '.join(found)}" for where, found in titles.items())


def _worst(found: list[Accuracy]) -> Cell:
    if not found:
        return Cell(figures.MISSING)
    finite = [x for x in found if figures.known(x.gradient_error)]
    lost = len(found) - len(finite)
    if not finite:
        return Cell("NaN")
    worst = max(finite, key=lambda x: x.gradient_error or 0.0)
    return Cell(figures.error(worst.gradient_error), f"NaN in {lost} of {len(found)}" if lost else "")


def _table(lines: list[Line], graphs: bool) -> Table:
    first, mine = lines[0], ours(lines)
    floor = named(lines, FLOOR)
    return Table(first.work, first.dtype, tuple(_row(line, mine, floor, graphs) for line in lines))


def _row(line: Line, mine: Line | None, floor: Line | None, graphs: bool) -> Row:
    phases = (*PHASES, "graph") if graphs else PHASES
    cells = [_samples(getattr(line, phase)) for phase in phases]
    if mine is None or line is mine or not line.timed:
        cells.append(Cell(""))
    else:
        cells.append(Cell(figures.ratio(ratio(line.both, mine.both))))
    cells.append(Cell(figures.rate(_rate(line))))
    cells.append(Cell(figures.number(_share(line, floor))))
    rest = (
        Cell(figures.size(line.memory)),
        Cell(figures.error(line.loss_error)),
        Cell(figures.error(line.gradient_error)),
    )
    return Row(line, tuple(cells), rest, reason(line), line.note)


def _samples(samples: tuple[float, ...]) -> Cell:
    if not samples:
        return Cell(figures.MISSING)
    return Cell(figures.time(median(samples)), figures.times(*quartiles(samples)) if len(samples) > 1 else "")


def _rate(line: Line) -> float | None:
    return line.flops_per_second if line.timed and figures.known(line.flops) else None


def _share(line: Line, floor: Line | None) -> float | None:
    """Of the rate of the plain products of the same size, timed in the same rounds."""
    if floor is None or line is floor or not line.timed or not floor.timed:
        return None
    return ratio(floor.both, line.both)


def paired(line: Line, mine: Line) -> tuple[float, float, float]:
    """First quartile, median and third quartile of a variant's time over ours, round by round."""
    rounds = [a / b for a, b in zip(line.both, mine.both, strict=False)]
    low, high = quartiles(rounds)
    return low, ratio(line.both, mine.both), high


def variants(results: Results) -> list[str]:
    """Ours first, the floor last, the others as they came."""
    found = dict.fromkeys([x.variant for x in results.lines] + [x.variant for x in results.accuracy])
    return sorted(found, key=lambda name: (name == FLOOR) - (name.split(" ")[0] == OURS))


def growth(lines: Sequence[Line]) -> float | None:
    """Bytes a row and a column, by least squares: memory = growth · N², for workloads of N × N."""
    points = [(float(x.rows), x.memory) for x in lines if x.memory and x.rows == x.columns]
    if len(points) < 2 or len({n for n, _ in points}) < 2:
        return None
    return sum(memory * n**2 for n, memory in points) / sum(n**4 for n, _ in points)


def _filled(value: Any) -> bool:
    return value is not None and value != "" and value != {} and value != []


def _label(key: str) -> str:
    known = {"memory_bytes": "memory", "load_before": "load before", "load_after": "load after"}
    return known.get(key, key.removesuffix("_bytes").replace("_", " "))


def _value(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(str(k), v)}" for k, v in value.items() if _filled(v))
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(key, x) for x in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return figures.size(value)
    return figures.short(figures.number(value)) if isinstance(value, float) else str(value)
