"""`python -m cl_kernels compare A.json B.json`: what became slower from one run to another.

Machines differ from hour to hour, so by default a variant's time is taken as a multiple of its run's floor,
the plain products that were timed in the same rounds; `--against` names another variant, or "time" for
seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from ..tools.text import aligned
from . import figures
from .results import FLOOR, PHASES, Line, Results, load, median, named, ratio

SECONDS = "time"


@dataclass(frozen=True)
class Change:
    """One phase of one variant in both runs; `before` and `after` in seconds or as multiples."""

    line: Line
    phase: str
    before: float
    after: float
    threshold: float
    note: str = ""

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.note:
            return self.note
        if self.factor > self.threshold:
            return "slower"
        return "faster" if self.factor < 1 / self.threshold else "same"

    @property
    def is_regression(self) -> bool:
        return self.verdict == "slower" or self.verdict.startswith("lost")


def figure(line: Line, phase: str, lines: list[Line], against: str) -> float:
    """Seconds, or the multiple of the other variant's whole step, round by round; NaN where there is none."""
    samples = getattr(line, phase)
    if against == SECONDS:
        return median(samples)
    other = named(lines, against)
    return ratio(samples, other.both) if other else math.nan


def compare(
    before: Results,
    after: Results,
    threshold: float = 1.1,
    against: str = FLOOR,
    phases: tuple[str, ...] = ("both",),
    everything: bool = False,
) -> list[Change]:
    """Of our variants (`everything`: of all) that both runs have; what one of them does not have is left out,
    but a variant that was timed before and no longer gives a right answer is lost."""
    found, old_work, new_work = [], before.workloads(), after.workloads()
    for key, old_lines in old_work.items():
        for old in old_lines:
            new = named(new_work.get(key, []), old.variant)
            wanted = old.variant != against and (everything or old.is_ours)
            if new is None or not old.timed or not wanted:
                continue
            for phase in phases:
                if not new.timed:
                    found.append(Change(new, phase, math.nan, math.nan, threshold, f"lost: {new.status}"))
                elif getattr(old, phase) and getattr(new, phase):
                    was = figure(old, phase, old_lines, against)
                    now = figure(new, phase, new_work[key], against)
                    if math.isfinite(was) and math.isfinite(now):
                        found.append(Change(new, phase, was, now, threshold))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold", type=float, default=1.1, help="a factor from which on a time is slower (default 1.1)"
    )
    parser.add_argument(
        "--against",
        default=FLOOR,
        metavar="VARIANT",
        help=f"whose time in the same run is the unit (default {FLOOR}); '{SECONDS}' for seconds",
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["both"])
    parser.add_argument("--all", action="store_true", help="the peers as well")


def main(options: argparse.Namespace) -> int:
    """0: nothing is slower; 1: something is; 2: the files cannot be compared."""
    if options.threshold < 1:
        print(f"compare: the threshold is a factor of at least 1, got {options.threshold:g}", file=sys.stderr)
        return 2
    try:
        before, after = load(options.before), load(options.after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    changes = compare(before, after, options.threshold, options.against, tuple(options.phases), options.all)
    if not changes:
        print("compare: the two runs have no variant and workload in common", file=sys.stderr)
        return 2
    print(text(before, after, changes, options.against))
    return 1 if any(change.is_regression for change in changes) else 0


def text(before: Results, after: Results, changes: list[Change], against: str) -> str:
    show = figures.time if against == SECONDS else figures.ratio
    header = ("work", "dtype", "variant", "phase", "A", "B", "B / A", "")
    rows = [
        (x.line.work, x.line.dtype, x.line.variant, x.phase, show(x.before), show(x.after),
         figures.ratio(x.factor), x.verdict)
        for x in changes
    ]  # fmt: skip
    worse = sum(change.is_regression for change in changes)
    unit = "seconds" if against == SECONDS else f"multiples of the time of {against} in the same run"
    ours, theirs = before.machine.get("device"), after.machine.get("device")
    lines = [
        f"A {before.date}, {ours}",
        f"B {after.date}, {theirs}" + (" (another machine)" if ours != theirs else ""),
        f"In {unit}; slower from {changes[0].threshold:g}× on.",
        "",
        *aligned(header, rows, right=(4, 5, 6), indent=""),
        "",
        f"{worse} of {len(changes)} slower",
    ]
    return "\n".join(lines)
