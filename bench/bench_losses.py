"""pytest-benchmark of every variant of every workload: `make bench`, or `make bench BENCH_FLAGS='-k sce'`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import workloads
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import Workload

SMALL = (32, 64, 128, 256, 512)
LARGE = (4096, 8192)
FLOORS = ("floor", "floor, allocating")

BUILDERS: dict[str, Callable[[], Workload]] = {
    **{f"supcon-{n}-f32": functools.partial(workloads.supcon, n) for n in SMALL + LARGE},
    **{f"supcon-{n}-bf16": functools.partial(workloads.supcon, n, dtype=torch.bfloat16) for n in LARGE},
    "sce-f32": workloads.sce,
    "sce-bf16": functools.partial(workloads.sce, dtype=torch.bfloat16),
    "clip-f32": workloads.clip,
    "clip-bf16": functools.partial(workloads.clip, dtype=torch.bfloat16),
}


def cases() -> list[tuple[str, str]]:
    found = []
    for name in BUILDERS:
        variants = ["cl_kernels"]
        if not name.endswith("bf16"):
            variants.append("eager")
        if name in {f"supcon-{n}-f32" for n in LARGE}:
            variants += ["torch.compile", "linear_cross_entropy"]
        if name not in {f"supcon-{n}-f32" for n in SMALL}:
            variants += FLOORS
        found += [(name, variant) for variant in variants]
    return found


@functools.lru_cache(maxsize=1)
def build(name: str) -> Workload:
    return BUILDERS[name]()


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "variant"), cases(), ids=lambda value: value.replace(" ", "-"))
def test_step(benchmark: BenchmarkFixture, name: str, variant: str) -> None:
    workload = build(name)
    if variant not in workload.variants:
        pytest.skip(f"this torch has no {variant}")
    problem = workload.problem(variant)
    if problem:
        pytest.fail(problem)
    benchmark.group = workload.name + (" bf16" if workload.dtype == torch.bfloat16 else "")
    benchmark(workload.variants[variant].step)
