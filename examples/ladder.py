"""Time and peak memory of one loss, forward and backward, each measured in a fresh process.

Peak memory is the high-water mark of the resident set during the first pass, less what was resident before:
the interpreter, torch, the inputs. A limit on memory is the operating system's limit on the data segment, so
that a loss that does not fit fails as it would on a smaller machine.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Task:
    """What to measure: a loss by name, on `rows` x `width` features in `views` views, with 10 labels."""

    loss: str
    rows: int
    width: int = 128
    views: int = 2
    temperature: float = 0.1
    limit: int | None = None
    threads: int | None = None
    seconds: float = 1.0
    repeats: int = 5


@dataclass(frozen=True)
class Measurement:
    """`status` is "ok", "memory" (did not fit) or a sentence."""

    task: Task
    status: str
    ms: float = float("nan")
    peak: int = 0


def make_loss(name: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "eager":
        from eager_supcon import EagerSupConLoss

        return EagerSupConLoss(temperature)
    if name == "cl_kernels":
        import cl_kernels

        return cl_kernels.SupConLoss(temperature)
    raise ValueError(f"unknown loss {name!r}")


def measure(task: Task) -> Measurement:
    """Run `task` in a process of its own, which a server that has only imported torch forks where it can."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "cl_kernels"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, asdict(task)))
    process.start()
    sender.close()
    try:
        return Measurement(task, **receiver.recv())
    except EOFError:
        process.join()
        killed = process.exitcode is not None and process.exitcode < 0
        return Measurement(task, "memory" if killed else f"the process ended with {process.exitcode}")
    finally:
        process.join()


def _work(sender: Connection, fields: dict[str, Any]) -> None:
    task = Task(**fields)
    if task.threads:
        torch.set_num_threads(task.threads)
    criterion = make_loss(task.loss, task.temperature)

    def inputs(rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        features = F.normalize(
            torch.randn(rows // task.views, task.views, task.width, generator=generator), dim=2
        )
        labels = torch.randint(10, (rows // task.views,), generator=generator)
        return features.requires_grad_(), labels

    def step(features: Tensor, labels: Tensor) -> float:
        features.grad = None
        start = time.perf_counter()
        criterion(features, labels).backward()
        return time.perf_counter() - start

    step(*inputs(64))
    torch.mm(torch.ones(1024, 1024), torch.ones(1024, 1024))
    features, labels = inputs(task.rows)
    if task.limit is not None:
        _limit_data(task.limit)
    before = _reset_peak()
    try:
        times = [step(features, labels)]
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sender.send({"status": "memory"})
        return
    peak = _peak() - before
    deadline = time.perf_counter() + task.seconds - times[0]
    while len(times) < task.repeats + 1 and time.perf_counter() < deadline:
        times.append(step(features, labels))
    ms = 1e3 * statistics.median(times[1:] or times)
    sender.send({"status": "ok", "ms": ms, "peak": max(peak, 0)})


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


def available_memory() -> int:
    """Memory that a process can still take without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def predict(last: Measurement, rows: int) -> tuple[float, float]:
    """Milliseconds and bytes at `rows`, if both grow with the square."""
    growth = (rows / last.task.rows) ** 2
    return last.ms * growth, last.peak * growth
