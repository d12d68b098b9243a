"""The speed and memory measures that a release is held to, in one table: `python bench/acceptance.py`.

Every ratio comes from one run in which the variants take turns, as the median of the ratios round by round. A
variant's loss and gradients are checked against float64 first: a wrong answer gets no time. Exits with 1 if a
line misses its target. Wait for an idle machine: the load is printed with the result.

The floor of a measure is as many plain `torch.mm`, into memory that is there, as its fewest operations are
worth.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cl_kernels.bench import fresh, machine, results, run, timing
from cl_kernels.bench.results import FLOOR, OURS, Line, ratio
from cl_kernels.bench.variants import CHUNKED, COMPILED, EAGER
from cl_kernels.bench.workloads import Workload

MB = 1e6


@dataclass(frozen=True)
class Measure:
    """One line of the table. `target` None: for information."""

    group: str
    measure: str
    value: float
    unit: str
    relation: str = ""
    target: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        met = self.value <= self.target if self.relation == "<=" else self.value >= self.target
        return "pass" if met else "FAIL"

    def show(self) -> str:
        target = "" if self.target is None else f"{self.relation} {self.target:g}"
        value = "none" if math.isnan(self.value) else f"{self.value:.2f}"
        figure = f"{value:>9} {self.unit:<4}{target:>9}  {self.verdict:<5}"
        return f"{self.group:<36}{self.measure:<40}{figure}{self.note}".rstrip()


class Report:
    def __init__(self, rounds: int) -> None:
        self.plan = run.Plan((), peers=(), rounds=rounds, memory=False, study=False)
        self.measures: list[Measure] = []

    def add(self, measure: Measure) -> None:
        self.measures.append(measure)
        print(measure.show(), flush=True)

    def times(self, work: Workload, *names: str) -> dict[str, Line]:
        """Lines of ours, of the peers of these names and of the floor, with the median of each."""
        plan = replace(self.plan, peers=names)
        lines = {line.variant: line for line in run.measure(plan, work, seconds=300.0)}
        for line in lines.values():
            note = line.status if line.status != "ok" else line.note
            self.add(Measure(work.name, line.variant, 1e3 * line.seconds, "ms", note=note))
        return lines

    def ratio(
        self, work: Workload, what: str, over: Line | None, under: Line | None, relation: str, target: float
    ) -> None:
        """Without samples (a wrong answer, no such peer) there is no figure, and the measure is missed."""
        value = ratio(over.both, under.both) if over and under else math.nan
        self.add(Measure(work.name, what, value, "x", relation, target))


def supcon_work(rows: int, dtype: str = "float32") -> Workload:
    return Workload("supcon", rows, rows, 128, dtype)


def supcon(report: Report) -> None:
    work = supcon_work(4096)
    lines = report.times(work, EAGER)
    report.ratio(work, "ours / 2 mm", lines[OURS], lines[FLOOR], "<=", 1.1)
    work = supcon_work(8192)
    lines = report.times(work, EAGER, COMPILED, CHUNKED)
    report.ratio(work, "ours / 2 mm", lines[OURS], lines[FLOOR], "<=", 1.1)
    for name, target in ((EAGER, 8.0), (COMPILED, 2.5), (CHUNKED, 1.8)):
        report.ratio(work, f"{name} / ours", lines.get(name), lines[OURS], ">=", target)


def in_turn(plan: run.Plan, works: Sequence[Workload], variant: str) -> list[Line]:
    """The lines of one variant on several workloads, which take turns as variants do."""
    lines = [next(x for x in run.checked(plan, work) if x.variant == variant) for work in works]
    cache = machine.cache(plan.device)
    steps = {
        str(i): run.steps_of(plan, work, variant, timing.copies(work, plan.device, cache))
        for i, work in enumerate(works)
        if lines[i].status == "ok"
    }
    for i, samples in timing.interleaved(steps, plan.device, plan.rounds).items():
        lines[int(i)] = run.timed(plan, works[int(i)], lines[int(i)], samples)
    return lines


def half(report: Report) -> None:
    """Both dtypes take turns."""
    fast = machine.multiplies_bfloat16("cpu")
    for rows in (4096, 8192):
        work = supcon_work(rows, "bfloat16")
        single, rounded = in_turn(report.plan, [supcon_work(rows), work], OURS)
        note = rounded.status if rounded.status != "ok" else ""
        report.add(Measure(work.name, OURS, 1e3 * rounded.seconds, "ms", note=note))
        report.ratio(work, "ours f32 / ours bf16", single, rounded, ">=", 1.4 if fast else 1.0)


def small(report: Report) -> None:
    """Small and middle batches: never slower than eager, and a little faster where all is overhead."""
    for loss in ("supcon", "nt_xent", "clip", "info_nce", "sce", "dimcl"):
        queued = loss in ("info_nce", "sce")
        for rows in (32, 128, 256, 512, 1024, 2048):
            work = Workload(loss, rows, 4097 if queued else rows, 256 if loss == "dimcl" else 128)
            lines = report.times(work, EAGER)
            target = 1.1 if rows == 32 else 1.0
            report.ratio(work, f"{EAGER} / ours", lines.get(EAGER), lines[OURS], ">=", target)


def several_products(report: Report) -> None:
    sce, clip = Workload("sce", 512, 65537, 256), Workload("clip", 4096, 4096, 512)
    for work, targets in ((sce, {EAGER: 3.0}), (clip, {EAGER: 2.0, COMPILED: 1.5})):
        lines = report.times(work, *targets)
        report.ratio(work, "ours / 4 mm", lines[OURS], lines[FLOOR], "<=", 1.3)
        for name, target in targets.items():
            report.ratio(work, f"{name} / ours", lines.get(name), lines[OURS], ">=", target)


def memory(report: Report) -> None:
    """Beyond inputs and gradients; O(N D) is two copies of the features: in view order, and its gradient.

    The growth is held to 2, with a little for what the operating system rounds to pages.
    """
    before = math.nan
    for rows in (16384, 32768, 65536):
        work = supcon_work(rows)
        result = fresh.measure(fresh.Task(work, OURS, threads=torch.get_num_threads()))
        features = 4 * rows * 128
        extra = (result.peak - features) / MB if result.status == "ok" else math.nan
        last = rows == 65536
        limit = 64 + 2 * features / MB if last else None
        note = "" if result.status == "ok" else result.status
        report.add(Measure(work.name, "peak - inputs - gradients", extra, "MB", "<=", limit, note))
        if last:
            report.add(Measure(work.name, "growth over half of the rows", extra / before, "x", "<=", 2.05))
        before = extra


GROUPS = {"supcon": supcon, "half": half, "small": small, "products": several_products, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    here = machine.describe("cpu") | {"load_before": machine.load()}
    print(", ".join(f"{key} {value}" for key, value in here.items()), flush=True)
    report = Report(args.rounds)
    for name in args.only:
        GROUPS[name](report)
    judged = [measure for measure in report.measures if measure.target is not None]
    failed = [measure for measure in judged if measure.verdict != "pass"]
    print(f"\n{len(judged) - len(failed)} of {len(judged)} measures met, load now {machine.load()}")
    if args.json:
        lines = [asdict(measure) | {"verdict": measure.verdict} for measure in report.measures]
        results.write({"machine": here, "rounds": args.rounds, "lines": lines}, args.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
