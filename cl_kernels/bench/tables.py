"""The words and tables of the reports: results as data frames, of figures and of text.

A cell of text may have a second line, the spread, which Markdown sets in brackets and HTML in smaller type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd

from . import figures
from .results import FLOOR, OURS, PHASES, Accuracy, Line, Results, median

BUSY = 0.25  # the load a core, before the first measurement, from which on a machine counts as busy
QUARTILES = (0.25, 0.5, 0.75)
_NUMBERS = ("flops", "bytes", "memory", "loss_error", "gradient_error")
_FIRST = ("device", "kind", "cores", "threads", "memory_bytes", "governor", "load_before", "load_after",
          "torch")  # fmt: skip


def lines(results: Results) -> pd.DataFrame:
    """A row for each line, those of a workload together: its fields; `work`, `key`, `ours`; `why` there is no
    time; `seconds`, the median of forward and backward; `rate`, operations a second; `intensity`, those a
    byte; `low`, `ratio`, `high`, the quartiles of its time over that of our fastest variant, which is `mine`,
    round by round; and `share`, its rate over the floor's."""
    records = [asdict(x) | {"work": x.work, "key": x.key, "ours": x.is_ours} for x in results.lines]
    found = pd.DataFrame(records, columns=[*(f.name for f in fields(Line)), "work", "key", "ours"])
    found = found.astype({**dict.fromkeys(_NUMBERS, float), "ours": bool, "headline": bool})
    found["seconds"] = found.both.map(median).astype(float)
    found["why"] = found.status.where(found.status != "ok", "").astype(object)
    found.loc[(found.why == "") & found.seconds.isna(), "why"] = "no samples"
    found["rate"] = found.flops / found.seconds
    found["intensity"] = (found.flops / found.bytes).replace(np.inf, np.nan)
    columns = {"mine": bool, "low": float, "ratio": float, "high": float, "share": float}
    compared = [_compared(work) for _, work in found.groupby("key", sort=False)]
    return pd.concat([found[:0].assign(**dict.fromkeys(columns)), *compared]).astype(columns)


def _compared(work: pd.DataFrame) -> pd.DataFrame:
    rounds = pd.DataFrame({i: pd.Series(x, dtype=float) for i, x in work.both.items()})
    ours, floor = work.seconds[work.ours].dropna(), work.index[work.variant == FLOOR]
    mine = pd.Series(work.index == (ours.idxmin() if len(ours) else None), work.index)
    over = rounds.div(rounds[mine.index[mine]].sum(axis=1, min_count=1), axis=0).quantile(list(QUARTILES)).T
    over[mine] = np.nan
    share = rounds.rdiv(rounds[floor].sum(axis=1, min_count=1), axis=0).median()
    share[floor] = np.nan
    return work.assign(mine=mine, share=share, low=over[0.25], ratio=over[0.5], high=over[0.75])


def accuracy(results: Results) -> pd.DataFrame:
    """A row for each measured error; dtypes as they came, random inputs first."""
    records = [asdict(x) for x in results.accuracy]
    found = pd.DataFrame(records, columns=[f.name for f in fields(Accuracy)])
    found = found.astype({"loss_error": float, "gradient_error": float, "temperature": float})
    for name in ("dtype", "inputs", "variant"):
        order = sorted(found[name].unique(), key=lambda value: value != "random")
        found[name] = pd.Categorical(found[name], order, ordered=True)
    return found


def variants(results: Results) -> list[str]:
    """Ours first, the floor last, the others as they came."""
    found = dict.fromkeys([x.variant for x in results.lines] + [x.variant for x in results.accuracy])
    return sorted(found, key=lambda name: (name == FLOOR) - (name.split(" ")[0] == OURS))


def measured(found: pd.DataFrame) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Lines with columns of text; the names of the columns that need a time, and of those that do not."""
    timed: dict[str, tuple[str, Callable[[Any], str]]] = {phase: (phase, _samples) for phase in PHASES}
    if found.graph[found.headline].astype(bool).any():
        timed["CUDA graph"] = ("graph", _samples)
    timed["speed-up"] = ("ratio", lambda x: figures.ratio(x) if figures.known(x) else "")
    timed["rate"] = ("rate", figures.rate)
    timed["of torch.mm"] = ("share", figures.number)
    rest = {
        "peak memory": ("memory", figures.size),
        "loss error": ("loss_error", figures.error),
        "gradient error": ("gradient_error", figures.error),
    }
    text = {name: found[column].map(write) for name, (column, write) in (timed | rest).items()}
    kept = found[["key", "work", "dtype", "temperature", "headline", "variant", "note", "ours", "why"]]
    return kept.assign(**text), list(timed), list(rest)


def _samples(samples: Sequence[float]) -> str:
    if not samples:
        return figures.MISSING
    low, middle, high = np.quantile(samples, QUARTILES)
    return figures.time(middle) + (f"\n{figures.time(low, high)}" if len(samples) > 1 else "")


def untimed(found: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Variant, reason and works of what has no time, together where variant and reason are the same."""
    groups = found[found.why != ""].groupby(["variant", "why"], sort=False)
    return [(variant, why, _works(group)) for (variant, why), group in groups]


def _works(found: pd.DataFrame) -> str:
    """float32, N = 512, 1024: SupCon, NT-Xent; float32, 512 × 65537: SCE."""
    square, rows = found.rows == found["columns"], found.rows.astype(str)
    size = ("N = " + rows).where(square, rows + " × " + found["columns"].astype(str))
    several = size.groupby([found.title, found["dtype"]], sort=False).agg(lambda x: ", ".join(x.unique()))
    where = several.index.get_level_values("dtype") + ", " + several.str.replace(", N = ", ", ")
    titles = several.reset_index().groupby(where.to_numpy(), sort=False).title.agg(", ".join)
    return "; ".join(f"{place}: {names}" for place, names in titles.items())


def errors(found: pd.DataFrame) -> pd.DataFrame:
    """The largest gradient error over the losses as text, by dtype, inputs and variant, a column for every
    temperature; a cell says of how many losses it is not finite."""
    groups = found.groupby(["dtype", "inputs", "variant", "temperature"], observed=True)
    return groups.gradient_error.agg(_worst).unstack("temperature", fill_value=figures.MISSING)


def _worst(found: pd.Series) -> str:
    lost = int(found.isna().sum())
    if lost == len(found):
        return "NaN"
    return figures.error(found.max()) + (f"\nNaN in {lost} of {len(found)}" if lost else "")


def summary(found: pd.DataFrame) -> str:
    """The first workload that we have a time for, in a sentence: against eager, torch.compile, and whichever
    peer was fastest."""
    timed = found[found.headline & found.mine]
    if timed.empty:
        return f"No headline workload has a time of {OURS}."
    mine = timed.iloc[0]
    peers = found[(found.key == mine.key) & found.seconds.notna() & ~found.ours & (found.variant != FLOOR)]
    chosen = peers.variant.isin(["eager", "torch.compile"]) | (peers.seconds == peers.seconds.min())
    than = [
        f"{figures.ratio(x.ratio)} of {x.variant}" + (f" ({x.note})" if x.note else "")
        for x in peers[chosen].itertuples()
    ]
    text = f"{mine.work} {mine['dtype']}: {figures.time(mine.seconds)} forward and backward"
    if than:
        text += ", " + figures.listed(than).replace("× of", "× the speed of", 1)
    if figures.known(mine.share):
        text += f", at {figures.number(mine.share)} of the rate of torch.mm"
    return text + "."


def machine(results: Results) -> list[tuple[str, str]]:
    """Names and values of what is known about the machine and the run. Keys that are not known come last."""
    facts, copy = dict.fromkeys(_FIRST) | results.machine, results.ceilings.get("copy")
    rates = [f"{dtype} {figures.rate(x)}" for dtype, x in results.ceilings.items() if dtype != "copy"]
    found = [(key.removesuffix("_bytes").replace("_", " "), _fact(key, x)) for key, x in facts.items()]
    found += [
        ("torch.mm here", ", ".join(rates)),
        ("copy here", f"{figures.bandwidth(copy)} read and written" if copy else ""),
        ("date", results.date.replace("T", " ")),
        ("command", results.command),
        ("took", str(timedelta(seconds=round(results.seconds))) if results.seconds else ""),
    ]
    return [(name, value) for name, value in found if value]


def _fact(key: str, value: Any) -> str:
    if value and key.endswith("_bytes"):
        return figures.size(value)
    return figures.plain(value) if isinstance(value, float) else str(value or "")


def busy(results: Results) -> str:
    """A warning where other programs were running when the benchmark began; else nothing."""
    load, cores = results.machine.get("load_before", 0.0), results.machine.get("cores") or 1
    if load <= BUSY * cores:
        return ""
    return (
        f"This machine was busy: its load was {figures.plain(load)} on {cores} cores before "
        "the first measurement. Trust the ratios more than the times, and neither very far."
    )
