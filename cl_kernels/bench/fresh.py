"""Peak memory of a step on the CPU, and whether it fits, in a process of its own.

The peak is the high-water mark of the resident set during the first step, less what was resident before: the
interpreter, torch, the inputs. A limit is the operating system's on the data segment, so that what does not
fit fails as it would on a smaller machine, and takes nothing else with it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import variants
from .workloads import Workload, differentiate

MEMORY = "out of memory"
"""The status of what does not fit."""


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
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "cl_kernels.bench.variants"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, task))
    process.start()
    sender.close()
    try:
        return Measurement(task, **receiver.recv())
    except EOFError:
        process.join()
        killed = process.exitcode is not None and process.exitcode < 0
        return Measurement(task, MEMORY if killed else f"the process ended with {process.exitcode}")
    finally:
        process.join()


def _work(sender: Connection, task: Task) -> None:
    if task.threads:
        torch.set_num_threads(task.threads)
    work, implementation = task.work, variants.implementation(task.variant, task.work.loss)

    def step_of(work: Workload) -> Any:
        return differentiate(implementation, work.temperature, work.inputs())

    step = step_of(work)
    try:
        # What is set up once is not the loss's: libraries, their threads, and what is compiled for this size.
        warm = step if variants.is_static(task.variant) else step_of(_small(work))
        warm()
        torch.mm(torch.ones(1024, 1024), torch.ones(1024, 1024))
        _give_back()
        if task.limit is not None:
            _limit_data(task.limit)
        before = _reset_peak()
        times = [_seconds(step)]
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            sender.send({"status": MEMORY})
        else:
            sender.send({"status": message(error)})
        return
    peak = _peak() - before
    deadline = time.perf_counter() + task.seconds - times[0]
    while len(times) < task.repeats + 1 and time.perf_counter() < deadline:
        times.append(_seconds(step))
    ms = 1e3 * statistics.median(times[1:] or times)
    sender.send({"status": "ok", "ms": ms, "peak": max(peak, 0)})


def _small(work: Workload) -> Workload:
    square = work.rows == work.columns
    rows = min(work.rows, 64)
    return replace(work, rows=rows, columns=rows if square else min(work.columns, 129))


def _seconds(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _give_back() -> None:
    """Free memory to the operating system, so that its reuse counts."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _limit_data(extra: int) -> None:
    import resource

    if sys.platform == "linux":
        limit = _status("VmData") + extra
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _reset_peak() -> int:
    """Start a new high-water mark where the kernel can; the resident size to count from."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def predict(last: Measurement, rows: int) -> tuple[float, float]:
    """Milliseconds and bytes at `rows`, if both grow with the square."""
    growth = (rows / last.task.work.rows) ** 2
    return last.ms * growth, last.peak * growth


def available_memory() -> int:
    """Memory that a process can still take without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
