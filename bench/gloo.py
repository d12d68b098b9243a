"""Losses over Gloo processes of this machine beside their estimate: `python bench/gloo.py --json FILE`.

For each loss, number of processes and exchange: the bytes that a process gives to torch.distributed in a
step, forward and backward, and the most that its tensors hold beyond its inputs, by torch's profiler, both
beside what `cl_kernels.tools.cost` says; the bytes that pass the loopback in a step of all processes, headers
and two barriers among them; and the median time of a step. The processes share the cores, one thread each:
the times say what this machine does, nothing about GPUs. The loopback is this program's alone in a network
namespace of its own:

    unshare -n sh -c 'ip link set lo up && python bench/gloo.py --json FILE'
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import group_steps
import torch.distributed as dist
from groups import in_group
from torch import Tensor

from cl_kernels.bench import machine, results
from cl_kernels.tools import cost
from cl_kernels.tools.cost import Setup

LOSSES = {"supcon": 2, "clip": 1}  # rows of a sample
WORLDS = (1, 2, 4)
PAUSE = 0.3  # seconds until all has arrived
COMMAND = machine.command().replace("gloo.py", "bench/gloo.py")


def setups(world: int, rows: int, width: int) -> list[Setup]:
    return [
        Setup(
            loss, cost.evenly(rows // per_sample, world), (width,), dtype="float32", exchange=exchange
        )
        for loss, per_sample in LOSSES.items()
        for exchange in (cost.EXCHANGES if world > 1 else cost.EXCHANGES[:1])
    ]  # fmt: skip


def loopback() -> int:
    """Bytes that the loopback has sent; 0 where the system does not say so."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split(":")[1].split()[8]) for x in lines if x.strip().startswith("lo:")), 0)


def on_the_wire(run: Callable[[], Tensor]) -> int:
    """Bytes of a step of all processes."""
    dist.barrier()
    time.sleep(PAUSE)
    before = loopback()
    time.sleep(PAUSE)
    dist.barrier()
    run().backward()
    dist.barrier()
    time.sleep(PAUSE)
    return loopback() - before


def measure(rank: int, world: int, rows: int, width: int, steps: int) -> list[tuple[int, int, int, float]]:
    """Bytes sent, on the wire and held, seconds."""
    found = []
    for setup in setups(world, rows, width):
        own, group = replace(setup, rank=rank), dist.group.WORLD
        sent = sum(n for (*_, what), n in group_steps.sent(own, group).items() if what == "bytes")
        held = group_steps.peak(own, group)
        run, times = group_steps.step(own, group), []
        wire = on_the_wire(run)
        for _ in range(steps):
            dist.barrier()
            start = time.perf_counter()
            run().backward()
            times.append(time.perf_counter() - start)
        found.append((sent, wire, held, statistics.median(times)))
    return found


def lines(world: int, rows: int, width: int, steps: int) -> list[dict[str, Any]]:
    """Figures of the first process."""
    with tempfile.TemporaryDirectory() as folder:
        reports = in_group(world, measure, Path(folder), world, rows, width, steps, timeout=300)
    if not all(isinstance(report, list) for report in reports):
        raise RuntimeError(f"a process failed: {reports}")
    return [
        {
            "loss": setup.loss, "processes": world, "exchange": setup.exchange if world > 1 else "",
            "rows": rows, "width": width,
            "sent": sent, "estimated_sent": sum(x.bytes for x in cost.traffic(setup)),
            "wire": wire, "estimated_all": sum(
                x.bytes for rank in range(world) for x in cost.traffic(replace(setup, rank=rank))
            ),
            "held": held, "estimated_held": group_steps.held_on_cpu(setup), "seconds": seconds,
        }
        for setup, (sent, wire, held, seconds) in zip(setups(world, rows, width), reports[0], strict=True)
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192, help="of all processes (default 8192)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    here = machine.describe("cpu") | {"threads": 1, "load_before": machine.load()}
    found = []
    for world in WORLDS:
        found += lines(world, args.rows, args.width, args.steps)
        for line in found[-len(setups(world, args.rows, args.width)) :]:
            print(", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    here["load_after"] = machine.load()
    if args.json:
        run = {"machine": here, "date": date.today().isoformat(), "command": COMMAND}
        results.write(run | {"lines": found}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
