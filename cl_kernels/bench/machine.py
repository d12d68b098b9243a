"""The machine that a measurement ran on, and its load meanwhile."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
import torch

from .. import __version__, extension

PACKAGES = ("triton", "numpy", "pytorch-metric-learning", "lightly", "inf-cl", "memeff")


def describe(device: str) -> dict[str, Any]:
    """`device` is "cpu" or "cuda"; sizes are bytes."""
    on_gpu = device == "cuda"
    build = (extension.cuda if on_gpu else extension.cpu).build_info()
    found = {
        "kind": device,
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": capability(device),
        "governor": governor(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else memory(),
        "cache_bytes": cache(device),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cl_kernels": __version__,
        "commit": commit(),
        "extension": ", ".join(f"{k} {v}" for k, v in build.items()) or "none",
    }
    if on_gpu:
        found |= {"cpu": cpu_name(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """The commit of the checkout that the package is imported from; empty for an installed one."""
    root = Path(__file__).resolve().parents[2]
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=, with changes"]
    if not (root / ".git").exists() or not shutil.which("git"):
        return ""
    return subprocess.run(describe, cwd=root, capture_output=True, text=True).stdout.strip()


def command() -> str:
    """The command as it was typed, without the folders of this machine."""
    arguments = [Path(x).name if os.path.isabs(x) else x for x in sys.argv[1:]]
    program = Path(sys.argv[0])
    module = "-m cl_kernels" if program.name == "__main__.py" else program.name
    return shlex.join(["python", *module.split(), *arguments])


@functools.cache
def cpu_name() -> str:
    facts = cpuinfo.get_cpu_info()
    name = facts.get("brand_raw") or platform.processor() or platform.machine()
    return f"{name} (cpu family {facts['family']}, model {facts['model']})" if "model" in facts else name


def capability(device: str) -> str:
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return extension.cpu.build_info().get("cpu_capability") or torch.backends.cpu.get_cpu_capability().lower()


def multiplies_bfloat16(device: str) -> bool:
    """Whether the machine has instructions for it; without them torch's products take seconds."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16"))


def governor() -> str:
    """The policy of the first core's clock; "unknown" where the machine does not say, as virtual ones."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


def load() -> float:
    """Processes that wanted a core, on average over the last minute."""
    return round(psutil.getloadavg()[0], 2)


def memory() -> int:
    """Bytes that a process may use: the machine's, or fewer where its control group says so."""
    whole: int = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            return min(whole, int(Path(path).read_text()))
    return whole


def cache(device: str) -> int:
    """The last level's size; py-cpuinfo takes the second level's for it on some machines."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in files), default=0)
