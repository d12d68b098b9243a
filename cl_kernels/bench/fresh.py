"""Peak memory of a step on the CPU, and whether it fits, in a process of its own.

The peak is the high-water mark of the resident set during the first step, less what was resident before: the
interpreter, torch, the inputs. A limit is the operating system's on the data segment, so that what does not
fit fails as it would on a smaller machine, and takes nothing else with it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from . import variants
from .workloads import Workload, differentiate

MEMORY = "out of memory"  # the status of what does not fit


def message(error: Exception) -> str:
    """The status of what raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return MEMORY
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@dataclass(frozen=True)
class Task:
    """`limit` is on the bytes beyond what the process has when it starts; `seconds` and `repeats` bound the
    timing after the first step."""

    work: Workload
    variant: str
    limit: int | None = None
    threads: int | None = None
    seconds: float = 0.0
    repeats: int = 5


@dataclass(frozen=True)
class Measurement:
    """`status` is "ok", "out of memory" or a sentence; `peak` are bytes beyond the inputs, gradients among
    them."""

    task: Task
    status: str
    ms: float = float("nan")
    peak: int = 0


def measure(task: Task) -> Measurement:
    """Run `task` in a process of its own, which a server that has only imported torch forks where it can."""
    method = next(x for x in ("forkserver", "spawn") if x in multiprocessing.get_all_start_methods())
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch", variants.__name__])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_measured, task).result()
        except Exception as error:
            lost = isinstance(error, (MemoryError, BrokenProcessPool)) or "memory" in str(error)
            return Measurement(task, MEMORY if lost else message(error))


def _measured(task: Task) -> Measurement:
    if task.threads:
        torch.set_num_threads(task.threads)
    work, implementation = task.work, variants.implementation(task.variant, task.work.loss)

    def step_of(work: Workload) -> Any:
        return differentiate(implementation, work.temperature, work.inputs())

    step = step_of(work)
    # What is set up once is not the loss's: libraries, their threads, and what is compiled for this size.
    warm = step if task.variant == variants.COMPILED else step_of(_small(work))
    warm()
    torch.mm(torch.ones(1024, 1024), torch.ones(1024, 1024))
    give_back()
    if task.limit is not None and sys.platform == "linux":
        process = psutil.Process()
        process.rlimit(psutil.RLIMIT_DATA, (process.memory_info().data + task.limit,) * 2)
    before = reset_peak()
    times = [timeit.timeit(step, number=1)]
    peak = high_water() - before
    deadline = time.perf_counter() + task.seconds - times[0]
    while len(times) < task.repeats + 1 and time.perf_counter() < deadline:
        times.append(timeit.timeit(step, number=1))
    return Measurement(task, "ok", 1e3 * statistics.median(times[1:] or times), max(peak, 0))


def _small(work: Workload) -> Workload:
    rows = min(work.rows, 64)
    columns = rows if work.rows == work.columns else min(work.columns, 129)
    return replace(work, rows=rows, columns=columns)


def give_back() -> None:
    """Free memory to the operating system, so that its reuse counts."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


def reset_peak() -> int:
    """Start a new high-water mark where the kernel can; the resident size to count from."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return psutil.Process().memory_info().rss
    except OSError:
        return high_water()


def high_water() -> int:
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
