"""`python -m cl_kernels compare A.json B.json`: what became slower from one run to another, in multiples of
each run's floor, since machines differ from hour to hour."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from . import figures, tables, terminal
from .results import FLOOR, PHASES, Results, load, median, ratio

SECONDS = "time"


def _values(name: str, results: Results, against: str, phases: Sequence[str]) -> pd.DataFrame:
    """The lines once for every phase, with a value under `name`: seconds, or the multiple of the other
    variant's whole step, round by round; NaN where there is none."""
    lines = tables.lines(results)
    others = lines[lines.variant == against]
    unit = dict(zip(others.key, others.both, strict=True))
    kept = ["key", "work", "dtype", "variant", "ours", "status", "seconds"]
    found = lines.melt(kept, list(phases), "phase")
    pairs = zip(found.value, found.key, strict=True)
    found[name] = [median(x) if against == SECONDS else ratio(x, unit.get(key, ())) for x, key in pairs]
    return found


def compare(
    before: Results,
    after: Results,
    threshold: float = 1.1,
    against: str = FLOOR,
    phases: Sequence[str] = ("both",),
    everything: bool = False,
) -> pd.DataFrame:
    """Our variants (`everything`: all) that both runs have, a row for every phase: `before` and `after` in
    seconds or as multiples, their `factor`, a `verdict`, and whether that is a `regression`. A variant that
    was timed before and no longer gives a right answer is lost; what else one of the runs does not have is
    left out."""
    old, new = _values("before", before, against, phases), _values("after", after, against, phases)
    on = ["key", "variant", "phase"]
    found = old.loc[old.seconds.notna(), [*on, "before"]].merge(new, on=on)
    found = found[(found.variant != against) & (found.ours | everything)]
    found["factor"] = found.after / found.before
    lost, slower, faster = found.seconds.isna(), found.factor > threshold, found.factor < 1 / threshold
    verdicts = ["lost: " + found.status, "slower", "faster"]
    found["verdict"] = np.select([lost, slower, faster], verdicts, "same")
    found["regression"] = lost | slower
    return found[lost | found.factor.notna()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("before", type=Path, metavar="A.json")
    add("after", type=Path, metavar="B.json")
    add("--threshold", type=float, default=1.1, help="a factor from which on a time is slower (default 1.1)")
    unit = f"whose time in the same run is the unit (default {FLOOR}); '{SECONDS}' for seconds"
    add("--against", default=FLOOR, metavar="VARIANT", help=unit)
    add("--phases", nargs="+", choices=PHASES, default=["both"])
    add("--all", action="store_true", help="the peers as well")


def main(options: argparse.Namespace) -> int:
    """0: nothing is slower; 1: something is; 2: the files cannot be compared."""
    try:
        if options.threshold < 1:
            raise ValueError(f"the threshold is a factor of at least 1, got {options.threshold:g}")
        before, after = load(options.before), load(options.after)
        changes = compare(before, after, options.threshold, options.against, options.phases, options.all)
        if changes.empty:
            raise ValueError("the two runs have no variant and workload in common")
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    show(before, after, changes, options.threshold, options.against)
    return 1 if changes.regression.any() else 0


def show(
    before: Results, after: Results, changes: pd.DataFrame, threshold: float, against: str = FLOOR
) -> None:
    unit, write = f"multiples of the time of {against} in the same run", figures.ratio
    if against == SECONDS:
        unit, write = "seconds", figures.time
    ours, theirs = before.machine.get("device"), after.machine.get("device")
    print(f"A {before.date}, {ours}")
    print(f"B {after.date}, {theirs}" + (" (another machine)" if ours != theirs else ""))
    print(f"In {unit}; slower from {threshold:g}× on.")
    words = ["work", "dtype", "variant", "phase"]
    columns = {"A": changes.before.map(write), "B": changes.after.map(write)}
    columns |= {"B / A": changes.factor.map(figures.ratio), "": changes.verdict}
    terminal.table(changes[words].assign(**columns), [*words, ""])
    print(f"{changes.regression.sum()} of {len(changes)} slower")
