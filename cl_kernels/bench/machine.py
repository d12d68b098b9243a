"""What a measurement ran on, and what the machine was doing meanwhile."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cl_kernels

from .. import extension

PACKAGES = ("triton", "numpy", "pytorch-metric-learning", "lightly", "inf-cl", "memeff")


def describe(device: str) -> dict[str, Any]:
    """`device` is "cpu" or "cuda"; sizes are bytes."""
    on_gpu = device == "cuda"
    build = (extension.cuda if on_gpu else extension.cpu).build_info()
    found = {
        "kind": device,
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": capability(device),
        "governor": governor(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else memory(),
        "cache_bytes": cache(device),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cl_kernels": cl_kernels.__version__,
        "commit": commit(),
        "extension": ", ".join(f"{k} {v}" for k, v in build.items()) or "none",
    }
    if on_gpu:
        found |= {"cpu": cpu_name(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the checkout that the package is imported from; empty for an installed one."""
    root = Path(cl_kernels.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + (", with changes" if changed.stdout.strip() else "")


def command() -> str:
    """As it was typed, without the folders of this machine."""
    arguments = [Path(x).name if os.path.isabs(x) else x for x in sys.argv[1:]]
    program = Path(sys.argv[0])
    module = "-m cl_kernels" if program.name == "__main__.py" else program.name
    return shlex.join(["python", *module.split(), *arguments])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = ", ".join(f"{k} {fields[k]}" for k in ("cpu family", "model") if k in fields)
    return f"{name} ({family})" if family else name


def capability(device: str) -> str:
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    return extension.cpu.build_info().get("cpu_capability") or torch.backends.cpu.get_cpu_capability().lower()


def multiplies_bfloat16(device: str) -> bool:
    """Whether the machine has instructions for it; without them torch's products take seconds."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16"))


def governor() -> str:
    """Of the first core's clock; "unknown" where the machine does not say, as virtual ones do not."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


def load() -> float:
    """Processes that wanted a core, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def memory() -> int:
    """What a process may use: the machine's, or what its control group allows if that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(whole, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file; "max"
            continue
    return whole


def cache(device: str) -> int:
    """The last level's."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    return max(sizes)


def same_kind(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether ratios measured on two machines can be expected to agree."""
    return all(one.get(key) == other.get(key) for key in ("kind", "device", "capability", "threads"))
