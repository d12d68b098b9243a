"""Times the workloads of the design on a GPU: ours by each backend, eager PyTorch, torch.compile of some, and
the fused kernels of others where they are installed.

    python bench/gpu_timings.py --out DIR [--budget SECONDS] [--rehearse]         (part of `make gpu-check`)

How is in docs/benchmarking.md; what is here is only the list, in the order of what matters, and the budget:
what time does not allow is listed as such. Results are written after each workload, so that a run that is
stopped keeps what it measured. --rehearse runs the same on tiny sizes on the CPU, by Triton's interpreter and
the emulator of CUDA C++. PYTHONPATH has to hold the repository and tests/, as gpu_check.py sets it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import interpreter

    interpreter.repair()

import torch
from emulator import build

from cl_kernels.bench import machine, report, results, run, timing, variants
from cl_kernels.bench.results import Line, Results
from cl_kernels.bench.variants import COMPILED, PEERS
from cl_kernels.bench.workloads import Workload, differentiate

REHEARSAL = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = ("cuda", "triton") if REHEARSAL else ("cuda", "triton", "auto")
COMPILES = ("A", "E", "G", "L2")
"""The workloads for which torch.compile is worth its minute."""


def works() -> Iterator[tuple[str, Workload]]:
    """By the design's names, what matters most first."""

    def work(loss: str, rows: int, columns: int, width: int, dtype: str = "bfloat16") -> Workload:
        return Workload(loss, rows, columns, width, dtype)

    yield "A", work("supcon", 2048, 2048, 128)
    yield "C", work("supcon", 4096, 4096, 128)
    yield "E", work("supcon", 8192, 8192, 128)
    yield "F", work("supcon", 12288, 12288, 128)
    yield "G", work("sce", 512, 65537, 256)
    yield "H", work("sce_multicrop", 256, 65537, 256)
    yield "I1", work("sce", 256, 4097, 128)
    yield "I2", work("sce", 64, 65537, 256)
    yield "L1", work("dimcl", 512, 512, 256)
    yield "L2", work("dimcl", 4096, 4096, 256)
    yield "L3", work("dimcl", 16384, 16384, 2048)
    yield "N", work("clip", 32768, 32768, 512)
    yield "X1", work("nt_xent", 1 << 17, 1 << 17, 128)
    for power in range(8, 16):
        yield "sweep", replace(work("nt_xent", 1 << power, 1 << power, 128), headline=False)
    yield "E", work("supcon", 8192, 8192, 128, "float32")
    yield "G", work("sce", 512, 65537, 256, "float32")
    yield "N", work("clip", 8192, 8192, 512)
    yield "X2", work("nt_xent", 1 << 20, 1 << 20, 128)


def tiny(work: Workload) -> Workload:
    """A workload of the same kind that an interpreter can run."""
    rows, width = (min(64, max(16, n // 512)) for n in (work.rows, work.width))
    columns = rows if work.columns == work.rows else min(64, max(16, work.columns // 512)) + 1
    return replace(work, rows=rows, columns=columns, width=width)


def plan_for(id: str, budget: float) -> run.Plan:
    compiled = id in COMPILES and not REHEARSAL
    peers = [name for name in PEERS if name != COMPILED or compiled]
    rounds = 1 if REHEARSAL else 7
    return run.Plan((), DEVICE, BACKENDS, peers, rounds, budget, memory=not REHEARSAL, compile_all=True)


def unmeasured(id: str, work: Workload) -> list[Line]:
    names = [name for name, _ in run.variants_of(plan_for(id, 0.0), work)]
    return [run.line_of(work, name, status="no time left") for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the workloads of the design on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for timings.json and timings.md")
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--only", nargs="+", help="names of workloads")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--one-step", metavar="NAME", help="only one step of a workload by CUDA C++, for a profiler"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.one_step:
        work = next(work for id, work in works() if id == args.one_step)
        implementation = variants.implementation(f"{results.OURS} cuda", work.loss)
        differentiate(implementation, work.temperature, work.inputs(DEVICE))()
        torch.cuda.synchronize()
        return 0
    if REHEARSAL:
        build.load()
        torch.set_num_threads(1)
    deadline = time.monotonic() + args.budget
    found = Results(machine.describe(DEVICE), machine.command(), run.now())
    if REHEARSAL:
        found.machine["device"] += ", rehearsing: interpreted and emulated kernels"
    found.ceilings = {} if REHEARSAL else timing.ceilings(DEVICE, ("bfloat16", "float32"))
    started = time.monotonic()
    for id, work in works():
        if args.only and id not in args.only:
            continue
        work = tiny(work) if REHEARSAL else work
        if time.monotonic() > deadline:
            found.lines += unmeasured(id, work)
        else:
            found.lines += run.measure(plan_for(id, 5.0), work, seconds=5.0)
            print(*found.lines[-3:], sep="\n", flush=True)
        found.seconds = time.monotonic() - started
        results.save(found, args.out / "timings.json")
        (args.out / "timings.md").write_text(report.markdown(found), encoding="utf-8")
    lost = [line for line in found.lines if line.is_ours and not line.timed]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
