"""Times the workloads of the design on a GPU: ours by each backend, eager PyTorch, and torch.compile of it.

    python bench/gpu_timings.py --out DIR [--budget SECONDS] [--rehearse]         (part of `make gpu-check`)

A step is forward and backward. Each variant is first held to float64; a wrong answer gets no time. A time is
the median of samples between two CUDA events, each over enough steps to be measured well, on inputs that
rotate through more memory than the second-level cache holds; small problems are also replayed from a CUDA
graph, which leaves the time on the GPU. TFLOP/s count the fewest operations that the loss can be had with;
the share is of what a plain 8192^3 bfloat16 product reaches in the same run. Memory is the peak beyond inputs
and gradients. --rehearse runs the same code on tiny sizes on the CPU, by Triton's interpreter. PYTHONPATH has
to hold the repository and tests/, as gpu_check.py sets it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import interpreter

    interpreter.repair()

import peers
import torch
import torch.nn.functional as F
from emulator import build
from peers import Result
from torch import Tensor
from workloads import differentiate, relative_error

import cl_kernels

REHEARSAL = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSAL else "cuda"
TAU = 0.1
SAMPLES = 7
GRAPH_ROWS = 4096  # up to which a CUDA graph is timed
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Work:
    """A workload: `inputs()` are the tensors with gradients, fresh ones each time."""

    id: str
    name: str
    rows: int
    dtype: torch.dtype
    flops: float  # the fewest, forward and backward
    inputs: Callable[[], list[Tensor]]
    ours: Loss
    eager: Loss
    exact: Callable[..., Result] | None  # of the inputs, in float64; None: too large
    compiled: bool = False  # whether torch.compile is worth its minute


@dataclass
class Line:
    id: str
    work: str
    dtype: str
    variant: str
    ms: float | None = None
    graph_ms: float | None = None
    tflops: float | None = None
    share: float | None = None  # of the product's rate
    memory_mb: float | None = None
    error: float | None = None  # of loss and gradients, the largest, relative
    note: str = ""


def unit(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, width, device=DEVICE), dim=1).to(dtype)


def size(n: int, least: int = 16) -> int:
    """A size, made tiny in a rehearsal."""
    return min(64, max(least, n // 512)) if REHEARSAL else n


def supcon(id: str, rows: int, dtype: torch.dtype, compiled: bool = False) -> Work:
    rows, width = size(rows), size(128)
    labels = torch.randint(10, (rows // 2,), device=DEVICE)
    ours, eager = cl_kernels.SupConLoss(TAU), peers.EagerSupConLoss(TAU)

    def inputs() -> list[Tensor]:
        return [unit(rows, width, dtype).view(2, rows // 2, width).transpose(0, 1).contiguous()]

    return Work(
        id, f"SupCon {rows}² × {width}", rows, dtype, 4 * rows**2 * width, inputs,
        lambda x: ours(x, labels), lambda x: eager(x, labels),
        lambda x: peers.exact_supcon(x, labels, TAU, 0.07), compiled,
    )  # fmt: skip


def nt_xent(id: str, rows: int, dtype: torch.dtype) -> Work:
    rows, width = size(rows), size(128)

    def exact(z0: Tensor, z1: Tensor) -> Result:
        return peers.exact_nt_xent(z0, z1, TAU)

    return Work(
        id, f"NT-Xent {rows}² × {width}", rows, dtype, 4 * rows**2 * width,
        lambda: [unit(rows // 2, width, dtype) for _ in range(2)],
        lambda z0, z1: cl_kernels.nt_xent_loss(z0, z1, temperature=TAU),
        lambda z0, z1: peers.eager_nt_xent(z0, z1, TAU),
        exact if rows <= 1 << 17 else None,
    )  # fmt: skip


def sce(
    id: str, rows: int, keys: int, width: int, target_tau: float, dtype: torch.dtype, views: int = 1,
    compiled: bool = False,
) -> Work:  # fmt: skip
    """Frozen keys: the own key of each row and a queue; several student views share the teacher's rows."""
    rows, keys, width = size(rows), size(keys), size(width)
    k, queue = unit(rows, width, dtype), unit(keys, width, dtype)
    settings = (TAU, target_tau, 0.5)

    def mean(loss: Loss) -> Loss:
        return lambda *views: sum((loss(q) for q in views[1:]), loss(views[0])) / len(views)

    def ours(q: Tensor) -> Tensor:
        return cl_kernels.sce_loss(
            q, k, queue=queue, temperature=TAU, target_temperature=target_tau, coeff=0.5
        )

    def exact(*views: Tensor) -> Result:
        q = torch.cat(views)
        loss, (grad,) = peers.exact_sce(q, k.repeat(len(views), 1), queue, *settings)
        return loss, list(grad.split(rows))

    times = f"{views} × " if views > 1 else ""
    return Work(
        id, f"SCE {times}{rows} × {keys + 1} × {width}", rows, dtype, views * 8 * rows * (keys + 1) * width,
        lambda: [unit(rows, width, dtype) for _ in range(views)],
        mean(ours), mean(lambda q: peers.eager_sce(q, k, queue, *settings)), exact, compiled,
    )  # fmt: skip


def dimcl(id: str, columns: int, batch: int, dtype: torch.dtype, compiled: bool = False) -> Work:
    """`columns` of both views together."""
    columns, batch = size(columns), size(batch)
    return Work(
        id, f"DimCL {columns}² over {batch}", columns, dtype, 4 * columns**2 * batch,
        lambda: [torch.randn(batch, columns // 2, device=DEVICE).to(dtype) for _ in range(2)],
        lambda z0, z1: cl_kernels.dimcl_loss(z0, z1, temperature=TAU),
        lambda z0, z1: peers.eager_dimcl(z0, z1, TAU),
        lambda z0, z1: peers.exact_dimcl(z0, z1, TAU), compiled,
    )  # fmt: skip


def clip(id: str, rows: int, width: int, dtype: torch.dtype) -> Work:
    rows, width = size(rows), size(width)

    def inputs() -> list[Tensor]:
        scale = torch.tensor(20.0, device=DEVICE)
        return [unit(rows, width, dtype), unit(rows, width, dtype), scale]

    def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return peers.eager_clip(image, text, scale.to(dtype))

    return Work(
        id, f"CLIP {rows}² × {width}", rows, dtype, 8 * rows**2 * width, inputs, cl_kernels.clip_loss, eager,
        peers.exact_clip,
    )  # fmt: skip


def works() -> Iterator[Work]:
    """What matters most first: the time may run out."""
    half, single = torch.bfloat16, torch.float32
    yield supcon("A", 2048, half, compiled=True)
    yield supcon("C", 4096, half)
    yield supcon("E", 8192, half, compiled=True)
    yield supcon("F", 12288, half)
    yield sce("G", 512, 65536, 256, 0.07, half, compiled=True)
    yield sce("H", 256, 65536, 256, 0.07, half, views=10)
    yield sce("I1", 256, 4096, 128, 0.05, half)
    yield sce("I2", 64, 65536, 256, 0.05, half)
    yield dimcl("L1", 512, 256, half)
    yield dimcl("L2", 4096, 256, half, compiled=True)
    yield dimcl("L3", 16384, 2048, half)
    yield clip("N", 32768, 512, half)
    yield nt_xent("X1", 1 << 17, half)
    for power in range(8, 16):
        yield nt_xent("sweep", 1 << power, half)
    yield supcon("E", 8192, single)
    yield sce("G", 512, 65536, 256, 0.07, single)
    yield clip("N", 8192, 512, half)
    yield nt_xent("X2", 1 << 20, half)


# Measuring


def _synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def _seconds(step: Callable[[], object], repeats: int) -> float:
    """A step's mean over `repeats`, between two events."""
    if REHEARSAL:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def median_seconds(step: Callable[[], object], at_least: float = 0.02, at_most: float = 3.0) -> float:
    once = max(_seconds(step, 1), 1e-6)
    if REHEARSAL or once > at_most:
        return once
    once = max(_seconds(step, max(1, int(0.005 / once))), 1e-6)
    repeats = max(1, round(at_least / once))
    samples = max(3, min(SAMPLES, int(at_most / (once * repeats))))
    return statistics.median(_seconds(step, repeats) for _ in range(samples))


def rotated(loss: Loss, work: Work) -> Callable[[], object]:
    """Steps on inputs that take turns and together exceed twice the second-level cache."""
    first = work.inputs()
    size_of_one = sum(x.numel() * x.element_size() for x in first)
    cache = 0 if REHEARSAL else torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, min(32, -(-2 * cache // size_of_one)))
    steps = [differentiate(loss, *x) for x in (first, *(work.inputs() for _ in range(copies - 1)))]
    turn = 0

    def step() -> None:
        nonlocal turn
        turn = (turn + 1) % len(steps)
        steps[turn]()

    return step


def graph_seconds(loss: Loss, inputs: list[Tensor]) -> float:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def step() -> None:
        torch.autograd.grad(loss(*leaves), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_seconds(graph.replay)


def largest_error(result: Result, truth: Result) -> float:
    """Of the loss and the gradients, relative; infinite where there is a NaN."""
    loss, gradients = result
    pairs = zip((loss, *gradients), (truth[0], *truth[1]), strict=True)
    errors = [relative_error(x, y) for x, y in pairs]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def measure(
    work: Work, variant: str, loss: Loss, inputs: list[Tensor], truth: Result | None, rate: float
) -> Line:
    dtype = {torch.bfloat16: "bf16", torch.float32: "f32"}[work.dtype]
    line = Line(work.id, work.name, dtype, variant)
    try:
        step = differentiate(loss, *inputs)
        step()  # compiles
        _synchronize()
        if not REHEARSAL:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = step()
        _synchronize()
        if not REHEARSAL:
            line.memory_mb = (torch.cuda.max_memory_allocated() - before) / 1e6
        if truth is not None:
            line.error = largest_error(result, truth)
            half = work.dtype == torch.bfloat16
            # The authors' formulas round logits to half; their answer is allowed what that does to it.
            allowed = (2e-2 if half else 1e-3) * (1 if variant in OURS else 20)
            if not line.error <= allowed:
                line.note = "wrong answer"
                return line
        else:
            line.note = "too large to be held to float64"
        del result, step
        line.ms = 1e3 * median_seconds(rotated(loss, work))
        line.tflops = work.flops / line.ms / 1e9
        line.share = line.tflops / rate if rate else None
        if not REHEARSAL and work.rows <= GRAPH_ROWS:
            line.graph_ms = 1e3 * graph_seconds(loss, inputs)
    except torch.OutOfMemoryError:
        line.note = "out of memory"
    except Exception as error:
        line.note = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if not REHEARSAL:
        torch.cuda.empty_cache()
    return line


def copy_rate() -> float:
    """GB/s, bytes read and bytes written."""
    source = torch.empty(size(1 << 31), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source)) / 1e9


def product_rate() -> float:
    """TFLOP/s of a plain bfloat16 product of random data."""
    n = size(8192)
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / median_seconds(lambda: torch.mm(a, b, out=out)) / 1e12


OURS = ("cuda", "triton", "auto")  # backends of cl_kernels


def variants(work: Work) -> Iterator[tuple[str, Loss]]:
    for backend in OURS:
        if REHEARSAL and backend == "auto":  # the CPU's own kernels
            continue
        yield backend, by_backend(backend, work.ours)
    yield "eager", work.eager
    if work.compiled and not REHEARSAL:
        yield "torch.compile", torch.compile(work.eager, dynamic=False)


def by_backend(backend: str, loss: Loss) -> Loss:
    def step(*inputs: Tensor) -> Tensor:
        with cl_kernels.use_backend(backend):
            return loss(*inputs)

    return step


def table(lines: list[Line]) -> str:
    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        "| id | work | dtype | variant | ms | graph ms | TFLOP/s | of mm | peak MB | error | |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for x in lines:
        error = "" if x.error is None else f"{x.error:.1e}"
        rows.append(
            f"| {x.id} | {x.work} | {x.dtype} | {x.variant} | {cell(x.ms, 3)} | {cell(x.graph_ms, 3)} "
            f"| {cell(x.tflops, 1)} | {cell(x.share, 2)} | {cell(x.memory_mb, 0)} | {error} | {x.note} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the workloads of the design on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for timings.json and timings.md")
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--only", nargs="+", help="ids of workloads")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--one-step", metavar="ID", help="only one step of a workload by CUDA C++, for a profiler"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.one_step:
        work = next(work for work in works() if work.id == args.one_step)
        differentiate(by_backend("cuda", work.ours), *work.inputs())()
        _synchronize()
        return 0
    if REHEARSAL:
        build.load()
    torch.set_num_threads(1 if REHEARSAL else torch.get_num_threads())
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    reached = {"copy_gb_s": copy_rate(), "mm_bf16_tflops": product_rate()}
    lines: list[Line] = []
    for work in works():
        if args.only and work.id not in args.only:
            continue
        if time.monotonic() > deadline:
            lines.append(Line(work.id, work.name, str(work.dtype).split(".")[1], "", note="no time left"))
            continue
        inputs = work.inputs()
        truth = None if work.exact is None else work.exact(*inputs)
        for variant, loss in variants(work):
            lines.append(measure(work, variant, loss, inputs, truth, reached["mm_bf16_tflops"]))
            print(lines[-1], flush=True)
        # Written each time, so that what was measured outlives a run that is stopped.
        result = {"ceilings": reached, "lines": [asdict(line) for line in lines]}
        (args.out / "timings.json").write_text(json.dumps(result, indent=1))
        (args.out / "timings.md").write_text(table(lines) + "\n")
    failed = [line for line in lines if line.variant in OURS and line.ms is None]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
