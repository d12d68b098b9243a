"""Interleaved timing, and what the machine was like meanwhile."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    steps: dict[str, Callable[[], object]], rounds: int, at_least: float = 0.01
) -> dict[str, list[float]]:
    """Seconds a step: `rounds` samples of each variant, in turn; a sample repeats for `at_least` seconds."""
    repeats = {name: max(1, round(at_least / max(_sample(step, 1), 1e-7))) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(_sample(step, repeats[name]))
    return samples


def _sample(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def has_bf16_dot_products() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(
        capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16")
    )


def machine() -> dict[str, object]:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
            )
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
