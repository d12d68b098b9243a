"""Forward and backward of several variants, timed in turn on inputs that rotate past the cache."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .workloads import Implementation, Inputs, Workload

COPIES = 16  # of the inputs, at most
FEWEST = 3  # rounds of even the slowest variant
MATRIX = 1 << 30  # bytes of a result of the floor's products, at most
HOLD = 1.5  # how long the GPU is held before a sample: over the time that its launches take the host
REPLAYS = 20  # of a CUDA graph in a sample

Sample = tuple[float, float]  # seconds of a forward and of a backward


class Step(NamedTuple):
    """One way to do a workload: `backward` takes what `forward` gives."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object] = lambda loss: None


def steps(implementation: Implementation, temperature: float, copies: Sequence[Inputs]) -> Step:
    """The steps of one variant, each on the next copy of the inputs."""
    turns = itertools.cycle([copy.requiring_gradients() for copy in copies])
    return Step(lambda: next(turns).forward(implementation, temperature), Tensor.backward)


def products(work: Workload, device: str) -> Step:
    """The floor: plain products N x D · D x M into memory that is there, as many as the fewest operations are
    worth, by chunks of rows where the result would be large."""
    sizes = ((rows, sum(work.widths)) for rows in (work.rows, work.columns))
    left, right = (torch.randn(size, device=device).to(work.torch_dtype) for size in sizes)
    chunks = left.split(min(max(1, MATRIX // (work.columns * left.element_size())), work.rows))
    out = torch.empty(len(chunks[0]), work.columns, device=device, dtype=work.torch_dtype)

    def forward() -> None:
        for _ in range(work.spec.products):
            for chunk in chunks:
                torch.mm(chunk, right.T, out=out[: len(chunk)])

    return Step(forward)


def copies(work: Workload, device: str, cache: int) -> list[Inputs]:
    """Inputs, as many as twice the last cache holds, but at most 16."""
    first = work.inputs(device)
    one = sum(x.nbytes for x in (*first.leaves, *first.rest))
    count = max(1, min(COPIES, -(-2 * cache // one)))
    return [first, *(work.inputs(device, seed) for seed in range(1, count))]


def interleaved(
    variants: Mapping[str, Step],
    device: str,
    rounds: int,
    at_least: float = 0.01,
    seconds: float = math.inf,
    often: Collection[str] = (),
) -> dict[str, list[Sample]]:
    """Samples of each variant in turn, one a round; a sample repeats its step for `at_least` seconds.

    The variants of `often`, with which the others are compared, run again before each of those, and the
    median of a round is their sample. Every second round goes backwards. A variant takes part in `FEWEST`
    rounds, and in more until it has used its share of `seconds`, or all together have used them up. All have
    run before.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    repeats: dict[str, int] = {}
    compared = [name for name in variants if name in often]
    others = [name for name in variants if name not in often]

    def sample(name: str) -> Sample:
        take = _sample_gpu if device == "cuda" else _sample_cpu
        if name in repeats:
            return take(variants[name], repeats[name])
        once = take(variants[name], 1)
        repeats[name] = max(1, min(100, round(at_least / max(sum(once), 1e-7))))
        return once if repeats[name] == 1 else sample(name)

    for turn in range(rounds):
        if turn >= FEWEST:
            others = [name for name in others if spent[name] < seconds / len(variants)]
            if sum(spent.values()) >= seconds or not (others or len(compared) == len(variants)):
                break
        order = [*compared, *(name for other in others for name in (other, *compared))]
        found: dict[str, list[Sample]] = {name: [] for name in order}
        for name in reversed(order) if turn % 2 else order:
            found[name].append(sample(name))
            spent[name] += sum(found[name][-1]) * repeats[name]
        for name, taken in found.items():
            samples[name].append(sorted(taken, key=sum)[len(taken) // 2])
    return samples


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _sample_cpu(steps: Step, repeats: int) -> Sample:
    forward = backward = 0.0
    with _no_collection():
        for _ in range(repeats):
            start = time.perf_counter()
            loss = steps.forward()
            middle = time.perf_counter()
            steps.backward(loss)
            backward += time.perf_counter() - middle
            forward += middle - start
    return forward / repeats, backward / repeats


def _sample_gpu(steps: Step, repeats: int) -> Sample:
    """Between events on the GPU, which is held until all is queued, so that no gap of the host's is timed."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    steps.backward(steps.forward())
    launches = time.perf_counter() - start  # of one step, or its time on the GPU if it synchronises
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats)]
    cycles = int(HOLD * launches * repeats * _clock_rate())
    with _no_collection():
        torch.cuda._sleep(min(cycles, int(0.2 * _clock_rate())))
        for first, middle, last in events:
            first.record()
            loss = steps.forward()
            middle.record()
            steps.backward(loss)
            last.record()
        torch.cuda.synchronize()
    forward = sum(first.elapsed_time(middle) for first, middle, _ in events) / 1e3
    backward = sum(middle.elapsed_time(last) for _, middle, last in events) / 1e3
    return forward / repeats, backward / repeats


def _seconds_on_gpu(queue: Callable[[], object]) -> float:
    """The time between two events around what is queued."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    queue()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@functools.cache
def _clock_rate() -> float:
    """Cycles a second of the GPU's clock, as `_sleep` counts them."""
    cycles = 10_000_000
    return cycles / _seconds_on_gpu(lambda: torch.cuda._sleep(cycles))


def graph_samples(implementation: Implementation, work: Workload, device: str, rounds: int) -> list[float]:
    """Seconds of forward and backward by replay of a CUDA graph, one sample a round."""
    inputs = work.inputs(device).requiring_gradients()

    def step() -> None:
        torch.autograd.grad(inputs.forward(implementation, work.temperature), inputs.leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replays() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    found = []
    for _ in range(rounds):
        torch.cuda._sleep(int(1e-3 * _clock_rate()))
        found.append(_seconds_on_gpu(replays) / REPLAYS)
    return found


def ceilings(device: str, dtypes: Iterable[str]) -> dict[str, float]:
    """The most that this machine reaches, by the fastest of some samples: operations a second of a square
    `torch.mm` by dtype, and "copy": bytes a second, read and written."""

    def rate(operation: Callable[[], object], work: float) -> float:
        return work / min(map(sum, interleaved({"": Step(operation)}, device, 5, at_least=0.02)[""]))

    found = {}
    n = 8192 if device == "cuda" else 2048
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        found[dtype] = rate(functools.partial(torch.mm, a, b, out=out), 2.0 * n**3)
    source = torch.zeros(1 << 31 if device == "cuda" else 1 << 28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found["copy"] = rate(functools.partial(target.copy_, source), 2.0 * source.numel())
    return found
