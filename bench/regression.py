"""Has anything become slower than the stored results of this kind of machine? `python bench/regression.py`.

Times small workloads of the standard losses, ours beside the floor, and compares the multiples of the floor:
ratios within one run, since machines of a kind differ and are shared. One thread, because threads that wait
for one another feel every other program; the threshold is wide, and what looks slower counts if it does so a
second time. Exits with 1 then, with 0 where no stored results are of this kind. --store writes such results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from cl_kernels.bench import compare, machine, results, run
from cl_kernels.bench.results import Results
from cl_kernels.bench.workloads import LOSSES, SIZES, STANDARD, Workload

STORED = Path(__file__).resolve().parent / "results"
THRESHOLD = 2.0
ROUNDS = 7
KIND = ("kind", "device", "capability", "threads")
"""The facts about two machines that agree where the ratios measured on them can be expected to."""
ROWS = {"supcon": 2048, "nt_xent": 2048, "sce": 128, "dimcl": 2048, "clip": 1024}


def works() -> list[Workload]:
    """A workload of each standard loss that takes a fraction of a second."""
    found = []
    for name in STANDARD:
        sizes = SIZES["cpu"][name]
        rows = ROWS[name]
        found.append(
            Workload(
                name, *LOSSES[name].shape(rows, sizes.queue), sizes.width, headline=rows == sizes.rows[-1]
            )
        )
    return found


def baseline(here: dict[str, object], folder: Path = STORED) -> tuple[str, Results] | None:
    """The newest stored results of this kind of machine, with their name."""
    found = []
    for path in folder.glob("*.json"):
        try:
            stored = results.load(path)
        except ValueError:  # another program's
            continue
        if all(stored.machine.get(key) == here.get(key) for key in KIND):
            found.append((stored.date, path.name, stored))
    return max(found)[1:] if found else None


def measured(here: dict[str, object], chosen: Collection[Workload]) -> Results:
    plan = run.Plan((), peers=(), rounds=ROUNDS, memory=False, study=False)
    lines = [line for work in works() if work in chosen for line in run.measure(plan, work, seconds=30.0)]
    return Results(dict(here), machine.command(), run.now(), lines=lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threshold", type=float, default=THRESHOLD)
    parser.add_argument("--store", type=Path, metavar="FILE", help="write results to compare with, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = machine.describe("cpu")
    if args.store:
        results.save(measured(here, works()), args.store)
        return 0
    before = baseline(here)
    if before is None:
        print(
            f"regression: skipped, no stored results are of this kind: {here['device']}, {here['capability']}"
        )
        return 0
    print(f"regression: against {before[0]}")
    slower = set(works())
    for _ in range(2):
        after = measured(here, slower)
        changes = compare.compare(before[1], after, args.threshold)
        compare.show(before[1], after, changes, args.threshold)
        if len(changes) < len(slower):
            print("regression: the stored results lack a workload", file=sys.stderr)
            return 1
        keys = set(changes.key[changes.regression])
        slower = {work for work in slower if run.line_of(work, results.OURS).key in keys}
        if not slower:
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
