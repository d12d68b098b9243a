"""pytest-benchmark over every loss, size, variant and phase: `make bench BENCH_FLAGS='-k sce'`.

The variants of a workload are checked and timed in turn, all at once, when its first test runs; each test
then reports its own samples. A variant that is not installed here is skipped, one with a wrong answer fails.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from cl_kernels.bench import fresh, machine, run, variants
from cl_kernels.bench.results import FLOOR, PHASES, Line
from cl_kernels.bench.variants import PEERS
from cl_kernels.bench.workloads import LOSSES, SIZES, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [*variants.serving_backends(DEVICE), "reference"]
SECONDS = 20.0  # for a workload, beyond three rounds
SMALL = 256


def workloads() -> list[Workload]:
    """The headline of every loss, and a small size, in the dtypes that the machine is used with."""
    found = []
    for dtype in ("float32", "bfloat16") if machine.multiplies_bfloat16(DEVICE) else ("float32",):
        for name, loss in LOSSES.items():
            sizes = SIZES[DEVICE][name]
            for rows in (SMALL, sizes.rows[-1]):
                found.append(Workload(name, *loss.shape(rows, sizes.queue), sizes.width, dtype))
    return found


def cases() -> list[tuple[Workload, str, str]]:
    found = []
    for work in workloads():
        names = variants.our_names(BACKENDS)
        names += [name for name, peer in PEERS.items() if work.loss in peer.losses]
        found += [(work, name, phase) for name in names for phase in PHASES]
        found.append((work, FLOOR, "both"))
    return found


@functools.lru_cache(maxsize=1)
def measured(work: Workload) -> dict[str, Line]:
    plan = run.Plan((work,), DEVICE, BACKENDS, study=False)
    return {line.variant: line for line in run.measure(plan, work, SECONDS)}


def name_of(value: object) -> str:
    return str(getattr(value, "name", value)).replace(" ", "-")


@pytest.mark.parametrize(("work", "variant", "phase"), cases(), ids=name_of)
def test_step(benchmark: BenchmarkFixture, work: Workload, variant: str, phase: str) -> None:
    missing = PEERS[variant].missing(DEVICE) if variant in PEERS else None
    if missing:
        pytest.skip(missing)
    line = measured(work)[variant]
    if line.status == fresh.MEMORY:
        pytest.skip(line.status)
    if line.status != "ok":
        pytest.fail(line.status)
    benchmark.group = f"{work.name}, {phase}"
    times = {"forward", "backward", "both", "graph"}
    benchmark.extra_info.update({k: v for k, v in asdict(line).items() if k not in times} | {"phase": phase})
    record(benchmark, getattr(line, phase))


def record(benchmark: BenchmarkFixture, samples: tuple[float, ...]) -> None:
    """Samples that were taken elsewhere, as the fixture records its own."""
    benchmark._mode = "interleaved"
    stats = benchmark._make_stats(iterations=1)
    for sample in samples:
        stats.update(sample)
