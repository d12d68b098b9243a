"""The losses of other libraries beside ours: how far apart, how fast, in how much memory.

`python bench/adapters.py --json bench/results/FILE` (all libraries that are installed; with
CL_KERNELS_REPOSITORIES those that are cloned too), `--only PATTERN` for some of the losses.

Values are compared in the cases of tests/peers. Those that name a number of rows are timed in float32,
forward and backward, theirs and ours in turn in one process; the peak of memory is that of a first step in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from peers.cases import PeerCase, cases  # noqa: E402
from peers.side_by_side import both  # noqa: E402

from cl_kernels.bench import fresh, machine, results, timing  # noqa: E402

COMMAND = machine.command().replace("adapters.py", "bench/adapters.py")
SECONDS = 15.0
ROUNDS = 7


def differences(found: list[PeerCase]) -> dict[str, Any]:
    """How many options were compared, and the largest relative differences of loss and of gradient."""
    line: dict[str, Any] = {"options": len(found), "fused": sum(case.fused for case in found)}
    for dtype in (torch.float64, torch.float32):
        apart = [
            both(case.theirs(), case.ours(), case.example(case.rows, dtype)) for case in found if case.fused
        ]
        line[str(dtype).removeprefix("torch.")] = [max(column) for column in zip(*apart, strict=True)]
    return line


def step_of(case: PeerCase, whose: str, rows: int) -> timing.Step:
    loss, inputs = getattr(case, whose)(), case.example(rows, torch.float32)

    def forward() -> torch.Tensor:
        for x in inputs:
            x.grad = None
        return loss(*inputs)

    return timing.Step(forward, torch.Tensor.backward)


def times(case: PeerCase) -> dict[str, float]:
    """Medians in seconds, and that of theirs over ours round by round."""
    steps = {whose: step_of(case, whose, case.measured) for whose in ("theirs", "ours")}
    for step in steps.values():
        step.backward(step.forward())
    samples = timing.interleaved(steps, "cpu", ROUNDS, seconds=SECONDS)
    theirs, ours = ([sum(sample) for sample in samples[whose]] for whose in ("theirs", "ours"))
    ratios = [x / y for x, y in zip(theirs, ours, strict=False)]  # the slower one may run fewer rounds
    return {
        "theirs": statistics.median(theirs),
        "ours": statistics.median(ours),
        "ratio": statistics.median(ratios),
    }


def memory(case: PeerCase, whose: str) -> int:
    """Bytes beyond the inputs at the peak of a step, gradients among them."""
    small = step_of(case, whose, 64)
    small.backward(small.forward())
    torch.mm(torch.ones(1024, 1024), torch.ones(1024, 1024))
    step = step_of(case, whose, case.measured)
    fresh.give_back()
    before = fresh.reset_peak()
    step.backward(step.forward())
    return max(fresh.high_water() - before, 0)


def in_own_process(*arguments: str) -> Any:
    """Run this script in a process of its own, for one case, and return what it prints."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(found: list[PeerCase]) -> list[dict[str, Any]]:
    lines = []
    for case in (case for case in found if case.measured):
        line = {"options": case.options, "rows": case.measured, **in_own_process("--times", case.id)}
        line |= {f"{whose}_bytes": in_own_process("--memory", whose, case.id) for whose in ("theirs", "ours")}
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Other libraries' losses beside ours.")
    parser.add_argument("--only", default="", help="a pattern of losses, such as 'lightly.NTXent'")
    parser.add_argument("--json", type=Path, help="where to store the results")
    parser.add_argument("--times", metavar="CASE", help="print the times of one case")
    parser.add_argument("--memory", nargs=2, metavar=("WHOSE", "CASE"), help="print the memory of one case")
    args = parser.parse_args()
    logging.getLogger("cl_kernels.integrations").setLevel(logging.ERROR)
    found = cases()
    by_id = {case.id: case for case in found}
    if args.times:
        print(json.dumps(times(by_id[args.times])))
        return 0
    if args.memory:
        print(json.dumps(memory(by_id[args.memory[1]], args.memory[0])))
        return 0

    here = machine.describe("cpu") | {"load_before": machine.load()}
    lines = []
    for loss in dict.fromkeys(case.loss for case in found if re.search(args.only, case.loss)):
        mine = [case for case in found if case.loss == loss]
        lines.append({"loss": loss, **differences(mine), "measured": measured(mine)})
        print(json.dumps(lines[-1]), flush=True)
    here["load_after"] = machine.load()
    if args.json:
        run = {"machine": here, "date": date.today().isoformat(), "command": COMMAND}
        results.write(run | {"lines": merged(args.json, lines) if args.only else lines}, args.json)
    return 0


def merged(path: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored lines with those of the same losses made anew."""
    again = {line["loss"]: line for line in lines}
    earlier = json.loads(path.read_text())["lines"] if path.exists() else []
    return [again.pop(line["loss"], line) for line in earlier] + list(again.values())


if __name__ == "__main__":
    sys.exit(main())
