"""Forward and backward of several variants, timed in turn on inputs that rotate past the cache."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .workloads import Implementation, Inputs, Workload

COPIES = 16
"""Of the inputs, at most."""

FEWEST = 3
"""Rounds of even the slowest variant."""


class Step(Protocol):
    """One way to do a workload: `backward` takes what `forward` gives."""

    def forward(self) -> Tensor | None: ...

    def backward(self, loss: Tensor | None) -> None: ...


class Steps:
    """The steps of one variant, each on the next copy of the inputs."""

    def __init__(self, implementation: Implementation, temperature: float, copies: Sequence[Inputs]) -> None:
        self._loss = functools.partial(implementation, temperature)
        self._copies = [
            Inputs(tuple(x.detach().clone().requires_grad_() for x in copy.leaves), copy.rest)
            for copy in copies
        ]
        self._turn = 0

    def forward(self) -> Tensor:
        self._turn = (self._turn + 1) % len(self._copies)
        inputs = self._copies[self._turn]
        for leaf in inputs.leaves:
            leaf.grad = None
        return self._loss(*inputs.leaves, *inputs.rest)

    def backward(self, loss: Tensor | None) -> None:
        assert loss is not None
        loss.backward()


class Products:
    """The floor: plain products N x D · D x M into memory that is there, as many as the fewest operations are
    worth, by chunks of rows where the result would be large."""

    MATRIX = 1 << 30  # bytes of a result

    def __init__(self, work: Workload, device: str) -> None:
        self._count = work.spec.products

        def random(rows: int) -> Tensor:
            return torch.randn(rows, work.contraction, device=device).to(work.torch_dtype)

        self._left, self._right = random(work.rows), random(work.columns)
        rows = max(1, self.MATRIX // (work.columns * self._left.element_size()))
        self._chunks = self._left.split(min(rows, work.rows))
        self._out = torch.empty(len(self._chunks[0]), work.columns, device=device, dtype=work.torch_dtype)

    def forward(self) -> None:
        for _ in range(self._count):
            for chunk in self._chunks:
                torch.mm(chunk, self._right.T, out=self._out[: len(chunk)])

    def backward(self, loss: Tensor | None) -> None:
        pass


@dataclass
class Samples:
    """Seconds a step, a sample a round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float) -> None:
        self.forward.append(forward)
        self.backward.append(backward)
        self.both.append(forward + backward)


def copies(work: Workload, device: str, cache: int) -> list[Inputs]:
    """As many inputs as twice the last cache holds, but at most 16."""
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
) -> dict[str, Samples]:
    """Samples of each variant in turn, one a round; a sample repeats its step for `at_least` seconds.

    The variants of `often`, with which the others are compared, run again before each of those, and the
    median of a round is their sample. Every second round goes backwards. A variant takes part in `FEWEST`
    rounds, and in more until it has used its share of `seconds`, or all together have used them up. All have
    run before.
    """
    samples = {name: Samples() for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    repeats: dict[str, int] = {}
    others = [name for name in variants if name not in often]

    def sample(name: str) -> tuple[float, float]:
        take = _sample_gpu if device == "cuda" else _sample_cpu
        if name not in repeats:
            once = take(variants[name], 1)
            repeats[name] = max(1, min(100, round(at_least / max(sum(once), 1e-7))))
            if repeats[name] == 1:
                return once
        return take(variants[name], repeats[name])

    for turn in range(rounds):
        if turn >= FEWEST:
            others = [name for name in others if spent[name] < seconds / len(variants)]
            if sum(spent.values()) >= seconds or not (others or set(variants) <= set(often)):
                break
        left = [name for name in variants if name in often or name in others]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in left}
        for name in _order(left, often, backwards=turn % 2 == 1):
            found[name].append(sample(name))
            spent[name] += sum(found[name][-1]) * repeats[name]
        for name in left:
            samples[name].add(*sorted(found[name], key=sum)[len(found[name]) // 2])
    return samples


def _order(names: Sequence[str], often: Collection[str], backwards: bool) -> list[str]:
    """Each name once, and those of `often` around each of the others."""
    compared = [name for name in names if name in often]
    order = list(compared)
    for name in names:
        if name not in often:
            order += [name, *compared]
    return order[::-1] if backwards else order


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sample_cpu(steps: Step, repeats: int) -> tuple[float, float]:
    forward = backward = 0.0
    with _no_collection():
        for _ in range(repeats):
            start = time.perf_counter()
            loss = steps.forward()
            middle = time.perf_counter()
            steps.backward(loss)
            end = time.perf_counter()
            forward += middle - start
            backward += end - middle
    return forward / repeats, backward / repeats


HOLD = 1.5
"""How long the GPU is held before a sample, as a multiple of the time that its launches take the host."""


def _sample_gpu(steps: Step, repeats: int) -> tuple[float, float]:
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


@functools.cache
def _clock_rate() -> float:
    """Cycles a second of the GPU's clock, as `_sleep` counts them."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 10_000_000
    first.record()
    torch.cuda._sleep(cycles)
    last.record()
    last.synchronize()
    return cycles / (first.elapsed_time(last) / 1e3)


def graph_samples(implementation: Implementation, work: Workload, device: str, rounds: int) -> list[float]:
    """Seconds of forward and backward by replay of a CUDA graph, one sample a round."""
    inputs = work.inputs(device)
    leaves = [x.detach().clone().requires_grad_() for x in inputs.leaves]

    def step() -> None:
        torch.autograd.grad(implementation(work.temperature, *leaves, *inputs.rest), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(1e-3 * _clock_rate()))
        first.record()
        for _ in range(20):
            graph.replay()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1e3 / 20)
    return found


# What this machine reaches


def rate(operation: Callable[[], object], work: float, device: str, samples: int = 5) -> float:
    """`work` a second, by the fastest of some samples: a ceiling."""

    class Once:
        def forward(self) -> None:
            operation()

        def backward(self, loss: Tensor | None) -> None:
            pass

    found = interleaved({"": Once()}, device, samples, at_least=0.02)
    return work / min(found[""].both)


def ceilings(device: str, dtypes: Sequence[str]) -> dict[str, float]:
    """Operations a second of a square `torch.mm` by dtype, and "copy": bytes a second, read and written."""
    found = {}
    n = 8192 if device == "cuda" else 2048
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        found[dtype] = rate(functools.partial(torch.mm, a, b, out=out), 2.0 * n**3, device)
    source = torch.zeros(1 << 31 if device == "cuda" else 1 << 28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found["copy"] = rate(functools.partial(target.copy_, source), 2.0 * source.numel(), device)
    return found
