"""The speed and memory measures that a release is held to, in one table: `python bench/acceptance.py`.

Every ratio comes from one run in which the variants take turns; a figure is the median over the rounds. A
variant's loss and gradients are checked against float64 first: a wrong answer gets no time. Exits with 1 if a
line misses its target. Wait for an idle machine: the load is printed with the result.

The floor of a measure is as many plain `torch.mm` as its fewest operations are worth, into a preallocated
matrix; with the allocation, which a user of eager PyTorch pays, it is shown for information.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import torch
import workloads
from workloads import Workload

from cl_kernels import extension

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from ladder import Task, measure

MB = 1e6


@dataclass(frozen=True)
class Line:
    """One measure. `target` None: for information."""

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
        return f"{self.group:<31}{self.measure:<40}{figure}{self.note}".rstrip()


class Report:
    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)
        print(line.show(), flush=True)

    def ratio(
        self,
        group: str,
        what: str,
        over: list[float],
        under: list[float],
        relation: str,
        target: float | None,
    ) -> None:
        """The ratio of two medians; without samples (a wrong answer, no such peer) there is no figure."""
        value = harness.median(over) / harness.median(under) if over and under else math.nan
        self.add(Line(group, what, value, "x", relation, target))

    def times(
        self, workload: Workload, rounds: int, at_least: float = 0.01, skip: tuple[str, ...] = ()
    ) -> dict[str, list[float]]:
        """Samples of every variant that answers right, with a line for each; no samples for the others."""
        names = [name for name in workload.variants if name not in skip]
        problems = {name: workload.problem(name) for name in names}
        steps = {name: workload.variants[name].step for name in names if problems[name] is None}
        samples = harness.interleaved(steps, rounds, at_least)
        for name in names:
            group = f"{workload.name} {short(workload.dtype)}"
            ms = 1e3 * harness.median(samples[name]) if name in samples else math.nan
            self.add(Line(group, name, ms, "ms", note=problems[name] or ""))
        return {name: samples.get(name, []) for name in workload.variants}


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}[dtype]


def supcon(report: Report, rounds: int) -> None:
    for rows in (4096, 8192):
        workload, half = workloads.supcon(rows), workloads.supcon(rows, dtype=torch.bfloat16)
        workload.variants["cl_kernels, bf16"] = half.variants["cl_kernels"]
        problem = half.problem("cl_kernels")
        if problem:
            report.add(Line(f"{half.name} bf16", "cl_kernels", math.nan, "ms", note=problem))
        # The half-precision answer is checked above, by its own tolerance.
        workload.variants["cl_kernels, bf16"] = workloads.Variant(half.variants["cl_kernels"].step)
        skip = ("torch.compile",) * (rows == 4096) + ("cl_kernels, bf16",) * bool(problem)
        times = report.times(workload, rounds, skip=skip)
        ours, name = times["cl_kernels"], workload.name
        report.ratio(name, "ours / 2 mm", ours, times["floor"], "<=", 1.1)
        report.ratio(name, "ours / 2 mm that allocate", ours, times["floor, allocating"], "", None)
        if rows == 8192:
            report.ratio(name, "eager / ours", times["eager"], ours, ">=", 8)
            report.ratio(name, "torch.compile / ours", times["torch.compile"], ours, ">=", 2.5)
            other = times.get("linear_cross_entropy", [])
            report.ratio(name, "linear_cross_entropy, chunked / ours", other, ours, ">=", 1.8)
        target = 1.4 if harness.has_bf16_dot_products() else 1.0
        report.ratio(name, "ours f32 / ours bf16", ours, times["cl_kernels, bf16"], ">=", target)


def small(report: Report, rounds: int) -> None:
    for rows in (32, 64, 128, 256, 512):
        workload = workloads.supcon(rows)
        times = report.times(
            workload, rounds, skip=("torch.compile", "linear_cross_entropy", "floor", "floor, allocating")
        )
        report.ratio(workload.name, "ours / eager", times["cl_kernels"], times["eager"], "<=", 1.0)


def several_products(report: Report, rounds: int) -> None:
    for workload in (workloads.sce(), workloads.clip()):
        times = report.times(workload, rounds)
        ours, name = times["cl_kernels"], workload.name
        report.ratio(name, "ours / 4 mm", ours, times["floor"], "<=", 1.3)
        report.ratio(name, "ours / 4 mm that allocate", ours, times["floor, allocating"], "", None)
        report.ratio(name, "eager / ours", times["eager"], ours, "", None)


def memory(report: Report) -> None:
    """Beyond inputs and gradients; O(N D) is two copies of the features: in view order, and its gradient.

    The growth is held to 2, with a little for what the operating system rounds to pages.
    """
    before = math.nan
    for rows in (16384, 32768, 65536):
        result = measure(Task("cl_kernels", rows, threads=torch.get_num_threads(), seconds=0))
        features = 4 * rows * 128
        extra = (result.peak - features) / MB if result.status == "ok" else math.nan
        group = f"SupCon {rows} x {rows} x 128 f32"
        note = "" if result.status == "ok" else result.status
        if rows == 65536:
            report.add(
                Line(group, "peak - inputs - gradients", extra, "MB", "<=", 64 + 2 * features / MB, note)
            )
            report.add(Line(group, "growth over half of the rows", extra / before, "x", "<=", 2.05))
        else:
            report.add(Line(group, "peak - inputs - gradients", extra, "MB", note=note))
        before = extra


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=("supcon", "small", "products", "memory"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = args.only or ("supcon", "small", "products", "memory")

    machine = harness.machine() | {"extension": extension.build_info() or "not loaded"}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    report = Report()
    if "supcon" in chosen:
        supcon(report, args.rounds)
    if "small" in chosen:
        small(report, args.rounds)
    if "products" in chosen:
        several_products(report, args.rounds)
    if "memory" in chosen:
        memory(report)

    judged = [line for line in report.lines if line.target is not None]
    failed = [line for line in judged if line.verdict != "pass"]
    print(
        f"\n{len(judged) - len(failed)} of {len(judged)} measures met, load now {harness.machine()['load']}"
    )
    if args.json:
        lines = [asdict(line) | {"verdict": line.verdict} for line in report.lines]
        args.json.write_text(
            json.dumps({"machine": machine, "rounds": args.rounds, "lines": lines}, indent=1)
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
